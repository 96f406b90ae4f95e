"""Damage, links, sparse files, extended headers and dotted keys in tars."""

import io
import json
import random
import subprocess
import tarfile
from pathlib import Path

import pytest

from tests.data.shards.test_index_builder import quarantine, write_tar
from vqd_scale.core.errors import UserError
from vqd_scale.data.shards import index_builder
from vqd_scale.data.shards.index_builder import build_index
from vqd_scale.data.shards.shard_io import KEY, read_shard
from vqd_scale.data.shards.tar_scanner import TarScan

PAGE = 4096


def sample_members(first: int, count: int, image_bytes: int = 3000) -> list[tuple[str, bytes]]:
    random_numbers = random.Random(first)
    members: list[tuple[str, bytes]] = []
    for number in range(first, first + count):
        size = random_numbers.randrange(1, image_bytes)
        members.append((f"{number:04d}.jpg", random_numbers.randbytes(size) + b"x"))
        members.append((f"{number:04d}.txt", f"words of {number}".encode()))
    return members


def tar_bytes(members: list[tuple[str, bytes]], format: int = tarfile.GNU_FORMAT) -> bytes:
    with io.BytesIO() as file:
        with tarfile.open(fileobj=file, mode="w", format=format) as archive:
            for name, content in members:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
        return file.getvalue()


def indexed(tmp_path: Path, content: bytes) -> list[dict[str, bytes]]:
    """Index one tar and read the samples of its table."""
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "0.tar").write_bytes(content)
    opened = build_index(tmp_path / "set", max_bad_fraction=1.0)
    return list(read_shard(opened.shards[0]))


@pytest.mark.parametrize("padding", ["ends of tarfile", "ends of two blocks", "no ends", "odd blocking"])
def test_concatenated_tars_are_read_to_the_physical_end(tmp_path: Path, padding: str) -> None:
    content = b""
    for first in (0, 3, 8):
        part = tar_bytes(sample_members(first, 5 if first == 3 else 3))
        if padding != "ends of tarfile":
            part = part.rstrip(b"\0")
            part += bytes(-len(part) % 512)
        zeros = {"ends of two blocks": 1024, "odd blocking": 65_536 - len(part)}
        content += part + bytes(zeros.get(padding, 0))
    content += bytes(1024 if padding == "no ends" else 0)
    assert [sample[KEY] for sample in indexed(tmp_path, content)] == [f"{number:04d}" for number in range(11)]
    assert not (tmp_path / "set" / "quarantine.jsonl").exists()


