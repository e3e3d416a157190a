"""Reward models: an adapter of the base and linear heads on its last hidden state, in one folder.

The folder is that of any adapter, with `heads.safetensors` beside it: `weight` [m, hidden] and `bias` [m], float32.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from lora_prefvec.artifact.folder import read_adapter
from lora_prefvec.artifact.provenance import HeadFacts, Provenance, RewardFacts
from lora_prefvec.artifact.writing import fill_adapter
from lora_prefvec.errors import InputError
from lora_prefvec.vector import BaseIdentity, PreferenceVector

HEADS = "heads.safetensors"


@dataclass(frozen=True, eq=False)
class RewardModel:
    """What replies are rated on m axes: rating = mean + sd x (weight h + bias), h the adapted base's last hidden state.

    Args:
        vector: the adapter.
        axes: axis -> mean and standard deviation of the ratings that its head learned, in the order of the heads.
        weight, bias: of the heads, [m, hidden] and [m], float32 on the CPU.
    """

    vector: PreferenceVector
    axes: Mapping[str, tuple[float, float]]
    weight: Tensor
    bias: Tensor

    def standardised(self, states: Tensor) -> Tensor:
        """States [n, hidden] -> ratings [n, m] in standard deviations from their mean."""
        return states @ self.weight.T + self.bias

    def ratings(self, states: Tensor) -> Tensor:
        """States [n, hidden] -> ratings [n, m] as people gave them."""
        scales = torch.tensor(list(self.axes.values()))
        rated: Tensor = scales[:, 0] + scales[:, 1] * self.standardised(states)
        return rated


def fill_reward_model(folder: Path, model: RewardModel, provenance: Provenance, *, recipe: str | None = None) -> None:
    """Write the files of a reward model into a folder that `atomic_folder` gave.

    Args:
        provenance: what is known beside the heads.
        recipe: text of `recipe.yaml`.
    """
    heads = save({"weight": model.weight.contiguous(), "bias": model.bias.contiguous()})
    (folder / HEADS).write_bytes(heads)
    facts = RewardFacts(
        heads=[HeadFacts(axis=axis, mean=mean, sd=sd) for axis, (mean, sd) in model.axes.items()],
        heads_sha256=hashlib.sha256(heads).hexdigest(),
    )
    fill_adapter(folder, model.vector, provenance.model_copy(update={"reward": facts}), recipe=recipe)


def read_reward_model(
    folder: Path, *, axes: Sequence[str] | None = None, base: BaseIdentity | None = None
) -> tuple[RewardModel, Provenance]:
    """The reward model in a folder, whole and unchanged, and where it comes from.

    Args:
        axes: those that it has to rate; its heads are put in this order.
        base: what it is to stand on.

    Raises:
        InputError: there is none, a file was changed or is damaged, it belongs to another base, or an axis has no head.
    """
    adapter = read_adapter(folder)
    facts = adapter.provenance
    if facts is None or facts.reward is None:
        raise InputError(f"{folder} is no reward model", "Name the folder `reward` of an adapter that DPA trained.")
    if base and adapter.vector.identity and (differ := adapter.vector.identity.mismatches(base)):
        raise InputError(
            f"the reward model in {folder} belongs to another base ({', '.join(differ)})",
            "Train one on this base: leave out method.reward.folder.",
        )
    known = facts.reward.axes
    wanted = list(known if axes is None else axes)
    if missing := [axis for axis in wanted if axis not in known]:
        raise InputError(
            f"the reward model in {folder} rates {', '.join(known)}, and {missing[0]!r} is asked for",
            "Take these axes, or train another reward model.",
        )
    weight, bias = _heads(folder / HEADS, facts.reward)
    places = [list(known).index(axis) for axis in wanted]
    scales = {axis: known[axis] for axis in wanted}
    return RewardModel(adapter.vector, scales, weight[places], bias[places]), facts


def _heads(file: Path, facts: RewardFacts) -> tuple[Tensor, Tensor]:
    try:
        content = file.read_bytes()
        if hashlib.sha256(content).hexdigest() != facts.heads_sha256:
            raise InputError(f"{file} is not what prefvec.json says: it was changed", "Get the folder again.")
        found = load(content)
        weight, bias = found["weight"].float(), found["bias"].float()
    except (OSError, SafetensorError, KeyError) as error:
        raise InputError(f"the heads {file} cannot be read: {type(error).__name__}", "Get the folder again.") from None
    if weight.ndim != 2 or bias.shape != weight.shape[:1] or len(bias) != len(facts.axes):
        raise InputError(f"{file} does not hold one head for each of {', '.join(facts.axes)}", "Get the folder again.")
    return weight, bias
