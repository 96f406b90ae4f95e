"""Objects in S3 and in whatever speaks its protocol: whole writes, and reads that outlive their connections.

A read is a GET of a range that insists on the version met first (``If-Match``), whose length is checked, and
which goes on at the byte after the last one received when the connection breaks. Nothing short is given out.
"""

import base64
import functools
import hashlib
import itertools
import threading
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path
from urllib.parse import parse_qsl, urlencode

from vqd_scale.core.errors import UserError
from vqd_scale.core.s3_client import Answer, BrokenOffError, S3Endpoint, with_retries

SCHEME = "s3://"

PIECE_BYTES = 32 << 20
"""What is read in order is read in requests of so many bytes, `PIECES_AHEAD` of them at once."""
PIECES_AHEAD = 2

_RECEIVED_AT_ONCE = 1 << 18
_GIVEN_OUT_AT_ONCE = 1 << 22
_PART_BYTES = 64 << 20
_MOST_PARTS = 10_000
_LISTED_AT_ONCE = 1000


@dataclass(frozen=True)
class S3Path:
    """``s3://bucket/key``, with as much of pathlib's `Path`, under its names, as published files need.

    How to reach the store may follow a question mark, so that several stores can be used at once, and a path
    is all that a reading process must be told: ``s3://bucket/key?endpoint_url=https://…&anonymous=true``.
    """

    bucket: str
    key: str
    endpoint: S3Endpoint = field(default=S3Endpoint())

    @classmethod
    def parse(cls, text: str) -> "S3Path":
        """Read what `str` writes.

        Raises:
            ValueError: Not such a path; the message says what is allowed.
        """
        place, _, query = text.removeprefix(SCHEME).partition("?")
        bucket, _, key = place.partition("/")
        if not text.startswith(SCHEME) or not bucket:
            raise ValueError(f"given {text!r}, allowed: s3://bucket/key")
        options = dict(parse_qsl(query, keep_blank_values=True))
        url, profile = options.pop("endpoint_url", None), options.pop("profile", None)
        anonymous = options.pop("anonymous", "false")
        is_url = url is None or url.startswith(("http://", "https://"))
        if options or not is_url or anonymous not in ("true", "false"):
            raise ValueError(
                f"given {text!r}, allowed after the question mark: endpoint_url=http(s)://…, profile=NAME "
                "and anonymous=true, joined by '&'"
            )
        return cls(bucket, key.strip("/"), S3Endpoint(url, profile, anonymous == "true"))

    def __str__(self) -> str:
        options = {
            "endpoint_url": self.endpoint.endpoint_url,
            "profile": self.endpoint.profile,
            "anonymous": "true" if self.endpoint.anonymous else None,
        }
        query = urlencode({name: value for name, value in options.items() if value}, safe=":/")
        return f"{SCHEME}{self.bucket}/{self.key}" + (f"?{query}" if query else "")

    def __truediv__(self, name: str) -> "S3Path":
        return replace(self, key=f"{self.key}/{name}" if self.key else name)

    @property
    def name(self) -> str:
        """What follows the last slash."""
        return self.key.rpartition("/")[2]

    @property
    def parent(self) -> "S3Path":
        """What precedes the last slash."""
        return replace(self, key=self.key.rpartition("/")[0])

    def with_name(self, name: str) -> "S3Path":
        """Another object of the same folder."""
        return self.parent / name

    def with_suffix(self, suffix: str) -> "S3Path":
        """The same name up to its last dot, with another ending."""
        stem, dot, _ = self.name.rpartition(".")
        return self.with_name((stem if dot else self.name) + suffix)

    def exists(self) -> bool:
        """Whether such an object is there; folders do not exist by themselves.

        Raises:
            UserError: The store cannot be reached or refuses.
        """
        return self.endpoint.waited(_size(self)) is not None

    def is_file(self) -> bool:
        """The same: objects are files."""
        return self.exists()

    def read_bytes(self) -> bytes:
        """The object's bytes.

        Raises:
            FileNotFoundError: There is none.
            UserError: The store cannot be reached or refuses.
        """
        found = S3Object(self)
        return bytes(found.read(0, found.size))

    def read_text(self, encoding: str = "utf-8") -> str:
        """The object's text.

        Raises:
            FileNotFoundError: There is none.
            UserError: The store cannot be reached or refuses.
        """
        return self.read_bytes().decode(encoding)

    def unlink(self) -> None:
        """Delete the object; nothing happens where there is none.

        Raises:
            UserError: The store cannot be reached or refuses.
        """
        self.endpoint.waited(_called(self, "deleted", "delete_object", **_place(self)))


