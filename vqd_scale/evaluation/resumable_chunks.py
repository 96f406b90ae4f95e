"""Resumable, chunked computation of per-image columns over all ranks.

Every chunk is a file written by an atomic rename, so a kill loses at most one chunk per rank. The assignment
of images to chunks is independent of the ranks. Any number of ranks can therefore resume the work of any
other, and no image is counted twice.
"""

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor

from vqd_scale.core.atomic_io import publish_json, published, read_json
from vqd_scale.core.errors import UserError
from vqd_scale.core.fingerprint import first_difference, read_with_digest, write_with_digest
from vqd_scale.core.outputs import MARKER, reserve
from vqd_scale.core.progress import progress_bar
from vqd_scale.core.signals import report_progress
from vqd_scale.core.world import World
from vqd_scale.evaluation.extractors import FEATURES
from vqd_scale.evaluation.frechet import FeatureStatistics

_DESCRIPTION = "parts.json"

Columns = Mapping[str, Tensor]
"""Tensors with one row per image."""


class EvaluationStopped(Exception):
    """Stop signal before all chunks were computed; the same call resumes from the finished chunks."""


@dataclass(frozen=True)
class ResumableChunks:
    """Folder of chunks.

    Attributes:
        folder: Path of the folder, shared by all ranks.
        count: Total number of images.
        size: Images per chunk; the last chunk contains the remainder.
    """

    folder: Path
    count: int
    size: int

    @property
    def numbers(self) -> range:
        """Indices of all chunks."""
        return range(-(-self.count // self.size))

    def images(self, part: int) -> range:
        """Return the image indices of a chunk."""
        return range(part * self.size, min((part + 1) * self.size, self.count))

    def path(self, part: int) -> Path:
        """Return the file of a chunk."""
        return self.folder / f"{part:06d}.safetensors"

    def begin(self, description: Mapping[str, Any], world: World) -> None:
        """Write the description of the computation, or check that the folder has the same description.

        Raises:
            UserError: The folder contains chunks of another computation, or something else.
        """
        names = [_DESCRIPTION, *(self.path(part).name for part in self.numbers)]

        def prepare() -> None:
            reserve(self.folder, "an evaluation", names)
            if not (self.folder / _DESCRIPTION).exists():
                # Chunks without a description may be of any computation.
                for path in map(self.path, self.numbers):
                    path.unlink(missing_ok=True)

        world.on_first_rank(prepare)
        complete = {"count": self.count, "size": self.size, **description}
        reserve_folder(self.folder / _DESCRIPTION, complete, world, option="--output")

    def work(
        self, make: Callable[[range], Columns], world: World, title: str, stop: Callable[[], bool]
    ) -> None:
        """Compute this rank's share of the missing chunks; on return all chunks exist.

        Args:
            make: Function from image indices to their columns.
            world: Ranks that share the work.
            title: Title of the progress bar.
            stop: Callback that returns ``True`` to stop before the next chunk.

        Raises:
            EvaluationStopped: A rank received a stop signal.
            UserError: The disk is full.
        """
        stopped = False
        # Redistribute the missing chunks, which can all be from one rank of an earlier run. All ranks use the
        # first rank's list. The gather is also a barrier: no chunk is written before all lists are made.
        missing = [part for part in self.numbers if not self.path(part).exists()]
        missing = world.gathered({"missing": missing})[0]["missing"]
        assigned = missing[world.rank :: world.size]
        total = sum(len(self.images(part)) for part in assigned)
        with progress_bar(title, total, unit="img", quiet=not world.is_first) as bar:
            for part in assigned:
                if stopped := stop():
                    break
                columns = make(self.images(part))
                with published(self.path(part)) as partial:
                    write_with_digest(partial, columns, {})
                report_progress()
                bar.update(len(self.images(part)))
        if world.any(stopped):
            raise EvaluationStopped

    def read(self, part: int) -> dict[str, Tensor]:
        """Read the columns of a chunk; errors as for `read_with_digest`."""
        return read_with_digest(self.path(part))[0]

    def discard(self) -> None:
        """Delete the chunks, and the folder unless it contains something else."""
        for path in (self.folder / MARKER, self.folder / _DESCRIPTION, *map(self.path, self.numbers)):
            path.unlink(missing_ok=True)
        with suppress(OSError):
            self.folder.rmdir()

    def column(self, name: str) -> Tensor:
        """Read one column of all images, in order; errors as for `read_with_digest`."""
        return torch.cat([self.read(part)[name] for part in self.numbers])


def statistics_of(
    parts: ResumableChunks, dimension: int, world: World, repeats: Int64[Tensor, " images"] | None = None
) -> FeatureStatistics:
    """Compute the statistics of all images' features; each rank reads its own chunks. Collective.

    Args:
        parts: Chunks with a column of features.
        dimension: Number of features.
        world: Ranks that share the work.
        repeats: Multiplicity of each image; ``None`` counts every image once.
    """
    statistics = FeatureStatistics.empty(dimension)
    for part in parts.numbers[world.rank :: world.size]:
        features, images = parts.read(part)[FEATURES], parts.images(part)
        if repeats is not None:
            features = features.repeat_interleave(repeats[images.start : images.stop], dim=0)
        statistics = statistics.merge(FeatureStatistics.of(features))
    return statistics.over_ranks(world)


def reserve_folder(path: Path, description: Mapping[str, Any], world: World, option: str) -> None:
    """Write the description of a computation to its folder, or check that the folder has the same one.

    Args:
        path: File of the description in the folder.
        description: Description of the computation, as JSON values.
        world: Ranks that share the work.
        option: Name of the option that sets the folder, for the error message.

    Raises:
        UserError: The folder contains the description of another computation.
    """
    world.on_first_rank(lambda: path.exists() or publish_json(path, description))
    difference = first_difference(read_json(path, "description of this computation"), description)
    if difference is not None:
        raise UserError(
            f"{path.parent}: was begun with {difference}; give another {option}, or delete this folder."
        )
