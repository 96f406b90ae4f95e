"""Classifier-free guidance and truncation of a prediction, applied before the sampler.

Pure, stateless functions from `Predict` to `Predict`. The order is that of the reference code: log-softmax,
combine, renormalize, clamp, truncate, posterior.
"""

from collections.abc import Callable

import torch

from vqd_scale.diffusion.config import GuidanceScale, Truncation
from vqd_scale.diffusion.sampling_plan import LogProbabilities
from vqd_scale.diffusion.transition import Tokens

Predict = Callable[[Tokens, int], LogProbabilities]
"""Function (x_t with mask id K, time t) -> log p(x_0 | x_t), log-softmaxed over the K codes."""

PredictPair = Callable[[Tokens, int], tuple[LogProbabilities, LogProbabilities]]
"""Function (x_t, t) -> conditional and unconditional log p(x_0 | x_t), e.g. from one doubled batch."""

_LOWEST_LOG = -70.0


def apply_guidance(conditional: Predict, pair: PredictPair, scale: GuidanceScale) -> Predict:
    """Apply classifier-free guidance.

    Args:
        conditional: log p(x_0 | x_t, caption); called alone where the scale is 1.
        pair: Returns log p(x_0 | x_t, caption) and log p(x_0 | x_t, null).
        scale: Guidance scale: 0 is unconditional, 1 conditional, above 1 extrapolates.
    """

    def predict(tokens: Tokens, t: int) -> LogProbabilities:
        current_scale = scale.at(t)
        return conditional(tokens, t) if current_scale == 1 else _combine(*pair(tokens, t), current_scale)

    return predict


def truncate(predict: Predict, truncation: Truncation) -> Predict:
    """Set the probability of all truncated codes to zero.

    The result is not renormalized: samplers and the posterior are linear in p.
    """

    def predict_truncated(tokens: Tokens, t: int) -> LogProbabilities:
        return truncation.apply(predict(tokens, t))

    return predict_truncated


def _combine(
    conditional: LogProbabilities, unconditional: LogProbabilities, scale: float
) -> LogProbabilities:
    """Combine log p(x_0) as in Improved VQ-Diffusion's code: log p ∝ u + scale (c - u)."""
    return torch.lerp(unconditional, conditional, scale).log_softmax(-1).clamp(min=_LOWEST_LOG)
