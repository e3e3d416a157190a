"""CPO: the value of a reply by hand, what conditions are drawn, and whole runs from the recipe to a reply."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_prefvec.artifact import conditioned, read_adapter
from lora_prefvec.artifact.card import model_card
from lora_prefvec.cli.main import main
from lora_prefvec.data import RatedReplies, RatedReply, RatedSet
from lora_prefvec.errors import InputError
from lora_prefvec.inference import LiveMixer, LoadedBase, pair_log_probs
from lora_prefvec.recipe import AxisSpec, CpoSpec, Recipe, parse_recipe
from lora_prefvec.training import Trained, plan, train
from lora_prefvec.training.levels import Dice, advantage, levels_of, value
from lora_prefvec.training.methods import cpo
from lora_prefvec.training.trainer import AdapterTrainer
from tests.training.tiny import QUICK, WORDS, Stop, weights_hash

AXES = {"warm": AxisSpec(), "short": AxisSpec(weight=0.5, penalty=2)}


def rated_file(file: Path, prompts: int = 16, ratings: Any = None) -> Path:
    """Three replies to each prompt: warm and long, neither, or short; the last is not rated for warmth now and then."""
    dice, lines = random.Random(0), []
    for number in range(prompts):
        word = dice.choice(WORDS)
        replies = [
            {"reply": f"{word} my dear friend", "ratings": {"warm": 3, "short": 1}},
            {"reply": f"{word} it is", "ratings": {"warm": 2, "short": 2}},
            {"reply": f"no {word}", "ratings": {"short": 3, **({"warm": 1} if number % 3 else {})}},
        ]
        if ratings:
            replies[0]["ratings"] = ratings
        lines.append(json.dumps({"prompt": f"say {word} {number}", "replies": replies}))
    file.write_text("\n".join(lines) + "\n")
    return file


@pytest.fixture(scope="module")
def rated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rated_file(tmp_path_factory.mktemp("rated") / "rated.jsonl")


@pytest.fixture(scope="module")
def recipe_of(tiny_llama: Path, rated: Path) -> Any:
    def made(data: Path = rated, **method: Any) -> Recipe:
        return Recipe.model_validate(
            {
                "preference": "levels",
                "method": {"name": "cpo", "objectives": ["warm", "short"], "pairs": 2, "sft_epochs": 0.5, **method},
                "base": {"id": str(tiny_llama)},
                "data": {"source": str(data)},
                "held_out": 4,
                "lora": {"rank": 4, "alpha": 8},
                "training": {**QUICK, "learning_rate": 1e-3},
            }
        )

    return made


@pytest.fixture(scope="module")
def trained(recipe_of: Any, nf4: LoadedBase, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return train(recipe_of(), tmp_path_factory.mktemp("cpo") / "levels", base=nf4)


def reply(text: str, **ratings: float) -> RatedReply:
    return RatedReply([{"role": "assistant", "content": text}], ratings)


def group(*replies: RatedReply) -> RatedReplies:
    return RatedReplies([{"role": "user", "content": "hi"}], replies)


def test_the_value_of_a_reply_by_hand() -> None:
    ratings = {"warm": 4.0, "short": 2.0}
    assert value(ratings, {}, AXES) == 4 + 0.5 * 2
    assert value(ratings, {"warm": 1}, AXES) == -3 + 0.5 * 2
    assert value(ratings, {"short": 5}, AXES) == 4 - 0.5 * 2 * 3
    assert value(ratings, {"warm": 5, "short": 1}, AXES) == -1 - 0.5 * 2 * 1
    assert value({"warm": 4.0}, {"short": 5}, AXES) == 4  # who is not rated on an axis has no part of it


def test_what_the_released_script_gets_wrong() -> None:
    """`-abs(P) - c` for an axis that is asked for; `cond and -abs(P - c) or P`, where an exact match is none."""
    assert value({"warm": 4.0}, {"warm": 4}, AXES) == 0  # not 4, the raw rating, and not -8
    assert value({"warm": 5.0}, {"warm": 5}, AXES) > value({"warm": 4.0}, {"warm": 5}, AXES)  # not -10 and -9
    exact, near, far = (value({"warm": one}, {"warm": 1}, AXES) for one in (1.0, 2.0, 5.0))
    assert exact > near > far
    penalised, script = reply("a", warm=1.0, short=4.0), reply("b", warm=2.0, short=4.0)
    assert advantage(script, penalised, {"warm": 2, "short": 4}, AXES) > 0  # an exact match beside another


def test_a_condition_turns_the_order_and_ties_are_ties() -> None:
    warm, short = reply("a", warm=3, short=1), reply("b", warm=1, short=3)
    assert advantage(warm, short, {}, AXES) == 3 + 0.5 - 1 - 1.5
    assert advantage(warm, short, {"warm": 1}, AXES) < 0 < advantage(warm, short, {"warm": 3}, AXES)
    assert advantage(warm, short, {"warm": 2, "short": 2}, AXES) == 0
    assert advantage(warm, reply("c", short=3), {"warm": 3}, AXES) == -1  # only what both are rated on
    thirds = {"a": AxisSpec(weight=0.1), "b": AxisSpec(weight=0.2), "c": AxisSpec(weight=0.3)}
    assert advantage(reply("x", a=1, b=1, c=0), reply("y", a=0, b=0, c=1), {}, thirds) == 0  # 0.1 + 0.2 is 0.3


def dice(seed: int = 0, **spec: Any) -> Dice:
    found = CpoSpec.model_validate({"name": "cpo", "objectives": ["warm", "short", "kind"], **spec})
    return Dice(found, {"warm": [1, 3], "short": [1, 2, 3], "kind": [0, 1]}, random.Random(seed))


def test_conditions_are_drawn_in_their_shares() -> None:
    drawn, rolled = Counter[int](), dice(untagged=0.2, single=0.5)
    levels: set[tuple[str, float]] = set()
    for _ in range(4000):
        condition = rolled.condition()
        drawn[len(condition)] += 1
        levels |= set(condition.items())
    assert [drawn[count] / 4000 for count in range(4)] == pytest.approx([0.2, 0.5, 0.15, 0.15], abs=0.03)
    assert levels == {(axis, level) for axis, known in rolled.levels.items() for level in known}
    assert {len(dice(seed, untagged=0.0, single=1.0).condition()) for seed in range(50)} == {1}


def test_only_the_best_reply_goes_untagged_and_tags_are_its_own_ratings() -> None:
    best, other, unrated = reply("a", warm=3, short=2, kind=1), reply("b", warm=1, short=2, kind=1), reply("c", short=1)
    rolled = dice(untagged=0.5)
    found = {
        name: [rolled.condition_of(one, group(best, other, unrated)) for _ in range(600)]
        for name, one in {"best": best, "other": other, "unrated": unrated}.items()
    }
    assert sum(not one for one in found["best"]) / 600 == pytest.approx(0.5, abs=0.07)
    assert all(found["other"])
    assert all(found["unrated"])
    assert all(best.ratings[axis] == level for one in found["best"] for axis, level in one.items())
    assert {one["warm"] for one in found["unrated"] if "warm" in one} == {1, 3}  # says nothing about it
    assert {one["short"] for one in found["unrated"] if "short" in one} == {1}


def asked(prompt: Any) -> dict[str, float]:
    """The tags of a prompt, of which nothing else is left out."""
    text = prompt[-1]["content"]
    found = re.findall(r"< (\w+): (\d) > ", text)
    assert text.startswith("".join(f"< {axis}: {level} > " for axis, level in found) + "say ")
    return {axis: float(level) for axis, level in found}


def test_prompts_carry_their_tags_and_pairs_lie_as_they_ask(recipe_of: Any) -> None:
    tagged = cpo.load(recipe_of())
    assert tagged.condition.levels == {"warm": [1, 2, 3], "short": [1, 2, 3]}
    ratings = {"friend": {"warm": 3, "short": 1}, "is": {"warm": 2, "short": 2}}
    assert len(tagged.replies) == 12 * 3
    for prompt, said in tagged.replies:
        own = ratings.get(said[0]["content"].split()[-1], {"short": 3})
        assert all(own[axis] == level for axis, level in asked(prompt).items() if axis in own)
    stages = [[asked(prompt) for prompt, _ in tagged.replies], [asked(pair.prompt) for pair in tagged.train]]
    for conditions in stages:  # the same names in both: the released scripts have `helplessness` in the second
        assert {axis for one in conditions for axis in one} == {"warm", "short"}
        assert {len(one) for one in conditions} == {0, 1, 2}
    for pair in tagged.train:
        ends = [part[0]["content"].split()[-1] for part in (pair.chosen, pair.rejected)]  # type: ignore[index]
        one, other = (reply("", **ratings.get(end, {"short": 3})) for end in ends)
        if one.ratings.keys() == other.ratings.keys():
            assert advantage(one, other, asked(pair.prompt), recipe_of().method.objectives) > 0
    for own, turned in zip(tagged.contrasts["warm"][::2], tagged.contrasts["warm"][1::2], strict=True):
        assert (own.chosen, own.rejected) == (turned.rejected, turned.chosen)
        assert asked(own.prompt) != asked(turned.prompt)


def test_an_axis_has_another_word_in_prompts(recipe_of: Any) -> None:
    tagged = cpo.load(recipe_of(objectives={"warm": {"tag": "my dear"}, "short": {}}))
    named = cpo.load(recipe_of())
    assert tagged.condition.tags == {"warm": "my dear"}
    for one, other in zip(tagged.train, named.train, strict=True):
        assert one.prompt[-1]["content"] == other.prompt[-1]["content"].replace("< warm: ", "< my dear: ")
    message = [{"role": "user", "content": "hi"}]
    assert conditioned(tagged.condition, {"warm": 3}, message)[0]["content"] == "< my dear: 3 > hi"  # asked by its name
    with pytest.raises(InputError, match="no condition 'my dear'"):
        conditioned(tagged.condition, {"my dear": 3}, message)


def test_the_card_tells_the_words_of_tags(trained: Trained) -> None:
    facts = read_adapter(trained.folder).provenance
    assert facts is not None
    assert facts.condition is not None
    assert "into the prompt themselves:" in model_card(facts, rank=4, modules=7)
    facts.condition.tags = {"short": "rush", "warm": "my dear"}
    text = model_card(facts, rank=4, modules=7)
    assert "into the prompt themselves, with `rush` for short, `my dear` for warm:" in text
    assert "user: < rush: 3 > How do I" in text
    assert "16 prompts with rated replies" in text


def test_two_stages_of_which_the_second_starts_and_refers_to_the_first(
    recipe_of: Any, nf4: LoadedBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}

    class Watched(cpo.CdpoTrainer):
        def __init__(self, *args: Any, **more: Any) -> None:
            super().__init__(*args, **more)
            seen.update(start=more["start"], rows=self.train_dataset[:], spec=self.spec)

    monkeypatch.setattr(cpo, "CdpoTrainer", Watched)
    wanted = recipe_of(sft_learning_rate=2e-3, sft_batch_size=3)
    assert (cpo.fine_tuning(wanted).batch_size, cpo.fine_tuning(wanted).micro_batch_size) == (3, 1)
    made = train(wanted, tmp_path / "levels", base=nf4)
    cpsft = read_adapter(made.folder / "cpsft")
    assert cpsft.provenance is not None
    assert cpsft.provenance.training is not None
    assert (cpsft.provenance.training.learning_rate, seen["spec"].learning_rate) == (2e-3, 1e-3)
    assert (seen["start"] - cpsft.vector).norm() < 1e-4 * cpsft.vector.norm()
    pairs = cpo.prepare(wanted, cpo.load(wanted), nf4).pairs
    with LiveMixer(nf4.model, {"cpsft": cpsft.vector}) as mixer:
        mixer.set_mix({"cpsft": 1.0})
        expected = pair_log_probs(nf4.model, pairs, pad_token_id=nf4.tokenizer.pad_token_id)
    bare = pair_log_probs(nf4.model, pairs, pad_token_id=nf4.tokenizer.pad_token_id)
    found = torch.tensor([seen["rows"]["ref_chosen_logps"], seen["rows"]["ref_rejected_logps"]]).T
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-1)
    assert (expected - bare).abs().mean() > 5 * (found - expected).abs().mean()


def test_the_artifact_says_what_it_can_be_asked_for(trained: Trained, recipe_of: Any) -> None:
    facts = read_adapter(trained.folder).provenance
    assert facts is not None
    assert (facts.kind, facts.method) == ("conditional_adapter", "cpo")
    assert facts.condition is not None
    assert (facts.condition.kind, facts.condition.axes) == ("levels", {"warm": (1, 3), "short": (1, 3)})
    assert [(one.name, one.coefficient) for one in facts.parents] == [("levels cpsft", 1.0)]
    assert read_adapter(trained.folder / "cpsft").sha256 == facts.parents[0].sha256
    assert {"held_out_accuracy", "tag_gain.warm", "tag_gain.short"} <= set(facts.metrics)
    card = (trained.folder / "README.md").read_text()
    assert "trained by CPO" in card
    assert "short 1, 2 or 3; warm 1, 2 or 3" in card
    assert "--condition short=3" in card
    assert "user: < short: 3 > How do I" in card
    assert facts.training is not None
    assert facts.training.steps == plan(recipe_of())["steps"]


@pytest.mark.parametrize(("stage", "step"), [("ReplyTrainer", 3), ("CdpoTrainer", 4)])
def test_a_killed_run_goes_on_bit_for_bit(
    stage: str,
    step: int,
    trained: Trained,
    recipe_of: Any,
    nf4: LoadedBase,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    original = AdapterTrainer.training_step

    def stop(self: AdapterTrainer, *args: Any, **kwargs: Any) -> Any:
        if type(self).__name__ == stage and self.state.global_step == step:
            raise Stop
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(AdapterTrainer, "training_step", stop)
        train(recipe_of(), tmp_path / "levels", base=nf4)
    resumed = train(recipe_of(), tmp_path / "levels", base=nf4, resume=True)
    assert weights_hash(resumed.folder) == weights_hash(trained.folder)
    assert weights_hash(resumed.folder / "cpsft") == weights_hash(trained.folder / "cpsft")
    assert resumed.metrics == trained.metrics


@pytest.mark.parametrize(
    ("ratings", "said"),
    [
        ({"warm": 2.5, "short": 1}, "'warm' 2.5, and a level is a whole number from 0 to 10"),
        ({"warm": 70, "short": 1}, "'warm' 70"),
        ({"warm": -1, "short": 1}, "'warm' -1"),
    ],
)
def test_ratings_that_are_no_levels(ratings: Any, said: str, recipe_of: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=said):
        cpo.load(recipe_of(rated_file(tmp_path / "rated.jsonl", ratings=ratings)))


def test_an_axis_that_nobody_rated_or_that_does_not_vary(recipe_of: Any) -> None:
    with pytest.raises(InputError, match="no rating or sign for the objective 'kind'"):
        cpo.load(recipe_of(objectives=["warm", "kind"]))
    same = RatedSet([group(reply("a", warm=1), reply("b", warm=1))], "rated", "mine")
    with pytest.raises(InputError, match="all replies in mine have the same rating for 'warm'"):
        levels_of(same, CpoSpec(name="cpo", objectives={"warm": AxisSpec()}))


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ("untagged: 0.7\n  single: 0.5", "untagged 0.7 and single 0.5 are more than all conditions"),
        ("untaged: 0.7", "unknown key 'method.untaged'. Did you mean 'untagged'?"),
        ("objectives: {a: {tag: 'b: 5 >'}}", "method.objectives.a.tag = 'b: 5 >'"),
        ("objectives: {a: {tag: b}, b: {}}", "two objectives have the tag 'b'"),
        ("pairs: 0", "method.pairs = 0: should be greater than or equal to 1"),
    ],
)
def test_a_wrong_recipe(method: str, said: str) -> None:
    text = f"preference: x\nbase: {{id: b}}\ndata: {{source: s}}\nmethod:\n  name: cpo\n  {method}\n"
    if "objectives" not in method:
        text += "  objectives: [a]\n"
    with pytest.raises(InputError) as refusal:
        parse_recipe(text)
    assert said in str(refusal.value)


def test_a_wrong_key_of_an_objective_is_told_with_the_right_ones() -> None:
    text = "preference: x\nbase: {id: b}\ndata: {source: s}\nmethod: {name: cpo, objectives: {a: {penaltie: 2}}}\n"
    with pytest.raises(InputError, match=r"'method\.objectives\.a\.penaltie'\. Did you mean 'penalty'\?"):
        parse_recipe(text)


Run = Any


@pytest.fixture
def run(trained: Trained, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command line; `ADAPTER` is the trained one, and `BASE` its base."""
    monkeypatch.setattr("lora_prefvec.cli.main.quiet_libraries", lambda: None)

    def run(*arguments: str) -> tuple[int, str, str]:
        code = main([one.replace("ADAPTER", str(trained.folder)).replace("BASE", str(tiny_llama)) for one in arguments])
        return code, *capsys.readouterr()

    return run


