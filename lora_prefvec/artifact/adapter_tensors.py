"""Which tensors of an adapter's file make which delta; a tensor that makes none is refused, never left out."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lora_prefvec.artifact.kinds import EXPERT_PARAMETERS, is_embedding, is_head, leaf
from lora_prefvec.artifact.peft_config import FILE as CONFIG
from lora_prefvec.artifact.peft_config import LoraSettings
from lora_prefvec.artifact.weights import FLOATS, TensorSpec
from lora_prefvec.errors import InputError

_PREFIX = r"(?:base_model\.model\.)?"
_FACTOR = re.compile(
    _PREFIX + r"(?P<module>.+)\.lora_"
    r"(?:(?P<part>[AB])(?:\.(?P<adapter>[^.]+))?\.weight|embedding_(?P<of_embedding>[AB])(?:\.(?P<its_adapter>[^.]+))?)"
)
_MAGNITUDE = re.compile(_PREFIX + r"(?P<module>.+)\.lora_magnitude_vector(?:\.[^.]+)?(?:\.weight)?")
_COPY = re.compile(_PREFIX + r"(?P<module>.+?)(?:\.base_layer)?\.weight")
_AGAIN = "Get the adapter again."
_MAX_NAME = 512  # characters
_MAX_EXPERTS = 4096  # of one parameter
_MAX_SCALE = 1e20  # either way; beyond, float32 cannot hold the products


@dataclass(frozen=True)
class FactorPair:
    """The two tensors behind a delta, or behind those of all experts in one parameter.

    Args:
        a: `lora_A` [r, in]; of all experts, one below the other, [experts * r, in]; `lora_embedding_A` [r, vocabulary].
        b: `lora_B` [out, r]; of all experts, their number running fastest, [out, r * experts]; `lora_embedding_B`
            [hidden, r].
        rank, scale: of each delta, as the config gives them for this module.
        experts: how many there are; None where the tensors are of one module.
        magnitude: a DoRA's norms of the rows, [out].
    """

    a: TensorSpec
    b: TensorSpec
    rank: int
    scale: float
    embedding: bool = False
    experts: int | None = None
    magnitude: TensorSpec | None = None


@dataclass
class _Found:
    parts: dict[str, TensorSpec] = field(default_factory=dict)
    embedding: bool = False


@dataclass(frozen=True)
class AdapterTensors:
    """What an adapter's file holds.

    Args:
        pairs: module, or fused parameter, -> its factors.
        copies: embedding or head -> the whole weight, which PEFT saves with an adapter of it.
    """

    pairs: dict[str, FactorPair]
    copies: dict[str, TensorSpec]


def sort_tensors(path: Path, tensors: Mapping[str, TensorSpec], settings: LoraSettings) -> AdapterTensors:
    """Bring the tensors of a file together.

    Raises:
        InputError: a tensor is no factor of a low-rank delta, a factor is missing or given twice, its type is no float,
            or its shape is not what the config says.
    """
    found: dict[str, _Found] = defaultdict(_Found)
    copies: dict[str, TensorSpec] = {}
    magnitudes: dict[str, TensorSpec] = {}
    adapters = set()
    for name, spec in tensors.items():
        if len(name) > _MAX_NAME:
            raise InputError(f"{path} holds a name of {len(name)} characters, {name[:40]!r}...", _AGAIN)
        if spec.dtype not in FLOATS:
            raise InputError(f"{path} holds {name!r} as {spec.dtype}", "Save it as float32, bfloat16 or float16.")
        if match := _FACTOR.fullmatch(name):
            module, part = match["module"], match["part"] or match["of_embedding"]
            adapters.add(match["adapter"] or match["its_adapter"])
            entry = found[module]
            if len(adapters) > 1:
                names = ", ".join(sorted(str(adapter or "one without a name") for adapter in adapters))[:120]
                raise InputError(f"{path} holds several adapters: {names}", "Save each in its own folder.")
            if part in entry.parts:
                raise InputError(f"{path} holds two factors {part} of {module}", "Save the adapter again, alone.")
            entry.parts[part] = spec
            entry.embedding |= match["part"] is None
        elif settings.use_dora and (match := _MAGNITUDE.fullmatch(name)):
            magnitudes[match["module"]] = spec
        elif (match := _COPY.fullmatch(name)) and (is_embedding(match["module"]) or is_head(match["module"])):
            copies[match["module"]] = spec
        else:
            raise _not_a_factor(path, name)
    if not found:
        raise InputError(f"{path} holds no tensors of an adapter", _AGAIN)
    pairs = _pairs(path, found, magnitudes, settings)
    return AdapterTensors(pairs, copies)


def _pairs(
    path: Path, found: dict[str, _Found], magnitudes: dict[str, TensorSpec], settings: LoraSettings
) -> dict[str, FactorPair]:
    depths: dict[str, int] = defaultdict(int)
    for module in found:
        root, depth = _unwrapped(module)
        depths[root] = max(depths[root], depth)
    if len(magnitudes.keys() & found.keys()) != len(magnitudes):
        raise InputError(f"{path} holds magnitudes of modules without factors", _AGAIN)
    pairs: dict[str, FactorPair] = {}
    for module, entry in found.items():
        if len(entry.parts) != 2:
            raise InputError(f"{path} lacks factor {'B' if 'A' in entry.parts else 'A'} of {module}", _AGAIN)
        if entry.embedding != is_embedding(module):
            raise InputError(
                f"{path} adapts {module} {'as' if entry.embedding else 'not as'} an embedding, against its name",
                "Train it on the linear layers.",
            )
        root, depth = _unwrapped(module)
        key = target = module
        if leaf(root) == "experts":
            key = target = _parameter(path, root, depths[root] - depth, depths[root] + 1, settings)
        elif depth:
            raise InputError(f"{path} holds {module}, a part of the base", "Save the adapter alone.")
        elif _targeted(settings, f"{module}.weight"):
            target = f"{module}.weight"
        pairs[key] = _pair(entry, key, target, leaf(root) == "experts", magnitudes.get(module), settings)
    return pairs


def _pair(
    entry: _Found, key: str, target: str, fused: bool, magnitude: TensorSpec | None, settings: LoraSettings
) -> FactorPair:
    """The factors of a module with the rank and scale that the config gives it, checked against their shapes."""
    a, b = entry.parts["A"], entry.parts["B"]
    rank, scale = settings.rank(target), settings.scale(target)
    sound = len(a.shape) == len(b.shape) == 2 and a.shape[0] == b.shape[1] and min(*a.shape, *b.shape) > 0
    experts = a.shape[0] // rank if sound and fused and a.shape[0] % rank == 0 else 1
    if not sound or a.shape[0] != rank * experts:
        raise InputError(
            f"{a.file} holds {key} as A {list(a.shape)} and B {list(b.shape)}, and {CONFIG} says rank {rank}", _AGAIN
        )
    if scale and not 1 / _MAX_SCALE < abs(scale) < _MAX_SCALE:
        raise InputError(f"{CONFIG} scales {key} by {scale:.3g}, which float32 cannot hold", "Mend its lora_alpha.")
    if experts > _MAX_EXPERTS:
        raise InputError(f"{a.file} holds {experts} experts in {key}, and {_MAX_EXPERTS} are read", _AGAIN)
    if settings.use_dora and (magnitude is None or magnitude.shape != b.shape[:1]):
        raise InputError(f"{a.file} lacks the {b.shape[0]} magnitudes of {key}, or has others", _AGAIN)
    return FactorPair(a, b, rank, scale, entry.embedding, experts if fused else None, magnitude)


def _unwrapped(module: str) -> tuple[str, int]:
    """A module's name without the wrappers that PEFT nests around one with several parameters, and their number."""
    root, depth = module, 0
    while root.endswith(".base_layer"):
        root, depth = root.removesuffix(".base_layer"), depth + 1
    return root, depth


