"""From noise to tokens: one loop, and the steps that it can take.

Every random number is a function of (seed, purpose, slot, step, position). So an image is the same in
whatever batch it is drawn, if ``predict`` gives it the same predictions there.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from math import isqrt
from typing import Annotated, ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor

from vqd_scale.core.config import Config
from vqd_scale.core.errors import UserError
from vqd_scale.core.rng import Purpose, uniforms
from vqd_scale.diffusion.guidance import Predict
from vqd_scale.diffusion.transition import MaskAndReplace


@dataclass(frozen=True)
class Step:
    """Times of one step: what the network is told, and between which times the posterior is taken."""

    told: int
    t: int
    s: int


@dataclass(frozen=True)
class Noise:
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
class Moment:
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
    step: Step
    noise: Noise
    free: Bool[Tensor, "batch length"]
    first_masks: Int[Tensor, " batch"]
    first: int

    def masked_share(self, time: int) -> float:
        """Of the masks that sampling began with, the share that the schedule still has at ``time``."""
        rates = self.transition.rates
        return float(rates.at(time).mask / rates.at(self.first).mask)


@dataclass(frozen=True)
class KnownTokens:
    """Inpainting: tokens that stay. They are noised to each step's level, so that the network sees its like.

    Attributes:
        tokens: int64 [batch, length], 0 to K-1 where known.
        known: True where the token stays.
    """

    tokens: Int[Tensor, "batch length"]
    known: Bool[Tensor, "batch length"]


@dataclass(frozen=True)
class Start:
    """Image-to-image: begin from this image with noise, instead of from noise alone.

    Attributes:
        tokens: int64 [batch, length], 0 to K-1.
        strength: Which share of the T noise steps is added and undone, 0 < strength <= 1.
    """

    tokens: Int[Tensor, "batch length"]
    strength: float


class Ancestral(Config):
    """All T steps, one by one."""

    kind: Literal["ancestral"] = "ancestral"
    starts_masked: ClassVar[bool] = False

    def plan(self, transition: MaskAndReplace, first: int) -> list[Step]:
        """The steps from time ``first`` to the clean image."""
        return [Step(t, t, t - 1) for t in range(first, -1, -1)]

    def advance(
        self, tokens: Int[Tensor, "batch length"], log_p: Float[Tensor, "batch length codes"], moment: Moment
    ) -> Int[Tensor, "batch length"]:
        """x_s from x_t."""
        return _drawn_from_posterior(tokens, log_p, moment)


class Strided(Config):
    """Any number of steps from 1 to T, each drawn from the exact posterior over its stride.

    Source: VQ-Diffusion's fast inference as the paper has it. Unlike `LegacyFast` and `LegacyDiffusers` it
    follows the schedule.
    """

    kind: Literal["strided"] = "strided"
    steps: int = Field(default=25, ge=1)
    starts_masked: ClassVar[bool] = False

    def plan(self, transition: MaskAndReplace, first: int) -> list[Step]:
        """The steps from time ``first`` to the clean image.

        Raises:
            UserError: More steps than the schedule has.
        """
        return _even_steps(transition, first, self.steps)

    def advance(
        self, tokens: Int[Tensor, "batch length"], log_p: Float[Tensor, "batch length codes"], moment: Moment
    ) -> Int[Tensor, "batch length"]:
        """x_s from x_t."""
        return _drawn_from_posterior(tokens, log_p, moment)


class _Reveal(Config):
    """Samplers that begin from masks alone and let them shrink with the schedule's masked share."""

    steps: int = Field(default=25, ge=1)
    starts_masked: ClassVar[bool] = True

    def plan(self, transition: MaskAndReplace, first: int) -> list[Step]:
        """The steps from time ``first`` to the clean image.

        Raises:
            UserError: More steps than the schedule has, or it has no masks.
        """
        if float(transition.rates.at(first).mask) == 0:
            raise UserError(
                "this sampler reveals masks, but the schedule has none; use ancestral or strided."
            )
        return _even_steps(transition, first, self.steps)


