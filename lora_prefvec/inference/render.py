"""Preference pairs as token ids, the way the model will meet them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lora_prefvec.data import Pair
from lora_prefvec.errors import InputError


@dataclass(frozen=True)
class RenderedPair:
    """Token ids of a prompt and of the two replies to it."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]


@dataclass(frozen=True)
class RenderedPairs:
    """All pairs of a set, rendered, and what the length limits cut.

    Args:
        pairs: in order.
        cut_prompts, cut_replies: how many pairs lost the beginning of their prompt, or the end of a reply.
        indistinct: pairs left out because the cut replies are equal.
        places: where each of `pairs` was among those given.
    """

    pairs: list[RenderedPair]
    cut_prompts: int
    cut_replies: int
    indistinct: int
    places: list[int]


def render_pairs(
    pairs: Sequence[Pair], tokenizer: Any, *, max_prompt_tokens: int, max_reply_tokens: int
) -> RenderedPairs:
    """Render pairs with the tokenizer's chat template (messages), or as they stand with an EOS (strings).

    A prompt that is too long loses its beginning, because the end is what a reply answers; its first token is kept
    where it is the BOS token. A reply that is too long loses its end, the EOS included.

    Raises:
        InputError: messages and no chat template, a template that cannot render the turns, or nothing left to learn
            from.
    """
    rendered: list[RenderedPair] = []
    places: list[int] = []
    cut_prompts = cut_replies = indistinct = 0
    for place, pair in enumerate(pairs):
        prompt, chosen, rejected = render(pair, tokenizer)
        cut_prompts += len(prompt) > max_prompt_tokens
        cut_replies += max(len(chosen), len(rejected)) > max_reply_tokens
        if len(prompt) > max_prompt_tokens:
            bos = prompt[:1] if prompt[0] == tokenizer.bos_token_id else []
            prompt = bos + prompt[len(prompt) - max_prompt_tokens + len(bos) :]
        chosen, rejected = chosen[:max_reply_tokens], rejected[:max_reply_tokens]
        if chosen == rejected:
            indistinct += 1
        else:
            rendered.append(RenderedPair(prompt, chosen, rejected))
            places.append(place)
    if pairs and not rendered:
        raise InputError(
            f"none of the {len(pairs)} pairs differ within the first {max_reply_tokens} tokens of their replies",
            "Raise training.max_reply_tokens.",
        )
    return RenderedPairs(rendered, cut_prompts, cut_replies, indistinct, places)


def render(pair: Pair, tokenizer: Any) -> tuple[list[int], list[int], list[int]]:
    """Token ids of prompt, chosen and rejected; the replies begin where prompt and prompt + reply part.

    Usually that is the end of the prompt; where tokens merge across the boundary, the merged token counts as reply.
    """
    if isinstance(pair.prompt, str):
        texts = [pair.prompt, *(pair.prompt + str(reply) for reply in (pair.chosen, pair.rejected))]
        prompt, chosen, rejected = (tokenizer(text)["input_ids"] for text in texts)
        eos = tokenizer.eos_token_id
        if prompt[-1:] == [eos]:  # tokenizers that close every text
            prompt = prompt[:-1]
        chosen, rejected = (ids if ids[-1:] == [eos] or eos is None else [*ids, eos] for ids in (chosen, rejected))
    else:
        prompt = chat_ids(tokenizer, pair.prompt, add_generation_prompt=True)
        chosen, rejected = (
            chat_ids(tokenizer, [*pair.prompt, *reply])
            for reply in (pair.chosen, pair.rejected)
            if not isinstance(reply, str)
        )
    start = min(common_prefix(prompt, chosen), common_prefix(prompt, rejected))
    return prompt[:start], chosen[start:], rejected[start:]


def chat_ids(tokenizer: Any, messages: Sequence[dict[str, str]], *, add_generation_prompt: bool = False) -> list[int]:
    """Messages through the chat template, as token ids.

    Raises:
        InputError: there is no chat template, or it refuses these turns.
    """
    if not tokenizer.chat_template:
        raise InputError(
            "the data are conversations and the base's tokenizer has no chat template",
            "Use an instruction-tuned base, or data in plain text (prompt, chosen, rejected as strings).",
        )
    from jinja2.exceptions import TemplateError

    try:
        text = tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except TemplateError as error:
        roles = " ".join(message["role"] for message in messages)
        raise InputError(f"the base's chat template cannot render the turns {roles!r}: {error}") from error
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def has_system_turn(tokenizer: Any) -> bool:
    """Whether the chat template shows what a system turn says."""
    from jinja2.exceptions import TemplateError

    turns = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]
    try:
        return bool(tokenizer.chat_template) and "be brief" in tokenizer.apply_chat_template(turns, tokenize=False)
    except TemplateError:
        return False


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """How many leading items two sequences share."""
    length = min(len(first), len(second))
    return next((i for i in range(length) if first[i] != second[i]), length)