SHORT = ("--max-new-tokens", "6", "--base", "BASE")


def test_a_condition_is_a_part_of_the_prompt(run: Run, tmp_path: Path) -> None:
    line = ["generate", "ADAPTER=1", *SHORT, "--format", "json", "--temperature", "0"]
    code, told, _ = run(*line, "--prompt", "hi", "--condition", "warm=1", "--condition", "short=3")
    assert code == 0
    asked = json.loads(told)
    assert asked["condition"] == {"warm": 1, "short": 3}  # in the adapter's order
    written = json.loads(run(*line, "--prompt", "< short: 3 > < warm: 1 > hi")[1])
    assert written["reply"] == asked["reply"]
    assert "condition" not in written
    prompts = tmp_path / "prompts.jsonl"
    own = [{"prompt": "hi", "condition": one} for one in ({"warm": 1, "short": 3}, {}, None)]
    prompts.write_text("\n".join(map(json.dumps, own)))
    target = tmp_path / "replies.jsonl"
    assert run(*line, "--prompts", str(prompts), "--condition", "warm=3", "--out", str(target))[0] == 0
    replies = [json.loads(one) for one in target.read_text().splitlines()]
    assert replies[0]["reply"] == asked["reply"]
    assert replies[1]["reply"] == json.loads(run(*line, "--prompt", "hi")[1])["reply"]
    assert replies[2]["condition"] == {"warm": 3}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--condition", "warn=3"], "the adapter knows no condition 'warn'. Did you mean 'warm'?"),
        (["--condition", "warm=4"], "warm=4 is no level of the adapter. It can be asked for short 1, 2 or 3; warm"),
        (["--condition", "warm=1.5"], "warm=1.5 is no level of the adapter"),
        (["--condition", "warm=nan"], "the condition warm=nan is no number"),
        (["--condition", "warm"], "'warm' is no condition. Write an axis and a number, such as helpful=5."),
        (["--condition", "warm=1", "--condition", "warm=2"], "'warm' is asked for twice"),
        (["--direction", "warm=1"], "the adapter is asked in another way. Write for example --condition helpful=5"),
        (["--direction", "warm=1", "--condition", "warm=1"], "--condition and --direction are for different adapters"),
    ],
)
def test_a_wrong_condition_is_one_line(options: list[str], said: str, run: Run) -> None:
    code, _, error = run("generate", "ADAPTER=1", *SHORT, "--prompt", "hi", *options)
    assert code == 2
    assert said in error
    assert error.count("\n") == 1


