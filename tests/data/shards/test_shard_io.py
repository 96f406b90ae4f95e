import functools
import json
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from webdataset.compat import WebDataset
from webdataset.writer import TarWriter

from vqd_scale.core.errors import UserError
from vqd_scale.data.shards import shard_io as shards_module
from vqd_scale.data.shards.decode import BadSample, decode_array
from vqd_scale.data.shards.manifest import INDEX
from vqd_scale.data.shards.quarantine import DUPLICATES, QUARANTINE, Quarantine
from vqd_scale.data.shards.shard_index import ShardSet, SkippedSample, begin_set
from vqd_scale.data.shards.shard_io import (
    KEY,
    Sample,
    ShardReader,
    ShardRecipe,
    read_shard,
    shard_name,
    write_shard_set,
)
from vqd_scale.data.shards.shard_table import read_table

META = {"content": "tokens", "source": {"seed": 0, "of": ["a", "b"]}}


def samples_of(numbers: range) -> Iterator[Sample]:
    for number in numbers:
        tokens = np.arange(number, number + 5, dtype=np.uint16)
        yield {KEY: f"{number:04d}", "tokens.npy": tokens, "txt": f"number {number} é", "json": {"n": number}}


def recipes(counts: tuple[int, ...] = (3, 4, 2)) -> list[ShardRecipe]:
    ends = np.cumsum(counts).tolist()
    return [
        ShardRecipe(shard_name(shard), count, functools.partial(samples_of, range(end - count, end)))
        for shard, (count, end) in enumerate(zip(counts, ends, strict=True))
    ]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_round_trip(tmp_path: Path) -> None:
    written_set = write_shard_set(tmp_path, META, recipes(), "test")
    opened = ShardSet.open(tmp_path)
    assert opened == written_set
    assert opened.count == 9
    assert opened.meta == META
    assert [shard.count for shard in opened.shards] == [3, 4, 2]
    samples = [sample for shard in opened.shards for sample in read_shard(shard)]
    assert [sample[KEY] for sample in samples] == [f"{number:04d}" for number in range(9)]
    for number, sample in enumerate(samples):
        np.testing.assert_array_equal(decode_array(sample["tokens.npy"]), np.arange(number, number + 5))
        assert sample["txt"].decode() == f"number {number} é"
        assert json.loads(sample["json"]) == {"n": number}


def test_webdataset_and_tar_read_equal_samples(tmp_path: Path) -> None:
    opened = write_shard_set(tmp_path, META, recipes(), "test")
    paths = [str(shard.path) for shard in opened.shards]
    webdataset_samples = list(WebDataset(paths, shardshuffle=False))
    package_samples = [sample for shard in opened.shards for sample in read_shard(shard)]
    assert len(webdataset_samples) == len(package_samples) == 9
    for webdataset_sample, package_sample in zip(webdataset_samples, package_samples, strict=True):
        assert {name: webdataset_sample[name] for name in package_sample} == package_sample
    listed = subprocess.run(["tar", "-t", "-f", paths[0]], check=True, capture_output=True, text=True).stdout
    assert listed.split()[:3] == ["0000.json", "0000.tokens.npy", "0000.txt"]


def test_table_offsets_match_bytes(tmp_path: Path) -> None:
    (shard,) = write_shard_set(tmp_path, META, recipes((3,)), "test").shards
    table, reader, tar_bytes = read_table(shard), ShardReader(shard), shard.path.read_bytes()
    with tarfile.open(tmp_path / shard_name(0)) as archive:
        for member in archive:
            key, _, extension = member.name.partition(".")
            row, column = int(key), table.extensions.index(extension)
            assert table.offsets[row, column] == member.offset_data
            assert table.sizes[row, column] == member.size
            expected = tar_bytes[member.offset_data : member.offset_data + member.size]
            assert reader.read(row, extension) == expected
    with pytest.raises(BadSample, match="no 'jpg'"):
        reader.read(0, "jpg")


def test_equal_samples_give_equal_bytes(tmp_path: Path) -> None:
    write_shard_set(tmp_path / "one", META, recipes(), "test")
    write_shard_set(tmp_path / "two", META, recipes(), "test")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    with tarfile.open(tmp_path / "one" / shard_name(0)) as archive:
        assert {(m.mtime, m.uname, m.gname, m.uid, m.gid) for m in archive} == {(0, "", "", 0, 0)}


