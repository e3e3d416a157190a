"""Checks of the names and shapes of a PEFT folder's tensors: each returns what is wrong as a phrase, or None."""

from __future__ import annotations

import re

from lora_prefvec.artifact.canonical import Shape
from lora_prefvec.artifact.kinds import is_canonical, is_embedding, is_single_expert, leaf
from lora_prefvec.artifact.verify.subject import Factor, Folder, some, targeted

STACKS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
VLLM_LIMITS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
_ELSEWHERE = re.compile(r"(^|[._])(vision|visual|audio|projector|multi_modal)")
_FUSED = {"qkv_proj": STACKS[0], "gate_up_proj": STACKS[1]}
_SPLIT = {part: fused for fused, parts in _FUSED.items() for part in parts}


def prefixed(folder: Folder) -> str | None:
    found = [factor.module for factor in folder.factors if not factor.prefix]
    return f"{some(found)} without" if found else None


def no_infix(folder: Folder) -> str | None:
    found = {factor.infix.removeprefix(".") for factor in folder.factors if factor.infix}
    return f"the names hold {some(found)!r}" if found else None


def both_factors(folder: Folder) -> str | None:
    found = [
        f"{module} has no {'B' if 'A' in parts else 'A'}" for module, parts in folder.pairs.items() if len(parts) == 1
    ]
    return some(found) if found else None


def only_factors(folder: Folder) -> str | None:
    found = [name for name in folder.others if ".base_layer." not in name]
    return f"it holds {some(found)}" if found else None


def no_base_weights(folder: Folder) -> str | None:
    found = [name for name in folder.others if ".base_layer." in name]
    return f"{some(found)} overwrites the base" if found else None


def in_base(folder: Folder) -> str | None:
    found = [module for module in _linear(folder) if module not in folder.shapes]
    return f"{some(found)} is not in the base" if found else None


def text_only(folder: Folder) -> str | None:
    found = [module for module in folder.pairs if _ELSEWHERE.search(module)]
    return f"{some(found)} lies outside" if found else None


def no_other_leaf(folder: Folder) -> str | None:
    targets = folder.config.get("target_modules")
    leaves = {name for name in targets if "." not in str(name)} if isinstance(targets, list) else set()
    found = [
        name for name in folder.shapes if leaf(name) in leaves and name not in folder.pairs and _ELSEWHERE.search(name)
    ]
    return f"{some(found)} of the base would be adapted too" if found else None


def fused_alike(folder: Folder) -> str | None:
    known = folder.shapes
    for module in _linear(folder):
        parent, _, last = module.rpartition(".")
        others = (_SPLIT[last],) if last in _SPLIT else _FUSED.get(last, ())
        if module not in known and any(f"{parent}.{other}" in known for other in others):
            return f"{module}, where the base has {', '.join(others)}"
    return None


def text_names(folder: Folder) -> str | None:
    if folder.base is None or folder.base.multimodal:
        return None
    found = [module for module in folder.pairs if "language_model." in module]
    return f"{some(found)}, and the base is the text model alone" if found else None


def multimodal_names(folder: Folder) -> str | None:
    if folder.base is None or not folder.base.multimodal or any("language_model." in name for name in folder.pairs):
        return None
    return "the names are those of the text model alone"


def query_and_value(folder: Folder) -> str | None:
    for place, parents in _stacked(folder):
        for parent, leaves in parents.items():
            if "q_proj" in leaves and "v_proj" not in leaves:
                return f"{place}.{parent} has q_proj and no v_proj"
    return None


def stacks_begin(folder: Folder) -> str | None:
    for place, parents in _stacked(folder):
        for parent, leaves in parents.items():
            for first, *rest in STACKS:
                if first not in leaves and leaves & set(rest):
                    return f"{place}.{parent} has {some(leaves & set(rest))} and no {first}"
    return None


def full_grid(folder: Folder) -> str | None:
    stems = {stem for stem, _ in folder.grid}
    for stem in stems:
        layers = {layer: paths for (s, layer), paths in folder.grid.items() if s == stem}
        depth = max(layers) + 1
        if folder.base and len(stems) == 1:
            depth = max(depth, folder.base.layers)
        for path in sorted({path for paths in layers.values() for path in paths if "experts." not in path}):
            have = sorted(layer for layer, paths in layers.items() if path in paths)
            gap = next((place for place, layer in enumerate(have) if place != layer), len(have))
            known = folder.base.shapes if folder.base else {}
            if gap < depth and (not known or f"{stem}{gap}.{path}" in known):
                return f"{path} is missing in layer {gap}"
    return None


