"""The rules of `prefvec verify` for GGUF adapters and MLX folders, as data, with their checks."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lora_prefvec.artifact.base_facts import Base
from lora_prefvec.artifact.canonical import Shape
from lora_prefvec.artifact.export_gguf import ARCHITECTURES, PROVENANCE_KEY, import_gguf, tensor_name
from lora_prefvec.artifact.provenance import Provenance, read_json, read_provenance
from lora_prefvec.artifact.verify.rules import AGAIN, OTHER_BASE, Needs, Severity
from lora_prefvec.artifact.verify.subject import some
from lora_prefvec.artifact.weights import TensorSpec, file_sha256, read_header
from lora_prefvec.errors import InputError
from lora_prefvec.vector import BaseIdentity

EXPORT_GGUF = "prefvec export REF --to gguf writes it rightly"
EXPORT_MLX = "prefvec export REF --to mlx writes it rightly"
_PLAIN = {"F32", "F16", "BF16"}


@dataclass(frozen=True)
class FormatRule:
    """One thing that must hold of a file that only one kind of engine reads; see `Rule`."""

    id: str
    what: str
    severity: Severity
    check: Callable[[Any], str | None]
    fix: str
    needs: Needs = ""


@dataclass(frozen=True)
class Gguf:
    """A GGUF file, read as far as it can be."""

    path: Path
    base: Base | None

    @cached_property
    def _read(self) -> tuple[dict[str, Any], dict[str, str], dict[str, tuple[tuple[int, ...], str]], str]:
        gguf = import_gguf()
        try:
            reader = gguf.GGUFReader(self.path)
            fields = {name: field.contents() for name, field in reader.fields.items()}
            types = {name: field.types[0].name for name, field in reader.fields.items() if field.types}
            tensors = {
                tensor.name: (tuple(int(size) for size in tensor.shape), tensor.tensor_type.name)
                for tensor in reader.tensors
            }
        except Exception as error:  # the reader trusts the file, and fails in whatever way the damage leads to
            return {}, {}, {}, f"it cannot be read ({type(error).__name__})"
        return fields, types, tensors, ""

    @property
    def fields(self) -> dict[str, Any]:
        return self._read[0]

    @property
    def types(self) -> dict[str, str]:
        return self._read[1]

    @property
    def tensors(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Name -> (ne as ggml counts it, innermost first; type)."""
        return self._read[2]

    @property
    def damage(self) -> str:
        return self._read[3]

    @cached_property
    def identity(self) -> BaseIdentity | None:
        """Of the base, from the provenance that our files carry."""
        try:
            return Provenance.model_validate_json(str(self.fields.get(PROVENANCE_KEY, ""))).base
        except ValueError:
            return None

    @cached_property
    def pairs(self) -> dict[str, dict[str, tuple[int, ...]]]:
        """Name of the base's tensor -> ne of `lora_a` and `lora_b`."""
        found: dict[str, dict[str, tuple[int, ...]]] = defaultdict(dict)
        for name, (shape, _) in self.tensors.items():
            if match := re.fullmatch(r"(.+)\.(lora_[ab])", name):
                found[match[1]][match[2]] = shape
        return dict(found)

    @cached_property
    def shapes(self) -> dict[str, Shape]:
        """Name of a tensor of the base in GGUF -> (out, in)."""
        found: dict[str, Shape] = {}
        if self.base and self.base.model_type in ARCHITECTURES:
            for module, shape in self.base.shapes.items():
                try:
                    found[tensor_name(module, self.base, ARCHITECTURES[self.base.model_type])] = shape
                except InputError:
                    continue  # what has no place there
        return found

    @property
    def rank(self) -> int:
        return max((parts["lora_b"][0] for parts in self.pairs.values() if parts.get("lora_b")), default=0)


