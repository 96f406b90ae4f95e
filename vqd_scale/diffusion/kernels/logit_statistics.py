# pyright: basic, reportArgumentType=false, reportCallIssue=false
# Kernel parameters are Triton tensors inside and PyTorch tensors outside: no annotation fits both.
"""Triton kernels of `vqd_scale.diffusion.logit_statistics`: one program reads one row once, into registers.

Memory traffic equals that of a copy; PyTorch operations pass over the logits a dozen times.
"""

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from vqd_scale.diffusion.logit_statistics import LOG_HUGE, LogitRows, LogitStatistics, LossFactors

_LOG_HUGE = tl.constexpr(LOG_HUGE)
_TINY = tl.constexpr(torch.finfo(torch.float32).tiny)


class TritonRows:
    """Triton version of `logit_statistics.TorchRows`; a token outside the codebook makes its row NaN."""

    keeps_softmax = False

    def read(
        self,
        logits: Float[Tensor, "tokens codes"],
        rows: LogitRows,
        into: LogitStatistics,
        kept: Float[Tensor, "tokens codes"] | None,
    ) -> None:
        """Compute the statistics of each row; the softmax is not kept."""
        with torch.cuda.device_of(logits):
            _read[(len(logits),)](
                logits,
                logits.stride(0),
                logits.stride(1),
                rows.true,
                rows.seen,
                rows.reach,
                rows.log_ratio,
                into.log_true,
                into.log_seen,
                into.code_sum,
                into.correct,
                logits.shape[1],
                **_launch(logits.shape[1]),
            )

    def gradient(
        self,
        logits: Float[Tensor, "tokens codes"],
        rows: LogitRows,
        factors: LossFactors,
        out: Float[Tensor, "tokens codes"] | None,
        *,
        kept: bool,
    ) -> Float[Tensor, "tokens codes"]:
        """Compute the gradient of each row's logits; overwrites the logits without ``out``."""
        out = logits if out is None else out
        with torch.cuda.device_of(logits):
            _gradient[(len(logits),)](
                logits,
                logits.stride(0),
                logits.stride(1),
                rows.true,
                rows.seen,
                factors.of_true.contiguous(),
                factors.of_seen.contiguous(),
                factors.of_sum.contiguous(),
                factors.ratio,
                factors.slope,
                out,
                out.stride(0),
                out.stride(1),
                logits.shape[1],
                **_launch(logits.shape[1]),
            )
        return out


def _launch(codes: int) -> dict[str, int]:
    width = triton.next_power_of_2(codes)
    # About 16 elements of a row per thread.
    return {"width": width, "num_warps": min(max(width // 512, 1), 32)}


@triton.jit
def _read(
    logits: tl.tensor,
    row_stride: tl.tensor,
    code_stride: tl.tensor,
    true: tl.tensor,
    seen: tl.tensor,
    reach: tl.tensor,
    log_ratio: tl.tensor,
    log_true: tl.tensor,
    log_seen: tl.tensor,
    code_sum: tl.tensor,
    correct: tl.tensor,
    codes: tl.tensor,
    width: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    code = tl.arange(0, width)
    reachable = tl.load(reach + row)
    line = tl.load(logits + row * row_stride + code * code_stride, mask=code < codes, other=float("-inf"))
    line = line.to(reachable.dtype)
    at_true, at_seen = tl.load(true + row), tl.load(seen + row)
    top = tl.max(line, 0)
    line -= top + tl.log(tl.sum(tl.exp(line - top), 0))
    chance = tl.exp(line)
    found_true, found_seen = _at(line, code, at_true, codes), _at(line, code, at_seen, codes)
    share = reachable * tl.exp(found_seen) + tl.sum(tl.where(code == at_seen, 0.0, chance), 0)
    log_share = tl.log(tl.maximum(share, _TINY))
    ratio = tl.exp(tl.minimum(tl.load(log_ratio + row) - log_share, _LOG_HUGE))
    tl.store(log_true + row, found_true)
    tl.store(log_seen + row, found_seen)
    tl.store(code_sum + row, tl.sum(tl.log(1 + ratio * chance), 0))
    tl.store(correct + row, found_true > tl.max(tl.where(code == at_true, float("-inf"), line), 0))


@triton.jit
def _at(line: tl.tensor, code: tl.tensor, place: tl.tensor, codes: tl.tensor) -> tl.tensor:
    # An index out of range becomes NaN: raising an error would require a device synchronization.
    found = tl.sum(tl.where(code == place, line, 0.0), 0)
    return tl.where((place >= 0) & (place < codes), found, float("nan"))


@triton.jit
def _gradient(
    logits: tl.tensor,
    row_stride: tl.tensor,
    code_stride: tl.tensor,
    true: tl.tensor,
    seen: tl.tensor,
    of_true: tl.tensor,
    of_seen: tl.tensor,
    of_sum: tl.tensor,
    ratio: tl.tensor,
    slope: tl.tensor,
    out: tl.tensor,
    out_row_stride: tl.tensor,
    out_code_stride: tl.tensor,
    codes: tl.tensor,
    width: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    code = tl.arange(0, width)
    gamma, for_sum, for_true = tl.load(ratio + row), tl.load(of_sum + row), tl.load(of_true + row)
    line = tl.load(logits + row * row_stride + code * code_stride, mask=code < codes, other=float("-inf"))
    line = line.to(gamma.dtype)
    top = tl.max(line, 0)
    chance = tl.exp(line - top)
    chance /= tl.sum(chance, 0)
    inverse = 1 / (1 + gamma * chance)
    # d Σ log(1 + γ p_k) / d log p_k = γ p_k / (1 + γ p_k)
    total = tl.sum(gamma * chance * inverse, 0)
    for_seen = tl.load(of_seen + row) + for_sum * total * tl.load(slope + row)
    to_line = chance * (for_sum * gamma * inverse - (for_true + for_seen + for_sum * total))
    to_line += tl.where(code == tl.load(true + row), for_true, 0.0)
    to_line += tl.where(code == tl.load(seen + row), for_seen, 0.0)
    tl.store(out + row * out_row_stride + code * out_code_stride, to_line, mask=code < codes)
