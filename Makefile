# From a bare Python 3.11 or newer: `make demo` and `make test` create .venv, install into it, and run.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed

# Threads that spin while they wait slow down everything else on the machine.
export OMP_WAIT_POLICY := passive

.PHONY: demo test gpu-check lint format clean

demo: $(INSTALLED)
	$(BIN)/prefvec demo --out demo --force

# Two workers, each with one thread: small models gain nothing from more.
test: export OMP_NUM_THREADS := 1
test: $(INSTALLED)
	$(BIN)/pytest -n 2 --dist loadfile

gpu-check: $(INSTALLED)
	@$(BIN)/python -c "import sys, torch; torch.cuda.is_available() or sys.exit('no CUDA device: torch sees none')"
	$(BIN)/pytest -m gpu
	$(BIN)/python tests/bench/gpu_8b.py

lint: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(INSTALLED)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c "import sys; sys.version_info < (3, 11) and sys.exit(f'Python 3.11 or newer is needed, \
	$(PYTHON) is {sys.version.split()[0]}. Name another: make PYTHON=python3.12')"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

clean:
	rm -rf .venv demo build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
