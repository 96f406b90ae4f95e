"""Attention function with four equivalent backends."""

import ctypes
import functools
import importlib
import importlib.metadata
import logging
import os
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from vqd_scale.nn.config import AttentionBackend
from vqd_scale.nn.small_heads import Keys, Queries, is_faster, small_heads_attention

logger = logging.getLogger(__name__)

_KERNEL_ALIGNMENT = 8
_REFERENCE_KEYS = 512
"""Maximum number of keys for the plain formula in half precision. Measured on one core with AVX512-BF16,
heads of 12 to 88, forward and backward: in bfloat16 sdpa takes 4 to 10 times as long as the plain formula
over 64 keys, 2 to 4 times over 256, twice over 512, and about as long over 1,024, where the formula also
stores heads x 1,024 x 1,024 weights per image for backward. In float32 sdpa takes between half and the same
time."""

_CUDA_RUNTIME = "libcudart.so.12"
"""CUDA runtime that the C++ extension of xformers 0.0.35 is linked with."""
_CUDA_RUNTIME_PACKAGE = "nvidia-cuda-runtime-cu12"


def attention(
    query: Queries, key: Keys, value: Keys, backend: AttentionBackend = "auto", *, causal: bool = False
) -> Queries:
    """Compute softmax(q k^T / sqrt(dim)) v, over all keys or over keys up to the query's position.

    Args:
        query: Queries [batch, queries, heads, dim], any float dtype.
        key: Keys [batch, keys, heads, dim] of the same dtype.
        value: Values in the shape and dtype of the keys.
        backend: Implementation; all agree up to rounding. If xformers has no kernel, a warning is logged once
            and sdpa is used, so a model trained on GPUs runs on any machine.
        causal: Restrict each query to keys up to its own position; requires as many keys as queries.

    Returns:
        A tensor like ``query``.

    Raises:
        ValueError: ``causal`` with different numbers of keys and queries, or with the backend small_heads.
    """
    if causal and query.shape[1] != key.shape[1]:
        raise ValueError(f"causal attention of {query.shape[1]} queries over {key.shape[1]} keys")
    if backend == "small_heads" or (backend == "auto" and not causal and is_faster(query, key)):
        if causal:
            raise ValueError("small_heads attends to all keys; causal attention is sdpa's")
        return small_heads_attention(query, key, value)
    selected = _select_backend(backend, query, key)
    if selected == "xformers":
        return _xformers_attention(query, key, value, causal)
    if selected == "sdpa":
        query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
        return functional.scaled_dot_product_attention(query, key, value, is_causal=causal).transpose(1, 2)
    return _reference_attention(query, key, value, causal)


def _reference_attention(query: Queries, key: Keys, value: Keys, causal: bool) -> Queries:
    scores = torch.einsum("bqhd,bkhd->bhqk", query * query.shape[-1] ** -0.5, key)
    if causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(diagonal=1)
        scores = scores.masked_fill(later, -torch.inf)
    weights = scores.softmax(dim=-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, value)


def _xformers_attention(query: Queries, key: Keys, value: Keys, causal: bool) -> Queries:
    dim = query.shape[-1]
    # The kernels require head dims in multiples of 8 (size S has 12). Padding with zeros does not change
    # q k^T; the scale must be that of the unpadded dim.
    padding = -dim % _KERNEL_ALIGNMENT
    if padding:
        query, key, value = (functional.pad(tensor, (0, padding)) for tensor in (query, key, value))
    ops = _xformers()
    bias = ops.LowerTriangularMask() if causal else None
    return ops.memory_efficient_attention(query, key, value, attn_bias=bias, scale=dim**-0.5)[..., :dim]


def _xformers() -> Any:  # noqa: ANN401 - a module without types
    # Imported on first use: the import takes seconds and is not needed on a CPU.
    return importlib.import_module("xformers.ops")


def _load_cuda_runtime() -> None:
    """Load the CUDA runtime for xformers from the runtime's package, unless already loaded.

    torch for CUDA 12 loads its own runtime; torch 2.14 and later load the package's runtime on import. torch
    for CUDA 13 before 2.14 loads neither, and xformers then rejects all inputs.
    """
    try:
        ctypes.CDLL(_CUDA_RUNTIME, mode=os.RTLD_NOLOAD)
    except OSError:
        try:
            files = importlib.metadata.files(_CUDA_RUNTIME_PACKAGE)
        except importlib.metadata.PackageNotFoundError:
            return
        for file in files or ():
            if file.name == _CUDA_RUNTIME:
                ctypes.CDLL(str(file.locate()))


def _select_backend(backend: AttentionBackend, query: Tensor, key: Tensor) -> AttentionBackend:
    if backend == "auto" and query.is_cuda and torch.are_deterministic_algorithms_enabled():
        # The backward of sdpa has a deterministic mode; some xformers kernels have none.
        return "sdpa"
    if backend == "xformers" or (backend == "auto" and query.is_cuda):
        return "xformers" if _is_xformers_usable(query.dtype, query.device) else "sdpa"
    if backend == "auto":
        return "sdpa" if query.dtype is torch.float32 or key.shape[1] > _REFERENCE_KEYS else "reference"
    return backend


@functools.lru_cache
def _is_xformers_usable(dtype: torch.dtype, device: torch.device) -> bool:
    if device.type != "cuda":
        _warn_sdpa_fallback(f"it has no kernel for a {device.type}")
        return False
    try:
        _load_cuda_runtime()
        _xformers()
        # Some xformers kernels support forward only; training needs backward as well.
        with torch.inference_mode(False), torch.enable_grad():
            probe = torch.zeros(1, _KERNEL_ALIGNMENT, 1, _KERNEL_ALIGNMENT, dtype=dtype, device=device)
            query, key, value = (probe.clone().requires_grad_() for _ in range(3))
            _xformers_attention(query, key, value, causal=False).sum().backward()
    except (ImportError, NotImplementedError, OSError, RuntimeError) as error:
        is_absent = isinstance(error, ModuleNotFoundError) and error.name == "xformers"
        reason = "it is not installed" if is_absent else str(error).strip() or type(error).__name__
        _warn_sdpa_fallback(reason.splitlines()[0])
        return False
    return True


@functools.cache
def _warn_sdpa_fallback(reason: str) -> None:
    logger.warning("xformers attention is not available (%s); torch's sdpa is used instead.", reason)
