"""Reading: what is understood, and what is refused in one line."""

from __future__ import annotations

import contextlib
import json
import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lora_prefvec.artifact import Provenance, read_adapter, write_adapter
from lora_prefvec.artifact.folder import WEIGHTS
from lora_prefvec.errors import InputError
from lora_prefvec.vector import BaseIdentity, PreferenceVector
from tests.artifact.factors import MODULES, Q0, assert_same, small_vector

Writer = Callable[..., Path]


def expected(folder: Path, scale: Callable[[str], float]) -> dict[str, torch.Tensor]:
    """Module -> dense delta, computed from the file."""
    tensors = load_file(folder / WEIGHTS)
    return {
        module: tensors[f"base_model.model.{module}.lora_B.weight"].float()
        @ tensors[f"base_model.model.{module}.lora_A.weight"].float()
        * scale(module)
        for module in MODULES
    }


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({}, lambda _: 2.0),
        ({"use_rslora": True}, lambda _: 8 / math.sqrt(4)),
        ({"lora_alpha": 3.5}, lambda _: 3.5 / 4),
        ({"lora_alpha": -8}, lambda _: -2.0),
        ({"alpha_pattern": {"q_proj": 4}}, lambda m: 1.0 if m.endswith("q_proj") else 2.0),
        ({"alpha_pattern": {"layers.1.mlp.down_proj": 16}}, lambda m: 4.0 if "1.mlp" in m else 2.0),
        ({"alpha_pattern": {r"layers\.\d\.self_attn\.(q|v)_proj": 2}}, lambda m: 0.5 if "attn" in m else 2.0),
        ({"alpha_pattern": {"proj": 1}}, lambda _: 2.0),
        ({"alpha_pattern": {"q_proj": 4, "self_attn.q_proj": 16}}, lambda m: 1.0 if m.endswith("q_proj") else 2.0),
        ({"rank_pattern": None, "alpha_pattern": None, "modules_to_save": None}, lambda _: 2.0),
        ({"r": 9, "rank_pattern": {".*_proj": 4}, "use_rslora": True}, lambda _: 4.0),
        ({"init_lora_weights": "gaussian", "lora_dropout": 0.1, "target_modules": ".*"}, lambda _: 2.0),
    ],
)
def test_the_scale_is_folded_in(plain_adapter: Writer, config: dict[str, Any], scale: Callable[[str], float]) -> None:
    folder = plain_adapter(config)
    found = read_adapter(folder).vector
    assert found.deltas.keys() == MODULES.keys()
    for module, dense in expected(folder, scale).items():
        torch.testing.assert_close(found.deltas[module].dense(), dense)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_widened(plain_adapter: Writer, dtype: torch.dtype) -> None:
    folder = plain_adapter()
    save_file({name: tensor.to(dtype) for name, tensor in load_file(folder / WEIGHTS).items()}, folder / WEIGHTS)
    found = read_adapter(folder).vector
    for module, dense in expected(folder, lambda _: 2.0).items():
        torch.testing.assert_close(found.deltas[module].dense(), dense)


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: name.replace(".weight", ".default.weight"),
        lambda name: name.removeprefix("base_model.model."),
    ],
)
def test_names_of_other_writers(plain_adapter: Writer, rename: Callable[[str], str]) -> None:
    folder = plain_adapter()
    before = read_adapter(folder).vector
    save_file({rename(name): tensor for name, tensor in load_file(folder / WEIGHTS).items()}, folder / WEIGHTS)
    assert_same(read_adapter(folder).vector, before)


def test_components_that_are_zero_are_dropped(plain_adapter: Writer) -> None:
    B = torch.randn(6, 4)
    B[:, 1] = 0
    folder = plain_adapter(tensors={f"{Q0}.lora_B.weight": B})
    found = read_adapter(folder).vector
    assert found.deltas["model.layers.0.self_attn.q_proj"].rank == 3
    torch.testing.assert_close(
        found.deltas["model.layers.0.self_attn.q_proj"].dense(),
        expected(folder, lambda _: 2.0)["model.layers.0.self_attn.q_proj"],
    )