class S3Object:
    """The bytes of one object, all of the version that is met first.

    Args:
        path: Where it is.
        size: How many bytes it must have; asked for where not given.

    Raises:
        FileNotFoundError: There is none.
        UserError: The store cannot be reached or refuses.
    """

    def __init__(self, path: S3Path, size: int | None = None) -> None:
        if size is None:
            size = path.endpoint.waited(_size(path))
        if size is None:
            raise FileNotFoundError(f"{path}: there is no such object")
        self.path = path
        self.size = size
        self._version: str | None = None

    def read(self, begin: int, end: int) -> bytes:
        """Bytes ``begin`` to ``end - 1``, all of them.

        Raises:
            FileNotFoundError: There is no such object.
            UserError: The store cannot be reached or refuses; the object has another size than it must have,
                or was replaced since it was met.
        """
        return self.fetch(begin, end).read(0, end - begin)

    def fetch(self, begin: int, end: int) -> "PartialDownload":
        """Start to `read`; what has arrived can be had at once, waiting for more raises what `read` would."""
        received = PartialDownload(end - begin)
        received.follow(self.path.endpoint.started(self._receive(begin, end, received)))
        return received

    def blocks(self) -> Iterator[bytes]:
        """All bytes in order, read ahead; raises what `read` raises."""
        ahead: list[PartialDownload] = []
        for begin in range(0, self.size, PIECE_BYTES):
            ahead.append(self.fetch(begin, min(begin + PIECE_BYTES, self.size)))
            if len(ahead) > PIECES_AHEAD:
                yield from ahead.pop(0)
        while ahead:
            yield from ahead.pop(0)

    async def _receive(self, begin: int, end: int, received: "PartialDownload") -> None:
        async def receive() -> None:
            first = begin + len(received)
            answer = await self._asked(first, end)
            async with answer["Body"] as body:
                self._check(answer, f"bytes {first}-{end - 1}/{self.size}")
                while block := await body.read(min(_RECEIVED_AT_ONCE, end - begin - len(received))):
                    received.append(block)
            if len(received) < end - begin:
                raise BrokenOffError(f"the answer ended after {len(received)} of {end - begin} bytes")

        if end > begin:
            await with_retries(self.path, "read", receive, received.__len__)

    async def _asked(self, begin: int, end: int) -> Answer:
        condition = {} if self._version is None else {"IfMatch": self._version}
        return await self.path.endpoint.call(
            "get_object", **_place(self.path), Range=f"bytes={begin}-{end - 1}", **condition
        )

    def _check(self, answer: Answer, content_range: str) -> None:
        given = answer.get("ContentRange")
        if given != content_range:
            raise UserError(
                f"{self.path}: not as large as expected, or its store does not answer ranged reads: asked "
                f"for '{content_range}', given '{given}'."
            )
        if self._version is None:
            self._version = answer["ETag"]
        # Two first requests at once had no version to insist on.
        if self._version != answer["ETag"]:
            raise UserError(f"{self.path}: was replaced while it was read; start again.")


