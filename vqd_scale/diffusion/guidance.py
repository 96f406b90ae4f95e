"""Classifier-free guidance and truncation of a prediction, applied before the sampler.

Pure, stateless functions from `Predict` to `Predict`. The order is that of the reference code: log-softmax,
combine, renormalize, clamp, truncate, posterior.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vqd_scale.diffusion.config import GuidanceScale, Truncation

Predict = Callable[[Int[Tensor, "batch length"], int], Float[Tensor, "batch length codes"]]
"""Function (x_t with mask id K, time t) -> log p(x_0 | x_t), log-softmaxed over the K codes."""

PredictPair = Callable[
    [Int[Tensor, "batch length"], int],
    tuple[Float[Tensor, "batch length codes"], Float[Tensor, "batch length codes"]],
]
"""Function (x_t, t) -> conditional and unconditional log p(x_0 | x_t), e.g. from one doubled batch."""

_LOWEST_LOG = -70.0


def apply_guidance(conditional: Predict, pair: PredictPair, scale: GuidanceScale) -> Predict:
    """Apply classifier-free guidance.

    Args:
        conditional: log p(x_0 | x_t, caption); called alone where the scale is 1.
        pair: Returns log p(x_0 | x_t, caption) and log p(x_0 | x_t, null).
        scale: Guidance scale: 0 is unconditional, 1 conditional, above 1 extrapolates.
    """

    def predict(tokens: Int[Tensor, "batch length"], t: int) -> Float[Tensor, "batch length codes"]:
        current_scale = scale.at(t)
        return conditional(tokens, t) if current_scale == 1 else _combine(*pair(tokens, t), current_scale)

    return predict


def truncate(predict: Predict, truncation: Truncation) -> Predict:
    """Set the probability of all truncated codes to zero.

    The result is not renormalized: samplers and the posterior are linear in p.
    """

    def predict_truncated(tokens: Int[Tensor, "batch length"], t: int) -> Float[Tensor, "batch length codes"]:
        log_p = predict(tokens, t)
        sorted_log, order = log_p.sort(dim=-1, descending=True, stable=True)
        support = torch.empty_like(log_p, dtype=torch.bool).scatter_(
            -1, order, truncation.support_mask(sorted_log)
        )
        return log_p.masked_fill(~support, -torch.inf)

    return predict_truncated


def _combine(
    conditional: Float[Tensor, "batch length codes"],
    unconditional: Float[Tensor, "batch length codes"],
    scale: float,
) -> Float[Tensor, "batch length codes"]:
    """Combine log p(x_0) as in Improved VQ-Diffusion's code: log p ∝ u + scale (c - u)."""
    return torch.lerp(unconditional, conditional, scale).log_softmax(-1).clamp(min=_LOWEST_LOG)
