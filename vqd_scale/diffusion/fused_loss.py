"""The numbers that the objective needs from the logits, as one autograd function that never stores these.

Chunk by chunk the head's logits are made, read off, and let go; backward makes them once more.
"""

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vqd_scale.diffusion.kernels.dispatch import has_kernels
from vqd_scale.diffusion.logit_statistics import (
    LogitRows,
    LogitStatistics,
    LossFactors,
    RowKernels,
    TorchRows,
)

# Elements of a chunk of logits: what stays in a CPU's cache, and what fills a GPU.
_CHUNK_ON_CPU = 2**20
_CHUNK_ON_GPU = 2**26


class RowStatistics(torch.autograd.Function):
    """log p(x_0), log p(x_t), Σ log(1 + γ p_k) and "x_0 is the likeliest code" of every token.

    Backward gets another factor for every image, and the weight's gradient mixes images: no gradient can be
    prepared in forward without keeping one per image. Computing a chunk's logits again is exact and cheaper.

    Where logits are given instead of a head, their gradient needs a tensor of their size in any case. Without
    kernels it is there from forward on and holds the softmax; backward turns that into the gradient in place.
    """

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 - autograd's context has no public type
        hidden: Float[Tensor, "tokens width"],
        weight: Float[Tensor, "codes width"] | None,
        bias: Float[Tensor, " codes"] | None,
        true: Int[Tensor, " tokens"],
        seen: Int[Tensor, " tokens"],
        reach: Float[Tensor, " tokens"],
        log_ratio: Float[Tensor, " tokens"],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Four tensors [tokens], the last one boolean; without a weight ``hidden`` is the logits."""
        rows = LogitRows(true, seen, reach, log_ratio)
        reading = LogitStatistics.empty_for(rows)
        kernels = _kernels_for(hidden.device)
        keeps = weight is None and kernels.keeps_softmax and ctx.needs_input_grad[0]
        softmax = torch.empty_like(hidden, dtype=reach.dtype) if keeps else None
        with torch.autocast(hidden.device.type, enabled=False):
            head = _Head(hidden, weight, bias, reach.dtype)
            for part in head.chunks():
                kept = None if softmax is None else softmax[part]
                kernels.read(head.logits(part), rows.part(part), reading.part(part), kept)
        ctx.save_for_backward(hidden, weight, bias, true, seen, reach, log_ratio, reading.log_seen)
        ctx.softmax = softmax
        ctx.mark_non_differentiable(reading.correct)
        return reading.log_true, reading.log_seen, reading.code_sum, reading.correct

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        """The gradients of ``hidden``, ``weight`` and ``bias``."""
        hidden, weight, bias, true, seen, reach, log_ratio, log_seen = ctx.saved_tensors
        # A second backward through a retained graph finds nothing kept and computes the softmax again.
        softmax, ctx.softmax = ctx.softmax, None
        rows = LogitRows(true, seen, reach, log_ratio)
        of_true, of_seen, of_sum, _ = gradients
        factors = LossFactors.of(rows, log_seen, of_true, of_seen, of_sum)
        kernels = _kernels_for(hidden.device)
        to_hidden = torch.empty_like(hidden, dtype=reach.dtype) if softmax is None else softmax
        to_weight = None if weight is None else torch.zeros_like(weight, dtype=reach.dtype)
        to_bias = None if bias is None else torch.zeros_like(bias, dtype=reach.dtype)
        with torch.autocast(hidden.device.type, enabled=False):
            head = _Head(hidden, weight, bias, reach.dtype)
            for part in head.chunks():
                out = to_hidden[part] if weight is None else None
                to_logits = kernels.gradient(
                    head.logits(part), rows.part(part), factors.part(part), out, kept=softmax is not None
                )
                if to_weight is not None:
                    to_hidden[part] = head.backward(part, to_logits, to_weight)
                if to_bias is not None:
                    to_bias += to_logits.sum(0)
        to_weight = None if weight is None or to_weight is None else to_weight.to(weight.dtype)
        to_bias = None if bias is None or to_bias is None else to_bias.to(bias.dtype)
        return to_hidden.to(hidden.dtype), to_weight, to_bias, None, None, None, None


class _Head:
    """Logits of some tokens at a time; without a weight they are what is given.

    Products are taken in the dtype of the sums, but for bfloat16 on a GPU: its tensor cores multiply exactly
    and add in float32, in which the logits stay.
    """

    def __init__(
        self,
        hidden: Float[Tensor, "tokens width"],
        weight: Float[Tensor, "codes width"] | None,
        bias: Float[Tensor, " codes"] | None,
        dtype: torch.dtype,
    ) -> None:
        on_tensor_cores = hidden.is_cuda and hidden.dtype is torch.bfloat16
        self.hidden = hidden
        self.weight = None if weight is None else weight.to(torch.bfloat16 if on_tensor_cores else dtype)
        self.bias = None if bias is None else bias.to(dtype)
        self.dtype = dtype
        codes = hidden.shape[-1] if weight is None else len(weight)
        self.size = max(1, (_CHUNK_ON_CPU if hidden.device.type == "cpu" else _CHUNK_ON_GPU) // codes)
        self._buffer = None if weight is None else hidden.new_empty(self.size, codes, dtype=dtype)

    def chunks(self) -> Iterator[slice]:
        """The tokens, in pieces whose logits may exist at one time."""
        return (slice(first, first + self.size) for first in range(0, len(self.hidden), self.size))

    def logits(self, part: slice) -> Float[Tensor, "chunk codes"]:
        """A chunk's logits, until the next call."""
        hidden = self.hidden[part]
        if self.weight is None or self._buffer is None:
            return hidden
        logits = self._buffer[: len(hidden)]
        if self.weight.dtype is self.dtype:
            torch.mm(hidden.to(self.dtype), self.weight.T, out=logits)
        else:
            torch.mm(hidden, self.weight.T, out_dtype=self.dtype, out=logits)
        return logits if self.bias is None else logits.add_(self.bias)

    def backward(
        self,
        part: slice,
        to_logits: Float[Tensor, "chunk codes"],
        to_weight: Float[Tensor, "codes width"],
    ) -> Float[Tensor, "chunk width"]:
        """The gradient of a chunk of ``hidden``; the weight's is added to ``to_weight``."""
        if self.weight is None:
            return to_logits
        hidden = self.hidden[part]
        if self.weight.dtype is self.dtype:
            to_weight.addmm_(to_logits.T, hidden.to(self.dtype))
        else:
            to_logits = to_logits.to(self.weight.dtype)
            to_weight.add_(torch.mm(to_logits.T, hidden, out_dtype=self.dtype))
        return to_logits @ self.weight


def _kernels_for(device: torch.device) -> RowKernels:
    if not has_kernels(device):
        return TorchRows()
    from vqd_scale.diffusion.kernels.logit_statistics import TritonRows

    return TritonRows()