class Purity(_Reveal):
    """Improved VQ-Diffusion's sampling: reveal where the network is sure, and sharpen what is revealed.

    Positions are drawn in proportion to their purity max_k p_k, codes from p ** (1 + weight * purity), the
    purity relative to the image's largest (its eq. 11, with the factor of its code).
    """

    kind: Literal["purity"] = "purity"
    weight: float = Field(default=1.0, ge=0)

    def advance(
        self, tokens: Int[Tensor, "batch length"], log_p: Float[Tensor, "batch length codes"], moment: Moment
    ) -> Int[Tensor, "batch length"]:
        """Fewer masks than before."""
        purity = log_p.amax(-1).double().exp()
        score = purity / purity.amax(-1, keepdim=True)
        if moment.step.s >= 0:
            log_p = (log_p * (1 + self.weight * score.unsqueeze(-1))).log_softmax(-1)
        codes = _drawn(log_p.exp(), moment.noise.uniforms(Purpose.SAMPLING))
        # The smallest exponential variates of these rates: a draw without replacement in proportion to score.
        waiting = -torch.log1p(-moment.noise.uniforms(Purpose.REVEAL)) / score
        return _revealed(tokens, codes, -waiting, moment)


class Confidence(_Reveal):
    """MaskGIT's sampling (arXiv 2202.04200): draw every code, keep the ones that the network is surest of.

    ``temperature`` times the share of masks left scales the Gumbel noise on the confidence.
    """

    kind: Literal["confidence"] = "confidence"
    temperature: float = Field(default=4.5, ge=0)

    def advance(
        self, tokens: Int[Tensor, "batch length"], log_p: Float[Tensor, "batch length codes"], moment: Moment
    ) -> Int[Tensor, "batch length"]:
        """Fewer masks than before."""
        codes = _drawn(log_p.exp(), moment.noise.uniforms(Purpose.SAMPLING))
        confidence = log_p.gather(-1, codes.unsqueeze(-1)).squeeze(-1).double()
        gumbel = -torch.log(-torch.log1p(-moment.noise.uniforms(Purpose.REVEAL)))
        temperature = self.temperature * moment.masked_share(moment.step.s)
        return _revealed(tokens, codes, confidence + temperature * gumbel, moment)


class Halton(_Reveal):
    """Reveal in an order that fills a square image evenly (Besnier et al., arXiv 2503.17076)."""

    kind: Literal["halton"] = "halton"

    def advance(
        self, tokens: Int[Tensor, "batch length"], log_p: Float[Tensor, "batch length codes"], moment: Moment
    ) -> Int[Tensor, "batch length"]:
        """Fewer masks than before.

        Raises:
            UserError: The tokens are no square.
        """
        codes = _drawn(log_p.exp(), moment.noise.uniforms(Purpose.SAMPLING))
        order = torch.tensor(halton_order(tokens.shape[1]), device=tokens.device)
        priority = torch.empty_like(order).scatter_(0, order, -torch.arange(len(order), device=tokens.device))
        return _revealed(tokens, codes, priority.double().expand_as(tokens), moment)


class Remask(_Reveal):
    """Visible tokens may be masked again and found anew, so that early mistakes can be mended.

    The masked share stays the schedule's. ``strength`` is the share of the largest possible chance of masking
    again (ReMDM, arXiv 2503.00307, its "rescale" schedule).
    """

    kind: Literal["remask"] = "remask"
    strength: float = Field(default=0.1, ge=0, le=1)

    def advance(
        self, tokens: Int[Tensor, "batch length"], log_p: Float[Tensor, "batch length codes"], moment: Moment
    ) -> Int[Tensor, "batch length"]:
        """Some masks become codes, and some codes masks."""
        transition = moment.transition
        before, after = moment.masked_share(moment.step.t), moment.masked_share(moment.step.s)
        visible = 1 - before
        again = self.strength * min(1.0, after / visible) if visible > 0 else 0.0
        stay = (after - again * visible) / before
        codes = _drawn(log_p.exp(), moment.noise.uniforms(Purpose.SAMPLING))
        chance = torch.where(tokens == transition.mask, stay, again)
        masked = moment.noise.uniforms(Purpose.REVEAL) < chance
        found = torch.where(tokens == transition.mask, codes, tokens)
        return torch.where(masked, transition.mask, found)


