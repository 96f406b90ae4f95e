"""Weights under other names: what goes where, and what is missing, left over or of another shape."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vqd_scale.core.errors import UserError

_LISTED = 20

Convert = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
"""A pure function from one state dictionary to another; it moves, cuts and joins, and computes nothing."""


class Prefixes:
    """Names that differ in their beginnings only, both ways.

    Args:
        table: (ours, theirs); the first that fits counts, and a ``*`` is a number, the same on both sides.
            What fits none has no place on the other side.
    """

    def __init__(self, *table: tuple[str, str]) -> None:
        self._table = table

    def to_ours(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Their state under our names."""
        return _renamed(state, [(theirs, ours) for ours, theirs in self._table])

    def to_theirs(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Our state under their names."""
        return _renamed(state, self._table)


def _renamed(state: Mapping[str, Tensor], table: Sequence[tuple[str, str]]) -> dict[str, Tensor]:
    patterns = [
        (re.compile(re.escape(old).replace(r"\*", r"(\d+)")), new.replace("*", r"\1")) for old, new in table
    ]
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        found = next(((match, new) for pattern, new in patterns if (match := pattern.match(name))), None)
        if found is not None:
            match, new = found
            renamed[match.expand(new) + name[match.end() :]] = tensor
    return renamed


def part_of(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """What lies under a prefix, without it."""
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def under(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same with a prefix before every name."""
    return {prefix + name: value for name, value in state.items()}


@dataclass(frozen=True)
class Exchange:
    """What is to be taken over from somebody else's weights.

    Attributes:
        source: The file or folder, for errors.
        found: Their weights.
        wanted: Ours, by name; only the shapes count.
        convert: Their state to ours.
        dropped: Patterns of their names that nothing of ours needs.
    """

    source: str
    found: Mapping[str, Tensor]
    wanted: Mapping[str, Tensor]
    convert: Convert
    dropped: Sequence[str] = ()

    def lines(self) -> list[str]:
        """The mapping for people: a line for each of our weights, then what is dropped, then the problems."""
        origins = self._origins()
        taken = [
            f"{' + '.join(origins[name])} -> {name} {list(wanted.shape)}"
            for name, wanted in self.wanted.items()
            if name in origins
        ]
        return [*taken, *(f"{name} is dropped" for name in self._dropped()), *self.problems()]

    def problems(self) -> list[str]:
        """What keeps the weights from being taken over: missing, unknown and misshapen ones."""
        origins, taken = self._origins(), self._converted(self.found)
        used = {part for name in self.wanted for part in origins.get(name, [])}
        unknown = [name for name in self.found if name not in used and name not in set(self._dropped())]
        misshapen = [
            f"{' + '.join(origins[name])} has the shape {list(taken[name].shape)}, not {list(wanted.shape)}"
            for name, wanted in self.wanted.items()
            if name in taken and taken[name].shape != wanted.shape
        ]
        missing = [name for name in self.wanted if name not in taken]
        return [
            *(f"nothing found for {name}" for name in missing),
            *(f"unknown {name}" for name in unknown),
            *misshapen,
        ]

    def weights(self) -> dict[str, Tensor]:
        """Our weights, in float32 where they are floating-point numbers.

        Raises:
            UserError: Weights are missing, unknown or of another shape; the message lists them.
        """
        self.check()
        taken = self._converted(self.found)
        return {name: _single(taken[name]) for name in self.wanted}

    def check(self) -> None:
        """See that everything fits.

        Raises:
            UserError: As `weights` does.
        """
        problems = self.problems()
        if problems:
            more = f"; and {len(problems) - _LISTED} more" if len(problems) > _LISTED else ""
            raise UserError(
                f"{self.source}: {len(problems)} weights do not fit: {'; '.join(problems[:_LISTED])}{more}."
            )

    def _dropped(self) -> list[str]:
        patterns = [re.compile(pattern) for pattern in self.dropped]
        return [name for name in self.found if any(pattern.fullmatch(name) for pattern in patterns)]

    def _origins(self) -> dict[str, list[str]]:
        """Which of theirs each of ours is made of: the conversion of tensors that hold only their number."""
        names = list(self.found)
        numbered = {
            name: torch.tensor(float(number)).expand(self.found[name].shape)
            for number, name in enumerate(names)
        }
        return {
            ours: [names[int(number)] for number in dict.fromkeys(_first_of_rows(tensor).tolist())]
            for ours, tensor in self._converted(numbered).items()
        }

    def _converted(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        try:
            return self.convert(state)
        except UserError as error:
            raise UserError(f"{self.source}: {error}") from None


def _single(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


def _first_of_rows(tensor: Tensor) -> Tensor:
    return tensor[(slice(None), *([0] * (tensor.ndim - 1)))] if tensor.ndim else tensor[None]
