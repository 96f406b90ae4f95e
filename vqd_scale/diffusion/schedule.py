"""Noise schedules of the forward chain: parameters, and transition probabilities in float64.

Time ``t`` is 0-based: at ``t = 0`` one step of noise was added; ``-1`` is the clean image.
"""

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field, model_validator
from torch import Tensor
from typing_extensions import Self

from vqd_scale.core.config import Config


@dataclass(frozen=True)
class TransitionProbabilities:
    """Probabilities that a code is kept, resampled uniformly, or masked between two times.

    The three float64 tensors have the same shape and sum to 1. ``replace`` is the total probability of
    resampling (K times the papers' β); resampling may give the same code again. A masked token stays masked.
    """

    keep: Float[Tensor, " *times"]
    replace: Float[Tensor, " *times"]
    mask: Float[Tensor, " *times"]


class Released(Config):
    """Noise schedule of the public checkpoints: almost mask-only, ``replace`` is 1e-6 at every time.

    Source: the code released with VQ-Diffusion; the paper describes `Paper` instead.
    """

    kind: Literal["released"] = "released"
    steps: int = Field(default=100, ge=2)
    keep_first: float = Field(default=0.99999, gt=0, lt=1)
    keep_last: float = Field(default=0.000009, gt=0, lt=1)
    mask_first: float = Field(default=0.000009, gt=0, lt=1)
    mask_last: float = Field(default=0.99999, gt=0, lt=1)

    @model_validator(mode="after")
    def _rates_are_a_chain(self) -> Self:
        if self.keep_first + self.mask_first > 1 or self.keep_last + self.mask_last > 1:
            raise ValueError("keep and mask exceed 1 together; lower one of them")
        if self.keep_last >= self.keep_first or self.mask_last <= self.mask_first:
            raise ValueError("keep must fall and mask must rise from the first step to the last")
        return self

    @property
    def prior_mask(self) -> float:
        """Masked fraction of x_T; the reference code starts from masks only."""
        return 1.0

    def cumulative(self) -> TransitionProbabilities:
        """Return the probabilities from the clean image to each t, shape [steps]; linear in t."""
        fraction = torch.arange(self.steps, dtype=torch.float64) / (self.steps - 1)
        keep = self.keep_first + fraction * (self.keep_last - self.keep_first)
        mask = self.mask_first + fraction * (self.mask_last - self.mask_first)
        return TransitionProbabilities(keep, 1 - keep - mask, mask)


class Paper(Config):
    """Noise schedule of the VQ-Diffusion paper: mask 0 → ``mask_rate``, replace 0 → 1 - ``mask_rate``.

    ``mask_rate`` 1 is mask-only, 0 is replace-only: the paper's ablation (arXiv 2111.14822).
    """

    kind: Literal["paper"] = "paper"
    steps: int = Field(default=100, ge=1)
    mask_rate: float = Field(default=0.9, ge=0, le=1)

    @property
    def replace_rate(self) -> float:
        """Probability of resampling at the last time."""
        return 1 - self.mask_rate

    @property
    def prior_mask(self) -> float:
        """Masked fraction of x_T."""
        return self.mask_rate

    def cumulative(self) -> TransitionProbabilities:
        """Return the probabilities from the clean image to each t, shape [steps]."""
        noise = torch.arange(1, self.steps + 1, dtype=torch.float64) / self.steps
        return TransitionProbabilities(1 - noise, self.replace_rate * noise, self.mask_rate * noise)