def test_an_untrained_module_stays_as_a_zero(plain_adapter: Writer) -> None:
    found = read_adapter(plain_adapter(tensors={f"{Q0}.lora_B.weight": torch.zeros(6, 4)})).vector
    delta = found.deltas["model.layers.0.self_attn.q_proj"]
    assert (delta.rank, delta.norm()) == (1, 0.0)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("owner/base", "owner/base"),
        ("/home/someone/models/base", "base"),
        ("./base", "base"),
        ("~nobody-at-all/base", "base"),
        ("a" * 5000, "a" * 5000),
        ("\0", "\0"),
    ],
)
def test_a_plain_adapter_tells_its_base(plain_adapter: Writer, name: str, told: str) -> None:
    adapter = read_adapter(plain_adapter({"base_model_name_or_path": name, "revision": "abc"}))
    assert adapter.vector.identity == BaseIdentity(told, "abc")
    assert adapter.provenance is None


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"use_dora": True}, "DoRA"),
    ({"bias": "all"}, "bias"),
    ({"bias": "lora_only"}, "bias"),
    ({"bias": ["none"]}, "bias"),
    ({"lora_bias": True}, "bias"),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save: lm_head"),
    *(
        ({"init_lora_weights": name}, "changes the base.*path_initial_model_for_weight_conversion")
        for name in ("pissa", "pissa_niter_16", "olora", "OLoRA", "corda", "loftq", "lora_ga")
    ),
    *(
        ({"peft_type": name}, f"peft_type {name}")
        for name in ("PROMPT_TUNING", "PREFIX_TUNING", "IA3", "VERA", "LOKR", "LOHA", "OFT", "ADALORA")
    ),
    ({"peft_type": None}, "peft_type"),
    ({"peft_type": ["LORA"]}, "peft_type"),
    ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
    ({"layer_replication": [[0, 2]]}, "layer_replication"),
    ({"trainable_token_indices": [3]}, "trainable_token_indices"),
    ({"kasa_config": {"beta": 1}}, "kasa_config"),
    ({"r": "4"}, "r:"),
    ({"r": 0}, "r:"),
    ({"r": True}, "r:"),
    ({"r": 4.5}, "r:"),
    ({"r": 10**12}, "r:"),
    ({"r": None}, "lacks 'r'"),
    ({"lora_alpha": None}, "lacks 'lora_alpha'"),
    ({"lora_alpha": "8"}, "lora_alpha"),
    ({"lora_alpha": float("nan")}, "lora_alpha"),
    ({"lora_alpha": float("inf")}, "lora_alpha"),
    ({"lora_alpha": 1e308}, "by 2.5e.307, which float32 cannot hold"),
    ({"lora_alpha": 1e-300}, "by 2.5e-301, which float32 cannot hold"),
    ({"use_rslora": "yes"}, "use_rslora"),
    ({"rank_pattern": ["q_proj"]}, "rank_pattern"),
    ({"rank_pattern": {"q_proj": -1}}, "rank_pattern.q_proj"),
    ({"alpha_pattern": {"(": 1}}, "no regular expression"),
    ({"alpha_pattern": {"(a+)+b": 1}}, "too involved"),
    ({"alpha_pattern": {"a{999}{999}{999}": 1}}, "too involved"),
    ({"alpha_pattern": {"([a-z_.]|.)" * 30 + "[0-9]": 1}}, "take too long"),
    ({"base_model_name_or_path": 7}, "base_model_name_or_path"),
    ({"r": 8}, r"A \[4, 7\] and B \[5, 4\].*rank 8"),
    ({"rank_pattern": {"q_proj": 2}}, "rank 2"),
]


@pytest.mark.parametrize(("config", "said"), REFUSED)
def test_a_config_that_is_refused(plain_adapter: Writer, config: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said) as raised:
        read_adapter(plain_adapter(config))
    assert "\n" not in str(raised.value)
    assert raised.value.fix


