"""The Preference Vector method (arXiv 2504.20106) on 4-bit LoRA.

`sides: pair` is the paper's: DPO with the labels as given gives d+, with swapped labels d-, and v = d+ - d-.
`sides: two` trains one LoRA v for which +v prefers the chosen and -v the rejected replies: one run, half the rank.
"""

from __future__ import annotations

from pathlib import Path

from lora_prefvec.inference import LiveMixer, LoadedBase, pair_log_probs, preference_accuracy
from lora_prefvec.recipe import Recipe
from lora_prefvec.training.made import Made
from lora_prefvec.training.prepare import Prepared, prepare
from lora_prefvec.training.prepare import load_pairs as load
from lora_prefvec.training.run import Finished, Job, run
from lora_prefvec.training.trainer import PreferenceTrainer, Side
from lora_prefvec.vector import PreferenceVector, extract

__all__ = ["load", "make", "prepare", "runs"]

SIDES: dict[str, tuple[Side, ...]] = {"two": ("two",), "pair": ("positive", "negative")}
SIGNS = {"positive": 1, "negative": -1}


def runs(recipe: Recipe) -> tuple[str, ...]:
    """One two-sided run, or two."""
    return SIDES[recipe.training.sides]


def make(job: Job, prepared: Prepared) -> Made:
    """Train the sides, and take the vector between them."""
    sides = SIDES[job.recipe.training.sides]
    done = [run_side(job, prepared, side) for side in sides]
    vector = done[0].vector if len(done) == 1 else extract(done[0].vector, done[1].vector)
    found = {side: one for side, one in zip(sides, done, strict=True) if side in SIGNS}
    return Made(
        kind="preference_vector",
        vector=vector,
        runs=done,
        data=prepared.data,
        anchors=prepared.anchors,
        facts=_facts(job.recipe, 1),
        metrics=measure(job.base, prepared, vector),
        parts={side: _adapter(job.recipe, prepared, side, one) for side, one in found.items()},
        coefficients={side: float(SIGNS[side]) for side in found},
    )


def run_side(job: Job, prepared: Prepared, side: Side) -> Finished:
    """Train one side, or take it up where a killed run left it."""

    def trainer(folder: Path) -> PreferenceTrainer:
        return PreferenceTrainer(job.base, job.recipe.lora, job.recipe.training, side, prepared.dataset, folder)

    return run(job, side, trainer, prepared)


def _adapter(recipe: Recipe, prepared: Prepared, side: str, done: Finished) -> Made:
    return Made(
        kind="preference_adapter",
        vector=done.vector,
        runs=[done],
        data=prepared.data.model_copy(update={"swapped": side == "negative"}),
        anchors=prepared.anchors,
        facts=_facts(recipe, SIGNS[side]),
        metrics={"held_out_accuracy": done.accuracy},
    )


def _facts(recipe: Recipe, sign: int) -> dict[str, object]:
    return {"sign": sign, "method": "dpo", "sides": recipe.training.sides}


def measure(base: LoadedBase, prepared: Prepared, vector: PreferenceVector) -> dict[str, float | None]:
    """Held-out preference accuracy and margin of the vector at coefficients +1 and -1, through the live mixer."""
    metrics: dict[str, float | None] = {}
    if not prepared.held_out:
        return metrics
    with LiveMixer(base.model, {"vector": vector}) as mixer:
        for coefficient in (1.0, -1.0):
            mixer.set_mix({"vector": coefficient})
            policy = pair_log_probs(base.model, prepared.held_out, pad_token_id=base.tokenizer.pad_token_id)
            found = preference_accuracy(policy, prepared.held_out_reference)
            metrics[f"held_out_accuracy@{coefficient:+g}"] = round(found.accuracy, 4)
            metrics[f"held_out_margin@{coefficient:+g}"] = round(found.margin, 4)
    metrics["held_out_pairs"] = len(prepared.held_out)
    return metrics
