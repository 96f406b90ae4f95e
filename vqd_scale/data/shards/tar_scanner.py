"""What a tar holds and where, found in one pass over its bytes; nothing is ever unpacked to a disk."""

import hashlib
import io
import tarfile
from collections.abc import Generator, Iterator, Set
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from webdataset.tariterators import base_plus_ext

from vqd_scale.core.atomic_io import Location, read_in_order
from vqd_scale.core.s3 import S3Object

PROBED = 8
"""So many members are looked at before it is decided how the rest is read."""

LARGE_MEMBER = 2 << 20
"""Above so many bytes a member of a distant tar costs more to fetch than another request for the header
behind it."""

_HEADERS = 2 * tarfile.BLOCKSIZE


@dataclass
class TarSample:
    """Neighbouring members whose names agree up to the first dot, as webdataset groups them.

    Attributes:
        key: What their names have in common.
        places: (offset, size) of each member's content by extension.
        contents: The contents of those members that were asked for.
        fault: Why the sample cannot be used, if so; completes the sentence 'this sample …'.
    """

    key: str
    places: dict[str, tuple[int, int]]
    contents: dict[str, bytes]
    fault: str = ""


class TarScan:
    """One pass over a tar, with its SHA-256 on the way; nothing is read twice.

    A tar in S3 whose first members are large is not fetched whole: only its headers are, each by a request.

    Args:
        path: The tar.
        wanted: The members, by extension, whose contents are read.

    Raises:
        FileNotFoundError: There is no such file.
        UserError: The store cannot be reached or refuses.

    Attributes:
        size: Bytes of the tar.
        damage: After the pass, what is wrong with the tar as a whole; empty if nothing.
        sha256: After the pass, the digest of all bytes; empty where most of them were passed over.
    """

    def __init__(self, path: Location, wanted: Set[str] = frozenset()) -> None:
        self.damage = ""
        self.sha256 = ""
        self._window = _Window(path)
        self.size = self._window.size
        self._wanted = wanted

    def samples(self) -> Generator[TarSample]:
        """The samples in their order; of a damaged tar those that are certainly whole."""
        seen = set[str]()
        sample: TarSample | None = None
        for member in self._members():
            key, extension = base_plus_ext(member.name)
            if key is None or extension is None:
                continue
            extension = extension.lower()
            if sample is None or key != sample.key:
                if sample is not None:
                    yield sample
                sample = TarSample(key, {}, {}, _fault(key, seen))
                seen.add(key)
            if extension in sample.places:
                sample.fault = f"has two members '{extension}'"
            sample.places[extension] = (member.offset_data, member.size)
            if extension in self._wanted:
                sample.contents[extension] = self._window.at(member.offset_data, member.size)
        # Behind a cut more members of the last sample may have been.
        if sample is not None and not self.damage:
            yield sample
        self.sha256 = self._window.digest()

    def _members(self) -> Generator[tarfile.TarInfo]:
        count = 0
        try:
            with tarfile.open(fileobj=self._window, mode="r:") as archive:
                for member in archive:
                    # tarfile takes a cut tar for a short one, and samples must never be lost silently.
                    if member.offset_data + member.size > self.size:
                        self.damage = f"the tar ends within '{member.name}'"
                        return
                    if member.isfile():
                        yield member
                    count += 1
                    if count == PROBED and archive.offset > PROBED * LARGE_MEMBER:
                        self._window.pass_over()
                end = archive.offset
        except tarfile.TarError as error:
            self.damage = f"not a readable tar ({error})"
            return
        if self._window.at(end, tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            self.damage = f"the tar is cut or damaged at byte {end}"


def _fault(key: str, seen: Set[str]) -> str:
    if key in seen:
        return "has the key of an earlier sample"
    if key.startswith(("/", "\\")) or ".." in PurePosixPath(key.replace("\\", "/")).parts:
        return "has a name that leads out of its folder"
    return ""


class _Window(io.RawIOBase):
    """As much of a file as `tarfile` needs of it, moving forward."""

    def __init__(self, path: Location) -> None:
        super().__init__()
        self._distant: S3Object | None = None
        if isinstance(path, Path):
            self.size = path.stat().st_size
        else:
            self._distant = S3Object(path)
            self.size = self._distant.size
        self._blocks: Iterator[bytes | bytearray] | None = read_in_order(path)
        self._hash = hashlib.sha256()
        self._position = 0
        self._start = 0
        self._bytes = b""

    def pass_over(self) -> None:
        """From here on read what is asked for and nothing between, if the file is a distant one."""
        if self._distant is not None:
            self._blocks = None

    def at(self, offset: int, length: int) -> bytes:
        """Bytes at a place, fewer at the end only; it may lie before the last place by a block."""
        end = min(offset + length, self.size)
        if self._blocks is not None:
            self._advance(self._blocks, offset, end)
        elif self._distant is not None and not self._start <= offset <= end <= self._start + len(self._bytes):
            reached = min(self.size, max(end, offset + _HEADERS))
            self._start, self._bytes = offset, bytes(self._distant.read(offset, reached))
        return self._bytes[offset - self._start : offset - self._start + length]

    def digest(self) -> str:
        """SHA-256 of all bytes, those behind the last place included; empty if some were passed over."""
        if self._blocks is None:
            return ""
        self.at(self.size, 0)
        return self._hash.hexdigest()

    def read(self, size: int = -1, /) -> bytes:
        """For `tarfile`, which always says how much."""
        found = self.at(self._position, size)
        self._position += len(found)
        return found

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        """For `tarfile`, which always counts from the beginning."""
        del whence
        self._position = offset
        return offset

    def tell(self) -> int:
        """For `tarfile`."""
        return self._position

    def _advance(self, blocks: Iterator[bytes | bytearray], offset: int, end: int) -> None:
        kept = [self._bytes]
        reached = self._start + len(self._bytes)
        while reached < end:
            block = next(blocks, None)
            if block is None:
                break
            self._hash.update(block)
            if reached <= offset:
                kept = [kept[-1][-tarfile.BLOCKSIZE :]]
            kept.append(bytes(block))
            reached += len(block)
        if len(kept) > 1:
            self._bytes = b"".join(kept)
            self._start = reached - len(self._bytes)
