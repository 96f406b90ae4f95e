import functools
import json
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from webdataset.compat import WebDataset
from webdataset.writer import TarWriter

from vqd_scale.core.errors import UserError
from vqd_scale.data import shards as shards_module
from vqd_scale.data.decode import BadSample, decode_array
from vqd_scale.data.index import INDEX, ShardSet, begin_set, build_index, read_table
from vqd_scale.data.quarantine import Quarantine
from vqd_scale.data.shards import (
    KEY,
    Sample,
    ShardReader,
    ShardRecipe,
    read_shard,
    shard_name,
    write_shard,
    write_shard_set,
)

META = {"content": "tokens", "source": {"seed": 0, "of": ["a", "b"]}}


def made(numbers: range) -> Iterator[Sample]:
    for number in numbers:
        tokens = np.arange(number, number + 5, dtype=np.uint16)
        yield {KEY: f"{number:04d}", "tokens.npy": tokens, "txt": f"number {number} é", "json": {"n": number}}


def recipes(counts: tuple[int, ...] = (3, 4, 2)) -> list[ShardRecipe]:
    ends = np.cumsum(counts).tolist()
    return [
        ShardRecipe(shard_name(shard), count, functools.partial(made, range(end - count, end)))
        for shard, (count, end) in enumerate(zip(counts, ends, strict=True))
    ]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_round_trip(tmp_path: Path) -> None:
    written = write_shard_set(tmp_path, META, recipes(), "test")
    opened = ShardSet.open(tmp_path)
    assert opened == written
    assert opened.count == 9
    assert opened.meta == META
    assert [shard.count for shard in opened.shards] == [3, 4, 2]
    samples = [sample for shard in opened.shards for sample in read_shard(shard)]
    assert [sample[KEY] for sample in samples] == [f"{number:04d}" for number in range(9)]
    for number, sample in enumerate(samples):
        np.testing.assert_array_equal(decode_array(sample["tokens.npy"]), np.arange(number, number + 5))
        assert sample["txt"].decode() == f"number {number} é"
        assert json.loads(sample["json"]) == {"n": number}


def test_webdataset_and_tar_read_the_same(tmp_path: Path) -> None:
    opened = write_shard_set(tmp_path, META, recipes(), "test")
    paths = [str(shard.path) for shard in opened.shards]
    theirs = list(WebDataset(paths, shardshuffle=False))
    ours = [sample for shard in opened.shards for sample in read_shard(shard)]
    assert len(theirs) == len(ours) == 9
    for their, our in zip(theirs, ours, strict=True):
        assert {name: their[name] for name in our} == our
    listed = subprocess.run(["tar", "-t", "-f", paths[0]], check=True, capture_output=True, text=True).stdout
    assert listed.split()[:3] == ["0000.json", "0000.tokens.npy", "0000.txt"]


def test_table_points_at_the_bytes(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "one.tar", made(range(3)))
    table, reader, whole = read_table(shard), ShardReader(shard), shard.path.read_bytes()
    with tarfile.open(shard.path) as archive:
        for member in archive:
            key, _, extension = member.name.partition(".")
            row, column = int(key), table.extensions.index(extension)
            assert table.offsets[row, column] == member.offset_data
            assert table.sizes[row, column] == member.size
            expected = whole[member.offset_data : member.offset_data + member.size]
            assert reader.read(row, extension) == expected
    with pytest.raises(BadSample, match="no 'jpg'"):
        reader.read(0, "jpg")


def test_same_samples_same_bytes(tmp_path: Path) -> None:
    write_shard_set(tmp_path / "one", META, recipes(), "test")
    write_shard_set(tmp_path / "two", META, recipes(), "test")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    with tarfile.open(tmp_path / "one" / shard_name(0)) as archive:
        assert {(m.mtime, m.uname, m.gname, m.uid, m.gid) for m in archive} == {(0, "", "", 0, 0)}


class Killed(BaseException):
    """Not an Exception, as a signal is not."""


def killed_in(shard: int) -> list[ShardRecipe]:
    def dying() -> Iterator[Sample]:
        yield from made(range(1))
        raise Killed

    complete = recipes()
    return [*complete[:shard], ShardRecipe(complete[shard].name, 1, dying), *complete[shard + 1 :]]


def unused() -> Iterator[Sample]:
    raise AssertionError("a finished shard must not be made again")


@pytest.mark.parametrize("shard", [0, 1, 2])
def test_goes_on_after_a_kill(tmp_path: Path, shard: int) -> None:
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
def test_goes_on_after_a_kill_between_tar_and_table(tmp_path: Path, suffix: str) -> None:
    write_shard_set(tmp_path, META, recipes(), "test")
    before = contents(tmp_path)
    (tmp_path / shard_name(1)).with_suffix(suffix).unlink()
    write_shard_set(tmp_path, META, recipes(), "test")
    assert contents(tmp_path) == before


