"""Checks of a PEFT folder's files and of `adapter_config.json`: each returns what is wrong as a phrase, or None."""

from __future__ import annotations

import json
import re
from typing import Any

from lora_prefvec.artifact.folder import WEIGHTS
from lora_prefvec.artifact.peft_config import FILE as CONFIG
from lora_prefvec.artifact.reference import public_name
from lora_prefvec.artifact.verify.subject import Folder, some
from lora_prefvec.artifact.weights import file_sha256
from lora_prefvec.vector import BaseIdentity

_CHANGES_BASE = ("pissa", "olora", "corda", "loftq")
_SGLANG = {
    *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "qkv_proj", "gate_up_proj"),
    *(
        "embed_tokens",
        "lm_head",
        "q_a_proj",
        "q_b_proj",
        "kv_a_proj_with_mqa",
        "kv_b_proj",
        "fused_qkv_a_proj_with_mqa",
    ),
}
# Fields of PEFT 0.21's LoraConfig; a test compares them with the installed one.
KNOWN_FIELDS = frozenset(
    """
    alora_invocation_tokens alpha_pattern arrow_config auto_mapping base_model_name_or_path bias corda_config
    ensure_weight_tying eva_config exclude_modules fan_in_fan_out inference_mode init_lora_weights kasa_config
    layer_replication layers_pattern layers_to_transform loftq_config lora_alpha lora_bias lora_dropout
    lora_ga_config megatron_config megatron_core modules_to_save monteclora_config peft_type peft_version
    qalora_group_size r rank_pattern revision runtime_config target_modules target_parameters task_type
    trainable_token_indices use_bdlora use_dora use_qalora use_rslora velora_config
    """.split()
)


def files(folder: Folder) -> str | None:
    if not (folder.path / CONFIG).is_file():
        return f"there is no {CONFIG}"
    if not folder.config:
        return f"{CONFIG} is no JSON object, or empty"
    if not any((folder.path / name).is_file() for name in (WEIGHTS, "adapter_model.bin", "adapter_model.pt")):
        return f"there is no {WEIGHTS}"
    return None


def one_file(folder: Folder) -> str | None:
    found = sorted(path.name for path in folder.path.glob("*.safetensors"))
    return f"{len(found)} of them: {', '.join(found[:4])}" if len(found) > 1 else None