@dataclass(frozen=True)
class Mlx:
    """An MLX folder, read as far as it can be."""

    path: Path
    base: Base | None

    @cached_property
    def config(self) -> dict[str, Any]:
        try:
            return read_json(self.path / "adapter_config.json")
        except InputError:
            return {}

    @property
    def parameters(self) -> dict[str, Any]:
        found = self.config.get("lora_parameters")
        return found if isinstance(found, dict) else {}

    @cached_property
    def _read(self) -> tuple[dict[str, TensorSpec], str]:
        try:
            return read_header(self.path / "adapters.safetensors")[0], ""
        except InputError as error:
            return {}, error.problem

    @cached_property
    def facts(self) -> Provenance | None:
        try:
            return read_provenance(self.path)
        except InputError:
            return None

    @property
    def rank(self) -> int:
        found = self.parameters.get("rank")
        return found if type(found) is int else 0

    @property
    def tensors(self) -> dict[str, TensorSpec]:
        return self._read[0]

    @property
    def damage(self) -> str:
        return self._read[1]


def _gguf_sound(file: Gguf) -> str | None:
    return file.damage or (None if file.tensors else "it holds no tensors")


def _gguf_type(file: Gguf) -> str | None:
    for key, expected in (("general.type", "adapter"), ("adapter.type", "lora")):
        if not file.damage and file.fields.get(key) != expected:
            return f"{key} is {str(file.fields.get(key))[:80]!r}"
    return None


def _gguf_architecture(file: Gguf) -> str | None:
    known = ARCHITECTURES.get(file.base.model_type) if file.base else None
    found = file.fields.get("general.architecture")
    return f"it is {str(found)[:80]!r}, and the base's {known.name!r}" if known and found != known.name else None


def _gguf_alpha_type(file: Gguf) -> str | None:
    found = file.types.get("adapter.lora.alpha", "FLOAT32")
    return f"it is of type {found}" if found != "FLOAT32" else None


def _gguf_alpha(file: Gguf) -> str | None:
    return "it is 0, which means no scale" if file.fields.get("adapter.lora.alpha", 1) == 0 else None


def _gguf_pairs(file: Gguf) -> str | None:
    for name in file.tensors:
        if not name.endswith((".lora_a", ".lora_b", "_norm.weight")):
            return f"it holds {name[:120]}"
    half = [name for name, parts in file.pairs.items() if len(parts) == 1]
    return f"{some(half)} has one factor" if half else None


def _gguf_in_base(file: Gguf) -> str | None:
    missing = [name for name in file.pairs if name not in file.shapes]
    return f"the base has no {some(missing)}" if missing and file.shapes else None


def _gguf_meet(file: Gguf) -> str | None:
    for name, parts in file.pairs.items():
        shapes = [parts[part] for part in ("lora_a", "lora_b") if part in parts]
        inner = [shape[:1] if name == "token_embd.weight" else shape[1:2] for shape in shapes[:1]]
        if len(shapes) == 2 and inner[0] != shapes[1][:1]:
            return f"{name} has factors of {list(shapes[0])} and {list(shapes[1])}"
    return None


def _gguf_fits(file: Gguf) -> str | None:
    known = file.shapes
    for name, parts in file.pairs.items():
        if name not in known or len(parts) < 2:
            continue
        (rows, columns), A, B = known[name], parts["lora_a"], parts["lora_b"]
        found = (A[1], B[1]) if name == "token_embd.weight" else (B[1], A[0])
        if found != (rows, columns):
            return f"{name} is {list(found)}, and {[rows, columns]} in the base"
    return None


def _gguf_plain(file: Gguf) -> str | None:
    found = {kind for _, kind in file.tensors.values()} - _PLAIN
    return f"there are {some(found)}" if found else None


def _mlx_sound(folder: Mlx) -> str | None:
    return folder.damage or (None if folder.tensors else "it holds no tensors")


def _mlx_hash(folder: Mlx) -> str | None:
    said = folder.facts.weights_sha256 if folder.facts else None
    differs = said and said != file_sha256(folder.path / "adapters.safetensors")
    return "the weights are not those that prefvec.json names" if differs else None


def _mlx_fields(folder: Mlx) -> str | None:
    if type(folder.config.get("num_layers")) is not int:
        return "num_layers is missing or no integer"
    missing = [key for key in ("rank", "scale", "dropout") if key not in folder.parameters]
    if missing:
        return f"lora_parameters has no {missing[0]}"
    keys = folder.parameters.get("keys", [])
    return None if isinstance(keys, list) else "keys is no list"