def all_targeted(folder: Folder) -> str | None:
    found = [module for module in folder.pairs if not is_single_expert(module) and not targeted(folder.config, module)]
    return f"{some(found)} is not" if found else None


def ranks_agree(folder: Folder) -> str | None:
    settings = folder.settings
    for factor in folder.factors if settings else []:
        if settings and is_canonical(factor.module) and factor.rank != settings.rank(factor.module):
            shape = list(factor.spec.shape)
            return f"{factor.module}.{factor.part} is {shape}, and the config says rank {settings.rank(factor.module)}"
    return None


def not_smaller(folder: Folder) -> str | None:
    return _shape_differs(folder, larger=False)


def not_larger(folder: Folder) -> str | None:
    return _shape_differs(folder, larger=True)


def one_rank(folder: Folder) -> str | None:
    found = {factor.rank for parts in folder.pairs.values() for factor in parts.values()}
    return f"they are {', '.join(map(str, sorted(found)[:6]))}" if len(found) > 1 else None


def rank_of(folder: Folder) -> int:
    """The largest rank that tensors or config name, which engines reserve memory for."""
    settings = folder.settings
    said = [settings.r, *(settings.rank_pattern or {}).values()] if settings else []
    return max([0, *said, *(factor.rank for parts in folder.pairs.values() for factor in parts.values())])


def padded_rank(folder: Folder) -> str | None:
    rank = rank_of(folder)
    return f"it is {rank}, which LoRAX pads and then divides by" if rank != 8 and rank % 16 else None


def limit_rank(folder: Folder) -> str | None:
    rank = rank_of(folder)
    limit = next((limit for limit in VLLM_LIMITS if limit >= rank), None)
    return f"it is {rank}, and takes the memory of {limit}" if limit and limit != rank else None


def rank_limit(folder: Folder) -> str | None:
    """The rank against the limit that was given, or against the most that vLLM serves."""
    rank, limit = rank_of(folder), folder.max_rank or VLLM_LIMITS[-1]
    return f"it is {rank}, and the limit is {limit}" if rank > limit else None


def default_limit(folder: Folder) -> str | None:
    rank = rank_of(folder)
    found = next((limit for limit in VLLM_LIMITS if limit >= rank), None)
    return f"it is {rank}: --max-lora-rank {found}" if folder.max_rank is None and rank > 16 and found else None


def real_numbers(folder: Folder) -> str | None:
    found = {factor.spec.dtype for factor in folder.factors} - {"F64", "F32", "F16", "BF16"}
    return f"there are {some(found)}" if found else None


def one_type(folder: Folder) -> str | None:
    found = {factor.spec.dtype for factor in folder.factors}
    return f"there are {', '.join(sorted(found))}" if len(found) > 1 else None


def shape_of(parts: dict[str, Factor]) -> Shape:
    """(out, in) of the weight that a complete pair changes."""
    A, B = parts["A"], parts["B"]
    return (A.width, B.width) if A.embedding else (B.width, A.width)


def _shape_differs(folder: Folder, *, larger: bool) -> str | None:
    known = folder.shapes
    for module, parts in folder.pairs.items():
        if module not in known or len(parts) < 2:
            continue
        here, there = shape_of(parts), known[module]
        differs = any(a > b for a, b in zip(here, there, strict=True))
        if here != there and differs == larger:
            return f"{module} is {list(here)}, and {list(there)} in the base"
    return None


def _linear(folder: Folder) -> list[str]:
    """Modules that a checkpoint lists by name; a tied head is not among them, nor are experts that are stacked."""
    tied = folder.base is not None and folder.base.tied
    return [
        module
        for module in folder.pairs
        if is_canonical(module) or is_embedding(module) or (module in folder.heads and not tied)
    ]


def _stacked(folder: Folder) -> list[tuple[str, dict[str, set[str]]]]:
    """Layers, each with what it holds: `self_attn` -> the leaves of q/k/v and gate/up."""
    found = []
    for (stem, layer), paths in folder.grid.items():
        parents: dict[str, set[str]] = {}
        for path in paths:
            parent, _, last = path.rpartition(".")
            if "experts" not in parent and any(last in stack for stack in STACKS):
                parents.setdefault(parent, set()).add(last)
        found.append((f"{stem}{layer}", parents))
    return found