class Killed(BaseException):
    """A BaseException, as signals raise."""


def killed_in(shard: int) -> list[ShardRecipe]:
    def dying() -> Iterator[Sample]:
        yield from samples_of(range(1))
        raise Killed

    complete = recipes()
    return [*complete[:shard], ShardRecipe(complete[shard].name, 1, dying), *complete[shard + 1 :]]


def unused() -> Iterator[Sample]:
    raise AssertionError("a finished shard must not be made again")


@pytest.mark.parametrize("shard", [0, 1, 2])
def test_resume_after_kill(tmp_path: Path, shard: int) -> None:
    write_shard_set(tmp_path / "whole", META, recipes(), "test")
    with pytest.raises(Killed):
        write_shard_set(tmp_path / "cut", META, killed_in(shard), "test")
    with pytest.raises(UserError, match="half-made"):
        ShardSet.open(tmp_path / "cut")
    again = [
        ShardRecipe(recipe.name, recipe.count, unused if number < shard else recipe.samples)
        for number, recipe in enumerate(recipes())
    ]
    write_shard_set(tmp_path / "cut", META, again, "test")
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


@pytest.mark.parametrize("suffix", [".tar", ".npz"])
def test_resume_after_kill_between_tar_and_table(tmp_path: Path, suffix: str) -> None:
    write_shard_set(tmp_path, META, recipes(), "test")
    before = contents(tmp_path)
    (tmp_path / shard_name(1)).with_suffix(suffix).unlink()
    write_shard_set(tmp_path, META, recipes(), "test")
    assert contents(tmp_path) == before


def test_changed_finished_shard_is_rewritten(tmp_path: Path) -> None:
    write_shard_set(tmp_path, META, recipes(), "test")
    before = contents(tmp_path)
    damaged = bytearray(before[shard_name(1)])
    damaged[600] ^= 1
    (tmp_path / shard_name(1)).write_bytes(damaged)
    write_shard_set(tmp_path, META, recipes(), "test")
    assert contents(tmp_path) == before


def test_different_config_is_refused(tmp_path: Path) -> None:
    write_shard_set(tmp_path, META, recipes(), "test")
    before = contents(tmp_path)
    other_meta = {"content": "tokens", "source": {"seed": 1, "of": ["a", "b"]}}
    with pytest.raises(UserError, match=r"source\.seed was 0, now is 1"):
        write_shard_set(tmp_path, other_meta, recipes(), "test")
    assert contents(tmp_path) == before


def test_invalid_use_raises_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no set of shards"):
        ShardSet.open(tmp_path)
    (tmp_path / INDEX).write_text('{"something": "else"}')
    with pytest.raises(UserError, match="index of a set of shards cannot be read"):
        ShardSet.open(tmp_path)
    with pytest.raises(UserError, match="no sample"):
        write_shard_set(tmp_path / "empty", META, recipes((0,)), "test")
    opened = write_shard_set(tmp_path / "set", META, recipes(), "test")
    paths = sorted((tmp_path / "set").glob("*.tar"))
    paths[1].write_bytes(b"short")
    with pytest.raises(UserError, match=r"000001\.tar: changed or damaged since it was indexed"):
        ShardSet.open(tmp_path / "set")
    assert ShardSet.open(tmp_path / "set", look=False) == opened
    paths[0].with_suffix(".npz").write_bytes(b"PK\x03\x04 no table")
    with pytest.raises(UserError, match="not a readable table of a shard"):
        ShardReader(opened.shards[0])
    paths[2].write_bytes(paths[2].read_bytes()[:700])
    with pytest.raises(UserError, match=r"000002\.tar"):
        list(read_shard(opened.shards[2]))


def test_full_disk_raises_user_error_and_leaves_no_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class FullDisk(TarWriter):
        def write(self, obj: dict[str, object]) -> int:
            raise OSError(28, "No space left on device")

    begin_set(tmp_path, META)
    monkeypatch.setattr("webdataset.writer.TarWriter", FullDisk)
    with pytest.raises(UserError, match="disk is full"):
        shards_module.write_shard(tmp_path / shard_name(0), samples_of(range(3)))
    assert [path.name for path in tmp_path.iterdir()] == [INDEX]


