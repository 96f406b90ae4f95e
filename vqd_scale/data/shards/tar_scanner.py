"""Tar scanner: lists samples and member offsets in one pass; nothing is extracted to disk."""

import hashlib
import io
import tarfile
from collections.abc import Generator, Iterator, Set
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from vqd_scale.core.atomic_io import Location, read_in_order
from vqd_scale.core.s3 import S3Object

PROBED = 8
"""Number of members that are read before the read mode of the others is chosen."""

LARGE_MEMBER = 2 << 20
"""Member size in bytes above which fetching it from S3 costs more than a request for the next header."""

_HEADERS = 2 * tarfile.BLOCKSIZE


@dataclass
class TarSample:
    """Neighboring members whose names agree up to the first dot, as webdataset groups them.

    Attributes:
        key: Common part of the member names.
        members: (offset, size) of each member's content by extension.
        contents: Contents of the requested members by extension.
        fault: Reason why the sample is unusable, completing the sentence 'this sample …'; empty if usable.
    """

    key: str
    members: dict[str, tuple[int, int]]
    contents: dict[str, bytes]
    fault: str = ""


class TarScan:
    """Single pass over a tar that also computes its SHA-256; nothing is read twice.

    If the first members of a tar in S3 are large, only the headers and requested members are fetched, each by
    a range request.

    Args:
        path: Path of the tar.
        content_extensions: Extensions of the members whose contents are read.

    Raises:
        FileNotFoundError: The file does not exist.
        UserError: The store cannot be reached or denies access.

    Attributes:
        size: Size of the tar in bytes.
        damage: After the pass, description of damage to the tar; empty if intact.
        sha256: After the pass, digest of all bytes; empty if bytes were skipped.
    """

    def __init__(self, path: Location, content_extensions: Set[str] = frozenset()) -> None:
        self.damage = ""
        self.sha256 = ""
        self._window = _Window(path)
        self.size = self._window.size
        self._content_extensions = content_extensions

    def samples(self) -> Generator[TarSample]:
        """Yield the samples in order; of a damaged tar, only those that are certainly complete."""
        # Imported here: webdataset imports torch.
        from webdataset.tariterators import base_plus_ext

        keys = set[str]()
        sample: TarSample | None = None
        for member in self._members():
            key, extension = base_plus_ext(member.name)
            if key is None or extension is None:
                continue
            extension = extension.lower()
            if sample is None or key != sample.key:
                if sample is not None:
                    yield sample
                sample = TarSample(key, {}, {}, _fault(key, keys))
                keys.add(key)
            if extension in sample.members:
                sample.fault = f"has two members '{extension}'"
            sample.members[extension] = (member.offset_data, member.size)
            if extension in self._content_extensions:
                sample.contents[extension] = self._window.at(member.offset_data, member.size)
        # In a truncated tar, members of the last sample may be missing.
        if sample is not None and not self.damage:
            yield sample
        self.sha256 = self._window.digest()

    def _members(self) -> Generator[tarfile.TarInfo]:
        count = 0
        try:
            with tarfile.open(fileobj=self._window, mode="r:") as archive:
                for member in archive:
                    # tarfile accepts a truncated tar as a short one, but samples must never be lost silently.
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


def _fault(key: str, keys: Set[str]) -> str:
    if key in keys:
        return "has the key of an earlier sample"
    if key.startswith(("/", "\\")) or ".." in PurePosixPath(key.replace("\\", "/")).parts:
        return "has a name that leads out of its folder"
    return ""


class _Window(io.RawIOBase):
    """Forward-moving window over a file, as a file object for `tarfile`."""

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
        """Switch a file in S3 to range requests, which skip the bytes between reads."""
        if self._distant is not None:
            self._blocks = None

    def at(self, offset: int, length: int) -> bytes:
        """Return bytes at an offset, at most one block before the last offset; fewer only at the end."""
        end = min(offset + length, self.size)
        if self._blocks is not None:
            self._advance(self._blocks, offset, end)
        elif self._distant is not None and not self._start <= offset <= end <= self._start + len(self._bytes):
            reached = min(self.size, max(end, offset + _HEADERS))
            self._start, self._bytes = offset, bytes(self._distant.read(offset, reached))
        return self._bytes[offset - self._start : offset - self._start + length]

    def digest(self) -> str:
        """Read to the end and return the SHA-256 of all bytes; empty if bytes were skipped."""
        if self._blocks is None:
            return ""
        self.at(self.size, 0)
        return self._hash.hexdigest()

    def read(self, size: int = -1, /) -> bytes:
        """Read for `tarfile`, which always passes a size."""
        content = self.at(self._position, size)
        self._position += len(content)
        return content

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        """Seek for `tarfile`, which always passes an absolute offset."""
        del whence
        self._position = offset
        return offset

    def tell(self) -> int:
        """Return the position for `tarfile`."""
        return self._position

    def _advance(self, blocks: Iterator[bytes | bytearray], offset: int, end: int) -> None:
        blocks_read = [self._bytes]
        reached = self._start + len(self._bytes)
        while reached < end:
            block = next(blocks, None)
            if block is None:
                break
            self._hash.update(block)
            if reached <= offset:
                blocks_read = [blocks_read[-1][-tarfile.BLOCKSIZE :]]
            blocks_read.append(bytes(block))
            reached += len(block)
        if len(blocks_read) > 1:
            self._bytes = b"".join(blocks_read)
            self._start = reached - len(self._bytes)
