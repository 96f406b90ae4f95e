"""What all samplers share: the times of their steps and the random numbers of a step."""

from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vqd_scale.core.errors import UserError
from vqd_scale.core.rng import Purpose
from vqd_scale.diffusion.noise import uniforms
from vqd_scale.diffusion.transition import MaskAndReplace


@dataclass(frozen=True)
class SamplingStep:
    """Times of one step: what the network is told, and between which times the posterior is taken."""

    network_time: int
    t: int
    s: int


@dataclass(frozen=True)
class SamplerNoise:
    """The random numbers of one step, for all its images.

    Attributes:
        seed: The seed.
        slots: The images' global numbers, int64 [batch].
        length: Tokens of an image.
        draw: The number of the step.
    """

    seed: int
    slots: Int[Tensor, " batch"]
    length: int
    draw: int

    def uniforms(self, purpose: Purpose) -> Float[Tensor, "batch length"]:
        """One float64 number per token: a codebook's tail needs the digits."""
        return uniforms(self.seed, purpose, self.slots, self.length, draw=self.draw, dtype=torch.float64)

    def gumbel(self, states: int) -> Float[Tensor, "batch length states"]:
        """One float32 Gumbel number per token and state, as the reference draws them."""
        drawn = uniforms(self.seed, Purpose.GUMBEL, self.slots, self.length * states, draw=self.draw)
        return -torch.log(-torch.log(drawn.view(-1, self.length, states) + 1e-30) + 1e-30)


@dataclass(frozen=True)
class SamplerContext:
    """What a step knows besides the tokens and the prediction.

    Attributes:
        transition: The chain.
        step: The times.
        noise: The random numbers.
        free: Which tokens are to be found; the others are known.
        first_masks: How many free tokens were masked when sampling began.
        first: The time at which it began.
    """

    transition: MaskAndReplace
    step: SamplingStep
    noise: SamplerNoise
    free: Bool[Tensor, "batch length"]
    first_masks: Int[Tensor, " batch"]
    first: int

    def masked_share(self, time: int) -> float:
        """Of the masks that sampling began with, the share that the schedule still has at ``time``."""
        rates = self.transition.rates
        return float(rates.at(time).mask / rates.at(self.first).mask)


def even_steps(transition: MaskAndReplace, first: int, steps: int) -> list[SamplingStep]:
    """Equal strides from ``first`` to -1; image-to-image takes its share of the steps.

    Raises:
        UserError: More steps than the schedule has.
    """
    check_steps(transition, steps)
    span = first + 1
    count = max(1, round(steps * span / transition.steps))
    times = [first - number * span // count for number in range(count + 1)]
    return [SamplingStep(t, t, s) for t, s in pairwise(times)]


def check_steps(transition: MaskAndReplace, steps: int) -> None:
    """Compare a sampler's number of steps with the schedule's.

    Raises:
        UserError: There are more.
    """
    if steps > transition.steps:
        raise UserError(
            f"sampler.steps: given {steps}; the schedule has {transition.steps}, take at most those."
        )
