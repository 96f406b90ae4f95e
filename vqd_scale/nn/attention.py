"""One attention function, three backends of equal meaning."""

import functools
import importlib
import logging
from collections.abc import Callable
from typing import Literal, cast

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

logger = logging.getLogger(__name__)

AttentionBackend = Literal["auto", "xformers", "sdpa", "reference"]
"""``auto`` takes xformers on CUDA where its kernels load, and what is fastest elsewhere."""

_KERNEL_ALIGNMENT = 8


def attention(
    query: Float[Tensor, "batch queries heads dim"],
    key: Float[Tensor, "batch keys heads dim"],
    value: Float[Tensor, "batch keys heads dim"],
    backend: AttentionBackend = "auto",
) -> Float[Tensor, "batch queries heads dim"]:
    """softmax(q k^T / sqrt(dim)) v over all keys, without any mask.

    Args:
        query: Queries, any float dtype.
        key: Keys of the same dtype.
        value: Values of the same dtype.
        backend: Which implementation computes it; all agree up to rounding.

    Returns:
        A tensor like ``query``.

    Raises:
        NotImplementedError: From xformers, if it was asked for by name where it has no kernel (a CPU).
    """
    chosen = _resolve(query) if backend == "auto" else backend
    if chosen == "xformers":
        return _xformers_attention(query, key, value)
    if chosen == "sdpa":
        return functional.scaled_dot_product_attention(
            query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        ).transpose(1, 2)
    return _reference_attention(query, key, value)


def _reference_attention(
    query: Float[Tensor, "batch queries heads dim"],
    key: Float[Tensor, "batch keys heads dim"],
    value: Float[Tensor, "batch keys heads dim"],
) -> Float[Tensor, "batch queries heads dim"]:
    scores = torch.einsum("bqhd,bkhd->bhqk", query * query.shape[-1] ** -0.5, key)
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(value.dtype)
    return torch.einsum("bhqk,bkhd->bqhd", weights, value)


def _xformers_attention(
    query: Float[Tensor, "batch queries heads dim"],
    key: Float[Tensor, "batch keys heads dim"],
    value: Float[Tensor, "batch keys heads dim"],
) -> Float[Tensor, "batch queries heads dim"]:
    dim = query.shape[-1]
    # The kernels want head dims in multiples of 8 (size S has 12). Zero columns add nothing to q k^T, so only
    # the scale must be that of the true dim.
    padding = -dim % _KERNEL_ALIGNMENT
    if padding:
        query, key, value = (functional.pad(tensor, (0, padding)) for tensor in (query, key, value))
    kernel = _memory_efficient_attention()
    return kernel(query, key, value, scale=dim**-0.5)[..., :dim]


def _memory_efficient_attention() -> Callable[..., Tensor]:
    # Imported on first use: it takes seconds, and a CPU never needs it.
    return cast(Callable[..., Tensor], importlib.import_module("xformers.ops").memory_efficient_attention)


def _resolve(query: Tensor) -> AttentionBackend:
    if query.is_cuda:
        return "xformers" if _xformers_serves(query.dtype, query.device) else "sdpa"
    # Measured on two cores at 64 tokens: the backward of sdpa in bfloat16 is an order of magnitude slower
    # than the plain formula; in float32 sdpa is the faster one.
    return "sdpa" if query.dtype is torch.float32 else "reference"


@functools.lru_cache
def _xformers_serves(dtype: torch.dtype, device: torch.device) -> bool:
    probe = torch.zeros(1, _KERNEL_ALIGNMENT, 1, _KERNEL_ALIGNMENT, dtype=dtype, device=device)
    try:
        _memory_efficient_attention()(probe, probe, probe)
    except (ImportError, NotImplementedError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        logger.warning("xformers attention is not available here (%s); torch's sdpa serves instead.", reason)
        return False
    return True
