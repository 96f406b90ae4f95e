"""Classifier-free guidance and truncation of a prediction, applied before the sampler.

Pure, stateless functions from `Predict` to `Predict`. The order is that of the reference code: log-softmax,
combine, renormalize, clamp, truncate, posterior.
"""

from collections.abc import Callable
from typing import Annotated, Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field, model_validator
from torch import Tensor
from typing_extensions import Self

from vqd_scale.core.config import Config

Predict = Callable[[Int[Tensor, "batch length"], int], Float[Tensor, "batch length codes"]]
"""Function (x_t with mask id K, time t) -> log p(x_0 | x_t), log-softmaxed over the K codes."""

PredictPair = Callable[
    [Int[Tensor, "batch length"], int],
    tuple[Float[Tensor, "batch length codes"], Float[Tensor, "batch length codes"]],
]
"""Function (x_t, t) -> conditional and unconditional log p(x_0 | x_t), e.g. from one doubled batch."""

_LOWEST_LOG = -70.0


class ConstantGuidance(Config):
    """Guidance with the same scale at every time.

    Scale 1 is the conditional prediction, 0 the unconditional one. The convention is that of the released
    code; the scale s of the Improved VQ-Diffusion paper is smaller by 1.
    """

    kind: Literal["constant"] = "constant"
    scale: float = Field(default=3.0, ge=0)

    def at(self, t: int) -> float:
        """Return the guidance scale at time ``t``."""
        return self.scale


class Linear(Config):
    """Guidance scale linear in time: ``clean`` at t = 0, ``noisy`` at t >= ``noisy_time``."""

    kind: Literal["linear"] = "linear"
    noisy: float = Field(default=1.0, ge=0)
    clean: float = Field(default=3.0, ge=0)
    noisy_time: int = Field(default=99, ge=1)

    def at(self, t: int) -> float:
        """Return the guidance scale at time ``t``."""
        return self.clean + (self.noisy - self.clean) * min(t / self.noisy_time, 1.0)


class IntervalGuidance(Config):
    """Guidance limited to times ``first`` down to ``last`` (Kynkäänniemi et al., arXiv 2404.07724).

    The scale is 1 at all other times.
    """

    kind: Literal["interval"] = "interval"
    scale: float = Field(default=3.0, ge=0)
    first: int = Field(default=80, ge=0)
    last: int = Field(default=20, ge=0)

    @model_validator(mode="after")
    def _first_comes_first(self) -> Self:
        if self.last > self.first:
            raise ValueError(
                f"last is {self.last}, first is {self.first}; sampling goes from first down to last"
            )
        return self

    def at(self, t: int) -> float:
        """Return the guidance scale at time ``t``."""
        return self.scale if self.last <= t <= self.first else 1.0


GuidanceScale = Annotated[ConstantGuidance | Linear | IntervalGuidance, Field(discriminator="kind")]


class TopP(Config):
    """Top-p truncation: the most likely codes with total probability ``p`` (the reference's "0.86r")."""

    kind: Literal["top_p"] = "top_p"
    p: float = Field(default=0.86, ge=0, le=1)

    def keeps(self, sorted_log: Float[Tensor, "batch length codes"]) -> Tensor:
        """Return a boolean mask of the kept codes, for codes in order of descending probability.

        The first code is kept, and every code whose predecessors sum to less than ``p``.
        """
        if self.p == 1:
            return torch.ones_like(sorted_log, dtype=torch.bool)
        before = sorted_log.exp().cumsum(-1, dtype=torch.float64).roll(1, -1)
        before[..., 0] = -1.0
        return before < self.p


class TopK(Config):
    """Top-k truncation: the ``k`` most likely codes."""

    kind: Literal["top_k"] = "top_k"
    k: int = Field(default=100, ge=1)

    def keeps(self, sorted_log: Float[Tensor, "batch length codes"]) -> Tensor:
        """Return a boolean mask of the kept codes, for codes in order of descending probability."""
        places = torch.arange(sorted_log.shape[-1], device=sorted_log.device)
        return (places < self.k).expand_as(sorted_log)


Truncation = Annotated[TopP | TopK, Field(discriminator="kind")]


def guided(conditional: Predict, unconditional: Predict, scale: GuidanceScale) -> Predict:
    """Apply classifier-free guidance with two forward passes (one where the scale is 1).

    Args:
        conditional: log p(x_0 | x_t, caption).
        unconditional: log p(x_0 | x_t, null).
        scale: Guidance scale: 0 is unconditional, 1 conditional, above 1 extrapolates.
    """
    return guided_pair(
        conditional, lambda tokens, t: (conditional(tokens, t), unconditional(tokens, t)), scale
    )


def guided_pair(conditional: Predict, pair: PredictPair, scale: GuidanceScale) -> Predict:
    """Apply classifier-free guidance with both predictions from one forward pass of a doubled batch.

    Args:
        conditional: log p(x_0 | x_t, caption); called alone where the scale is 1.
        pair: Returns the conditional and the unconditional prediction.
        scale: Guidance scale, see `guided`.
    """

    def predict(tokens: Int[Tensor, "batch length"], t: int) -> Float[Tensor, "batch length codes"]:
        now = scale.at(t)
        return conditional(tokens, t) if now == 1 else _combined(*pair(tokens, t), now)

    return predict


def truncated(predict: Predict, truncation: Truncation) -> Predict:
    """Set the probability of all truncated codes to zero.

    The result is not renormalized: samplers and the posterior are linear in p.
    """

    def truncate(tokens: Int[Tensor, "batch length"], t: int) -> Float[Tensor, "batch length codes"]:
        log_p = predict(tokens, t)
        sorted_log, order = log_p.sort(dim=-1, descending=True, stable=True)
        kept = torch.empty_like(log_p, dtype=torch.bool).scatter_(-1, order, truncation.keeps(sorted_log))
        return log_p.masked_fill(~kept, -torch.inf)

    return truncate


def _combined(
    conditional: Float[Tensor, "batch length codes"],
    unconditional: Float[Tensor, "batch length codes"],
    scale: float,
) -> Float[Tensor, "batch length codes"]:
    """Combine log p(x_0) as in Improved VQ-Diffusion's code: log p ∝ u + scale (c - u)."""
    return torch.lerp(unconditional, conditional, scale).log_softmax(-1).clamp(min=_LOWEST_LOG)
