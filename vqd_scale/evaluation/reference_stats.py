"""Reference statistics of real images, computed once and stored with their provenance."""

import json
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float32, Int64
from pydantic import Field
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vqd_scale.core.atomic_io import Location, published
from vqd_scale.core.config import Config
from vqd_scale.core.errors import UserError
from vqd_scale.core.tensors import write_tensors
from vqd_scale.core.world import World
from vqd_scale.data.shards.decode import BadSample, decode_image, image_extension
from vqd_scale.data.shards.shard_index import ShardSet
from vqd_scale.data.shards.shard_io import ShardReader
from vqd_scale.data.transforms import CenterCrop
from vqd_scale.evaluation.extractors import FEATURES, Extractor
from vqd_scale.evaluation.frechet import FeatureStatistics
from vqd_scale.evaluation.prompts import EvaluationPrompt
from vqd_scale.evaluation.resumable_chunks import ResumableChunks, digest, first_difference

_PART = 256
_PROVENANCE = "provenance"
_FILTER = "bicubic, anti-aliased, 8 bits"


class ReferenceConfig(Config):
    """Real images that generated ones are compared with.

    Attributes:
        data: Shards of the real images; the evaluation's own if not given. Training and validation images
            give different figures.
        images: ``prompted`` takes the images whose captions were chosen, once per caption; ``all`` the set.
        repeat_to: Repeat the images in order up to this count, as the authors of VQ-Diffusion did for small
            sets. The repetition adds no information.
        stored_features: Number of features stored for distances that need more than mean and covariance.
        file: File for the statistics, to be shared by several evaluations.
    """

    data: Location | None = None
    images: Literal["prompted", "all"] = "prompted"
    repeat_to: int | None = Field(default=None, ge=1)
    stored_features: int = Field(default=50_000, ge=2)
    file: Path | None = None


@dataclass(frozen=True)
class Reference:
    """Reference statistics of real images.

    Attributes:
        statistics: Statistics of all features.
        kept: Stored subset of the features, float32 [kept, features].
        provenance: Everything the statistics depend on.
    """

    statistics: FeatureStatistics
    kept: Float32[Tensor, "kept features"]
    provenance: dict[str, Any]


def reference_of(
    config: ReferenceConfig,
    shards: ShardSet,
    prompts: Sequence[EvaluationPrompt],
    size: int,
    extractor: Extractor,
    file: Path,
    world: World,
    stop: Callable[[], bool],
) -> Reference:
    """Load the reference statistics from their file, or compute and store them; collective.

    Args:
        config: Selection of real images.
        shards: Shards of the real images.
        prompts: Selected prompts.
        size: Side of the model's images in pixels.
        extractor: Feature extractor.
        file: File of the statistics, created if missing.
        world: Ranks that share the work.
        stop: Callback that returns ``True`` after a stop signal.

    Raises:
        EvaluationStopped: A rank received a stop signal.
        UserError: The file contains statistics of other images, or a sample has no image.
    """
    members, repeats = _members(config, shards, prompts)
    provenance = _provenance(config, shards, members, repeats, size, extractor)
    if world.any(not file.exists()):
        parts = ResumableChunks(file.with_name(f"{file.name}.parts"), len(members), _PART)
        parts.begin({"provenance": provenance}, world)
        pictures = _Pictures(shards, CenterCrop(size=size))

        def make(numbers: range) -> dict[str, Tensor]:
            images = torch.stack([pictures(members[number]) for number in numbers])
            return {FEATURES: extractor(images)[FEATURES]}

        parts.work(make, world, "reference", stop)
        statistics = _statistics(parts, repeats, extractor.dimension, world)

        def store() -> None:
            _store(file, statistics, _kept(parts, config.stored_features), provenance)
            shutil.rmtree(parts.folder)

        world.on_first_rank(store)
    return _load(file, provenance)