def test_a_finished_shard_that_changed_is_made_again(tmp_path: Path) -> None:
    write_shard_set(tmp_path, META, recipes(), "test")
    before = contents(tmp_path)
    damaged = bytearray(before[shard_name(1)])
    damaged[600] ^= 1
    (tmp_path / shard_name(1)).write_bytes(damaged)
    write_shard_set(tmp_path, META, recipes(), "test")
    assert contents(tmp_path) == before


def test_another_config_is_refused(tmp_path: Path) -> None:
    write_shard_set(tmp_path, META, recipes(), "test")
    before = contents(tmp_path)
    other = {"content": "tokens", "source": {"seed": 1, "of": ["a", "b"]}}
    with pytest.raises(UserError, match=r"source\.seed was 0, now is 1"):
        write_shard_set(tmp_path, other, recipes(), "test")
    assert contents(tmp_path) == before


def other_peoples_tars(folder: Path) -> None:
    """Two shards as any webdataset user writes them, with a sample that lacks a member."""
    folder.mkdir()
    for shard in range(2):
        with TarWriter(str(folder / f"{shard:05d}.tar")) as writer:
            for number in range(4):
                members = {"JPG": b"picture", "txt": "words"} if number != 2 else {"txt": "alone"}
                writer.write({KEY: f"some folder/{shard}{number}", **members})


def test_index_of_other_peoples_tars(tmp_path: Path) -> None:
    other_peoples_tars(tmp_path / "set")
    before = (tmp_path / "set" / "00000.tar").read_bytes()
    opened = build_index(tmp_path / "set")
    assert opened.count == 8
    samples = list(read_shard(opened.shards[1]))
    assert samples[0] == {KEY: "some folder/10", "jpg": b"picture", "txt": b"words"}
    assert samples[2] == {KEY: "some folder/12", "txt": b"alone"}
    assert build_index(tmp_path / "set") == opened
    assert (tmp_path / "set" / "00000.tar").read_bytes() == before


Damage = Callable[[bytes], bytes]
DAMAGES: dict[str, Damage] = {
    "at a member's boundary": lambda whole: whole[:2048],
    "in a header": lambda whole: whole[:2148],
    "in a member": lambda whole: whole[: 2048 + 515],
    "by garbage for a header": lambda whole: whole[:2048] + b"\x07" * 512 + whole[2560:],
    "to nothing": lambda _: b"",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_tar_is_named_and_never_a_shorter_one(tmp_path: Path, damage: str) -> None:
    other_peoples_tars(tmp_path / "set")
    path = tmp_path / "set" / "00001.tar"
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    with pytest.raises(UserError, match=r"00001\.tar"):
        build_index(tmp_path / "set")
    with pytest.raises(UserError):
        ShardSet.open(tmp_path / "set")


def test_wrong_uses(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no set of shards"):
        ShardSet.open(tmp_path)
    with pytest.raises(UserError, match=r"no \.tar"):
        build_index(tmp_path)
    (tmp_path / INDEX).write_text('{"something": "else"}')
    with pytest.raises(UserError, match="not the index"):
        ShardSet.open(tmp_path)
    with pytest.raises(UserError, match="no sample"):
        write_shard_set(tmp_path / "empty", META, recipes((0,)), "test")
    opened = write_shard_set(tmp_path / "set", META, recipes(), "test")
    opened.shards[1].path.write_bytes(b"short")
    with pytest.raises(UserError, match=r"000001\.tar: missing or changed"):
        ShardSet.open(tmp_path / "set")
    opened.shards[0].path.with_suffix(".npz").write_bytes(b"PK\x03\x04 no table")
    with pytest.raises(UserError, match="table cannot be read"):
        ShardReader(opened.shards[0])
    opened.shards[2].path.write_bytes(opened.shards[2].path.read_bytes()[:700])
    with pytest.raises(UserError, match="shorter"):
        list(read_shard(opened.shards[2]))


def test_a_full_disk_is_one_sentence_and_leaves_no_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class FullDisk(TarWriter):
        def write(self, obj: dict[str, object]) -> int:
            raise OSError(28, "No space left on device")

    begin_set(tmp_path, META)
    monkeypatch.setattr("webdataset.writer.TarWriter", FullDisk)
    with pytest.raises(UserError, match="disk is full"):
        shards_module.write_shard(tmp_path / shard_name(0), made(range(3)))
    assert [path.name for path in tmp_path.iterdir()] == [INDEX]


def test_quarantine_reports_once_and_survives_half_a_line(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "bad.jsonl"
    Quarantine(path).add("000000.tar", "a", "is bad")
    whole = path.read_text()
    path.write_text(whole + '{"shard": "0000')
    again = Quarantine(path)
    again.add("000000.tar", "a", "is bad")
    assert path.read_text() == whole
    again.add("000000.tar", "b", "is bad")
    assert [json.loads(line)["key"] for line in path.read_text().splitlines()] == ["a", "b"]
    assert len(again) == 2
