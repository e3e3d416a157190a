"""Methods that weigh objectives while they train: their losses and gradients by hand, and whole runs."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.nn import functional as F

from lora_prefvec.artifact import read_adapter
from lora_prefvec.errors import InputError
from lora_prefvec.inference import LoadedBase, RenderedPair, pair_log_probs
from lora_prefvec.recipe import Recipe
from lora_prefvec.training import adapter as adapters
from lora_prefvec.training import train
from lora_prefvec.training.methods import METHODS
from lora_prefvec.training.methods.bfpo import strength
from lora_prefvec.training.methods.raco import RacoTrainer, read_steps, solve
from lora_prefvec.training.objectives import ObjectivesTrainer
from lora_prefvec.training.rows import PreparedRows
from tests.training.tiny import QUICK, WORDS, Stop, weights_hash, write_pairs

WEIGHTS = {"warm": 0.3, "short": 0.7}


def rated_file(file: Path, rows: int = 40, signs: Any = None) -> Path:
    """Two replies to each prompt: warm and long, or short; now one and now the other comes first."""
    dice = random.Random(0)
    lines = []
    for number in range(rows):
        word = dice.choice(WORDS)
        replies = [
            {"reply": f"{word} my dear friend", "ratings": {"warm": 5, "short": 1, "safe": number % 2}},
            {"reply": f"no {word}", "ratings": {"warm": 1, "short": dice.choice([1, 5]), "safe": 1}},
        ]
        dice.shuffle(replies)
        lines.append(json.dumps({"prompt": f"say {word} {number}", "replies": replies}))
    file.write_text("\n".join(lines) + "\n")
    return file


@pytest.fixture(scope="module")
def rated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rated_file(tmp_path_factory.mktemp("rated") / "rated.jsonl")


@pytest.fixture
def recipe_of(tiny_llama: Path, rated: Path) -> Any:
    def made(method: dict[str, Any], data: Path = rated, **training: Any) -> Recipe:
        return Recipe.model_validate(
            {
                "preference": "both",
                "method": method,
                "base": {"id": str(tiny_llama)},
                "data": {"source": str(data)},
                "held_out": 8,
                "lora": {"rank": 4, "alpha": 8},
                "training": {**QUICK, **training},
            }
        )

    return made


def prepared(recipe: Recipe, base: LoadedBase) -> PreparedRows:
    method = METHODS[recipe.method.name]
    found: PreparedRows = method.prepare(recipe, method.load(recipe), base)
    return found


@contextmanager
def trainer_of(recipe: Recipe, base: LoadedBase, folder: Path) -> Iterator[ObjectivesTrainer]:
    """A trainer whose adapter has moved a little."""
    rows = prepared(recipe, base)
    if recipe.method.name == "raco":
        made: ObjectivesTrainer = RacoTrainer(base, recipe.lora, recipe.training, recipe.method, rows.dataset, folder)
    else:
        made = ObjectivesTrainer(base, recipe.lora, recipe.training, rows.rows.weights, rows.dataset, folder)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in adapters.trainable(made.model).items():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05
    try:
        yield made
    finally:
        made.release()


def batches(trainer: ObjectivesTrainer, size: int, count: int) -> list[dict[str, Tensor]]:
    rows = trainer.train_dataset
    return [trainer.data_collator([rows[size * i + j] for j in range(size)]) for i in range(count)]


def gradients_of(losses: Tensor, trainer: ObjectivesTrainer) -> list[Tensor]:
    parameters = list(adapters.trainable(trainer.model).values())
    found = [torch.autograd.grad(loss, parameters, retain_graph=True) for loss in losses]
    return [torch.cat([one.flatten() for one in each]) for each in found]


@pytest.mark.parametrize("sft_weight", [0.0, 0.5])
def test_the_loss_of_each_objective_by_hand(sft_weight: float, recipe_of: Any, nf4: LoadedBase, tmp_path: Path) -> None:
    wanted = recipe_of({"name": "dpo_lw", "objectives": WEIGHTS}, sft_weight=sft_weight, beta=0.3)
    with trainer_of(wanted, nf4, tmp_path) as trainer:
        rows = [trainer.train_dataset[i] for i in range(6)]
        found = trainer.objective_losses(trainer.model, trainer.data_collator(rows)).detach()
        pairs = [RenderedPair(*(one[name] for name in ("prompt_ids", "chosen_ids", "rejected_ids"))) for one in rows]
        policy = pair_log_probs(trainer.model, pairs, pad_token_id=256)
    reference = torch.tensor([[one["ref_chosen_logps"], one["ref_rejected_logps"]] for one in rows])
    difference = (policy - reference) @ torch.tensor([1.0, -1.0])
    signs = torch.tensor([one["signs"] for one in rows])
    assert {0.0, 1.0} <= set(signs[:, 1].tolist())  # ties are there
    expected = -F.logsigmoid(0.3 * signs * difference[:, None])
    for row, (one, pair) in enumerate(zip(rows, pairs, strict=True)):
        for place, sign in enumerate(one["signs"]):
            if sign:
                side = 0 if sign > 0 else 1
                tokens = len((pair.chosen_ids, pair.rejected_ids)[side])
                expected[row, place] += sft_weight * -policy[row, side] / tokens
    torch.testing.assert_close(found, expected.mean(dim=0), rtol=1e-3, atol=1e-3)


def test_a_row_is_turned_to_what_the_weights_prefer(recipe_of: Any, nf4: LoadedBase) -> None:
    rows = prepared(recipe_of({"name": "dpo_lw", "objectives": WEIGHTS}), nf4).rows
    seen = {tuple(row.signs) for row in rows.train}
    assert seen == {(-1.0, 1.0), (1.0, 0.0)}
    for row in rows.train:
        assert row.pair.chosen[0]["content"].startswith("no") == (row.signs == (-1.0, 1.0))  # type: ignore[index]


def test_each_objective_with_pairs_of_its_own(recipe_of: Any, nf4: LoadedBase, pairs: Path, tmp_path: Path) -> None:
    other = write_pairs(tmp_path / "other.jsonl", rows=20, seed=1)
    objectives = {
        "one": {"weight": 0.5, "data": {"source": str(pairs)}},
        "two": {"weight": 0.5, "data": {"source": str(other)}},
    }
    wanted = recipe_of({"name": "raco", "objectives": objectives})
    wanted = wanted.model_copy(update={"data": None})
    rows = prepared(wanted, nf4)
    signs = torch.tensor(rows.dataset["signs"])
    assert torch.equal(signs.isnan().sum(dim=1), torch.ones(len(signs), dtype=torch.long))
    with trainer_of(wanted, nf4, tmp_path / "run") as trainer:
        every = [trainer.train_dataset[i] for i in range(len(trainer.train_dataset))]
        whole = trainer.objective_losses(trainer.model, trainer.data_collator(every))
        for place in (0, 1):  # the mean over its own pairs alone
            own = [row for row in every if not math.isnan(row["signs"][place])]
            alone = trainer.objective_losses(trainer.model, trainer.data_collator(own))[place] * trainer._share[place]
            torch.testing.assert_close(whole[place], alone, rtol=1e-3, atol=1e-3)
    made = train(wanted, tmp_path / "out", base=nf4)
    facts = read_adapter(made.folder).provenance
    assert facts is not None
    assert [(one.name, one.weight, one.data.id if one.data else None) for one in facts.objectives] == [
        ("one", 0.5, pairs.name),
        ("two", 0.5, other.name),
    ]


@pytest.mark.parametrize("solved", ["step", "micro_batch"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_gradient_of_raco_is_the_corrected_sum(
    solved: str, checkpointing: bool, recipe_of: Any, nf4: LoadedBase, tmp_path: Path
) -> None:
    method = {"name": "raco", "objectives": WEIGHTS, "c": 0.8, "solve": solved}
    wanted = recipe_of(method, sft_weight=0.1, gradient_checkpointing=checkpointing)
    with trainer_of(wanted, nf4, tmp_path) as trainer:
        parts = batches(trainer, 4, 2)
        trainer.current_gradient_accumulation_steps = 2
        g = [gradients_of(trainer.objective_losses(trainer.model, part) / 2, trainer) for part in parts]
        trainer.model.zero_grad()
        for number, part in enumerate(parts):
            trainer.accelerator.gradient_state._set_sync_gradients(number == 1)
            trainer.training_step(trainer.model, part)
        found = torch.cat([one.grad.flatten() for one in adapters.trainable(trainer.model).values()])
        assert isinstance(trainer, RacoTrainer)
        logged = [one["micro_batch"] for one in read_steps(trainer._steps)]
        assert logged == ([1] if solved == "step" else [0, 1])

    def corrected(gradients: Tensor) -> Tensor:
        step = solve(gradients @ gradients.T, torch.tensor(list(WEIGHTS.values())), 0.8)
        assert step.coefficients.tolist() != list(WEIGHTS.values())
        return step.coefficients.float() @ gradients

    each = [torch.stack(one) for one in g]
    expected = corrected(each[0] + each[1]) if solved == "step" else corrected(each[0]) + corrected(each[1])
    assert (found - expected).norm() < 1e-3 * expected.norm()


def test_raco_without_a_radius_is_dpo_lw(recipe_of: Any, nf4: LoadedBase, tmp_path: Path) -> None:
    raco = train(recipe_of({"name": "raco", "objectives": WEIGHTS, "c": 0}), tmp_path / "raco", base=nf4)
    lw = train(recipe_of({"name": "dpo_lw", "objectives": WEIGHTS}), tmp_path / "lw", base=nf4)
    far = train(recipe_of({"name": "raco", "objectives": WEIGHTS, "c": 0.9}), tmp_path / "far", base=nf4)
    apart = [(one.vector - lw.vector).norm() / lw.vector.norm() for one in (raco, far)]
    assert apart[0] < 0.05  # Adam makes much of a rounding
    assert apart[1] > 0.1


def test_the_artifact_tells_what_was_weighed_and_how_often_gradients_conflicted(
    recipe_of: Any, nf4: LoadedBase, tmp_path: Path
) -> None:
    made = train(recipe_of({"name": "raco", "objectives": WEIGHTS}), tmp_path / "raco", base=nf4)
    facts = read_adapter(made.folder).provenance
    assert facts is not None
    assert (facts.kind, facts.method, facts.sign) == ("preference_adapter", "raco", None)
    assert {one.name: one.weight for one in facts.objectives} == WEIGHTS
    assert {"held_out_accuracy.warm", "held_out_accuracy.short", "interior_share", "cosine.warm.short"} <= set(
        facts.metrics
    )
    assert facts.metrics["p_star.warm"] + facts.metrics["p_star.short"] == pytest.approx(1)  # type: ignore[operator]
    card = (made.folder / "README.md").read_text()
    assert "warm 0.3, short 0.7" in card


def test_a_killed_raco_run_goes_on_bit_for_bit(
    recipe_of: Any, nf4: LoadedBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = recipe_of({"name": "raco", "objectives": WEIGHTS})
    whole = train(wanted, tmp_path / "whole", base=nf4)
    original = RacoTrainer.training_step

    def stop(self: RacoTrainer, *args: Any, **kwargs: Any) -> Tensor:
        if self.state.global_step == 4:
            raise Stop
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(RacoTrainer, "training_step", stop)
        train(wanted, tmp_path / "broken", base=nf4)
    resumed = train(wanted, tmp_path / "broken", base=nf4, resume=True)
    assert weights_hash(resumed.folder) == weights_hash(whole.folder)
    assert resumed.metrics == whole.metrics
    logs = [(one.folder / "conflicts.jsonl").read_text() for one in (whole, resumed)]
    assert logs[0] == logs[1]
    steps = [json.loads(line) for line in logs[0].splitlines()]
    assert [one["step"] for one in steps] == list(range(6))
    assert all(sum(one["p_star"]) == pytest.approx(1) and one["norms"] for one in steps)


def test_an_objective_with_anchors_of_its_own(recipe_of: Any, nf4: LoadedBase, pairs: Path, tmp_path: Path) -> None:
    other = write_pairs(tmp_path / "other.jsonl", rows=20, seed=1)
    anchors = {"source": str(write_pairs(tmp_path / "anchors.jsonl", rows=7, seed=2)), "share": 0.5}
    objectives = {
        "one": {"weight": 0.5, "data": {"source": str(pairs)}},
        "two": {"weight": 0.5, "data": {"source": str(other)}, "anchors": anchors},
    }
    wanted = recipe_of({"name": "dpo_lw", "objectives": objectives}).model_copy(update={"data": None, "held_out": 0})
    signs = torch.tensor(prepared(wanted, nf4).dataset["signs"])
    assert int((~signs[:, 1].isnan()).sum()) == 40  # as many anchors as pairs, each used again
    facts = read_adapter(train(wanted, tmp_path / "out", base=nf4).folder).provenance
    assert facts is not None
    assert [one.anchors and (one.anchors.id, one.anchors.rows) for one in facts.objectives] == [
        None,
        ("anchors.jsonl", 7),
    ]
    with pytest.raises(ValidationError, match="anchors go with an objective's own data"):
        recipe_of({"name": "raco", "objectives": {"one": {"weight": 0.5, "anchors": anchors}, "two": 0.5}})


def test_modpo_takes_the_frozen_margins_off(recipe_of: Any, nf4: LoadedBase, tmp_path: Path) -> None:
    frozen = train(
        recipe_of({"name": "dpo_lw", "objectives": {"warm": 1.0, "short": 0.0}}), tmp_path / "warm", base=nf4
    )
    method = {"name": "modpo", "objectives": WEIGHTS, "main": "short", "margins": {"warm": str(frozen.folder)}}
    rows = prepared(recipe_of(method), nf4)
    assert set(rows.dataset["strength"]) == {1 / 0.7}
    from lora_prefvec.training.rows import adapter_margins

    pairs = [
        RenderedPair(*(one[name] for name in ("prompt_ids", "chosen_ids", "rejected_ids"))) for one in rows.dataset
    ]
    reference = torch.tensor([[one["ref_chosen_logps"], one["ref_rejected_logps"]] for one in rows.dataset])
    margins = adapter_margins(nf4, frozen.vector, pairs, reference)
    torch.testing.assert_close(torch.tensor(rows.dataset["offset"]), 0.3 * margins)
    strong = prepared(recipe_of(method, beta=0.4), nf4)  # the margin counts with the beta of its own training, 0.1
    torch.testing.assert_close(torch.tensor(strong.dataset["offset"]), 0.3 * margins / 4)
    assert train(recipe_of(method), tmp_path / "modpo", base=nf4).metrics["held_out_accuracy.short"] is not None


def test_bfpo_strengths_are_those_of_the_paper() -> None:
    assert [strength(*safe, 0.5) for safe in ((True, True), (True, False), (False, True), (False, False))] == [
        1.0,
        0.5,
        -0.5,
        -1.0,
    ]


def test_bfpo_and_safe_first_look_at_safety(recipe_of: Any, nf4: LoadedBase) -> None:
    safety = {"axis": "safe", "at_least": 1}
    bfpo = prepared(recipe_of({"name": "bfpo", "main": "warm", "safety": safety}), nf4)
    assert set(bfpo.dataset["strength"]) == {1.0, -0.5}  # warm and safe; warm and unsafe beside a safe one
    first = prepared(recipe_of({"name": "safe_first", "main": "warm", "safety": safety}), nf4).rows
    warm_wins = [row.pair.chosen[0]["content"].startswith("no") for row in first.train]  # type: ignore[index]
    assert {True, False} == set(warm_wins)


def test_sft_leaves_the_rejected_replies_alone(recipe_of: Any, nf4: LoadedBase, pairs: Path, tmp_path: Path) -> None:
    wanted = recipe_of({"name": "sft"}, data=pairs, sft_weight=1.0)
    with trainer_of(wanted, nf4, tmp_path) as trainer:
        (batch,) = batches(trainer, 4, 1)
        other = {name: value.clone() for name, value in batch.items()}
        other["ref_rejected_logps"] += 7
        losses = [trainer.objective_losses(trainer.model, one).item() for one in (batch, other)]
    assert losses[0] == losses[1]
    assert losses[0] > math.log(2)


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ({"name": "dpo_lw", "objectives": {"warm": 0.5, "kind": 0.5}}, "no rating or sign for the objective 'kind'"),
        ({"name": "bfpo", "main": "safety", "safety": {"axis": "safe", "at_least": 1}}, "objective 'safety'"),
        (
            {"name": "bfpo", "main": "warm", "safety": {"axis": "harmless", "at_least": 1}},
            "no rating or sign for the objective 'harmless'",
        ),
        (
            {"name": "modpo", "objectives": WEIGHTS, "main": "warm", "margins": {"short": "nowhere"}},
            "nowhere",
        ),
    ],
)
def test_what_is_wrong_is_told_before_a_base_is_loaded(method: dict[str, Any], said: str, recipe_of: Any) -> None:
    recipe = recipe_of(method)
    with pytest.raises(InputError, match=said):
        METHODS[recipe.method.name].load(recipe)


def test_sft_without_its_weight_is_refused(recipe_of: Any) -> None:
    with pytest.raises(ValueError, match=r"training\.sft_weight"):
        recipe_of({"name": "sft"})


def test_an_objective_without_a_pair(recipe_of: Any, tmp_path: Path) -> None:
    rows = [{"prompt": "p", "chosen": "a", "rejected": "b", "signs": {"warm": 1, "short": 0}}] * 12
    file = tmp_path / "signed.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(InputError, match="no pair tells which reply is better for the objective 'short'"):
        METHODS["dpo_lw"].load(recipe_of({"name": "dpo_lw", "objectives": WEIGHTS}, data=file))


def test_gradients_are_reduced_over_all_processes(
    recipe_of: Any, nf4: LoadedBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reduced = []

    class Two:
        num_processes = 2

        def reduce(self, gradient: Tensor, how: str) -> Tensor:
            reduced.append(how)
            return (gradient + 3 * gradient) / 2  # the other process has three times as much

    wanted = recipe_of({"name": "raco", "objectives": WEIGHTS})
    with trainer_of(wanted, nf4, tmp_path) as trainer:
        assert isinstance(trainer, RacoTrainer)
        (part,) = batches(trainer, 4, 1)
        flat = gradients_of(trainer.objective_losses(trainer.model, part), trainer)
        parameters = list(adapters.trainable(trainer.model).values())
        sizes = [parameter.numel() for parameter in parameters]
        each = [[one.view_as(like) for one, like in zip(g.split(sizes), parameters, strict=True)] for g in flat]
        trainer.model.zero_grad()
        monkeypatch.setattr(trainer, "accelerator", Two())
        trainer._write(parameters, each)
        found = torch.cat([parameter.grad.flatten() for parameter in parameters if parameter.grad is not None])
    assert reduced == ["mean"] * len(parameters) * 2
    g = 2 * torch.stack(flat)
    step = solve(g @ g.T, torch.tensor(list(WEIGHTS.values())), 0.4)
    torch.testing.assert_close(found, step.coefficients.float() @ g, rtol=1e-3, atol=1e-6)
