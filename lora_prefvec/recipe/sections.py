"""The sections that every recipe has: base, data, adapter, training."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Section(BaseModel):
    """A part of a recipe; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class BaseSpec(Section):
    """The frozen base: a folder, `sandbox` or a Hub id; `nf4` loads it in 4-bit."""

    id: str
    revision: str | None = None
    quantization: Literal["nf4", "none"] = "nf4"


class DataSpec(Section):
    """Preference pairs: a local file, `name:part` of an installed source, or a Hub id with optional @revision."""

    source: str
    split: str = "train"
    form: str | None = None
    columns: dict[str, str] | None = None
    attribute: str | None = None
    margin: float = Field(default=0.0, ge=0)
    rows: int | None = Field(default=None, gt=0)


class AnchorSpec(DataSpec):
    """Pairs on other prompts that hold behaviour where the preference has no say.

    `share` is the part of all training pairs that are anchors. `swapped` lets them change sign with the preference;
    held fixed, they ask the same of +v and of -v.
    """

    share: float = Field(default=0.5, gt=0, lt=1)
    swapped: bool = False


class LoraSpec(Section):
    """The adapter: W + (alpha / rank) B A on `targets` (all linear layers but the head, or a list of module names)."""

    rank: int = Field(default=16, ge=1, le=512)
    alpha: int = Field(default=32, ge=1)
    targets: Literal["all-linear"] | Annotated[list[str], Field(min_length=1)] = "all-linear"


class TrainingSpec(Section):
    """How the adapter is trained; `batch_size` pairs make one optimiser step, `micro_batch_size` one forward.

    A run trains its adapter at a coefficient of 1, and as often at `reach` where that is more: text then stays whole
    when the slider goes that far. d+ - d- is twice as long as either, so a pair needs twice the reach.
    """

    sides: Literal["two", "pair"] = "two"
    reach: float = Field(default=1.0, ge=1.0, le=8.0)
    beta: float = Field(default=0.1, gt=0)
    sft_weight: float = Field(default=0.0, ge=0)
    learning_rate: float = Field(default=1e-4, gt=0)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_ratio: float = Field(default=0.1, ge=0, lt=1)
    weight_decay: float = Field(default=0.0, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    epochs: float = Field(default=1.0, gt=0)
    max_steps: int | None = Field(default=None, gt=0)
    batch_size: int = Field(default=16, gt=0)
    micro_batch_size: int = Field(default=2, gt=0)
    max_prompt_tokens: int = Field(default=512, gt=0)
    max_reply_tokens: int = Field(default=512, gt=0)
    gradient_checkpointing: bool = True
    compute_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    seed: int = Field(default=0, ge=0, lt=2**31)
    evaluate_every: int | None = Field(default=None, gt=0)
    checkpoint_every: int = Field(default=50, gt=0)

    @model_validator(mode="after")
    def _fits_together(self) -> TrainingSpec:
        if self.batch_size % self.micro_batch_size:
            raise ValueError(f"micro_batch_size {self.micro_batch_size} does not divide batch_size {self.batch_size}")
        return self
