"""What `adapter_config.json` says: which adapters are a linear delta, and by which number each module is scaled."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lora_prefvec.artifact.provenance import first_complaint, read_json
from lora_prefvec.artifact.reference import public_name
from lora_prefvec.errors import InputError
from lora_prefvec.vector import BaseIdentity

FILE = "adapter_config.json"
Number = TypeVar("Number", int, float)
MAX_RANK = 2**20
_Rank = Annotated[int, Field(ge=1, le=MAX_RANK)]
_Alpha = Annotated[float, Field(allow_inf_nan=False)]
# Initialisations that take a part out of the base: the adapter is a delta of the changed base, not of the original.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_NOT_LINEAR = {
    "arrow_config": "Arrow routing",
    "kasa_config": "KaSA",
    "velora_config": "VeLoRA",
    "monteclora_config": "MonteCLoRA",
    "use_qalora": "QA-LoRA",
    "use_bdlora": "BD-LoRA",
    "alora_invocation_tokens": "activated LoRA, which depends on the text",
    "layer_replication": "replicated layers",
    "trainable_token_indices": "trained token embeddings",
}


class LoraSettings(BaseModel):
    """The fields of `adapter_config.json` that decide a LoRA's delta, with PEFT's names and defaults."""

    model_config = ConfigDict(extra="ignore", strict=True)

    r: _Rank = 8
    lora_alpha: _Alpha = 8
    use_rslora: bool = False
    rank_pattern: dict[str, _Rank] | None = None
    alpha_pattern: dict[str, _Alpha] | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None

    def rank(self, module: str) -> int:
        """The rank of a module, by PEFT's rule: the first pattern that fits, else `r`."""
        return _first_match(self.rank_pattern or {}, module, self.r)

    def scale(self, module: str) -> float:
        """The number that multiplies B @ A: alpha / r, or alpha / sqrt(r) for rsLoRA (arXiv 2312.03732)."""
        alpha, rank = _first_match(self.alpha_pattern or {}, module, self.lora_alpha), self.rank(module)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    def identity(self) -> BaseIdentity | None:
        """What a plain adapter tells about its base: a name and perhaps a revision."""
        if not self.base_model_name_or_path:
            return None
        return BaseIdentity(id=public_name(self.base_model_name_or_path), revision=self.revision)


def read_config(folder: Path) -> tuple[LoraSettings, dict[str, Any]]:
    """`adapter_config.json` of a folder, checked, and as it stands.

    Raises:
        InputError: the file is missing or damaged, a field has the wrong type, or the adapter is no linear delta.
    """
    path = folder / FILE
    if not path.exists():
        raise InputError(f"{folder} holds no {FILE}", "Give the folder of an adapter.")
    config = read_json(path)
    _check_linear(folder, config)
    try:
        # A null means the default, as in PEFT's own files; `r` and `lora_alpha` have to be there.
        settings = LoraSettings.model_validate({key: value for key, value in config.items() if value is not None})
    except ValidationError as error:
        raise InputError(f"{path}: {first_complaint(error)}", "Mend the field, or get the folder again.") from None
    for key in ("r", "lora_alpha"):
        if config.get(key) is None:
            raise InputError(f"{path} lacks {key!r}, which scales the adapter", "Get the folder again.")
    for pattern in (*(settings.rank_pattern or {}), *(settings.alpha_pattern or {})):
        _check_pattern(path, pattern)
    return settings, config


def _check_linear(folder: Path, config: dict[str, Any]) -> None:
    """Refuse what B @ A does not describe, with the way out."""
    kind = config.get("peft_type")
    if kind != "LORA":
        raise InputError(
            f"{folder} has peft_type {_shown(kind)}, which is no low-rank delta of weights",
            "Only LoRA adapters can be mixed.",
        )
    if config.get("use_dora"):
        raise InputError(
            f"{folder} is a DoRA, which rescales the base's own weights", "Train it again without use_dora."
        )
    if config.get("bias") not in (None, "none") or config.get("lora_bias"):
        raise InputError(f"{folder} carries biases, which no low-rank delta holds", "Train it again with bias none.")
    if config.get("modules_to_save"):
        raise InputError(
            f"{folder} replaces whole modules (modules_to_save: {_shown(config['modules_to_save'])})",
            "Train it again without modules_to_save.",
        )
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
        raise InputError(
            f"{folder} was initialised with {_shown(start)}, which changes the base it belongs to",
            "Convert it with PEFT: save_pretrained(..., path_initial_model_for_weight_conversion=...).",
        )
    for key, name in _NOT_LINEAR.items():
        if config.get(key):
            raise InputError(f"{folder} uses {name} ({key})", "Only a plain LoRA can be mixed.")
    if config.get("target_parameters"):
        raise InputError(f"{folder} adapts fused parameters (target_parameters)", "Train it on linear layers.")
    if config.get("fan_in_fan_out"):
        raise InputError(
            f"{folder} adapts GPT-2's Conv1D layers (fan_in_fan_out)", "Bases with plain linear layers can be mixed."
        )


def _first_match(patterns: dict[str, Number], module: str, default: Number) -> Number:
    """PEFT's rule (`peft.utils.other.get_pattern_key`): the first key that is the module's path or a suffix of it."""
    for key, value in patterns.items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


def _check_pattern(path: Path, pattern: str) -> None:
    """Refuse a pattern that is no regular expression, or one that could run for hours on a short name."""
    repeats = len(re.findall(r"[*+{]", pattern))
    if len(pattern) > 500 or repeats > 3 or re.search(r"\)[*+{?]", pattern):
        raise InputError(f"{path} has the pattern {pattern[:80]!r}, too involved to run", "Name the modules plainly.")
    try:
        re.compile(rf"(.*\.)?({pattern})$")
    except re.error:
        raise InputError(f"{path} has the pattern {pattern[:80]!r}, no regular expression", "Mend the file.") from None


def _shown(value: Any) -> str:
    return ", ".join(map(str, value))[:120] if isinstance(value, list) else str(value)[:120]
