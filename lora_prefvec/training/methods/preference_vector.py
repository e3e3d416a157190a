"""The Preference Vector method (arXiv 2504.20106) on 4-bit LoRA: recipe -> adapters and vector.

`sides: pair` is the paper's: DPO with the labels as given gives d+, with swapped labels d-, and v = d+ - d-.
`sides: two` trains one LoRA v for which +v prefers the chosen and -v the rejected replies: one run, half the rank.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from lora_prefvec.artifact import (
    Parent,
    Provenance,
    TrainingFacts,
    atomic_file,
    atomic_folder,
    base_identity,
    check_output,
    check_target,
    fill_adapter,
    read_adapter,
    resolve_base,
)
from lora_prefvec.errors import InputError
from lora_prefvec.inference import LiveMixer, LoadedBase, load_base, pair_log_probs, preference_accuracy
from lora_prefvec.recipe import Recipe, parse_recipe
from lora_prefvec.training.adapter import check_targets
from lora_prefvec.training.prepare import Pairs, Prepared, load_pairs, prepare
from lora_prefvec.training.run import FINISHED, Finished, run_side
from lora_prefvec.training.trainer import Side, remove_folder
from lora_prefvec.vector import BaseIdentity, PreferenceVector, extract

SIDES: dict[str, tuple[Side, ...]] = {"two": ("two",), "pair": ("positive", "negative")}
LIBRARIES = ("lora-prefvec", "torch", "transformers", "peft", "trl", "bitsandbytes")


@dataclass(frozen=True)
class Trained:
    """What `train` wrote.

    Args:
        folder: the vector's artifact; a pair's adapters lie in it as `positive` and `negative`.
        vector: the preference vector.
        metrics: held-out preference accuracy of the adapters and of the vector at -1 and +1.
    """

    folder: Path
    vector: PreferenceVector
    metrics: dict[str, float | None]


def train(
    recipe: Recipe, out: str | Path, *, resume: bool = False, force: bool = False, base: LoadedBase | None = None
) -> Trained:
    """Train the preference vector of a recipe and write it to `out`.

    Work in progress lies in a hidden folder beside `out`; after a kill at any moment, `resume` ends in the same adapter
    as an unbroken run, bit for bit on a CPU.

    Args:
        base: a base that is loaded already, as the recipe asks for it; several preferences can share one.
        resume: go on with an unfinished run.
        force: replace `out`, and throw an unfinished run away unless `resume`.

    Raises:
        InputError: bad recipe, data, base or place; nothing was trained.
        Interrupted, RunError: as `run_side`.
    """
    if resume and not force and (complete := completed(check_target(out, force=True), recipe)):
        return complete
    target = check_output(out, force)
    work = claim_work(target, recipe, resume=resume, force=force)
    pairs = load_pairs(recipe)
    check_data(work, pairs)
    if base is None:
        base = load_base(
            resolve_base(recipe.base.id, recipe.base.revision),
            quantization=recipe.base.quantization,
            compute_dtype=recipe.training.compute_dtype,
        )
    check_targets(base.model, recipe.lora)
    identity = base_identity(recipe.base.id, recipe.base.revision, recipe.base.quantization)
    prepared = prepare(recipe, pairs, base)
    work.mkdir(parents=True, exist_ok=True)
    for name, text in (("recipe.yaml", recipe.to_yaml()), ("data.json", data_hashes(pairs))):
        with atomic_file(work / name, force=True) as file:
            file.write_text(text, encoding="utf-8")
    runs = [run_side(base, prepared, recipe, side, work / side, identity) for side in SIDES[recipe.training.sides]]
    vector = runs[0].vector if len(runs) == 1 else extract(runs[0].vector, runs[1].vector)
    metrics = measure(base, prepared, vector)
    write(target, recipe, base, prepared, identity, runs, vector, metrics, force=force)
    remove_folder(work)
    return Trained(target, vector, metrics)


def work_folder(target: Path) -> Path:
    """The hidden folder of work in progress on `target`."""
    return target.with_name(f".{target.name}.training")


def completed(target: Path, recipe: Recipe) -> Trained | None:
    """What lies at `target` if this recipe made it: its run was killed between its last write and its clearing up."""
    file, work = target / "recipe.yaml", work_folder(target)
    if not file.is_file() or file.read_text(encoding="utf-8") != recipe.to_yaml():
        return None
    if work.exists() and not all((work / side / FINISHED).is_dir() for side in SIDES[recipe.training.sides]):
        return None
    adapter = read_adapter(target)
    remove_folder(work)
    return Trained(target, adapter.vector, adapter.provenance.metrics if adapter.provenance else {})


def claim_work(target: Path, recipe: Recipe, *, resume: bool, force: bool) -> Path:
    """The hidden folder of work in progress, after making sure that it belongs to this recipe."""
    work = work_folder(target)
    if not work.exists():
        return work
    if not resume:
        if not force:
            raise InputError(
                f"an unfinished run for {target} is there",
                "Go on with --resume, or start again with --force.",
            )
        remove_folder(work)
        return work
    file = work / "recipe.yaml"
    if file.is_file():
        before, now = keys(parse_recipe(file.read_text(encoding="utf-8"), str(file))), keys(recipe)
        changed = [key for key in {**before, **now} if before.get(key) != now.get(key)]
        if changed:
            raise InputError(
                f"the unfinished run for {target} was made with another recipe ({', '.join(changed)} differ)",
                "Resume with the same recipe, or start again with --force.",
            )
    return work


def keys(recipe: Recipe) -> dict[str, object]:
    """A recipe's values by dotted key."""
    found: dict[str, object] = {}
    for name, value in recipe.model_dump().items():
        found |= {f"{name}.{key}": inner for key, inner in value.items()} if isinstance(value, dict) else {name: value}
    return found