class PartialDownload:
    """A range of bytes while it is received, in the blocks in which it comes.

    One thread appends, others read. The blocks are not joined, which would touch all of them once more.

    Args:
        size: How many bytes the range has.
        step: Who waits is woken whenever so many more have come; to wake keeps the other from receiving.
    """

    def __init__(self, size: int, step: int = _GIVEN_OUT_AT_ONCE) -> None:
        self._size, self._step = size, step
        self._blocks: list[bytes] = []
        self._starts: list[int] = []
        self._length = 0
        self._awaited = size
        self._changed = threading.Condition()
        self._end: Future[None] = Future()

    def __len__(self) -> int:
        """How many bytes there are by now."""
        return self._length

    def __iter__(self) -> Iterator[bytes]:
        """The blocks, as they come; raises what ended them too early."""
        position = 0
        for number in itertools.count():
            self._await(position + 1)
            if number == len(self._blocks):
                return
            yield self._blocks[number]
            position += len(self._blocks[number])

    def follow(self, end: "Future[None]") -> None:
        """Say what ends when all was received; if it fails, so does waiting for what did not come."""
        self._end = end
        # Not a method of this object: in a circle with it, the bytes would stay until they are looked for.
        end.add_done_callback(functools.partial(_tell, self._changed))

    def append(self, block: bytes) -> None:
        """Add what was received next."""
        self._starts.append(self._length)
        self._blocks.append(block)
        with self._changed:
            self._length += len(block)
            if self._length >= self._awaited:
                self._awaited = self._size
                self._changed.notify_all()

    def read(self, begin: int, end: int) -> bytes:
        """Bytes ``begin`` to ``end - 1`` of the range; waits for them, raises what ended them too early."""
        self._await(end)
        first, last = max(0, bisect_right(self._starts, begin) - 1), bisect_left(self._starts, end)
        return b"".join(
            # A view: the bytes are copied once, be they in one block or in several.
            memoryview(block)[max(0, begin - start) : end - start]
            for block, start in zip(self._blocks[first:last], self._starts[first:last], strict=True)
        )

    def _await(self, length: int) -> None:
        """Wait for so many bytes, or for the end."""
        if self._length >= length:
            return
        enough = min(self._size, -(-length // self._step) * self._step)
        with self._changed:
            while self._length < enough and not self._end.done():
                self._awaited = min(self._awaited, enough)
                self._changed.wait()
        if self._length < length:
            self._end.result()


def _tell(changed: threading.Condition, end: object = None) -> None:
    del end
    with changed:
        changed.notify_all()


def write_object(path: S3Path, file: Path) -> None:
    """Upload a file: the object appears whole, or not at all.

    Raises:
        UserError: The store cannot be reached or refuses.
    """
    path.endpoint.waited(_write(path, file))


def object_sizes(folder: S3Path) -> dict[str, int]:
    """Bytes of each object directly in a folder, by name.

    Raises:
        UserError: The store cannot be reached or refuses.
    """
    return folder.endpoint.waited(_listed(folder))


async def _size(path: S3Path) -> int | None:
    try:
        return int((await _called(path, "found", "head_object", **_place(path)))["ContentLength"])
    except FileNotFoundError:
        return None


async def _listed(folder: S3Path) -> dict[str, int]:
    prefix = f"{folder.key}/" if folder.key else ""
    sizes: dict[str, int] = {}
    following: dict[str, object] = {}
    while True:
        page = await _called(
            folder,
            "listed",
            "list_objects_v2",
            Bucket=folder.bucket,
            Prefix=prefix,
            Delimiter="/",
            **following,
        )
        sizes |= {entry["Key"].removeprefix(prefix): entry["Size"] for entry in page.get("Contents", [])}
        if not page["IsTruncated"]:
            # Some tools keep an empty object in the place of a folder.
            sizes.pop("", None)
            return sizes
        following = {"ContinuationToken": page["NextContinuationToken"]}


async def _write(path: S3Path, file: Path) -> None:
    size = file.stat().st_size
    if size <= _PART_BYTES:
        await _sent(path, "put_object", file.read_bytes())
        return
    created = await _called(path, "written", "create_multipart_upload", **_place(path))
    upload = {"UploadId": created["UploadId"]}
    parts: list[dict[str, object]] = []
    try:
        with file.open("rb") as content:
            while part := content.read(max(_PART_BYTES, -(-size // _MOST_PARTS))):
                number = {"PartNumber": len(parts) + 1}
                sent = await _sent(path, "upload_part", part, **upload, **number)
                parts.append({**number, "ETag": sent["ETag"]})
        await _complete(path, upload, parts, size)
    except BaseException:
        # Else the store would keep the parts, which are no object, for ever.
        await _called(path, "written", "abort_multipart_upload", **_place(path), **upload)
        raise


async def _sent(path: S3Path, operation: str, content: bytes, **arguments: object) -> Answer:
    """Send bytes with a digest that the store checks."""
    digest = base64.b64encode(hashlib.md5(content, usedforsecurity=False).digest()).decode()
    return await _called(
        path, "written", operation, **_place(path), Body=content, ContentMD5=digest, **arguments
    )


async def _complete(path: S3Path, upload: dict[str, str], parts: list[dict[str, object]], size: int) -> None:
    try:
        await _called(
            path,
            "written",
            "complete_multipart_upload",
            **_place(path),
            **upload,
            MultipartUpload={"Parts": parts},
        )
    except FileNotFoundError:
        # The upload is gone. Then an attempt whose answer was lost has completed it.
        if await _size(path) != size:
            raise UserError(f"{path}: its upload was ended by another; write it again.") from None


async def _called(path: S3Path, deed: str, operation: str, **arguments: object) -> Answer:
    return await with_retries(path, deed, lambda: path.endpoint.call(operation, **arguments))


def _place(path: S3Path) -> dict[str, str]:
    return {"Bucket": path.bucket, "Key": path.key}
