"""Cost of a network: parameters, and arithmetic of one forward pass."""

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from vqd_scale.nn.config import ClassCondition, Condition, TextCondition

_PEAK_FLOPS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "V100": 125e12,
}
"""Peak dense half-precision FLOP/s by a word of the GPU's name, as stated by NVIDIA for the fastest variant.
The utilization of a slower variant (PCIe) is underestimated."""


def _attention(query: torch.Size, key: torch.Size, value: torch.Size, *_: object, **__: object) -> int:
    return sdpa_flop_count(query, key, value)


_COUNTED = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention}
"""Additional FLOP formulas; torch 2.10 does not count attention on a CPU."""


@dataclass(frozen=True)
class Cost:
    """Cost of one network.

    Attributes:
        parameters: Number of weights.
        multiply_accumulates: Multiply-accumulates of one forward pass, in matrix products, convolutions and
            attention; elementwise operations are not counted.
    """

    parameters: int
    multiply_accumulates: int


def cost_of(network: nn.Module, *inputs: Tensor | None) -> Cost:
    """Count a network's parameters and the multiply-accumulates of one call.

    With network and inputs on ``torch.device("meta")``, a network of any size is counted without memory.

    Args:
        network: Network to count.
        inputs: Arguments of the call; a batch of 1 gives the cost per image.
    """
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=_COUNTED) as counter:
        network(*inputs)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    return Cost(parameters, counter.get_total_flops() // 2)


def forward_flops(
    build: Callable[[], nn.Module], length: int, condition: Condition, positions: int, *, timed: bool
) -> int:
    """Count the floating-point operations of one image's forward pass, without memory or arithmetic.

    Args:
        build: Returns a network over tokens.
        length: Tokens per image.
        condition: Condition of the network.
        positions: Number of positions of a text condition.
        timed: True if the network takes a timestep.
    """
    with torch.device("meta"):
        condition_input: Tensor | None = None
        if isinstance(condition, TextCondition):
            condition_input = torch.zeros(1, positions, condition.width)
        if isinstance(condition, ClassCondition):
            condition_input = torch.zeros(1, dtype=torch.int64)
        times = [torch.zeros(1, dtype=torch.int64)] if timed else []
        tokens = torch.zeros(1, length, dtype=torch.int64)
        return 2 * cost_of(build(), tokens, *times, condition_input).multiply_accumulates


def peak_flops(device: torch.device) -> float | None:
    """Return a device's peak half-precision FLOP/s; ``None`` for an unknown device."""
    if device.type != "cuda":
        return None
    words = re.split(r"\W+", torch.cuda.get_device_name(device))
    return next((peak for word, peak in _PEAK_FLOPS.items() if word in words), None)
