"""Mask-and-replace diffusion: the forward chain and its posteriors in closed form.

Codes are 0 to K-1, the mask is K. Every operation costs O(K) per token. ``docs/maths.md`` derives them.
"""

from dataclasses import dataclass
from typing import TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vqd_scale.core.errors import UserError
from vqd_scale.diffusion.config import Schedule
from vqd_scale.diffusion.schedule import Rates, TimeOrTimes, rates_of

Tokens: TypeAlias = Int[Tensor, "batch length"]
PerToken: TypeAlias = Float[Tensor, "batch length"]

# Replaces a denominator of zero where the quotient is not used.
_NEVER = 1e-30


@dataclass(frozen=True)
class PosteriorRates:
    """Coefficients of q(x_s | x_t, x_0) and of its mixture over p(x_0), float64, one per time.

    If x_t is the mask: ``P(k) = masked_match · p_k + masked_spread`` and ``P(mask) = masked_stay``.
    If x_t is the code i, with ``V = 1 - (1 - reach) · p_i``:
    ``P(k) = other_match · p_k + other_spread · V`` for k != i, and
    ``P(i) = stay_match · p_i + stay_spread · V``.
    For a known x_0, p is one-hot.
    """

    masked_match: Float[Tensor, " *times"]
    masked_spread: Float[Tensor, " *times"]
    masked_stay: Float[Tensor, " *times"]
    other_match: Float[Tensor, " *times"]
    other_spread: Float[Tensor, " *times"]
    stay_match: Float[Tensor, " *times"]
    stay_spread: Float[Tensor, " *times"]
    reach: Float[Tensor, " *times"]


def posterior_rates(rates: Rates, t: TimeOrTimes, s: TimeOrTimes) -> PosteriorRates:
    """Compute the posterior coefficients between two times, equations (6) and (7) of ``docs/maths.md``.

    If a schedule never masks or never replaces, some states cannot occur and Bayes' rule gives 0/0. Then a
    mask counts as new in this step, and a visible code stays unchanged.
    """
    step, start, end = rates.between(t, s), rates.at(s), rates.at(t)
    codes = rates.codes
    newly_masked = _ratio(step.mask, end.mask, otherwise=1.0)
    newly_replaced = _ratio(step.replace, end.replace, otherwise=0.0)
    same = step.keep + step.replace / codes
    observed = end.keep + end.replace / codes
    return PosteriorRates(
        masked_match=newly_masked * start.keep,
        masked_spread=newly_masked * start.replace / codes,
        masked_stay=_ratio(start.mask, end.mask, otherwise=0.0),
        other_match=newly_replaced * start.keep,
        other_spread=newly_replaced * start.replace / codes,
        stay_match=_ratio(same * start.keep, observed, otherwise=1.0),
        stay_spread=_ratio(same * start.replace, end.replace, otherwise=1.0),
        reach=_ratio(end.replace / codes, observed, otherwise=0.0),
    )


