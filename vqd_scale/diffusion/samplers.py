"""Sampling loop and samplers, from noise to tokens.

Every random number is a function of (seed, purpose, slot, step, position). An image therefore does not depend
on its batch, if ``predict`` returns the same predictions in every batch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor

from vqd_scale.core.config import Config
from vqd_scale.core.errors import UserError
from vqd_scale.core.rng import Purpose, drawn_codes
from vqd_scale.diffusion.guidance import Predict
from vqd_scale.diffusion.sampling_plan import (
    SamplerContext,
    SamplerNoise,
    SamplingStep,
    check_steps,
    even_steps,
)
from vqd_scale.diffusion.transition import MaskAndReplace
from vqd_scale.diffusion.unmasking import Confidence, Halton, Purity, Remask


@dataclass(frozen=True)
class KnownTokens:
    """Known tokens for inpainting, noised to each step's level as in training.

    Attributes:
        tokens: Tokens, int64 [batch, length], 0 to K-1 where known.
        known: True for tokens to keep.
    """

    tokens: Int[Tensor, "batch length"]
    known: Bool[Tensor, "batch length"]


@dataclass(frozen=True)
class Start:
    """Initial image for image-to-image, to which noise is added before sampling.

    Attributes:
        tokens: Tokens of the image, int64 [batch, length], 0 to K-1.
        strength: Fraction of the T noise steps that is added and removed, 0 < strength <= 1.
    """

    tokens: Int[Tensor, "batch length"]
    strength: float


class Ancestral(Config):
    """Ancestral sampling with all T steps."""

    kind: Literal["ancestral"] = "ancestral"
    starts_masked: ClassVar[bool] = False

    def plan(self, transition: MaskAndReplace, first: int) -> list[SamplingStep]:
        """Return the steps from time ``first`` to the clean image."""
        return [SamplingStep(t, t, t - 1) for t in range(first, -1, -1)]

    def advance(
        self,
        tokens: Int[Tensor, "batch length"],
        log_p: Float[Tensor, "batch length codes"],
        moment: SamplerContext,
    ) -> Int[Tensor, "batch length"]:
        """Sample x_s from x_t."""
        return _drawn_from_posterior(tokens, log_p, moment)


class Strided(Config):
    """Sampling with 1 to T steps, each from the exact posterior over its stride.

    Source: the fast inference of the VQ-Diffusion paper. Unlike `LegacyFast` and `LegacyDiffusers`, the
    sampler follows the noise schedule.
    """

    kind: Literal["strided"] = "strided"
    steps: int = Field(default=25, ge=1)
    starts_masked: ClassVar[bool] = False

    def plan(self, transition: MaskAndReplace, first: int) -> list[SamplingStep]:
        """Return the steps from time ``first`` to the clean image.

        Raises:
            UserError: ``steps`` exceeds the schedule's number of steps.
        """
        return even_steps(transition, first, self.steps)

    def advance(
        self,
        tokens: Int[Tensor, "batch length"],
        log_p: Float[Tensor, "batch length codes"],
        moment: SamplerContext,
    ) -> Int[Tensor, "batch length"]:
        """Sample x_s from x_t."""
        return _drawn_from_posterior(tokens, log_p, moment)


class LegacyFast(Config):
    """Fast sampling of the released code, for comparison only.

    The network receives t, but the posterior undoes one step at the earlier time t - (speed - 1). With speed
    4 a quarter of the tokens is still masked before the last step; use `Strided` instead.
    """

    kind: Literal["legacy_fast"] = "legacy_fast"
    speed: int = Field(default=4, ge=2)
    starts_masked: ClassVar[bool] = True

    def plan(self, transition: MaskAndReplace, first: int) -> list[SamplingStep]:
        """Return the steps of the released code.

        Raises:
            UserError: Image-to-image is not supported.
        """
        _check_whole(transition, first, self.kind)
        times = list(range(first, -1, -self.speed))
        times += [] if times[-1] == 0 else [0]
        skipped = self.speed - 1
        undone = [t - skipped if t > skipped else t for t in times]
        return [SamplingStep(told, t, t - 1) for told, t in zip(times, undone, strict=True)]

    def advance(
        self,
        tokens: Int[Tensor, "batch length"],
        log_p: Float[Tensor, "batch length codes"],
        moment: SamplerContext,
    ) -> Int[Tensor, "batch length"]:
        """Sample from one step's posterior, with Gumbel noise."""
        return _gumbel_from_posterior(tokens, log_p, moment)


class LegacyDiffusers(Config):
    """Fewer steps as in diffusers' VQDiffusionScheduler (the last times only), for comparison only.

    Sampling starts from masks only, at a time when most tokens should be visible; use `Strided` instead.
    """

    kind: Literal["legacy_diffusers"] = "legacy_diffusers"
    steps: int = Field(default=100, ge=1)
    starts_masked: ClassVar[bool] = True

    def plan(self, transition: MaskAndReplace, first: int) -> list[SamplingStep]:
        """Return the steps of diffusers.

        Raises:
            UserError: Image-to-image is not supported, or ``steps`` exceeds the schedule's number of steps.
        """
        _check_whole(transition, first, self.kind)
        check_steps(transition, self.steps)
        return [SamplingStep(t, t, t - 1) for t in range(self.steps - 1, -1, -1)]

    def advance(
        self,
        tokens: Int[Tensor, "batch length"],
        log_p: Float[Tensor, "batch length codes"],
        moment: SamplerContext,
    ) -> Int[Tensor, "batch length"]:
        """Sample from one step's posterior, with Gumbel noise."""
        return _gumbel_from_posterior(tokens, log_p, moment)


