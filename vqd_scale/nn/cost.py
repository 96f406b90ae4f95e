"""What a network costs: its parameters, and the arithmetic of one evaluation."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode


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
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(*inputs)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    return Cost(parameters, counter.get_total_flops() // 2)
