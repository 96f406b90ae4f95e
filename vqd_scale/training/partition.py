"""Named parameter partition of one rank under ZeRO.

Only this file depends on DeepSpeed's private layouts (checked against 0.19). In each stage a parameter group
has one flat float32 tensor of master weights per rank, and the inner optimizer's state is keyed by that
tensor. Stage 3 partitions every parameter into one piece per rank. Stages 1 and 2 concatenate the parameters
of a group and partition the concatenation. Checkpointing, initialization and EMA work on pieces and are
independent of the stage.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vqd_scale.core.world import World


@dataclass(frozen=True)
class Piece:
    """This rank's part of one parameter.

    Attributes:
        name: Name of the parameter.
        shape: Shape of the full parameter.
        start: Index of the piece's first element in the flattened parameter.
        length: Number of elements without padding; 0 if this rank holds no element of the parameter.
        group: Index of the flat tensor that contains the piece.
        offset: Index of the piece's first element in the flat tensor.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    length: int
    group: int
    offset: int


def shape_of(parameter: Tensor) -> tuple[int, ...]:
    """Return a parameter's full shape; under ZeRO-3 a partitioned parameter is an empty tensor to torch."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


class Partition:
    """The pieces of this rank and the flat tensors that contain them.

    Args:
        optimizer: DeepSpeed's ZeRO optimizer of any stage.
        module: Module for which the optimizer was built.
        rank: Rank of this process.
        moments: Names of the optimizer's moments, each a tensor of the weights' shape.
    """

    def __init__(
        self,
        optimizer: Any,  # noqa: ANN401 - untyped upstream
        module: nn.Module,
        rank: int,
        moments: Sequence[str],
    ) -> None:
        self._optimizer = optimizer
        self._moments = moments
        is_stage_3 = hasattr(optimizer, "fp32_partitioned_groups_flat")
        self._layout = _ParameterSlices(optimizer, rank) if is_stage_3 else _GroupSlices(optimizer)
        self.pieces = [
            self._layout.piece(name, parameter)
            for name, parameter in module.named_parameters()
            if parameter.requires_grad
        ]

    @property
    def masters(self) -> list[Tensor]:
        """Flat float32 master weights, one tensor per group."""
        return list(self._layout.masters)

    def tensors(self) -> dict[str, list[Tensor]]:
        """Return the flat tensors of master weights and of each optimizer moment; moments start at zero."""
        states = [self._state_of(master) for master in self.masters]
        return {"master": self.masters, **{name: [state[name] for state in states] for name in self._moments}}

    @property
    def steps(self) -> int:
        """Number of optimizer steps taken."""
        return int(self._state_of(self.masters[0])["step"])

    @steps.setter
    def steps(self, value: int) -> None:
        for master in self.masters:
            self._state_of(master)["step"].fill_(float(value))

    def view(self, flats: list[Tensor], piece: Piece) -> Tensor:
        """Return a piece's elements as a writable view of a list of flat tensors."""
        return flats[piece.group].detach().narrow(0, piece.offset, piece.length)

    @torch.no_grad()
    def masters_changed(self) -> None:
        """Copy the float32 master weights into the compute weights; collective."""
        self._layout.refresh()

    def _state_of(self, master: Tensor) -> dict[str, Tensor]:
        # An optimizer creates its state at the first step; creating it here allows loading before that.
        state: dict[str, Tensor] = self._optimizer.optimizer.state[master]
        if not state:
            state["step"] = torch.zeros((), device=master.device)
            state |= {name: torch.zeros_like(master) for name in self._moments}
        return state


@torch.no_grad()
def gather(partition: Partition, flats: list[Tensor], world: World) -> dict[str, Tensor]:
    """Gather full parameters from all ranks' pieces, on the CPU in float32; collective.

    Args:
        partition: Pieces of this rank.
        flats: Flat tensors to gather, such as the master weights or the EMA.
        world: This process's rank and device.
    """
    parameters: dict[str, Tensor] = {}
    for piece in partition.pieces:
        flat = torch.zeros(torch.Size(piece.shape).numel(), device=world.device)
        if piece.length:
            flat[piece.start : piece.start + piece.length] = partition.view(flats, piece)
        parameters[piece.name] = world.sum(flat).view(piece.shape).cpu()
    return parameters


@torch.no_grad()
def fill(partition: Partition, flats: list[Tensor], parameters: Mapping[str, Tensor]) -> None:
    """Copy full tensors into a rank's pieces; the caller calls `Partition.masters_changed`.

    Args:
        partition: Pieces of this rank.
        flats: Flat tensors to fill.
        parameters: Full tensors by parameter name; missing parameters are unchanged.
    """
    for piece in partition.pieces:
        if piece.length and piece.name in parameters:
            elements = parameters[piece.name].flatten()[piece.start : piece.start + piece.length]
            partition.view(flats, piece).copy_(elements)


class _ParameterSlices:
    """Layout of stage 3: every parameter is split into equal pieces, and rank r holds piece r."""

    def __init__(self, optimizer: Any, rank: int) -> None:  # noqa: ANN401 - untyped upstream
        self._optimizer = optimizer
        self._rank = rank

    @property
    def masters(self) -> Sequence[Tensor]:
        return self._optimizer.fp32_partitioned_groups_flat

    def piece(self, name: str, parameter: Any) -> Piece:  # noqa: ANN401 - DeepSpeed's attributes
        group, offset, length = self._optimizer.grad_position[self._optimizer.get_param_id(parameter)]
        start = self._rank * length
        unpadded_length = max(0, min(length, parameter.ds_numel - start))
        return Piece(name, shape_of(parameter), start, unpadded_length, group, offset)

    def refresh(self) -> None:
        self._optimizer._partition_all_parameters()
        for group in range(len(self.masters)):
            self._optimizer._reassign_or_swap_out_partitioned_parameters(group)
        persistent = self._optimizer.persistent_parameters
        if persistent:
            persistent[0].all_gather(persistent)
        self._optimizer.invalidate_secondary_tensor()


class _GroupSlices:
    """Layout of stages 1 and 2: a group's concatenated parameters are split, and rank r holds piece r.

    In bfloat16, stage 1 has a separate optimizer class with the same mapping under another name.
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
        source, target = mapping.lp_fragment_address, mapping.hp_fragment_address
        return Piece(name, shape, source.start, source.numel, mapping.param_group_index, target.start)

    def refresh(self) -> None:
        self._optimizer.update_lp_params()
