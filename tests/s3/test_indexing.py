"""Datasets in S3: indexed in place and into another folder, and sources packed into S3."""

import json
import tarfile
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vqd_scale.cli.make_shards import main
from vqd_scale.core.errors import UserError
from vqd_scale.core.s3 import S3Path, object_sizes, write_object
from vqd_scale.data.config import CacheConfig, RangedReadConfig
from vqd_scale.data.shards.filters import Bounds, Filters
from vqd_scale.data.shards.index_builder import SampleFilter, build_index
from vqd_scale.data.shards.manifest import INDEX
from vqd_scale.data.shards.quarantine import QUARANTINE
from vqd_scale.data.shards.ranged_reader import RangedReader
from vqd_scale.data.shards.shard_index import ShardSet
from vqd_scale.data.shards.shard_io import KEY, ShardReader, read_shard
from vqd_scale.data.shards.tar_scanner import LARGE_MEMBER, PROBED, TarScan

pytestmark = pytest.mark.s3


def upload(folder: S3Path, name: str, members: list[tuple[str, bytes]], local: Path) -> Path:
    path = local / name
    with tarfile.open(path, "w") as archive:
        for member, content in members:
            info = tarfile.TarInfo(member)
            info.size = len(content)
            archive.addfile(info, BytesIO(content))
    write_object(folder / name, path)
    return path


def small(first: int) -> Iterator[tuple[str, bytes]]:
    for number in range(first, first + 5):
        yield f"{number}.txt", f"words of {number}".encode()
        yield f"{number}.json", json.dumps({"similarity": number / 10}).encode()


def keys(shards: ShardSet) -> list[str]:
    return [sample[KEY] for shard in shards.shards for sample in read_shard(shard)]


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.ranks)])
def test_index_in_place_and_into_another_folder(folder: S3Path, tmp_path: Path, workers: int) -> None:
    for shard in range(2):
        upload(folder, f"{shard}.tar", list(small(5 * shard)), tmp_path)
    in_place_index = build_index(folder, workers=workers)
    assert keys(in_place_index) == [str(number) for number in range(10)]
    assert {INDEX, "0.npz", "1.npz"} < object_sizes(folder).keys()
    for elsewhere in (folder / "index", tmp_path / "index"):
        sample_filter = SampleFilter(Filters(columns={"similarity": Bounds(min=0.4, max=0.7)}))
        opened = build_index(folder, elsewhere, sample_filter, workers=workers)
        assert keys(opened) == ["4", "5", "6", "7"]
        assert opened.digests == in_place_index.digests
        assert ShardSet.open(elsewhere) == opened


def test_truncated_tar_is_detected(folder: S3Path, tmp_path: Path) -> None:
    path = upload(folder, "0.tar", list(small(0)), tmp_path)
    path.write_bytes(path.read_bytes()[:3000])
    write_object(folder / "0.tar", path)
    with pytest.raises(UserError, match=r"0\.tar"):
        build_index(folder)
    assert build_index(folder, max_bad_fraction=1.0).count == 1
    assert "the tar is cut or damaged at byte 3000" in (folder / QUARANTINE).read_text()


