"""Sampling loop and samplers, from noise to tokens.

Every random number is a function of (seed, purpose, slot, step, position). An image therefore does not depend
on its batch, if ``predict`` returns the same predictions in every batch.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from vqd_scale.core.errors import UserError
from vqd_scale.core.rng import Purpose, sample_codes
from vqd_scale.core.watchdog import beat
from vqd_scale.diffusion.config import LegacyDiffusers, LegacyFast, SamplerConfig, Strided
from vqd_scale.diffusion.guidance import Predict
from vqd_scale.diffusion.sampling_plan import (
    LogProbabilities,
    Sampler,
    SamplerContext,
    SamplerNoise,
    SamplingStep,
    check_steps,
    even_steps,
)
from vqd_scale.diffusion.transition import MaskAndReplace, Tokens


@dataclass(frozen=True)
class KnownTokens:
    """Known tokens for inpainting, noised to each step's level as in training.

    Attributes:
        tokens: Tokens, int64 [batch, length], 0 to K-1 where known.
        is_known: True for tokens to keep.
    """

    tokens: Tokens
    is_known: Bool[Tensor, "batch length"]


@dataclass(frozen=True)
class Start:
    """Initial image for image-to-image, to which noise is added before sampling.

    Attributes:
        tokens: Tokens of the image, int64 [batch, length], 0 to K-1.
        strength: Fraction of the T noise steps that is added and removed, 0 < strength <= 1.
    """

    tokens: Tokens
    strength: float


class AncestralSampler:
    """Implementation of `Ancestral`."""

    starts_masked = False

    def plan(self, transition: MaskAndReplace, first: int) -> list[SamplingStep]:
        """Return the steps from time ``first`` to the clean image."""
        return [SamplingStep(t, t, t - 1) for t in range(first, -1, -1)]

    def advance(self, tokens: Tokens, log_p: LogProbabilities, context: SamplerContext) -> Tokens:
        """Sample x_s from x_t."""
        step = context.step
        posterior = context.transition.posterior(log_p.exp(), tokens, step.t, step.s)
        return sample_codes(posterior, context.noise.uniforms(Purpose.SAMPLING))


class StridedSampler(AncestralSampler):
    """Implementation of `Strided`."""

    def __init__(self, config: Strided) -> None:
        self.config = config

    def plan(self, transition: MaskAndReplace, first: int) -> list[SamplingStep]:
        """Return the steps from time ``first`` to the clean image.

        Raises:
            UserError: ``steps`` exceeds the schedule's number of steps.
        """
        return even_steps(transition, first, self.config.steps)


class _LegacySampler:
    """Base of the published fast samplers, which undo one step of noise at a time."""

    starts_masked = True

    def advance(self, tokens: Tokens, log_p: LogProbabilities, context: SamplerContext) -> Tokens:
        """Sample from one step's posterior, with Gumbel noise."""
        step = context.step
        posterior = context.transition.posterior(log_p.float().exp(), tokens, step.t, step.s)
        return (posterior.log() + context.noise.gumbel(posterior.shape[-1])).argmax(-1)


class LegacyFastSampler(_LegacySampler):
    """Implementation of `LegacyFast`."""

    def __init__(self, config: LegacyFast) -> None:
        self.config = config

    def plan(self, transition: MaskAndReplace, first: int) -> list[SamplingStep]:
        """Return the steps of the released code.

        Raises:
            UserError: Image-to-image is not supported.
        """
        _check_full_noise(transition, first, self.config.kind)
        times = list(range(first, -1, -self.config.speed))
        times += [] if times[-1] == 0 else [0]
        skipped = self.config.speed - 1
        posterior_times = [t - skipped if t > skipped else t for t in times]
        return [SamplingStep(time, t, t - 1) for time, t in zip(times, posterior_times, strict=True)]


class LegacyDiffusersSampler(_LegacySampler):
    """Implementation of `LegacyDiffusers`."""

    def __init__(self, config: LegacyDiffusers) -> None:
        self.config = config

    def plan(self, transition: MaskAndReplace, first: int) -> list[SamplingStep]:
        """Return the steps of diffusers.

        Raises:
            UserError: Image-to-image is not supported, or ``steps`` exceeds the schedule's number of steps.
        """
        _check_full_noise(transition, first, self.config.kind)
        check_steps(transition, self.config.steps)
        return [SamplingStep(t, t, t - 1) for t in range(self.config.steps - 1, -1, -1)]


