"""Columns of numbers for numbered pictures, worked out in parts by all ranks: a kill costs a part of each.

Every part is a file that appears whole. Which pictures a part holds does not depend on who works it out, so
that any number of ranks goes on where any other stopped, and none is counted twice.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vqd_scale.core.atomic_io import publish_json, published, read_json
from vqd_scale.core.errors import UserError
from vqd_scale.core.progress import progress_bar
from vqd_scale.core.tensors import read_tensors, write_tensors
from vqd_scale.core.world import World

_DESCRIPTION = "parts.json"

Columns = Mapping[str, Tensor]
"""Tensors with a row per picture."""


class EvaluationStopped(Exception):
    """A rank was asked to leave before all was done; what is done is kept, the same call goes on from it."""


@dataclass(frozen=True)
class ResumableChunks:
    """A folder of parts.

    Attributes:
        folder: Where they are; all ranks see it.
        count: How many pictures there are.
        size: How many of them a part holds; the last one holds the rest.
    """

    folder: Path
    count: int
    size: int

    @property
    def numbers(self) -> range:
        """All parts."""
        return range(-(-self.count // self.size))

    def pictures(self, part: int) -> range:
        """The pictures of a part."""
        return range(part * self.size, min((part + 1) * self.size, self.count))

    def path(self, part: int) -> Path:
        """The file of a part."""
        return self.folder / f"{part:06d}.safetensors"

    def begin(self, description: Mapping[str, Any], world: World) -> None:
        """Say what is worked out, or see that the folder holds parts of the same.

        Raises:
            UserError: It holds parts of something else.
        """
        wanted = json.loads(json.dumps({"count": self.count, "size": self.size, **description}))
        path = self.folder / _DESCRIPTION
        world.on_first_rank(lambda: path.exists() or publish_json(path, wanted))
        differing = first_difference(read_json(path, "description of these parts"), wanted)
        if differing is not None:
            raise UserError(
                f"{self.folder}: was begun with {differing}; give another --out, or delete this folder."
            )

    def work(
        self, make: Callable[[range], Columns], world: World, title: str, stop: Callable[[], bool]
    ) -> None:
        """Make this rank's share of the parts that are not there yet; afterwards all are.

        Args:
            make: From pictures' numbers to their columns.
            world: The ranks; they agree at the end on whether any of them was stopped.
            title: What the progress bar says.
            stop: Whether to leave before the next part.

        Raises:
            Stopped: A rank was asked to leave.
            UserError: The disk is full.
        """
        stopped = False
        # What is left is dealt out anew: other ranks may have left one rank's parts only. All take the first
        # rank's word for it, which they wait for, so that nobody counts what is being made.
        missing = [part for part in self.numbers if not self.path(part).exists()]
        missing = world.gathered({"missing": missing})[0]["missing"]
        mine = missing[world.rank :: world.size]
        total = sum(len(self.pictures(part)) for part in mine)
        with progress_bar(title, total, unit="img", quiet=not world.is_first) as bar:
            for part in mine:
                if stopped := stop():
                    break
                columns = make(self.pictures(part))
                with published(self.path(part)) as partial:
                    write_tensors(partial, columns)
                bar.update(len(self.pictures(part)))
        if world.any(stopped):
            raise EvaluationStopped

    def read(self, part: int) -> dict[str, Tensor]:
        """The columns of a part.

        Raises:
            UserError: It is missing or damaged.
        """
        return read_tensors(self.path(part))

    def column(self, name: str) -> Tensor:
        """A column of all pictures, in their order; all parts must be there.

        Raises:
            UserError: A part is missing or damaged.
        """
        return torch.cat([self.read(part)[name] for part in self.numbers])


def first_difference(found: Any, wanted: Any, path: str = "") -> str | None:  # noqa: ANN401 - JSON
    """Where two JSON values differ first, as 'a.b: this, not that'; None where they do not."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        for key in [*wanted, *(key for key in found if key not in wanted)]:
            inner = f"{path}.{key}" if path else str(key)
            differing = first_difference(found.get(key), wanted.get(key), inner)
            if differing is not None:
                return differing
        return None
    return None if found == wanted else f"{path} {_short(found)}, not {_short(wanted)}"


def digest(value: Any) -> str:  # noqa: ANN401 - whatever JSON can hold
    """Hex SHA-256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _short(value: Any) -> str:  # noqa: ANN401 - JSON
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
