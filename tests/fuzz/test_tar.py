"""Fuzzing of the tar scanner, with `tarfile` from the standard library as the oracle."""

import io
import tarfile
from contextlib import suppress
from pathlib import Path

import pytest

from tests.data.shards.test_tar_scanner import linked_tar, sample_members, tar_bytes, with_pax_record
from tests.fuzz.harness import SECONDS, fuzz
from vqd_scale.data.shards.tar_scanner import TarScan

EXTENSIONS = frozenset({"jpg", "json", "txt"})
FORMATS = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)


def corpus(tmp_path: Path) -> list[bytes]:
    plain = [tar_bytes(sample_members(0, 12, 600), format) for format in FORMATS]
    long_names = [("long/" * 40 + f"{number}.txt", b"words") for number in range(4)]
    named = [tar_bytes(long_names, format) for format in FORMATS[1:]]
    sparse = with_pax_record(b"22 GNU.sparse.major=1\n22 GNU.sparse.minor=0\n")
    links = linked_tar(tmp_path / "links" / "0.tar").read_bytes()
    return [*plain, *named, links, plain[1] + plain[2], sparse, b""]


def keys_of_tarfile(data: bytes) -> set[str]:
    """Return the keys that tarfile finds, up to its first error."""
    keys = set[str]()
    with (
        suppress(tarfile.TarError, ValueError, EOFError, IndexError, RecursionError),
        tarfile.open(fileobj=io.BytesIO(data), mode="r:", ignore_zeros=True) as archive,
    ):
        for member in archive:
            if member.isreg() and member.offset_data + member.size <= len(data):
                folder, slash, name = member.name.rpartition("/")
                key, dot, _ = name.partition(".")
                keys |= {f"{folder}{slash}{key}"} if key and dot else set()
    return keys


@pytest.mark.parametrize("seconds", SECONDS)
def test_no_sample_of_a_mutated_tar_is_lost_without_report(seconds: float, tmp_path: Path) -> None:
    path = tmp_path / "0.tar"

    def target(data: bytes) -> None:
        path.write_bytes(data)
        scan = TarScan(path, EXTENSIONS)
        samples = list(scan.samples())
        assert bool(scan.damage) == bool(scan.lost)
        for sample in samples:
            for extension, (offset, size, _) in sample.members.items():
                assert 512 <= offset <= offset + size <= len(data)
                assert sample.contents.get(extension, b"") in (b"", data[offset : offset + size])
        assert {sample.key for sample in samples} >= keys_of_tarfile(data) or scan.damage

    files = corpus(tmp_path)
    assert fuzz(target, files, seconds, tmp_path / "failure") > len(files)
