"""DPA: its reward model, its directions and choices by hand, and whole runs."""

from __future__ import annotations

import json
import math
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_prefvec.artifact import (
    ConditionFacts,
    Provenance,
    RewardModel,
    conditioned,
    fill_reward_model,
    read_adapter,
    read_reward_model,
)
from lora_prefvec.artifact.reward_model import HEADS
from lora_prefvec.data import RatedReplies, RatedReply
from lora_prefvec.errors import InputError
from lora_prefvec.evaluation.scorers import apply, find_scorer
from lora_prefvec.inference import LoadedBase, final_states
from lora_prefvec.inference.render import has_system_turn
from lora_prefvec.recipe import DpaSpec, Recipe
from lora_prefvec.training import reward_model as rewarding
from lora_prefvec.training import train
from lora_prefvec.training.methods import METHODS, dpa
from lora_prefvec.training.methods.dpa import Asked, best_of, cone, draw, draw_asked
from lora_prefvec.training.replies import ReplyTrainer
from lora_prefvec.training.reward_model import HeadsTrainer, least_squares, squared_error
from tests.training.methods.test_weighing import rated_file
from tests.training.tiny import QUICK, Stop, hidden, weights_hash

AXES = ("warm", "short")


@pytest.fixture(scope="module")
def rated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rated_file(tmp_path_factory.mktemp("rated") / "rated.jsonl")


@pytest.fixture
def recipe_of(tiny_llama: Path, rated: Path) -> Any:
    def made(data: Path = rated, held_out: int = 4, **method: Any) -> Recipe:
        spec = {"name": "dpa", "axes": list(AXES), "iterations": 1, "prompts": 6, "samples": 3, **method}
        return Recipe.model_validate(
            {
                "preference": "both",
                "method": spec,
                "base": {"id": str(tiny_llama)},
                "data": {"source": str(data)},
                "held_out": held_out,
                "lora": {"rank": 4, "alpha": 8},
                "training": {**QUICK, "max_steps": 3, "checkpoint_every": 2, "max_reply_tokens": 12},
            }
        )

    return made


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def own_cache_and_small_pieces(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFVEC_CACHE", str(cache))
    monkeypatch.setattr(dpa, "AT_ONCE", 6)  # two prompts with three samples each


def said(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def group(text: str, *ratings: dict[str, float]) -> RatedReplies:
    replies = tuple(RatedReply(said(f"{text} {place}"), one) for place, one in enumerate(ratings))
    return RatedReplies([{"role": "user", "content": text}], replies)


# -- directions and choices -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axes", [2, 3, 5])
def test_directions_lie_in_the_cone_and_their_angle_is_uniform(axes: int) -> None:
    spec = DpaSpec(name="dpa", axes={f"axis{i}": 1 for i in range(axes)}, cone=30)
    dice = random.Random(0)
    drawn = [draw(spec, dice) for _ in range(2000)]
    angles = [math.degrees(math.acos(min(1.0, one["axis0"]))) for one in drawn]
    assert max(angles) <= 30
    assert sum(angles) / len(angles) == pytest.approx(15, abs=0.7)
    for one in drawn:
        assert math.hypot(*one.values()) == pytest.approx(1)
        assert all(low <= one[axis] <= high for axis, (low, high) in cone(spec).items())
    for place in range(1, axes):
        assert sum(one[f"axis{place}"] for one in drawn) / len(drawn) == pytest.approx(0, abs=0.03)


def test_the_papers_cone_in_hundredths() -> None:
    assert cone(DpaSpec(name="dpa", axes={"helpful": 1, "verbose": 1})) == {
        "helpful": (0.7, 1.0),
        "verbose": (-0.71, 0.71),
    }


def test_every_prompt_is_used_before_one_is_used_again() -> None:
    spec = DpaSpec(name="dpa", axes={"warm": 1, "short": 1})
    groups = [group(str(i), {"warm": 1.0}) for i in range(5)]
    asked = draw_asked(spec, groups, 12, "0")
    names = [one.group.prompt[0]["content"] for one in asked]
    assert len(set(names[:5])) == len(set(names[5:10])) == 5
    assert asked == draw_asked(spec, groups, 12, "0") != draw_asked(spec, groups, 12, "1")


def test_the_best_reply_has_the_largest_inner_product() -> None:
    r = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.7, 0.6], [2.0, -9.0], [0.0, 0.0]])
    groups = [group("a", {}, {}, {}), group("b", {}, {})]
    for direction, expected in (((1.0, 0.0), ["a 0", "b 0"]), ((0.6, 0.8), ["a 2", "b 1"])):
        asked = [Asked(one, dict(zip(AXES, direction, strict=True))) for one in groups]
        chosen = best_of(asked, [[reply.reply for reply in one.replies] for one in groups], r)
        assert [one[0]["content"] for one in chosen] == expected


