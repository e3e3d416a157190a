"""`prefvec train`: the plan, the result, and one line for everything that is wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file, save_file

from lora_prefvec.cli.main import main
from tests.training.tiny import hidden, tiny_recipe, write_pairs

Line = Callable[..., tuple[int, str, str]]


@pytest.fixture
def place(tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with `tiny.yaml` and its pairs, in which one stands."""
    monkeypatch.setattr("lora_prefvec.cli.main.quiet_libraries", lambda: None)
    monkeypatch.chdir(tmp_path)
    write_pairs(tmp_path / "pairs.jsonl")
    recipe = tiny_recipe(tiny_llama, Path("pairs.jsonl"), max_steps=2)
    (tmp_path / "tiny.yaml").write_text(recipe.to_yaml())
    return tmp_path


@pytest.fixture
def train(place: Path, capsys: pytest.CaptureFixture[str]) -> Line:
    """Runs `prefvec train tiny.yaml --out out ...`: exit code, stdout, stderr."""

    def run(*arguments: str) -> tuple[int, str, str]:
        code = main(["train", "tiny.yaml", "--out", "out", *arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_training_tells_what_came_out(train: Line, place: Path) -> None:
    code, told, _ = train()
    assert code == 0
    assert told.startswith(f"tiny: vector of rank 4 in {place / 'out'}\n")
    assert "held out accuracy@+1: 1\n" in told
    assert told.endswith("Talk to it: prefvec chat out=1.0\n")
    assert main(["inspect", "out"]) == 0
    code, _, error = train()
    assert (code, error) == (2, "error: out exists. Choose another --out, or replace it with --force.\n")
    code, told, _ = train("--force", "--format", "json", "--set", "preference=other")
    assert code == 0
    assert json.loads(told)["rank"] == 4
    assert json.loads((place / "out" / "prefvec.json").read_text())["preference"] == "other"


def test_a_dry_run_foretells_and_writes_nothing(train: Line, place: Path) -> None:
    code, told, _ = train("--dry-run", "--format", "json", "--set", "training.sides=pair", "--set", "training.epochs=2")
    assert code == 0
    plan = json.loads(told)
    assert {key: plan[key] for key in ("training_pairs", "held_out_pairs", "runs", "steps")} == {
        "training_pairs": 32,
        "held_out_pairs": 8,
        "runs": 2,
        "steps": 4,
    }
    assert not (place / "out").exists()
    assert hidden(place) == []


def pairs_file(rows: list[dict[str, Any]]) -> Callable[[Path], None]:
    def write(place: Path) -> None:
        (place / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    return write


def changed_base(change: Callable[[Path], None]) -> Callable[[Path], None]:
    """A copy of the base in `./base`, changed, and a recipe that names it."""

    def prepare(place: Path) -> None:
        recipe = yaml.safe_load((place / "tiny.yaml").read_text())
        shutil.copytree(recipe["base"]["id"], place / "base")
        change(place / "base")
        recipe["base"]["id"] = "./base"
        (place / "tiny.yaml").write_text(yaml.safe_dump(recipe))

    return prepare


def without_template(base: Path) -> None:
    (base / "chat_template.jinja").unlink()


def another_kind(base: Path) -> None:
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(
        json.dumps(config | {"model_type": "vit", "architectures": ["ViTForImageClassification"]})
    )


def pickled(base: Path) -> None:
    (base / "model.safetensors").rename(base / "pytorch_model.bin")


def damaged(base: Path) -> None:
    weights = (base / "model.safetensors").read_bytes()
    (base / "model.safetensors").write_bytes(weights[: len(weights) // 2])


def incomplete(base: Path) -> None:
    weights = load_file(base / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, base / "model.safetensors", {"format": "pt"})


def recipe_with(old: str, new: str) -> Callable[[Path], None]:
    def write(place: Path) -> None:
        text = (place / "tiny.yaml").read_text()
        assert old in text
        (place / "tiny.yaml").write_text(text.replace(old, new))

    return write


SAME = {"prompt": "a", "chosen": "b", "rejected": "b"}
PLAIN = {"prompt": "a", "chosen": "b", "rejected": "c"}


@pytest.mark.parametrize(
    ("prepare", "parts"),
    [
        (recipe_with("beta:", "betta:"), ["tiny.yaml, line", "unknown key 'training.betta'", "'beta'"]),
        (
            recipe_with("pairs.jsonl", "paris.jsonl"),
            ["tiny.yaml, line", "'paris.jsonl' does not exist", "'pairs.jsonl'"],
        ),
        (recipe_with("all-linear", "[q_prj]"), ["lora.targets", "'q_prj'", "Did you mean 'q_proj'?"]),
        (pairs_file([]), ["pairs.jsonl"]),
        (pairs_file([{"text": "a", "label": 1}] * 20), ["pairs.jsonl", "text"]),
        (pairs_file([SAME] * 20), ["pairs.jsonl", "chosen"]),
        (pairs_file([PLAIN] * 4), ["cannot hold out 8 of 4 pairs"]),
        (changed_base(without_template), ["no chat template", "instruction-tuned"]),
        (changed_base(another_kind), ["ViTForImageClassification", "no causal language model"]),
        (changed_base(pickled), ["no safetensors weights", "save_pretrained"]),
        (changed_base(damaged), ["base", "cannot be loaded"]),
        (changed_base(incomplete), ["base lacks weights", "model.layers.1.mlp.up_proj.weight"]),
        (lambda place: (place / "out").mkdir(), ["out exists", "--force"]),
    ],
)
def test_what_is_wrong_is_one_line_and_exit_code_2(
    prepare: Callable[[Path], None], parts: list[str], place: Path, train: Line
) -> None:
    prepare(place)
    code, told, error = train()
    assert (code, told) == (2, ""), error
    last = error.splitlines()[-1]
    assert last.startswith("error: ")
    assert error.count("error: ") == 1
    for part in parts:
        assert part in last
    assert hidden(place) == []


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--set", "training.betta=1"], ["--set training.betta", "'beta'"]),
        (["--set", "training.beta"], ["no assignment", "--set training.beta=0.2"]),
        (["--set", "data.source=paris.jsonl"], ["--set data.source", "'pairs.jsonl'"]),
    ],
)
def test_a_wrong_override_is_one_line(arguments: list[str], parts: list[str], train: Line) -> None:
    code, _, error = train(*arguments)
    assert (code, error.count("\n")) == (2, 1)
    for part in parts:
        assert part in error


def test_a_recipe_that_is_not_there_has_a_near_name(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "sandbox-helpfull", "--out", "out"]) == 2
    assert "Did you mean 'sandbox-helpful'?" in capsys.readouterr().err


def test_a_run_that_diverges_ends_with_1(train: Line, place: Path) -> None:
    code, told, error = train("--set", "training.learning_rate=1e38", "--set", "training.warmup_ratio=0")
    assert (code, told) == (1, "")
    assert "Lower training.learning_rate (now 1e+38)" in error.splitlines()[-1]
    assert not (place / "out").exists()
