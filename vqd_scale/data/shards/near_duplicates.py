"""Near-duplicate detection, to keep the images of an evaluation dataset out of training."""

import numpy as np

from vqd_scale.core.atomic_io import Location
from vqd_scale.core.config import Config
from vqd_scale.core.errors import UserError
from vqd_scale.core.progress import progress
from vqd_scale.data.process_pool import each
from vqd_scale.data.shards.decode import IMAGE_EXTENSIONS, BadSample, decode_image
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


def hash_excluded_images(config: DuplicatesConfig, workers: int) -> ExcludedImages:
    """Hash the images of an evaluation dataset; unreadable images are skipped.

    Raises:
        UserError: The dataset does not exist or contains no readable image.
    """
    shards = ShardSet.open(config.evaluation_set).shards
    keys: list[str] = []
    hashes: list[np.uint64] = []
    for shard_keys, shard_hashes in progress(
        each(_hashes_of, shards, workers), "hash evaluation set", len(shards), unit="shard"
    ):
        keys += shard_keys
        hashes += shard_hashes
    if not keys:
        raise UserError(f"{config.evaluation_set}: holds no readable picture.")
    return ExcludedImages(np.array(hashes, dtype=np.uint64), tuple(keys), config.max_hamming_distance)


def _hashes_of(shard: Shard) -> tuple[list[str], list[np.uint64]]:
    keys: list[str] = []
    hashes: list[np.uint64] = []
    for sample in read_shard(shard):
        extension = next((name for name in IMAGE_EXTENSIONS if name in sample), None)
        if extension is None:
            continue
        try:
            pixels = decode_image(sample[extension])
        except BadSample:
            continue
        keys.append(sample[KEY])
        hashes += margin_hashes(pixels)
    return keys, hashes