def test_the_direction_is_written_into_the_prompt_in_one_order_for_ever() -> None:
    given = ConditionFacts(kind="direction", axes={"warm": (0.7, 1), "short": (-0.71, 0.71)}, system=True)
    facts = Provenance(kind="conditional_adapter", condition=given)
    read = Provenance.model_validate(json.loads(facts.to_json())).condition
    for one in (given, read):
        assert one is not None
        turns = conditioned(one, {"warm": 0.966, "short": -0.259}, [{"role": "user", "content": "Hi"}])
        assert turns[0] == {"role": "system", "content": "Maximize weighted rating = short*-26 + warm*97."}


def test_a_direction_in_grades_stands_where_levels_do() -> None:
    axes = {"warm": (0.7, 1.0), "short": (-0.71, 0.71)}
    facts = ConditionFacts(kind="direction", axes=axes, system=True, grades=5)
    turns = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    for degrees, expected in {
        -45: "< short: 1 > < warm: 1 > Hi",
        -30: "< short: 2 > < warm: 3 > Hi",
        0: "< short: 3 > < warm: 5 > Hi",
        45: "< short: 5 > < warm: 1 > Hi",
        90: "< short: 5 > < warm: 1 > Hi",  # out of the cone
    }.items():
        angle = math.radians(degrees)
        asked = {"warm": math.cos(angle), "short": math.sin(angle)}
        assert conditioned(facts, asked, turns) == [turns[0], {"role": "user", "content": expected}]


def test_an_adapter_that_says_nothing_of_grades_has_none() -> None:
    written = json.loads(Provenance(kind="conditional_adapter", condition=direction_facts()).to_json())
    del written["condition"]["grades"]
    assert Provenance.model_validate(written).condition == direction_facts()


def direction_facts() -> ConditionFacts:
    return ConditionFacts(kind="direction", axes={"warm": (0.7, 1.0), "short": (-0.71, 0.71)}, system=True)


def test_a_direction_may_be_out_of_the_cone_and_not_zero(capsys: pytest.CaptureFixture[str]) -> None:
    facts = ConditionFacts(kind="direction", axes={"warm": (0.7, 1), "short": (-0.71, 0.71)})
    conditioned(facts, {"warm": 1, "short": 1}, [{"role": "user", "content": "Hi"}])
    assert capsys.readouterr().err == ""
    conditioned(facts, {"short": 1}, [{"role": "user", "content": "Hi"}])
    assert "short -0.71 to 0.71" in capsys.readouterr().err
    with pytest.raises(InputError, match="points nowhere"):
        conditioned(facts, {"warm": 0.0}, [{"role": "user", "content": "Hi"}])


def test_templates_with_and_without_a_system_turn(nf4: LoadedBase) -> None:
    class Refuses:
        chat_template = "x"

        def apply_chat_template(self, *_: Any, **__: Any) -> str:
            from jinja2.exceptions import TemplateError

            raise TemplateError("no system turn")

    assert has_system_turn(nf4.tokenizer) == (
        "be brief" in nf4.tokenizer.apply_chat_template([{"role": "system", "content": "be brief"}], tokenize=False)
    )
    assert not has_system_turn(Refuses())


# -- the reward model -------------------------------------------------------------------------------------------------