class UniformCosine(Config):
    """Noise schedule of VQ-DDM: replacement only, along a squared cosine.

    Each step keeps a code with the square root of the squared cosine's ratio. ``offset`` keeps the first
    steps from being too small; ``min_ratio`` bounds the last one.
    Source: the code of VQ-DDM (arXiv 2112.01799), after Hoogeboom et al., arXiv 2102.05379.
    """

    kind: Literal["uniform_cosine"] = "uniform_cosine"
    steps: int = Field(default=4000, ge=1)
    offset: float = Field(default=0.008, gt=0)
    min_ratio: float = Field(default=0.001, gt=0, lt=1)

    @property
    def prior_mask(self) -> float:
        """Masked fraction of x_T."""
        return 0.0

    def cumulative(self) -> TransitionProbabilities:
        """Return the probabilities from the clean image to each t, shape [steps]."""
        fraction = torch.arange(self.steps + 1, dtype=torch.float64) / self.steps
        cosine = torch.cos((fraction + self.offset) / (1 + self.offset) * math.pi / 2) ** 2
        ratio = (cosine[1:] / cosine[:-1]).clamp(self.min_ratio, 1)
        log_keep = 0.5 * ratio.log().cumsum(0)
        return TransitionProbabilities(log_keep.exp(), -torch.expm1(log_keep), torch.zeros_like(log_keep))


class Absorbing(Config):
    """Mask-only noise schedule, linear from 0 to 1: MaskGIT and MDLM in this formulation.

    Source: the absorbing state of D3PM (arXiv 2107.03006).
    """

    kind: Literal["absorbing"] = "absorbing"
    steps: int = Field(default=100, ge=1)

    @property
    def prior_mask(self) -> float:
        """Masked fraction of x_T."""
        return 1.0

    def cumulative(self) -> TransitionProbabilities:
        """Return the probabilities from the clean image to each t, shape [steps]."""
        mask = torch.arange(1, self.steps + 1, dtype=torch.float64) / self.steps
        return TransitionProbabilities(1 - mask, torch.zeros_like(mask), mask)


Schedule = Annotated[Released | Paper | UniformCosine | Absorbing, Field(discriminator="kind")]


@dataclass(frozen=True)
class Rates:
    """Transition probabilities of a schedule between any two times, float64.

    Attributes:
        codes: K, the number of codes.
        prior_mask: Masked fraction of x_T; the other tokens of x_T are uniform codes.
        cumulative: Probabilities from the clean image to time ``index - 1``, shape [steps + 1]. Entry 0 is
            the clean image itself (keep 1), so no time needs a special case.
    """

    codes: int
    prior_mask: float
    cumulative: TransitionProbabilities

    @property
    def steps(self) -> int:
        """T, the number of noise steps."""
        return len(self.cumulative.keep) - 1

    def to(self, device: torch.device) -> "Rates":
        """Return a copy on another device."""
        chances = self.cumulative
        moved = TransitionProbabilities(
            chances.keep.to(device), chances.replace.to(device), chances.mask.to(device)
        )
        return Rates(self.codes, self.prior_mask, moved)

    def at(self, t: "int | Int[Tensor, ' *times']") -> TransitionProbabilities:
        """Return the probabilities from the clean image to ``t``, -1 <= t < T; float64, shape of ``t``."""
        chances = self.cumulative
        return TransitionProbabilities(chances.keep[t + 1], chances.replace[t + 1], chances.mask[t + 1])

    def between(
        self, t: "int | Int[Tensor, ' *times']", s: "int | Int[Tensor, ' *times']"
    ) -> TransitionProbabilities:
        """Return the probabilities from ``s`` to ``t``, -1 <= s < t < T; float64, shape of the times.

        Differences are taken between products of rates, not from 1, so a tiny ``replace`` keeps its
        precision.
        """
        start, end = self.at(s), self.at(t)
        visible = start.keep + start.replace
        replaced = end.replace * start.keep - end.keep * start.replace
        return TransitionProbabilities(
            keep=end.keep / start.keep,
            replace=(replaced / (visible * start.keep)).clamp(min=0),
            mask=(end.mask - start.mask) / visible,
        )


def rates_of(schedule: Schedule, codes: int) -> Rates:
    """Compute the rates of ``schedule`` over ``codes`` codes, on the CPU."""
    chances = schedule.cumulative()
    identity = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    return Rates(
        codes=codes,
        prior_mask=schedule.prior_mask,
        cumulative=TransitionProbabilities(
            keep=torch.cat([identity[:1], chances.keep]),
            replace=torch.cat([identity[1:2], chances.replace]),
            mask=torch.cat([identity[2:], chances.mask]),
        ),
    )