def with_left_out(numbers: range) -> Iterator[Sample | SkippedSample]:
    for number, sample in zip(numbers, samples_of(numbers), strict=True):
        if number % 4 == 1:
            yield SkippedSample(f"source {number}", "is bad")
        elif number % 4 == 3:
            yield SkippedSample(f"source {number}", "is nearly another", is_bad=False)
        else:
            yield sample


def leaving_out() -> list[ShardRecipe]:
    return [
        ShardRecipe(shard_name(shard), 4, functools.partial(with_left_out, range(4 * shard, 4 * shard + 4)))
        for shard in range(3)
    ]


def test_skipped_samples_are_reported_and_not_counted(tmp_path: Path) -> None:
    opened = write_shard_set(tmp_path, META, leaving_out(), "test", max_bad_fraction=0.25)
    assert opened.counts == (2, 2, 2)
    assert json.loads((tmp_path / INDEX).read_text())["left_out"] == {
        "bad": 3,
        "near_duplicates": 3,
        "filtered": 0,
    }
    quarantine_lines = [json.loads(line) for line in (tmp_path / QUARANTINE).read_text().splitlines()]
    assert quarantine_lines == [
        {"shard": shard_name(shard), "key": f"source {4 * shard + 1}", "reason": "is bad"}
        for shard in range(3)
    ]
    duplicate_samples = [json.loads(line)["key"] for line in (tmp_path / DUPLICATES).read_text().splitlines()]
    assert duplicate_samples == ["source 3", "source 7", "source 11"]
    # Reports of finished shards come from their tables.
    (tmp_path / QUARANTINE).unlink()
    before = contents(tmp_path)
    write_shard_set(tmp_path, META, leaving_out(), "test", max_bad_fraction=0.25)
    after = contents(tmp_path)
    assert len(after.pop(QUARANTINE).splitlines()) == 3
    assert after == before


def test_too_many_bad_samples_stop_writing(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"more than max_bad_fraction=0\.2 of the 12 .* 'source 1' for one is bad"
    ):
        write_shard_set(tmp_path, META, leaving_out(), "test", max_bad_fraction=0.2)
    with pytest.raises(UserError, match="half-made"):
        ShardSet.open(tmp_path)


@pytest.mark.ranks
def test_processes_write_equal_shards(tmp_path: Path) -> None:
    one = write_shard_set(tmp_path / "one", META, leaving_out(), "test", max_bad_fraction=0.25)
    two = write_shard_set(tmp_path / "two", META, leaving_out(), "test", max_bad_fraction=0.25, workers=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert one.digests == two.digests


def captioned(numbers: range) -> Iterator[Sample]:
    for number in numbers:
        yield {KEY: str(number), "json": {"captions": ["one", "two"][: number % 3], "class": number}}


def test_table_columns(tmp_path: Path) -> None:
    recipe = ShardRecipe(shard_name(0), 4, functools.partial(captioned, range(4)))
    opened = write_shard_set(tmp_path, META, [recipe], "test")
    columns = read_table(opened.shards[0]).columns
    assert {name: column.tolist() for name, column in columns.items()} == {
        "captions": [1, 1, 2, 1],
        "class": [0, 1, 2, 3],
    }
    assert opened.captions == (5,)


def test_shards_as_a_sequence(tmp_path: Path) -> None:
    opened = write_shard_set(tmp_path, META, recipes(), "test")
    assert [shard.count for shard in opened.shards[1:]] == [4, 2]
    assert opened.shards[-1] == opened.shards[2]
    with pytest.raises(IndexError):
        opened.shards[3]


def test_quarantine_reports_once_and_survives_partial_line(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "bad.jsonl"
    Quarantine(path).extend([("000000.tar", "a", "is bad")])
    quarantine_text = path.read_text()
    path.write_text(quarantine_text + '{"shard": "0000')
    again = Quarantine(path)
    again.extend([("000000.tar", "a", "is bad")])
    assert path.read_text() == quarantine_text
    again.extend([("000000.tar", "b", "is bad")])
    assert [json.loads(line)["key"] for line in path.read_text().splitlines()] == ["a", "b"]
    assert len(again) == 2
