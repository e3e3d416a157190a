"""The model card: what an adapter is, where it comes from, how to use it, and what not to expect."""

from __future__ import annotations

import yaml

from lora_prefvec.artifact.condition import told, write_condition
from lora_prefvec.artifact.provenance import ConditionFacts, DataFacts, Parent, Provenance
from lora_prefvec.vector import written_coefficient

_WHAT = {
    "preference_adapter": "a preference adapter",
    "preference_vector": "a preference vector",
    "mix": "a mix of preference vectors",
    "conditional_adapter": "a conditional preference adapter",
    "reward_model": "a reward model",
    "fold": "a model with preference vectors folded in",
}
_SIDES = {"pair": "two runs, the second with swapped labels", "two": "one two-sided run"}


def model_card(facts: Provenance, *, rank: int, modules: int) -> str:
    """`README.md` of an adapter folder: YAML front matter for the Hub, then prose.

    Args:
        rank: of every module as it is written.
        modules: how many linear layers are adapted.
    """
    parts = [
        f"---\n{yaml.safe_dump(_front_matter(facts), sort_keys=False, allow_unicode=True)}---",
        f"# {_title(facts)}",
        _summary(facts, rank, modules),
        _parents(facts),
        _training(facts),
        _metrics(facts),
        _usage(facts, rank),
        _limits(facts),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _front_matter(facts: Provenance) -> dict[str, object]:
    matter: dict[str, object] = {}
    if facts.base and "/" in facts.base.id:
        matter["base_model"] = facts.base.id
        matter["base_model_relation"] = "adapter"
    matter["library_name"] = "peft"
    matter["pipeline_tag"] = "text-generation"
    matter["tags"] = ["lora", "preference-vector", "lora-prefvec", *([facts.method] if facts.method == "dpo" else [])]
    if facts.data and "/" in facts.data.id:
        matter["datasets"] = [facts.data.id]
    return matter


def _title(facts: Provenance) -> str:
    name = facts.preference or " + ".join(parent.name for parent in facts.parents) or "unnamed"
    sign = ", swapped labels" if facts.sign == -1 else ""
    return " ".join(f"{name}: {_WHAT[facts.kind]}{sign}".split())


def _base_name(facts: Provenance) -> str:
    if facts.base is None:
        return "an unknown base"
    return f"`{facts.base.id}`" + (f" at revision `{facts.base.revision}`" if facts.base.revision else "")


def _summary(facts: Provenance, rank: int, modules: int) -> str:
    size = f"A LoRA of rank {rank} on {modules} linear layers of {_base_name(facts)}"
    name = f"**{facts.preference}**" if facts.preference else "the preference"
    if facts.kind == "preference_vector":
        return (
            f"{size}. Added with a positive coefficient it moves the answers towards {name}, with a negative one "
            "away from it; 1.0 is where to start, -1 to 2 the usual range. Vectors of one base add up, so that several "
            "preferences can be mixed at inference time, and a new one needs no retraining of the others."
        )
    if facts.condition:
        how = f", trained by {facts.method.upper()}" if facts.method else ""
        return f"{size}{how}. What is asked for stands in the prompt: {told(facts.condition)}."
    if facts.objectives:
        weighed = ", ".join(f"{one.name} {one.weight:g}" for one in facts.objectives)
        return f"{size}, trained by {(facts.method or '').upper()} on objectives of the weights {weighed}."
    if facts.kind == "preference_adapter":
        labels = "chosen and rejected replies exchanged" if facts.sign == -1 else "the labels as given"
        return (
            f"{size}, trained by DPO with {labels} for {name}. The preference vector is the adapter trained with the "
            "labels as given minus the one trained with them exchanged (`prefvec extract`)."
        )
    if facts.reward:
        return (
            f"{size}, with one linear head on the last hidden state for each of {', '.join(facts.reward.axes)}: what a "
            "reply is rated, learned by least squares. It rates replies and writes none."
        )
    return f"{size}: {_WHAT[facts.kind]}{f', combined by the method `{facts.method}`' if facts.method else ''}."


def _parents(facts: Provenance) -> str:
    if not facts.parents:
        return ""
    rows = [[parent.name, _part(parent), parent.revision or "-", _short(parent.sha256)] for parent in facts.parents]
    return "## Made from\n\n" + _table(["adapter", "coefficient", "revision", "SHA-256 of the weights"], rows)


def _training(facts: Provenance) -> str:
    run, rows = facts.training, list[list[str]]()
    if facts.method and run:
        sides = _SIDES.get(facts.sides or "", "")
        rows.append(["method", ", ".join(filter(None, [facts.method.upper(), sides]))])
    if facts.base and run:
        rows.append(["precision of the base", facts.base.quantization])
    if run:
        numbers = {
            "beta": run.beta,
            "learning rate": run.learning_rate,
            "LoRA rank": run.rank,
            "epochs": run.epochs,
            "steps": run.steps,
            "batch size": run.batch_size,
            "weight of the SFT term": run.sft_weight,
            "seed": run.seed,
            "share of anchors": run.anchor_share,
        }
        rows += [[name, f"{value:g}"] for name, value in numbers.items() if value is not None]
    for name, data, counted in (("data", facts.data, facts.counted), ("anchors", facts.anchors, "pairs")):
        if data:
            rows.append([name, _data(data, counted)])
    if run:
        if run.wall_seconds is not None:
            rows.append(["time", f"{run.wall_seconds:.0f} s" + (f" on {run.device}" if run.device else "")])
        if run.peak_memory_bytes is not None:
            rows.append(["peak memory", f"{run.peak_memory_bytes / 2**30:.2f} GiB"])
        if run.libraries:
            versions = ", ".join(f"{name} {version}" for name, version in sorted(run.libraries.items()))
            rows.append(["libraries", versions])
    return "## Training\n\n" + _table(["", ""], rows) if rows else ""


def _data(data: DataFacts, counted: str) -> str:
    said = [f"`{data.id}`"]
    if data.revision:
        said.append(f"revision `{data.revision}`")
    if data.split:
        said.append(f"split {data.split}")
    if data.rows is not None:
        said.append(f"{data.rows:,} {counted}")
    if data.swapped:
        said.append("chosen and rejected exchanged")
    if data.sha256:
        said.append(f"SHA-256 {_short(data.sha256)}")
    return ", ".join(said)


def _metrics(facts: Provenance) -> str:
    rows = [[name, "-" if value is None else f"{value:.4g}"] for name, value in sorted(facts.metrics.items())]
    return "## Measured\n\n" + _table(["metric", "value"], rows) if rows else ""


def _usage(facts: Provenance, rank: int) -> str:
    base, revision, where = "BASE", "", "`FOLDER` being this folder"
    if facts.base and "/" in facts.base.id:
        base, revision = facts.base.id, f', revision="{facts.base.revision}"' if facts.base.revision else ""
    elif facts.base:
        where += f", and `BASE` the folder of {_base_name(facts)}"
    first = 'prefvec generate FOLDER=1 --prompt "How do I ...?"\nprefvec compose FOLDER=1 OTHER=0.5 --out MIX'
    if facts.kind == "preference_adapter":
        first = "prefvec extract POSITIVE NEGATIVE --out VECTOR"
    asked = ""
    if facts.condition:
        option, prompt = _asked(facts.condition)
        first = f'prefvec generate FOLDER=1 {option} --prompt "How do I ...?"'
        words = ", ".join(f"`{word}` for {axis}" for axis, word in facts.condition.tags.items())
        asked = f"\n\nOther programs write the condition into the prompt themselves{words and ', with '}{words}:"
        asked += f"\n\n```\n{prompt}\n```"
    if facts.reward:
        first = f"prefvec score --replies REPLIES.jsonl --scorer 'reward:FOLDER#{next(iter(facts.reward.axes))}'"
    return f"""## Use

With [lora-prefvec](https://pypi.org/project/lora-prefvec/), {where}:

```bash
pip install lora-prefvec
{first}
```{asked}

With PEFT alone, at coefficient 1:

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained("{base}"{revision})
model = PeftModel.from_pretrained(base, "FOLDER")
```

vLLM serves it as it is, with `--enable-lora --max-lora-rank {_served_rank(rank)}`."""


def _asked(condition: ConditionFacts) -> tuple[str, str]:
    """The option that asks for as much of the first axis as can be, and the prompt that comes of it."""
    axis, (_, high) = next(iter(condition.axes.items()))
    asked = {axis: high} if condition.kind == "levels" else dict.fromkeys(condition.axes, 0.0) | {axis: high}
    turns = write_condition(condition, asked, [{"role": "user", "content": "How do I ...?"}])
    option = "condition" if condition.kind == "levels" else "direction"
    return f"--{option} {axis}={high:g}", "\n".join(f"{turn['role']}: {turn['content']}" for turn in turns)


def _served_rank(rank: int) -> int:
    """The smallest value that vLLM takes for `--max-lora-rank`; beyond 512 it takes none."""
    return next((allowed for allowed in (8, 16, 32, 64, 128, 256, 320, 512) if allowed >= rank), rank)


def _limits(facts: Provenance) -> str:
    lines = ["It belongs to the base named above; on another base, tokenizer or chat template it is undefined."]
    if facts.base and facts.base.quantization == "nf4":
        lines.append(
            "It was trained on the base in 4-bit (NF4). On the base in 16-bit its effect is close, and not the same; "
            "folded into weights that are then quantised to 4-bit, most of it is lost."
        )
    if facts.kind in {"preference_vector", "mix"}:
        lines.append(
            "Far from the coefficients above, text loses its fluency. Look at replies before relying on a mix."
        )
    if facts.condition:
        lines.append("A condition is a part of the prompt: whoever writes the prompt can write another one.")
    lines.append("A preference is a tendency learned from pairs, and no guarantee: it is not a safety filter.")
    return "## Limits\n\n" + "\n".join(f"- {line}" for line in lines)


def _short(sha256: str | None) -> str:
    return f"`{sha256[:16]}`" if sha256 else "-"


def _table(columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(
        "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in line) + " |" for line in lines
    )


def _part(parent: Parent) -> str:
    """How much of a parent counts: `+0.5`, or `[0, 1] (layers=8-20)`."""
    return written_coefficient(parent.coefficient) + (f" ({parent.filter})" if parent.filter else "")
