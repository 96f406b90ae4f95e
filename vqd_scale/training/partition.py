"""This rank's share of a model under ZeRO, by name.

The one file that knows DeepSpeed's private layouts (checked against 0.19). In each stage a group of
parameters has one flat float32 tensor of masters per rank, and the inner optimizer's state is keyed by that
tensor; what differs is which elements of which parameter lie in it. Stage 3 cuts every parameter into as many
pieces as there are ranks. Stages 1 and 2 lay the whole parameters one after the other and cut the row. What
saves, loads or averages weights works on the pieces and need not know.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Piece:
    """What this rank holds of one parameter.

    Attributes:
        name: The parameter's name.
        shape: The whole parameter's shape.
        start: Index of the piece's first element in the flattened parameter.
        length: Elements in the piece, without padding; 0 if the parameter lies on other ranks altogether.
        group: Which flat tensor the piece lies in.
        offset: Where in it the piece begins.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    length: int
    group: int
    offset: int


def shape_of(parameter: Tensor) -> tuple[int, ...]:
    """A parameter's shape, also where it is cut among the ranks and torch sees an empty tensor."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


class _Layout(Protocol):
    """What differs between the stages."""

    @property
    def masters(self) -> Sequence[Tensor]:
        """The flat float32 weights, one tensor a group."""
        ...

    def piece(self, name: str, parameter: Any) -> Piece:  # noqa: ANN401 - DeepSpeed's attributes
        """Where a parameter's elements lie."""
        ...

    def refresh(self) -> None:
        """Bring the weights that the network computes with in line with the masters."""
        ...


class Partition:
    """The pieces of this rank and the flat tensors that hold them.

    Args:
        optimizer: DeepSpeed's ZeRO optimizer, of whatever stage.
        module: The module it was built for.
        rank: This process's rank.
    """

    def __init__(self, optimizer: Any, module: nn.Module, rank: int) -> None:  # noqa: ANN401 - untyped upstream
        self._optimizer = optimizer
        self._layout: _Layout
        if hasattr(optimizer, "fp32_partitioned_groups_flat"):
            self._layout = _CutParameters(optimizer, rank)
        else:
            self._layout = _CutRow(optimizer)
        self.pieces = [
            self._layout.piece(name, parameter)
            for name, parameter in module.named_parameters()
            if parameter.requires_grad
        ]

    @property
    def masters(self) -> list[Tensor]:
        """The flat float32 weights, one tensor a group."""
        return list(self._layout.masters)

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
        """Bring the weights that the network computes with in line with the float32 ones (all ranks)."""
        self._layout.refresh()

    def _state_of(self, master: Tensor) -> dict[str, Tensor]:
        # torch's AdamW makes its state at the first step; made here alike, it can be loaded before.
        state: dict[str, Tensor] = self._optimizer.optimizer.state[master]
        if not state:
            state["step"] = torch.zeros((), device=master.device)
            state["exp_avg"] = torch.zeros_like(master)
            state["exp_avg_sq"] = torch.zeros_like(master)
        return state


@torch.no_grad()
def fill(partition: Partition, flats: list[Tensor], whole: Mapping[str, Tensor]) -> None:
    """Copy whole tensors into a rank's pieces of them; `Partition.masters_changed` is the caller's.

    Args:
        partition: The pieces.
        flats: Which of its flat tensors are meant.
        whole: Tensors by the parameters' names; what is not named stays.
    """
    for piece in partition.pieces:
        if piece.length and piece.name in whole:
            elements = whole[piece.name].flatten()[piece.start : piece.start + piece.length]
            partition.view(flats, piece).copy_(elements)


class _CutParameters:
    """Stage 3: rank r holds the r-th of equal pieces of every parameter."""

    def __init__(self, optimizer: Any, rank: int) -> None:  # noqa: ANN401 - untyped upstream
        self._optimizer = optimizer
        self._rank = rank

    @property
    def masters(self) -> Sequence[Tensor]:
        return self._optimizer.fp32_partitioned_groups_flat

    def piece(self, name: str, parameter: Any) -> Piece:  # noqa: ANN401 - DeepSpeed's attributes
        group, offset, length = self._optimizer.grad_position[self._optimizer.get_param_id(parameter)]
        start = self._rank * length
        real = max(0, min(length, parameter.ds_numel - start))
        return Piece(name, shape_of(parameter), start, real, group, offset)

    def refresh(self) -> None:
        self._optimizer._partition_all_parameters()
        for group in range(len(self.masters)):
            self._optimizer._reassign_or_swap_out_partitioned_parameters(group)
        persistent = self._optimizer.persistent_parameters
        if persistent:
            persistent[0].all_gather(persistent)
        self._optimizer.invalidate_secondary_tensor()


class _CutRow:
    """Stages 1 and 2: a group's parameters stand in a row, and rank r holds the r-th of equal pieces of it.

    In bfloat16 stage 1 has an optimizer class of its own, with the same mapping under another name.
    """

    def __init__(self, optimizer: Any) -> None:  # noqa: ANN401 - untyped upstream
        self._optimizer = optimizer

    @property
    def masters(self) -> Sequence[Tensor]:
        if hasattr(self._optimizer, "single_partition_of_fp32_groups"):
            return self._optimizer.single_partition_of_fp32_groups
        return self._optimizer.fp32_groups_flat_partition

    def piece(self, name: str, parameter: Any) -> Piece:  # noqa: ANN401 - DeepSpeed's attributes
        shape, mapping = tuple(parameter.shape), parameter._hp_mapping
        if mapping is None:
            return Piece(name, shape, 0, 0, 0, 0)
        here, there = mapping.lp_fragment_address, mapping.hp_fragment_address
        return Piece(name, shape, here.start, here.numel, mapping.param_group_index, there.start)

    def refresh(self) -> None:
        self._optimizer.update_lp_params()
