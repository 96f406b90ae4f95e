"""What img2dataset downloaded, as it is: nothing is written but an index of what is wanted of it."""

from pydantic import Field

from vqd_scale.core.atomic_io import Location
from vqd_scale.core.config import Config
from vqd_scale.data.shards.filters import Filters
from vqd_scale.data.shards.index_builder import IndexConfig, SampleFilter, build_index
from vqd_scale.data.shards.near_duplicates import DuplicatesConfig, known_pictures
from vqd_scale.data.shards.shard_index import ShardSet


class Img2datasetConfig(Config):
    """What is wanted of a folder that img2dataset filled.

    Attributes:
        filters: Which samples, by their metadata and captions.
        near_duplicates: Pictures that must not occur; those like them are left out and reported, for which
            every picture is decoded.
        max_bad_fraction: Which share of the samples, and of the tars, may be unusable.
        num_workers: Processes that work at the same time.
    """

    filters: Filters = Filters()
    near_duplicates: DuplicatesConfig | None = None
    max_bad_fraction: float = Field(default=0.01, ge=0, le=1)
    num_workers: int = Field(default=1, ge=1)


def index_img2dataset(config: Img2datasetConfig, tars: Location, folder: Location) -> ShardSet:
    """Index ``00000.tar`` and so on in one folder into another, which may be the same.

    Metadata are read from the samples' ``json``, and from ``00000.parquet`` where they have none; a tar with
    fewer samples than ``00000_stats.json`` counts is a damaged one.

    Raises:
        UserError: There is no tar; a filter is about a column that the set does not have; too much is
            unusable; ``folder`` holds another index or cannot be written.
    """
    known = None
    if config.near_duplicates is not None:
        known = known_pictures(config.near_duplicates, config.num_workers)
    meta = {
        "content": "images",
        "source": {
            "name": "img2dataset",
            "filters": config.filters.model_dump(mode="json"),
            "near_duplicates": None if known is None else known.fingerprint,
        },
    }
    how = IndexConfig(SampleFilter(config.filters, known), config.max_bad_fraction, config.num_workers)
    return build_index(tars, folder, how, meta)
