"""How a row chooses its next token: the settings, and the choice for many rows at once."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lora_prefvec.errors import InputError

GREEDY_BELOW = 0.01  # temperatures below are greedy: there the second-best token is e^-100 x its gap in logits away
EDGE_MASS = 1e-6  # a token at the edge of top-k or top-p with less probability than this moves no draw


@dataclass(frozen=True)
class Sampling:
    """How a reply is drawn, and where it ends.

    Args:
        max_new_tokens: tokens at most; fewer where the context of the base ends before.
        temperature: 0 is greedy, 1 samples from the model's own distribution.
        top_p: samples come from the most likely tokens that hold this much of the probability.
        top_k: and from this many of them at most; 0 is all.
        seed: of the row's own random numbers.
        stop: texts that end a reply; they are no part of it.
        presence_penalty, frequency_penalty: taken from the logit of each token that the reply holds already, once and
            as often as it does, as OpenAI defines them.
        logit_bias: token -> what is added to its logit.
        logprobs: how many alternatives to report with each token; None reports no log-probabilities at all.

    Raises:
        InputError: a setting out of range.
    """

    max_new_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | str = 0
    stop: tuple[str, ...] = ()
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise InputError(f"{self.max_new_tokens} new tokens are no reply", "Take 1 or more.")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise InputError(
                f"the temperature {self.temperature} is not a number from 0 up", "0 is greedy, 1 samples plainly."
            )
        if not 0 < self.top_p <= 1:
            raise InputError(
                f"top-p {self.top_p} is not in (0, 1]", "1 leaves all tokens in, 0.9 the most likely ones."
            )
        if self.top_k < 0:
            raise InputError(f"top-k {self.top_k} is negative", "0 leaves all tokens in, 50 the 50 most likely ones.")
        if not all(self.stop):
            raise InputError("a stop text is empty", "Leave it out.")
        for name in ("presence_penalty", "frequency_penalty"):
            if not math.isfinite(getattr(self, name)):
                raise InputError(f"the {name} {getattr(self, name)} is not a finite number", "0 is none.")
        for token, bias in self.logit_bias.items():
            if token < 0 or not math.isfinite(bias):
                raise InputError(
                    f"the logit bias {bias} of token {token} is not a finite number of a token", "Take -100 to 100."
                )
        if self.logprobs is not None and self.logprobs < 0:
            raise InputError(f"{self.logprobs} alternatives cannot be reported", "Take 0 or more.")

    @property
    def greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW

    @property
    def adjusts(self) -> bool:
        """Whether it changes logits before a token is chosen."""
        return bool(self.logit_bias or self.presence_penalty or self.frequency_penalty)


def adjust(logits: Tensor, sampling: Sampling, tokens: Sequence[int]) -> Tensor:
    """The logits [vocabulary] of one row with its bias and the penalties on the reply's `tokens` so far."""
    if sampling.logit_bias:
        biased = torch.tensor(list(sampling.logit_bias), device=logits.device)
        logits = logits.index_add(0, biased, logits.new_tensor(list(sampling.logit_bias.values())))
    if tokens and (sampling.presence_penalty or sampling.frequency_penalty):
        counts = torch.bincount(torch.tensor(tokens, device=logits.device), minlength=len(logits))
        logits = logits - sampling.presence_penalty * (counts > 0) - sampling.frequency_penalty * counts
    return logits


def choose(
    logits: Tensor, samplings: Sequence[Sampling], numbers: Sequence[float], noise: float
) -> tuple[list[int], list[bool]]:
    """The next token of each row, and whether the choice was close.

    A choice is close if adding something of `noise` at most to each logit could change it. Such noise is the rounding
    that depends on the rows beside: see `ContinuousBatch`.

    Args:
        logits: [rows, vocabulary], float32, already adjusted.
        numbers: one from [0, 1) per row: what a sampled row is drawn with.
    """
    tokens = logits.argmax(-1)
    best = logits.topk(2).values
    close = best[:, 0] - best[:, 1] <= 2 * noise
    sampled = [row for row, sampling in enumerate(samplings) if not sampling.greedy]
    if sampled:
        rows = _places(sampled, len(samplings))
        drawn = _sample(logits[rows], [samplings[row] for row in sampled], [numbers[row] for row in sampled], noise)
        tokens[rows], close[rows] = drawn
    return tokens.tolist(), close.tolist()


