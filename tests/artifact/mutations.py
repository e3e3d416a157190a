"""Sound adapter folders, and what can be wrong with one; all from a seed."""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

CONFIG, WEIGHTS, PROVENANCE = "adapter_config.json", "adapter_model.safetensors", "prefvec.json"
_P = "base_model.model."
_VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 3, 8, 2**31, 2**63, 10**30, -(2**70), 0.5, 1e308, -1e-320, float("nan"), float("inf"),
    "", "8", "q_proj", "../../../etc/passwd", "LORA", "\u202e\n\x00", "x" * 10_000, [], [1], ["q_proj"], [None] * 50,
    {}, {"q_proj": 4}, {"q_proj": "4"}, {"": 1}, {"a": {"b": [1, {"c": None}]}}, [[[[[]]]]],
]  # fmt: skip
_KEYS = [
    "peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "bias", "lora_bias", "rank_pattern", "alpha_pattern",
    "target_modules", "target_parameters", "modules_to_save", "init_lora_weights", "fan_in_fan_out", "revision",
    "base_model_name_or_path", "layers_to_transform", "layer_replication", "trainable_token_indices", "task_type",
    "exclude_modules", "megatron_config", "auto_mapping", "kasa_config", "use_qalora", "arrow_config", "unknown",
]  # fmt: skip
_HANGING = [
    "(a+)+$", "(.*)*x", "(.|.)" * 40 + "!", "([a-z_.0-9]|.)" * 30 + "%", ".*.*.*.*.*.*.*.*.*.*.*.*.*.*=", "(?=(.*)*)x",
    r"(\w+\.?)*\d$", "a?" * 60 + "a" * 60, "((((.*).*).*).*)!", r".*(\w|\.)(\w|\.)(\w|\.)(\w|\.)(\w|\.)*#",
    "a{60000}{60000}", "(x{999}){999}", r"([^.]*\.?){1,30}\d%", r"^(model|\w*)*(layers|\w*)*\.(q|\w*)*@",
]  # fmt: skip


@dataclass
class Case:
    """An adapter folder in the making.

    Args:
        files: name -> its bytes; a string is the target of a link, None a folder.
        kinds: names of its mutations.
    """

    files: dict[str, bytes | str | None]
    kinds: tuple[str, ...] = ()
    check_hash: bool = False

    def write(self, folder: Path) -> Path:
        """The folder on the disk, in place of what was there."""
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for name, content in self.files.items():
            path = folder / name
            if isinstance(content, bytes):
                path.write_bytes(content)
            elif content is None:
                path.mkdir()
            elif content == "fifo":
                os.mkfifo(path)
            else:
                path.symlink_to(content)
        return folder

    def json(self, name: str) -> dict[str, Any]:
        found = json.loads(self.bytes(name) or b"{}")
        return found if isinstance(found, dict) else {}

    def bytes(self, name: str) -> bytes:
        content = self.files.get(name)
        return content if isinstance(content, bytes) else b""

    def put(self, name: str, content: Any) -> None:
        self.files[name] = json.dumps(content).encode("utf-8", "surrogatepass")


