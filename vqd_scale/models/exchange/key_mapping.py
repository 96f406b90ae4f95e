"""Key mapping of foreign weights, with checks for missing, unknown and misshapen entries."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vqd_scale.core.errors import UserError
from vqd_scale.core.tensors import check_finite, difference_of

_MAX_LISTED = 20

Convert = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
"""A pure function between state dictionaries; it renames, splits and joins tensors, without arithmetic."""


class Prefixes:
    """Bidirectional mapping of name prefixes.

    Args:
        table: Pairs (name in this package, foreign name); the first match applies. ``*`` matches a number,
            equal on both sides. Names without a match are dropped.
    """

    def __init__(self, *table: tuple[str, str]) -> None:
        self._table = table

    def from_foreign(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rename a foreign state to this package's names."""
        return _renamed(state, [(foreign, name) for name, foreign in self._table])

    def to_foreign(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rename a state of this package to the foreign names."""
        return _renamed(state, self._table)


def _renamed(state: Mapping[str, Tensor], table: Sequence[tuple[str, str]]) -> dict[str, Tensor]:
    patterns = [
        (re.compile(re.escape(old).replace(r"\*", r"(\d+)")), new.replace("*", r"\1")) for old, new in table
    ]
    result: dict[str, Tensor] = {}
    for name, tensor in state.items():
        for pattern, new in patterns:
            if match := pattern.match(name):
                result[match.expand(new) + name[match.end() :]] = tensor
                break
    return result


def count_numbered(state: Mapping[str, Tensor], pattern: str) -> int:
    """Return the number of parts that a pattern's group numbers from 0; 0 without a match."""
    return 1 + max((int(match[1]) for name in state if (match := re.match(pattern, name))), default=-1)


@dataclass(frozen=True)
class Exchange:
    """Conversion of foreign weights to a target state dictionary.

    Attributes:
        source: File or folder, for error messages.
        source_weights: Foreign weights.
        target_weights: Target weights by name; only the shapes are used.
        convert: Conversion from the foreign state to the target state.
        dropped: Regular expressions of foreign names to drop.
    """

    source: str
    source_weights: Mapping[str, Tensor]
    target_weights: Mapping[str, Tensor]
    convert: Convert
    dropped: Sequence[str] = ()

    def lines(self) -> list[str]:
        """Describe the mapping, one line per weight: converted ones, dropped ones, problems."""
        origins = self._origins()
        converted = [
            f"{' + '.join(origins[name])} -> {name} {list(target.shape)}"
            for name, target in self.target_weights.items()
            if name in origins
        ]
        return [*converted, *(f"{name} is dropped" for name in self._dropped_names()), *self.problems()]

    def problems(self) -> list[str]:
        """List missing, unknown and misshapen weights."""
        origins, converted = self._origins(), self._convert(self.source_weights)
        used = {part for name in self.target_weights for part in origins.get(name, [])}
        expected_names = used.union(self._dropped_names())
        unknown = [name for name in self.source_weights if name not in expected_names]
        misshapen = [
            f"{' + '.join(origins[name])} has the {difference}"
            for name, target in self.target_weights.items()
            if (tensor := converted.get(name)) is not None and (difference := difference_of(tensor, target))
        ]
        missing = [name for name in self.target_weights if name not in converted]
        return [
            *(f"nothing found for {name}" for name in missing),
            *(f"unknown {name}" for name in unknown),
            *misshapen,
        ]

    def weights(self) -> dict[str, Tensor]:
        """Convert the weights; floating-point tensors become float32.

        Raises:
            UserError: Weights are missing, unknown, of another shape or not finite; the message lists them.
        """
        self.check()
        converted = self._convert(self.source_weights)
        state = {name: converted[name] for name in self.target_weights}
        check_finite(state, self.source)
        return {name: value.float() if value.is_floating_point() else value for name, value in state.items()}

    def check(self) -> None:
        """Raise a `UserError` that lists the missing, unknown and misshapen weights, if any."""
        problems = self.problems()
        if problems:
            omitted = f"; and {len(problems) - _MAX_LISTED} more" if len(problems) > _MAX_LISTED else ""
            listed = "; ".join(problems[:_MAX_LISTED])
            raise UserError(f"{self.source}: {len(problems)} weights do not fit: {listed}{omitted}.")

    def _dropped_names(self) -> list[str]:
        patterns = [re.compile(pattern) for pattern in self.dropped]
        return [name for name in self.source_weights if any(pattern.fullmatch(name) for pattern in patterns)]

    def _origins(self) -> dict[str, list[str]]:
        """Return the foreign names that each target weight consists of.

        The conversion runs on tensors filled with the index of their name.
        """
        names = list(self.source_weights)
        numbered = {
            name: torch.tensor(float(number)).expand(self.source_weights[name].shape)
            for number, name in enumerate(names)
        }
        return {
            name: [names[int(number)] for number in dict.fromkeys(_first_column(tensor).tolist())]
            for name, tensor in self._convert(numbered).items()
        }

    def _convert(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        try:
            return self.convert(state)
        except UserError as error:
            raise UserError(f"{self.source}: {error}") from None
        except (IndexError, RuntimeError, ValueError) as error:
            raise UserError(
                f"{self.source}: a weight has another shape than its name implies ({error})."
            ) from None


def _first_column(tensor: Tensor) -> Tensor:
    if not tensor.numel():
        return tensor.flatten()
    return tensor[(slice(None), *([0] * (tensor.ndim - 1)))] if tensor.ndim else tensor[None]
