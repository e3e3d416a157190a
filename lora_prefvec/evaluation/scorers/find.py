"""Scorers, found by what a user writes: `sandbox:helpful`, `my/scorers.py:polite`, `reward:FOLDER`, `refusal`, ..."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from urllib.parse import parse_qsl

from lora_prefvec.errors import InputError, nearest
from lora_prefvec.evaluation.scorers.custom import custom_scorer
from lora_prefvec.evaluation.scorers.heads import head
from lora_prefvec.evaluation.scorers.judge import judge
from lora_prefvec.evaluation.scorers.likelihood import KL, Fluency
from lora_prefvec.evaluation.scorers.protocol import Scorer
from lora_prefvec.evaluation.scorers.refusal import OverRefusal, Refusal
from lora_prefvec.evaluation.scorers.reward import reward_model
from lora_prefvec.evaluation.scorers.text import Distinct, Tokens, Words

GROUP = "lora_prefvec.scorers"
BUILT_IN: dict[str, Callable[[], Scorer]] = {
    "refusal": Refusal,
    "over_refusal": OverRefusal,
    "fluency": Fluency,
    "kl": KL,
    "length": Words,
    "tokens": Tokens,
}
FORMS = {
    "path/to/file.py:NAME": "your own: a function (prompts, replies) -> scores, or an object that is called like one",
    "reward:FOLDER_OR_ID[#OUTPUT]": "a reward model of transformers; ?sign=-1 for costs, name=, quantization=nf4, "
    "template=FILE.jinja; or the folder of one that DPA trained, #OUTPUT being its axis",
    "judge:URL#MODEL?axis=AXIS": "a language model behind an OpenAI-compatible endpoint: helpful, harmless, refusal, "
    "over_refusal; key_env=VARIABLE, against=REPLIES.jsonl for wins in both orders",
    "refusal": "share of replies that begin like a refusal (XSTest's rule), on prompts not labelled safe",
    "over_refusal": "the same on prompts with the label safe, where less is better",
    "fluency": "mean log-probability of a reply's tokens under the base, in nats",
    "kl": "mean divergence of the mix from the base over a reply's tokens, in nats",
    "length": "words of a reply",
    "tokens": "tokens of a reply",
    "distinct-N": "share of a reply's runs of N words that are new in it",
}


def find_scorer(reference: str) -> Scorer:
    """The scorer that a reference names, in one of the `FORMS` or as `source:name` of an installed source.

    A source is an entry point of the group `lora_prefvec.scorers`: a function that takes a name and returns a scorer.

    Raises:
        InputError: there is none of that name, or it cannot be what it is asked to be.
    """
    kind, colon, rest = reference.partition(":")
    if match := re.fullmatch(r"(.+\.py)(?::(.*))?", reference):
        return custom_scorer(Path(match[1]).expanduser(), match[2] or "")
    if kind in ("reward", "judge"):
        whole, _, query = rest.partition("?")
        target, _, part = whole.partition("#")
        options = dict(parse_qsl(query, keep_blank_values=True))
        if kind == "judge":
            return judge(target, part, options)
        heads = (Path(target).expanduser() / "heads.safetensors").is_file()
        return head(Path(target).expanduser(), part, options) if heads else reward_model(target, part, options)
    if not colon:
        return _built_in(reference)
    sources = _sources()
    if kind not in sources:
        raise InputError(f"there is no source of scorers {kind!r}", nearest(kind, [*sources, "reward", "judge"]))
    try:
        source = sources[kind].load()
    except Exception as error:
        raise InputError(
            f"the source of scorers {kind!r} cannot be loaded: {type(error).__name__}: {error}", "Install it again."
        ) from error
    scorer: Scorer = source(rest)
    return scorer


def find_scorers(references: Sequence[str]) -> list[Scorer]:
    """The scorers that references name.

    Raises:
        InputError: as `find_scorer`, or two have one name.
    """
    found: dict[str, Scorer] = {}
    for reference in references:
        scorer = find_scorer(reference)
        if scorer.name in found:
            raise InputError(
                f"two scorers are called {scorer.name!r}",
                "Give each axis once; a reward model or a judge is called otherwise with ?name=OTHER.",
            )
        found[scorer.name] = scorer
    return list(found.values())


def scorer_list() -> list[tuple[str, str]]:
    """What can be written for a scorer, and what it says of a reply; installed sources last."""
    sources = [(f"{name}:NAME", f"scorers of {point.value.partition(':')[0]}") for name, point in _sources().items()]
    return [*FORMS.items(), *sources]


def _built_in(name: str) -> Scorer:
    if match := re.fullmatch(r"distinct-([1-9]\d?)", name):
        return Distinct(int(match[1]))
    if name not in BUILT_IN:
        raise InputError(f"there is no scorer {name!r}", nearest(name, [*BUILT_IN, "distinct-2", "sandbox:helpful"]))
    return BUILT_IN[name]()


def _sources() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=GROUP)}
