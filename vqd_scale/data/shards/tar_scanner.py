"""Tar scanner: lists samples and member positions in one pass; nothing is extracted to disk.

tarfile is not used. It takes the first block of zeros for the end of the tar, stops silently at a damaged
header, and follows sizes and name records that lead backwards or recurse. Here a tar is read to its physical
end. What is not part of a valid header, of a member or of an end mark is damage, and reading resumes at the
next valid header.
"""

import hashlib
import posixpath
import re
import zlib
from collections.abc import Generator, Iterator, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from vqd_scale.core.atomic_io import Location, read_in_order, reading
from vqd_scale.core.s3 import S3Object
from vqd_scale.data.shards.decode import IMAGE_EXTENSIONS
from vqd_scale.data.shards.tar_header import BLOCK, TarHeader, read_header

PROBED = 8
"""Number of members that are read before the read mode of the others is chosen."""

LARGE_MEMBER = 2 << 20
"""Member size in bytes above which fetching it from S3 costs more than a request for the next header."""

_CHUNK_BYTES = 1 << 20
_PAGE = 4096
_RECORD = 10_240
_PADDED_SIZES = (_RECORD, *(1 << shift for shift in range(11, 21)))
"""Sizes in bytes to a multiple of which programs pad a tar after its end mark."""
_END_MARK = 2 * BLOCK
_MAX_LINKS = 40
_MAX_KEY = 1000

_BESIDE_DAMAGE = "is beside damaged bytes of the tar"

_NAME = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)", re.DOTALL)
"""Key, up to the first dot of the file name, and extension, as in webdataset."""
_AUXILIARY = re.compile(
    "alpha|canny|cond|control|depth|edges?|flow|hint|instance|labels?|left|masks?|normals?|panoptic|pose|right|"
    "seg|segm|segmentation|semantic|sketch|thumb|thumbnail",
    re.IGNORECASE,
)
"""Word before an image extension, as in ``a.seg.png``, of an image that is no sample of its own."""
_IMAGE = re.compile(rf"(?:(.*)[.])?(?:{'|'.join(IMAGE_EXTENSIONS)}|tokens[.]npy)", re.DOTALL | re.IGNORECASE)
"""Extension of an image, or of the tokens of one; a group for what precedes it."""


class Position(NamedTuple):
    """Position of a member's content in a tar, and CRC-32 of its header block and content; 0 if unknown."""

    offset: int
    size: int
    checksum: int


@dataclass
class TarSample:
    """Members of one sample.

    Attributes:
        key: Common part of the member names.
        members: Position of each member by extension.
        contents: Contents of the requested members by extension.
        fault: Reason why the sample is unusable, completing the sentence 'this sample …'; empty if usable.
        links: Target of each member that is a link, until it is resolved.
    """

    key: str
    members: dict[str, Position]
    contents: dict[str, bytes]
    fault: str = ""
    links: dict[str, str] = field(default_factory=dict[str, str])