NAN, INF = torch.full((6, 4), float("nan")), torch.full((6, 4), float("-inf"))


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({f"{Q0}.lora_B.weight": NAN}, "NaN or infinity in factor B of model.layers.0.self_attn.q_proj"),
        ({f"{Q0}.lora_B.weight": INF}, "NaN or infinity in factor B of model.layers.0.self_attn.q_proj"),
        ({f"{Q0}.lora_B.weight": torch.full((6, 4), 3e38)}, "overflows when model.layers.0.self_attn.q_proj is scaled"),
        (
            {f"{Q0}.lora_B.weight": torch.zeros(6, 4), f"{Q0}.lora_A.weight": torch.full((4, 5), float("nan"))},
            "in factor A",
        ),
        ({f"{Q0}.lora_B.weight": torch.ones(6, 4, dtype=torch.int8)}, "as I8"),
        ({f"{Q0}.lora_B.weight": torch.ones(6, 4, dtype=torch.float64)}, "as F64"),
        ({f"{Q0}.lora_B.weight": None}, "lacks factor B of model.layers.0.self_attn.q_proj"),
        ({f"{Q0}.lora_A.weight": None}, "lacks factor A of model.layers.0.self_attn.q_proj"),
        ({f"{Q0}.lora_B.weight": torch.ones(4)}, "rank 4"),
        ({f"{Q0}.lora_B.weight": torch.ones(4, 6)}, "rank 4"),
        ({f"{Q0}.lora_magnitude_vector": torch.ones(6)}, "DoRA"),
        ({f"{Q0}.lora_B.bias": torch.ones(6)}, "bias"),
        (
            {"base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(4, 9)},
            "lacks factor B of model.embed_to",
        ),
        ({"base_model.model.model.embed_tokens.lora_A.weight": torch.ones(4, 9)}, "lacks factor B"),
        (
            {"base_model.model.lm_head.weight": torch.ones(4, 9)},
            "holds all of lm_head, and without its base owner/base",
        ),
        ({"base_model.model.model.norm.weight": torch.ones(9)}, "no factor of a LoRA"),
        ({"two\nlines": torch.ones(9)}, "no factor of a LoRA"),
        ({f"{Q0}.base_layer.lora_{part}.weight": torch.ones(4, 4) for part in "AB"}, "a part of the base"),
        ({f"{Q0}.experts.lora_{part}.weight": torch.ones(4, 4) for part in "AB"}, "target_parameters names none"),
        (
            {f"base_model.model.model.embed_tokens.lora_{part}.weight": torch.ones(4, 4) for part in "AB"},
            "against its name",
        ),
        ({f"{Q0}.lora_embedding_{part}": torch.ones(4, 4) for part in "AB"}, "two factors A"),
        ({"x" * 600 + ".lora_A.weight": torch.ones(4, 4)}, "a name of 614 characters"),
        ({"model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(4, 5)}, "two factors A"),
        ({f"{Q0}.lora_A.other.weight": torch.ones(4, 5)}, "several adapters: one without a name, other"),
        ({"base_model.model.model.layers.0.x.lora_A.other.weight": torch.ones(4, 5)}, "several adapters"),
    ],
)
def test_tensors_that_are_refused(plain_adapter: Writer, tensors: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said) as raised:
        read_adapter(plain_adapter(tensors=tensors))
    assert "\n" not in str(raised.value)


def test_folders_that_are_refused(plain_adapter: Writer, tmp_path: Path) -> None:
    folder = plain_adapter()
    with pytest.raises(InputError, match="no folder"):
        read_adapter(tmp_path / "none")
    with pytest.raises(InputError, match=r"no adapter_config.json. Did you mean .*/plain?"):
        read_adapter(tmp_path)
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")
    with pytest.raises(InputError, match="pickle"):
        read_adapter(folder)
    (folder / "adapter_model.bin").unlink()
    with pytest.raises(InputError, match=rf"no {WEIGHTS}"):
        read_adapter(folder)
    (folder / WEIGHTS).mkdir()
    with pytest.raises(InputError, match=rf"no {WEIGHTS}"):
        read_adapter(folder)
    (folder / WEIGHTS).rmdir()
    save_file({}, folder / WEIGHTS)
    with pytest.raises(InputError, match="no tensors"):
        read_adapter(folder)
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).symlink_to(folder / WEIGHTS)
    with pytest.raises(InputError, match=rf"no {WEIGHTS}"):
        read_adapter(folder)


def lying(header: Any, data: bytes = b"") -> bytes:
    text = json.dumps(header).encode() if not isinstance(header, bytes) else header
    return struct.pack("<Q", len(text)) + text + data


