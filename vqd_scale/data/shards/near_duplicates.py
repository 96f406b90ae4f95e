"""Near-duplicate detection, to keep the images of an evaluation dataset out of training."""

from contextlib import suppress

import numpy as np

from vqd_scale.core.atomic_io import Location
from vqd_scale.core.config import Config
from vqd_scale.core.errors import UserError
from vqd_scale.core.progress import progress
from vqd_scale.data.process_pool import map_in_processes
from vqd_scale.data.shards.decode import BadSample, decode_image, image_extension
from vqd_scale.data.shards.perceptual_hash import ExcludedImages, margin_hashes
from vqd_scale.data.shards.shard_index import Shard, ShardSet
from vqd_scale.data.shards.shard_io import KEY, read_shard


class DuplicatesConfig(Config):
    """Evaluation images to exclude, including re-encoded, resized and slightly cropped copies."""

    evaluation_set: Location
    """Image shards to keep out of training, such as COCO's validation split."""
    max_hamming_distance: int = 8
    """Largest number of the 64 hash bits in which two copies differ. Unrelated images differ in 32 bits on
    average; a larger value gives more false positives."""


def hash_excluded_images(config: DuplicatesConfig | None, workers: int) -> ExcludedImages | None:
    """Hash the images of an evaluation dataset; unreadable images are skipped. None without a dataset.

    Raises:
        UserError: The dataset does not exist or contains no readable image.
    """
    if config is None:
        return None
    shards = ShardSet.open(config.evaluation_set).shards
    keys: list[str] = []
    hashes: list[np.uint64] = []
    hashed = map_in_processes(_hashes_of, shards, workers)
    for shard_keys, shard_hashes in progress(hashed, "hash evaluation set", len(shards), unit="shard"):
        keys += shard_keys
        hashes += shard_hashes
    if not keys:
        raise UserError(f"{config.evaluation_set}: holds no readable image.")
    return ExcludedImages(np.array(hashes, dtype=np.uint64), tuple(keys), config.max_hamming_distance)


def _hashes_of(shard: Shard) -> tuple[list[str], list[np.uint64]]:
    keys: list[str] = []
    hashes: list[np.uint64] = []
    for sample in read_shard(shard):
        with suppress(BadSample):
            hashes += margin_hashes(decode_image(sample[image_extension(sample)]))
            keys.append(sample[KEY])
    return keys, hashes
