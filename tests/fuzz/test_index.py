"""Fuzzing of a dataset's index, of its tables and of its reports."""

from pathlib import Path

import numpy as np
import pytest

from tests.data.shards.test_stale_index import captioned_tars
from tests.fuzz.harness import SECONDS, fuzz
from vqd_scale.data.shards.index_builder import build_index
from vqd_scale.data.shards.manifest import INDEX
from vqd_scale.data.shards.quarantine import Quarantine
from vqd_scale.data.shards.shard_index import ShardSet
from vqd_scale.data.shards.shard_io import read_shard
from vqd_scale.data.shards.shard_table import read_indexed


@pytest.mark.parametrize("seconds", SECONDS)
def test_index_is_the_one_that_was_made_or_refused(seconds: float, tmp_path: Path) -> None:
    folder = captioned_tars(tmp_path / "set")
    opened = build_index(folder)
    path = folder / INDEX

    def target(data: bytes) -> None:
        path.write_bytes(data)
        assert ShardSet.open(folder) == opened

    files = [path.read_bytes()]
    assert fuzz(target, files, seconds, tmp_path / "failure") > len(files)


@pytest.mark.parametrize("seconds", SECONDS)
def test_table_is_read_or_refused(seconds: float, tmp_path: Path) -> None:
    folder = captioned_tars(tmp_path / "set")
    opened = build_index(folder)
    table, foreign = folder / "0.npz", tmp_path / "foreign.npz"
    np.savez_compressed(foreign, keys=np.zeros(1 << 24, np.uint8))
    samples = list(read_shard(opened.shards[0]))

    def target(data: bytes) -> None:
        table.write_bytes(data)
        # Without the digest of the index, as when an index is made again.
        indexed = read_indexed("0.tar", table)
        assert list(read_shard(indexed.shard(folder, folder))) == samples

    files = [table.read_bytes(), foreign.read_bytes()]
    assert fuzz(target, files, seconds, tmp_path / "failure") > len(files)


@pytest.mark.parametrize("seconds", SECONDS)
def test_report_of_bad_samples_is_continued(seconds: float, tmp_path: Path) -> None:
    path = tmp_path / "report" / "bad.jsonl"
    Quarantine(path).extend([("0.tar", f"{number}", "is bad") for number in range(9)])

    def target(data: bytes) -> None:
        for file in path.parent.iterdir():
            file.unlink()
        path.write_bytes(data)
        Quarantine(path).extend([("0.tar", "new", "is bad")])
        size = path.stat().st_size
        Quarantine(path).extend([("0.tar", "new", "is bad")])
        assert path.stat().st_size == size

    assert fuzz(target, [path.read_bytes(), b""], seconds, tmp_path / "failure") > 2
