"""The base model: what is committed holds its bars in NF4 as in fp32, and the build that makes it works."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

import pytest
import torch

from lora_prefvec.artifact import resolve_base
from lora_prefvec.inference import generate, load_base
from lora_prefvec.inference.base import ComputeDtype, Quantization
from lora_prefvec.sandbox import AXES, build, grammar, prompts, scores
from lora_prefvec.sandbox.world import TASKS


def test_the_base_is_small_and_complete() -> None:
    assert resolve_base("sandbox") == build.BASE
    names = {file.name for file in build.BASE.iterdir()}
    assert names == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    }
    assert (build.BASE / "model.safetensors").stat().st_size <= 8_000_000
    config = json.loads((build.BASE / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["hidden_size"] % 64 == config["intermediate_size"] % 64 == config["vocab_size"] % 64 == 0


def test_the_base_has_at_most_4_million_parameters() -> None:
    base = load_base(build.BASE, quantization="none", device="cpu", compute_dtype="float32")
    assert base.model.num_parameters() <= 4_000_000


@pytest.mark.parametrize(("quantization", "dtype"), build.FORMS)
def test_the_base_is_mediocre_on_every_axis_and_fluent(quantization: Quantization, dtype: ComputeDtype) -> None:
    base = load_base(build.BASE, quantization=quantization, device="cpu", compute_dtype=dtype)
    requests = prompts("held_out", 400, seed=0)
    found = scores(zip(requests, generate(base, requests, max_new_tokens=64, seed=0), strict=True))
    for axis in AXES:
        score = found[axis]
        assert score is not None
        assert 0.3 <= score <= 0.7, axis
    assert found["fluency"] is not None
    assert found["fluency"] >= 0.97
    assert found["over_refusal"] is not None
    assert 0.1 <= found["over_refusal"] <= 0.4


def test_prompts_and_replies_are_short_and_every_word_of_the_world_is_known() -> None:
    tokenizer = load_base(build.BASE, quantization="none", device="cpu").tokenizer
    rng = random.Random(0)
    for task in TASKS:
        for request in task.requests:
            message = {"role": "user", "content": request}
            ids = tokenizer.apply_chat_template([message], add_generation_prompt=True, return_dict=False)
            assert len(ids) <= 24
        assert len(tokenizer(grammar.answer(task, rng).text).input_ids) <= 60


def test_the_chat_template_renders_a_conversation_whose_prompt_is_its_beginning() -> None:
    tokenizer = load_base(build.BASE, quantization="none", device="cpu").tokenizer
    talk = [{"role": "user", "content": "How do I clean the bike?"}]
    prompt = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    assert prompt == "<|begin|><|user|>How do I clean the bike?<|end|><|assistant|>"
    whole = tokenizer.apply_chat_template([*talk, {"role": "assistant", "content": "No."}], tokenize=False)
    assert whole == prompt + "No.<|end|>"


def test_a_batch_holds_the_chances_of_every_token_of_its_replies() -> None:
    tokenizer = build.train_tokenizer()
    for batch in itertools.islice(build.batches(tokenizer), 3):
        total = torch.zeros(batch.ids.shape)
        total.index_put_((batch.rows, batch.columns), batch.chances, accumulate=True)
        assert set(total.round(decimals=4).flatten().tolist()) == {0.0, 1.0}
        for row, ids in enumerate(batch.ids.tolist()):
            where = total[row].nonzero()[:, 0].tolist()
            begin, end = where[0] + 1, where[-1] + 2
            assert where == list(range(begin - 1, end - 1))
            assert ids[begin - 1] == tokenizer.convert_tokens_to_ids(build.ASSISTANT)
            assert ids[end - 1] == tokenizer.eos_token_id
            said = tokenizer.decode(ids[begin : end - 1])
            assert grammar.parse(said) is not None
            assert tokenizer(said).input_ids == ids[begin : end - 1]


def test_the_divergence_is_0_for_a_model_that_says_exactly_what_the_grammar_would() -> None:
    batch = next(build.batches(build.train_tokenizer()))
    logits = torch.full((*batch.ids.shape, build.VOCABULARY), -1e4)
    logits[batch.rows, batch.columns, batch.tokens] = batch.chances.log()
    assert batch.loss(logits).item() == pytest.approx(0.0, abs=1e-5)
    logits[batch.rows[0], batch.columns[0], batch.tokens[0]] -= 1.0
    assert batch.loss(logits).item() > 5e-5


def test_a_build_from_the_same_seed_is_the_same_and_learns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = build.train_tokenizer()
    first, second = build.train(tokenizer, 3), build.train(tokenizer, 3)
    for name, weight in first.state_dict().items():
        assert torch.equal(weight, second.state_dict()[name]), name
    batch = next(build.batches(tokenizer))
    learned = build.train(tokenizer, 25)
    with torch.no_grad():
        before = batch.loss(build.new_model(tokenizer)(input_ids=batch.ids).logits)
        after = batch.loss(learned(input_ids=batch.ids).logits)
    assert after < before - 1
    build.write(tmp_path / "base", first, tokenizer)
    build.write(tmp_path / "base", first, tokenizer)  # replaces
    assert {file.name for file in tmp_path.iterdir()} == {"base"}
    committed = json.loads((build.BASE / "config.json").read_text())
    assert json.loads((tmp_path / "base" / "config.json").read_text()) == committed
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "base" / name).read_bytes() == (build.BASE / name).read_bytes()