def _mlx_shapes(folder: Mlx) -> str | None:
    for name, spec in folder.tensors.items():
        match = re.fullmatch(r"(?P<module>.+)\.lora_(?P<part>[ab])", name)
        if match is None:
            return f"it holds {name[:120]}"
        rank = spec.shape[1 if match["part"] == "a" else 0] if len(spec.shape) == 2 else None
        if rank != folder.rank:
            return f"{name} is {list(spec.shape)}, and the rank {folder.rank}"
        keys = folder.parameters.get("keys")
        module = match["module"]
        if isinstance(keys, list) and not any(module == key or module.endswith(f".{key}") for key in keys):
            return f"{name} is not among the keys"
    return None


def _mlx_in_base(folder: Mlx) -> str | None:
    known = folder.base.shapes if folder.base else {}
    for name, spec in folder.tensors.items():
        module, _, part = name.rpartition(".")
        if module.startswith("language_model.") or not part.startswith("lora_"):
            continue
        if module not in known:
            return f"the base has no {module}"
        (rows, columns), embedding = known[module], module.endswith("embed_tokens")
        expected = (rows if embedding else columns) if part == "lora_a" else (columns if embedding else rows)
        if len(spec.shape) == 2 and spec.shape[0 if part == "lora_a" else 1] != expected:
            return f"{name} is {list(spec.shape)}, and the base's weight {[rows, columns]}"
    return None


def _mlx_tied(folder: Mlx) -> str | None:
    adapted = [name for name in folder.tensors if re.search(r"(embed_tokens|lm_head)\.lora_", name)]
    return f"{adapted[0]} belongs to a tied matrix" if adapted and folder.base and folder.base.tied else None


def _mlx_scale(folder: Mlx) -> str | None:
    scale = folder.parameters.get("scale")
    if not isinstance(scale, int | float):
        return "it is no number"
    if folder.facts and scale != 1:  # our own factors carry their scale
        return f"it is {scale}, and prefvec folds it into the factors"
    return "it is 0" if scale == 0 else None


GGUF_RULES = [
    FormatRule("F5", "the file is sound", "block", _gguf_sound, AGAIN),
    FormatRule("GGUF1", "says that it is a LoRA", "block", _gguf_type, EXPORT_GGUF),
    FormatRule("GGUF1", "of the base's architecture", "block", _gguf_architecture, OTHER_BASE, "base"),
    FormatRule("GGUF2", "alpha is float32, or absent", "crash", _gguf_alpha_type, EXPORT_GGUF),
    FormatRule("GGUF3", "alpha is not 0", "wrong", _gguf_alpha, EXPORT_GGUF),
    FormatRule("GGUF4", "pairs of lora_a and lora_b", "block", _gguf_pairs, EXPORT_GGUF),
    FormatRule("GGUF4", "the base has every tensor", "block", _gguf_in_base, OTHER_BASE, "shapes"),
    FormatRule("GGUF5", "the factors meet in one rank", "block", _gguf_meet, EXPORT_GGUF),
    FormatRule("GGUF5", "shapes as in the base", "block", _gguf_fits, OTHER_BASE, "shapes"),
    FormatRule("GGUF7", "no quantised type", "warn", _gguf_plain, EXPORT_GGUF),
]
MLX_RULES = [
    FormatRule("F5", "the file is sound", "block", _mlx_sound, AGAIN),
    FormatRule("I1", "weights as prefvec.json says", "wrong", _mlx_hash, AGAIN),
    FormatRule("MLX1", "num_layers and lora_parameters", "block", _mlx_fields, EXPORT_MLX),
    FormatRule("MLX2", "[in, r] and [r, out], of one rank", "block", _mlx_shapes, EXPORT_MLX),
    FormatRule("MLX2", "the base has every module", "block", _mlx_in_base, OTHER_BASE, "shapes"),
    FormatRule("MLX3", "the scale is right", "wrong", _mlx_scale, EXPORT_MLX),
    FormatRule("E4", "nothing of a tied matrix", "wrong", _mlx_tied, "prefvec fold BASE REF --out DIR", "base"),
]
