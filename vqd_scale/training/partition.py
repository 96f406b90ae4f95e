"""This rank's share of a model under ZeRO-3, by name.

The one file that knows DeepSpeed's private layout (checked against 0.19): each rank holds a flat piece of
every parameter, the pieces of a group of parameters lie one after the other in a flat float32 tensor, and the
inner optimizer's state is keyed by that tensor. What saves, loads or averages weights works on the pieces.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Piece:
    """What this rank holds of one parameter.

    Attributes:
        name: The parameter's name.
        shape: The whole parameter's shape.
        start: Index of the piece's first element in the flattened parameter.
        length: Elements in the piece, without padding; 0 if the parameter ends on an earlier rank.
        group: Which flat tensor the piece lies in.
        offset: Where in it the piece begins.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    length: int
    group: int
    offset: int


class Partition:
    """The pieces of this rank and the flat tensors that hold them.

    Args:
        optimizer: DeepSpeed's ZeRO-3 optimizer.
        module: The module it was built for.
        rank: This process's rank.
    """

    def __init__(self, optimizer: Any, module: nn.Module, rank: int) -> None:  # noqa: ANN401 - untyped upstream
        self._optimizer = optimizer
        self.pieces = [
            self._piece(name, parameter, rank)
            for name, parameter in module.named_parameters()
            if parameter.requires_grad
        ]

    def _piece(self, name: str, parameter: Any, rank: int) -> Piece:  # noqa: ANN401 - DeepSpeed's attributes
        group, offset, length = self._optimizer.grad_position[self._optimizer.get_param_id(parameter)]
        start = rank * length
        real = max(0, min(length, parameter.ds_numel - start))
        return Piece(name, tuple(parameter.ds_shape), start, real, group, offset)

    @property
    def masters(self) -> list[Tensor]:
        """The flat float32 weights, one tensor a group."""
        return list(self._optimizer.fp32_partitioned_groups_flat)

    def moments(self, name: str) -> list[Tensor]:
        """The flat tensors of one of the optimizer's moments; zeros before its first step."""
        return [self._state_of(master)[name] for master in self.masters]

    @property
    def steps(self) -> int:
        """How many steps the optimizer has taken."""
        return int(self._state_of(self.masters[0])["step"])

    @steps.setter
    def steps(self, value: int) -> None:
        for master in self.masters:
            self._state_of(master)["step"].fill_(float(value))

    def view(self, flats: list[Tensor], piece: Piece) -> Tensor:
        """A piece's elements within one of the lists of flat tensors; writing to it writes there."""
        return flats[piece.group].detach().narrow(0, piece.offset, piece.length)

    @torch.no_grad()
    def masters_changed(self) -> None:
        """Bring the weights that the network computes with in line with the float32 ones."""
        self._optimizer._partition_all_parameters()
        for group in range(len(self.masters)):
            self._optimizer._reassign_or_swap_out_partitioned_parameters(group)
        persistent = self._optimizer.persistent_parameters
        if persistent:
            persistent[0].all_gather(persistent)

    def _state_of(self, master: Tensor) -> dict[str, Tensor]:
        # torch's AdamW makes its state at the first step; made here alike, it can be loaded before.
        state: dict[str, Tensor] = self._optimizer.optimizer.state[master]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"] = torch.zeros_like(master)
            state["exp_avg_sq"] = torch.zeros_like(master)
        return state
