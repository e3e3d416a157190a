"""Replies of a model: to many prompts in batches, or to one, piece by piece as it is written."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache

from lora_prefvec.errors import InputError, RunError
from lora_prefvec.inference.render import chat_ids

if TYPE_CHECKING:
    from lora_prefvec.inference.base import LoadedBase
    from lora_prefvec.inference.mixer import LiveMixer
    from lora_prefvec.progress import Progress

Prompt = str | Sequence[dict[str, str]]

DROP_BELOW = 0.75  # finished rows leave the batch once fewer than this share of it still write


@dataclass
class _Row:
    """One prompt on its way to a reply."""

    number: int
    prompt: list[int]
    limit: int
    dice: random.Random
    reply: list[int] = field(default_factory=list)
    done: bool = False


def generate(
    loaded: LoadedBase,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int = 256,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int | Sequence[int] = 0,
    batch_size: int = 128,
    mixer: LiveMixer | None = None,
    mixes: Sequence[Mapping[str, float]] | None = None,
    bar: Progress | None = None,
) -> list[str]:
    """The model's replies, in the order of the prompts.

    Every row draws its samples from a generator of its own, so what it says depends on its prompt, its mix and its
    seed, not on the rows beside it (up to the rounding of the compute dtype, which depends on the shape of the batch).

    Args:
        loaded: the base and its tokenizer; vectors that are attached to the model take part as they are set.
        prompts: conversations as lists of `{"role", "content"}`; a string is one user message.
        max_new_tokens: tokens per reply at most; fewer where the context of the base ends before.
        temperature: 0 is greedy, 1 samples from the model's own distribution.
        top_p: samples come from the most likely tokens that hold this much of the probability.
        seed: one number, from which every row's own is derived with its index, or one number per row. A row with
            seed `s` of its own says what the first row of a call with `seed=s` says.
        batch_size: rows per forward pass.
        mixer: the mixer whose mixes are named in `mixes`.
        mixes: one mix per prompt; the mixer's own mix is set again afterwards.
        bar: advanced by one for each finished reply.

    Raises:
        InputError: a setting out of range, a tokenizer without chat template, a prompt longer than the context.
        RunError: the model's output is not finite.
    """
    _check_settings(max_new_tokens, temperature, top_p)
    if batch_size < 1:
        raise InputError(f"the batch size {batch_size} is not positive", "Take 1 or more.")
    seeds = [f"{seed}:{i}" for i in range(len(prompts))] if isinstance(seed, int) else [f"{one}:0" for one in seed]
    if len(seeds) != len(prompts):
        raise InputError(f"{len(seeds)} seeds were given for {len(prompts)} prompts", "Give one number, or one each.")
    if mixes is not None and (mixer is None or len(mixes) != len(prompts)):
        raise InputError(f"{len(mixes)} mixes were given for {len(prompts)} prompts", "Give a mixer and one mix each.")

    rows = [
        _Row(number, ids, _reply_limit(loaded, ids, max_new_tokens), random.Random(row_seed))
        for number, (ids, row_seed) in enumerate(zip(_encode(loaded, prompts), seeds, strict=True))
    ]
    by_length = sorted(rows, key=lambda row: -len(row.prompt))  # little padding, and memory peaks at once
    before = mixer.mix if mixer is not None and mixes is not None else None
    try:
        for start in range(0, len(rows), batch_size):
            batch = by_length[start : start + batch_size]
            writing = len(batch)
            for still_writing in _decode(loaded, batch, temperature, top_p, mixer, mixes):
                if bar is not None and still_writing < writing:
                    bar.advance(writing - still_writing)
                writing = still_writing
    finally:
        if mixer is not None and before is not None:
            mixer.set_mix(before)
    return [_text(loaded, row.reply) for row in rows]


def stream(
    loaded: LoadedBase,
    prompt: Prompt,
    *,
    max_new_tokens: int = 256,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> Iterator[str]:
    """The reply to one prompt in pieces, as they are written; joined they are what `generate` returns.

    A piece is held back while it ends within a character of several tokens.

    Raises:
        InputError, RunError: as `generate`.
    """
    _check_settings(max_new_tokens, temperature, top_p)
    (ids,) = _encode(loaded, [prompt])
    row = _Row(0, ids, _reply_limit(loaded, ids, max_new_tokens), random.Random(f"{seed}:0"))
    # Each new piece is read off behind the piece before it: a tokenizer may swallow the space that begins a text.
    start = shown = 0
    for still_writing in _decode(loaded, [row], temperature, top_p, None, None):
        known, now = _text(loaded, row.reply[start:shown]), _text(loaded, row.reply[start:])
        if len(now) > len(known) and (not now.endswith("\ufffd") or not still_writing):
            yield now[len(known) :]
            start, shown = shown, len(row.reply)


def check_chat_template(loaded: LoadedBase) -> None:
    """Whether messages can be rendered at all.

    Raises:
        InputError: the tokenizer has no chat template.
    """
    if not loaded.tokenizer.chat_template:
        raise InputError(
            f"the tokenizer in {loaded.path} has no chat template, so messages cannot be rendered",
            "Add a chat_template.jinja to the base, or take its -Instruct variant.",
        )


@torch.no_grad()  # not inference_mode: its tensors could never take part in training again
def _decode(
    loaded: LoadedBase,
    rows: Sequence[_Row],
    temperature: float,
    top_p: float,
    mixer: LiveMixer | None,
    mixes: Sequence[Mapping[str, float]] | None,
) -> Iterator[int]:
    """Writes the replies of `rows` token by token; yields after each step how many rows still write."""
    model, device, stop = loaded.model, loaded.device, _stop_tokens(loaded)
    width = max(len(row.prompt) for row in rows)
    ids = torch.tensor([[0] * (width - len(row.prompt)) + row.prompt for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row.prompt)) + [1] * len(row.prompt) for row in rows], device=device)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    cache = DynamicCache(config=model.config)
    batch = list(rows)
    if mixer is not None and mixes is not None:
        mixer.set_mix([mixes[row.number] for row in batch])
    while True:
        output = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        tokens = _choose(output.logits[:, -1].float(), batch, temperature, top_p)
        for row, token in zip(batch, tokens.tolist(), strict=True):
            if not row.done:
                if token not in stop:
                    row.reply.append(token)
                row.done = token in stop or len(row.reply) == row.limit
        writing = [place for place, row in enumerate(batch) if not row.done]
        yield len(writing)
        if not writing:
            return
        ids, mask, positions = tokens[:, None], torch.nn.functional.pad(mask, (0, 1), value=1), positions[:, -1:] + 1
        if len(writing) < DROP_BELOW * len(batch):
            kept = torch.tensor(writing, device=device)
            cache.batch_select_indices(kept)
            ids, mask, positions = ids[kept], mask[kept], positions[kept]
            batch = [batch[place] for place in writing]
            if mixer is not None and mixes is not None:
                mixer.set_mix([mixes[row.number] for row in batch])


def _choose(logits: Tensor, rows: Sequence[_Row], temperature: float, top_p: float) -> Tensor:
    """The next token of each row. logits: [rows, vocabulary] -> [rows]."""
    best, greedy = logits.max(-1)
    if not bool(torch.isfinite(best).all()):
        raise RunError(
            "the model's output is not finite (NaN or infinite)",
            "Bring the coefficients nearer to 0, or load the base with --quantization none.",
        )
    if temperature == 0:
        return greedy
    weights = ((logits - best[:, None]) / temperature).exp()
    if top_p < 1:
        ordered, order = weights.sort(descending=True)
        mass = ordered.cumsum(-1)
        outside = mass - ordered >= top_p * mass[:, -1:]
        weights = weights.scatter(-1, order, ordered.masked_fill(outside, 0.0))
    # Inverse transform sampling: one uniform number per row and step, drawn on the CPU, alike on every device.
    mass = weights.double().cumsum(-1)
    dice = torch.tensor([[row.dice.random()] for row in rows], dtype=torch.float64, device=logits.device)
    return torch.searchsorted(mass, dice * mass[:, -1:], right=True).clamp(max=logits.shape[-1] - 1)[:, 0]


def _encode(loaded: LoadedBase, prompts: Sequence[Prompt]) -> list[list[int]]:
    """Token ids of each prompt, rendered by the chat template up to where the reply begins."""
    if prompts:
        check_chat_template(loaded)
    conversations = [[{"role": "user", "content": one}] if isinstance(one, str) else one for one in prompts]
    return [chat_ids(loaded.tokenizer, messages, add_generation_prompt=True) for messages in conversations]


def _reply_limit(loaded: LoadedBase, prompt: list[int], max_new_tokens: int) -> int:
    """How many tokens the reply to `prompt` may have: `max_new_tokens`, or what is left of the base's context."""
    context = getattr(loaded.model.config.get_text_config(), "max_position_embeddings", None)
    if not prompt:
        raise InputError("a prompt has no tokens at all", "Write at least one word.")
    if context is None:
        return max_new_tokens
    if len(prompt) >= context:
        raise InputError(
            f"a prompt has {len(prompt)} tokens and the base reads {context}",
            "Shorten it; in a chat, /reset begins anew.",
        )
    return min(max_new_tokens, int(context) - len(prompt))


def _stop_tokens(loaded: LoadedBase) -> set[int]:
    """Every token id that ends a reply, as the generation config and the tokenizer name them."""
    configured: Any = loaded.model.generation_config.eos_token_id
    named = configured if isinstance(configured, list) else [configured]
    return {token for token in [*named, loaded.tokenizer.eos_token_id] if token is not None}


def _text(loaded: LoadedBase, tokens: list[int]) -> str:
    text: str = loaded.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text


def _check_settings(max_new_tokens: int, temperature: float, top_p: float) -> None:
    if max_new_tokens < 1:
        raise InputError(f"{max_new_tokens} new tokens are no reply", "Take 1 or more.")
    if not (math.isfinite(temperature) and temperature >= 0):
        raise InputError(f"the temperature {temperature} is not a number from 0 up", "0 is greedy, 1 samples plainly.")
    if not 0 < top_p <= 1:
        raise InputError(f"top-p {top_p} is not in (0, 1]", "1 leaves all tokens in, 0.9 the most likely ones.")
