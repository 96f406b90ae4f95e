import functools
import io
import json
import os
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from webdataset.tariterators import group_by_keys, tar_file_expander
from webdataset.writer import TarWriter

from vqd_scale.core import atomic_io as store
from vqd_scale.core.errors import UserError
from vqd_scale.core.s3 import S3Path
from vqd_scale.data.shards import tar_scanner as tar_module
from vqd_scale.data.shards.filters import Bounds, Filters
from vqd_scale.data.shards.index_builder import SampleFilter, build_index, index_tar
from vqd_scale.data.shards.manifest import INDEX
from vqd_scale.data.shards.quarantine import QUARANTINE
from vqd_scale.data.shards.shard_index import ShardSet
from vqd_scale.data.shards.shard_io import KEY, read_shard
from vqd_scale.data.shards.shard_table import read_table
from vqd_scale.data.shards.tar_scanner import PROBED, TarSample, TarScan


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def third_party_tars(folder: Path) -> None:
    """Write two webdataset shards, with a sample that lacks a member."""
    folder.mkdir()
    for shard in range(2):
        with TarWriter(str(folder / f"{shard:05d}.tar")) as writer:
            for number in range(4):
                members = {"JPG": b"picture", "txt": "words"} if number != 2 else {"txt": "alone"}
                writer.write({KEY: f"some folder/{shard}{number}", **members})


def quarantine(folder: Path) -> list[tuple[str, str, str]]:
    lines = (folder / QUARANTINE).read_text().splitlines()
    return [(line["shard"], line["key"], line["reason"]) for line in map(json.loads, lines)]


def test_index_of_third_party_tars(tmp_path: Path) -> None:
    third_party_tars(tmp_path / "set")
    before = (tmp_path / "set" / "00000.tar").read_bytes()
    opened = build_index(tmp_path / "set")
    assert opened.count == 8
    samples = list(read_shard(opened.shards[1]))
    assert samples[0] == {KEY: "some folder/10", "jpg": b"picture", "txt": b"words"}
    assert samples[2] == {KEY: "some folder/12", "txt": b"alone"}
    assert build_index(tmp_path / "set") == opened
    assert (tmp_path / "set" / "00000.tar").read_bytes() == before


def test_read_only_folder(tmp_path: Path) -> None:
    third_party_tars(tmp_path / "set")
    before = sorted((tmp_path / "set").iterdir())
    opened = build_index(tmp_path / "set", tmp_path / "index")
    assert sorted((tmp_path / "set").iterdir()) == before
    assert ShardSet.open(tmp_path / "index") == opened
    assert sum(len(list(read_shard(shard))) for shard in opened.shards) == 8
    third_party_tars(tmp_path / "other")
    with pytest.raises(UserError, match=r"tars was .*set.*, now is .*other"):
        build_index(tmp_path / "other", tmp_path / "index")