def test_the_loss_counts_what_is_rated() -> None:
    predicted = torch.tensor([[1.0, 2.0], [0.0, 5.0]], requires_grad=True)
    ratings = torch.tensor([[0.0, 4.0], [3.0, math.nan]])
    loss = squared_error(predicted, ratings)
    assert loss.item() == (1 + 4 + 9) / 2
    (gradient,) = torch.autograd.grad(loss, predicted)
    assert gradient.tolist() == [[1.0, -2.0], [-3.0, 0.0]]


def test_least_squares_find_the_heads_that_made_the_ratings() -> None:
    generator = torch.Generator().manual_seed(0)
    states, weight, bias = torch.randn(300, 8, generator=generator), torch.randn(2, 8, generator=generator), 0.5
    ratings = states @ weight.T + bias
    ratings[::3, 1] = math.nan
    found, offset = least_squares(states, ratings)
    torch.testing.assert_close(found, weight, atol=0.01, rtol=0.01)
    torch.testing.assert_close(offset, torch.full((2,), bias), atol=0.01, rtol=0.01)


def test_the_last_state_is_the_last_token_s_of_its_row_alone(nf4: LoadedBase) -> None:
    rows = [[3, 4, 5], [6, 7, 8, 9, 10, 11], [12]]
    found = final_states(nf4, rows)
    for row, state in zip(rows, found, strict=True):
        with torch.no_grad():
            alone = nf4.model(torch.tensor([row]), output_hidden_states=True).hidden_states[-1][0, -1]
        torch.testing.assert_close(state, alone.float(), atol=2e-2, rtol=2e-2)


def a_reward_model(base: LoadedBase, trained: Any) -> RewardModel:
    weight = torch.arange(2.0 * base.model.config.hidden_size).view(2, -1)
    return RewardModel(trained.vector, {"warm": (3.0, 2.0), "short": (1.0, 0.5)}, weight, torch.tensor([0.5, -1.0]))


@pytest.fixture
def written(nf4: LoadedBase, trained: Any, tmp_path: Path) -> Path:
    folder = tmp_path / "reward"
    folder.mkdir()
    fill_reward_model(folder, a_reward_model(nf4, trained("two")), Provenance(kind="reward_model"))
    return folder


def test_a_reward_model_is_read_as_it_was_written(written: Path, nf4: LoadedBase, trained: Any) -> None:
    made = a_reward_model(nf4, trained("two"))
    read, facts = read_reward_model(written)
    assert facts.kind == "reward_model"
    assert dict(read.axes) == dict(made.axes)
    assert torch.equal(read.weight, made.weight)
    assert torch.equal(read.bias, made.bias)
    assert (read.vector - made.vector).norm() < 1e-5
    turned, _ = read_reward_model(written, axes=["short"])
    assert turned.weight.tolist() == made.weight[1:].tolist()
    assert "reward:FOLDER#warm" in (written / "README.md").read_text()
    state = torch.zeros(1, made.weight.shape[1])
    assert made.ratings(state).tolist() == [[3 + 2 * 0.5, 1 + 0.5 * -1]]


def test_a_changed_reward_model_is_refused(written: Path) -> None:
    heads = load_file(written / HEADS)
    save_file({"weight": heads["weight"] + 1, "bias": heads["bias"]}, written / HEADS)
    with pytest.raises(InputError, match=r"heads\.safetensors.*was changed"):
        read_reward_model(written)
    (written / HEADS).unlink()
    with pytest.raises(InputError, match=r"heads\.safetensors cannot be read"):
        read_reward_model(written)


def test_a_reward_model_for_other_axes_or_another_base(written: Path, nf4: LoadedBase, recipe_of: Any) -> None:
    with pytest.raises(InputError, match="rates warm, short, and 'kind' is asked for"):
        read_reward_model(written, axes=["kind"])
    base = read_adapter(written).vector.identity
    assert base is not None
    other = type(base)(id="other", config_sha256="0" * 64)
    with pytest.raises(InputError, match="belongs to another base"):
        read_reward_model(written, base=other)
    with pytest.raises(InputError, match="rates warm, short, and 'safe' is asked for"):
        METHODS["dpa"].load(recipe_of(axes=["warm", "safe"], reward={"folder": str(written)}))