def test_large_members_fetch_headers_only(
    folder: S3Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = LARGE_MEMBER + 100_000
    count = 4 * PROBED
    path = upload(
        folder, "0.tar", [(f"{number}.jpg", bytes([number]) * size) for number in range(count)], tmp_path
    )
    scan = TarScan(folder / "0.tar")
    samples = list(scan.samples())
    for sample, expected in zip(samples, TarScan(path).samples(), strict=True):
        assert sample.members["jpg"][:2] == expected.members["jpg"][:2]
    assert scan.sha256 == ""
    opened = build_index(folder)
    assert opened.digests == ("",)
    assert [sample["jpg"][0] for sample in read_shard(opened.shards[0])] == list(range(count))


def test_commands_from_images_to_s3(
    folder: S3Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image_folder = tmp_path / "pictures"
    image_folder.mkdir()
    for number in range(4):
        pixels = np.random.default_rng(number).integers(0, 256, (20, 20, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(image_folder / f"{number}.png")
        (image_folder / f"{number}.txt").write_text(f"noise {number}")
    (image_folder / "3.png").write_bytes(b"no picture")
    command = ["imagefolder", str(image_folder), str(folder / "set"), "image_size=16", "max_bad_fraction=0.3"]
    main(command)
    assert "3 samples in 1 shards" in capsys.readouterr().out
    before = {name: (folder / "set" / name).read_bytes() for name in object_sizes(folder / "set")}
    assert before.keys() == {INDEX, QUARANTINE, "000000.tar", "000000.npz"}
    main(command)
    assert {name: (folder / "set" / name).read_bytes() for name in object_sizes(folder / "set")} == before
    capsys.readouterr()
    main(["index", str(folder / "set"), "--output", str(tmp_path / "again")])
    assert "3 samples in 1 shards" in capsys.readouterr().out
    assert keys(ShardSet.open(tmp_path / "again")) == keys(ShardSet.open(folder / "set"))


def test_replaced_tar_is_named_and_indexed_again(folder: S3Path, tmp_path: Path) -> None:
    path = upload(folder, "0.tar", list(small(0)), tmp_path)
    build_index(folder)
    for name in ("0.tar", "0.npz", INDEX):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
        write_object(folder / "copy" / name, tmp_path / name)
    content = path.read_bytes()
    path.write_bytes(content.replace(b"words of 3", b"texts of 3"))
    assert len(content) == path.stat().st_size
    write_object(folder / "0.tar", path)
    with pytest.raises(UserError, match=r"0\.tar: changed or damaged since it was indexed"):
        keys(ShardSet.open(folder))
    samples = list(read_shard(build_index(folder).shards[0]))
    assert samples[3]["txt"] == b"texts of 3"
    # A copy has another ETag but the same content.
    samples = list(read_shard(ShardSet.open(folder / "copy").shards[0]))
    assert samples[3]["txt"] == b"words of 3"


def test_replaced_tar_whose_headers_were_fetched_is_named(folder: S3Path, tmp_path: Path) -> None:
    members = [(f"{number}.jpg", bytes([number]) * (LARGE_MEMBER + 1000)) for number in range(2 * PROBED)]
    path = upload(folder, "0.tar", members, tmp_path)
    assert build_index(folder).digests == ("",)
    damaged = bytearray(path.read_bytes())
    damaged[-LARGE_MEMBER] ^= 1
    path.write_bytes(damaged)
    write_object(folder / "0.tar", path)
    for cache in (None, CacheConfig(folder=tmp_path / "cache", max_gigabytes=1)):
        reading = RangedReader(1, 1, RangedReadConfig(cache=cache))
        with pytest.raises(UserError, match=r"0\.tar.*: was replaced .* or since it was indexed"):
            ShardReader(ShardSet.open(folder).shards[0], reading).read(0, "jpg")
    assert len(keys(build_index(folder))) == len(members)


@pytest.mark.parametrize("samples", [1, 4])
def test_links_to_earlier_members_are_read(folder: S3Path, tmp_path: Path, samples: int) -> None:
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        for number in range(20):
            for name in ("jpg", "txt"):
                info = tarfile.TarInfo(f"{number:02d}.{name}")
                info.size = 3000
                if number % 5 and (name == "jpg" or number % 2):
                    info.type, info.linkname, info.size = tarfile.LNKTYPE, f"{number // 5 * 5:02d}.{name}", 0
                archive.addfile(info, BytesIO(bytes([number]) * info.size))
    write_object(folder / "0.tar", tmp_path / "0.tar")
    shard = build_index(folder).shards[0]
    reader = ShardReader(shard, RangedReader(samples, 2, RangedReadConfig()))
    for number in range(20):
        reader.expect(number)
        assert reader.read(number, "jpg") == bytes([number // 5 * 5]) * 3000
        assert reader.read(number, "txt")[0] == (number // 5 * 5 if number % 5 and number % 2 else number)
        assert len(reader.read_together(number, ("jpg", "txt"))) == 2