@pytest.mark.ranks
def test_indexing_with_processes_gives_equal_index(tmp_path: Path) -> None:
    third_party_tars(tmp_path / "set")
    one = build_index(tmp_path / "set", tmp_path / "one")
    two = build_index(tmp_path / "set", tmp_path / "two", workers=2)
    assert one.digests == two.digests
    for name in (INDEX, "00000.npz", "00001.npz"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_indexed_shards_are_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    third_party_tars(tmp_path / "set")
    opened = build_index(tmp_path / "set")
    (tmp_path / "set" / "00001.npz").unlink()
    scanned_tars: list[str] = []

    class RecordingScan(TarScan):
        def __init__(self, path: Path, extensions: frozenset[str]) -> None:
            scanned_tars.append(path.name)
            super().__init__(path, extensions)

    monkeypatch.setattr("vqd_scale.data.shards.index_builder.TarScan", RecordingScan)
    assert build_index(tmp_path / "set") == opened
    assert scanned_tars == ["00001.tar"]
    os.utime(tmp_path / "set" / "00000.tar", ns=(1, 1))
    build_index(tmp_path / "set")
    assert scanned_tars == ["00001.tar", "00000.tar"]


names = st.sampled_from(
    ["a.jpg", "a.txt", "a.JSON", "b.jpg", "d/b.txt", "d/c.tar.gz", "e", ".hidden", "f.x.y"]
)


@given(
    st.lists(st.tuples(names, st.binary(max_size=700)), max_size=12, unique_by=lambda pair: pair[0].lower())
)
def test_samples_equal_webdataset(tmp_path_factory: pytest.TempPathFactory, members: list[Any]) -> None:
    """Compare with webdataset's own reader on the same tar."""
    path = write_tar(tmp_path_factory.mktemp("tar") / "one.tar", members)
    with path.open("rb") as file:
        webdataset_samples = list(group_by_keys(tar_file_expander([{"url": "", "stream": file}])))
    scan = TarScan(path, frozenset({"jpg"}))
    scanned_samples = [sample for sample in scan.samples() if not sample.fault]
    tar_bytes = path.read_bytes()
    # webdataset joins only adjacent members too, but accepts a repeated key.
    known_keys: set[str] = set()
    expected: list[dict[str, Any]] = []
    for sample in webdataset_samples:
        if sample[KEY] not in known_keys:
            known_keys.add(sample[KEY])
            expected.append({name: value for name, value in sample.items() if name[:2] != "__"})
    contents = [
        {
            extension: tar_bytes[offset : offset + size]
            for extension, (offset, size, _) in sample.members.items()
        }
        for sample in scanned_samples
    ]
    assert contents == expected
    assert all(
        sample.contents == {k: v for k, v in content.items() if k == "jpg"}
        for sample, content in zip(scanned_samples, contents, strict=True)
    )
    assert scan.damage == ""
    assert scan.sha256 == store.sha256_of(path)
    assert scan.size == len(tar_bytes)


Damage = Callable[[bytes], bytes]
DAMAGES: dict[str, Damage] = {
    "at a member's boundary": lambda tar_bytes: tar_bytes[:8192],
    "in a header": lambda tar_bytes: tar_bytes[:8292],
    "in a member": lambda tar_bytes: tar_bytes[: 8192 + 515],
    "by garbage for a header": lambda tar_bytes: tar_bytes[:8192] + b"\x07" * 512 + tar_bytes[8704:],
    "to nothing": lambda _: b"",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_tar_is_named(tmp_path: Path, damage: str) -> None:
    third_party_tars(tmp_path / "set")
    path = tmp_path / "set" / "00001.tar"
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    with pytest.raises(UserError, match=r"00001\.tar"):
        build_index(tmp_path / "set")
    with pytest.raises(UserError):
        ShardSet.open(tmp_path / "set")
    # If tolerated, its complete samples are used, and the tar is reported.
    opened = build_index(tmp_path / "set", max_bad_fraction=1.0)
    assert opened.counts == (4, {"to nothing": 0, "by garbage for a header": 2}.get(damage, 1))
    *bad_samples, (shard, key, reason) = quarantine(tmp_path / "set")
    assert (shard, key) == ("00001.tar", "")
    assert "the tar" in reason or "not a readable tar" in reason
    assert bool(bad_samples) == (damage != "to nothing")


def test_tar_shorter_than_counted_is_refused(tmp_path: Path) -> None:
    third_party_tars(tmp_path / "set")
    for shard, count in enumerate((4, 5)):
        (tmp_path / "set" / f"{shard:05d}_stats.json").write_text(
            json.dumps({"count": 9, "successes": count})
        )
    with pytest.raises(UserError, match=r"00001\.tar"):
        build_index(tmp_path / "set")
    assert build_index(tmp_path / "set", max_bad_fraction=1.0).count == 8
    assert quarantine(tmp_path / "set") == [
        (
            "00001.tar",
            "",
            "lacks some of the 5 samples in its _stats.json; 4 samples were found, up to 1 are lost",
        )
    ]


def test_unusable_samples_are_skipped_with_reasons(tmp_path: Path) -> None:
    write_tar(
        tmp_path / "set" / "0.tar",
        [
            ("a.jpg", b"1"),
            ("a.json", b"{}"),
            ("b.jpg", b"2"),
            ("b.jpg", b"3"),
            ("../../up.jpg", b"4"),
            ("/root.jpg", b"5"),
            ("c.json", b"{garbage"),
            ("a.txt", b"again"),
            ("d.jpg", b""),
        ],
    )
    opened = build_index(tmp_path / "set", max_bad_fraction=1.0)
    assert {(key, reason) for _, key, reason in quarantine(tmp_path / "set")} == {
        ("b", "has two members 'jpg'"),
        ("../../up", "has a name that leads out of its folder"),
        ("/root", "has a name that leads out of its folder"),
        ("c", "has a member that is not JSON"),
        ("a", "has the key of an earlier sample"),
    }
    assert [sample[KEY] for sample in read_shard(opened.shards[0])] == ["a", "d"]


def metadata_tar(path: Path) -> Path:
    def members() -> Iterator[tuple[str, bytes]]:
        for number in range(10):
            similarity = None if number == 9 else number / 10
            metadata = {
                "similarity": similarity,
                "width": 100 + number,
                "height": 200,
                "NSFW": "NY"[number % 2],
            }
            yield f"{number}.txt", f"Caption number {number} of ten".encode()
            yield f"{number}.json", json.dumps(metadata).encode()

    return write_tar(path, list(members()))


FILTERS: list[tuple[Filters, list[int]]] = [
    (Filters(columns={"similarity": Bounds(min=0.3)}), [3, 4, 5, 6, 7, 8]),
    (Filters(columns={"similarity": Bounds(max=0.3), "width": Bounds(min=101)}), [1, 2, 3]),
    (Filters(labels={"NSFW": ("Y", "MAYBE")}), [1, 3, 5, 7, 9]),
    (Filters(aspect=Bounds(max=1.9)), [6, 7, 8, 9]),
    (Filters(words=Bounds(max=4)), []),
    (Filters(words=Bounds(min=5, max=5)), list(range(10))),
    (Filters(any_of=("NUMBER 3", "4 of")), [3, 4]),
    (Filters(any_of=("umber 3",)), []),
    (Filters(none_of=("3", "4", "caption number 5")), [0, 1, 2, 6, 7, 8, 9]),
]


@pytest.mark.parametrize(("filters", "numbers"), FILTERS)
def test_filters(tmp_path: Path, filters: Filters, numbers: list[int]) -> None:
    shard = index_tar(metadata_tar(tmp_path / "0.tar"), tmp_path / "0.npz", SampleFilter(filters))
    assert shard.count == len(numbers)
    assert shard.filtered == 10 - len(numbers)
    with np.load(tmp_path / "0.npz") as arrays:
        assert arrays["keys"].tolist() == [str(number).encode() for number in numbers]


def test_filter_on_missing_column_is_refused(tmp_path: Path) -> None:
    metadata_tar(tmp_path / "set" / "0.tar")
    for filters in (Filters(columns={"punsafe": Bounds(max=0.5)}), Filters(labels={"punsafe": ("no",)})):
        with pytest.raises(UserError, match="no column 'punsafe'; it has NSFW, height, similarity, width"):
            build_index(tmp_path / "set", tmp_path / "index", SampleFilter(filters))
    with pytest.raises(UserError, match=r"columns\.NSFW: holds 'N', no number"):
        build_index(
            tmp_path / "set",
            tmp_path / "index",
            SampleFilter(Filters(columns={"NSFW": Bounds()})),
        )
    write_tar(tmp_path / "bare" / "0.tar", [("0.txt", b"words")])
    with pytest.raises(UserError, match=r"no 'json' and .*0\.parquet is missing"):
        build_index(tmp_path / "bare", sample_filter=SampleFilter(FILTERS[0][0]))


def test_parquet_without_pyarrow_raises_user_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    write_tar(tmp_path / "set" / "0.tar", [("0.txt", b"words")])
    (tmp_path / "set" / "0.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"needs pyarrow; install it with pip install 'vqd-scale\[parquet\]'"):
        build_index(tmp_path / "set", sample_filter=SampleFilter(FILTERS[0][0]))


def test_metadata_from_parquet(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    write_tar(tmp_path / "set" / "0.tar", [(f"{number}.txt", b"words") for number in range(4)])
    table = {"key": ["0", "1", "2", "9"], "similarity": [0.1, 0.4, None, 0.9]}
    parquet.write_table(arrow.table(table), tmp_path / "set" / "0.parquet")
    opened = build_index(tmp_path / "set", sample_filter=SampleFilter(FILTERS[0][0]), max_bad_fraction=1.0)
    assert [sample[KEY] for sample in read_shard(opened.shards[0])] == ["1"]
    assert quarantine(tmp_path / "set") == [
        ("0.tar", "3", "has no 'json' and no line in its tar's parquet file")
    ]
    (tmp_path / "set" / "0.parquet").write_bytes(b"garbage")
    (tmp_path / "set" / "0.npz").unlink()
    with pytest.raises(UserError, match="not a readable parquet file"):
        build_index(tmp_path / "set", sample_filter=SampleFilter(FILTERS[0][0]))


def positions(sample: TarSample) -> dict[str, tuple[int, int]]:
    return {extension: position[:2] for extension, position in sample.members.items()}


class FakeObject:
    """Local file with the interface of an S3 object, which records the requested ranges."""

    requested_ranges: ClassVar[list[tuple[int, int]]] = []
    path = Path()

    def __init__(self, path: S3Path, size: int | None = None) -> None:
        self.size = self.path.stat().st_size

    def read(self, begin: int, end: int) -> bytes:
        self.requested_ranges.append((begin, end))
        return self.path.read_bytes()[begin:end]

    @classmethod
    def in_order(cls, path: S3Path) -> Iterator[bytes]:
        file_bytes = cls.path.read_bytes()
        for begin in range(0, len(file_bytes), 5000):
            yield file_bytes[begin : begin + 5000]


@pytest.fixture
def remote_files(monkeypatch: pytest.MonkeyPatch) -> type[FakeObject]:
    FakeObject.requested_ranges = []
    monkeypatch.setattr(tar_module, "S3Object", FakeObject)
    monkeypatch.setattr(tar_module, "read_in_order", FakeObject.in_order)
    monkeypatch.setattr(tar_module, "LARGE_MEMBER", 3000)
    return FakeObject


@pytest.mark.parametrize("size", [500, 20_000])
def test_remote_tar_with_large_members_fetches_headers_only(
    tmp_path: Path, remote_files: type[FakeObject], size: int
) -> None:
    members = [(f"{n}.{end}", bytes(size)) for n in range(20) for end in ("jpg", "png")]
    members += [("last.json", b"{}")]
    remote_files.path = write_tar(tmp_path / "0.tar", members)
    near, far = TarScan(remote_files.path), TarScan(S3Path.parse("s3://bucket/0.tar"), frozenset({"json"}))
    expected = [positions(sample) for sample in near.samples()]
    distant_samples = list(far.samples())
    assert [positions(sample) for sample in distant_samples] == expected
    assert distant_samples[-1].contents == {"json": b"{}"}
    assert far.damage == ""
    if size == 500:
        assert far.sha256 == near.sha256
        assert remote_files.requested_ranges == []
    else:
        assert far.sha256 == ""
        assert len(remote_files.requested_ranges) <= len(members) - PROBED + 3
        assert sum(end - begin for begin, end in remote_files.requested_ranges) < 2 * 1024 * len(members)


def test_truncated_large_tar_is_detected_by_headers(tmp_path: Path, remote_files: type[FakeObject]) -> None:
    remote_files.path = write_tar(tmp_path / "0.tar", [(f"{n}.jpg", bytes(20_000)) for n in range(20)])
    remote_files.path.write_bytes(remote_files.path.read_bytes()[:300_000])
    scan = TarScan(S3Path.parse("s3://bucket/0.tar"))
    assert [sample.key for sample in scan.samples() if not sample.fault] == list(map(str, range(14)))
    assert "the tar ends within '14.jpg'" in scan.damage


def test_invalid_use_raises_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no \.tar"):
        build_index(tmp_path)
    metadata_tar(tmp_path / "set" / "0.tar")
    with pytest.raises(UserError, match="holds no sample"):
        build_index(tmp_path / "set", sample_filter=SampleFilter(Filters(any_of=("nothing",))))


def test_metadata_of_two_indices_must_agree(tmp_path: Path) -> None:
    metadata_tar(tmp_path / "set" / "0.tar")
    make = functools.partial(build_index, tmp_path / "set", tmp_path / "index")
    make(meta={"filters": {"words": 3}})
    assert make().meta == {"filters": {"words": 3}}
    with pytest.raises(UserError, match=r"filters\.words was 3, now is 4"):
        make(meta={"filters": {"words": 4}})


def test_tables_record_caption_counts(tmp_path: Path) -> None:
    members = [(f"{n}.json", json.dumps({"captions": ["a"] * n}).encode()) for n in range(3)]
    write_tar(tmp_path / "set" / "0.tar", members)
    opened = build_index(tmp_path / "set")
    assert opened.captions == (4,)
    assert read_table(opened.shards[0]).columns["captions"].tolist() == [1, 1, 2]


def test_samples_without_captions_are_items_to_report(tmp_path: Path) -> None:
    """A sample whose captions are all empty is an item of ``captions=each``, so that it is counted as bad."""
    captions: list[list[str]] = [["", " "], [], ["a", "", "b"]]
    with TarWriter(str(tmp_path / "0.tar")) as writer:
        for number, texts in enumerate(captions):
            writer.write({"__key__": str(number), "txt": "", "json": {"captions": texts}})
    shards = build_index(tmp_path)
    assert read_table(shards.shards[0]).columns["captions"].tolist() == [1, 1, 2]
    assert shards.captions == (4,)