def test_an_adapter_is_no_reward_model(trained: Any) -> None:
    with pytest.raises(InputError, match="is no reward model"):
        read_reward_model(trained("two").folder)


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ({"axes": ["warm", "kind"]}, "no rating or sign for the objective 'kind'"),
        ({"reward": {"folder": "nowhere"}}, "nowhere"),
    ],
)
def test_what_is_wrong_is_told_before_a_base_is_loaded(method: dict[str, Any], said: str, recipe_of: Any) -> None:
    with pytest.raises(InputError, match=said):
        METHODS["dpa"].load(recipe_of(**method))


def test_replies_that_are_all_rated_alike() -> None:
    with pytest.raises(InputError, match="not rated apart on the axis 'warm'"):
        rewarding.scale([group("a", {"warm": 2.0}, {"warm": 2.0, "short": 1.0})], "warm")


# -- whole runs -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("made") / "both"


@pytest.fixture
def made(made_once: Path, recipe_of: Any, nf4: LoadedBase) -> Path:
    if not made_once.exists():
        train(recipe_of(), made_once, base=nf4)
    return made_once


def test_the_artifact_tells_how_it_is_asked_and_holds_its_reward_model(made: Path) -> None:
    facts = read_adapter(made).provenance
    assert facts is not None
    assert (facts.kind, facts.method, facts.sign) == ("conditional_adapter", "dpa", None)
    assert facts.condition is not None
    assert facts.condition.axes == {"short": (-0.71, 0.71), "warm": (0.7, 1.0)}
    assert [parent.name for parent in facts.parents] == ["both sft-0", "both reward"]
    assert {"reward.r2.warm", "reward.pearson.short", "value.sft-0", "value.sft-1"} <= facts.metrics.keys()
    before = read_adapter(made / "sft-0").provenance
    assert before is not None
    assert before.condition == facts.condition
    assert before.metrics.keys() == {"value"}
    _, reward = read_reward_model(made / "reward", axes=AXES)
    assert None not in (reward.data, reward.base)
    assert reward.weights_sha256 == facts.parents[1].sha256
    assert hidden(made.parent) == []


def test_a_head_is_a_scorer(made: Path, tiny_llama: Path, nf4: LoadedBase, recipe_of: Any) -> None:
    scorer = find_scorer(f"reward:{made / 'reward'}#short?base={tiny_llama}")
    prompts, replies = ["say red", "say blue"], ["no red", "blue my dear friend"]
    found = apply(scorer, prompts, replies)
    model, _ = read_reward_model(made / "reward", axes=["short"])
    rows = [([{"role": "user", "content": one}], said(other)) for one, other in zip(prompts, replies, strict=True)]
    training = recipe_of().training.model_copy(update={"max_reply_tokens": 512})
    expected = model.axes["short"][0] + model.axes["short"][1] * rewarding.rewards(nf4, model, rows, training)[:, 0]
    assert found == pytest.approx(expected.tolist(), rel=1e-3)
    with pytest.raises(InputError, match="rates no 'long'"):
        find_scorer(f"reward:{made / 'reward'}#long?base={tiny_llama}")
    with pytest.raises(InputError, match="is not on this machine"):
        find_scorer(f"reward:{made / 'reward'}#short")


