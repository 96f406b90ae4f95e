"""Statistics of logit rows for the objective, and the gradient of the logits, in PyTorch operations.

`vqd_scale.diffusion.kernels.logit_statistics` has the Triton kernels; `fused_loss` selects between them.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

# Upper bound of log γ: the product of two factors 1 + γ p must fit in float32.
LOG_HUGE = 40.0


@dataclass(frozen=True)
class LogitRows:
    """Tokens and schedule coefficients, one per row of logits.

    Attributes:
        true: x_0, int64.
        seen: x_t where it is a code, an arbitrary code where it is the mask; int64.
        reach: 1 for a mask; for a visible x_t see `transition.PosteriorRates`.
        log_ratio: log(match / spread), in the dtype of the sums.
    """

    true: Int[Tensor, " tokens"]
    seen: Int[Tensor, " tokens"]
    reach: Float[Tensor, " tokens"]
    log_ratio: Float[Tensor, " tokens"]

    def part(self, rows: slice) -> "LogitRows":
        """Return the rows of a slice."""
        return LogitRows(self.true[rows], self.seen[rows], self.reach[rows], self.log_ratio[rows])


@dataclass(frozen=True)
class LogitStatistics:
    """Statistics of rows of logits.

    Attributes:
        log_true: log p(x_0).
        log_seen: log p(x_t).
        code_sum: Σ_k log(1 + γ p_k), see `code_ratio`.
        correct: True if x_0 is the most likely code; false for a tie.
    """

    log_true: Float[Tensor, " tokens"]
    log_seen: Float[Tensor, " tokens"]
    code_sum: Float[Tensor, " tokens"]
    correct: Bool[Tensor, " tokens"]

    def part(self, rows: slice) -> "LogitStatistics":
        """Return views of the rows of a slice."""
        return LogitStatistics(
            self.log_true[rows], self.log_seen[rows], self.code_sum[rows], self.correct[rows]
        )

    @staticmethod
    def empty_for(rows: LogitRows) -> "LogitStatistics":
        """Allocate uninitialized statistics, one per row."""
        log_true, log_seen, code_sum = (torch.empty_like(rows.reach) for _ in range(3))
        return LogitStatistics(log_true, log_seen, code_sum, torch.empty_like(rows.true, dtype=torch.bool))


@dataclass(frozen=True)
class LossFactors:
    """Factors of a row's gradient: the gradients of its statistics, and the derivative of γ.

    Attributes:
        of_true: d loss / d log p(x_0).
        of_seen: d loss / d log p(x_t).
        of_sum: d loss / d code_sum.
        ratio: γ, see `code_ratio`.
        slope: d log γ / d log p(x_t), zero for masks.
    """

    of_true: Float[Tensor, " tokens"]
    of_seen: Float[Tensor, " tokens"]
    of_sum: Float[Tensor, " tokens"]
    ratio: Float[Tensor, " tokens"]
    slope: Float[Tensor, " tokens"]

    @staticmethod
    def of(
        rows: LogitRows,
        log_seen: Float[Tensor, " tokens"],
        of_true: Float[Tensor, " tokens"],
        of_seen: Float[Tensor, " tokens"],
        of_sum: Float[Tensor, " tokens"],
    ) -> "LossFactors":
        """Combine the gradients with γ and its derivative at ``log_seen``."""
        ratio = code_ratio(rows, log_seen)
        slope = (1 - rows.reach) * (log_seen - log_share(rows.reach, log_seen)).exp()
        slope = torch.where(ratio < math.exp(LOG_HUGE), slope, 0.0)
        return LossFactors(of_true, of_seen, of_sum, ratio, slope)

    def part(self, rows: slice) -> "LossFactors":
        """Return the rows of a slice."""
        return LossFactors(
            self.of_true[rows], self.of_seen[rows], self.of_sum[rows], self.ratio[rows], self.slope[rows]
        )


def log_share(
    reach: Float[Tensor, " *shape"], log_seen: Float[Tensor, " *shape"]
) -> Float[Tensor, " *shape"]:
    """Compute log V = log(1 - (1 - reach) p(x_t)), V being the mass of p that can be replaced by x_t."""
    share = reach * log_seen.exp() - torch.expm1(log_seen)
    return share.clamp(min=torch.finfo(share.dtype).tiny).log()


def code_ratio(rows: LogitRows, log_seen: Float[Tensor, " tokens"]) -> Float[Tensor, " tokens"]:
    """Compute γ = match / (spread V), as in ``p(x_{t-1} = k) = spread V (1 + γ p_k)``."""
    return (rows.log_ratio - log_share(rows.reach, log_seen)).clamp(max=LOG_HUGE).exp()


class RowKernels(Protocol):
    """Interface of one pass over the rows in chunks; see `TorchRows` for the arguments."""

    keeps_softmax: bool
    """True if `read` stores the softmax for `gradient` when given a buffer."""

    def read(
        self,
        logits: Float[Tensor, "tokens codes"],
        rows: LogitRows,
        into: LogitStatistics,
        kept: Float[Tensor, "tokens codes"] | None,
    ) -> None:
        """Compute the statistics of each row."""
        ...

    def gradient(
        self,
        logits: Float[Tensor, "tokens codes"],
        rows: LogitRows,
        factors: LossFactors,
        out: Float[Tensor, "tokens codes"] | None,
        *,
        kept: bool,
    ) -> Float[Tensor, "tokens codes"]:
        """Compute the gradient of each row's logits."""
        ...


