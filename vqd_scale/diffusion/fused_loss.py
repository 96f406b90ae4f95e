"""Logit statistics of the objective, as one autograd function that never stores the logits.

Logits are computed, reduced and freed in chunks; backward recomputes them.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vqd_scale.diffusion.kernels.dispatch import has_kernels
from vqd_scale.diffusion.logit_statistics import LogitRows, LogitStatistics, LossFactors, TorchRows

if TYPE_CHECKING:
    from vqd_scale.diffusion.kernels.logit_statistics import TritonRows

# Elements per chunk of logits: fits in a CPU's cache; saturates a GPU.
_CHUNK_ON_CPU = 2**20
_CHUNK_ON_GPU = 2**26


class RowStatistics(torch.autograd.Function):
    """log p(x_0), log p(x_t), Σ log(1 + γ p_k) and "x_0 is the most likely code" of every token.

    Gradients cannot be precomputed in forward: backward receives one factor per image, and the weight's
    gradient sums over images, so forward would have to store one gradient per image. Recomputing a chunk's
    logits is exact and cheaper.
    """

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 - autograd's context has no public type
        hidden: Float[Tensor, "tokens width"],
        weight: Float[Tensor, "codes width"],
        bias: Float[Tensor, " codes"] | None,
        true: Int[Tensor, " tokens"],
        observed: Int[Tensor, " tokens"],
        reach: Float[Tensor, " tokens"],
        log_ratio: Float[Tensor, " tokens"],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return four tensors [tokens], the last boolean."""
        rows = LogitRows(true, observed, reach, log_ratio)
        statistics = LogitStatistics.empty_for(rows)
        kernels = _kernels_for(hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            head = _Head(hidden, weight, bias, reach.dtype)
            for part in head.chunks():
                kernels.compute_statistics(head.logits(part), rows.part(part), statistics.part(part))
        ctx.save_for_backward(hidden, weight, bias, true, observed, reach, log_ratio, statistics.log_observed)
        ctx.mark_non_differentiable(statistics.correct)
        return statistics.log_true, statistics.log_observed, statistics.code_sum, statistics.correct

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        """Return the gradients of ``hidden``, ``weight`` and ``bias``."""
        hidden, weight, bias, true, observed, reach, log_ratio, log_observed = ctx.saved_tensors
        rows = LogitRows(true, observed, reach, log_ratio)
        of_true, of_observed, of_sum, _ = gradients
        factors = LossFactors.of(rows, log_observed, of_true, of_observed, of_sum)
        kernels = _kernels_for(hidden.device)
        to_hidden = torch.empty_like(hidden, dtype=reach.dtype)
        to_weight = torch.zeros_like(weight, dtype=reach.dtype)
        to_bias = None if bias is None else torch.zeros_like(bias, dtype=reach.dtype)
        with torch.autocast(hidden.device.type, enabled=False):
            head = _Head(hidden, weight, bias, reach.dtype)
            for part in head.chunks():
                to_logits = kernels.compute_gradient(head.logits(part), rows.part(part), factors.part(part))
                to_hidden[part] = head.backward(part, to_logits, to_weight)
                if to_bias is not None:
                    to_bias += to_logits.sum(0)
        to_bias = None if to_bias is None or bias is None else to_bias.to(bias.dtype)
        return to_hidden.to(hidden.dtype), to_weight.to(weight.dtype), to_bias, None, None, None, None


def head_bytes(rows: int, codes: int, width: int, dtype: torch.dtype) -> int:
    """Return the bytes on a GPU of a chunk of logits, its gradient, and the float32 gradients of the head.

    Args:
        rows: Number of tokens.
        codes: K, the number of codes.
        width: Width of the hidden states.
        dtype: Dtype of the hidden states.
    """
    logits = _chunk_rows(rows, codes, "cuda") * codes * (4 + dtype.itemsize % 4)
    # The gradient of the weight, that of a chunk's part of it, and the gradient of the hidden states.
    return logits + 4 * width * (2 * codes + rows)


def _chunk_rows(rows: int, codes: int, device: str) -> int:
    return max(1, min(rows, (_CHUNK_ON_CPU if device == "cpu" else _CHUNK_ON_GPU) // codes))


class _Head:
    """Linear head evaluated in chunks of tokens.

    Products run in the dtype of the sums, except for bfloat16 on a GPU: tensor cores multiply exactly and
    accumulate in float32, and the logits stay in float32.
    """

    def __init__(
        self,
        hidden: Float[Tensor, "tokens width"],
        weight: Float[Tensor, "codes width"],
        bias: Float[Tensor, " codes"] | None,
        dtype: torch.dtype,
    ) -> None:
        on_tensor_cores = hidden.is_cuda and hidden.dtype is torch.bfloat16
        self.hidden = hidden
        self.weight = weight.to(torch.bfloat16 if on_tensor_cores else dtype)
        self.bias = None if bias is None else bias.to(dtype)
        self.dtype = dtype
        self.size = _chunk_rows(len(hidden), len(weight), hidden.device.type)
        self._buffer = hidden.new_empty(self.size, len(weight), dtype=dtype)

    def chunks(self) -> Iterator[slice]:
        """Return slices of the tokens, one per chunk of logits."""
        return (slice(first, first + self.size) for first in range(0, len(self.hidden), self.size))

    def logits(self, part: slice) -> Float[Tensor, "chunk codes"]:
        """Compute a chunk's logits; valid until the next call."""
        hidden = self.hidden[part]
        logits = self._buffer[: len(hidden)]
        if self.weight.dtype is self.dtype:
            torch.mm(hidden.to(self.dtype), self.weight.T, out=logits)
        else:
            torch.mm(hidden, self.weight.T, out_dtype=self.dtype, out=logits)
        return logits if self.bias is None else logits.add_(self.bias)

    def backward(
        self, part: slice, to_logits: Float[Tensor, "chunk codes"], to_weight: Float[Tensor, "codes width"]
    ) -> Float[Tensor, "chunk width"]:
        """Compute the gradient of a chunk of ``hidden``; adds the weight's gradient to ``to_weight``."""
        hidden = self.hidden[part]
        if self.weight.dtype is self.dtype:
            to_weight.addmm_(to_logits.T, hidden.to(self.dtype))
        else:
            to_logits = to_logits.to(self.weight.dtype)
            to_weight.add_(torch.mm(to_logits.T, hidden, out_dtype=self.dtype))
        return to_logits @ self.weight


def _kernels_for(device: torch.device) -> "TorchRows | TritonRows":
    if not has_kernels(device):
        return TorchRows()
    from vqd_scale.diffusion.kernels.logit_statistics import TritonRows

    return TritonRows()
