"""The rules of `prefvec verify` for a PEFT folder, as data.

To add a rule, write a check that returns what is wrong (or None), and a line here. The letters are the engines whose
behaviour is known for it:

    V vLLM, G SGLang, L llama.cpp, M MLX, P PEFT, T transformers' load_adapter, O Ollama, X LoRAX

and the severities say what happens where the rule does not hold:

    wrong  runs with wrong weights, silently      drop   is without effect in part or whole, silently
    crash  is accepted and fails at use           block  is refused with a message
    warn   works, with a warning, a flag or a cost

L, M and O are about the folder's way into GGUF and MLX, through llama.cpp's converter or `prefvec export`; Ollama runs
llama.cpp, so what a GGUF file cannot carry fails in both.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from lora_prefvec.artifact.verify import config, experts, tensors, values
from lora_prefvec.artifact.verify.subject import Folder
from lora_prefvec.artifact.verify.values import truncation

Severity = Literal["wrong", "drop", "crash", "block", "warn"]
Needs = Literal["", "weights", "base", "shapes"]
ENGINES = {
    "vllm": "V",
    "sglang": "G",
    "llama.cpp": "L",
    "mlx": "M",
    "peft": "P",
    "transformers": "T",
    "ollama": "O",
    "lorax": "X",
}
ALL = "VGLMPTOX"
COMPOSE = "prefvec compose {ref} --out DIR writes it so that every engine reads it"
RETRAIN = "train it again without it, or fold it into the base where PEFT applies it"
AGAIN = "get the folder again"
OTHER_BASE = "serve it with the base it was trained on"
FOLD = "prefvec fold BASE {ref} --out DIR"


@dataclass(frozen=True)
class Rule:
    """One thing that must hold.

    Args:
        id: several lines may share one, where engines differ by the way in which it fails.
        what: must hold, as a phrase.
        fails: severity -> letters of the engines that fail so where it does not hold.
        check: returns what is wrong as a phrase, or None; is asked only where what the rule needs is at hand.
        fix: what to do, or a function that finds it out; `{ref}` stands for what the person gave.
        needs: `weights` a sound header, `base` the base's config.json, `shapes` the headers of its weights too.
    """

    id: str
    what: str
    fails: dict[Severity, str]
    check: Callable[[Folder], str | None]
    fix: str | Callable[[Folder], str] = COMPOSE
    needs: Needs = ""


RULES = [
    # Files
    Rule("F1", "config and weights are there", {"block": ALL}, config.files, AGAIN),
    Rule("F2", "one safetensors file", {"crash": "G", "wrong": "X"}, config.one_file, "keep adapter_model.safetensors"),
    Rule("F3", "no tokens added to the vocabulary", {"block": "G"}, config.added_tokens, RETRAIN, "base"),
    Rule("F4", "weights in safetensors", {"block": "MO", "warn": "VGLPT"}, config.pickle, "save it with PEFT again"),
    Rule("F5", "the header is sound", {"block": ALL}, config.header, AGAIN),
    Rule("I1", "weights as prefvec.json says", {"wrong": ALL}, config.hash_holds, AGAIN, "weights"),
    Rule("I2", "made for this base", {"wrong": ALL}, config.same_base, OTHER_BASE, "base"),
    Rule("I2", "names this base", {"warn": ALL}, config.base_called_so, OTHER_BASE, "base"),
    # Configuration
    Rule("C1", "peft_type is LORA", {"block": "PTG", "drop": "V"}, config.peft_type),
    Rule("C1", "peft_type in capitals", {"block": "PT", "drop": "V"}, config.peft_type_case),
    Rule("C2", "r is an integer of at least 1", {"block": "PTVG"}, config.rank),
    Rule("C3", "lora_alpha is given", {"block": "VGLO"}, config.alpha_given),
    Rule("C3", "lora_alpha is not 0", {"wrong": "L", "drop": "VGPTOX"}, config.alpha_not_zero),
    Rule("C4", "lora_alpha is an integer of at least 1", {"block": "O"}, config.alpha_integer),
    Rule("C5", "no rsLoRA", {"wrong": "GLO"}, config.rslora),
    Rule("C6", "no alpha_pattern", {"wrong": "GLOX"}, config.alpha_pattern),
    Rule("C7", "no rank_pattern", {"crash": "G", "block": "MX"}, config.rank_pattern),
    Rule("C8", "no bias", {"block": "VLO", "crash": "G", "wrong": "X"}, config.bias, RETRAIN),
    Rule("C9", "no DoRA", {"block": "VGLO", "wrong": "X"}, config.dora, RETRAIN),
    Rule("C10", "no modules_to_save", {"block": "VLO", "drop": "GX"}, config.modules_to_save, RETRAIN),
    Rule(
        "C11",
        "an initialisation that leaves the base as it is",
        {"block": "V", "wrong": "PTGLOX"},
        config.changes_base,
        "convert it with PEFT: save_pretrained(..., path_initial_model_for_weight_conversion=...)",
    ),
    Rule("C12", "target_modules is there", {"block": "V"}, config.targets_given),
    Rule("C12", "target_modules is a list", {"block": "G"}, config.targets_list),
    Rule("C13", "target_modules within what SGLang places", {"block": "G"}, config.targets_known, FOLD),
    Rule("C14", "no layer_replication, QA-LoRA or BD-LoRA", {"block": "V", "wrong": "GLMOX"}, config.variants, RETRAIN),
    Rule("C15", "no KaSA, VeLoRA, MonteCLoRA or Arrow", {"wrong": "VGLX"}, config.other_methods, RETRAIN),
    Rule("C16", "no activated LoRA", {"block": "V", "wrong": "GOX"}, config.activated, RETRAIN),
    Rule("C17", "no trained token embeddings", {"block": "VLO", "drop": "GX"}, config.trained_tokens, RETRAIN),
    Rule("C18", "names its base by Hub id", {"warn": "VLT"}, config.base_named, "name the base where it is served"),
    Rule("C19", "names the base's revision", {"warn": "P"}, config.revision_named, "name the base where it is served"),
    Rule("C20", "only fields that PEFT knows", {"warn": "PT"}, config.known_fields),
    # Names
    Rule("N1", "names begin with base_model.model.", {"drop": "PX"}, tensors.prefixed, needs="weights"),
    Rule("N2", "no adapter name in the names", {"block": "VL", "drop": "TPX"}, tensors.no_infix, needs="weights"),
    Rule(
        "N3",
        "both factors of each module",
        {"block": "VL", "crash": "G", "warn": "PT", "drop": "M"},
        tensors.both_factors,
        AGAIN,
        "weights",
    ),
    Rule("N4", "no tensors but factors", {"block": "VLO", "crash": "G"}, tensors.only_factors, RETRAIN, "weights"),
    Rule("N4", "no weights of the base", {"wrong": "PT"}, tensors.no_base_weights, "save it again alone", "weights"),
    Rule("N5", "the base has every module", {"drop": "VPXT", "block": "GLMO"}, tensors.in_base, OTHER_BASE, "shapes"),
    Rule("N6", "no module outside the text model", {"crash": "G", "drop": "L"}, tensors.text_only, FOLD, "weights"),
    Rule("N6", "full paths where the base repeats a leaf", {"warn": "P"}, tensors.no_other_leaf, needs="shapes"),
    Rule("N7", "fused or split as in the base", {"block": "VL", "drop": "P"}, tensors.fused_alike, FOLD, "shapes"),
    Rule("N8", "named for the text model alone", {"drop": "VPT"}, tensors.text_names, OTHER_BASE, "base"),
    Rule("N8", "named for the whole multimodal model", {"drop": "PT"}, tensors.multimodal_names, OTHER_BASE, "base"),
    Rule("N9", "with k or v comes q, with q comes v", {"block": "G"}, tensors.query_and_value, needs="weights"),
    Rule("N9", "with k comes q, with up comes gate", {"crash": "G"}, tensors.stacks_begin, needs="weights"),
    Rule("N10", "every leaf in every layer", {"drop": "X", "warn": "PT"}, tensors.full_grid, needs="weights"),
    Rule("N11", "every module is targeted", {"drop": "PT"}, tensors.all_targeted, needs="weights"),
    # Shapes and values
    Rule(
        "S1",
        "ranks as the config says",
        {"block": "PTM", "crash": "G", "wrong": "VL"},
        tensors.ranks_agree,
        AGAIN,
        "weights",
    ),
    Rule(
        "S2",
        "shapes no smaller than the base's",
        {"wrong": "V", "crash": "G", "block": "PTLMO"},
        tensors.not_smaller,
        OTHER_BASE,
        "shapes",
    ),
    Rule(
        "S2",
        "shapes no larger than the base's",
        {"block": "VPTLMO", "crash": "G"},
        tensors.not_larger,
        OTHER_BASE,
        "shapes",
    ),
    Rule("S3", "one rank in all modules", {"block": "MX", "crash": "G"}, tensors.one_rank, needs="weights"),
    Rule("S4", "a rank that the engine serves", {"block": "VG"}, tensors.rank_limit, truncation, "weights"),
    Rule("S4", "at most vLLM's default rank, 16", {"warn": "V"}, tensors.default_limit, "start it so", "weights"),
    Rule("S5", "rank 8 or a multiple of 16", {"wrong": "X"}, tensors.padded_rank, needs="weights"),
    Rule("S5", "a rank that vLLM has as a limit", {"warn": "V"}, tensors.limit_rank, "it costs memory only", "weights"),
    Rule("S6", "factors are real numbers", {"block": ALL}, tensors.real_numbers, AGAIN, "weights"),
    Rule("S6", "one type of number", {"warn": "L"}, tensors.one_type, needs="weights"),
    Rule("S7", "finite, and within float16", {"wrong": ALL}, values.finite, "use another adapter", "weights"),
    Rule("S8", "not zero as a whole", {"warn": ALL}, values.not_zero, "use another adapter", "weights"),
    Rule("S9", "a scale that rounds nothing", {"warn": "V"}, values.exact_scale, needs="weights"),
    Rule("S10", "factors that survive half precision", {"warn": "VGTX"}, values.survives_half, needs="weights"),
    # Embeddings and heads
    Rule("E2", "the base's class takes it", {"block": "V"}, experts.vllm_embeddings, FOLD, "base"),
    Rule("E2", "the base's class takes it", {"drop": "G"}, experts.sglang_embeddings, FOLD, "base"),
    Rule("E3", "as wide as the vocabulary", {"block": "VLO", "crash": "G"}, experts.vocabulary, OTHER_BASE, "base"),
    Rule("E4", "embedding not tied", {"crash": "LO", "wrong": "M"}, experts.tied_embedding, FOLD, "base"),
    Rule("E5", "head not tied", {"block": "LMO"}, experts.tied_head, FOLD, "base"),
    Rule("E6", "no head of Gemma", {"drop": "LO", "block": "V"}, experts.gemma_head, FOLD, "base"),
    Rule("E7", "vocabulary of at most 258,048", {"block": "V"}, experts.large_vocabulary, FOLD, "base"),
    Rule("E8", "embedding and head are listed", {"drop": "G"}, experts.listed, needs="weights"),
    # Experts
    Rule("MOE1", "all experts, all three projections", {"crash": "V", "block": "L"}, experts.complete, FOLD, "weights"),
    Rule("MOE1", "gate and up together", {"block": "PT"}, experts.gate_and_up, FOLD, "weights"),
    Rule("MOE2", "experts one by one", {"block": "VL", "warn": "G"}, experts.one_by_one, FOLD, "weights"),
    Rule("A1", "a layout that prefvec export knows", {"warn": "LO"}, experts.known_layout, FOLD, "base"),
    Rule("RUN3", "a form that Ollama reads", {"warn": "O"}, config.not_for_ollama, "prefvec export {ref} --to gguf"),
]
