# pyright: basic, reportArgumentType=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false
# Kernel parameters are Triton tensors inside and PyTorch tensors outside: no annotation fits both.
"""Triton kernel of `vqd_scale.diffusion.truncation.keep_top_p`: one program reads one row, and sorts nothing.

A float's bits grow with its value, so 31 halvings find the largest value whose codes and all more likely ones
reach the probability.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@torch.library.custom_op("vqd_scale::top_p", mutates_args=())
def keep_top_p(log_p: Tensor, rate: float) -> Tensor:
    """Compute `truncation.keep_top_p` in float32."""
    log_p = log_p.contiguous()
    result, codes = torch.empty_like(log_p), log_p.shape[-1]
    width = triton.next_power_of_2(codes)
    warps = min(max(width // 512, 1), 32)
    if log_p.numel():
        with torch.cuda.device_of(log_p):
            # The most likely code is kept: its probability is larger than this number.
            rate = max(rate, 1e-300)
            _top_p[(log_p.numel() // codes,)](log_p, result, codes, rate=rate, width=width, num_warps=warps)
    return result


@keep_top_p.register_fake
def _(log_p: Tensor, rate: float) -> Tensor:
    del rate
    return torch.empty_like(log_p, memory_format=torch.contiguous_format)


@triton.jit
def _top_p(
    log_p: tl.tensor, result: tl.tensor, codes: tl.tensor, rate: tl.constexpr, width: tl.constexpr
) -> None:
    row = tl.program_id(0).to(tl.int64)
    code = tl.arange(0, width)
    line = tl.load(log_p + row * codes + code, mask=code < codes, other=float("-inf"))
    p = tl.exp(line)
    bits = p.to(tl.int32, bitcast=True)
    chances = p.to(tl.float64)
    mass = tl.full((), rate, tl.float64)
    # The largest threshold whose codes reach the mass.
    low = 0
    for halving in tl.static_range(31):
        middle = low + (1 << (30 - halving))
        low = tl.where(tl.sum(tl.where(bits >= middle, chances, 0.0), 0) >= mass, middle, low)
    before = tl.sum(tl.where(bits > low, chances, 0.0), 0)
    tie = (bits == low).to(tl.int32)
    # A code before which the sum reaches the mass is dropped.
    before += tl.where(bits == low, (tl.cumsum(tie, 0) - 1) * chances, float("inf"))
    is_kept = tl.where(bits > low, 1, (before < mass).to(tl.int32))
    is_kept += tl.sum((line != line).to(tl.int32), 0)
    line = tl.where(is_kept > 0, line, float("-inf"))
    tl.store(result + row * codes + code, line, mask=code < codes)