class TorchRows:
    """PyTorch operations for one pass over the chunks; buffers are reused and stay in the CPU cache."""

    keeps_softmax = True

    def __init__(self) -> None:
        self._buffers: dict[int, Tensor] = {}

    def read(
        self,
        logits: Float[Tensor, "tokens codes"],
        rows: LogitRows,
        into: LogitStatistics,
        kept: Float[Tensor, "tokens codes"] | None,
    ) -> None:
        """Compute the statistics of each row.

        Args:
            logits: Logits of any float dtype; sums run in the dtype of ``rows.reach``.
            rows: Tokens and coefficients of the rows.
            into: Output, written in place.
            kept: Output buffer of the softmax for `gradient`, in the dtype of the sums.
        """
        logits = logits.to(rows.reach.dtype)
        scratch = self._buffer(0, logits)
        at_true, at_seen = rows.true[:, None], rows.seen[:, None]
        softmax = torch.softmax(logits, -1, out=scratch if kept is None else kept)
        believed = softmax.gather(-1, at_true)
        rival = softmax.scatter_(-1, at_true, 0.0).amax(-1, keepdim=True)
        softmax.scatter_(-1, at_true, believed)
        # The largest probability is at least 1/K, so its logarithm is exact where others underflow.
        log_norm = logits.amax(-1, keepdim=True) - torch.maximum(believed, rival).log()
        into.log_true.copy_((logits.gather(-1, at_true) - log_norm).squeeze(-1))
        into.log_seen.copy_((logits.gather(-1, at_seen) - log_norm).squeeze(-1))
        into.correct.copy_((believed > rival).squeeze(-1))
        ratio = code_ratio(rows, into.log_seen)[:, None]
        into.code_sum.copy_(_log_product(torch.mul(softmax, ratio, out=scratch).add_(1)))

    def gradient(
        self,
        logits: Float[Tensor, "tokens codes"],
        rows: LogitRows,
        factors: LossFactors,
        out: Float[Tensor, "tokens codes"] | None,
        *,
        kept: bool,
    ) -> Float[Tensor, "tokens codes"]:
        """Compute the gradient of each row's logits.

        Args:
            logits: Logits passed to `read`; may be overwritten without ``out``.
            rows: Tokens and coefficients of the rows.
            factors: Factors of the gradient.
            out: Output buffer; without it the result is valid until the next call.
            kept: True if ``out`` holds the softmax stored by `read`.
        """
        if out is None or not kept:
            logits = logits.to(rows.reach.dtype)
            out = torch.softmax(logits, -1, out=self._buffer(1, logits) if out is None else out)
        ratio, of_true, of_sum = factors.ratio[:, None], factors.of_true[:, None], factors.of_sum[:, None]
        inverse = torch.mul(out, ratio, out=self._buffer(0, out)).add_(1).reciprocal_()
        # d Σ log(1 + γ p_k) / d log p_k = γ p_k / (1 + γ p_k) = 1 - inverse_k
        total = out.shape[-1] - inverse.sum(-1, keepdim=True)
        # γ itself depends on p(x_t) where x_t is visible.
        of_seen = factors.of_seen[:, None] + of_sum * total * factors.slope[:, None]
        inverse.mul_(of_sum * ratio).sub_(of_true + of_seen + of_sum * total)
        out.mul_(inverse)
        out.scatter_add_(-1, rows.true[:, None], of_true)
        return out.scatter_add_(-1, rows.seen[:, None], of_seen)

    def _buffer(self, number: int, like: Float[Tensor, "tokens codes"]) -> Float[Tensor, "tokens codes"]:
        if number not in self._buffers:
            self._buffers[number] = torch.empty_like(like)
        # Only the last chunk can be shorter than the first.
        return self._buffers[number][: len(like)]


def _log_product(factors: Float[Tensor, "tokens codes"]) -> Float[Tensor, " tokens"]:
    """Compute Σ log over the codes with one logarithm per two factors; overwrites ``factors``."""
    half = factors.shape[-1] // 2
    pairs = factors[:, :half].mul_(factors[:, half : 2 * half])
    return pairs.log_().sum(-1) + factors[:, 2 * half :].log().sum(-1)