class LegacyFast(Config):
    """The released code's "fast" sampling, for comparison: it tells the network t, but undoes one early step.

    With speed 4 a quarter of the tokens is still masked before the last step; use `Strided` instead.
    """

    kind: Literal["legacy_fast"] = "legacy_fast"
    speed: int = Field(default=4, ge=2)
    starts_masked: ClassVar[bool] = True

    def plan(self, transition: MaskAndReplace, first: int) -> list[Step]:
        """The steps of the released code.

        Raises:
            UserError: Image-to-image was asked for.
        """
        _check_whole(transition, first, self.kind)
        times = list(range(first, -1, -self.speed))
        times += [] if times[-1] == 0 else [0]
        skipped = self.speed - 1
        undone = [t - skipped if t > skipped else t for t in times]
        return [Step(told, t, t - 1) for told, t in zip(times, undone, strict=True)]

    def advance(
        self, tokens: Int[Tensor, "batch length"], log_p: Float[Tensor, "batch length codes"], moment: Moment
    ) -> Int[Tensor, "batch length"]:
        """One step's posterior."""
        return _gumbel_from_posterior(tokens, log_p, moment)


class LegacyDiffusers(Config):
    """What diffusers' VQDiffusionScheduler does with fewer steps, for comparison: the last times only.

    It starts from nothing but masks at a time at which most tokens should be visible; use `Strided` instead.
    """

    kind: Literal["legacy_diffusers"] = "legacy_diffusers"
    steps: int = Field(default=100, ge=1)
    starts_masked: ClassVar[bool] = True

    def plan(self, transition: MaskAndReplace, first: int) -> list[Step]:
        """The steps of diffusers.

        Raises:
            UserError: Image-to-image was asked for, or more steps than the schedule has.
        """
        _check_whole(transition, first, self.kind)
        _check_steps(transition, self.steps)
        return [Step(t, t, t - 1) for t in range(self.steps - 1, -1, -1)]

    def advance(
        self, tokens: Int[Tensor, "batch length"], log_p: Float[Tensor, "batch length codes"], moment: Moment
    ) -> Int[Tensor, "batch length"]:
        """One step's posterior."""
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
    """Draw images as tokens.

    Args:
        predict: log p(x_0 | x_t), log-softmaxed; compose it with `guidance.guided` and `guidance.truncated`.
        sampler: Which steps are taken.
        transition: The chain that the network was trained on.
        slots: Each image's global number, int64; with ``seed`` it names the image's random numbers. All runs
            on its device.
        length: Tokens of an image.
        seed: 0 to 2**32 - 1.
        known: Tokens to keep.
        start: An image to begin from.
        on_step: Called after each step with the number of steps done and of all.

    Returns:
        int64 tokens, 0 to K-1.

    Raises:
        UserError: The sampler does not fit the schedule, the prediction has another number of codes or is not
            finite, or a given token is no code.
    """
    first = transition.steps - 1 if start is None else _first_time(transition, start)
    plan = sampler.plan(transition, first)
    tokens = _beginning(sampler, transition, Noise(seed, slots, length, draw=0), start, first)
    free = torch.ones_like(tokens, dtype=torch.bool) if known is None else ~known.known
    restored = _restorer(transition, known, Noise(seed, slots, length, draw=1))
    tokens = restored(tokens, plan[0].t)
    first_masks = ((tokens == transition.mask) & free).sum(-1)
    sound = torch.ones((), dtype=torch.bool, device=slots.device)
    for number, step in enumerate(plan):
        log_p = predict(tokens, step.told)
        transition.check_codes(log_p.shape[-1], "the network's prediction")
        sound = sound & log_p.amax(-1).isfinite().all()
        moment = Moment(transition, step, Noise(seed, slots, length, number), free, first_masks, plan[0].t)
        tokens = restored(sampler.advance(tokens, log_p, moment), step.s)
        if on_step is not None:
            on_step(number + 1, len(plan))
    if not bool(sound):
        raise UserError(
            "the network's prediction held NaN or infinity while sampling; its weights are unusable."
        )
    return tokens