def data_hashes(pairs: Pairs) -> str:
    """What tells whether a run goes on with the data that it began with."""
    return json.dumps([facts.sha256 for facts in (pairs.data, pairs.anchor_facts) if facts])


def check_data(work: Path, pairs: Pairs) -> None:
    """Raises InputError where an unfinished run was made with other data."""
    file = work / "data.json"
    if file.is_file() and file.read_text(encoding="utf-8") != data_hashes(pairs):
        raise InputError(
            "the data have changed since the unfinished run was made", "Put them back, or start again with --force."
        )


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


def write(
    target: Path,
    recipe: Recipe,
    base: LoadedBase,
    prepared: Prepared,
    identity: BaseIdentity,
    runs: list[Finished],
    vector: PreferenceVector,
    metrics: dict[str, float | None],
    *,
    force: bool,
) -> None:
    """Write the vector, and a pair's two adapters inside its folder, all at once."""
    text = recipe.to_yaml()
    spec = recipe.training

    def provenance(kind: str, sign: int, finished: list[Finished], swapped: bool, **more: object) -> Provenance:
        facts = TrainingFacts(
            beta=spec.beta,
            learning_rate=spec.learning_rate,
            epochs=spec.epochs,
            steps=sum(run.steps for run in finished),
            batch_size=spec.batch_size,
            rank=recipe.lora.rank,
            seed=spec.seed,
            sft_weight=spec.sft_weight,
            anchor_share=recipe.anchors.share if recipe.anchors else None,
            compute_dtype=str(base.model.dtype).removeprefix("torch."),
            device=base.device.type,
            libraries={name: version(name) for name in LIBRARIES},
            wall_seconds=round(sum(run.wall_seconds for run in finished), 1),
            peak_memory_bytes=max(run.peak_memory_bytes for run in finished),
        )
        return Provenance.model_validate(
            {
                "kind": kind,
                "preference": recipe.preference,
                "sign": sign,
                "method": "dpo",
                "sides": spec.sides,
                "base": identity,
                "data": prepared.data.model_copy(update={"swapped": swapped}),
                "anchors": prepared.anchors,
                "training": facts,
                **more,
            }
        )

    with atomic_folder(target, force) as folder:
        parents = []
        if spec.sides == "pair":
            for side, sign, finished in zip(("positive", "negative"), (1, -1), runs, strict=True):
                facts = provenance(
                    "preference_adapter",
                    sign,
                    [finished],
                    sign < 0,
                    metrics={"held_out_accuracy": finished.accuracy},
                )
                (folder / side).mkdir()
                sha256 = fill_adapter(folder / side, finished.vector, facts, recipe=text)
                parents.append(Parent(name=f"{recipe.preference} {side}", sha256=sha256, coefficient=float(sign)))
        facts = provenance("preference_vector", 1, runs, False, parents=parents, metrics=metrics)
        fill_adapter(folder, vector, facts, recipe=text)
