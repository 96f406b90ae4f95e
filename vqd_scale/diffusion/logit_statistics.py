"""What the objective needs from rows of logits, and the gradient back to them, in PyTorch's operations.

`vqd_scale.diffusion.kernels.logit_statistics` is the same as Triton kernels; `statistics` chooses.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

# The largest log γ: two factors 1 + γ p may be multiplied in float32.
LOG_HUGE = 40.0


@dataclass(frozen=True)
class LogitRows:
    """What the schedule says of each token, beside its row of logits.

    Attributes:
        true: x_0, int64.
        seen: x_t where it is a code, any code where it is the mask; int64.
        reach: 1 for a mask; of a visible x_t see `transition.PosteriorRates`.
        log_ratio: log(match / spread), of the dtype in which everything is summed.
    """

    true: Int[Tensor, " tokens"]
    seen: Int[Tensor, " tokens"]
    reach: Float[Tensor, " tokens"]
    log_ratio: Float[Tensor, " tokens"]

    def part(self, rows: slice) -> "LogitRows":
        """Some of the tokens."""
        return LogitRows(self.true[rows], self.seen[rows], self.reach[rows], self.log_ratio[rows])


@dataclass(frozen=True)
class LogitStatistics:
    """What is read off a row of logits.

    Attributes:
        log_true: log p(x_0).
        log_seen: log p(x_t).
        code_sum: Σ_k log(1 + γ p_k), see `code_ratio`.
        correct: x_0 is the likeliest code; a tie is no hit.
    """

    log_true: Float[Tensor, " tokens"]
    log_seen: Float[Tensor, " tokens"]
    code_sum: Float[Tensor, " tokens"]
    correct: Bool[Tensor, " tokens"]

    def part(self, rows: slice) -> "LogitStatistics":
        """Views of some of the tokens."""
        return LogitStatistics(
            self.log_true[rows], self.log_seen[rows], self.code_sum[rows], self.correct[rows]
        )

    @staticmethod
    def empty_for(rows: LogitRows) -> "LogitStatistics":
        """Room for one reading per token."""
        log_true, log_seen, code_sum = (torch.empty_like(rows.reach) for _ in range(3))
        return LogitStatistics(log_true, log_seen, code_sum, torch.empty_like(rows.true, dtype=torch.bool))


@dataclass(frozen=True)
class LossFactors:
    """What a row's gradient is made of: the gradients of its reading, and how γ answers to p(x_t).

    Attributes:
        of_true: d loss / d log p(x_0).
        of_seen: d loss / d log p(x_t).
        of_sum: d loss / d code_sum.
        ratio: γ.
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
        """Of these gradients, at the ``log_seen`` that was read."""
        ratio = code_ratio(rows, log_seen)
        slope = (1 - rows.reach) * (log_seen - log_share(rows.reach, log_seen)).exp()
        slope = torch.where(ratio < math.exp(LOG_HUGE), slope, 0.0)
        return LossFactors(of_true, of_seen, of_sum, ratio, slope)

    def part(self, rows: slice) -> "LossFactors":
        """Some of the tokens."""
        return LossFactors(
            self.of_true[rows], self.of_seen[rows], self.of_sum[rows], self.ratio[rows], self.slope[rows]
        )


def log_share(
    reach: Float[Tensor, " *shape"], log_seen: Float[Tensor, " *shape"]
) -> Float[Tensor, " *shape"]:
    """Log V = log(1 - (1 - reach) p(x_t)), what of p could have become the visible x_t by replacement."""
    share = reach * log_seen.exp() - torch.expm1(log_seen)
    return share.clamp(min=torch.finfo(share.dtype).tiny).log()


def code_ratio(rows: LogitRows, log_seen: Float[Tensor, " tokens"]) -> Float[Tensor, " tokens"]:
    """γ in ``p(x_{t-1} = k) = spread V (1 + γ p_k)``: match / (spread V)."""
    return (rows.log_ratio - log_share(rows.reach, log_seen)).clamp(max=LOG_HUGE).exp()


class RowKernels(Protocol):
    """One pass over the rows, chunk after chunk; see `TorchRows` for what the arguments mean."""

    keeps_softmax: bool
    """Whether `read` leaves the softmax for `gradient`, where there is room for it."""

    def read(
        self,
        logits: Float[Tensor, "tokens codes"],
        rows: LogitRows,
        into: LogitStatistics,
        kept: Float[Tensor, "tokens codes"] | None,
    ) -> None:
        """Read each row off."""
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
        """The gradient of each row's logits."""
        ...


class TorchRows:
    """PyTorch's operations, for one pass over the chunks; the buffers are made once and stay in the cache."""

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
        """Read each row off.

        Args:
            logits: Of any float dtype; the sums run in that of ``rows.reach``.
            rows: The tokens.
            into: Where the results go.
            kept: Where to leave the softmax for `gradient`, in the dtype of the sums.
        """
        logits = logits.to(rows.reach.dtype)
        scratch = self._buffer(0, logits)
        at_true, at_seen = rows.true[:, None], rows.seen[:, None]
        softmax = torch.softmax(logits, -1, out=scratch if kept is None else kept)
        believed = softmax.gather(-1, at_true)
        rival = softmax.scatter_(-1, at_true, 0.0).amax(-1, keepdim=True)
        softmax.scatter_(-1, at_true, believed)
        # The largest probability is at least 1/K: its logarithm is exact where others underflow.
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
        """The gradient of each row's logits.

        Args:
            logits: As they were read; without ``out`` they may be overwritten.
            rows: The tokens.
            factors: What the gradient is made of.
            out: Where to build it; without it the result lasts until the next call.
            kept: ``out`` holds what `read` kept.
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
        # Only a last chunk is shorter than the first.
        return self._buffers[number][: len(like)]


def _log_product(factors: Float[Tensor, "tokens codes"]) -> Float[Tensor, " tokens"]:
    """Σ log over the codes, one logarithm for two factors, which it overwrites."""
    half = factors.shape[-1] // 2
    pairs = factors[:, :half].mul_(factors[:, half : 2 * half])
    return pairs.log_().sum(-1) + factors[:, 2 * half :].log().sum(-1)
