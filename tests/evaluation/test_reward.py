"""Reward models: tiny ones made here, against what transformers says of them directly."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

from lora_prefvec.errors import InputError
from lora_prefvec.evaluation.scorers import Prompt, apply, classifier, find_scorer, fingerprint
from lora_prefvec.evaluation.scorers.reward import RECIPES
from lora_prefvec.inference.base import best_dtype
from tests.helpers import COMMON, tiny_tokenizer

PROMPTS: list[Prompt] = [
    "How do I clean the bike?",
    [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello"}],
    {"prompt": "Hi", "label": "safe"},
]
REPLIES = ["First dust the bike.", "Hello to you too, and a much longer sentence than all the others here.", ""]


def write_reward_model(folder: Path, labels: Mapping[int, str], **changes: Any) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(**{**COMMON, **changes}, num_labels=len(labels), id2label=dict(labels))
    LlamaForSequenceClassification(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_reward_model(tmp_path_factory.mktemp("reward") / "judged", {0: "LABEL_0"})


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_reward_model(tmp_path_factory.mktemp("reward") / "heads", {0: "help", 1: "safe", 2: "short"})


def direct(folder: Path, prompts: Sequence[Prompt] = PROMPTS, replies: Sequence[str] = REPLIES) -> list[list[float]]:
    """The outputs by transformers alone, one reply at a time."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=best_dtype("cpu"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = []
    for prompt, reply in zip(prompts, replies, strict=True):
        turns: Any = prompt["prompt"] if isinstance(prompt, Mapping) else prompt
        turns = [{"role": "user", "content": turns}] if isinstance(turns, str) else list(turns)
        text = tokenizer.apply_chat_template([*turns, {"role": "assistant", "content": reply}], tokenize=False)
        with torch.no_grad():
            rows.append(model(**tokenizer(text, add_special_tokens=False, return_tensors="pt")).logits[0].tolist())
    return rows


TOLERANCE = 1e-5 if best_dtype("cpu") is torch.float32 else 0.02