def _members(
    config: ReferenceConfig, shards: ShardSet, prompts: Sequence[EvaluationPrompt]
) -> tuple[list[int], Int64[Tensor, " pictures"]]:
    """Return the indices of the selected samples, and the multiplicity of each."""
    if config.images == "all":
        members, counts = list(range(shards.count)), [1] * shards.count
    else:
        chosen = Counter(prompt.member for prompt in prompts)
        members = sorted(chosen)
        counts = [chosen[member] for member in members]
    repeats = torch.tensor(counts)
    if config.repeat_to is not None:
        whole, rest = divmod(config.repeat_to, len(members))
        if int(repeats.max()) > 1 or whole < 1:
            raise UserError(
                f"reference.repeat_to: {len(members)} pictures that count up to {int(repeats.max())} times "
                f"cannot be repeated up to {config.repeat_to}; leave it out."
            )
        repeats = torch.full_like(repeats, whole) + (torch.arange(len(members)) < rest)
    return members, repeats


def _provenance(
    config: ReferenceConfig,
    shards: ShardSet,
    members: Sequence[int],
    repeats: Tensor,
    size: int,
    extractor: Extractor,
) -> dict[str, Any]:
    return {
        "set": digest([list(shards.names), list(shards.counts), list(shards.digests or shards.sizes)]),
        "pictures": len(members),
        "counted": int(repeats.sum()),
        "members": digest([list(members), repeats.tolist()]),
        "kept": min(config.stored_features, len(members)),
        "crop": "the short side resized, the centre square cut",
        "size": size,
        "filter": _FILTER,
        "extractor": extractor.description,
    }


class _Pictures:
    """Real images by their index in the dataset."""

    def __init__(self, shards: ShardSet, transform: CenterCrop) -> None:
        self._shards = shards
        self._transform = transform
        self._firsts = np.cumsum([0, *shards.counts])
        self._open: tuple[int, ShardReader] | None = None

    def __call__(self, member: int) -> Tensor:
        number = int(np.searchsorted(self._firsts, member, side="right")) - 1
        if self._open is None or self._open[0] != number:
            self._open = (number, ShardReader(self._shards.shards[number]))
        reader, inside = self._open[1], member - int(self._firsts[number])
        try:
            extension = image_extension(reader.extensions(inside))
            pixels = self._transform(decode_image(reader.read(inside, extension)), ())
        except BadSample as error:
            raise UserError(
                f"{reader.shard.path}: sample '{reader.key(inside)}' {error}; a reference needs all of its "
                f"pictures, name a set that has them with reference.data."
            ) from None
        return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


def _statistics(parts: ResumableChunks, repeats: Tensor, dimension: int, world: World) -> FeatureStatistics:
    statistics = FeatureStatistics.empty(dimension)
    for part in parts.numbers[world.rank :: world.size]:
        pictures = parts.pictures(part)
        features = parts.read(part)[FEATURES]
        statistics = statistics.update(
            features.repeat_interleave(repeats[pictures.start : pictures.stop], dim=0)
        )
    return statistics.over_ranks(world)


def _kept(parts: ResumableChunks, kept: int) -> Float32[Tensor, "kept features"]:
    """Read the features of evenly spaced images."""
    least = min(kept, parts.count)
    places = (torch.arange(least) * parts.count) // least
    taken: list[Tensor] = []
    for part in parts.numbers:
        pictures = parts.pictures(part)
        inside = places[(places >= pictures.start) & (places < pictures.stop)] - pictures.start
        if len(inside):
            taken.append(parts.read(part)[FEATURES][inside])
    return torch.cat(taken)


def _store(file: Path, statistics: FeatureStatistics, kept: Tensor, provenance: dict[str, Any]) -> None:
    tensors = {
        "count": torch.tensor(statistics.count),
        "mean": statistics.mean,
        "scatter": statistics.scatter,
        "kept": kept,
    }
    with published(file) as partial:
        write_tensors(partial, tensors, {_PROVENANCE: json.dumps(provenance)})


def _load(file: Path, wanted: dict[str, Any]) -> Reference:
    try:
        with safe_open(file, framework="pt") as stored:
            found: dict[str, Any] = json.loads((stored.metadata() or {})[_PROVENANCE])
            differing = first_difference(found, json.loads(json.dumps(wanted)))
            if differing is not None:
                raise UserError(
                    f"{file}: these are statistics of other real pictures ({differing}); name another "
                    f"reference.file."
                )
            statistics = FeatureStatistics(
                int(stored.get_tensor("count")), stored.get_tensor("mean"), stored.get_tensor("scatter")
            )
            return Reference(statistics, stored.get_tensor("kept"), found)
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise UserError(f"{file}: holds no statistics of real pictures ({error}).") from None
