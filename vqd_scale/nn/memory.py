"""Memory of a network's activations, measured on tensors without values."""

import weakref
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_HALF = (torch.bfloat16, torch.float16)


@contextmanager
def fused_attention() -> Generator[None]:
    """Replace `scaled_dot_product_attention` by the kernel that a GPU selects, within the context.

    torch selects by the device, and takes the plain formula for tensors without one: it stores all weights.
    """
    before = functional.scaled_dot_product_attention
    functional.scaled_dot_product_attention = _fused_attention
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = before


def _fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
) -> Tensor:
    if query.dtype in _HALF and attn_mask is None:
        operator = torch.ops.aten._scaled_dot_product_flash_attention
        return operator(query, key, value, dropout_p, is_causal)[0]
    if attn_mask is not None:
        attn_mask = attn_mask.expand(*query.shape[:3], key.shape[2])
    operator = torch.ops.aten._scaled_dot_product_efficient_attention
    return operator(query, key, value, attn_mask, True, dropout_p, is_causal)[0]


class MemoryTracker(TorchDispatchMode):
    """Bytes of the live storages of all tensors that operators return.

    Attributes:
        bytes: Bytes of all live storages.
        peak: Largest value of ``bytes``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self._live: set[int] = set()

    def __torch_dispatch__(
        self,
        func: Any,  # noqa: ANN401 - as torch calls it
        types: Any,  # noqa: ANN401
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        """Call an operator and track its results."""
        result = func(*args, **(kwargs or {}))
        self.track(result)
        return result

    def track(self, result: object) -> None:
        """Count the storages of all tensors in a result until they are freed."""
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                key = id(storage)
                if key not in self._live:
                    self._live.add(key)
                    self.bytes += storage.nbytes()
                    self.peak = max(self.peak, self.bytes)
                    weakref.finalize(storage, self._release, key, storage.nbytes())

    def _release(self, key: int, size: int) -> None:
        self._live.remove(key)
        self.bytes -= size


def activation_bytes(build: Callable[[], nn.Module], run: Callable[[nn.Module], Tensor]) -> int:
    """Return the peak of the activations of one forward and backward pass, without memory or arithmetic.

    Args:
        build: Returns the network, in the dtype of training.
        run: Calls the network and returns a loss.
    """
    with torch.device("meta"), fused_attention(), MemoryTracker() as tracker:
        network = build()
        tracker.track(list(network.parameters()))
        weights = tracker.bytes
        for parameter in network.parameters():
            parameter.register_post_accumulate_grad_hook(_discard_gradient)
        tracker.peak = weights
        run(network).backward()
    return tracker.peak - weights


def _discard_gradient(parameter: Tensor) -> None:
    parameter.grad = None
