"""Helpful and harmless from real pairs (hh-rlhf) on a dialogue model of 5.8M parameters, in 4-bit.

    python tests/bench/real_pairs.py

Trains both preferences as the paper does (two runs each), then reports held-out preference accuracy (implicit reward
against the base) of d+, d- and of the vector at several coefficients, the cosine of the two vectors, and replies to ten
everyday questions at several mixes. Writes tests/bench/results/real_pairs.json and .md. The base and the pairs are read
from $PREFVEC_SHARED, or the folder `shared` beside the checkout. About half an hour on one core.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import platform
import time
from pathlib import Path

from lora_prefvec.progress import quiet_libraries

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
quiet_libraries()

import torch  # noqa: E402

from lora_prefvec.artifact import read_adapter  # noqa: E402
from lora_prefvec.data import load  # noqa: E402
from lora_prefvec.inference import (  # noqa: E402
    LiveMixer,
    generate,
    load_base,
    pair_log_probs,
    preference_accuracy,
    render_pairs,
)
from lora_prefvec.recipe import parse_recipe  # noqa: E402
from lora_prefvec.training import train  # noqa: E402

RESULTS = Path(__file__).parent / "results"
SHARED = Path(os.environ.get("PREFVEC_SHARED", Path(__file__).parents[3] / "shared"))
PROMPT_TOKENS, REPLY_TOKENS = 96, 96
RECIPE = """
preference: {name}
base: {{id: {base}}}
data: {{source: {data}/hh_{name}_base.train.jsonl.gz}}
held_out: {{source: {data}/hh_{name}_base.test.jsonl.gz}}
training:
  sides: pair
  learning_rate: 2.0e-4
  batch_size: 16
  micro_batch_size: 2
  gradient_checkpointing: false
  evaluate_every: 1000
  max_prompt_tokens: {prompt}
  max_reply_tokens: {reply}
"""
MIXES = [{}, {"helpful": 1.0}, {"harmless": 1.0}, {"helpful": 1.0, "harmless": 1.0}, {"helpful": -1.0}]


def main() -> None:
    """Train what is missing under --work, measure, write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/real-pairs"), help="Where the vectors are kept.")
    parser.add_argument("--steps", type=int, help="Fewer steps, to try the script.")
    arguments = parser.parse_args()
    folder = SHARED / "models" / "dialogue-6m"
    base = load_base(folder)
    results: dict[str, object] = {
        "command": "python tests/bench/real_pairs.py",
        "machine": f"{torch.get_num_threads()} threads, {platform.machine()}, compute {base.model.dtype}",
        "base": "dialogue-6m, 5.8M parameters, NF4 with double quantisation",
        "preferences": {},
    }
    vectors = {}
    for name in ("helpful", "harmless"):
        text = RECIPE.format(
            name=name, base=folder, data=SHARED / "data" / "preference", prompt=PROMPT_TOKENS, reply=REPLY_TOKENS
        )
        recipe = parse_recipe(text, overrides=[f"training.max_steps={arguments.steps}"] if arguments.steps else [])
        out = arguments.work / name
        if not out.exists():
            train(recipe, out, base=base, resume=True)
        sides = {"+": read_adapter(out / "positive").vector, "-": read_adapter(out / "negative").vector}
        vectors[name] = read_adapter(out).vector
        facts = read_adapter(out).provenance
        assert facts is not None
        assert facts.training is not None
        results["preferences"][name] = {  # type: ignore[index]
            "training": facts.training.model_dump(mode="json"),
            "cosine_of_+_and_-": sides["+"].cosine(sides["-"]),
            "accuracy": accuracies(base, name, {**sides, "vector": vectors[name]}),
        }
    results["cosine_of_helpful_and_harmless"] = vectors["helpful"].cosine(vectors["harmless"])
    results["replies"] = replies(base, vectors)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "real_pairs.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    table = markdown(results)
    (RESULTS / "real_pairs.md").write_text(table, encoding="utf-8")
    print(table)


def accuracies(base, name, vectors):  # type: ignore[no-untyped-def]
    """Accuracy and margin on 500 held-out pairs of d+, d- and of the vector at -2, -1, 1, 2."""
    found = load(str(SHARED / "data" / "preference" / f"hh_{name}_base.test.jsonl.gz"))
    rendered = render_pairs(
        found.pairs, base.tokenizer, max_prompt_tokens=PROMPT_TOKENS, max_reply_tokens=REPLY_TOKENS
    ).pairs
    pad = base.tokenizer.pad_token_id
    reference = pair_log_probs(base.model, rendered, pad_token_id=pad)
    rows = {}
    with LiveMixer(base.model, vectors) as mixer:
        for label, mix in {
            "d+": {"+": 1.0},
            "d-": {"-": 1.0},
            **{f"v at {c:+g}": {"vector": float(c)} for c in (-2, -1, 1, 2)},
        }.items():
            mixer.set_mix(mix)
            one = preference_accuracy(pair_log_probs(base.model, rendered, pad_token_id=pad), reference)
            rows[label] = {
                "accuracy": one.accuracy,
                "interval_95": [one.accuracy - 1.96 * one.accuracy_error, one.accuracy + 1.96 * one.accuracy_error],
                "margin": one.margin,
                "margin_error": one.margin_error,
                "pairs": one.pairs,
            }
    return rows


def replies(base, vectors):  # type: ignore[no-untyped-def]
    """Ten everyday questions, answered at several mixes from the same seeds."""
    file = SHARED / "data" / "eval" / "vicuna_bench_questions.jsonl.gz"
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        questions = [json.loads(line)["turns"][0] for line in lines][:10]
    with LiveMixer(base.model, vectors) as mixer:
        rows = [(question, mix) for question in questions for mix in MIXES]
        texts = generate(
            base,
            [question for question, _ in rows],
            max_new_tokens=48,
            temperature=0.7,
            seed=[questions.index(question) for question, _ in rows],
            mixer=mixer,
            mixes=[mix for _, mix in rows],
        )
    return [
        {"question": question, "mix": mix, "reply": text} for (question, mix), text in zip(rows, texts, strict=True)
    ]


def markdown(results):  # type: ignore[no-untyped-def]
    """The table of README."""
    lines = [
        "| preference | d+ | d- | v at -2 | v at -1 | v at +1 | v at +2 | cos(d+, d-) |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, facts in results["preferences"].items():
        cells = [
            f"{row['accuracy']:.3f} ± {row['accuracy'] - row['interval_95'][0]:.3f}"
            for row in facts["accuracy"].values()
        ]
        lines.append(f"| {name} | {' | '.join(cells)} | {facts['cosine_of_+_and_-']:.2f} |")
    lines.append(f"\ncos(helpful, harmless) = {results['cosine_of_helpful_and_harmless']:.2f}; ± is a 95 % interval.")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    started = time.monotonic()
    main()
    print(f"{time.monotonic() - started:.0f} s")
