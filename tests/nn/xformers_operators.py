"""Operators that xformers picks for CUDA inputs, on a machine without a card: prints them as JSON.

Inputs are fake tensors, which have a shape, a dtype and a device but no memory. The card's compute capability
is set by hand, and nothing is computed: the kernels themselves are tested in tests/gpu.
"""

import itertools
import json
import sys
from typing import Any
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from vqd_scale.nn import attention as module
from vqd_scale.nn.attention import attention

CAPABILITIES = ((8, 0), (9, 0))
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
HEAD_DIMS = (12, 32, 64, 88)


def operators(dtype: torch.dtype, dim: int, *, causal: bool) -> list[str]:
    """Forward and backward operator for the inputs that `attention` hands to xformers."""
    fmha: Any = sys.modules["xformers.ops.fmha"]
    inputs: list[Any] = []

    def record(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any) -> torch.Tensor:
        inputs.append(fmha.Inputs(query, key, value, **options))
        return query

    lengths = (64, 64, 64) if causal else (64, 77, 77)
    query, key, value = (torch.empty(2, length, 16, dim, dtype=dtype, device="cuda") for length in lengths)
    with patch.object(sys.modules["xformers.ops"], "memory_efficient_attention", record):
        attention(query, key, value, causal=causal)
    forward = fmha.dispatch._dispatch_fw(inputs[0], needs_gradient=True)
    backward = fmha.dispatch._dispatch_bw(inputs[0], varlen_lse_packed=None)
    return [forward.NAME, backward.NAME]


def main() -> None:
    on_cpu = torch.zeros(1, 8, 1, 8)
    attention(on_cpu, on_cpu, on_cpu)
    imported_on_cpu = "xformers" in sys.modules
    rows: list[dict[str, Any]] = []
    for capability, (name, dtype) in itertools.product(CAPABILITIES, DTYPES.items()):
        module._is_xformers_usable.cache_clear()  # pyright: ignore[reportPrivateUsage]
        with (
            FakeTensorMode(),
            patch("torch.cuda.get_device_capability", return_value=capability),
            # The autograd engine asks the driver for the device.
            patch("torch.Tensor.backward"),
        ):
            device = torch.device("cuda", 0)
            serves = module._is_xformers_usable(dtype, device)  # pyright: ignore[reportPrivateUsage]
            for dim, causal in itertools.product(HEAD_DIMS, (False, True)):
                names = operators(dtype, dim, causal=causal) if serves else None
                case = {"capability": capability, "dtype": name, "dim": dim, "causal": causal}
                rows.append(case | {"operators": names})
    built_with_cuda = sys.modules["xformers._cpp_lib"]._built_with_cuda
    print(json.dumps({"imported_on_cpu": imported_on_cpu, "built_with_cuda": built_with_cuda, "rows": rows}))


if __name__ == "__main__":
    main()
