"""What makes a base itself: its architecture, its tokenizer and its chat template, hashed from the folder's files."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from lora_prefvec.artifact.provenance import read_json
from lora_prefvec.artifact.reference import SANDBOX, commit_of, public_name, resolve_base
from lora_prefvec.errors import InputError
from lora_prefvec.vector import BaseIdentity

# What fixes the shapes of a model. Other keys of a config.json change with the version that wrote it.
_ARCHITECTURE = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "num_local_experts",
)
# The names GPT-2 and its kin use for the same.
_ALIASES = {
    "hidden_size": ("n_embd", "d_model"),
    "num_hidden_layers": ("n_layer", "num_layers"),
    "num_attention_heads": ("n_head", "num_heads"),
    "intermediate_size": ("n_inner", "ffn_dim"),
    "num_local_experts": ("num_experts",),
}


def base_identity(ref: str, revision: str | None = None, quantization: str = "none") -> BaseIdentity:
    """The identity of a base, read from its files; weights are not looked at.

    Args:
        ref: as `resolve_base` takes it; of a local folder only the name is kept, the hashes identify it.
        quantization: what the base is loaded as: `nf4` or `none`.

    Raises:
        InputError: there is no such base, or a file of it is damaged.
    """
    return identity_of(resolve_base(ref, revision), ref, quantization)


def identity_of(folder: Path, ref: str | None = None, quantization: str = "none") -> BaseIdentity:
    """The same for a base that is already resolved to `folder`.

    Args:
        ref: what the person typed, for the id; the folder's name where left out.
    """
    commit = commit_of(folder)
    shown = SANDBOX if ref == SANDBOX else public_name(ref or folder)
    return BaseIdentity(
        id=shown.partition("@")[0] if commit else shown,
        revision=commit,
        config_sha256=_sha256(architecture(folder)),
        tokenizer_sha256=_tokenizer(folder),
        template_sha256=_template(folder),
        quantization=quantization,
    )


def architecture(folder: Path) -> dict[str, Any]:
    """The keys of `config.json` that fix the shapes; of a multimodal model those of its text part.

    Raises:
        InputError: there is no valid `config.json`.
    """
    config = read_json(folder / "config.json")
    text = config.get("text_config")
    merged = {**config, **text} if isinstance(text, dict) else config
    found = {}
    for key in _ARCHITECTURE:
        names = (key, *_ALIASES.get(key, ()))
        value = next((merged[name] for name in names if merged.get(name) is not None), None)
        if value is not None:
            found[key] = value
    found.setdefault("num_key_value_heads", found.get("num_attention_heads"))
    heads, width = found.get("num_attention_heads"), found.get("hidden_size")
    if isinstance(heads, int) and isinstance(width, int) and heads > 0:
        found.setdefault("head_dim", width // heads)
    return found


def _tokenizer(folder: Path) -> str | None:
    path = folder / "tokenizer.json"
    if path.is_file():
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            raise InputError(f"{path} is no valid JSON", "The file is damaged: get the base again.") from None
        # Truncation and padding are what somebody last did with the tokenizer; saving it again may drop defaults.
        if isinstance(content, dict):
            content = {key: value for key, value in content.items() if key not in {"truncation", "padding"}}
        return _sha256(content)
    for names in (("tokenizer.model",), ("vocab.json", "merges.txt"), ("vocab.txt",)):
        if all((folder / name).is_file() for name in names):
            return hashlib.sha256(b"".join((folder / name).read_bytes() for name in names)).hexdigest()
    return None


def _template(folder: Path) -> str | None:
    """Hash of the default chat template, wherever this version of transformers or an older one keeps it."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            return hashlib.sha256(path.read_text(encoding="utf-8").encode()).hexdigest()
        except (OSError, ValueError):
            raise InputError(f"{path} is no text", "The file is damaged: get the base again.") from None
    for name in ("chat_template.json", "tokenizer_config.json"):
        if not (folder / name).is_file():
            continue
        template = read_json(folder / name).get("chat_template")
        if isinstance(template, list):  # several named templates
            named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
            template = named.get("default")
        if isinstance(template, str):
            return hashlib.sha256(template.encode()).hexdigest()
    return None


def _sha256(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
