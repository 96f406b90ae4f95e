"""Samplers that choose which positions to unmask; codes are sampled directly from p(x_0 | x_t)."""

from math import isqrt
from typing import ClassVar, Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from vqd_scale.core.config import Config
from vqd_scale.core.errors import UserError
from vqd_scale.core.rng import Purpose, drawn_codes
from vqd_scale.diffusion.sampling_plan import SamplerContext, SamplingStep, even_steps
from vqd_scale.diffusion.transition import MaskAndReplace


class _Reveal(Config):
    """Base of samplers that start from masks only and unmask along the schedule's masked fraction."""

    steps: int = Field(default=25, ge=1)
    starts_masked: ClassVar[bool] = True

    def plan(self, transition: MaskAndReplace, first: int) -> list[SamplingStep]:
        """Return the steps from time ``first`` to the clean image.

        Raises:
            UserError: ``steps`` exceeds the schedule's number of steps, or the schedule has no masks.
        """
        if float(transition.rates.at(first).mask) == 0:
            raise UserError(
                "this sampler reveals masks, but the schedule has none; use ancestral or strided."
            )
        return even_steps(transition, first, self.steps)


class Purity(_Reveal):
    """Purity sampling of Improved VQ-Diffusion: unmask confident positions, with sharpened codes.

    Positions are sampled in proportion to their purity max_k p_k, codes from p ** (1 + weight * purity), with
    purity relative to the image's maximum (arXiv 2205.16007, eq. 11, with the factor of its code).
    """

    kind: Literal["purity"] = "purity"
    weight: float = Field(default=1.0, ge=0)

    def advance(
        self,
        tokens: Int[Tensor, "batch length"],
        log_p: Float[Tensor, "batch length codes"],
        moment: SamplerContext,
    ) -> Int[Tensor, "batch length"]:
        """Unmask some positions."""
        purity = log_p.amax(-1).double().exp()
        score = purity / purity.amax(-1, keepdim=True)
        if moment.step.s >= 0:
            log_p = (log_p * (1 + self.weight * score.unsqueeze(-1))).log_softmax(-1)
        codes = drawn_codes(log_p.exp(), moment.noise.uniforms(Purpose.SAMPLING))
        # The smallest exponential variates of these rates: sampling without replacement, weighted by score.
        waiting = -torch.log1p(-moment.noise.uniforms(Purpose.REVEAL)) / score
        return _revealed(tokens, codes, -waiting, moment)


class Confidence(_Reveal):
    """MaskGIT sampling (arXiv 2202.04200): sample every code, keep the most confident ones.

    ``temperature`` times the remaining masked fraction scales the Gumbel noise on the confidence.
    """

    kind: Literal["confidence"] = "confidence"
    temperature: float = Field(default=4.5, ge=0)

    def advance(
        self,
        tokens: Int[Tensor, "batch length"],
        log_p: Float[Tensor, "batch length codes"],
        moment: SamplerContext,
    ) -> Int[Tensor, "batch length"]:
        """Unmask some positions."""
        codes = drawn_codes(log_p.exp(), moment.noise.uniforms(Purpose.SAMPLING))
        confidence = log_p.gather(-1, codes.unsqueeze(-1)).squeeze(-1).double()
        gumbel = -torch.log(-torch.log1p(-moment.noise.uniforms(Purpose.REVEAL)))
        temperature = self.temperature * moment.masked_share(moment.step.s)
        return _revealed(tokens, codes, confidence + temperature * gumbel, moment)


class Halton(_Reveal):
    """Unmasking in Halton order, which covers a square image evenly (Besnier et al., arXiv 2503.17076)."""

    kind: Literal["halton"] = "halton"

    def advance(
        self,
        tokens: Int[Tensor, "batch length"],
        log_p: Float[Tensor, "batch length codes"],
        moment: SamplerContext,
    ) -> Int[Tensor, "batch length"]:
        """Unmask some positions.

        Raises:
            UserError: The number of tokens is not a square number.
        """
        codes = drawn_codes(log_p.exp(), moment.noise.uniforms(Purpose.SAMPLING))
        order = torch.tensor(halton_order(tokens.shape[1]), device=tokens.device)
        priority = torch.empty_like(order).scatter_(0, order, -torch.arange(len(order), device=tokens.device))
        return _revealed(tokens, codes, priority.double().expand_as(tokens), moment)


class Remask(_Reveal):
    """Remasking: visible tokens may be masked again and resampled, to correct early mistakes.

    The masked fraction follows the schedule. ``strength`` is the fraction of the largest possible remasking
    probability (ReMDM, arXiv 2503.00307, its "rescale" schedule).
    """

    kind: Literal["remask"] = "remask"
    strength: float = Field(default=0.1, ge=0, le=1)

    def advance(
        self,
        tokens: Int[Tensor, "batch length"],
        log_p: Float[Tensor, "batch length codes"],
        moment: SamplerContext,
    ) -> Int[Tensor, "batch length"]:
        """Unmask some positions and remask others."""
        transition = moment.transition
        before, after = moment.masked_share(moment.step.t), moment.masked_share(moment.step.s)
        visible = 1 - before
        again = self.strength * min(1.0, after / visible) if visible > 0 else 0.0
        stay = (after - again * visible) / before
        codes = drawn_codes(log_p.exp(), moment.noise.uniforms(Purpose.SAMPLING))
        chance = torch.where(tokens == transition.mask, stay, again)
        masked = moment.noise.uniforms(Purpose.REVEAL) < chance
        found = torch.where(tokens == transition.mask, codes, tokens)
        return torch.where(masked, transition.mask, found)


def halton_order(length: int) -> list[int]:
    """Return the positions of a square image in the order of the 2-D Halton sequence of bases 2 and 3.

    Raises:
        UserError: ``length`` is not a square number.
    """
    side = isqrt(length)
    if side * side != length:
        raise UserError(f"sampler.kind: halton needs a square image, but {length} tokens are none.")
    order: dict[int, None] = {}
    index = 1
    while len(order) < length:
        row, column = int(_radical_inverse(index, 2) * side), int(_radical_inverse(index, 3) * side)
        order[row * side + column] = None
        index += 1
    return list(order)


def _radical_inverse(index: int, base: int) -> float:
    """Mirror the digits of ``index`` at the radix point."""
    result, weight = 0.0, 1.0
    while index:
        index, digit = divmod(index, base)
        weight /= base
        result += digit * weight
    return result


def _revealed(
    tokens: Int[Tensor, "batch length"],
    codes: Int[Tensor, "batch length"],
    priority: Float[Tensor, "batch length"],
    moment: SamplerContext,
) -> Int[Tensor, "batch length"]:
    """Replace the masks of highest priority by ``codes``, along the schedule's masked fraction.

    Generalizes Improved VQ-Diffusion's tables to any length, T and number of steps.
    """
    masked = (tokens == moment.transition.mask) & moment.free
    count = masked.sum(-1) - (moment.first_masks * moment.masked_share(moment.step.s)).round().long()
    order = priority.masked_fill(~masked, -torch.inf).sort(dim=-1, descending=True, stable=True).indices
    rank = torch.empty_like(order).scatter_(
        -1, order, torch.arange(tokens.shape[1], device=tokens.device).expand_as(order)
    )
    return torch.where(masked & (rank < count[:, None]), codes, tokens)
