"""Reward models that DPA trained: one head of theirs as a scorer, `reward:FOLDER#AXIS`.

Options: `name=AXIS`, `base=FOLDER_OR_ID` where the base is not found by the name that the folder gives it.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lora_prefvec.errors import InputError, nearest
from lora_prefvec.evaluation.scorers.protocol import Prompt, messages_of

if TYPE_CHECKING:
    from lora_prefvec.artifact import RewardModel
    from lora_prefvec.inference import LoadedBase

OPTIONS = ("name", "base")


@dataclass(frozen=True)
class Head:
    """One axis of a reward model; a rating as people gave it. The base is loaded when the first reply is scored.

    Args:
        folder: of the reward model.
        base: of the base that it stands on.
        fingerprint: of its weights.
    """

    name: str
    folder: Path
    axis: str
    base: Path
    quantization: str
    fingerprint: str
    direction: int = +1
    is_cost: bool = False

    def __call__(self, prompts: Sequence[Prompt], replies: Sequence[str]) -> list[float | None]:
        """The rating of every reply behind its prompt.

        Raises:
            InputError: the base cannot be loaded or has no chat template, or a reply is too long for it: none is cut.
        """
        from lora_prefvec.inference import final_states
        from lora_prefvec.inference.render import chat_ids

        loaded, model = _load(self.folder, self.base, self.quantization)
        limit = getattr(loaded.model.config.get_text_config(), "max_position_embeddings", None)
        rows = []
        for place, (prompt, reply) in enumerate(zip(prompts, replies, strict=True)):
            rows.append(chat_ids(loaded.tokenizer, [*messages_of(prompt), {"role": "assistant", "content": reply}]))
            if limit and len(rows[-1]) > limit:
                raise InputError(
                    f"reply {place + 1} has {len(rows[-1])} tokens with its prompt, and {self.name!r} reads {limit}",
                    "Score shorter replies.",
                )
        column = list(model.axes).index(self.axis)
        return list(map(float, model.ratings(final_states(loaded, rows))[:, column]))


def head(folder: Path, axis: str, options: Mapping[str, str]) -> Head:
    """The head of an axis; the folder is read, and the base only looked for.

    Raises:
        InputError: no such axis or option, the folder is damaged, or its base is not on this machine.
    """
    from lora_prefvec.artifact import find_base, read_reward_model

    if unknown := sorted(options.keys() - set(OPTIONS)):
        raise InputError(f"a reward model of several heads has no option {unknown[0]!r}", nearest(unknown[0], OPTIONS))
    model, facts = read_reward_model(folder)
    if axis not in model.axes:
        problem = f"rates no {axis!r}" if axis else "rates several axes"
        raise InputError(f"the reward model {folder} {problem}", f"Name one: {', '.join(model.axes)}.")
    base = find_base(facts.base, options.get("base"))
    if base is None:
        raise InputError(
            f"the base of the reward model {folder} is not on this machine",
            f"Name it: reward:{folder}#{axis}?base=FOLDER_OR_ID",
        )
    return Head(
        name=options.get("name") or axis,
        folder=folder,
        axis=axis,
        base=base.folder,
        quantization=facts.base.quantization if facts.base else "nf4",
        fingerprint=f"{axis} {facts.weights_sha256} {facts.reward and facts.reward.heads_sha256} {facts.base}",
    )


@functools.cache
def _load(folder: Path, base: Path, quantization: str) -> tuple[LoadedBase, RewardModel]:
    """The base with the reward model's adapter on it, loaded once for all of its heads."""
    from lora_prefvec.artifact import identity_of, read_reward_model
    from lora_prefvec.inference import LiveMixer, load_base

    model, _ = read_reward_model(folder, base=identity_of(base))
    loaded = load_base(base, quantization="none" if quantization == "none" else "nf4")
    LiveMixer(loaded.model, {"adapter": model.vector}).set_mix({"adapter": 1.0})
    return loaded, model