def halton_order(length: int) -> list[int]:
    """Positions of a square image in the order of the two-dimensional Halton sequence of bases 2 and 3.

    Raises:
        UserError: ``length`` is no square number.
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
    """The digits of ``index``, mirrored at the point."""
    result, weight = 0.0, 1.0
    while index:
        index, digit = divmod(index, base)
        weight /= base
        result += digit * weight
    return result


def _first_time(transition: MaskAndReplace, start: Start) -> int:
    if not 0 < start.strength <= 1:
        raise UserError(f"strength {start.strength}: a share of the noise above 0 and up to 1 is needed.")
    transition.check_tokens(start.tokens, masks_allowed=False)
    return max(round(transition.steps * start.strength), 1) - 1


def _beginning(
    sampler: Sampler, transition: MaskAndReplace, noise: Noise, start: Start | None, first: int
) -> Int[Tensor, "batch length"]:
    if start is not None:
        t = torch.full_like(noise.slots, first)
        return transition.corrupt(start.tokens, t, noise.uniforms(Purpose.CORRUPTION))
    if sampler.starts_masked:
        return noise.slots.new_full((len(noise.slots), noise.length), transition.mask)
    return transition.prior(noise.uniforms(Purpose.PRIOR))


def _restorer(
    transition: MaskAndReplace, known: KnownTokens | None, noise: Noise
) -> Callable[[Int[Tensor, "batch length"], int], Int[Tensor, "batch length"]]:
    """Puts known tokens back, noised to a time; a token's uniform number is the same at all times.

    So a known token that has become visible stays visible: its noise is one path of the forward chain.
    """
    if known is None:
        return lambda tokens, time: tokens
    transition.check_tokens(known.tokens[known.known][None], masks_allowed=False)
    drawn = noise.uniforms(Purpose.CORRUPTION)

    def restored(tokens: Int[Tensor, "batch length"], time: int) -> Int[Tensor, "batch length"]:
        noisy = transition.corrupt(known.tokens, torch.full_like(noise.slots, time), drawn)
        return torch.where(known.known, noisy, tokens)

    return restored


def _even_steps(transition: MaskAndReplace, first: int, steps: int) -> list[Step]:
    """Equal strides from ``first`` to -1; image-to-image takes its share of the steps."""
    _check_steps(transition, steps)
    span = first + 1
    count = max(1, round(steps * span / transition.steps))
    times = [first - number * span // count for number in range(count + 1)]
    return [Step(t, t, s) for t, s in pairwise(times)]


def _check_steps(transition: MaskAndReplace, steps: int) -> None:
    if steps > transition.steps:
        raise UserError(
            f"sampler.steps: given {steps}; the schedule has {transition.steps}, take at most those."
        )


def _check_whole(transition: MaskAndReplace, first: int, kind: str) -> None:
    if first != transition.steps - 1:
        raise UserError(f"sampler.kind: {kind} cannot start from an image; use strided or ancestral.")


def _drawn_from_posterior(
    tokens: Int[Tensor, "batch length"], log_p: Float[Tensor, "batch length codes"], moment: Moment
) -> Int[Tensor, "batch length"]:
    step = moment.step
    posterior = moment.transition.posterior(log_p.exp(), tokens, step.t, step.s)
    return _drawn(posterior, moment.noise.uniforms(Purpose.SAMPLING))


def _gumbel_from_posterior(
    tokens: Int[Tensor, "batch length"], log_p: Float[Tensor, "batch length codes"], moment: Moment
) -> Int[Tensor, "batch length"]:
    step = moment.step
    posterior = moment.transition.posterior(log_p.float().exp(), tokens, step.t, step.s)
    return (posterior.log() + moment.noise.gumbel(posterior.shape[-1])).argmax(-1)


def _drawn(
    chances: Float[Tensor, "batch length states"], drawn: Float[Tensor, "batch length"]
) -> Int[Tensor, "batch length"]:
    """One state per token by inverse CDF; ``chances`` need not add up to one."""
    cumulative = chances.cumsum(-1, dtype=torch.float64)
    total = cumulative[..., -1:]
    # Rounding must not lead past the last state that has a chance at all.
    place = torch.minimum(drawn.unsqueeze(-1) * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, place, right=True).squeeze(-1)


def _revealed(
    tokens: Int[Tensor, "batch length"],
    codes: Int[Tensor, "batch length"],
    priority: Float[Tensor, "batch length"],
    moment: Moment,
) -> Int[Tensor, "batch length"]:
    """Put ``codes`` in the place of the masks of highest priority, as many as the schedule has by then.

    Improved VQ-Diffusion's tables, for any length, T and number of steps: masks shrink with the masked share.
    """
    masked = (tokens == moment.transition.mask) & moment.free
    count = masked.sum(-1) - (moment.first_masks * moment.masked_share(moment.step.s)).round().long()
    order = priority.masked_fill(~masked, -torch.inf).sort(dim=-1, descending=True, stable=True).indices
    rank = torch.empty_like(order).scatter_(
        -1, order, torch.arange(tokens.shape[1], device=tokens.device).expand_as(order)
    )
    return torch.where(masked & (rank < count[:, None]), codes, tokens)
