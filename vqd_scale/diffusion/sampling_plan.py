"""Sampling steps, their times, and their random numbers; shared by all samplers."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol, TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vqd_scale.core.errors import UserError
from vqd_scale.core.rng import Purpose
from vqd_scale.diffusion.noise import uniforms
from vqd_scale.diffusion.transition import MaskAndReplace, PerToken, Tokens

LogProbabilities: TypeAlias = Float[Tensor, "batch length codes"]


@dataclass(frozen=True)
class SamplingStep:
    """Times of one step: the network's timestep, and the posterior's times ``t`` and ``s``."""

    network_time: int
    t: int
    s: int


@dataclass(frozen=True)
class SamplerNoise:
    """Random numbers of one sampling step, for all images of a batch.

    Attributes:
        seed: Random seed.
        slots: Global image numbers, int64 [batch].
        length: Tokens per image.
        draw: Index of the sampling step.
    """

    seed: int
    slots: Int[Tensor, " batch"]
    length: int
    draw: int

    def uniforms(self, purpose: Purpose) -> PerToken:
        """Return one uniform number per token; float64, as rare codes need the precision."""
        return uniforms(self.seed, purpose, self.slots, self.length, draw=self.draw, dtype=torch.float64)

    def gumbel(self, states: int) -> Float[Tensor, "batch length states"]:
        """Return one float32 Gumbel number per token and state, as in the reference code."""
        count = self.length * states
        uniform_numbers = uniforms(self.seed, Purpose.GUMBEL, self.slots, count, draw=self.draw)
        return -torch.log(-torch.log(uniform_numbers.view(-1, self.length, states) + 1e-30) + 1e-30)


@dataclass(frozen=True)
class SamplerContext:
    """Inputs of a sampling step besides the tokens and the prediction.

    Attributes:
        transition: Forward chain of the diffusion.
        step: Times of the step.
        noise: Random numbers of the step.
        free: True for tokens to generate, false for known (inpainting) tokens.
        first_masks: Number of masked free tokens at the start of sampling.
        first: Time at which sampling starts.
    """

    transition: MaskAndReplace
    step: SamplingStep
    noise: SamplerNoise
    free: Bool[Tensor, "batch length"]
    first_masks: Int[Tensor, " batch"]
    first: int

    def masked_fraction(self, time: int) -> float:
        """Return the schedule's masked fraction at ``time``, relative to the start of sampling."""
        rates = self.transition.rates
        return float(rates.at(time).mask / rates.at(self.first).mask)


class Sampler(Protocol):
    """Sampler: the steps from noise to the clean image, and the tokens after each step.

    A sampler is a class with these members, and a configuration in `vqd_scale.diffusion.config`.
    """

    @property
    def starts_masked(self) -> bool:
        """``True`` if sampling starts from masks only, whatever the schedule's prior is."""
        ...

    def plan(self, transition: MaskAndReplace, first: int) -> list[SamplingStep]:
        """Return the steps from time ``first`` to the clean image."""
        ...

    def advance(self, tokens: Tokens, log_p: LogProbabilities, context: SamplerContext) -> Tokens:
        """Return the tokens after one step, given log p(x_0 | x_t)."""
        ...


def even_steps(transition: MaskAndReplace, first: int, steps: int) -> list[SamplingStep]:
    """Divide the times from ``first`` to -1 into equal strides.

    Image-to-image takes a proportional part of the steps.

    Raises:
        UserError: ``steps`` exceeds the schedule's number of steps.
    """
    check_steps(transition, steps)
    span = first + 1
    count = max(1, round(steps * span / transition.steps))
    times = [first - number * span // count for number in range(count + 1)]
    return [SamplingStep(t, t, s) for t, s in pairwise(times)]


def check_steps(transition: MaskAndReplace, steps: int) -> None:
    """Raise a `UserError` if ``steps`` exceeds the schedule's number of steps."""
    if steps > transition.steps:
        raise UserError(
            f"sampler.steps: {steps} exceeds the {transition.steps} steps of the schedule; give fewer."
        )