def test_a_reward_model_is_trained_once(
    made: Path, recipe_of: Any, nf4: LoadedBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(HeadsTrainer, "__init__", never)
    shared = train(recipe_of(iterations=0), tmp_path / "shared", base=nf4).folder
    assert (shared / "reward" / HEADS).read_bytes() == (made / "reward" / HEADS).read_bytes()
    given = train(recipe_of(iterations=0, reward={"folder": str(made / "reward")}), tmp_path / "given", base=nf4)
    assert weights_hash(given.folder) == weights_hash(shared)
    probe = train(recipe_of(iterations=0, reward={"adapter": False}), tmp_path / "probe", base=nf4).folder
    model, _ = read_reward_model(probe / "reward")
    assert model.vector.norm() == 0


def test_a_cached_reward_model_that_was_changed_is_trained_again(
    made: Path, recipe_of: Any, nf4: LoadedBase, tmp_path: Path, cache: Path
) -> None:
    for file in cache.glob(f"reward/*/{HEADS}"):
        file.write_bytes(b"damaged")
    again = train(recipe_of(iterations=0), tmp_path / "again", base=nf4).folder
    assert (again / "reward" / HEADS).read_bytes() == (made / "reward" / HEADS).read_bytes()


@pytest.mark.parametrize("where", ["reward", "sampling", "rewards", "sft"])
def test_a_killed_run_goes_on_bit_for_bit(
    where: str, made: Path, recipe_of: Any, nf4: LoadedBase, tmp_path: Path, cache: Path, monkeypatch: Any
) -> None:
    def after(calls: int, original: Any) -> Any:
        counted = iter(range(calls))

        def call(*args: Any, **kwargs: Any) -> Any:
            if next(counted, None) is None:
                raise Stop
            return original(*args, **kwargs)

        return call

    stops: dict[str, tuple[Any, str, int]] = {
        "reward": (HeadsTrainer, "_compute_loss", 4),
        "sampling": (dpa, "generate", 3),  # held-out replies of sft-0, then two of the three pieces of sft-1
        "rewards": (dpa, "rewards", 1),
        "sft": (ReplyTrainer, "_compute_loss", 10),  # in the last step of sft-1
    }
    owner, name, calls = stops[where]
    with monkeypatch.context() as patch, pytest.raises(Stop):
        if where == "reward":
            shutil.rmtree(cache / "reward")
        patch.setattr(owner, name, after(calls, getattr(owner, name)))
        train(recipe_of(), tmp_path / "broken", base=nf4)
    resumed = train(recipe_of(), tmp_path / "broken", base=nf4, resume=True)
    whole = read_adapter(made).provenance
    assert whole is not None
    assert weights_hash(resumed.folder) == weights_hash(made)
    assert (resumed.folder / "reward" / HEADS).read_bytes() == (made / "reward" / HEADS).read_bytes()
    assert resumed.metrics == whole.metrics
    assert hidden(tmp_path) == []


def test_what_nobody_rated_the_reward_model_does(
    made: Path, recipe_of: Any, nf4: LoadedBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lora_prefvec.artifact import base_identity
    from lora_prefvec.training.run import Job

    recipe = recipe_of()
    job = Job(recipe, nf4, base_identity(recipe.base.id), tmp_path)
    model, _ = read_reward_model(made / "reward", axes=AXES)
    asked = [Asked(group("a", {"warm": 5.0, "short": 1.0}, {"warm": 5.0}), {"warm": 0.0, "short": 1.0})]
    for predicted, expected in ((-9.0, "a 0"), (9.0, "a 1")):
        monkeypatch.setattr(dpa, "rewards", lambda *given, value=predicted: torch.full((len(given[2]), 2), value))
        assert dpa.best_rated(job, model, asked)[0][0]["content"] == expected


def test_prompts_that_are_too_long_are_left_out(recipe_of: Any, nf4: LoadedBase) -> None:
    recipe = recipe_of()
    groups = METHODS["dpa"].load(recipe)
    groups.train[0].prompt[0]["content"] = "word " * 600
    prepared = METHODS["dpa"].prepare(recipe, groups, nf4)
    assert len(prepared.groups.train) == len(groups.train) - 1


def test_the_trainer_minimises_the_error_of_its_heads(recipe_of: Any, nf4: LoadedBase, tmp_path: Path) -> None:
    recipe = recipe_of()
    groups = METHODS["dpa"].load(recipe).train
    scales = {axis: rewarding.scale(groups, axis) for axis in AXES}
    rows = rewarding.prepare(groups, scales, nf4, recipe.training)
    weight, bias = torch.randn(2, nf4.model.config.hidden_size) * 0.1, torch.tensor([0.5, -0.5])
    made = HeadsTrainer(nf4, recipe.lora, recipe.training, rows.rows.dataset, tmp_path, weight, bias)
    try:
        batch = made.data_collator([made.train_dataset[i] for i in range(4)])
        loss = made._compute_loss(made.model, batch, False).item()
        states = final_states(nf4, rows.ids[:4])
        expected = squared_error(states @ weight.T + bias, rows.values[:4]).item()
        assert loss == pytest.approx(expected, rel=0.02)
    finally:
        made.release()
    assert not hasattr(nf4.model, "heads")