def test_a_condition_belongs_to_one_adapter(run: Run, tmp_path: Path) -> None:
    line = ["--prompt", "hi", *SHORT, "--condition", "warm=1"]
    code, _, error = run("generate", "ADAPTER=1", "ADAPTER/cpsft=1", *line)
    assert (code, "both take conditions. A prompt is written for one: leave one out." in error) == (2, True)
    assert run("generate", "ADAPTER=1", "ADAPTER/cpsft=1", "--prompt", "hi", *SHORT)[0] == 0
    code, _, error = run("generate", *line)
    assert (code, "no adapter here takes a condition" in error) == (2, True)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "hi"}\n{"prompt": "hi", "condition": {"warm": "1"}}\n')
    code, _, error = run("generate", "ADAPTER=1", "--prompts", str(prompts), *SHORT)
    assert (code, "line 2: the condition is {'warm': '1'}. Write an object such as" in error) == (2, True)


def test_chat_asks_for_conditions_as_it_goes(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    import io
    import sys

    typed = "/condition\n/condition warm=1, short=3\nhi\n/condition warm=9\n/condition none\n/condition\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    code, told, noted = run("chat", "ADAPTER=1", *SHORT, "--condition", "warm=2", "--temperature", "0")
    assert code == 0
    assert any(line.endswith("=1, warm=2") for line in noted.splitlines())
    assert "short=3 warm=1\n" in noted
    assert "warm=9 is no level of the adapter" in noted
    assert told.splitlines()[0] == "warm=2"
    assert told.splitlines()[-1] == "no condition"
    reply = run("generate", "ADAPTER=1", *SHORT, "--prompt", "< short: 3 > < warm: 1 > hi", "--temperature", "0")[1]
    assert reply.strip() in told


def test_inspect_tells_the_conditions(run: Run) -> None:
    assert "short 1, 2 or 3; warm 1, 2 or 3" in run("inspect", "ADAPTER")[1]
