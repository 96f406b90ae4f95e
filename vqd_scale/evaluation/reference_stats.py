"""Reference statistics of real images, computed once and stored with their provenance."""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32, Int64
from torch import Tensor

from vqd_scale.core.atomic_io import published
from vqd_scale.core.errors import UserError
from vqd_scale.core.fingerprint import (
    first_difference,
    json_digest,
    read_with_digest,
    write_with_digest,
)
from vqd_scale.core.safe_json import JSON_OBJECT, parse_json
from vqd_scale.core.world import World
from vqd_scale.data.shards.decode import BadSample, decode_image, image_extension
from vqd_scale.data.shards.shard_index import ShardSet
from vqd_scale.data.shards.shard_io import ShardReader
from vqd_scale.data.transforms import CenterCrop
from vqd_scale.evaluation.config import ReferenceConfig
from vqd_scale.evaluation.extractors import FEATURES, Extractor
from vqd_scale.evaluation.frechet import FeatureStatistics
from vqd_scale.evaluation.prompts import EvaluationPrompt
from vqd_scale.evaluation.resumable_chunks import ResumableChunks, statistics_of

_PART = 256
_PROVENANCE = "provenance"


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


@dataclass(frozen=True)
class ReferenceImages:
    """Real images of a reference.

    Attributes:
        config: Selection of real images.
        shards: Shards of the real images.
        prompts: Selected prompts.
        size: Side of the model's images in pixels.
        extractor: Feature extractor.
    """

    config: ReferenceConfig
    shards: ShardSet
    prompts: Sequence[EvaluationPrompt]
    size: int
    extractor: Extractor

    @cached_property
    def members(self) -> tuple[list[int], Int64[Tensor, " images"]]:
        """Indices of the selected samples, and the multiplicity of each.

        Raises:
            UserError: ``repeat_to`` does not fit the images.
        """
        return _members(self.config, self.shards, self.prompts)

    @property
    def provenance(self) -> dict[str, Any]:
        """Everything that the statistics depend on."""
        shards, (members, repeats) = self.shards, self.members
        versions = [digest or size for digest, size in zip(shards.digests, shards.sizes, strict=True)]
        return {
            "set": json_digest([shards.names, shards.counts, versions]),
            "images": len(members),
            "counted": int(repeats.sum()),
            "members": json_digest([members, repeats.tolist()]),
            "stored_features": min(self.config.stored_features, len(members)),
            "crop": "the short side resized, the center square cut",
            "size": self.size,
            "filter": "bicubic, anti-aliased, 8 bits",
            "extractor": self.extractor.description,
        }


def reference_of(images: ReferenceImages, file: Path, world: World, stop: Callable[[], bool]) -> Reference:
    """Load the reference statistics from their file, or compute and store them; collective.

    Args:
        images: Real images.
        file: File of the statistics, created if missing.
        world: Ranks that share the work.
        stop: Callback that returns ``True`` after a stop signal.

    Raises:
        EvaluationStopped: A rank received a stop signal.
        UserError: The file contains statistics of other images, or a sample has no image.
    """
    (members, repeats), provenance, extractor = images.members, images.provenance, images.extractor
    if world.any(not file.exists()):
        parts = ResumableChunks(file.with_name(f"{file.name}.parts"), len(members), _PART)
        parts.begin({"provenance": provenance}, world)
        places = np.stack(images.shards.locate(np.array(members)), axis=1)
        reader_of = lru_cache(maxsize=1)(ShardReader)

        def make(numbers: range) -> dict[str, Tensor]:
            squares = [
                _image(reader_of(images.shards.shard(shard)), member, CenterCrop(size=images.size))
                for shard, member in places[numbers.start : numbers.stop].tolist()
            ]
            return {FEATURES: extractor(torch.stack(squares))[FEATURES]}

        parts.work(make, world, "reference", stop)
        statistics = statistics_of(parts, extractor.dimension, world, repeats)

        def store() -> None:
            tensors = {
                "count": torch.tensor(statistics.count),
                "mean": statistics.mean,
                "scatter": statistics.scatter,
                FEATURES: _stored_features(parts, images.config.stored_features),
            }
            with published(file) as partial:
                write_with_digest(partial, tensors, {_PROVENANCE: json.dumps(provenance)})
            parts.discard()

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


def _image(reader: ShardReader, member: int, transform: CenterCrop) -> Tensor:
    try:
        extension = image_extension(reader.extensions(member))
        pixels = transform(decode_image(reader.read(member, extension)), ())
    except BadSample as error:
        raise UserError(
            f"{reader.shard.path}: sample '{reader.key(member)}' {error}; a reference needs all of its "
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


def _load(file: Path, expected: dict[str, Any]) -> Reference:
    tensors, metadata = read_with_digest(file)
    try:
        provenance = parse_json(metadata[_PROVENANCE], JSON_OBJECT)
        statistics = FeatureStatistics(int(tensors["count"]), tensors["mean"], tensors["scatter"])
        reference = Reference(statistics, tensors[FEATURES], provenance)
    except (KeyError, ValueError) as error:
        raise UserError(f"{file}: holds no statistics of real images ({error}).") from None
    difference = first_difference(provenance, expected)
    if difference is not None:
        raise UserError(
            f"{file}: these are statistics of other real images ({difference}); name another reference.file."
        )
    return reference
