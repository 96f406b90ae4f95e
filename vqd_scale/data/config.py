"""Configuration of the data pipeline; needs no torch."""

from pathlib import Path
from typing import Literal, cast

from pydantic import Field, model_validator
from typing_extensions import Self

from vqd_scale.core.atomic_io import Location
from vqd_scale.core.config import Config
from vqd_scale.data.order.mixture import shares


class CacheConfig(Config):
    """Local disk cache of S3 shards."""

    folder: Path
    """Folder on a local disk, which all runs of a machine may share."""
    max_gigabytes: float = Field(gt=0)
    """Largest size; a shard that does not fit beside the shards in use is not cached."""


class RangedReadConfig(Config):
    """Reading of shards in S3; local shards are read in place."""

    buffer_megabytes: int = Field(default=512, ge=1, le=1 << 20)
    """Memory for prefetched pieces, per reading process."""
    cache: CacheConfig | None = None
    """Local disk cache of whole shards, for datasets that are read more than once."""


class DecodeConfig(Config):
    """Image decoding."""

    max_pixels: int = Field(default=89_478_485, ge=1, le=178_956_970)
    """Maximum number of pixels; larger images are rejected before they are decoded. Decoding the default
    takes about a gigabyte of memory; the largest allowed value is Pillow's own limit."""
    dct_scaled: bool = False
    """Decode a JPEG at a half, quarter or eighth of its size if the transform needs no more. About twice as
    fast, but some pixels differ by tens of levels from a full decode plus resize. Disable to reproduce
    published results."""


class SourceConfig(Config):
    """One dataset of a mixture."""

    path: Location
    """Folder of the shards, local or in S3."""
    weight: float = Field(default=1.0, gt=0)
    """Weight of the dataset relative to the other weights. Its share of the slots follows exactly."""


class StreamConfig(Config):
    """Training datasets and the order of their samples."""

    path: Location | None = None
    """Folder of the shards, local or in S3."""
    sources: tuple[SourceConfig, ...] | None = Field(default=None, min_length=1)
    """Datasets of a weighted mixture, in place of ``path``."""
    global_batch_size: int = Field(default=128, ge=1, le=1 << 20)
    """Samples in a batch, over all ranks."""
    order_lanes: int | None = Field(default=None, ge=1, le=1 << 20)
    """Lanes into which the plan cuts an epoch; by default ``global_batch_size``, so a batch takes one sample
    from each. A run that resumes with another batch size keeps its lanes. Part of the order."""
    shuffle_window: int = Field(default=256, ge=1, le=1 << 20)
    """Number of neighboring samples of a lane among which a sample is shuffled. Part of the order."""
    captions: Literal["first", "random", "each"] = "first"
    """Caption of an image that has several: the ``first``, a ``random`` one at each visit, or ``each``, which
    makes every caption an item, so that an epoch visits the image once per caption."""
    class_balanced: bool = False
    """Sample classes equally often instead of every sample once per epoch. Reads at random offsets, so shards
    should be local."""
    num_workers: int = Field(default=0, ge=0, le=64)
    """Reading processes per rank; 0 reads in a thread of the rank. Not part of the order."""
    prefetch_batches: int = Field(default=4, ge=1, le=1 << 10)
    """Batches read ahead."""
    max_bad_fraction: float = Field(default=0.01, ge=0, le=1)
    """Largest fraction of unusable samples in an epoch; above it the run stops."""
    ranged_reads: RangedReadConfig = RangedReadConfig()
    """Ranged reads of shards in S3. Not part of the order."""

    @model_validator(mode="after")
    def _either_one_or_several(self) -> Self:
        if (self.path is None) == (self.sources is None):
            raise ValueError("give either path, one set of shards, or sources, several that are mixed")
        # Fail here, at configuration time, on weights that cannot be represented exactly.
        shares([source.weight for source in self.mixed], self.lanes)
        return self

    @model_validator(mode="after")
    def _no_captions_where_classes_count(self) -> Self:
        if self.class_balanced and self.captions == "each":
            raise ValueError("captions=each and class_balanced=true define an epoch differently; give one")
        return self

    @property
    def lanes(self) -> int:
        """Number of lanes of the order."""
        return self.order_lanes or self.global_batch_size

    @property
    def mixed(self) -> tuple[SourceConfig, ...]:
        """Datasets of the mixture; a single one if ``path`` is given."""
        return self.sources or (SourceConfig(path=cast(Location, self.path)),)