def _sample(
    logits: Tensor, samplings: Sequence[Sampling], numbers: Sequence[float], noise: float
) -> tuple[Tensor, Tensor]:
    """Inverse transform sampling: the token into whose interval of the cumulative probability a row's number falls.

    Noise of e on each logit moves the log-odds of any cumulative probability by 2e / temperature at most: a choice is
    close if the number is no further than that from either end of the interval.
    """
    temperature = logits.new_tensor([sampling.temperature for sampling in samplings])[:, None]
    slack = 2 * noise / temperature
    weights = ((logits - logits.max(-1, keepdim=True).values) / temperature).exp()
    close = torch.zeros_like(slack, dtype=torch.bool)
    cut = [row for row, sampling in enumerate(samplings) if sampling.top_p < 1 or sampling.top_k]
    if cut:
        rows = _places(cut, len(samplings))
        weights[rows], close[rows] = _without_tail(weights[rows], [samplings[row] for row in cut], slack[rows])
    mass = weights.double().cumsum(-1)
    total = mass[:, -1:]
    drawn = torch.tensor(numbers, dtype=torch.float64, device=logits.device)[:, None] * total
    drawn = drawn.minimum(total.nextafter(torch.zeros_like(total)))  # less than all of it after rounding, too
    token = torch.searchsorted(mass, drawn, right=True)
    lower = mass.gather(-1, (token - 1).clamp(min=0)) * (token > 0)
    upper = mass.gather(-1, token)
    odds = _log_odds(drawn, total)
    close |= (odds - _log_odds(lower, total) <= slack) | (_log_odds(upper, total) - odds <= slack)
    return token[:, 0], close[:, 0]


def _without_tail(weights: Tensor, samplings: Sequence[Sampling], slack: Tensor) -> tuple[Tensor, Tensor]:
    """Sets what lies outside top-k, then outside top-p, to 0; and whether the edge of either was close. [rows, 1]"""
    size = weights.shape[-1]
    top_k = torch.tensor([sampling.top_k or size for sampling in samplings], device=weights.device)[:, None]
    top_p = torch.tensor([sampling.top_p for sampling in samplings], dtype=torch.float64, device=weights.device)[
        :, None
    ]
    ordered, order = weights.sort(descending=True)
    within_k = torch.arange(size, device=weights.device) < top_k
    mass = (ordered * within_k).double().cumsum(-1)
    total = mass[:, -1:]
    before = mass - ordered  # of the tokens that are more likely
    inside = within_k & (before < top_p * total)
    last = inside.sum(-1, keepdim=True) - 1
    outside = (last + 1).clamp(max=size - 1)
    lighter, heavier = ordered.gather(-1, outside).log(), ordered.gather(-1, last).log()
    swapped = (heavier - lighter <= slack) & (lighter + slack > (EDGE_MASS * total).log()) & (last + 1 < size)
    target = _log_odds(top_p * total, total)
    moved = (target - _log_odds(before.gather(-1, last), total) <= slack) | (
        _log_odds(mass.gather(-1, last), total) - target <= slack
    )
    kept = ordered.masked_fill(~inside, 0.0)
    return weights.scatter(-1, order, kept), swapped | (moved & (top_p < 1))


def _places(rows: list[int], count: int) -> list[int] | slice:
    """An index of these rows among so many; all of them need no copy."""
    return rows if len(rows) < count else slice(None)


def _log_odds(part: Tensor, total: Tensor) -> Tensor:
    return part.log() - (total - part).clamp(min=0).log()
