# pyright: basic, reportArgumentType=false, reportCallIssue=false
# Kernel parameters are Triton tensors inside and PyTorch tensors outside: no annotation fits both.
"""Triton kernels of `vqd_scale.diffusion.logit_statistics`: one program reads one row once, into registers.

Memory traffic equals that of a copy; PyTorch operations pass over the logits a dozen times.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vqd_scale.diffusion.logit_statistics import LOG_HUGE, LogitRows, Logits, LogitStatistics, LossFactors

_LOG_HUGE = tl.constexpr(LOG_HUGE)
_TINY = tl.constexpr(torch.finfo(torch.float32).tiny)


class TritonRows:
    """Triton version of `logit_statistics.TorchRows`; a token outside the codebook makes its row NaN."""

    def compute_statistics(self, logits: Logits, rows: LogitRows, statistics: LogitStatistics) -> None:
        """Write the statistics of each row into ``statistics``."""
        _write_statistics(
            logits,
            rows.true,
            rows.observed,
            rows.reach,
            rows.log_ratio,
            statistics.log_true,
            statistics.log_observed,
            statistics.code_sum,
            statistics.correct,
        )

    def compute_gradient(self, logits: Logits, rows: LogitRows, factors: LossFactors) -> Logits:
        """Overwrite the logits with their gradient."""
        _overwrite_with_gradient(
            logits,
            rows.true,
            rows.observed,
            factors.of_true.contiguous(),
            factors.of_observed.contiguous(),
            factors.of_sum.contiguous(),
            factors.ratio,
            factors.slope,
        )
        return logits


# As operators of torch's library the kernels can be traced without a GPU, compiled around and exported.
@torch.library.custom_op(
    "vqd_scale::logit_statistics", mutates_args=("log_true", "log_observed", "code_sum", "correct")
)
def _write_statistics(
    logits: Tensor,
    true: Tensor,
    observed: Tensor,
    reach: Tensor,
    log_ratio: Tensor,
    log_true: Tensor,
    log_observed: Tensor,
    code_sum: Tensor,
    correct: Tensor,
) -> None:
    strides, codes = logits.stride(), logits.shape[1]
    outputs = (log_true, log_observed, code_sum, correct)
    with torch.cuda.device_of(logits):
        _statistics_kernel[(len(logits),)](
            logits, *strides, true, observed, reach, log_ratio, *outputs, codes, **_launch(codes)
        )


@torch.library.custom_op("vqd_scale::logit_gradient", mutates_args=("logits",))
def _overwrite_with_gradient(
    logits: Tensor,
    true: Tensor,
    observed: Tensor,
    of_true: Tensor,
    of_observed: Tensor,
    of_sum: Tensor,
    ratio: Tensor,
    slope: Tensor,
) -> None:
    strides, codes = logits.stride(), logits.shape[1]
    factors = (of_true, of_observed, of_sum, ratio, slope)
    with torch.cuda.device_of(logits):
        _gradient_kernel[(len(logits),)](logits, *strides, true, observed, *factors, codes, **_launch(codes))


def _launch(codes: int) -> dict[str, int]:
    width = triton.next_power_of_2(codes)
    # About 16 elements of a row per thread.
    return {"width": width, "num_warps": min(max(width // 512, 1), 32)}


@triton.jit
def _statistics_kernel(
    logits: tl.tensor,
    row_stride: tl.tensor,
    code_stride: tl.tensor,
    true: tl.tensor,
    observed: tl.tensor,
    reach: tl.tensor,
    log_ratio: tl.tensor,
    log_true: tl.tensor,
    log_observed: tl.tensor,
    code_sum: tl.tensor,
    correct: tl.tensor,
    codes: tl.tensor,
    width: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    code = tl.arange(0, width)
    reach_value = tl.load(reach + row)
    line = tl.load(logits + row * row_stride + code * code_stride, mask=code < codes, other=float("-inf"))
    line = line.to(reach_value.dtype)
    at_true, at_observed = tl.load(true + row), tl.load(observed + row)
    top = tl.max(line, 0)
    line -= top + tl.log(tl.sum(tl.exp(line - top), 0))
    p = tl.exp(line)
    log_p_true, log_p_observed = _at(line, code, at_true, codes), _at(line, code, at_observed, codes)
    mass = reach_value * tl.exp(log_p_observed) + tl.sum(tl.where(code == at_observed, 0.0, p), 0)
    log_mass = tl.log(tl.maximum(mass, _TINY))
    ratio = tl.exp(tl.minimum(tl.load(log_ratio + row) - log_mass, _LOG_HUGE))
    tl.store(log_true + row, log_p_true)
    tl.store(log_observed + row, log_p_observed)
    tl.store(code_sum + row, tl.sum(tl.log(1 + ratio * p), 0))
    tl.store(correct + row, log_p_true > tl.max(tl.where(code == at_true, float("-inf"), line), 0))


@triton.jit
def _at(line: tl.tensor, code: tl.tensor, index: tl.tensor, codes: tl.tensor) -> tl.tensor:
    # An index out of range becomes NaN: raising an error would require a device synchronization.
    value = tl.sum(tl.where(code == index, line, 0.0), 0)
    return tl.where((index >= 0) & (index < codes), value, float("nan"))


@triton.jit
def _gradient_kernel(
    logits: tl.tensor,
    row_stride: tl.tensor,
    code_stride: tl.tensor,
    true: tl.tensor,
    observed: tl.tensor,
    of_true: tl.tensor,
    of_observed: tl.tensor,
    of_sum: tl.tensor,
    ratio: tl.tensor,
    slope: tl.tensor,
    codes: tl.tensor,
    width: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    code = tl.arange(0, width)
    gamma, for_sum, for_true = tl.load(ratio + row), tl.load(of_sum + row), tl.load(of_true + row)
    at_line = logits + row * row_stride + code * code_stride
    line = tl.load(at_line, mask=code < codes, other=float("-inf")).to(gamma.dtype)
    top = tl.max(line, 0)
    p = tl.exp(line - top)
    p /= tl.sum(p, 0)
    inverse = 1 / (1 + gamma * p)
    # d Σ log(1 + γ p_k) / d log p_k = γ p_k / (1 + γ p_k)
    total = tl.sum(gamma * p * inverse, 0)
    for_observed = tl.load(of_observed + row) + for_sum * total * tl.load(slope + row)
    to_line = p * (for_sum * gamma * inverse - (for_true + for_observed + for_sum * total))
    to_line += tl.where(code == tl.load(true + row), for_true, 0.0)
    to_line += tl.where(code == tl.load(observed + row), for_observed, 0.0)
    tl.store(at_line, to_line, mask=code < codes)
