"""The published forms of preference data: how each is recognised, and how its rows become pairs."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from lora_prefvec.data.messages import (
    Row,
    Skip,
    attempt,
    conversational_pair,
    dialogue_pair,
    messages,
    single_turn,
    standard_pair,
    text,
)
from lora_prefvec.data.pairs import Message, Pair
from lora_prefvec.data.ratings import check_margin, helpsteer_pairs, number, ultrafeedback_pair
from lora_prefvec.errors import InputError, nearest

ATTRIBUTES = {
    "pku-saferlhf": ("helpful", "harmless"),
    "ultrafeedback": ("instruction_following", "honesty", "truthfulness", "helpfulness"),
    "helpsteer2": ("helpfulness", "correctness", "coherence", "complexity", "verbosity"),
}
FORMS = (
    "trl-standard",
    "trl-standard-implicit",
    "trl-conversational",
    "trl-conversational-implicit",
    "hh-rlhf",
    "sharegpt",
    *ATTRIBUTES,
)
HH_TURN = re.compile(r"\n\n(Human|Assistant):")


def detect(rows: Iterable[Any]) -> str | None:
    """The form that most of `rows` have; None where none of them has a known one."""
    votes = Counter(form for row in rows if isinstance(row, Mapping) and (form := _detect_row(row)))
    return votes.most_common(1)[0][0] if votes else None


def _detect_row(row: Row) -> str | None:
    present = {name for name, value in row.items() if value is not None}
    if {"response_0", "response_1"} <= present and present & {
        "better_response_id",
        "safer_response_id",
        "is_response_0_safe",
    }:
        return "pku-saferlhf"
    if {"instruction", "completions"} <= present:
        return "ultrafeedback"
    if {"prompt", "response"} <= present and present & set(ATTRIBUTES["helpsteer2"]):
        return "helpsteer2"
    if not {"chosen", "rejected"} <= present:
        return None
    if "conversations" in present:
        return "sharegpt"
    prompt, chosen, rejected = row.get("prompt"), row["chosen"], row["rejected"]
    if isinstance(chosen, str) and isinstance(rejected, str):
        if prompt is None:
            transcripts = all(len(set(HH_TURN.findall(f"\n\n{reply}"))) == 2 for reply in (chosen, rejected))
            return "hh-rlhf" if transcripts else "trl-standard-implicit"
        return "trl-standard" if isinstance(prompt, str) else "trl-conversational"
    # A string beside whole dialogues (as in ultrafeedback_binarized) repeats their first turn; TRL ignores it too.
    whole = isinstance(chosen, Sequence) and len(chosen) > 1
    implicit = prompt is None or (isinstance(prompt, str) and whole)
    return "trl-conversational-implicit" if implicit else "trl-conversational"


def choose_form(form: str | None, attribute: str | None, rows: Sequence[Any], source: str) -> tuple[str, str | None]:
    """The form and attribute to read `rows` by: as named (`name` or `name:attribute`), or detected.

    Raises:
        InputError: no known form, an unknown one, or an attribute that is missing or unknown.
    """
    name, _, of_form = (form or detect(rows) or "").partition(":")
    if not name:
        raise InputError(
            f"{source}: no preference pairs found in its columns ({columns_of(rows)})",
            "Name them with --columns prompt=...,chosen=...,rejected=... ('columns' in a recipe).",
        )
    if name not in FORMS:
        raise InputError(f"unknown form {name!r}", nearest(name, FORMS))
    if of_form and attribute and of_form != attribute:
        raise InputError(f"form {form!r} and attribute {attribute!r} contradict each other", "Give one of them.")
    attribute = of_form or attribute
    known = ATTRIBUTES.get(name)
    if known is None:
        if attribute:
            raise InputError(f"{source}: form {name} has no attributes, {attribute!r} was given", "Leave it out.")
        return name, None
    if attribute is None:
        raise InputError(
            f"{source}: {name} rates replies by {', '.join(known)}, and none was named",
            f"Say which with --form {name}:{known[0]} ('form' in a recipe).",
        )
    if attribute not in known:
        raise InputError(f"{name} has no attribute {attribute!r}", nearest(attribute, known))
    return name, attribute


def columns_of(rows: Iterable[Any]) -> str:
    """The column names of `rows` for an error line, long ones cut, control characters escaped."""
    names = {str(name): None for row in rows if isinstance(row, Mapping) for name in row}
    shown = [ascii_safe(name) for name in list(names)[:12]]
    return ", ".join(shown) + (", ..." if len(names) > 12 else "") if shown else "none: its rows are no objects"


def ascii_safe(name: str) -> str:
    """A name from an untrusted file, cut to 40 characters and without anything that could steer a terminal."""
    return "".join(c if c.isprintable() else "?" for c in name[:40]) + ("..." if len(name) > 40 else "")


def convert(
    rows: Iterable[Any], form: str, attribute: str | None, margin: float
) -> Iterator[tuple[int, int, Pair | str]]:
    """Rows -> (number of the first row, from 1; rows used up; the pair, or the reason why there is none)."""
    numbered = enumerate(rows, 1)
    if form == "helpsteer2":
        yield from helpsteer_pairs(numbered, attribute or "", margin)
        return
    read = _reader(form, attribute or "", margin)
    for index, row in numbered:
        yield index, 1, attempt(read, row)


def _reader(form: str, attribute: str, margin: float) -> Callable[[Row], Pair]:
    if form == "ultrafeedback":
        return lambda row: ultrafeedback_pair(row, attribute, margin)
    plain: dict[str, Callable[[Row], Pair]] = {
        "trl-standard": standard,
        "trl-standard-implicit": standard_implicit,
        "trl-conversational": conversational,
        "trl-conversational-implicit": conversational_implicit,
        "hh-rlhf": hh_pair,
        "sharegpt": sharegpt_pair,
        "pku-saferlhf": lambda row: pku_pair(row, attribute),
    }
    return plain[form] if not margin else lambda row: _scored(row, plain[form], margin)


def _scored(row: Row, read: Callable[[Row], Pair], margin: float) -> Pair:
    """A labelled pair with scores beside it (`score_chosen`, `score_rejected`), kept if they differ by the margin."""
    higher, lower = number(row.get("score_chosen")), number(row.get("score_rejected"))
    if higher is None or lower is None:
        raise Skip("no score_chosen and score_rejected for the margin")
    check_margin(higher, lower, margin)
    return read(row)


def standard(row: Row) -> Pair:
    """TRL's standard form: three strings, of which the replies continue the prompt."""
    return standard_pair(text(row, "prompt"), text(row, "chosen"), text(row, "rejected"))


