"""Statistics of logit rows for the objective, and the gradient of the logits, in PyTorch operations.

`vqd_scale.diffusion.kernels.logit_statistics` has the Triton kernels; `fused_loss` selects between them.
"""

import math
from dataclasses import dataclass
from typing import TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from typing_extensions import Self

PerRow: TypeAlias = Float[Tensor, " tokens"]
Logits: TypeAlias = Float[Tensor, "tokens codes"]

# Upper bound of log γ: the product of two factors 1 + γ p must fit in float32.
LOG_HUGE = 40.0


@dataclass(frozen=True)
class _Rows:
    """Tensors with one element per row of logits."""

    def part(self, rows: slice) -> Self:
        """Return views of the rows of a slice."""
        return type(self)(*(tensor[rows] for tensor in vars(self).values()))


@dataclass(frozen=True)
class LogitRows(_Rows):
    """Tokens and schedule coefficients, one per row of logits.

    Attributes:
        true: x_0, int64.
        observed: x_t where it is a code, an arbitrary code where it is the mask; int64.
        reach: 1 for a mask; for a visible x_t see `transition.PosteriorRates`.
        log_ratio: log(match / spread), in the dtype of the sums.
    """

    true: Int[Tensor, " tokens"]
    observed: Int[Tensor, " tokens"]
    reach: PerRow
    log_ratio: PerRow


@dataclass(frozen=True)
class LogitStatistics(_Rows):
    """Statistics of rows of logits.

    Attributes:
        log_true: log p(x_0).
        log_observed: log p(x_t).
        code_sum: Σ_k log(1 + γ p_k), see `code_ratio`.
        correct: True if x_0 is the most likely code; false for a tie.
    """

    log_true: PerRow
    log_observed: PerRow
    code_sum: PerRow
    correct: Bool[Tensor, " tokens"]

    @staticmethod
    def empty_for(rows: LogitRows) -> "LogitStatistics":
        """Allocate uninitialized statistics, one per row."""
        log_true, log_observed, code_sum = (torch.empty_like(rows.reach) for _ in range(3))
        correct = torch.empty_like(rows.true, dtype=torch.bool)
        return LogitStatistics(log_true, log_observed, code_sum, correct)


@dataclass(frozen=True)
class LossFactors(_Rows):
    """Factors of a row's gradient: the gradients of its statistics, and the derivative of γ.

    Attributes:
        of_true: d loss / d log p(x_0).
        of_observed: d loss / d log p(x_t).
        of_sum: d loss / d code_sum.
        ratio: γ, see `code_ratio`.
        slope: d log γ / d log p(x_t), zero for masks.
    """

    of_true: PerRow
    of_observed: PerRow
    of_sum: PerRow
    ratio: PerRow
    slope: PerRow

    @staticmethod
    def of(
        rows: LogitRows, log_observed: PerRow, of_true: PerRow, of_observed: PerRow, of_sum: PerRow
    ) -> "LossFactors":
        """Combine the gradients with γ and its derivative at ``log_observed``."""
        ratio = code_ratio(rows, log_observed)
        slope = (1 - rows.reach) * (log_observed - log_replaceable_mass(rows.reach, log_observed)).exp()
        slope = torch.where(ratio < math.exp(LOG_HUGE), slope, 0.0)
        return LossFactors(of_true, of_observed, of_sum, ratio, slope)


def log_replaceable_mass(
    reach: Float[Tensor, " *shape"], log_observed: Float[Tensor, " *shape"]
) -> Float[Tensor, " *shape"]:
    """Compute log V = log(1 - (1 - reach) p(x_t)), V being the mass of p that can be replaced by x_t."""
    mass = reach * log_observed.exp() - torch.expm1(log_observed)
    return mass.clamp(min=torch.finfo(mass.dtype).tiny).log()


def code_ratio(rows: LogitRows, log_observed: PerRow) -> PerRow:
    """Compute γ = match / (spread V), as in ``p(x_{t-1} = k) = spread V (1 + γ p_k)``."""
    return (rows.log_ratio - log_replaceable_mass(rows.reach, log_observed)).clamp(max=LOG_HUGE).exp()


class TorchRows:
    """PyTorch operations for one pass over the chunks; buffers are reused and stay in the CPU cache."""

    def __init__(self) -> None:
        self._buffers: dict[int, Tensor] = {}

    def compute_statistics(self, logits: Logits, rows: LogitRows, statistics: LogitStatistics) -> None:
        """Write the statistics of each row into ``statistics``; logits have the dtype of ``rows.reach``."""
        at_true, at_observed = rows.true[:, None], rows.observed[:, None]
        softmax = torch.softmax(logits, -1, out=self._buffer(0, logits))
        p_true = softmax.gather(-1, at_true)
        p_other = softmax.scatter_(-1, at_true, 0.0).amax(-1, keepdim=True)
        softmax.scatter_(-1, at_true, p_true)
        # The largest probability is at least 1/K, so its logarithm is exact where others underflow.
        log_norm = logits.amax(-1, keepdim=True) - torch.maximum(p_true, p_other).log()
        statistics.log_true.copy_((logits.gather(-1, at_true) - log_norm).squeeze(-1))
        statistics.log_observed.copy_((logits.gather(-1, at_observed) - log_norm).squeeze(-1))
        statistics.correct.copy_((p_true > p_other).squeeze(-1))
        ratio = code_ratio(rows, statistics.log_observed)[:, None]
        statistics.code_sum.copy_(_log_product(softmax.mul_(ratio).add_(1)))

    def compute_gradient(self, logits: Logits, rows: LogitRows, factors: LossFactors) -> Logits:
        """Compute the gradient of each row's logits; valid until the next call."""
        out = torch.softmax(logits, -1, out=self._buffer(1, logits))
        ratio, of_true, of_sum = factors.ratio[:, None], factors.of_true[:, None], factors.of_sum[:, None]
        inverse = torch.mul(out, ratio, out=self._buffer(0, out)).add_(1).reciprocal_()
        # d Σ log(1 + γ p_k) / d log p_k = γ p_k / (1 + γ p_k) = 1 - inverse_k
        total = out.shape[-1] - inverse.sum(-1, keepdim=True)
        # γ itself depends on p(x_t) where x_t is visible.
        of_observed = factors.of_observed[:, None] + of_sum * total * factors.slope[:, None]
        inverse.mul_(of_sum * ratio).sub_(of_true + of_observed + of_sum * total)
        out.mul_(inverse)
        out.scatter_add_(-1, rows.true[:, None], of_true)
        return out.scatter_add_(-1, rows.observed[:, None], of_observed)

    def _buffer(self, number: int, like: Logits) -> Logits:
        if number not in self._buffers:
            self._buffers[number] = torch.empty_like(like)
        # Only the last chunk can be shorter than the first.
        return self._buffers[number][: len(like)]


def _log_product(factors: Logits) -> PerRow:
    """Compute Σ log over the codes with one logarithm per two factors; overwrites ``factors``."""
    half = factors.shape[-1] // 2
    pairs = factors[:, :half].mul_(factors[:, half : 2 * half])
    return pairs.log_().sum(-1) + factors[:, 2 * half :].log().sum(-1)
