"""Training objective: the variational bound by the closed-form KL, and the auxiliary x_0 term.

The loss needs three numbers per token from a row of logits: log p(x_0), log p(x_t), and one sum over the
codes. `fused_loss.RowStatistics` computes them in chunks and recomputes them in backward, so the logits
[batch, length, codes] are never materialized. All later arithmetic is differentiable and runs on
[batch, length] tensors. ``docs/maths.md`` derives the formulas.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vqd_scale.core.errors import UserError
from vqd_scale.diffusion.config import ObjectiveConfig
from vqd_scale.diffusion.fused_loss import RowStatistics
from vqd_scale.diffusion.logit_statistics import log_replaceable_mass
from vqd_scale.diffusion.schedule import Rates
from vqd_scale.diffusion.transition import MaskAndReplace, PerToken, PosteriorRates, Tokens, posterior_rates

# Logarithm of a zero rate; finite, so that 0 * _LOG_ZERO is 0.
_LOG_ZERO = -600.0


@dataclass(frozen=True)
class ObjectiveOutput:
    """Losses of a batch in nats per token, and counts for the accuracy of x_0.

    Attributes:
        loss_per_image: Differentiable loss: weighted KL or decoder term, plus the auxiliary term. Divided by
            p(t) and averaged over images it estimates the bound per token, a sum over all T times.
        vlb_per_image: Unweighted KL or decoder term, detached.
        cross_entropy_per_image: Mean of -log p(x_0 | x_t) over all tokens, detached.
        masked_correct: Number of masked tokens whose most likely code is x_0.
        masked_count: Number of masked tokens.
        visible_correct: Number of visible tokens whose most likely code is x_0.
        visible_count: Number of visible tokens.
    """

    loss_per_image: Float[Tensor, " batch"]
    vlb_per_image: Float[Tensor, " batch"]
    cross_entropy_per_image: Float[Tensor, " batch"]
    masked_correct: Float[Tensor, " batch"]
    masked_count: Float[Tensor, " batch"]
    visible_correct: Float[Tensor, " batch"]
    visible_count: Float[Tensor, " batch"]


class Objective:
    """Variational bound plus auxiliary term of VQ-Diffusion (arXiv 2111.14822), from the last hidden layer.

    Must be called inside the network's forward: under ZeRO-3 the head's weight is empty elsewhere.
    """

    def __init__(self, transition: MaskAndReplace, config: ObjectiveConfig) -> None:
        self.transition = transition
        self.config = config

    def __call__(
        self,
        hidden: Float[Tensor, "batch length width"],
        weight: Float[Tensor, "codes width"],
        bias: Float[Tensor, " codes"] | None,
        tokens: Tokens,
        noisy: Tokens,
        t: Int[Tensor, " batch"],
    ) -> ObjectiveOutput:
        """Compute the objective of ``logits = hidden @ weight.T + bias`` without storing the logits.

        Args:
            hidden: Last hidden layer, any float dtype; sums run in float32 (float64 for float64).
            weight: Weight of the linear head.
            bias: Bias of the linear head.
            tokens: x_0, int64, 0 to K-1.
            noisy: x_t, int64, 0 to K.
            t: Times, int64, 0 to T-1.

        Raises:
            UserError: The head has another number of codes than the schedule; with ``check_values`` also a
                token or time out of range, or a non-finite loss.
        """
        self.transition.check_codes(weight.shape[0], "the network's head")
        if self.config.check_values:
            self.transition.check_tokens(tokens, masks_allowed=False)
            self.transition.check_tokens(noisy, masks_allowed=True)
            self.transition.check_times(t)
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        terms = _KLTerms.of(self.transition.rates_on(tokens.device), tokens, noisy, t, dtype)
        log_ratio = terms.log_match - terms.log_spread
        rows = (part.flatten() for part in (tokens, terms.observed, terms.reach, log_ratio))
        flat = RowStatistics.apply(hidden.flatten(0, 1), weight, bias, *rows)
        log_true, log_observed, code_sum, correct = (part.view_as(tokens) for part in flat)
        divergence = terms.divergence(log_true, log_observed, code_sum)
        if self.config.check_values and not bool(divergence.isfinite().all()):
            image = int((~divergence.isfinite().all(-1)).nonzero()[0])
            raise UserError(
                f"the loss of image {image} of the batch (t = {int(t[image])}) is not finite: the network's "
                "output is NaN or infinity; lower the learning rate or look for the layer that overflows."
            )
        token_weight = torch.where(terms.masked, self.config.mask_weight, self.config.visible_weight)
        token_weight = torch.where((t == 0)[:, None], 1.0, token_weight)
        adaptive = 2 - t / self.transition.steps if self.config.adaptive_auxiliary else torch.ones_like(t)
        auxiliary = self.config.auxiliary_weight * adaptive.to(dtype)[:, None]
        loss = token_weight.to(dtype) * divergence - auxiliary * log_true
        return ObjectiveOutput(
            loss_per_image=loss.mean(-1),
            vlb_per_image=divergence.detach().mean(-1),
            cross_entropy_per_image=-log_true.detach().mean(-1),
            masked_correct=(correct & terms.masked).sum(-1).to(dtype),
            masked_count=terms.masked.sum(-1).to(dtype),
            visible_correct=(correct & ~terms.masked).sum(-1).to(dtype),
            visible_count=(~terms.masked).sum(-1).to(dtype),
        )


@dataclass(frozen=True)
class _KLTerms:
    """Tokens of a batch and the coefficients of their KL: [batch, length], or [batch, 1] if functions of t.

    With p = p(x_0 | x_t), every code except a visible x_t has ``p(x_{t-1} = k) = match p_k + spread V`` with
    ``V = 1 - (1 - reach) p(x_t)``. A mask has reach = 1 and V = 1. See `PosteriorRates`.
    """

    codes: int
    tokens: Tokens
    observed: Tokens
    masked: Bool[Tensor, "batch length"]
    unchanged: Bool[Tensor, "batch length"]
    reach: PerToken
    log_match: PerToken
    log_spread: PerToken
    rates: PosteriorRates

    @staticmethod
    def of(
        rates: Rates, tokens: Tokens, noisy: Tokens, t: Int[Tensor, " batch"], dtype: torch.dtype
    ) -> "_KLTerms":
        coefficients = posterior_rates(rates, t[:, None], t[:, None] - 1)
        masked = noisy == rates.codes
        match = torch.where(masked, coefficients.masked_match, coefficients.other_match)
        spread = torch.where(masked, coefficients.masked_spread, coefficients.other_spread)
        return _KLTerms(
            codes=rates.codes,
            tokens=tokens,
            observed=noisy.clamp(max=rates.codes - 1),
            masked=masked,
            unchanged=noisy == tokens,
            reach=torch.where(masked, 1.0, coefficients.reach).to(dtype),
            log_match=_log(match).to(dtype),
            log_spread=_log(spread).to(dtype),
            rates=coefficients,
        )

    def divergence(self, log_true: PerToken, log_observed: PerToken, code_sum: PerToken) -> PerToken:
        """Compute KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)) in nats per token; the decoder term at t = 0.

        The codes x_0 and a visible x_t have their own terms; the other codes share ``code_sum``, the sum of
        their logarithms. The mask state has the same probability on both sides. Example with K = 4, mask 4:

            x_0  x_t             own terms  shared by
            2    4    masked     2          0, 1, 3
            0    0    unchanged  0          1, 2, 3
            3    1    replaced   3, 1       0, 2
        """
        rates = self.rates
        log_mass = log_replaceable_mass(self.reach, log_observed)
        log_spread = self.log_spread + log_mass
        log_true_code = torch.logaddexp(self.log_match + log_true, log_spread)
        log_observed_code = torch.logaddexp(self.log_match + log_observed, log_spread)
        log_stay = torch.logaddexp(
            _log(rates.stay_match).to(log_observed) + log_observed,
            _log(rates.stay_spread).to(log_observed) + log_mass,
        )
        replaced = ~self.masked & ~self.unchanged
        stays = rates.stay_match + rates.stay_spread * rates.reach
        leaves = torch.where(
            self.masked, rates.masked_match + rates.masked_spread, rates.other_match + rates.other_spread
        )
        visible_spread = rates.other_spread * torch.where(self.unchanged, rates.reach, 1.0)
        shared_weight = torch.where(self.masked, rates.masked_spread, visible_spread)
        log_shared_weight = torch.where(self.unchanged, _log(rates.reach), 0.0).to(log_mass)
        code_sum = (
            code_sum
            - torch.where(self.unchanged, 0.0, log_true_code - log_spread)
            - torch.where(self.masked, 0.0, log_observed_code - log_spread)
        )
        shared_codes = self.codes - 1 - replaced.long()
        true_rate = torch.where(self.unchanged, stays, leaves)
        return (
            _kl_term(true_rate, torch.where(self.unchanged, log_stay, log_true_code))
            + _kl_term(torch.where(replaced, rates.stay_spread, 0.0), log_stay)
            - shared_weight.to(code_sum) * (shared_codes * (log_mass - log_shared_weight) + code_sum)
        )


def _kl_term(probability: PerToken, log_model: PerToken) -> PerToken:
    """Compute one state's KL term: probability · (log probability - log model)."""
    return torch.xlogy(probability, probability).to(log_model) - probability.to(log_model) * log_model


def _log(probability: Float[Tensor, " *shape"]) -> Float[Tensor, " *shape"]:
    return probability.log().clamp(min=_LOG_ZERO)
