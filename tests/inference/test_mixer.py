"""Live mixing against dense weights, on real architectures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D

from lora_prefvec.errors import InputError
from lora_prefvec.inference.mixer import LiveMixer, _Site
from lora_prefvec.vector import BaseIdentity, LowRankDelta, PreferenceVector
from tests.helpers import random_vector

TinyModel = Callable[[str], Path]
TOKENS = torch.randint(0, 256, (3, 11), generator=torch.Generator().manual_seed(0))
Q_PROJ = "model.layers.0.self_attn.q_proj"


def load(folder: Path, **options: object) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def load_nf4(folder: Path) -> Any:
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = load(folder, quantization_config=config)
    for layer in model.modules():
        if isinstance(layer, Linear4bit):
            # Else, on CPUs with avx512_bf16, evaluation repacks the weights with rounded scales and rounds its inputs.
            layer.support_avx512bf16_for_cpu = False
    return model


def logits(model: nn.Module, tokens: Tensor = TOKENS) -> Tensor:
    with torch.no_grad():
        answer: Tensor = model(input_ids=tokens).logits
    return answer


def folded(folder: Path, vector: PreferenceVector) -> Any:
    """The model with the vector added to its dense weights, in float64 and back."""
    model = load(folder)
    for name, delta in vector.deltas.items():
        layer = model.get_submodule(name)
        dense = delta.B.double() @ delta.A.double()
        weight = layer.weight
        weight.data = (weight.double() + (dense.T if isinstance(layer, Conv1D) else dense)).to(weight.dtype)
    return model


@pytest.fixture(scope="module")
def llama(tiny_llama: Path) -> Any:
    return load(tiny_llama)


@pytest.fixture(scope="module")
def three(llama: Any) -> dict[str, PreferenceVector]:
    """Three vectors of different ranks; the last one changes a single module."""
    last = random_vector(llama, rank=8, seed=3)
    return {
        "helpful": random_vector(llama, rank=4, seed=1),
        "harmless": random_vector(llama, rank=2, seed=2),
        "concise": PreferenceVector({Q_PROJ: last.deltas[Q_PROJ]}),
    }


@pytest.fixture
def mixer(llama: Any, three: dict[str, PreferenceVector]) -> Iterator[LiveMixer]:
    with LiveMixer(llama, three) as mixer:
        yield mixer


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "mistral", "gpt2", "phi3"])
def test_equals_folded_weights(tiny_model: TinyModel, family: str) -> None:
    folder = tiny_model(family)
    model = load(folder)
    base = logits(model)
    v, w = random_vector(model, rank=4, seed=1), random_vector(model, rank=6, seed=2)
    expected = logits(folded(folder, 1.0 * v - 0.5 * w))
    with LiveMixer(model, {"v": v, "w": w}) as mixer:
        mixer.set_mix({"v": 1.0, "w": -0.5})
        got = logits(model)
    assert float((got - expected).norm() / expected.norm()) <= 1e-5
    assert float((base - expected).norm() / expected.norm()) > 0.1  # the mix does something


def test_one_mix_per_row(llama: Any, mixer: LiveMixer) -> None:
    rows = [{"helpful": 1.0, "harmless": 0.5}, {}, {"harmless": -1.0, "concise": 2.0}]
    mixer.set_mix(rows)
    together = logits(llama)
    for i, mix in enumerate(rows):
        mixer.set_mix(mix)
        torch.testing.assert_close(together[i : i + 1], logits(llama, TOKENS[i : i + 1]), rtol=0, atol=2e-5)


def test_generation_row_by_row(llama: Any, mixer: LiveMixer) -> None:
    """Through the cache, one token at a time: every row goes on as it would alone."""
    rows = [{"helpful": 1.0}, {"harmless": -1.0}, {}]
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 256}
    mixer.set_mix(rows)
    together = llama.generate(input_ids=TOKENS, attention_mask=torch.ones_like(TOKENS), **options)
    for i, mix in enumerate(rows):
        mixer.set_mix(mix)
        prompt = TOKENS[i : i + 1]
        alone = llama.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), **options)
        assert together[i, : alone.shape[1]].tolist() == alone[0].tolist()


def test_the_empty_mix_is_the_base_to_the_bit(llama: Any, three: dict[str, PreferenceVector]) -> None:
    base = logits(llama)
    with LiveMixer(llama, three) as mixer:
        assert torch.equal(logits(llama), base)  # attached, no mix set yet
        mixer.set_mix({"helpful": 1.0})
        assert not torch.equal(logits(llama), base)
        mixes: list[Any] = [{}, {"helpful": 0.0}, [{}, {}, {}], [{"helpful": 0.0}, {}, {}]]
        for nothing in mixes:
            mixer.set_mix(nothing)
            assert torch.equal(logits(llama), base)
            assert all(site.gate is None for site in mixer._sites.values())


def test_inactive_vectors_are_not_computed(mixer: LiveMixer) -> None:
    site = mixer._sites[Q_PROJ]
    mixer.set_mix({"harmless": 1.0})
    assert site.A.shape[0] == site.B_T.shape[0] == 2
    mixer.set_mix({"helpful": 1.0, "concise": 0.5})  # not neighbours
    assert site.A.shape[0] == 12
    mixer.set_mix({"concise": 0.5})
    assert mixer._sites["model.layers.1.mlp.up_proj"].gate is None


def test_changing_coefficients_writes_the_gates_in_place(llama: Any, mixer: LiveMixer) -> None:
    mixer.set_mix({"helpful": 1.0, "harmless": 1.0})
    sites = list(mixer._sites.values())
    before = [(site.A.data_ptr(), site.B_T.data_ptr(), site.gate.data_ptr()) for site in sites if site.gate is not None]
    assert len({gate for _, _, gate in before}) <= 2  # one for all modules with the same vectors
    mixer.set_mix({"helpful": -2.0, "harmless": 0.25})
    after = [(site.A.data_ptr(), site.B_T.data_ptr(), site.gate.data_ptr()) for site in sites if site.gate is not None]
    assert after == before
    mixer.set_mix({"helpful": 0.5, "harmless": 0.25})


def test_add_and_remove_while_running(llama: Any, tiny_llama: Path, three: dict[str, PreferenceVector]) -> None:
    v, w, x = three.values()
    with LiveMixer(llama, {"v": v}) as mixer:
        mixer.set_mix({"v": 1.0})
        only_v = logits(llama)
        mixer.attach({"w": w, "x": x})
        assert torch.equal(logits(llama), only_v)  # attached at 0, the mix stays
        mixer.set_mix({"v": 1.0, "w": 0.5, "x": -1.0})
        expected = logits(folded(tiny_llama, v + 0.5 * w - x))
        torch.testing.assert_close(logits(llama), expected, rtol=0, atol=2e-5)
        mixer.remove("w")
        assert mixer.names == ["v", "x"]
        assert mixer.mix == {"v": 1.0, "x": -1.0}
        torch.testing.assert_close(logits(llama), logits(folded(tiny_llama, v - x)), rtol=0, atol=2e-5)
        mixer.remove("v", "x")
        assert torch.equal(logits(llama), logits(load(tiny_llama)))
        assert not any(module._forward_hooks for module in llama.modules())
        mixer.attach({"v": v})
        mixer.set_mix([{"v": 1.0}] * 3)
        torch.testing.assert_close(logits(llama), only_v, rtol=0, atol=2e-5)


@pytest.mark.parametrize("quantized", [False, True])
def test_detach_leaves_the_model_as_it_was(tiny_llama: Path, quantized: bool) -> None:
    model = (load_nf4 if quantized else load)(tiny_llama)
    base = logits(model)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    with LiveMixer(model, {"v": random_vector(model, rank=4, seed=1)}) as mixer:
        mixer.set_mix({"v": 1.0})
        assert not torch.equal(logits(model), base)
    assert torch.equal(logits(model), base)
    after = model.state_dict()
    assert list(after) == list(weights)
    assert all(torch.equal(after[name], weights[name]) for name in weights)
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    assert not any(module._forward_hooks for module in model.modules())


def test_a_four_bit_base(tiny_llama: Path) -> None:
    """Equal to the dequantised weights with the dense delta on top."""
    model = load_nf4(tiny_llama)
    v = random_vector(model, rank=4, seed=1)
    dense = load(tiny_llama)
    for name, delta in v.deltas.items():
        columns = delta.shape[1]
        layer = model.get_submodule(name)
        with torch.no_grad():
            weight = layer(torch.eye(columns)).T
        dense.get_submodule(name).weight.data = (weight.double() + delta.B.double() @ delta.A.double()).float()
    expected = logits(dense)
    with LiveMixer(model, {"v": v}) as mixer:
        mixer.set_mix({"v": 1.0})
        got = logits(model)
    assert float((got - expected).norm() / expected.norm()) <= 1e-5


def test_a_bfloat16_model_keeps_its_dtype(tiny_llama: Path) -> None:
    model = load(tiny_llama, dtype=torch.bfloat16)
    v = random_vector(model, rank=4, seed=1)
    expected = logits(folded(tiny_llama, v))
    for dtype in (torch.float32, torch.bfloat16):
        with LiveMixer(model, {"v": v}, dtype=dtype) as mixer:
            mixer.set_mix({"v": 1.0})
            got = logits(model)
        assert got.dtype == torch.bfloat16
        assert float((got.float() - expected).norm() / expected.norm()) <= 0.05


def test_inference_mode_poisons_nothing(llama: Any, three: dict[str, PreferenceVector]) -> None:
    """A mix that was set inside inference mode is changed, and trained through, outside of it."""
    with torch.inference_mode():
        mixer = LiveMixer(llama, three)
        mixer.set_mix({"helpful": 1.0})
    with mixer:
        mixer.set_mix({"helpful": 0.5})
        llama(input_ids=TOKENS).logits.sum().backward()
        assert llama.get_submodule(Q_PROJ).weight.grad is not None
    llama.zero_grad()


def test_unknown_names(mixer: LiveMixer) -> None:
    calls: list[Callable[[], None]] = [
        lambda: mixer.set_mix({"helpfull": 1.0}),
        lambda: mixer.set_mix([{}, {"helpfull": 1.0}]),
        lambda: mixer.remove("helpfull"),
    ]
    for call in calls:
        with pytest.raises(InputError, match=r"no vector 'helpfull' is attached\. Did you mean 'helpful'\?"):
            call()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), "abc", None])
def test_coefficients_that_are_no_finite_number(mixer: LiveMixer, bad: float) -> None:
    mixer.set_mix({"helpful": 1.0})
    with pytest.raises(InputError, match="of 'helpful' is no finite number"):
        mixer.set_mix({"harmless": 1.0, "helpful": bad})
    assert mixer.mix == {"helpful": 1.0}  # the old mix stands


def test_rows_and_batch_must_agree(llama: Any, mixer: LiveMixer) -> None:
    with pytest.raises(InputError, match="no row at all"):
        mixer.set_mix([])
    for count in (1, 2, 4):
        mixer.set_mix([{"helpful": 1.0}] * count)
        with pytest.raises(InputError, match=rf"{count} mixes were set, one per row.*batch of \[3, 11, 64\]"):
            logits(llama)


def test_vectors_that_do_not_fit_are_refused_and_leave_nothing(llama: Any, three: dict[str, PreferenceVector]) -> None:
    good = three["helpful"]
    q = good.deltas[Q_PROJ]
    for module, delta, message in (
        (
            "model.layers.9.self_attn.q_proj",
            q,
            r"changes model.layers.9.self_attn.q_proj, which this model does not have",
        ),
        (Q_PROJ, LowRankDelta(q.A[:, :32], q.B), rf"is \[64, 32\] at {Q_PROJ}, where this model is \[64, 64\]"),
        ("model.embed_tokens", q, "which is a Embedding and no linear layer"),
    ):
        with pytest.raises(InputError, match=message):
            LiveMixer(llama, {"good": good, "bad": PreferenceVector({module: delta})})
        assert not any(layer._forward_hooks for layer in llama.modules())


def test_an_attach_that_fails_half_way_leaves_nothing(
    llama: Any, three: dict[str, PreferenceVector], monkeypatch: pytest.MonkeyPatch
) -> None:
    with LiveMixer(llama, {"helpful": three["helpful"]}) as mixer:
        mixer.set_mix({"helpful": 1.0})
        before = logits(llama)
        add, calls = _Site.add, iter(range(3))

        def fails_at_the_fourth(site: _Site, deltas: Mapping[str, LowRankDelta]) -> None:
            if next(calls, None) is None:
                raise torch.OutOfMemoryError
            add(site, deltas)

        monkeypatch.setattr(_Site, "add", fails_at_the_fourth)
        with pytest.raises(torch.OutOfMemoryError):
            mixer.attach({"harmless": three["harmless"]})
        monkeypatch.undo()
        assert mixer.names == ["helpful"]
        assert torch.equal(logits(llama), before)
        mixer.attach({"harmless": three["harmless"]})
        assert torch.equal(logits(llama), before)


@pytest.mark.gpu
def test_on_cuda(tiny_llama: Path, three: dict[str, PreferenceVector]) -> None:
    model, tokens = load(tiny_llama).cuda(), TOKENS.cuda()
    base = logits(model, tokens)
    expected = logits(folded(tiny_llama, three["helpful"] - three["concise"]))
    with LiveMixer(model, three) as mixer:
        mixer.set_mix({"helpful": 1.0, "concise": -1.0})
        got = logits(model, tokens).cpu()
        mixer.set_mix([{"helpful": 1.0, "concise": -1.0}, {}, {"harmless": 1.0}])
        rows = logits(model, tokens).cpu()
    assert float((got - expected).norm() / expected.norm()) <= 1e-5
    torch.testing.assert_close(rows[0], expected[0], rtol=0, atol=1e-4)
    torch.testing.assert_close(rows[1], base[1].cpu(), rtol=0, atol=1e-4)
    assert torch.equal(logits(model, tokens), base)


def test_names_are_unique_and_bases_agree(llama: Any, three: dict[str, PreferenceVector]) -> None:
    ours = PreferenceVector(three["helpful"].deltas, BaseIdentity("ours", config_sha256="a" * 64))
    theirs = PreferenceVector(three["harmless"].deltas, BaseIdentity("theirs", config_sha256="b" * 64))
    with LiveMixer(llama, {"ours": ours}) as mixer:
        with pytest.raises(InputError, match="'ours' is already attached"):
            mixer.attach({"ours": ours})
        with pytest.raises(InputError, match="two bases, 'ours' and 'theirs'"):
            mixer.attach({"theirs": theirs})
        assert mixer.names == ["ours"]
