"""Reference statistics of real images, computed once and stored with their provenance."""

import json
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32, Int64
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vqd_scale.core.atomic_io import published
from vqd_scale.core.errors import UserError
from vqd_scale.core.tensors import write_tensors
from vqd_scale.core.world import World
from vqd_scale.data.shards.decode import BadSample, decode_image, image_extension
from vqd_scale.data.shards.shard_index import ShardSet
from vqd_scale.data.shards.shard_io import ShardReader
from vqd_scale.data.transforms import CenterCrop
from vqd_scale.evaluation.config import ReferenceConfig
from vqd_scale.evaluation.extractors import FEATURES, Extractor
from vqd_scale.evaluation.frechet import FeatureStatistics
from vqd_scale.evaluation.prompts import EvaluationPrompt
from vqd_scale.evaluation.resumable_chunks import ResumableChunks, digest, first_difference, statistics_of

_PART = 256
_PROVENANCE = "provenance"
_FILTER = "bicubic, anti-aliased, 8 bits"


@dataclass(frozen=True)
class Reference:
    """Reference statistics of real images.

    Attributes:
        statistics: Statistics of all features.
        features: Stored subset of the features, float32 [stored, features].
        provenance: Everything the statistics depend on.
    """

    statistics: FeatureStatistics
    features: Float32[Tensor, "stored features"]
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
        images = _Images(shards, members, CenterCrop(size=size))

        def make(numbers: range) -> dict[str, Tensor]:
            return {FEATURES: extractor(torch.stack(list(map(images, numbers))))[FEATURES]}

        parts.work(make, world, "reference", stop)
        statistics = statistics_of(parts, extractor.dimension, world, repeats)

        def store() -> None:
            _store(file, statistics, _stored_features(parts, config.stored_features), provenance)
            shutil.rmtree(parts.folder)

        world.on_first_rank(store)
    return _load(file, provenance)


def _members(
    config: ReferenceConfig, shards: ShardSet, prompts: Sequence[EvaluationPrompt]
) -> tuple[list[int], Int64[Tensor, " images"]]:
    """Return the indices of the selected samples, and the multiplicity of each."""
    if config.images == "all":
        members, counts = list(range(shards.count)), [1] * shards.count
    else:
        uses = Counter(prompt.member for prompt in prompts)
        members = sorted(uses)
        counts = [uses[member] for member in members]
    repeats = torch.tensor(counts)
    if config.repeat_to is not None:
        full, remainder = divmod(config.repeat_to, len(members))
        if int(repeats.max()) > 1 or full < 1:
            raise UserError(
                f"reference.repeat_to: {len(members)} images that count up to {int(repeats.max())} times "
                f"cannot be repeated up to {config.repeat_to}; leave it out."
            )
        repeats = torch.full_like(repeats, full) + (torch.arange(len(members)) < remainder)
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
        "images": len(members),
        "counted": int(repeats.sum()),
        "members": digest([list(members), repeats.tolist()]),
        "stored_features": min(config.stored_features, len(members)),
        "crop": "the short side resized, the center square cut",
        "size": size,
        "filter": _FILTER,
        "extractor": extractor.description,
    }


class _Images:
    """Real images by their number among the selected samples."""

    def __init__(self, shards: ShardSet, members: Sequence[int], transform: CenterCrop) -> None:
        self._shards = shards.shards
        self._locations = np.stack(shards.locate(np.array(members)), axis=1)
        self._transform = transform
        self._reader: ShardReader | None = None

    def __call__(self, number: int) -> Tensor:
        shard_number, inside = self._locations[number].tolist()
        shard = self._shards[shard_number]
        if self._reader is None or self._reader.shard != shard:
            self._reader = ShardReader(shard)
        reader = self._reader
        try:
            extension = image_extension(reader.extensions(inside))
            pixels = self._transform(decode_image(reader.read(inside, extension)), ())
        except BadSample as error:
            raise UserError(
                f"{reader.shard.path}: sample '{reader.key(inside)}' {error}; a reference needs all of its "
                f"images, name a set that has them with reference.data."
            ) from None
        return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


def _stored_features(parts: ResumableChunks, count: int) -> Float32[Tensor, "stored features"]:
    """Read the features of at most ``count`` evenly spaced images."""
    count = min(count, parts.count)
    positions = (torch.arange(count) * parts.count) // count
    features: list[Tensor] = []
    for part in parts.numbers:
        images = parts.images(part)
        inside = positions[(positions >= images.start) & (positions < images.stop)] - images.start
        if len(inside):
            features.append(parts.read(part)[FEATURES][inside])
    return torch.cat(features)


def _store(file: Path, statistics: FeatureStatistics, features: Tensor, provenance: dict[str, Any]) -> None:
    tensors = {
        "count": torch.tensor(statistics.count),
        "mean": statistics.mean,
        "scatter": statistics.scatter,
        "features": features,
    }
    with published(file) as partial:
        write_tensors(partial, tensors, {_PROVENANCE: json.dumps(provenance)})


def _load(file: Path, expected: dict[str, Any]) -> Reference:
    try:
        with safe_open(file, framework="pt") as stored:
            provenance: dict[str, Any] = json.loads((stored.metadata() or {})[_PROVENANCE])
            difference = first_difference(provenance, json.loads(json.dumps(expected)))
            if difference is not None:
                raise UserError(
                    f"{file}: these are statistics of other real images ({difference}); name another "
                    f"reference.file."
                )
            statistics = FeatureStatistics(
                int(stored.get_tensor("count")), stored.get_tensor("mean"), stored.get_tensor("scatter")
            )
            return Reference(statistics, stored.get_tensor("features"), provenance)
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise UserError(f"{file}: holds no statistics of real images ({error}).") from None