def _parameter(path: Path, experts: str, index: int, levels: int, settings: LoraSettings) -> str:
    """The name of the fused parameter behind a level of PEFT's nested wrappers.

    PEFT wraps the parameters of a module in the order in which it registers them (tuners_utils.py,
    `_inject_parameters`), so the first is the innermost, and the file names the levels and not the parameters.

    Args:
        index: of the parameter among those that are adapted, in the order of registration.
    """
    known = [name for name in EXPERT_PARAMETERS if _targeted(settings, f"{experts}.{name}")]
    others = {target.rpartition(".")[2] for target in settings.target_parameters or []} - {*EXPERT_PARAMETERS, "weight"}
    if len(known) != levels or others:
        told = ", ".join(sorted(settings.target_parameters or [])) or "none"
        raise InputError(
            f"{path} adapts {levels} fused parameters of {experts}, and target_parameters names {told[:120]}",
            "Train it on gate_up_proj or down_proj, or on the attention layers.",
        )
    return f"{experts}.{known[index]}"


def _targeted(settings: LoraSettings, parameter: str) -> bool:
    """PEFT's rule for `target_parameters`: the whole path, or a suffix of it at a dot."""
    return any(parameter == target or parameter.endswith(f".{target}") for target in settings.target_parameters or [])


def _not_a_factor(path: Path, name: str) -> InputError:
    shown = repr(name[:200])
    if "lora_magnitude_vector" in name:
        return InputError(
            f"{path} is a DoRA (it holds {shown})",
            "Take its best low-rank fit with prefvec compose --approximate BASE, or train it again without use_dora.",
        )
    if name.endswith(".bias"):
        return InputError(f"{path} carries a bias ({shown})", "Train it again with bias none.")
    return InputError(f"{path} holds {shown}, which is no factor of a LoRA", "Train it without modules_to_save.")
