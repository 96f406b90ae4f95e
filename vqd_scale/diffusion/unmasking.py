"""Samplers that choose which positions to unmask; codes are sampled directly from p(x_0 | x_t)."""

from math import isqrt
from typing import Generic, TypeVar

import torch

from vqd_scale.core.errors import UserError
from vqd_scale.core.rng import Purpose, sample_codes
from vqd_scale.diffusion.config import Confidence, Halton, Purity, Remask, SamplerSteps
from vqd_scale.diffusion.sampling_plan import LogProbabilities, SamplerContext, SamplingStep, even_steps
from vqd_scale.diffusion.transition import MaskAndReplace, PerToken, Tokens

AnyConfig = TypeVar("AnyConfig", bound=SamplerSteps)


class UnmaskingSampler(Generic[AnyConfig]):
    """Base of samplers that start from masks only and unmask along the schedule's masked fraction."""

    starts_masked = True

    def __init__(self, config: AnyConfig) -> None:
        self.config = config

    def plan(self, transition: MaskAndReplace, first: int) -> list[SamplingStep]:
        """Return the steps from time ``first`` to the clean image.

        Raises:
            UserError: ``steps`` exceeds the schedule's number of steps, or the schedule has no masks.
        """
        if float(transition.rates.at(first).mask) == 0:
            raise UserError(
                "this sampler replaces masks, but the schedule has none; use ancestral or strided."
            )
        return even_steps(transition, first, self.config.steps)


class PuritySampler(UnmaskingSampler[Purity]):
    """Implementation of `Purity`."""

    def advance(self, tokens: Tokens, log_p: LogProbabilities, context: SamplerContext) -> Tokens:
        """Unmask some positions."""
        purity = log_p.amax(-1).double().exp()
        score = purity / purity.amax(-1, keepdim=True)
        if context.step.s >= 0:
            log_p = (log_p * (1 + self.config.weight * score.unsqueeze(-1))).log_softmax(-1)
        codes = sample_codes(log_p.exp(), context.noise.uniforms(Purpose.SAMPLING))
        # The smallest exponential variates of these rates: sampling without replacement, weighted by score.
        waiting = -torch.log1p(-context.noise.uniforms(Purpose.UNMASKING)) / score
        return unmask(tokens, codes, -waiting, context)


class ConfidenceSampler(UnmaskingSampler[Confidence]):
    """Implementation of `Confidence`."""

    def advance(self, tokens: Tokens, log_p: LogProbabilities, context: SamplerContext) -> Tokens:
        """Unmask some positions."""
        codes = sample_codes(log_p.exp(), context.noise.uniforms(Purpose.SAMPLING))
        confidence = log_p.gather(-1, codes.unsqueeze(-1)).squeeze(-1).double()
        gumbel = -torch.log(-torch.log1p(-context.noise.uniforms(Purpose.UNMASKING)))
        temperature = self.config.temperature * context.masked_fraction(context.step.s)
        return unmask(tokens, codes, confidence + temperature * gumbel, context)


class HaltonSampler(UnmaskingSampler[Halton]):
    """Implementation of `Halton`."""

    def __init__(self, config: Halton) -> None:
        super().__init__(config)
        # Of the first step: a copy to the device in every step would wait for it.
        self._priority: PerToken | None = None

    def advance(self, tokens: Tokens, log_p: LogProbabilities, context: SamplerContext) -> Tokens:
        """Unmask some positions.

        Raises:
            UserError: The number of tokens is not a square number.
        """
        codes = sample_codes(log_p.exp(), context.noise.uniforms(Purpose.SAMPLING))
        if self._priority is None:
            order = torch.tensor(halton_order(tokens.shape[1]))
            ranks = torch.arange(len(order), dtype=torch.float64)
            self._priority = torch.empty_like(ranks).scatter_(0, order, -ranks).to(tokens.device)
        return unmask(tokens, codes, self._priority.expand_as(tokens), context)


class RemaskSampler(UnmaskingSampler[Remask]):
    """Implementation of `Remask`."""

    def advance(self, tokens: Tokens, log_p: LogProbabilities, context: SamplerContext) -> Tokens:
        """Unmask some positions and remask others."""
        transition = context.transition
        before, after = context.masked_fraction(context.step.t), context.masked_fraction(context.step.s)
        visible = 1 - before
        remask = self.config.strength * min(1.0, after / visible) if visible > 0 else 0.0
        stay = (after - remask * visible) / before
        codes = sample_codes(log_p.exp(), context.noise.uniforms(Purpose.SAMPLING))
        probability = torch.where(tokens == transition.mask, stay, remask)
        masked = context.noise.uniforms(Purpose.UNMASKING) < probability
        unmasked = torch.where(tokens == transition.mask, codes, tokens)
        return torch.where(masked, transition.mask, unmasked)


def halton_order(length: int) -> list[int]:
    """Return the positions of a square image in the order of the 2-D Halton sequence of bases 2 and 3.

    Raises:
        UserError: ``length`` is not a square number.
    """
    side = isqrt(length)
    if side * side != length:
        raise UserError(
            f"sampler.kind: halton needs a square image, but {length} is not a square number of tokens."
        )
    order: dict[int, None] = {}
    index = 1
    while len(order) < length:
        row, column = _scaled_radical_inverse(index, 2, side), _scaled_radical_inverse(index, 3, side)
        order[row * side + column] = None
        index += 1
    return list(order)


def _scaled_radical_inverse(index: int, base: int, side: int) -> int:
    """Mirror the digits of ``index`` at the radix point; return ``side`` times the result, rounded down."""
    mirrored, power = 0, 1
    while index:
        index, digit = divmod(index, base)
        mirrored, power = base * mirrored + digit, base * power
    # In integers: in floating point a product that is an integer can be rounded to less.
    return mirrored * side // power


def unmask(tokens: Tokens, codes: Tokens, priority: PerToken, context: SamplerContext) -> Tokens:
    """Replace the masks of highest priority by ``codes``, along the schedule's masked fraction.

    Generalizes Improved VQ-Diffusion's tables to any length, T and number of steps.
    """
    masked = (tokens == context.transition.mask) & context.free
    count = masked.sum(-1) - (context.first_masks * context.masked_fraction(context.step.s)).round().long()
    order = priority.masked_fill(~masked, -torch.inf).sort(dim=-1, descending=True, stable=True).indices
    ranks = torch.arange(tokens.shape[1], device=tokens.device).expand_as(order)
    rank = torch.empty_like(order).scatter_(-1, order, ranks)
    return torch.where(masked & (rank < count[:, None]), codes, tokens)