def standard_implicit(row: Row) -> Pair:
    """TRL's standard form without a prompt column: the prompt is what both strings begin with, up to a word's end.

    TRL cuts where the strings first differ, even inside a word; a cut there would change the tokens, so we go back to
    the last white space that both share. A space goes to the replies, as in TRL; a line break stays with the prompt.
    """
    chosen, rejected = text(row, "chosen"), text(row, "rejected")
    shorter = min(len(chosen), len(rejected))
    same = next((i for i in range(shorter) if chosen[i] != rejected[i]), max(shorter - 1, 0))
    cut = next((i for i in range(same, 0, -1) if chosen[i - 1].isspace()), 0)
    cut -= cut > 0 and chosen[cut - 1] == " "
    return standard_pair(chosen[:cut], chosen[cut:], rejected[cut:])


def conversational(row: Row) -> Pair:
    """TRL's conversational form; a string stands for one turn, replies may repeat the prompt before them."""
    prompt = messages(row, "prompt", "user")
    replies = [messages(row, "chosen", "assistant"), messages(row, "rejected", "assistant")]
    chosen, rejected = (reply[len(prompt) :] if reply[: len(prompt)] == prompt else reply for reply in replies)
    return conversational_pair(prompt, chosen, rejected)


def conversational_implicit(row: Row) -> Pair:
    """TRL's conversational form without a prompt of messages: two dialogues that share all but the last turn."""
    return dialogue_pair(messages(row, "chosen"), messages(row, "rejected"))


def hh_pair(row: Row) -> Pair:
    """hh-rlhf: two transcripts with turns behind `Human:` and `Assistant:`, each after a blank line."""
    return dialogue_pair(_transcript(text(row, "chosen")), _transcript(text(row, "rejected")))


def _transcript(transcript: str) -> list[Message]:
    start, *rest = HH_TURN.split(f"\n\n{transcript.lstrip()}")
    if start.strip() or not rest:
        raise Skip("no Human: and Assistant: turns")
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[rest[i]], "content": rest[i + 1].strip()} for i in range(0, len(rest), 2)]


def sharegpt_pair(row: Row) -> Pair:
    """ShareGPT ranking (LLaMA-Factory): `conversations` before two replies, all of `{"from", "value"}`."""
    prompt = messages(row, "conversations")
    if row.get("system"):
        prompt = [{"role": "system", "content": text(row, "system")}, *prompt]
    return conversational_pair(prompt, messages(row, "chosen", "assistant"), messages(row, "rejected", "assistant"))


def pku_pair(row: Row, attribute: str) -> Pair:
    """PKU-SafeRLHF: `better_response_id` names the more helpful reply, `safer_response_id` the more harmless one.

    Sets without `safer_response_id` are read by `is_response_0_safe` and `is_response_1_safe`.
    """
    replies = [text(row, "response_0"), text(row, "response_1")]
    column = "better_response_id" if attribute == "helpful" else "safer_response_id"
    flags = [row.get(f"is_response_{i}_safe") for i in (0, 1)]
    if attribute == "harmless" and row.get(column) is None and None not in flags:
        safe = [str(flag).lower() in ("true", "1") for flag in flags]
        check_margin(max(safe), min(safe), 0)
        winner = safe.index(True)
    else:
        if row.get(column) is None:
            raise Skip(f"missing column {column!r}")
        chosen = number(row[column])
        if chosen not in (0, 1):
            raise Skip(f"{column} is neither 0 nor 1")
        winner = int(chosen)
    return single_turn(text(row, "prompt"), replies[winner], replies[1 - winner])