@pytest.mark.parametrize("tokens", [classifier.BATCH_TOKENS, 1])  # all in one batch, and each alone
def test_a_reward_is_what_transformers_says(one: Path, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(classifier, "BATCH_TOKENS", tokens)
    scorer = find_scorer(f"reward:{one}")
    assert (scorer.name, scorer.direction, scorer.is_cost) == ("judged", 1, False)
    found = apply(scorer, PROMPTS, REPLIES)
    assert found == [pytest.approx(row[0], abs=TOLERANCE) for row in direct(one)]
    assert len(set(found)) == 3


def test_costs_are_turned_round(one: Path) -> None:
    cost = find_scorer(f"reward:{one}?sign=-1&name=harmless")
    assert (cost.name, cost.direction) == ("harmless", 1)
    assert apply(cost, PROMPTS, REPLIES) == [pytest.approx(-row[0], abs=TOLERANCE) for row in direct(one)]


@pytest.mark.parametrize(("output", "column", "name"), [("safe", 1, "safe"), ("2", 2, "short")])
def test_one_of_several_outputs_by_its_label_or_number(several: Path, output: str, column: int, name: str) -> None:
    scorer = find_scorer(f"reward:{several}#{output}")
    assert scorer.name == name
    found = apply(scorer, PROMPTS, REPLIES)
    assert found == [pytest.approx(row[column], abs=TOLERANCE) for row in direct(several)]


def test_the_outputs_of_one_model_share_its_weights(several: Path) -> None:
    before = classifier.load_classifier.cache_info().misses
    for output in ("help", "safe", "short"):
        apply(find_scorer(f"reward:{several}#{output}?template={several / 'chat_template.jinja'}"), PROMPTS, REPLIES)
    assert classifier.load_classifier.cache_info().misses == before + 1


@pytest.mark.parametrize("pad", [None, COMMON["eos_token_id"]])
def test_models_without_a_padding_token_of_their_own(pad: int | None, tmp_path: Path) -> None:
    folder = write_reward_model(tmp_path / "padless", {0: "LABEL_0"}, pad_token_id=pad)
    found = apply(find_scorer(f"reward:{folder}"), PROMPTS, REPLIES)
    assert found == [pytest.approx(row[0], abs=TOLERANCE) for row in direct(folder)]


def test_in_four_bits_on_request(one: Path) -> None:
    scorer = find_scorer(f"reward:{one}?quantization=nf4")
    quantized, whole = apply(scorer, PROMPTS, REPLIES), apply(find_scorer(f"reward:{one}"), PROMPTS, REPLIES)
    assert quantized != whole
    assert quantized == [pytest.approx(value, abs=1.0) for value in whole]
    model = classifier.load_classifier(one, "nf4", None, None).model
    assert type(model.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
    assert type(model.score) is torch.nn.Linear


def test_a_template_of_the_users_own(one: Path, tmp_path: Path) -> None:
    file = tmp_path / "reply.jinja"
    file.write_text("{{ messages[-1].content }}<eos>", encoding="utf-8")
    first, second = apply(find_scorer(f"reward:{one}?template={file}"), ["a", "quite another"], ["same", "same"])
    assert first == second


def test_a_reply_that_does_not_fit_is_refused_and_not_cut(one: Path) -> None:
    with pytest.raises(InputError, match=r"reply 2 has \d+ tokens with its prompt, and 'judged' reads 512"):
        apply(find_scorer(f"reward:{one}"), ["a", "b"], ["x", "x" * 600])


# Families whose head has another name


def renamed(folder: Path, head: str, architecture: str, **changes: Any) -> Path:
    """The model of a folder as the family publishes it."""
    weights = load_file(folder / "model.safetensors")
    weights = {name.replace("score.", f"{head}."): tensor for name, tensor in weights.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for name in ("id2label", "label2id"):
        config.pop(name, None)
    config |= {"architectures": [architecture], **changes}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def test_safe_rlhf_models_are_read_with_their_own_template(tmp_path: Path) -> None:
    folder = write_reward_model(tmp_path / "beaver-7b-v1.0-cost", {0: "LABEL_0"})
    ids = tiny_tokenizer()("<bos>BEGINNING OF CONVERSATION: USER: hello ASSISTANT:Hi!<eos>", return_tensors="pt")
    expected = AutoModelForSequenceClassification.from_pretrained(folder, dtype=best_dtype("cpu"))(**ids).logits
    renamed(folder, "score_head", "LlamaModelForScore", score_dim=1)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = None
    os.unlink(folder / "chat_template.jinja")
    tokenizer.save_pretrained(folder)
    scorer = find_scorer(f"reward:{folder}?sign=-1")
    assert scorer.name == "beaver-7b-v1.0-cost"
    assert apply(scorer, ["hello"], ["Hi!"]) == [pytest.approx(-expected.item(), abs=TOLERANCE)]
    with pytest.raises(InputError, match="cannot render the turns 'system user assistant': Safe-RLHF has no such turn"):
        apply(scorer, [PROMPTS[1]], ["Hi!"])


@pytest.mark.parametrize("architecture", ["LlamaModelForScore", "LlamaForScore"])
def test_a_head_with_a_bias_keeps_it(architecture: str, tmp_path: Path) -> None:
    folder = write_reward_model(tmp_path / "cost", {0: "LABEL_0"})
    renamed(folder, "score_head", architecture, score_dim=1)
    without = apply(find_scorer(f"reward:{folder}"), ["a"], ["b"])[0]
    other = tmp_path / "biased"
    shutil.copytree(folder, other)
    weights = load_file(other / "model.safetensors")
    more = {"score_head.bias": torch.tensor([3.0]), "normalizer.mean": torch.zeros(1)}
    save_file({**weights, **more}, other / "model.safetensors", metadata={"format": "pt"})
    assert apply(find_scorer(f"reward:{other}"), ["a"], ["b"]) == [pytest.approx(without + 3.0, abs=TOLERANCE)]  # type: ignore[operator]


@pytest.mark.parametrize("reference", RECIPES)
def test_recipes_are_read_as_they_are_meant(reference: str, monkeypatch: pytest.MonkeyPatch, one: Path) -> None:
    asked: list[str] = []
    monkeypatch.setattr("lora_prefvec.artifact.resolve_base", lambda name: asked.append(name) or one)
    labels = classifier.ARMORM if "ArmoRM" in reference else ("score",)
    monkeypatch.setattr("lora_prefvec.evaluation.scorers.reward.outputs_of", lambda folder: (None, labels))
    scorer: Any = find_scorer(reference)
    assert asked[0].count("/") == 1
    assert (scorer.sign, scorer.direction) == (-1 if asked[0].endswith("cost") else 1, 1)
    assert scorer.name in ("helpful", "harmless", "preferred")


def test_armorm_gives_its_attributes_by_name(tmp_path: Path) -> None:
    folder = write_reward_model(tmp_path / "armo", dict(enumerate(classifier.ARMORM)))
    expected = direct(folder)
    renamed(folder, "regression_layer", "LlamaForRewardModelWithGating", num_objectives=19)
    found = apply(find_scorer(f"reward:{folder}#beavertails-is_safe"), PROMPTS, REPLIES)
    assert found == [pytest.approx(row[10], abs=TOLERANCE) for row in expected]
    with pytest.raises(InputError, match="has 19 outputs"):
        find_scorer(f"reward:{folder}")


# Refused


def test_a_head_that_would_be_random_is_refused(tmp_path: Path) -> None:
    folder = renamed(write_reward_model(tmp_path / "other", {0: "LABEL_0"}), "v_head", "LlamaForSequenceClassification")
    with pytest.raises(InputError, match=r"does not fit its class: score.weight is missing"):
        apply(find_scorer(f"reward:{folder}#0"), ["a"], ["b"])


@pytest.mark.parametrize(
    ("reference", "parts"),
    [
        ("{several}", ["has 3 outputs", "#help", "help, safe, short"]),
        ("{several}#saf", ["no output 'saf'", "Did you mean 'safe'?"]),
        ("{several}#3", ["no output '3'", "help, safe, short"]),
        ("{one}?sign=2", ["the sign of a reward model is '2'"]),
        ("{one}?sing=-1", ["no option 'sing'", "Did you mean 'sign'?"]),
        ("{one}?quantization=int3", ["'int3'", "nf4"]),
        ("{one}?template=nowhere.jinja", ["nowhere.jinja cannot be read"]),
        ("{llama}", ["is a LlamaForCausalLM, which is no reward model"]),
        ("{empty}", ["no config.json"]),
        ("sandbox", ["LlamaForCausalLM, which is no reward model"]),
    ],
)
def test_what_is_no_reward_model(
    reference: str, parts: list[str], one: Path, several: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError) as refusal:
        find_scorer("reward:" + reference.format(one=one, several=several, llama=tiny_llama, empty=tmp_path))
    for part in parts:
        assert part in str(refusal.value)


def test_pickled_weights_are_not_read(tmp_path: Path) -> None:
    folder = write_reward_model(tmp_path / "pickled", {0: "LABEL_0"})
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    os.unlink(folder / "model.safetensors")
    with pytest.raises(InputError, match="no safetensors"):
        find_scorer(f"reward:{folder}")


def test_a_tokenizer_without_template_is_told_what_to_do(tmp_path: Path) -> None:
    folder = write_reward_model(tmp_path / "bare", {0: "LABEL_0"})
    os.unlink(folder / "chat_template.jinja")
    with pytest.raises(InputError, match=r"no chat template.*template=FILE.jinja"):
        apply(find_scorer(f"reward:{folder}"), ["a"], ["b"])


def test_the_fingerprint_follows_weights_output_and_sign(one: Path, several: Path, tmp_path: Path) -> None:
    references = [f"reward:{one}", f"reward:{one}?sign=-1", f"reward:{several}#0", f"reward:{several}#1"]
    assert len({fingerprint(find_scorer(reference)) for reference in references}) == 4
    assert fingerprint(find_scorer(references[0])) == fingerprint(find_scorer(f"reward:{one}?name=other"))
    other = write_reward_model(tmp_path / "other", {0: "LABEL_0"})
    before = fingerprint(find_scorer(f"reward:{other}"))
    os.utime(other / "model.safetensors", ns=(1, 1))
    assert fingerprint(find_scorer(f"reward:{other}")) != before
