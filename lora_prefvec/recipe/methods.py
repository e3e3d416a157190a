"""What a recipe says of the method that it trains by: one section for each, told apart by its `name`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from lora_prefvec.recipe.sections import AnchorSpec, DataSpec, Section

OBJECTIVE = r"^[a-z0-9]+([-_][a-z0-9]+)*$"
TagWord = Annotated[str, Field(pattern=r"^\w[\w -]{0,39}$")]  # none of the signs that close a tag
MOST_OBJECTIVES = 8


class ObjectiveSpec(Section):
    """One of the wishes that are weighed against each other; in YAML its weight alone says all, where it has no pairs.

    Without `data` of its own, an objective is a rating of the replies in the recipe's `data`: it prefers what is rated
    higher there. With `data`, it is learned from these pairs, and the others have no say in them; `anchors` are further
    pairs of its own, whose sign nothing swaps here.
    """

    weight: float = Field(ge=0, le=1)
    data: DataSpec | None = None
    anchors: AnchorSpec | None = None

    @model_validator(mode="after")
    def _anchors_beside_pairs(self) -> ObjectiveSpec:
        if self.anchors and not self.data:
            raise ValueError("anchors go with an objective's own data, and it has none")
        return self


class PreferenceVectorSpec(Section):
    """Preference Vectors (arXiv 2504.20106): DPO on labels as given and swapped; see `training.sides`."""

    name: Literal["preference_vector"] = "preference_vector"


class WeightedSpec(Section):
    """What all methods share that weigh objectives while they train; the weights sum to 1."""

    objectives: Annotated[dict[str, ObjectiveSpec], Field(min_length=2, max_length=MOST_OBJECTIVES)]

    @field_validator("objectives", mode="before")
    @classmethod
    def _weights_alone(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        return {
            name: {"weight": one} if isinstance(one, int | float) and not isinstance(one, bool) else one
            for name, one in given.items()
        }

    @model_validator(mode="after")
    def _weights_sum_to_one(self) -> WeightedSpec:
        total = sum(self.weights.values())
        if abs(total - 1) > 1e-6:
            shown = ", ".join(f"{name} {weight:g}" for name, weight in self.weights.items())
            raise ValueError(f"the weights of the objectives ({shown}) sum to {total:g}, not to 1")
        return self

    @property
    def weights(self) -> dict[str, float]:
        """Objective -> weight."""
        return {name: one.weight for name, one in self.objectives.items()}

    @property
    def brings_data(self) -> bool:
        """Whether all objectives that train have pairs of their own, so that a recipe needs no `data`."""
        return all(one.data for one in self.objectives.values())


class DpoLwSpec(WeightedSpec):
    """DPO with a loss weight for each objective: sum of w_i L_i."""

    name: Literal["dpo_lw"]


class RacoSpec(WeightedSpec):
    """RACO (arXiv 2602.02495): conflict-averse gradients, clipped by the weights.

    `c` is the radius of the correction, as a part of the weighted gradient's length: 0 is DPO-LW. `clip: false` is
    CAGrad with user weights. `solve` says which gradient is corrected: that of a whole step, or of each micro-batch.
    """

    name: Literal["raco"]
    c: float = Field(default=0.4, ge=0, lt=1)
    clip: bool = True
    solve: Literal["step", "micro_batch"] = "step"


class ModpoSpec(WeightedSpec):
    """MODPO (arXiv 2310.03708): DPO on one objective, with margins from frozen adapters of the others.

    `main` is the objective whose pairs train; `margins` names an adapter for each of the others.
    """

    name: Literal["modpo"]
    main: str
    margins: dict[str, str]

    @model_validator(mode="after")
    def _one_main_objective(self) -> ModpoSpec:
        if self.main not in self.objectives:
            raise ValueError(f"the main objective {self.main!r} is none of {', '.join(self.objectives)}")
        if self.weights[self.main] == 0:
            raise ValueError(f"the main objective {self.main!r} has weight 0, and its margins are divided by that")
        others = self.objectives.keys() - {self.main}
        if self.margins.keys() != others:
            raise ValueError(f"margins has to name one adapter for each of: {', '.join(sorted(others))}")
        return self

    @property
    def brings_data(self) -> bool:
        """Whether the main objective, which alone trains, has pairs of its own."""
        return self.objectives[self.main].data is not None


class SafetySpec(Section):
    """When a reply counts as safe: its rating on `axis` is `at_least` so much."""

    axis: str = Field(default="harmless", pattern=OBJECTIVE)
    at_least: float


class BfpoSpec(Section):
    """BFPO (arXiv 2408.15313) in its DPO form: `main` decides, and safety sets strength and direction of each pair.

    beta' = (beta / 2) / (1.5 I(chosen) - 0.5 I(rejected) - alpha), I being 1 for a safe reply and 0 for another.
    """

    name: Literal["bfpo"]
    main: str = Field(default="helpful", pattern=OBJECTIVE)
    safety: SafetySpec
    alpha: float = 0.5

    @model_validator(mode="after")
    def _no_pole(self) -> BfpoSpec:
        if min(abs(value - self.alpha) for value in (0.0, 1.0, 1.5, -0.5)) < 1e-3:
            raise ValueError(f"alpha {self.alpha:g} divides by zero for some pairs; the paper takes 0.5")
        return self


class SafeFirstSpec(Section):
    """DPO-safe-first: `main` decides between two safe replies, and otherwise the safer one is chosen."""

    name: Literal["safe_first"]
    main: str = Field(default="helpful", pattern=OBJECTIVE)
    safety: SafetySpec


class SftSpec(Section):
    """Fine-tuning on the chosen replies of pairs."""

    name: Literal["sft"]


class AxisSpec(Section):
    """An axis of CPO: omega and lambda of its part omega_i g_i in the value of a reply.

    A condition counts `penalty` for each level that a reply is off. The paper's example has 1 for both; an axis that
    pulls against the others, such as brevity against help, is followed only where its condition counts for more. `tag`
    is the word for the axis in a prompt, its name unless told otherwise: one that the base knows is learned far faster.
    """

    weight: float = Field(default=1.0, gt=0)
    penalty: float = Field(default=1.0, gt=0)
    tag: TagWord | None = None


class CpoSpec(Section):
    """CPO (arXiv 2402.19085): an adapter whose prompt asks for levels of some axes, by tags.

    `objectives` are the ratings that become axes, as a list of names or with weights. A condition names no axis in
    `untagged` of all draws, and so asks for the best; one axis in `single` of them; and otherwise several. A third each
    is the paper's mixture on UltraFeedback (24,000 rows of each sort). Levels are drawn from those seen in the data.
    Each prompt gives `pairs` pairs, in the paper about one. Fine-tuning has a rate, a length and batches of its own,
    and takes those of `training` where they are left out; the paper gives both stages three epochs, and fine-tuning
    larger batches.
    """

    name: Literal["cpo"]
    objectives: Annotated[dict[str, AxisSpec], Field(min_length=1, max_length=MOST_OBJECTIVES)]
    untagged: float = Field(default=1 / 3, ge=0, lt=1)
    single: float = Field(default=1 / 3, ge=0, le=1)
    pairs: int = Field(default=1, ge=1)
    sft_learning_rate: float | None = Field(default=None, gt=0)
    sft_epochs: float | None = Field(default=None, gt=0)
    sft_batch_size: int | None = Field(default=None, gt=0)

    @field_validator("objectives", mode="before")
    @classmethod
    def _names_alone(cls, given: Any) -> Any:
        return {name: {} for name in given} if isinstance(given, list) else given

    @property
    def tags(self) -> dict[str, str]:
        """Axis -> its word in a prompt, where that is not its name."""
        return {name: one.tag for name, one in self.objectives.items() if one.tag}

    @model_validator(mode="after")
    def _a_tag_for_each(self) -> CpoSpec:
        words = [self.tags.get(name, name) for name in self.objectives]
        if twice := next((word for word in words if words.count(word) > 1), None):
            raise ValueError(f"two objectives have the tag {twice!r}")
        return self

    @model_validator(mode="after")
    def _shares_of_one(self) -> CpoSpec:
        if self.untagged + self.single > 1 + 1e-9:
            raise ValueError(f"untagged {self.untagged:g} and single {self.single:g} are more than all conditions")
        return self


class RewardSpec(Section):
    """DPA's reward model: a linear head for each axis, and an adapter of the size that `lora` gives.

    The heads begin as the least-squares solution on the bare base, and then train together with the adapter; without
    `adapter` they stay there, which costs one pass over the data. `folder` names a reward model that is there already.
    """

    folder: str | None = None
    adapter: bool = True
    learning_rate: float = Field(default=1e-4, gt=0)
    epochs: float = Field(default=1.0, gt=0)


class DpaSpec(Section):
    """DPA (arXiv 2402.18571): a direction in the prompt, learned from the best of n replies to it, again and again.

    `axes` are ratings of the replies in the recipe's `data`, with 1 where more is better and -1 where less is; the
    first is the main one. Directions are drawn up to `cone` degrees away from it: the paper's angles go from -45 to 45
    around helpfulness. `iterations` rounds of rejection sampling follow the round on the rated replies, 4 in the paper;
    each draws `prompts` of the data, with a direction and `samples` replies for each. The paper does not tell how many
    samples; their quantiles in a standard normal say that the best of 16 lies at 1.8 standard deviations on average,
    and the best of 64 at 2.3. A `temperature` of 1 samples from the policy itself.

    The prompt names the components of a direction in hundredths, as the paper's does, or each as one of `grades` from
    1 on, `< concise: 4 > < helpful: 2 > `: for a base that knows a few numbers and no sign.
    """

    name: Literal["dpa"]
    axes: Annotated[dict[str, Literal[1, -1]], Field(min_length=2, max_length=MOST_OBJECTIVES)]
    cone: float = Field(default=45.0, gt=0, le=90)
    grades: int | None = Field(default=None, ge=2, le=100)
    iterations: int = Field(default=4, ge=0, le=20)
    prompts: int = Field(default=1000, gt=0)
    samples: int = Field(default=16, ge=2)
    temperature: float = Field(default=1.0, gt=0)
    reward: RewardSpec = RewardSpec()

    @field_validator("axes", mode="before")
    @classmethod
    def _names_alone(cls, given: Any) -> Any:
        return dict.fromkeys(given, 1) if isinstance(given, list) else given


MethodSpec = Annotated[
    PreferenceVectorSpec | DpoLwSpec | RacoSpec | ModpoSpec | BfpoSpec | SafeFirstSpec | SftSpec | CpoSpec | DpaSpec,
    Field(discriminator="name"),
]
METHODS: dict[str, type[Section]] = {
    "preference_vector": PreferenceVectorSpec,
    "dpo_lw": DpoLwSpec,
    "raco": RacoSpec,
    "modpo": ModpoSpec,
    "bfpo": BfpoSpec,
    "safe_first": SafeFirstSpec,
    "sft": SftSpec,
    "cpo": CpoSpec,
    "dpa": DpaSpec,
}
