"""Key mapping of foreign weights, with checks for missing, unknown and misshapen entries."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vqd_scale.core.errors import UserError

_LISTED = 20

Convert = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
"""A pure function between state dictionaries; it renames, splits and joins tensors, without arithmetic."""


class Prefixes:
    """Bidirectional mapping of name prefixes.

    Args:
        table: Pairs (ours, theirs); the first match applies. ``*`` matches a number, equal on both sides.
            Names without a match are dropped.
    """

    def __init__(self, *table: tuple[str, str]) -> None:
        self._table = table

    def to_ours(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rename a foreign state to this package's names."""
        return _renamed(state, [(theirs, ours) for ours, theirs in self._table])

    def to_theirs(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rename a state of this package to the foreign names."""
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
    """Return the entries under a prefix, with the prefix removed."""
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def under(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Add a prefix to every name."""
    return {prefix + name: value for name, value in state.items()}


@dataclass(frozen=True)
class Exchange:
    """Conversion of foreign weights to a target state dictionary.

    Attributes:
        source: File or folder, for error messages.
        found: Foreign weights.
        wanted: Target weights by name; only the shapes are used.
        convert: Conversion from the foreign state to the target state.
        dropped: Regular expressions of foreign names to drop.
    """

    source: str
    found: Mapping[str, Tensor]
    wanted: Mapping[str, Tensor]
    convert: Convert
    dropped: Sequence[str] = ()

    def lines(self) -> list[str]:
        """Describe the mapping, one line per weight: converted ones, dropped ones, problems."""
        origins = self._origins()
        taken = [
            f"{' + '.join(origins[name])} -> {name} {list(wanted.shape)}"
            for name, wanted in self.wanted.items()
            if name in origins
        ]
        return [*taken, *(f"{name} is dropped" for name in self._dropped()), *self.problems()]

    def problems(self) -> list[str]:
        """List missing, unknown and misshapen weights."""
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
        """Convert the weights; floating-point tensors become float32.

        Raises:
            UserError: Weights are missing, unknown or of another shape; the message lists them.
        """
        self.check()
        taken = self._converted(self.found)
        return {name: _single(taken[name]) for name in self.wanted}

    def check(self) -> None:
        """Check that there are no problems.

        Raises:
            UserError: Weights are missing, unknown or of another shape; the message lists them.
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
        """Return the foreign names that each target weight consists of.

        The conversion runs on tensors filled with the index of their name.
        """
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