class TarScan:
    """Single pass over a tar that also computes its SHA-256; nothing is read twice, except targets of links.

    If the first members of a tar in S3 are large, only the headers and requested members are fetched, each by
    a range request.

    Args:
        path: Path of the tar.
        content_extensions: Extensions of the members whose contents are read.

    Raises:
        FileNotFoundError: The file does not exist.
        UserError: The file may not be read; the store cannot be reached or denies access.

    Attributes:
        size: Size of the tar in bytes.
        damage: After the pass, description of damage to the tar; empty if intact.
        lost: After the pass, upper estimate of the number of samples in the damaged bytes.
        sha256: After the pass, digest of all bytes; empty if bytes were skipped.
    """

    def __init__(self, path: Location, content_extensions: Set[str] = frozenset()) -> None:
        self.damage = ""
        self.lost = 0
        self.sha256 = ""
        self._window = _Window(path)
        self.size = self._window.size
        self._content_extensions = content_extensions
        self._files: dict[str, Position] = {}
        self._links: dict[str, str] = {}
        self._gaps: list[int] = []

    def samples(self) -> Generator[TarSample]:
        """Yield the samples: in order, at the end those with links to later members; bad beside damage."""
        keys = set[str]()
        waiting: list[TarSample] = []
        smallest = self.size
        for sample in self._grouped():
            sample.fault = sample.fault or _key_fault(sample.key, keys)
            keys.add(sample.key)
            if sample.members:
                end = max(position.offset + position.size for position in sample.members.values())
                smallest = min(smallest, end - min(sample.members.values()).offset + BLOCK)
            self._resolve(sample)
            if sample.links and not sample.fault:
                waiting.append(sample)
            else:
                yield sample
        for sample in waiting:
            self._resolve(sample)
            if sample.links:
                sample.fault = f"has a link to '{min(sample.links.values())}', which is not in the tar"
            yield sample
        self.lost = sum(max(1, -(-gap // max(BLOCK, smallest))) for gap in self._gaps)
        self.sha256 = self._window.digest()

    def _grouped(self) -> Generator[TarSample]:
        group = _Group("")
        for member in self._members():
            if member is None:
                yield from group.finish(_BESIDE_DAMAGE)
                group = _Group("", _BESIDE_DAMAGE)
            elif match := _NAME.fullmatch(member.name):
                if match[1] != group.key:
                    yield from group.finish()
                    group = _Group(match[1], group.fault)
                yield from group.add(match[2], member)
        yield from group.finish()

    def _resolve(self, sample: TarSample) -> None:
        """Replace a sample's links by the positions of their targets, as far as these are known."""
        for extension, target in list(sample.links.items()):
            for _ in range(_MAX_LINKS):
                target = self._links.get(target, target)
            if target in self._files:
                position = sample.members[extension] = self._files[target]
                del sample.links[extension]
                if extension in self._content_extensions:
                    sample.contents[extension] = self._window.reread(position)

    def _members(self) -> Generator["_Member | None"]:
        """Yield files and links in order; None between those before damaged bytes and those behind them."""
        offset, start, count = 0, 0, 0
        # Beginnings of the present zeros, which can be an end mark, and of the present damaged bytes.
        zeros, gap = -1, -1
        is_zeroed = False
        while offset < self.size:
            header = None
            if any(self._window.at(offset, BLOCK)):
                try:
                    header = read_header(self._window.at, self.size, offset, is_strict=gap >= 0)
                except ValueError as error:
                    if gap < 0:
                        gap = zeros if zeros >= 0 else offset
                        yield self._damaged(str(error), gap)
            elif gap < 0 and zeros < 0:
                zeros, is_zeroed = offset, self._window.is_sequential and self._is_zeroed_before(offset)
            if header is None:
                self._window.ahead = _CHUNK_BYTES
                offset += BLOCK
                continue
            if zeros >= 0 > gap:
                # Between members, one block of zeros is no end mark, and a zeroed page can look like one.
                is_zeroed |= offset - zeros < _END_MARK or zeros % _PAGE == 0 == offset % _PAGE
                if is_zeroed or not _is_padding(start, zeros, offset):
                    gap = zeros
                    yield self._damaged("zeros between members", gap)
                start = offset
            if gap >= 0:
                self._gaps.append(offset - gap)
            zeros, gap = -1, -1
            self._window.ahead = 2 * BLOCK
            if header.kind not in b"5DV":
                yield self._member(header)
            offset = header.begin + -(-header.size // BLOCK) * BLOCK
            if header.begin + header.size > self.size:
                self.damage = self.damage or f"the tar ends within '{header.name}'"
                offset = gap = header.begin
                yield None
            count += 1
            if count == PROBED and offset > PROBED * LARGE_MEMBER:
                self._window.skip_contents()
        is_short = self.size - zeros < _RECORD + _END_MARK
        if gap < 0 and (zeros < 0 or is_zeroed or not (is_short or _is_padding(start, zeros, self.size))):
            gap = self.size if zeros < 0 else zeros
            yield self._damaged("no end mark" if zeros < 0 else "zeros instead of members", gap)
        if gap >= 0:
            self._gaps.append(self.size - gap)

    def _damaged(self, reason: str, offset: int) -> None:
        if not self.damage and not offset:
            self.damage = f"not a readable tar ({reason})"
        self.damage = self.damage or f"the tar is cut or damaged at byte {offset} ({reason})"

    def _is_zeroed_before(self, offset: int) -> bool:
        """Return whether zeros begin at the page boundary before an offset, as after the loss of a page."""
        page = offset // _PAGE * _PAGE
        content = self._window.at(max(0, page - BLOCK), offset - max(0, page - BLOCK))
        return page > 0 and page < offset and any(content[:BLOCK]) and not any(content[BLOCK:])

    def _member(self, header: TarHeader) -> "_Member":
        begin, end = header.begin, header.begin + header.size
        if header.kind in b"12":
            folder = posixpath.dirname(header.name) if header.kind == b"2" else ""
            target = posixpath.normpath(posixpath.join(folder, header.link))
            self._links[posixpath.normpath(header.name)] = target
            return _Member(header.name, link=target)
        if end > self.size:
            return _Member(header.name, fault="is cut off")
        if header.fault:
            return _Member(header.name, fault=header.fault)
        is_requested = header.name.lower().endswith(tuple(self._content_extensions))
        content = self._window.at(begin, header.size) if is_requested else None
        checksum = 0
        if self._window.is_sequential:
            checksum = zlib.crc32(header.block)
            for first in range(begin, end, _CHUNK_BYTES) if content is None else ():
                checksum = zlib.crc32(self._window.at(first, min(_CHUNK_BYTES, end - first)), checksum)
            checksum = zlib.crc32(content or b"", checksum)
        position = self._files[posixpath.normpath(header.name)] = Position(begin, header.size, checksum)
        return _Member(header.name, position, content)


class _Member(NamedTuple):
    name: str
    position: Position | None = None
    content: bytes | None = None
    link: str = ""
    fault: str = ""


class _Group:
    """Neighboring members whose names agree up to the first dot: one sample, or several with dotted keys.

    A member is an image of its own if its extension is, for example, ``05.png`` and not ``png`` or
    ``seg.png``. Its key then includes ``05``, as do the keys of all members whose extension begins like this.

    Attributes:
        fault: Fault of the next sample.
    """

    def __init__(self, key: str, fault: str = "") -> None:
        self.key, self.fault = key, fault
        self._members: list[tuple[str, _Member]] = []
        self._stem = ""

    def add(self, extension: str, member: _Member) -> Iterator[TarSample]:
        """Add a member; yield the sample that it completes."""
        stem = _stem(extension)
        if stem and stem != self._stem:
            if self._stem:
                yield self._part(self._stem)
            self._stem = stem
        self._members.append((extension, member))

    def finish(self, fault: str = "") -> Iterator[TarSample]:
        """Yield the samples that are not yet complete; ``fault`` is that of all of them."""
        if self._stem:
            yield self._part(self._stem, fault)
        images = [match[1] for name, _ in self._members if (match := _IMAGE.fullmatch(name))]
        for stem in dict.fromkeys(images) if None not in images else ():
            yield self._part(stem, fault)
        if self._members:
            yield self._sample(self.key, self._members, fault)

    def _part(self, stem: str, fault: str = "") -> TarSample:
        """Remove the members of an image of its own."""
        prefix = f"{stem}."
        selected, remaining = list[tuple[str, _Member]](), list[tuple[str, _Member]]()
        for name, member in self._members:
            if name.startswith(prefix) and _stem(name) in ("", stem):
                selected.append((name.removeprefix(prefix), member))
            else:
                remaining.append((name, member))
        self._members = remaining
        return self._sample(f"{self.key}.{stem}", selected, fault)

    def _sample(self, key: str, members: Sequence[tuple[str, _Member]], fault: str) -> TarSample:
        sample = TarSample(key, {}, {}, fault or self.fault)
        self.fault = ""
        for name, member in members:
            extension = name.lower()
            if extension in sample.members or extension in sample.links:
                sample.fault = f"has two members '{extension}'"
            if member.fault:
                sample.fault = f"has a member '{extension}' that {member.fault}"
            if member.link:
                sample.links[extension] = member.link
            if member.position is not None:
                sample.members[extension] = member.position
            if member.content is not None:
                sample.contents[extension] = member.content
        return sample


def _stem(extension: str) -> str:
    """Return what makes an extension that of an image of its own; empty for other extensions."""
    match = _IMAGE.fullmatch(extension)
    words = (match[1] or "").split(".") if match else []
    while words and _AUXILIARY.fullmatch(words[-1]):
        words.pop()
    return ".".join(words)


def _key_fault(key: str, keys: Set[str]) -> str:
    if key in keys:
        return "has the key of an earlier sample"
    if key.startswith(("/", "\\")) or ".." in PurePosixPath(key.replace("\\", "/")).parts:
        return "has a name that leads out of its folder"
    return f"has a name of more than {_MAX_KEY} characters" if len(key) > _MAX_KEY else ""


def _is_padding(start: int, begin: int, end: int) -> bool:
    """Return whether zeros are as long as the end mark of a tar that begins at ``start``."""
    length = end - begin
    multiples = (size for size in _PADDED_SIZES if (end - start) % size == 0)
    return length <= _END_MARK or any(length < size + _END_MARK for size in multiples)


class _Window:
    """Forward-moving window over a file.

    Attributes:
        ahead: Number of bytes of a range request, at least.
    """

    def __init__(self, path: Location) -> None:
        self._path = path
        self._distant: S3Object | None = None
        if isinstance(path, Path):
            with reading(path):
                self.size = path.stat().st_size
        else:
            self._distant = S3Object(path)
            self.size = self._distant.size
        self.ahead = 2 * BLOCK
        self._blocks: Iterator[bytes | bytearray] | None = read_in_order(path)
        self._hash = hashlib.sha256()
        self._start = 0
        self._bytes = b""

    @property
    def is_sequential(self) -> bool:
        """Flag for reading all bytes."""
        return self._blocks is not None

    def skip_contents(self) -> None:
        """Switch a file in S3 to range requests, which skip the bytes between reads."""
        if self._distant is not None:
            self._blocks = None

    def at(self, offset: int, length: int) -> bytes:
        """Return bytes at an offset, at most two pages before the last offset; fewer only at the end."""
        end = min(offset + length, self.size)
        if self._blocks is not None:
            self._advance(self._blocks, offset, end)
        elif self._distant is not None and not self._start <= offset <= end <= self._start + len(self._bytes):
            reached = min(self.size, max(end, offset + self.ahead))
            self._start, self._bytes = offset, bytes(self._distant.read(offset, reached))
        return self._bytes[offset - self._start : end - self._start]

    def reread(self, position: Position) -> bytes:
        """Return the content of an earlier member, outside the window."""
        if not isinstance(self._path, Path):
            return bytes(S3Object(self._path).read(position.offset, position.offset + position.size))
        with reading(self._path), self._path.open("rb") as file:
            file.seek(position.offset)
            return file.read(position.size)

    def digest(self) -> str:
        """Read to the end and return the SHA-256 of all bytes; empty if bytes were skipped."""
        if self._blocks is None:
            return ""
        self.at(self.size, 0)
        return self._hash.hexdigest()

    def _advance(self, blocks: Iterator[bytes | bytearray], offset: int, end: int) -> None:
        retained = [self._bytes]
        reached = self._start + len(self._bytes)
        while reached < end:
            block = next(blocks, None)
            if block is None:
                break
            self._hash.update(block)
            if reached <= offset:
                retained = [b"".join(retained)[-2 * _PAGE :]]
            retained.append(bytes(block))
            reached += len(block)
        if len(retained) > 1:
            self._bytes = b"".join(retained)
            self._start = reached - len(self._bytes)
