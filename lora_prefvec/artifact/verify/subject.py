"""What `verify` looks at: a PEFT folder as it lies there, however broken."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from lora_prefvec.artifact.base_facts import Base
from lora_prefvec.artifact.canonical import Shape
from lora_prefvec.artifact.folder import WEIGHTS
from lora_prefvec.artifact.kinds import is_embedding, is_head
from lora_prefvec.artifact.peft_config import FILE as CONFIG
from lora_prefvec.artifact.peft_config import LoraSettings
from lora_prefvec.artifact.provenance import Provenance, read_json, read_provenance
from lora_prefvec.artifact.weights import FLOATS, TensorSpec, load_tensor, read_header
from lora_prefvec.errors import InputError
from lora_prefvec.vector import BaseIdentity

PREFIX = "base_model.model."
_LONGEST_NAME = 1000
_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<part>[AB])(?P<infix>(\.[^.]+)*)")
_LAYER = re.compile(r"(?P<stem>(?:[^.]*\.)*?)(?P<layer>\d{1,6})\.(?P<path>.+)")


@dataclass(frozen=True)
class Factor:
    """One factor of a module, by the name of its tensor.

    Args:
        part: `A` or `B`.
        prefix: whether the name begins with `base_model.model.`.
        infix: adapter name within the tensor's name; empty as it should be.
        embedding: whether it is named as PEFT names those of an embedding.
    """

    module: str
    part: str
    spec: TensorSpec
    prefix: bool
    infix: str
    embedding: bool

    @property
    def rank(self) -> int:
        """The size that A [r, ...] and B [..., r] share; 0 for what is no matrix."""
        shape = self.spec.shape
        return shape[0 if self.part == "A" else 1] if len(shape) == 2 else 0

    @property
    def width(self) -> int:
        """The other size: of the inputs for A, of the outputs for B; 0 for what is no matrix."""
        shape = self.spec.shape
        return shape[1 if self.part == "A" else 0] if len(shape) == 2 else 0


@dataclass(frozen=True)
class Folder:
    """A PEFT folder, read as far as it can be; a property that cannot be known is None.

    Args:
        base: facts of the base, where it was found.
        identity: of that base; None where it was not asked for by name.
        max_rank: that the engine is started with; None where it is not said.
    """

    path: Path
    base: Base | None = None
    identity: BaseIdentity | None = None
    max_rank: int | None = None

    @cached_property
    def config(self) -> dict[str, Any]:
        """`adapter_config.json`; empty where it is missing or no JSON."""
        try:
            return read_json(self.path / CONFIG)
        except InputError:
            return {}

    @cached_property
    def settings(self) -> LoraSettings | None:
        """Rank and scale by module as PEFT resolves them; None where the fields are not sound."""
        try:
            found = LoraSettings.model_validate({k: v for k, v in self.config.items() if v is not None})
        except ValidationError:
            return None
        patterns = [*(found.rank_pattern or {}), *(found.alpha_pattern or {})]
        return found if all(map(runnable, patterns)) else None

    @cached_property
    def facts(self) -> Provenance | None:
        """`prefvec.json`; None where it is missing or damaged."""
        try:
            return read_provenance(self.path)
        except InputError:
            return None

    @cached_property
    def _header(self) -> tuple[dict[str, TensorSpec], str]:
        try:
            return read_header(self.path / WEIGHTS)[0], ""
        except InputError as error:
            return {}, error.problem

    @property
    def has_weights(self) -> bool:
        """Whether there are tensors to be looked at."""
        return bool(self.tensors)

    @property
    def tensors(self) -> dict[str, TensorSpec]:
        """Every tensor of the file; empty where the file is missing or damaged."""
        return self._header[0]

    @property
    def damage(self) -> str:
        """What is wrong with the header of the weights; empty where it is sound or there is none."""
        return self._header[1] if (self.path / WEIGHTS).is_file() else ""

    @cached_property
    def factors(self) -> list[Factor]:
        """The factors among the tensors, those of fused experts too."""
        found = []
        for name, spec in self.tensors.items():
            match = _FACTOR.fullmatch(name) if len(name) < _LONGEST_NAME else None
            if match and (match["embedding"] or match["infix"].endswith(".weight")):
                module, infix = match["module"], match["infix"].removesuffix(".weight")
                prefix = module.startswith(PREFIX)
                module = module.removeprefix(PREFIX)
                found.append(Factor(module, match["part"], spec, prefix, infix, bool(match["embedding"])))
        return found

    @cached_property
    def others(self) -> list[str]:
        """Names of tensors that are no factor."""
        factors = {factor.spec for factor in self.factors}
        return [name for name, spec in self.tensors.items() if spec not in factors]

    @cached_property
    def fused_experts(self) -> list[str]:
        """Factors of fused experts, as PEFT saves them from transformers 5."""
        return [factor.module for factor in self.factors if is_fused_expert(factor.module)]

    @cached_property
    def pairs(self) -> dict[str, dict[str, Factor]]:
        """Module -> its factors by part, of linear layers, embeddings and heads."""
        found: dict[str, dict[str, Factor]] = defaultdict(dict)
        for factor in self.factors:
            if not is_fused_expert(factor.module):
                found[factor.module][factor.part] = factor
        return dict(found)

    @cached_property
    def grid(self) -> dict[tuple[str, int], set[str]]:
        """(Stem of a stack of layers, layer) -> paths of the modules in it."""
        found: dict[tuple[str, int], set[str]] = defaultdict(set)
        for module in self.pairs:
            if match := _LAYER.fullmatch(module):
                found[match["stem"], int(match["layer"])].add(match["path"])
        return dict(found)

    @property
    def embeddings(self) -> list[str]:
        """Adapted embeddings."""
        return [module for module in self.pairs if is_embedding(module)]

    @property
    def heads(self) -> list[str]:
        """Adapted heads."""
        return [module for module in self.pairs if is_head(module)]

    @property
    def shapes(self) -> dict[str, Shape]:
        """Module of the base -> (out, in) of its delta; empty where it is unknown."""
        return self.base.shapes if self.base else {}

    @property
    def model_type(self) -> str:
        """Of the base; empty where it is unknown."""
        return self.base.model_type if self.base else ""

    def values(self) -> Iterator[tuple[Factor, Tensor]]:
        """Every factor of a type that we read with its values, one at a time."""
        for factor in self.factors:
            if factor.spec.dtype in FLOATS:
                yield factor, load_tensor(factor.spec)

    @cached_property
    def extremes(self) -> dict[str, tuple[bool, float]]:
        """`module.part` -> (whether all values are finite, the largest of their sizes)."""
        found = {}
        for factor, values in self.values():
            sizes = values.float().abs()
            finite = bool(torch.isfinite(sizes).all())
            found[f"{factor.module}.{factor.part}"] = (finite, float(sizes.max()) if sizes.numel() else 0.0)
        return found


def is_fused_expert(module: str) -> bool:
    """Whether a module stands for the experts of a layer taken together: `...experts`, `...experts.base_layer`."""
    return bool(re.search(r"\.experts(\.base_layer)*$", module))


def runnable(pattern: str) -> bool:
    """Whether a pattern of a config is a regular expression that ends in reasonable time on a short name."""
    if len(pattern) > 500 or len(re.findall(r"[*+{]", pattern)) > 3 or re.search(r"\)[*+{?]", pattern):
        return False
    try:
        re.compile(pattern)
    except re.error:
        return False
    return True


def targeted(config: dict[str, Any], module: str) -> bool:
    """Whether PEFT would wrap a module (`peft.tuners.tuners_utils.check_target_module_exists`); True where in doubt."""
    if _listed(config.get("exclude_modules"), module):
        return False
    targets = config.get("target_modules")
    if not isinstance(targets, list):
        if not isinstance(targets, str) or targets in {"all-linear", "all"} or not runnable(targets):
            return True
        return re.fullmatch(targets, module) is not None
    layers = config.get("layers_to_transform")
    if isinstance(layers, int):
        layers = [layers]
    if isinstance(layers, list) and (match := _LAYER.fullmatch(module)) and int(match["layer"]) not in layers:
        return False
    return _listed(targets, module)


def _listed(names: Any, module: str) -> bool:
    if isinstance(names, str):
        return runnable(names) and re.fullmatch(names, module) is not None
    return isinstance(names, list) and any(module == name or module.endswith(f".{name}") for name in names)


def some(names: list[str] | set[str]) -> str:
    """One of the names, and how many more there are."""
    ordered = sorted(names)
    return ordered[0][:120] + (f" and {len(ordered) - 1} more" if len(ordered) > 1 else "")