def added_tokens(folder: Folder) -> str | None:
    try:
        added = json.loads((folder.path / "added_tokens.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    vocabulary = folder.base.vocabulary if folder.base else 0
    if not isinstance(added, dict) or not vocabulary:
        return None
    beyond = [name for name, number in added.items() if isinstance(number, int) and number >= vocabulary]
    return f"added_tokens.json has {some(beyond)} beyond the vocabulary of {vocabulary}" if beyond else None


def pickle(folder: Folder) -> str | None:
    found = [name for name in ("adapter_model.bin", "adapter_model.pt") if (folder.path / name).is_file()]
    return f"only {found[0]}, a pickle" if found and not (folder.path / WEIGHTS).is_file() else None


def header(folder: Folder) -> str | None:
    return folder.damage.removeprefix(f"{folder.path / WEIGHTS} ") or None


def hash_holds(folder: Folder) -> str | None:
    said = folder.facts.weights_sha256 if folder.facts else None
    if not said:
        return None
    found = file_sha256(folder.path / WEIGHTS)
    return f"SHA-256 is {found[:12]}..., and prefvec.json says {said[:12]}..." if found != said else None


def same_base(folder: Folder) -> str | None:
    made_for = _made_for(folder)
    found = made_for.mismatches(folder.identity) if made_for and folder.identity else []
    return "; ".join(found) or None


def base_called_so(folder: Folder) -> str | None:
    made_for, here = _made_for(folder), folder.identity
    if made_for is None or here is None or made_for.config_sha256:
        return None
    names = [identity.id.rpartition("/")[2] for identity in (made_for, here)]
    return f"it names {made_for.id!r}, and the base is {here.id!r}" if names[0].lower() != names[1].lower() else None


def _made_for(folder: Folder) -> BaseIdentity | None:
    if folder.facts and folder.facts.base:
        return folder.facts.base
    named = folder.config.get("base_model_name_or_path")
    return BaseIdentity(id=public_name(named)) if isinstance(named, str) and named else None


def peft_type(folder: Folder) -> str | None:
    found = folder.config.get("peft_type")
    return None if isinstance(found, str) and found.upper() == "LORA" else f"it is {_shown(found)}"


def peft_type_case(folder: Folder) -> str | None:
    found = folder.config.get("peft_type")
    written_small = isinstance(found, str) and found != "LORA" and found.upper() == "LORA"
    return f"it is {_shown(found)}" if written_small else None


def rank(folder: Folder) -> str | None:
    found = folder.config.get("r")
    return None if type(found) is int and found >= 1 else f"it is {_shown(found)}"


def alpha_given(folder: Folder) -> str | None:
    return "it is missing" if folder.config.get("lora_alpha") is None else None


def alpha_not_zero(folder: Folder) -> str | None:
    return "it is 0" if folder.config.get("lora_alpha") == 0 else None


def alpha_integer(folder: Folder) -> str | None:
    found = folder.config.get("lora_alpha")
    return None if found is None or (type(found) is int and found >= 1) else f"it is {_shown(found)}"


def rslora(folder: Folder) -> str | None:
    return "use_rslora is set, which they ignore" if folder.config.get("use_rslora") else None


def alpha_pattern(folder: Folder) -> str | None:
    return _pattern(folder.config.get("alpha_pattern"), folder.config.get("lora_alpha"))


def rank_pattern(folder: Folder) -> str | None:
    return _pattern(folder.config.get("rank_pattern"), folder.config.get("r"))


def bias(folder: Folder) -> str | None:
    if folder.config.get("bias") not in (None, "none"):
        return f"bias is {_shown(folder.config['bias'])}"
    return "lora_bias is set" if folder.config.get("lora_bias") else None


def dora(folder: Folder) -> str | None:
    if folder.config.get("use_dora"):
        return "use_dora is set"
    return "it holds magnitude vectors" if any("lora_magnitude_vector" in name for name in folder.tensors) else None


def modules_to_save(folder: Folder) -> str | None:
    found = folder.config.get("modules_to_save")
    return f"it replaces {_shown(found)}" if found else None


def changes_base(folder: Folder) -> str | None:
    found = folder.config.get("init_lora_weights")
    changes = isinstance(found, str) and found.lower().startswith(_CHANGES_BASE)
    return f"{_shown(found)} takes a part out of the base" if changes else None


def targets_given(folder: Folder) -> str | None:
    return None if "target_modules" in folder.config else "it is missing"


def targets_list(folder: Folder) -> str | None:
    found = folder.config.get("target_modules")
    return None if isinstance(found, list) or found in ("all-linear", "all") else f"it is {_shown(found)}"


def targets_known(folder: Folder) -> str | None:
    found = folder.config.get("target_modules")
    leaves = {str(name).rpartition(".")[2] for name in found} if isinstance(found, list) else set()
    unknown = leaves - _SGLANG
    return f"it does not place {some(unknown)}" if unknown else None


def variants(folder: Folder) -> str | None:
    return _set(folder, "layer_replication", "use_qalora", "use_bdlora")


def other_methods(folder: Folder) -> str | None:
    return _set(folder, "kasa_config", "velora_config", "monteclora_config", "arrow_config")


def activated(folder: Folder) -> str | None:
    return _set(folder, "alora_invocation_tokens")


def trained_tokens(folder: Folder) -> str | None:
    found = [name for name in folder.tensors if "trainable_tokens" in name or "token_adapter" in name]
    return _set(folder, "trainable_token_indices") or (f"it holds {some(found)}" if found else None)


def base_named(folder: Folder) -> str | None:
    found = folder.config.get("base_model_name_or_path")
    named = isinstance(found, str) and re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", found)
    return None if named else f"it says {_shown(found)}"


def revision_named(folder: Folder) -> str | None:
    by_hub_id = base_named(folder) is None
    return "the base's revision is not given" if by_hub_id and not folder.config.get("revision") else None


def known_fields(folder: Folder) -> str | None:
    unknown = set(folder.config) - KNOWN_FIELDS
    return f"it does not know {some(unknown)}" if unknown else None


def not_for_ollama(folder: Folder) -> str | None:
    return "it takes no safetensors adapter, and from 0.34.1 on none at all; fold for those"


def _pattern(pattern: Any, value: Any) -> str | None:
    differs = isinstance(pattern, dict) and any(number != value for number in pattern.values())
    return f"{some(set(map(str, pattern)))} differ from the rest" if differs else None


def _set(folder: Folder, *fields: str) -> str | None:
    found = [field for field in fields if folder.config.get(field)]
    return f"{found[0]} is set" if found else None


def _shown(value: Any) -> str:
    return json.dumps(value, default=str)[:80]
