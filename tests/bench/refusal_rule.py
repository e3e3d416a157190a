"""How often the refusal rule agrees with a reader, on tests/evaluation/refusals.jsonl.

    python tests/bench/refusal_rule.py

Writes tests/bench/results/refusal_rule.md. With `--judge REFERENCE` it prints the same table for a judge instead:
`judge:http://HOST:PORT/v1#MODEL?axis=refusal`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_prefvec.evaluation.scorers import Scorer, apply, find_scorer

SAMPLE = Path(__file__).parents[1] / "evaluation" / "refusals.jsonl"
RESULT = Path(__file__).parent / "results" / "refusal_rule.md"
PARTLY = {"partly counts as no refusal": {"refuses"}, "partly counts as a refusal": {"refuses", "partly"}}

HEAD = """\
# The refusal rule beside a reader

`python tests/bench/refusal_rule.py` makes this page.

The rule is XSTest's: a reply refuses if it begins with one of 21 phrases. The sample, `refusals.jsonl` in
tests/evaluation, holds {n} replies that were written for it and labelled on the way, by one annotator: refuses, partly,
complies. They answer

- requests of the sandbox (sandbox), where two of the four refusals that its base knows begin as the rule expects;
- safe requests that sound unsafe, and unsafe ones, in the manner of XSTest: as a common chat model would (ordinary),
  and so that a rule of first words has it hard (edges: refusals that begin otherwise, apologies and a "No," before an
  answer).

How often the rule is right depends on how often such replies come: no figure here is that of a model. Where it
matters, take a judge (`--scorer 'judge:...'`), and on the sandbox its exact scorers.

| replies | partial refusals | n | accuracy | Cohen's kappa | refusals found | answers taken for refusals |
|---|---|---|---|---|---|---|
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--judge", metavar="REFERENCE")
    judge = parser.parse_args().judge
    page = report(find_scorer(judge or "refusal"))
    if not judge:
        RESULT.write_text(page, encoding="utf-8")
    print(page)


def report(scorer: Scorer) -> str:
    """The page for a scorer that says how much a reply refuses, from 0 to 1; a half counts as a partial refusal."""
    rows = [json.loads(line) for line in SAMPLE.read_text(encoding="utf-8").splitlines()]
    scores = apply(scorer, [row["prompt"] for row in rows], [row["reply"] for row in rows])
    lines = []
    for source in ("sandbox", "ordinary", "edges", "all"):
        chosen = [i for i, row in enumerate(rows) if source in (row["source"], "all") and scores[i] is not None]
        for how, refusing in PARTLY.items():
            least = 0.5 if "partly" in refusing else 1.0
            pairs = [((scores[i] or 0.0) >= least, rows[i]["verdict"] in refusing) for i in chosen]
            lines.append(f"| {source} | {how} | {len(pairs)} | {' | '.join(agreement(pairs))} |")
    wrong = [row for row, score in zip(rows, scores, strict=True) if score == 0.0 and row["verdict"] == "refuses"]
    taken = [row for row, score in zip(rows, scores, strict=True) if score == 1.0 and row["verdict"] == "complies"]
    missed = (
        f"\nRefusals that it misses begin: {begin(wrong)}\n\nAnswers that it takes for refusals begin: {begin(taken)}\n"
    )
    return HEAD.format(n=len(rows)) + "\n".join(lines) + "\n" + missed


def agreement(pairs: Sequence[tuple[bool, bool]]) -> list[str]:
    """Accuracy, kappa, recall and false alarms of (said, true) pairs, as text."""
    said, true = [one for one, _ in pairs], [one for _, one in pairs]
    found = sum(one and other for one, other in pairs)
    alarms = sum(one and not other for one, other in pairs)
    accuracy = sum(one == other for one, other in pairs) / len(pairs)
    return [
        f"{accuracy:.3f}",
        f"{kappa(said, true):.3f}",
        f"{found} of {sum(true)}",
        f"{alarms} of {len(true) - sum(true)}",
    ]


def kappa(said: Sequence[bool], true: Sequence[bool]) -> float:
    """Cohen's kappa of two raters who say yes or no: agreement beyond what their rates would give by chance."""
    n = len(said)
    observed = sum(one == other for one, other in zip(said, true, strict=True)) / n
    p, q = sum(said) / n, sum(true) / n
    expected = p * q + (1 - p) * (1 - q)
    return 1.0 if expected == 1 else (observed - expected) / (1 - expected)


def begin(rows: Sequence[dict[str, Any]]) -> str:
    """The first words of replies, each once."""
    firsts = dict.fromkeys(" ".join(row["reply"].split()[:5]) for row in rows)
    return "; ".join(f"“{first}”" for first in firsts) or "none."


if __name__ == "__main__":
    main()
