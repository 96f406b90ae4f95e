"""What a network costs: its parameters, and the arithmetic of one evaluation."""

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from vqd_scale.nn.denoiser import ClassCondition, Condition, TextCondition

_PEAK_FLOPS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "V100": 125e12,
}
"""Dense half-precision arithmetic a second by a word of a GPU's name, as NVIDIA states it for the fastest
form of each; a slower form (PCIe) looks less used than it is."""


def _attention(query: torch.Size, key: torch.Size, value: torch.Size, *_: object, **__: object) -> int:
    return sdpa_flop_count(query, key, value)


_COUNTED = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention}
"""Also where torch does not: 2.10 leaves the attention on a CPU out."""


@dataclass(frozen=True)
class Cost:
    """Of one network.

    Attributes:
        parameters: How many weights it has.
        multiply_accumulates: Of one evaluation, in its matrix products, convolutions and attentions; what is
            done elementwise is not counted.
    """

    parameters: int
    multiply_accumulates: int


def cost_of(network: nn.Module, *inputs: Tensor | None) -> Cost:
    """Count a network's parameters and what one call of it takes.

    Built under ``torch.device("meta")`` with inputs there, a network of any size is counted without memory.

    Args:
        network: The network.
        inputs: What it is called with; a batch of 1 gives the cost of an image.
    """
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=_COUNTED) as counter:
        network(*inputs)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    return Cost(parameters, counter.get_total_flops() // 2)


def forward_flops(
    build: Callable[[], nn.Module], length: int, condition: Condition, positions: int, *, timed: bool
) -> int:
    """Floating-point operations of one image's forward, counted without memory or arithmetic.

    Args:
        build: Makes a network of tokens.
        length: Tokens of an image.
        condition: What the network is told.
        positions: Of a text.
        timed: Whether it is told a timestep as well.
    """
    with torch.device("meta"):
        told: Tensor | None = None
        if isinstance(condition, TextCondition):
            told = torch.zeros(1, positions, condition.width)
        if isinstance(condition, ClassCondition):
            told = torch.zeros(1, dtype=torch.int64)
        times = [torch.zeros(1, dtype=torch.int64)] if timed else []
        tokens = torch.zeros(1, length, dtype=torch.int64)
        return 2 * cost_of(build(), tokens, *times, told).multiply_accumulates


def peak_flops(device: torch.device) -> float | None:
    """Half-precision operations a second that a device can do at most; ``None`` for one that is not known."""
    if device.type != "cuda":
        return None
    words = re.split(r"\W+", torch.cuda.get_device_name(device))
    return next((peak for word, peak in _PEAK_FLOPS.items() if word in words), None)
