"""What is done to a prediction before a sampler uses it: classifier-free guidance, then truncation.

Pure functions from `Predict` to `Predict`; nothing is patched, and nothing is remembered between calls. The
order is the reference code's: log-softmax, combine, renormalise, clamp, truncate, and then the posterior.
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
"""log p(x_0 | x_t), log-softmaxed over the K codes, from x_t (masks are K) and the time t."""

PredictPair = Callable[
    [Int[Tensor, "batch length"], int],
    tuple[Float[Tensor, "batch length codes"], Float[Tensor, "batch length codes"]],
]
"""The conditional and the unconditional log p(x_0 | x_t), such as the halves of one doubled batch."""

_LOWEST_LOG = -70.0


class ConstantGuidance(Config):
    """The same scale at every time. 1 is the conditional prediction, 0 the unconditional one.

    It is the released code's scale; the scale s in the Improved VQ-Diffusion paper is one less.
    """

    kind: Literal["constant"] = "constant"
    scale: float = Field(default=3.0, ge=0)

    def at(self, t: int) -> float:
        """The scale at time ``t``."""
        return self.scale


class Linear(Config):
    """A straight line from ``clean`` at t = 0 to ``noisy`` at ``noisy_time``, and ``noisy`` before it."""

    kind: Literal["linear"] = "linear"
    noisy: float = Field(default=1.0, ge=0)
    clean: float = Field(default=3.0, ge=0)
    noisy_time: int = Field(default=99, ge=1)

    def at(self, t: int) -> float:
        """The scale at time ``t``."""
        return self.clean + (self.noisy - self.clean) * min(t / self.noisy_time, 1.0)


class IntervalGuidance(Config):
    """Guidance only from time ``first`` down to ``last`` (Kynkäänniemi et al., arXiv 2404.07724)."""

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
        """The scale at time ``t``."""
        return self.scale if self.last <= t <= self.first else 1.0


GuidanceScale = Annotated[ConstantGuidance | Linear | IntervalGuidance, Field(discriminator="kind")]


class TopP(Config):
    """Keep the likeliest codes until their probabilities reach ``rate`` (the reference's "0.86r")."""

    kind: Literal["top_p"] = "top_p"
    p: float = Field(default=0.86, ge=0, le=1)

    def keeps(self, sorted_log: Float[Tensor, "batch length codes"]) -> Tensor:
        """Which places, likeliest first, stay: the first, and those with less than ``rate`` before them."""
        if self.p == 1:
            return torch.ones_like(sorted_log, dtype=torch.bool)
        before = sorted_log.exp().cumsum(-1, dtype=torch.float64).roll(1, -1)
        before[..., 0] = -1.0
        return before < self.p


class TopK(Config):
    """Keep the ``count`` likeliest codes."""

    kind: Literal["top_k"] = "top_k"
    k: int = Field(default=100, ge=1)

    def keeps(self, sorted_log: Float[Tensor, "batch length codes"]) -> Tensor:
        """Which places, likeliest first, stay."""
        places = torch.arange(sorted_log.shape[-1], device=sorted_log.device)
        return (places < self.k).expand_as(sorted_log)


Truncation = Annotated[TopP | TopK, Field(discriminator="kind")]


def guided(conditional: Predict, unconditional: Predict, scale: GuidanceScale) -> Predict:
    """Classifier-free guidance with two evaluations; where the scale is 1 the second one is left out.

    Args:
        conditional: log p(x_0 | x_t, caption).
        unconditional: log p(x_0 | x_t, null).
        scale: How far to go from the second towards, and past, the first.
    """
    return guided_pair(
        conditional, lambda tokens, t: (conditional(tokens, t), unconditional(tokens, t)), scale
    )


def guided_pair(conditional: Predict, pair: PredictPair, scale: GuidanceScale) -> Predict:
    """Classifier-free guidance where both predictions come from one evaluation of a doubled batch.

    Args:
        conditional: Used alone where the scale is 1.
        pair: Gives the conditional and the unconditional prediction.
        scale: As in `guided`.
    """

    def predict(tokens: Int[Tensor, "batch length"], t: int) -> Float[Tensor, "batch length codes"]:
        now = scale.at(t)
        return conditional(tokens, t) if now == 1 else _combined(*pair(tokens, t), now)

    return predict


def truncated(predict: Predict, truncation: Truncation) -> Predict:
    """Take the chance from all but the likeliest codes.

    The rest is not renormalised: samplers and the posterior are linear in p, so it makes no difference.
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
    """Improved VQ-Diffusion's guidance, on p(x_0) as in its code: log p ∝ u + scale (c - u)."""
    return torch.lerp(unconditional, conditional, scale).log_softmax(-1).clamp(min=_LOWEST_LOG)