Sampler = Annotated[
    Ancestral | Strided | Purity | Confidence | Halton | Remask | LegacyFast | LegacyDiffusers,
    Field(discriminator="kind"),
]


@torch.no_grad()
def sample(
    predict: Predict,
    sampler: Sampler,
    transition: MaskAndReplace,
    slots: Int[Tensor, " batch"],
    length: int,
    seed: int,
    *,
    known: KnownTokens | None = None,
    start: Start | None = None,
    on_step: Callable[[int, int], None] | None = None,
) -> Int[Tensor, "batch length"]:
    """Generate images as tokens.

    Args:
        predict: log p(x_0 | x_t), log-softmaxed; compose it with `guidance.guided` and `guidance.truncated`.
        sampler: Sampler that plans and computes the steps.
        transition: Forward chain of the training.
        slots: Global image numbers, int64; with ``seed`` they determine the random numbers. All computation
            runs on the device of ``slots``.
        length: Tokens per image.
        seed: Random seed, 0 to 2**32 - 1.
        known: Tokens to keep (inpainting).
        start: Initial image (image-to-image).
        on_step: Called after each step with the number of completed steps and the total.

    Returns:
        Tokens, int64, 0 to K-1.

    Raises:
        UserError: The sampler does not fit the schedule, the prediction has another number of codes or is not
            finite, or a given token is not a code.
    """
    first = transition.steps - 1 if start is None else _first_time(transition, start)
    plan = sampler.plan(transition, first)
    tokens = _beginning(sampler, transition, SamplerNoise(seed, slots, length, draw=0), start, first)
    free = torch.ones_like(tokens, dtype=torch.bool) if known is None else ~known.known
    restored = _restorer(transition, known, SamplerNoise(seed, slots, length, draw=1))
    tokens = restored(tokens, plan[0].t)
    first_masks = ((tokens == transition.mask) & free).sum(-1)
    sound = torch.ones((), dtype=torch.bool, device=slots.device)
    for number, step in enumerate(plan):
        log_p = predict(tokens, step.network_time)
        transition.check_codes(log_p.shape[-1], "the network's prediction")
        sound = sound & log_p.amax(-1).isfinite().all()
        moment = SamplerContext(
            transition, step, SamplerNoise(seed, slots, length, number), free, first_masks, plan[0].t
        )
        tokens = restored(sampler.advance(tokens, log_p, moment), step.s)
        if on_step is not None:
            on_step(number + 1, len(plan))
    if not bool(sound):
        raise UserError(
            "the network's prediction held NaN or infinity while sampling; its weights are unusable."
        )
    return tokens


def _first_time(transition: MaskAndReplace, start: Start) -> int:
    if not 0 < start.strength <= 1:
        raise UserError(f"strength {start.strength}: a share of the noise above 0 and up to 1 is needed.")
    transition.check_tokens(start.tokens, masks_allowed=False)
    return max(round(transition.steps * start.strength), 1) - 1


def _beginning(
    sampler: Sampler, transition: MaskAndReplace, noise: SamplerNoise, start: Start | None, first: int
) -> Int[Tensor, "batch length"]:
    if start is not None:
        t = torch.full_like(noise.slots, first)
        return transition.corrupt(start.tokens, t, noise.uniforms(Purpose.CORRUPTION))
    if sampler.starts_masked:
        return noise.slots.new_full((len(noise.slots), noise.length), transition.mask)
    return transition.prior(noise.uniforms(Purpose.PRIOR))


def _restorer(
    transition: MaskAndReplace, known: KnownTokens | None, noise: SamplerNoise
) -> Callable[[Int[Tensor, "batch length"], int], Int[Tensor, "batch length"]]:
    """Return a function that restores known tokens, noised to a given time.

    A token's uniform number is the same at all times, so its noise is one path of the forward chain: a
    visible known token stays visible.
    """
    if known is None:
        return lambda tokens, time: tokens
    transition.check_tokens(known.tokens[known.known][None], masks_allowed=False)
    drawn = noise.uniforms(Purpose.CORRUPTION)

    def restored(tokens: Int[Tensor, "batch length"], time: int) -> Int[Tensor, "batch length"]:
        noisy = transition.corrupt(known.tokens, torch.full_like(noise.slots, time), drawn)
        return torch.where(known.known, noisy, tokens)

    return restored


def _check_whole(transition: MaskAndReplace, first: int, kind: str) -> None:
    if first != transition.steps - 1:
        raise UserError(f"sampler.kind: {kind} cannot start from an image; use strided or ancestral.")


def _drawn_from_posterior(
    tokens: Int[Tensor, "batch length"], log_p: Float[Tensor, "batch length codes"], moment: SamplerContext
) -> Int[Tensor, "batch length"]:
    step = moment.step
    posterior = moment.transition.posterior(log_p.exp(), tokens, step.t, step.s)
    return drawn_codes(posterior, moment.noise.uniforms(Purpose.SAMPLING))


def _gumbel_from_posterior(
    tokens: Int[Tensor, "batch length"], log_p: Float[Tensor, "batch length codes"], moment: SamplerContext
) -> Int[Tensor, "batch length"]:
    step = moment.step
    posterior = moment.transition.posterior(log_p.float().exp(), tokens, step.t, step.s)
    return (posterior.log() + moment.noise.gumbel(posterior.shape[-1])).argmax(-1)