class MaskAndReplace:
    """Forward chain of VQ-Diffusion over images of discrete tokens.

    >>> import torch
    >>> from vqd_scale import MaskAndReplace
    >>> from vqd_scale.diffusion.config import Absorbing
    >>> transition = MaskAndReplace(Absorbing(steps=4), codes=10)
    >>> clean, uniforms = torch.tensor([[3, 1, 4, 1]]), torch.tensor([[0.1, 0.4, 0.6, 0.9]])
    >>> transition.corrupt(clean, torch.tensor([1]), uniforms)  # after two of four steps; 10 is the mask
    tensor([[10, 10,  4,  1]])

    Attributes:
        codes: K, the number of codes; image tokens are 0 to K-1.
        mask: Token id of the mask, K.
        steps: T, the number of noise steps; times run from 0 to T-1, and -1 is the clean image.
        rates: Transition probabilities of the schedule, on the CPU.

    Raises:
        UserError: ``codes`` is less than 2.
    """

    def __init__(self, schedule: Schedule, codes: int) -> None:
        if codes < 2:
            raise UserError(f"codes: given {codes}; a codebook needs at least two codes.")
        self.codes = codes
        self.mask = codes
        self.steps = schedule.steps
        self.rates = rates_of(schedule, codes)
        self._rates_on = {torch.device("cpu"): self.rates}

    def rates_on(self, device: torch.device) -> Rates:
        """Return the rates on ``device``; the copy is cached."""
        if device not in self._rates_on:
            self._rates_on[device] = self.rates.to(device)
        return self._rates_on[device]

    def corrupt(self, tokens: Tokens, t: Int[Tensor, " batch"], uniforms: PerToken) -> Tokens:
        """Sample x_t from q(x_t | x_0) with one uniform number per token.

        Args:
            tokens: x_0, int64, 0 to K-1.
            t: Times, int64, -1 to T-1; -1 returns x_0.
            uniforms: In [0, 1). Below float64 precision a rare replacement reaches only few of the codes.

        Returns:
            x_t, int64, 0 to K.
        """
        probabilities = self.rates_on(tokens.device).at(t)
        masked, replaced = probabilities.mask[:, None], probabilities.replace[:, None]
        code = self._uniform_code((uniforms - masked) / replaced.clamp(min=_NEVER))
        noisy = torch.where(uniforms < masked + replaced, code, tokens)
        return torch.where(uniforms < masked, self.mask, noisy)

    def prior(self, uniforms: PerToken) -> Tokens:
        """Sample x_T from the schedule's prior: masks with probability ``prior_mask``, else uniform codes.

        Args:
            uniforms: In [0, 1).

        Returns:
            x_T, int64, 0 to K.
        """
        mask_probability = self.rates.prior_mask
        code = self._uniform_code((uniforms.double() - mask_probability) / max(1 - mask_probability, _NEVER))
        return torch.where(uniforms < mask_probability, self.mask, code)

    def posterior(
        self, probabilities: Float[Tensor, "batch length codes"], x_t: Tokens, t: int, s: int
    ) -> Float[Tensor, "batch length states"]:
        """Compute p(x_s | x_t) = Σ q(x_s | x_t, x_0) p(x_0), the mixture over the prediction.

        Exact for any stride t - s (VQ-Diffusion eq. 11 and its fast inference).

        Args:
            probabilities: p(x_0 | x_t) over the K codes. A row that does not sum to 1 (truncated
                distribution) scales its result by the same factor.
            x_t: int64, 0 to K.
            t: Time of ``x_t``, 0 to T-1.
            s: Target time, -1 to t-1.

        Returns:
            Probabilities over the K codes followed by the mask, in the dtype of ``probabilities``.

        Raises:
            UserError: The times are out of order or range, or ``probabilities`` has another number of codes.
        """
        self.check_codes(probabilities.shape[-1], "p(x_0)")
        if not -1 <= s < t < self.steps:
            raise UserError(f"times t={t}, s={s}: a posterior needs -1 <= s < t < {self.steps}.")
        dtype = probabilities.dtype
        rates = posterior_rates(self.rates_on(x_t.device), t, s)
        masked = (x_t == self.mask).unsqueeze(-1)
        total = probabilities.sum(-1, keepdim=True)
        observed = x_t.clamp(max=self.codes - 1).unsqueeze(-1)
        p_observed = probabilities.gather(-1, observed)
        spread = total - (1 - rates.reach.to(dtype)) * p_observed
        match = torch.where(masked, rates.masked_match, rates.other_match).to(dtype)
        offset = torch.where(masked, rates.masked_spread * total, rates.other_spread * spread).to(dtype)
        stay = (rates.stay_match * p_observed + rates.stay_spread * spread).to(dtype)
        result = torch.empty(*x_t.shape, self.codes + 1, dtype=dtype, device=x_t.device)
        codes = result[..., :-1]
        torch.mul(probabilities, match, out=codes).add_(offset)
        codes.scatter_(-1, observed, torch.where(masked, codes.gather(-1, observed), stay))
        result[..., -1:] = torch.where(masked, rates.masked_stay * total, 0.0)
        return result

    def check_tokens(self, tokens: Tokens, *, masks_allowed: bool) -> None:
        """Check token values; synchronizes with the device (for first batches and debugging).

        Raises:
            UserError: A token is neither a code nor, where allowed, the mask.
        """
        highest = self.codes if masks_allowed else self.codes - 1
        invalid = tokens[(tokens < 0) | (tokens > highest)]
        if len(invalid):
            raise UserError(
                f"token {int(invalid[0])} is not between 0 and {highest}; check that the tokenizer's "
                f"codebook (and its reduction map) has the {self.codes} codes of the diffusion schedule."
            )

    def check_times(self, t: Int[Tensor, " batch"]) -> None:
        """Raise a `UserError` unless times are in 0..T-1; synchronizes with the device (for debugging)."""
        invalid = t[(t < 0) | (t >= self.steps)]
        if len(invalid):
            raise UserError(
                f"time {int(invalid[0])} is not between 0 and {self.steps - 1}, the schedule's last."
            )

    def check_codes(self, codes: int, subject: str) -> None:
        """Raise a `UserError` unless a number of classes equals K."""
        if codes != self.codes:
            raise UserError(
                f"{subject} has {codes} classes, but the diffusion schedule has {self.codes} codes; "
                "give both the size of the (reduced) codebook."
            )

    def _uniform_code(self, fractions: PerToken) -> Tokens:
        return (fractions * self.codes).clamp(0, self.codes - 1).long()


def _ratio(
    numerator: Float[Tensor, " *times"], denominator: Float[Tensor, " *times"], otherwise: float
) -> Float[Tensor, " *times"]:
    """Return the quotient, or ``otherwise`` where the denominator is zero (an impossible state)."""
    possible = denominator > 0
    return torch.where(possible, numerator / torch.where(possible, denominator, 1.0), otherwise)