@torch.no_grad()
def sample(
    predict: Predict,
    config: SamplerConfig,
    transition: MaskAndReplace,
    slots: Int[Tensor, " batch"],
    length: int,
    seed: int,
    *,
    known_tokens: KnownTokens | None = None,
    start: Start | None = None,
    on_step: Callable[[int, int], None] | None = None,
) -> Tokens:
    """Generate images as tokens.

    Args:
        predict: log p(x_0 | x_t), log-softmaxed; compose it with the functions of `guidance`.
        config: Configuration of the sampler that plans and computes the steps.
        transition: Forward chain of the training.
        slots: Global image numbers, int64; with ``seed`` they determine the random numbers. All computation
            runs on the device of ``slots``.
        length: Tokens per image.
        seed: Random seed, 0 to 2**32 - 1.
        known_tokens: Tokens to keep (inpainting).
        start: Initial image (image-to-image).
        on_step: Called after each step with the number of completed steps and the total.

    Returns:
        Tokens, int64, 0 to K-1.

    Raises:
        UserError: The sampler does not fit the schedule, the prediction has another number of codes or is not
            finite, or an input token is not a code.
    """
    first = transition.steps - 1 if start is None else _first_time(transition, start)
    sampler = config.build()
    plan = sampler.plan(transition, first)
    tokens = _initial_tokens(sampler, transition, SamplerNoise(seed, slots, length, draw=0), start, first)
    free = torch.ones_like(tokens, dtype=torch.bool) if known_tokens is None else ~known_tokens.is_known
    restore = _build_restore(transition, known_tokens, SamplerNoise(seed, slots, length, draw=1))
    tokens = restore(tokens, plan[0].t)
    first_masks = ((tokens == transition.mask) & free).sum(-1)
    all_finite = torch.ones((), dtype=torch.bool, device=slots.device)
    for number, step in enumerate(plan):
        beat()
        log_p = predict(tokens, step.network_time)
        transition.check_codes(log_p.shape[-1], "the network's prediction")
        all_finite = all_finite & log_p.amax(-1).isfinite().all()
        noise = SamplerNoise(seed, slots, length, number)
        context = SamplerContext(transition, step, noise, free, first_masks, plan[0].t)
        tokens = restore(sampler.advance(tokens, log_p, context), step.s)
        if on_step is not None:
            on_step(number + 1, len(plan))
    if not bool(all_finite):
        raise UserError("the network's prediction contains NaN or infinity; its weights are unusable.")
    return tokens


def _first_time(transition: MaskAndReplace, start: Start) -> int:
    if not 0 < start.strength <= 1:
        raise UserError(f"strength {start.strength}: give a fraction of the noise above 0 and up to 1.")
    transition.check_tokens(start.tokens, masks_allowed=False)
    return max(round(transition.steps * start.strength), 1) - 1


def _initial_tokens(
    sampler: Sampler, transition: MaskAndReplace, noise: SamplerNoise, start: Start | None, first: int
) -> Tokens:
    if start is not None:
        t = torch.full_like(noise.slots, first)
        return transition.corrupt(start.tokens, t, noise.uniforms(Purpose.CORRUPTION))
    if sampler.starts_masked:
        return noise.slots.new_full((len(noise.slots), noise.length), transition.mask)
    return transition.prior(noise.uniforms(Purpose.PRIOR))


def _build_restore(
    transition: MaskAndReplace, known_tokens: KnownTokens | None, noise: SamplerNoise
) -> Callable[[Tokens, int], Tokens]:
    """Return a function that restores known tokens, noised to a given time.

    A token's uniform number is the same at all times, so its noise is one path of the forward chain: a
    visible known token stays visible.
    """
    if known_tokens is None:
        return lambda tokens, time: tokens
    transition.check_tokens(known_tokens.tokens[known_tokens.is_known][None], masks_allowed=False)
    uniform_numbers = noise.uniforms(Purpose.CORRUPTION)

    def restore(tokens: Tokens, time: int) -> Tokens:
        noisy = transition.corrupt(known_tokens.tokens, torch.full_like(noise.slots, time), uniform_numbers)
        return torch.where(known_tokens.is_known, noisy, tokens)

    return restore


def _check_full_noise(transition: MaskAndReplace, first: int, kind: str) -> None:
    if first != transition.steps - 1:
        raise UserError(f"sampler.kind: {kind} cannot start from an image; use strided or ancestral.")
