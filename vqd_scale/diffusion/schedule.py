"""Noise schedules of the forward chain: parameters, and transition probabilities in float64.

Time ``t`` is 0-based: at ``t = 0`` one step of noise was added; ``-1`` is the clean image.
"""

from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vqd_scale.diffusion.config import Schedule

TimeOrTimes: TypeAlias = int | Int[Tensor, " *times"]


class TransitionProbabilities(NamedTuple):
    """Probabilities that a code is kept, resampled uniformly, or masked between two times.

    The three float64 tensors have the same shape and sum to 1. ``replace`` is the total probability of
    resampling (K times the papers' β); resampling may give the same code again. A masked token stays masked.
    """

    keep: Float[Tensor, " *times"]
    replace: Float[Tensor, " *times"]
    mask: Float[Tensor, " *times"]


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
        cumulative = TransitionProbabilities(*(values.to(device) for values in self.cumulative))
        return Rates(self.codes, self.prior_mask, cumulative)

    def at(self, t: TimeOrTimes) -> TransitionProbabilities:
        """Return the probabilities from the clean image to ``t``, -1 <= t < T; float64, shape of ``t``."""
        return TransitionProbabilities(*(values[t + 1] for values in self.cumulative))

    def between(self, t: TimeOrTimes, s: TimeOrTimes) -> TransitionProbabilities:
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
    clean = torch.tensor([[1.0], [0.0], [0.0]], dtype=torch.float64)
    cumulative = (torch.cat(pair) for pair in zip(clean, schedule.cumulative(), strict=True))
    return Rates(codes, schedule.prior_mask, TransitionProbabilities(*cumulative))
