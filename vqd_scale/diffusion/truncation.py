"""Truncation of a prediction to its most likely codes."""

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from vqd_scale.core.compiled import compiled, over_threads
from vqd_scale.diffusion.kernels.dispatch import has_kernels
from vqd_scale.diffusion.sampling_plan import LogProbabilities

_SOURCE = Path(__file__).with_name("top_p.c")


def keep_top_p(log_p: LogProbabilities, rate: float) -> LogProbabilities:
    """Set log p to -inf except for the codes before which the probability sums to less than ``rate``.

    Codes are in descending order, ties in the order of their numbers; the first one is always kept. Rows with
    NaN are unchanged. Nothing is sorted on a CPU with a C compiler, or on a GPU with Triton.
    """
    if rate == 1:
        return log_p
    if log_p.dtype is torch.float32 and has_kernels(log_p.device):
        from vqd_scale.diffusion.kernels.top_p import keep_top_p as keep_on_gpu

        return keep_on_gpu(log_p, rate)
    if log_p.dtype is torch.float32 and log_p.device.type == "cpu" and _library() is not None:
        return _keep_on_cpu(log_p, rate)
    return keep_top_p_by_sorting(log_p, rate)


def keep_top_p_by_sorting(log_p: LogProbabilities, rate: float) -> LogProbabilities:
    """Compute `keep_top_p` by its definition."""
    sorted_log, order = log_p.sort(dim=-1, descending=True, stable=True)
    before = sorted_log.exp().cumsum(-1, dtype=torch.float64).roll(1, -1)
    before[..., 0] = -1.0
    is_dropped = torch.empty_like(log_p, dtype=torch.bool).scatter_(-1, order, before >= rate)
    return log_p.masked_fill(is_dropped, -torch.inf)


def keep_top_k(log_p: LogProbabilities, count: int) -> LogProbabilities:
    """Set log p to -inf except for the ``count`` most likely codes, ties in the order of their numbers."""
    order = log_p.sort(dim=-1, descending=True, stable=True).indices
    kept_log = torch.full_like(log_p, -torch.inf)
    return kept_log.scatter_(-1, order[..., :count], log_p.gather(-1, order[..., :count]))


@torch.library.custom_op("vqd_scale::top_p_on_cpu", mutates_args=())
def _keep_on_cpu(log_p: Tensor, rate: float) -> Tensor:
    library = _library()
    if library is None:
        raise ValueError("no C compiler built the truncation; use keep_top_p_by_sorting.")
    log_p = log_p.contiguous()
    p, result = log_p.exp(), torch.empty_like(log_p)
    codes = log_p.shape[-1]
    pointers = [ctypes.c_void_p(array.data_ptr()) for array in (log_p, p, result)]

    def compute(first: int, last: int) -> int:
        rows = (ctypes.c_long(first), ctypes.c_long(last), ctypes.c_long(codes))
        return library.top_p(*pointers, *rows, ctypes.c_double(rate))

    over_threads(compute, log_p.numel() // codes, torch.get_num_threads())
    return result


@_keep_on_cpu.register_fake
def _(log_p: Tensor, rate: float) -> Tensor:
    del rate
    return torch.empty_like(log_p, memory_format=torch.contiguous_format)


@functools.cache
def _library() -> ctypes.CDLL | None:
    return compiled(_SOURCE, "top-p truncation sorts all codes, which is slower")
