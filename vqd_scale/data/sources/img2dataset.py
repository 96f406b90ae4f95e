"""Index of existing tars, such as img2dataset's downloads; the tars are not modified."""

from pydantic import Field

from vqd_scale.core.atomic_io import Location
from vqd_scale.core.config import Config
from vqd_scale.data.shards.filters import Filters
from vqd_scale.data.shards.index_builder import SampleFilter, build_index
from vqd_scale.data.shards.near_duplicates import DuplicatesConfig, hash_excluded_images
from vqd_scale.data.shards.shard_index import ShardSet


class IndexConfig(Config):
    """Indexing of existing tars."""

    max_bad_fraction: float = Field(default=0.01, ge=0, le=1)
    """Largest fraction of unusable samples, and of damaged tars."""
    num_workers: int = Field(default=1, ge=1, le=1 << 10)
    """Number of processes."""


class Img2datasetConfig(IndexConfig):
    """Indexing of tars written by img2dataset."""

    filters: Filters = Filters()
    """Filters by metadata and caption."""
    near_duplicates: DuplicatesConfig | None = None
    """Images to exclude; their near-duplicates are skipped and reported. Set it if the dataset may contain
    evaluation images; it decodes every image."""


def index_img2dataset(config: Img2datasetConfig, tars: Location, folder: Location | None) -> ShardSet:
    """Index ``00000.tar``, ``00001.tar``, …; the index is written to ``folder`` or, if None, beside the tars.

    ``tars`` is as in `list_tars`. Metadata are read from the samples' ``json``; for samples without one, from
    ``00000.parquet``. A tar whose sample count differs from ``00000_stats.json`` is damaged.

    Raises:
        UserError: There is no tar; a filter names a column that the dataset lacks; too many samples or tars
            are unusable; ``folder`` contains another index or cannot be written.
    """
    excluded_images = hash_excluded_images(config.near_duplicates, config.num_workers)
    source = {
        "name": "img2dataset",
        "filters": config.filters.model_dump(mode="json"),
        "near_duplicates": None if excluded_images is None else excluded_images.fingerprint,
    }
    return build_index(
        tars,
        folder,
        SampleFilter(config.filters, excluded_images),
        meta={"content": "images", "source": source},
        max_bad_fraction=config.max_bad_fraction,
        workers=config.num_workers,
    )