@pytest.mark.parametrize("image_bytes", [200, 3000, 40_000])
@pytest.mark.parametrize("damage", ["zeros", "garbage"])
def test_samples_lost_with_a_page_are_never_understated(
    tmp_path: Path, image_bytes: int, damage: str
) -> None:
    count = 60
    members = sample_members(0, count, image_bytes)
    content = tar_bytes(members)
    path = tmp_path / "0.tar"
    intact = dict(members)
    pages = random.Random(0).sample(range(len(content) // PAGE), min(40, len(content) // PAGE))
    for page in pages:
        damaged = bytearray(content)
        fill = bytes(PAGE) if damage == "zeros" else random.Random(page).randbytes(PAGE)
        damaged[page * PAGE : (page + 1) * PAGE] = fill
        path.write_bytes(damaged)
        scan = TarScan(path, frozenset({"jpg", "txt"}))
        samples = list(scan.samples())
        usable = [sample for sample in samples if not sample.fault]
        assert len(samples) + scan.lost >= count, page
        assert bool(scan.lost) == bool(scan.damage)
        for sample in usable:
            assert {f"{sample.key}.{name}" for name in sample.contents} <= intact.keys()
            assert sample.members.keys() == {"jpg", "txt"}, page


def linked_tar(path: Path) -> Path:
    path.parent.mkdir()
    with tarfile.open(path, "w") as archive:
        for name, kind, content in [
            ("b/0.jpg", tarfile.SYMTYPE, "1.jpg"),
            ("b/0.txt", tarfile.REGTYPE, "a forward link"),
            ("b/1.jpg", tarfile.REGTYPE, "image"),
            ("b/1.json", tarfile.REGTYPE, '{"captions": ["one", "two"]}'),
            ("b/1.txt", tarfile.REGTYPE, "words"),
            ("b/2.jpg", tarfile.LNKTYPE, "b/1.jpg"),
            ("b/2.json", tarfile.LNKTYPE, "./b/1.json"),
            ("b/2.txt", tarfile.REGTYPE, "a hard link"),
            ("b/3.jpg", tarfile.SYMTYPE, "../b/2.jpg"),
            ("b/3.txt", tarfile.REGTYPE, "a link to a link"),
            ("b/4.jpg", tarfile.SYMTYPE, "/etc/passwd"),
            ("b/4.txt", tarfile.REGTYPE, "a link out of the tar"),
            ("b/5.jpg", tarfile.SYMTYPE, "5.jpg"),
            ("b/6.jpg", tarfile.FIFOTYPE, ""),
            ("b", tarfile.DIRTYPE, ""),
        ]:
            info = tarfile.TarInfo(name)
            info.type = kind
            if kind == tarfile.REGTYPE:
                info.size = len(content)
            else:
                info.linkname = content
            archive.addfile(info, io.BytesIO(content.encode()))
    return path


def test_links_are_resolved_or_counted(tmp_path: Path) -> None:
    linked_tar(tmp_path / "set" / "0.tar")
    opened = build_index(tmp_path / "set", max_bad_fraction=1.0)
    samples = {sample[KEY]: sample for sample in read_shard(opened.shards[0])}
    assert samples.keys() == {f"b/{number}" for number in range(4)}
    assert {sample["jpg"] for sample in samples.values()} == {b"image"}
    assert samples["b/2"]["json"] == samples["b/1"]["json"]
    assert opened.captions == (6,)
    assert {(key, reason) for _, key, reason in quarantine(tmp_path / "set")} == {
        ("b/4", "has a link to '/etc/passwd', which is not in the tar"),
        ("b/5", "has a link to 'b/5.jpg', which is not in the tar"),
        ("b/6", "has a member 'jpg' that is no regular file"),
    }


@pytest.mark.parametrize("format", ["gnu", "posix 0.0", "posix 0.1", "posix 1.0"])
def test_sparse_members_are_counted_as_bad(tmp_path: Path, format: str) -> None:
    """Pack files with holes with GNU tar."""
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "0.txt").write_text("first")
    with (tmp_path / "files" / "1.bmp").open("wb") as file:
        for begin in range(0, 60 * 65_536, 2 * 65_536):
            file.seek(begin)
            file.write(b"data")
    (tmp_path / "files" / "2.txt").write_text("last")
    kind, _, version = format.partition(" ")
    options = [f"--format={kind}", *([f"--sparse-version={version}"] if version else [])]
    tar = tmp_path / "packed.tar"
    names = ["0.txt", "1.bmp", "2.txt"]
    subprocess.run(["tar", "-S", *options, "-cf", tar, "-C", tmp_path / "files", *names], check=True)
    assert [sample[KEY] for sample in indexed(tmp_path, tar.read_bytes())] == ["0", "2"]
    ((_, key, reason),) = quarantine(tmp_path / "set")
    assert (key, reason) == ("1", "has a member 'bmp' that is stored with holes (tar --sparse)")


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_names_of_all_formats_equal_those_of_tarfile(tmp_path: Path, format: int) -> None:
    names = ["é/ü.txt", "d" * 90 + "/" + "f" * 90 + ".txt", "plain.txt"]
    if format != tarfile.USTAR_FORMAT:
        names.append("long/" * 50 + "f" * 150 + ".txt")
    path = tmp_path / "0.tar"
    path.write_bytes(tar_bytes([(name, name.encode()) for name in names], format))
    scan = TarScan(path, frozenset({"txt"}))
    assert [(sample.key + ".txt", sample.contents["txt"].decode()) for sample in scan.samples()] == [
        (name, name) for name in names
    ]
    assert not scan.damage


def with_pax_record(record: bytes) -> bytes:
    """Return a tar of three samples, the second with a given record in its extended header."""
    parts = [tar_bytes(sample_members(number, 1)).rstrip(b"\0") for number in range(3)]
    parts = [part + bytes(-len(part) % 512) for part in parts]
    info = tarfile.TarInfo("pax")
    info.type, info.size = tarfile.XHDTYPE, len(record)
    header = info.tobuf(tarfile.USTAR_FORMAT) + record + bytes(-len(record) % 512)
    return parts[0] + header + parts[1] + parts[2] + bytes(10_240)


@pytest.mark.parametrize(
    "record",
    [
        b"9" * 5000 + b" size=1\n",
        b"12 size=-99\n",
        b"18 size=-999999999\n",
        b"13 size=0x10\n",
        b"99 path=short\n",
        b"17 path=a\0b.jpg\n",
        b"no record at all",
        b"\xff" * 600,
    ],
)
def test_invalid_extended_headers_hide_no_member(tmp_path: Path, record: bytes) -> None:
    samples = indexed(tmp_path, with_pax_record(record))
    reported = {key for _, key, _ in quarantine(tmp_path / "set")}
    assert {sample[KEY] for sample in samples} | reported >= {"0000", "0001", "0002", ""}


def test_chain_of_long_names_ends(tmp_path: Path) -> None:
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 200
    link = info.tobuf(tarfile.GNU_FORMAT) + b"n" * 200 + bytes(312)
    content = tar_bytes(sample_members(0, 3))
    samples = indexed(tmp_path, link * 2000 + content)
    assert len(samples) >= 2
    assert any("too many extended headers" in reason for _, _, reason in quarantine(tmp_path / "set"))


def test_compressed_tar_is_named(tmp_path: Path) -> None:
    (tmp_path / "0.tar").write_bytes(b"\x1f\x8b\x08" + bytes(600))
    with pytest.raises(UserError, match=r"0\.tar.*compressed with gzip; unpack it first"):
        build_index(tmp_path)


DOTTED_KEYS: list[tuple[list[str], dict[str, list[str]]]] = [
    (["22.05.png", "22.06.png"], {"22.05": ["png"], "22.06": ["png"]}),
    (
        ["22.05.png", "22.05.txt", "22.06.txt", "22.06.png"],
        {"22.05": ["png", "txt"], "22.06": ["png", "txt"]},
    ),
    (["Track 2.0 (Clean).JPG", "Track 2.0 (Clean).txt"], {"Track 2.0 (Clean)": ["jpg", "txt"]}),
    (
        ["a.cls.json", "a.jpg", "a.seg.png", "a.tokens.npy"],
        {"a": ["cls.json", "jpg", "seg.png", "tokens.npy"]},
    ),
    (["a.jpg", "a.final.jpg"], {"a": ["jpg"], "a.final": ["jpg"]}),
    (["a.left.png", "a.right.png", "a.txt"], {"a": ["txt"], "a.left": ["png"], "a.right": ["png"]}),
    (
        ["1.5.cls", "1.5.tokens.npy", "1.6.cls", "1.6.tokens.npy"],
        {k: ["cls", "tokens.npy"] for k in ("1.5", "1.6")},
    ),
    (["v1.0/a.png", "v1.0/a.txt", "v1.0/b.c.png"], {"v1.0/a": ["png", "txt"], "v1.0/b.c": ["png"]}),
    (["5.1.png", "5.1.seg.png", "5.1.2.png"], {"5.1": ["png", "seg.png"], "5.1.2": ["png"]}),
]


@pytest.mark.parametrize(("names", "expected"), DOTTED_KEYS)
def test_dots_in_keys_merge_no_images(
    tmp_path: Path, names: list[str], expected: dict[str, list[str]]
) -> None:
    path = write_tar(tmp_path / "0.tar", [(name, b"{}") for name in names])
    samples = list(TarScan(path).samples())
    assert {sample.key: sorted(sample.members) for sample in samples} == expected
    assert not any(sample.fault for sample in samples)


@pytest.mark.parametrize("captions", ["3", "-5", "true", "1e15", "[1, null]", "{}", '["a", 2]', '[["a"]]'])
def test_captions_that_are_no_texts_are_bad_samples(tmp_path: Path, captions: str) -> None:
    members = [("0.txt", b"a"), ("1.json", f'{{"captions": {captions}}}'.encode()), ("1.txt", b"b")]
    write_tar(tmp_path / "set" / "0.tar", members)
    opened = build_index(tmp_path / "set", max_bad_fraction=0.5)
    assert opened.captions == (1,)
    assert [key for _, key, _ in quarantine(tmp_path / "set")] == ["1"]


@pytest.mark.parametrize("label", ["1" + "0" * 400, "1e300", "-1e300"])
def test_class_without_bound_is_a_bad_sample(tmp_path: Path, label: str) -> None:
    write_tar(tmp_path / "set" / "0.tar", [("0.txt", b"a"), ("1.json", f'{{"class": {label}}}'.encode())])
    assert build_index(tmp_path / "set", max_bad_fraction=0.5).count == 1
    assert [key for _, key, _ in quarantine(tmp_path / "set")] == ["1"]


@pytest.mark.parametrize("statistics", ["[]", "5", '{"successes": "many"}', "{", '{"successes": -1}'])
def test_statistics_of_another_shape_are_one_sentence(tmp_path: Path, statistics: str) -> None:
    write_tar(tmp_path / "0.tar", [("0.txt", b"a")])
    (tmp_path / "0_stats.json").write_text(statistics)
    with pytest.raises(UserError, match=r"0_stats\.json: this statistics file of a shard cannot be read"):
        build_index(tmp_path)


def test_lost_samples_count_as_bad(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", [(f"{number}.txt", b"a") for number in range(10)])
    (tmp_path / "0_stats.json").write_text('{"successes": 30}')
    build_index(tmp_path, max_bad_fraction=1.0)
    assert json.loads((tmp_path / "index.json").read_text())["left_out"]["bad"] == 20
    with pytest.raises(UserError, match=r"more than max_bad_fraction=0\.6 of the 30 samples"):
        build_index(tmp_path, max_bad_fraction=0.6)


def test_tar_of_many_zeros_is_damaged(tmp_path: Path) -> None:
    content = tar_bytes(sample_members(0, 4)).rstrip(b"\0")
    content += bytes(-len(content) % 512)
    path = tmp_path / "0.tar"
    for size, is_damaged in ((0, True), (512, False), (1024, False), (10_240, False), (3 << 20, True)):
        path.write_bytes(content + bytes(size))
        scan = TarScan(path)
        samples = list(scan.samples())
        assert bool(scan.damage) == is_damaged, size
        assert [bool(sample.fault) for sample in samples] == [False, False, False, is_damaged]
    path.write_bytes(content + bytes(-len(content) % (1 << 20)))
    assert not any(sample.fault for sample in TarScan(path).samples())


def test_too_many_extensions_are_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_builder, "MAX_CELLS", 100)
    write_tar(tmp_path / "0.tar", [(f"{number}.v{number}", b"a") for number in range(11)])
    with pytest.raises(UserError, match=r"0\.tar: has 11 different extensions"):
        build_index(tmp_path)
