from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vqd_scale.core.atomic_io import Location
from vqd_scale.core.s3 import PIECE_BYTES, S3Path
from vqd_scale.data.config import CacheConfig, RangedReadConfig
from vqd_scale.data.shards.ranged_reader import TURNS_AHEAD, RangedReader
from vqd_scale.data.shards.shard_index import Shard, ShardSet

MEGABYTE = 1 << 20


def set_at(tars: Location, counts: tuple[int, ...], mean: int) -> ShardSet:
    names = tuple(f"{number:06d}.tar" for number in range(len(counts)))
    sizes = tuple(count * mean for count in counts)
    meta: Mapping[str, str] = {}
    empty = ("",) * len(counts)
    return ShardSet(tars, tars, names, counts, sizes, empty, counts, empty, empty, meta)


@given(
    mean=st.integers(1, 20_000_000),
    lanes=st.integers(1, 2048),
    window=st.integers(1, 5000),
    megabytes=st.integers(1, 4096),
)
def test_read_ahead_fits_memory_limit(mean: int, lanes: int, window: int, megabytes: int) -> None:
    shards = set_at(S3Path("bucket", "set"), (1000, 10, 1), mean)
    config = RangedReadConfig(buffer_megabytes=megabytes)
    reader = RangedReader.in_lanes([shards], lanes, window, config)
    assert 1 <= reader.turns <= (window if reader.samples > 1 else TURNS_AHEAD)
    assert 1 <= reader.samples <= window
    if reader.samples > 1:
        # A lane's window, the next one, and the ends of the pieces that extend beyond them.
        assert lanes * (2 * window + 2 * reader.samples) * mean <= megabytes * MEGABYTE
        assert reader.samples * mean <= PIECE_BYTES
    elif reader.turns > 1:
        assert lanes * (reader.turns + 1) * mean <= megabytes * MEGABYTE


def test_piece_size_follows_lane_count() -> None:
    tokens = set_at(S3Path("bucket", "set"), (10_000,) * 4, 6000)
    image_shards = set_at(S3Path("bucket", "set"), (10_000,) * 4, 300_000)
    config = RangedReadConfig()
    assert RangedReader.in_lanes([tokens], 16, 256, config).samples == 256
    assert RangedReader.in_lanes([image_shards], 2, 256, config).samples == PIECE_BYTES // 300_000
    assert RangedReader.in_lanes([image_shards], 128, 256, config).samples == 1


def test_local_files_are_not_read_ahead(tmp_path: Path) -> None:
    shards = set_at(tmp_path, (1000,), 6000)
    assert RangedReader.in_lanes([shards], 16, 256, RangedReadConfig()).turns == 0


def test_cached_shards_are_requested_one_window_ahead(tmp_path: Path) -> None:
    shards = set_at(S3Path("bucket", "set"), (1000,), 6000)
    config = RangedReadConfig(cache=CacheConfig(folder=tmp_path, max_gigabytes=1))
    assert RangedReader.in_lanes([shards], 16, 256, config).turns == 256


@pytest.mark.parametrize("size", [0, 1, PIECE_BYTES, 100 * PIECE_BYTES])
def test_sequential_shard_is_read_in_large_pieces(size: int) -> None:
    path = S3Path("bucket", "set") / "000000.tar"
    reader = RangedReader.in_order(Shard(path, path.with_suffix(".npz"), 1000, size, "", 1000, "", ""))
    assert reader.samples >= 1
    assert reader.samples * size <= 1000 * PIECE_BYTES or reader.samples == 1