def templates(place: Path) -> list[dict[str, bytes]]:
    """Sound folders: canonical, plain, an embedding with the base's own copy, a head, GPT-2, fused experts."""
    from lora_prefvec.artifact import Provenance, write_adapter
    from tests.artifact.factors import MODULES, small_vector

    if not (place / "canonical").is_dir():
        write_adapter(place / "canonical", small_vector(3, 0), Provenance(kind="preference_vector", preference="kind"))
        (place / "base").mkdir()
        (place / "base" / "config.json").write_text("{}")
        (place / "base" / "model.safetensors").write_bytes(save({"model.embed_tokens.weight": _random((9, 5))}))
    canonical = {path.name: path.read_bytes() for path in (place / "canonical").iterdir()}
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "bias": "none"}
    linear = {name: (shape, 4) for name, shape in MODULES.items()}
    patterned = {name: (shape, 2 if name.endswith("q_proj") else 4) for name, shape in MODULES.items()}
    patterns = {
        "rank_pattern": {"q_proj": 2},
        "alpha_pattern": {r".*\.1\.mlp\.(down|up)_proj": 3.5, "layers.0.self_attn.v_proj": 1},
        "use_rslora": True,
    }
    embedding = {
        **_factors({"lm_head": ((9, 5), 4)}, torch.float32),
        f"{_P}model.embed_tokens.lora_embedding_A": _random((4, 9)),
        f"{_P}model.embed_tokens.lora_embedding_B": _random((5, 4)),
        f"{_P}model.embed_tokens.base_layer.weight": _random((9, 5)),
    }
    gpt2 = {f"transformer.h.{n}.{leaf}": ((6, 5), 4) for n in range(2) for leaf in ("attn.c_attn", "mlp.c_proj")}
    experts = {
        f"{_P}model.layers.0.mlp.experts.{level}lora_{part}.weight": _random((12, 5) if part == "A" else (6, 12))
        for level in ("", "base_layer.")
        for part in "AB"
    }
    targets = {"target_parameters": ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"], "target_modules": []}
    return [
        canonical,
        _folder(config, _factors(linear, torch.bfloat16)),
        _folder({**config, **patterns}, _factors(patterned, torch.float16)),
        _folder({**config, "base_model_name_or_path": str(place / "base")}, embedding),
        _folder({**config, "fan_in_fan_out": True}, _factors(gpt2, torch.float32)),
        _folder({**config, **targets}, experts),
    ]


def make_case(number: int, seed: int, sound: list[dict[str, bytes]]) -> Case:
    """The case of a number: a sound folder with one to three mutations."""
    draw = random.Random(f"{seed}/{number}")
    case = Case(dict(draw.choice(sound)), check_hash=draw.random() < 0.1)
    kinds = [draw.choice(list(MUTATIONS)) for _ in range(draw.choice([1, 1, 1, 1, 2, 3]))]
    if draw.random() < 0.97:  # large files take long to make
        kinds = [kind if kind not in _LARGE else "bits_flipped" for kind in kinds]
    for kind in kinds:
        MUTATIONS[kind](case, draw)
    case.kinds = tuple(kinds)
    return case


def _random(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def _factors(shapes: dict[str, tuple[tuple[int, int], int]], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    tensors = {}
    for name, ((rows, columns), rank) in shapes.items():
        tensors[f"{_P}{name}.lora_A.weight"] = _random((rank, columns)).to(dtype)
        tensors[f"{_P}{name}.lora_B.weight"] = _random((rows, rank)).to(dtype)
    return tensors


def _folder(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> dict[str, bytes]:
    return {CONFIG: json.dumps(config).encode(), WEIGHTS: save(tensors, {"format": "pt"})}


def _split(case: Case) -> tuple[dict[str, Any], bytes]:
    """The header and the data of the weights, as far as they can be told."""
    content = case.bytes(WEIGHTS)
    try:
        length = struct.unpack("<Q", content[:8])[0]
        header = json.loads(content[8 : 8 + length])
        return (header if isinstance(header, dict) else {}), content[8 + length :]
    except (ValueError, struct.error, RecursionError):
        return {}, b""


def _join(case: Case, header: Any, data: bytes) -> None:
    text = json.dumps(header).encode()
    case.files[WEIGHTS] = struct.pack("<Q", len(text)) + text + data


def _lay_out(case: Case, tensors: dict[str, tuple[str, list[int], bytes]]) -> None:
    """A sound file of tensors, whatever is in them."""
    header: dict[str, Any] = {}
    data = b""
    for name, (dtype, shape, content) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(content)]}
        data += content
    _join(case, header, data)


def _tensors(case: Case) -> dict[str, tuple[str, list[int], bytes]]:
    header, data = _split(case)
    found = {}
    for name, entry in header.items():
        try:
            begin, end = entry["data_offsets"]
            found[name] = (entry["dtype"], entry["shape"], data[begin:end])
        except (KeyError, TypeError, ValueError):
            continue
    return found


def truncated(case: Case, draw: random.Random) -> None:
    name = draw.choice(list(case.files))
    content = case.bytes(name)
    case.files[name] = content[: draw.randrange(len(content) + 1)]


def bits_flipped(case: Case, draw: random.Random) -> None:
    name = draw.choice([WEIGHTS, WEIGHTS, WEIGHTS, CONFIG, draw.choice(list(case.files))])
    content = bytearray(case.bytes(name))
    for _ in range(draw.choice([1, 1, 2, 8, 100])):
        if content:
            content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    case.files[name] = bytes(content)


def resized(case: Case, draw: random.Random) -> None:
    content = bytearray(case.bytes(WEIGHTS))
    place = draw.choice([0, 8, len(content), draw.randrange(len(content) + 1)])
    if draw.random() < 0.5:
        content[place:place] = draw.randbytes(draw.choice([1, 4, 100, 10_000]))
    else:
        del content[place : place + draw.choice([1, 4, 100])]
    case.files[WEIGHTS] = bytes(content)


def header_lies(case: Case, draw: random.Random) -> None:
    header, data = _split(case)
    entries = [entry for entry in header.values() if isinstance(entry, dict) and "shape" in entry]
    entry = draw.choice(entries) if entries else {}
    what = draw.choice(["dtype", "shape", "data_offsets", "order", "name", "metadata", "length"])
    if what == "dtype":
        entry["dtype"] = draw.choice(["F32", "F16", "BF16", "F64", "I8", "F128", "bf16", "", None, 7, ["F32"], {}])
    elif what == "shape":
        shape = list(entry.get("shape") or [1])
        shape[draw.randrange(len(shape))] = draw.choice([0, 1, -1, 2, 5, 2**20, 2.0, "4", None, True])
        entry["shape"] = draw.choice([shape, shape[::-1], [*shape, 1], shape[:1], [], None, "4x5", {}])
    elif what == "data_offsets":
        entry["data_offsets"] = draw.choice([[0, 0], [0, 16], [16, 0], [-4, 4], [0], [0, 10**30], None, ["0", "16"]])
    elif what == "order":
        items = list(header.items())
        draw.shuffle(items)
        header = dict(items)
    elif what == "name" and entries:
        name = draw.choice(list(header))
        header[draw.choice(["", "x", "a\nb", "../" * 9, name.upper(), name + " ", "." * 400, name * 9])] = header.pop(
            name
        )
    elif what == "metadata":
        header["__metadata__"] = draw.choice(_VALUES)
    _join(case, header, data)
    if what == "length":
        length = draw.choice([0, 1, 2, 2**31, 2**63, 2**64 - 1, len(data)])
        case.files[WEIGHTS] = struct.pack("<Q", length) + case.bytes(WEIGHTS)[8:]


def huge_shapes(case: Case, draw: random.Random) -> None:
    header, data = _split(case)
    for entry in draw.sample(list(header.values()), min(2, len(header))):
        if isinstance(entry, dict):
            entry["shape"] = draw.choice([[2**40, 4], [4, 2**62], [2**31, 2**31], [10**18] * 16, [2**33], [4, 10**9]])
            count = 4 * entry["shape"][0] * entry["shape"][-1]
            entry["data_offsets"] = draw.choice([entry.get("data_offsets"), [0, count], [0, len(data)]])
    _join(case, header, data)


def wrong_types(case: Case, draw: random.Random) -> None:
    tensors = _tensors(case)
    for name in draw.sample(list(tensors), min(draw.choice([1, 3]), len(tensors))):
        shape = tensors[name][1]
        dtype, size = draw.choice(
            [
                ("I8", 1),
                ("BOOL", 1),
                ("F64", 8),
                ("I64", 8),
                ("F8_E4M3", 1),
                ("F16", 2),
                ("BF16", 2),
                ("F32", 4),
                ("C64", 8),
            ]
        )
        count = 1
        for length in shape if isinstance(shape, list) else []:
            count *= length if type(length) is int and 0 <= length < 1000 else 1
        tensors[name] = (dtype, shape, draw.randbytes(count * size))
    _lay_out(case, tensors)


def not_finite(case: Case, draw: random.Random) -> None:
    tensors = _tensors(case)
    patterns = {
        "F32": [0x7FC00000, 0x7F800000, 0xFF800000, 0x7F7FFFFF],
        "BF16": [0x7FC0, 0x7F80, 0xFF80, 0x7F7F],
        "F16": [0x7E00, 0x7C00, 0xFC00, 0x7BFF],
    }
    name = draw.choice(list(tensors)) if tensors else ""
    dtype, shape, content = tensors.get(name, ("", [], b""))
    if isinstance(dtype, str) and dtype in patterns:
        size = 4 if dtype == "F32" else 2
        value = draw.choice(patterns[dtype]).to_bytes(size, "little")
        count = len(content) // size
        at = size * draw.randrange(max(1, count))
        changed = value * count if draw.random() < 0.2 else content[:at] + value + content[at + size :]
        tensors[name] = (dtype, shape, changed[: len(content)])
    _lay_out(case, tensors)


def missing_keys(case: Case, draw: random.Random) -> None:
    tensors, config = _tensors(case), case.json(CONFIG) if _valid(case, CONFIG) else {}
    if draw.random() < 0.6:
        for name in draw.sample(list(tensors), min(draw.choice([1, 2, 99]), len(tensors))):
            del tensors[name]
        _lay_out(case, tensors)
    else:
        for key in draw.sample(list(config), min(draw.choice([1, 2, 9]), len(config))):
            del config[key]
        case.put(CONFIG, config)


def extra_keys(case: Case, draw: random.Random) -> None:
    tensors = _tensors(case)
    names = [
        "model.norm.weight", "x.lora_A.weight", "lm_head.weight", "model.embed_tokens.weight",
        "x.lora_magnitude_vector",
        "model.layers.0.self_attn.q_proj.lora_B.bias", "model.layers.0.self_attn.q_proj.lora_A.default.weight", "",
        "model.layers.0.mlp.experts.lora_A.weight", "model.layers.0.mlp.experts.base_layer.base_layer.lora_A.weight",
        "model.layers.0.self_attn.q_proj.lora_embedding_A", "wte.lora_embedding_B", "embed_tokens.lora_A.weight",
        "../../x.lora_A.weight", "prompt_embeddings", "x.lokr_w1", "x.vera_lambda_b", "x.lora_A.a.b.weight",
    ]  # fmt: skip
    for name in draw.sample(names, draw.choice([1, 1, 2])):
        shape = draw.choice([[4, 5], [5], [9, 5], [6, 4], []])
        count = 4 * (shape[0] * shape[-1] if len(shape) == 2 else sum(shape) or 1)
        tensors[draw.choice(["", _P]) + name] = ("F32", list(shape), bytes(count))
    _lay_out(case, tensors)


def config_types(case: Case, draw: random.Random) -> None:
    name = draw.choice([CONFIG, CONFIG, PROVENANCE])
    content = case.json(name) if _valid(case, name) else {}
    keys = list(content) if name == PROVENANCE and content else _KEYS
    for _ in range(draw.choice([1, 1, 2, 5])):
        content[draw.choice(keys)] = draw.choice(_VALUES)
    case.put(name, draw.choice([content] * 9 + [[content], 7, None, "text"]))


def absurd_ranks(case: Case, draw: random.Random) -> None:
    config = case.json(CONFIG) if _valid(case, CONFIG) else {}
    number = draw.choice([0, -4, 1, 2, 3, 5, 2**20, 2**31, 10**40, 4.0, 1e300, 1e-300])
    key = draw.choice(["r", "lora_alpha", "rank_pattern", "alpha_pattern"])
    config[key] = (
        number if not key.endswith("pattern") else {draw.choice(["q_proj", ".*", "v_proj", "lm_head"]): number}
    )
    case.put(CONFIG, config)


def broken_json(case: Case, draw: random.Random) -> None:
    name = draw.choice([CONFIG, PROVENANCE])
    case.files[name] = draw.choice(
        [b"", b"{", b"[" * 100_000, b'{"a":' * 50_000, b"\xff\xfe{}", b"null", b"\x00" * 99, b"9" * 5000, b'{"r": NaN}',
         b'{"peft_type": "LORA", "r": 1e999, "lora_alpha": 1}', b'{"r":4,"r":5}', b'"' + b"\\ud800" * 99 + b'"',
         b'{"r": ' + b"9" * 5000 + b"}", case.bytes(name)[::-1], case.bytes(name) * 2]
    )  # fmt: skip


def climbing_paths(case: Case, draw: random.Random) -> None:
    config = case.json(CONFIG) if _valid(case, CONFIG) else {}
    path = draw.choice(["../../../../etc", "/proc/self", "/dev", "~root", "\x00", "a" * 5000, "file:///etc", "..", "."])
    config["base_model_name_or_path"] = path
    config["revision"] = draw.choice([None, "../../..", "main\n", "x" * 999])
    case.put(CONFIG, config)


def links(case: Case, draw: random.Random) -> None:
    name = draw.choice(list(case.files))
    case.files[name] = draw.choice(
        [name, "../case", ".", "..", "none", "/dev/zero", "/proc/self/maps", "/dev/null", "fifo"]
    )
    if draw.random() < 0.3:
        case.files["loop"], case.files["pool"] = "pool", "loop"
        case.files[name] = "loop"
    elif draw.random() < 0.2:
        case.files[name] = None


def hanging_patterns(case: Case, draw: random.Random) -> None:
    config = case.json(CONFIG) if _valid(case, CONFIG) else {}
    patterns = draw.sample(_HANGING, draw.choice([1, 2, 5]))
    for key in draw.sample(
        ["target_modules", "rank_pattern", "alpha_pattern", "exclude_modules", "target_parameters"], 2
    ):
        config[key] = dict.fromkeys(patterns, 4) if key.endswith("pattern") else draw.choice([patterns[0], patterns])
    case.put(CONFIG, config)


def large_header(case: Case, draw: random.Random) -> None:
    count = draw.choice([1000, 100_000, 400_000])
    name = draw.choice(["x{}", _P + "l.{}.q_proj.lora_A.weight", _P + "l.{}.q_proj.lora_{}.weight", "." * 99 + "{}"])
    entry = {"dtype": "F32", "shape": [0, 0], "data_offsets": [0, 0]}
    _join(
        case,
        {name.format(n // 2, "AB"[n % 2]) if name.count("{") > 1 else name.format(n): entry for n in range(count)},
        b"",
    )


def large_json(case: Case, draw: random.Random) -> None:
    config = case.json(CONFIG) if _valid(case, CONFIG) else {}
    name, key = draw.choice([(CONFIG, "target_modules"), (CONFIG, "rank_pattern"), (CONFIG, "target_parameters"),
                             (PROVENANCE, "parents"), (PROVENANCE, "metrics"), (PROVENANCE, "x")])  # fmt: skip
    content = config if name == CONFIG else {"kind": "mix"}
    count = draw.choice([1000, 30_000, 1_000_000])
    content[key] = draw.choice(
        [
            [0] * count,
            [{}] * count,
            {f"a{n}": 0 for n in range(count)},
            {f"a{n}.*": 4 for n in range(count)},
            ["a"] * count,
        ]
    )
    case.put(name, content)


def _valid(case: Case, name: str) -> bool:
    try:
        return isinstance(json.loads(case.bytes(name) or b"{}"), dict)
    except (ValueError, RecursionError):
        return False


MUTATIONS: dict[str, Callable[[Case, random.Random], None]] = {
    made.__name__: made
    for made in (
        truncated, bits_flipped, resized, header_lies, huge_shapes, wrong_types, not_finite, missing_keys, extra_keys,
        config_types, absurd_ranks, broken_json, climbing_paths, links, hanging_patterns, large_header, large_json,
    )
}  # fmt: skip
_LARGE = ("large_header", "large_json")
