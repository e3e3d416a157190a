"""Hypothesis strategies: texts, pairs, and each published form written back from a pair."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from lora_prefvec.data import Message, Pair

# Stripped, not empty, and free of the markers that hh-rlhf and HelpSteer2 split at.
texts = (
    st.text(st.characters(exclude_categories=["Cs", "Cc"], include_characters="\n"), min_size=1, max_size=40)
    .map(str.strip)
    .filter(lambda text: text and "Human:" not in text and "Assistant:" not in text)
)


def message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


@st.composite
def conversations(draw: st.DrawFn, max_turns: int = 2, system: bool = True) -> list[Message]:
    """A prompt of one to 2 * max_turns + 1 turns, the user's first and last, perhaps behind a system turn."""
    turns = [message("system", draw(texts))] if system and draw(st.booleans()) else []
    for _ in range(draw(st.integers(0, max_turns))):
        turns += [message("user", draw(texts)), message("assistant", draw(texts))]
    return [*turns, message("user", draw(texts))]


@st.composite
def conversational_pairs(draw: st.DrawFn, max_turns: int = 2, system: bool = True) -> Pair:
    chosen, rejected = draw(st.lists(texts, min_size=2, max_size=2, unique=True))
    prompt = draw(conversations(max_turns, system))
    return Pair(prompt, [message("assistant", chosen)], [message("assistant", rejected)])


@st.composite
def standard_pairs(draw: st.DrawFn) -> Pair:
    chosen, rejected = draw(st.lists(texts, min_size=2, max_size=2, unique=True))
    return Pair(draw(texts), f" {chosen}", f" {rejected}")


single_turn_pairs = conversational_pairs(max_turns=0, system=False)
pairs = standard_pairs() | conversational_pairs()


def content(pair: Pair, part: str) -> str:
    """The text of the last (or only) turn of a part."""
    value = getattr(pair, part)
    return str(value if isinstance(value, str) else value[-1]["content"])


def hh_row(pair: Pair) -> dict[str, Any]:
    names = {"user": "Human", "assistant": "Assistant"}

    def transcript(turns: list[Message]) -> str:
        return "".join(f"\n\n{names[turn['role']]}: {turn['content']}" for turn in turns)

    return {part: transcript([*pair.prompt, *getattr(pair, part)]) for part in ("chosen", "rejected")}


def as_messages(pair: Pair) -> list[list[Message]]:
    return [part for part in (pair.prompt, pair.chosen, pair.rejected) if not isinstance(part, str)]


def sharegpt_row(pair: Pair) -> dict[str, Any]:
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    prompt, chosen, rejected = (
        [{"from": names[turn["role"]], "value": turn["content"]} for turn in turns] for turns in as_messages(pair)
    )
    return {"conversations": prompt, "chosen": chosen[0], "rejected": rejected[0]}


def pku_row(pair: Pair, winner: int) -> dict[str, Any]:
    """A row whose more helpful reply is the chosen one, and whose safer reply is the other one."""
    replies = [content(pair, "chosen"), content(pair, "rejected")]
    return {
        "prompt": content(pair, "prompt"),
        "response_0": replies[winner],
        "response_1": replies[1 - winner],
        "is_response_0_safe": winner == 1,
        "is_response_1_safe": winner == 0,
        "better_response_id": winner,
        "safer_response_id": 1 - winner,
    }


def ultrafeedback_row(pair: Pair, ratings: dict[str, tuple[Any, Any]]) -> dict[str, Any]:
    """A row of four completions: chosen and rejected with `ratings`, one between them, one not rated."""
    between = dict.fromkeys(ratings, "2")
    unrated = dict.fromkeys(ratings, "N/A")
    rated = [
        ("between", between),
        (content(pair, "rejected"), {name: low for name, (_, low) in ratings.items()}),
        ("unrated", unrated),
        (content(pair, "chosen"), {name: high for name, (high, _) in ratings.items()}),
    ]
    return {
        "source": "x",
        "instruction": content(pair, "prompt"),
        "models": ["a", "b", "c", "d"],
        "completions": [
            {
                "response": reply,
                "annotations": {name: {"Rating": value, "Rationale": ""} for name, value in got.items()},
            }
            for reply, got in rated
        ],
    }


def helpsteer_rows(pair: Pair, high: int, low: int) -> list[dict[str, Any]]:
    """Two rows: the rejected reply first, so that order decides nothing."""
    others = dict.fromkeys(("correctness", "coherence", "complexity", "verbosity"), 2)
    prompt = content(pair, "prompt")
    return [
        {"prompt": prompt, "response": content(pair, "rejected"), "helpfulness": low, **others},
        {"prompt": prompt, "response": content(pair, "chosen"), "helpfulness": high, **others},
    ]
