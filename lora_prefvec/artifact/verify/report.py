"""From a reference to a verdict per engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_prefvec.artifact.base_facts import Base, find_base
from lora_prefvec.artifact.identity import identity_of
from lora_prefvec.artifact.provenance import read_json, read_provenance
from lora_prefvec.artifact.reference import public_name, resolve_adapter
from lora_prefvec.artifact.verify.formats import GGUF_RULES, MLX_RULES, FormatRule, Gguf, Mlx
from lora_prefvec.artifact.verify.rules import ENGINES, RULES, Rule, Severity
from lora_prefvec.artifact.verify.subject import Folder
from lora_prefvec.artifact.verify.tensors import VLLM_LIMITS, rank_of
from lora_prefvec.errors import InputError, nearest
from lora_prefvec.vector import BaseIdentity


@dataclass(frozen=True)
class Finding:
    """A rule that does not hold.

    Args:
        engines: engine -> what happens there.
        fix: what to do about it.
    """

    rule: str
    what: str
    problem: str
    engines: dict[str, Severity]
    fix: str


@dataclass(frozen=True)
class Report:
    """What `verify` found.

    Args:
        kind: `PEFT folder`, `GGUF file` or `MLX folder`.
        checked: engine -> the ids of the rules that were checked for it.
        unchecked: rules that could not be checked, as the base or its weights are not at hand.
    """

    ref: str
    kind: str
    base: str | None
    rank: int
    checked: dict[str, list[str]]
    findings: list[Finding]
    unchecked: list[str]

    def verdict(self, engine: str) -> str:
        """`ok`, `warn` or `fails`."""
        severities = {finding.engines[engine] for finding in self.findings if engine in finding.engines}
        return "fails" if severities - {"warn"} else "warn" if severities else "ok"

    @property
    def passes(self) -> bool:
        """Whether no engine fails."""
        return all(self.verdict(engine) != "fails" for engine in self.checked)

    def way(self, engine: str) -> str:
        """How an engine gets it, in a few words."""
        if self.kind == "GGUF file":
            return {"llama.cpp": "--lora-scaled FILE:SCALE, and cache_prompt false in requests"}.get(
                engine, "ADAPTER FILE, before 0.34.1"
            )
        limit = next((limit for limit in VLLM_LIMITS if limit >= self.rank), VLLM_LIMITS[-1])
        return {
            "vllm": f"--enable-lora --max-lora-rank {limit}",
            "sglang": f"--enable-lora --max-lora-rank {self.rank}",
            "llama.cpp": "convert_lora_to_gguf.py, or prefvec export --to gguf",
            "mlx": "--adapter-path" if self.kind == "MLX folder" else "prefvec export --to mlx",
            "peft": "PeftModel.from_pretrained",
            "transformers": "model.load_adapter",
            "ollama": "prefvec export --to gguf, or fold",
            "lorax": "adapter_id",
        }[engine]


def verify(ref: str, engines: Sequence[str] = (), *, max_rank: int | None = None, base: str | None = None) -> Report:
    """Check what each engine would make of an adapter; nothing is written, and no model is built.

    Args:
        ref: a PEFT folder (also one that `read_adapter` refuses), an MLX folder, a GGUF file, a name or a Hub id.
        engines: those to check for; all that can read that kind where empty.
        max_rank: that the engine is started with; else vLLM's and SGLang's own limits count.
        base: folder, Hub id or `sandbox`; the base that the adapter names where it is on this machine.

    Raises:
        InputError: there is nothing at `ref`, no such engine, or no such base.
    """
    for engine in engines:
        if engine not in ENGINES:
            raise InputError(f"there is no engine {engine!r}", nearest(engine, ENGINES))
    place = _place(ref)
    if place.is_file():
        return _verify_gguf(ref, place, engines, base)
    config = _json(place / "adapter_config.json")
    said = _identity(place, config)
    found = find_base(said, base)
    if (place / "adapters.safetensors").is_file():
        asked = _able(engines, ("mlx",), "an MLX folder is read by MLX alone", ref)
        return _judge(ref, "MLX folder", Mlx(place, found), MLX_RULES, asked, _called(found, base, said))
    identity = identity_of(found.folder, base) if found and base else None
    folder = Folder(place, found, identity, max_rank)
    at_hand = {"": True, "weights": folder.has_weights, "base": found is not None}
    at_hand["shapes"] = folder.has_weights and found is not None and bool(found.shapes)
    asked = list(engines or ENGINES)
    checked: dict[str, list[str]] = {engine: [] for engine in asked}
    findings, unchecked = [], []
    for rule in RULES:
        fails = _engines(rule, asked)
        if not fails:
            continue
        if not at_hand[rule.needs]:
            unchecked.append(rule.id)
            continue
        for engine in fails:
            checked[engine].append(rule.id)
        if problem := rule.check(folder):
            fix = rule.fix if isinstance(rule.fix, str) else rule.fix(folder)
            findings.append(Finding(rule.id, rule.what, problem, fails, fix.replace("{ref}", ref)))
    return Report(
        ref,
        "PEFT folder",
        _called(found, base, said),
        rank_of(folder),
        checked,
        findings,
        sorted(set(unchecked), key=unchecked.index),
    )


def _verify_gguf(ref: str, path: Path, engines: Sequence[str], base: str | None) -> Report:
    asked = _able(engines, ("llama.cpp", "ollama"), "a GGUF file is read by llama.cpp and Ollama alone", ref)
    file = Gguf(path, find_base(None, base))
    if file.base is None and file.identity:
        file = Gguf(path, find_base(file.identity))
    return _judge(ref, "GGUF file", file, GGUF_RULES, asked, _called(file.base, base, file.identity))


def _judge(
    ref: str, kind: str, subject: Any, rules: Sequence[FormatRule], engines: Sequence[str], base: str | None
) -> Report:
    findings, unchecked, checked = [], [], []
    for rule in rules:
        if rule.needs and not (subject.base if rule.needs == "base" else subject.base and subject.base.shapes):
            unchecked.append(rule.id)
            continue
        checked.append(rule.id)
        if problem := rule.check(subject):
            findings.append(Finding(rule.id, rule.what, problem, dict.fromkeys(engines, rule.severity), rule.fix))
    done = {engine: list(dict.fromkeys(checked)) for engine in engines}
    return Report(ref, kind, base, subject.rank, done, findings, unchecked)


def _called(found: Base | None, ref: str | None, identity: BaseIdentity | None) -> str | None:
    """The base that was looked at, by the name that a person knows it by."""
    return None if found is None else public_name(ref) if ref else identity.id if identity else None


def _engines(rule: Rule, asked: Sequence[str]) -> dict[str, Severity]:
    return {
        engine: severity for engine in asked for severity, letters in rule.fails.items() if ENGINES[engine] in letters
    }


def _able(engines: Sequence[str], able: Sequence[str], why: str, ref: str) -> list[str]:
    wrong = [engine for engine in engines if engine not in able]
    if wrong:
        raise InputError(f"{why}, and {ref} is to be checked for {wrong[0]}", f"Write --for {able[0]}.")
    return list(engines or able)


def _place(ref: str) -> Path:
    """The file or folder of a reference, however broken."""
    path = Path(ref).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        return path
    if path.is_dir() and any(
        (path / name).exists() for name in ("adapter_config.json", "adapter_model.safetensors", "adapters.safetensors")
    ):
        return path
    return resolve_adapter(ref)


def _identity(folder: Path, config: dict[str, Any]) -> BaseIdentity | None:
    try:
        facts = read_provenance(folder)
    except InputError:
        facts = None
    if facts and facts.base:
        return facts.base
    name, revision = config.get("base_model_name_or_path"), config.get("revision")
    if not isinstance(name, str) or not name:
        return None
    return BaseIdentity(id=public_name(name), revision=revision if isinstance(revision, str) else None)


def _json(path: Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except InputError:
        return {}