def spec(dtype: str = "F32", shape: Any = (2, 2), offsets: Any = (0, 16)) -> dict[str, Any]:
    return {f"{Q0}.lora_A.weight": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x01\x02",
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 10**9) + b"{}",
        lying(b"{"),
        lying(b"[]"),
        lying(b"[" * 50_000),
        lying(b"\xff\xfe\xff\xfe"),
        lying({"__metadata__": ["x"]}),
        lying({"__metadata__": ""}),
        lying({"__metadata__": {"format": 4}}),
        lying({f"{Q0}.lora_A.weight": 7}),
        lying(spec(dtype="F128"), bytes(16)),
        lying(spec(dtype=["F32"]), bytes(16)),
        lying(spec(shape=(2, 3)), bytes(16)),
        lying(spec(shape=(2.0, 2)), bytes(16)),
        lying(spec(shape=(-2, -2)), bytes(16)),
        lying(spec(shape=(True, 4)), bytes(16)),
        lying(spec(shape=None), bytes(16)),
        lying(spec(shape=(2**62, 2**62), offsets=(0, 16)), bytes(16)),
        lying(spec(shape=(2**40, 4), offsets=(0, 2**44)), bytes(16)),
        lying(spec(offsets=(16, 0)), bytes(16)),
        lying(spec(offsets=(0,)), bytes(16)),
        lying(spec(offsets=(0, 10**400)), bytes(16)),
        lying(spec(offsets=(4, 20)), bytes(20)),
        lying(spec(), bytes(15)),
        lying(spec(), bytes(17)),
    ],
)
def test_a_damaged_file_is_refused(plain_adapter: Writer, content: bytes) -> None:
    folder = plain_adapter()
    (folder / WEIGHTS).write_bytes(content)
    with pytest.raises(InputError) as raised:
        read_adapter(folder)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 1000


def test_absurd_numbers_of_things_are_refused(plain_adapter: Writer) -> None:
    folder = plain_adapter()
    empty = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    sound = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(lying({f"x.{number}": empty for number in range(130_000)}))
    with pytest.raises(InputError, match="holds more than 120000 tensors"):
        read_adapter(folder)
    (folder / WEIGHTS).write_bytes(sound)
    for name, content in (
        ("prefvec.json", {"kind": "mix", "parents": [0] * 60_000}),
        ("adapter_config.json", [0] * 60_000),
    ):
        (folder / name).write_text(json.dumps(content))
        with pytest.raises(InputError, match=f"{name} holds more than 50000 values"):
            read_adapter(folder)


def test_many_patterns_are_looked_up(plain_adapter: Writer) -> None:
    modules = {f"model.layers.{number}.self_attn.q_proj": 3 for number in range(2, 20_000)}
    read_adapter(plain_adapter({"rank_pattern": modules, "alpha_pattern": {**modules, "q_proj": 4}}))


def test_two_tensors_in_one_place_are_refused(plain_adapter: Writer) -> None:
    folder = plain_adapter()
    both = {**spec(), f"{Q0}.lora_B.weight": next(iter(spec().values()))}
    (folder / WEIGHTS).write_bytes(lying(both, bytes(32)))
    with pytest.raises(InputError, match="lies about the place"):
        read_adapter(folder)


@given(data=st.data())
def test_a_mutated_file_is_read_rightly_or_refused(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("fuzz") / "a"
    write_adapter(folder, small_vector(2, 0), Provenance(kind="preference_vector"))
    file = folder / data.draw(st.sampled_from([WEIGHTS, "adapter_config.json", "prefvec.json"]))
    content = bytearray(file.read_bytes())
    if data.draw(st.booleans()):
        position = data.draw(st.integers(0, min(len(content), 4000) - 1))
        content[position] ^= data.draw(st.integers(1, 255))
    else:
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    file.write_bytes(content)
    with contextlib.suppress(InputError):  # anything else fails
        for delta in read_adapter(folder, check_hash=False).vector.deltas.values():
            assert torch.isfinite(delta.A).all()
            assert torch.isfinite(delta.B).all()


def test_a_changed_byte_is_noticed_and_both_hashes_named(tmp_path: Path, vector: PreferenceVector) -> None:
    write_adapter(tmp_path / "a", vector, Provenance(kind="preference_vector"))
    written = read_adapter(tmp_path / "a").sha256
    content = bytearray((tmp_path / "a" / WEIGHTS).read_bytes())
    content[-1] ^= 1
    (tmp_path / "a" / WEIGHTS).write_bytes(content)
    changed = read_adapter(tmp_path / "a", check_hash=False).sha256
    with pytest.raises(InputError, match=f"{changed[:12]}.*{written[:12]}.*--allow-mismatch"):
        read_adapter(tmp_path / "a")
