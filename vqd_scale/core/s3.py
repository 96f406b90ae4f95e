"""S3 objects (and S3-compatible stores): atomic writes, and reads that resume after a broken connection.

A read is a ranged GET that requires the object version of the first answer (``If-Match``). The length is
checked. After a broken connection, the read resumes at the byte after the last one received. A short read is
never returned.
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
"""Size in bytes of one request of a sequential read; up to `PIECES_AHEAD` further requests are prefetched."""
PIECES_AHEAD = 2

_RECEIVED_AT_ONCE = 1 << 18
_GIVEN_OUT_AT_ONCE = 1 << 22
_PART_BYTES = 64 << 20
_MOST_PARTS = 10_000
_LISTED_AT_ONCE = 1000


@dataclass(frozen=True)
class S3Path:
    """S3 path ``s3://bucket/key`` with the part of the `pathlib.Path` interface that atomic writes need.

    The endpoint may follow as a query: ``s3://bucket/key?endpoint_url=https://…&anonymous=true``. One process
    can thus use several stores, and a reader process needs nothing but the path.
    """

    bucket: str
    key: str
    endpoint: S3Endpoint = field(default=S3Endpoint())

    @classmethod
    def parse(cls, text: str) -> "S3Path":
        """Parse the format that `str` writes.

        Raises:
            ValueError: The text is not an S3 path; the message names the allowed format.
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
        """Part of the key after the last slash."""
        return self.key.rpartition("/")[2]

    @property
    def parent(self) -> "S3Path":
        """Path of the parent folder: the key up to the last slash."""
        return replace(self, key=self.key.rpartition("/")[0])

    def with_name(self, name: str) -> "S3Path":
        """Return the path of another object in the same folder."""
        return self.parent / name

    def with_suffix(self, suffix: str) -> "S3Path":
        """Return the path with its file suffix replaced (or appended, if it has none)."""
        stem, dot, _ = self.name.rpartition(".")
        return self.with_name((stem if dot else self.name) + suffix)

    def exists(self) -> bool:
        """Return whether the object exists; False for folders.

        Raises:
            UserError: The store cannot be reached or refuses.
        """
        return self.endpoint.waited(_size(self)) is not None

    def is_file(self) -> bool:
        """Return whether the object exists; every object is a file."""
        return self.exists()

    def read_bytes(self) -> bytes:
        """Return the object's bytes.

        Raises:
            FileNotFoundError: The object does not exist.
            UserError: The store cannot be reached or refuses.
        """
        found = S3Object(self)
        return bytes(found.read(0, found.size))

    def read_text(self, encoding: str = "utf-8") -> str:
        """Return the object's text.

        Raises:
            FileNotFoundError: The object does not exist.
            UserError: The store cannot be reached or refuses.
        """
        return self.read_bytes().decode(encoding)

    def unlink(self) -> None:
        """Delete the object, if it exists.

        Raises:
            UserError: The store cannot be reached or refuses.
        """
        self.endpoint.waited(_called(self, "deleted", "delete_object", **_place(self)))


class S3Object:
    """Reader of one object; all bytes come from the version of the first answer.

    Args:
        path: Path of the object.
        size: Expected size in bytes; requested from the store if not given.

    Raises:
        FileNotFoundError: The object does not exist.
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
        """Read bytes ``begin`` to ``end - 1``; never a short read.

        Raises:
            FileNotFoundError: The object does not exist.
            UserError: The store cannot be reached or refuses; the size of the object differs from the
                expected one, or the object was replaced since the first answer.
        """
        return self.fetch(begin, end).read(0, end - begin)

    def fetch(self, begin: int, end: int) -> "PartialDownload":
        """Start a `read` in the background; waiting for missing bytes raises the errors of `read`."""
        received = PartialDownload(end - begin)
        received.follow(self.path.endpoint.started(self._receive(begin, end, received)))
        return received

    def blocks(self) -> Iterator[bytes]:
        """Yield all bytes in order, with prefetch; raises what `read` raises."""
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
        # Two concurrent first requests are sent without `If-Match`.
        if self._version != answer["ETag"]:
            raise UserError(f"{self.path}: was replaced while it was read; start again.")


class PartialDownload:
    """Byte range during its download, as the list of received blocks.

    One thread appends, other threads read. Blocks are not joined, which would copy all bytes once more.

    Args:
        size: Size of the range in bytes.
        step: Number of new bytes after which waiting readers are notified; frequent notification slows the
            receiving thread.
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
        """Return the number of bytes received so far."""
        return self._length

    def __iter__(self) -> Iterator[bytes]:
        """Yield the blocks as they arrive; raises the error that ended the download early."""
        position = 0
        for number in itertools.count():
            self._await(position + 1)
            if number == len(self._blocks):
                return
            yield self._blocks[number]
            position += len(self._blocks[number])

    def follow(self, end: "Future[None]") -> None:
        """Set the future of the download; its error is raised to readers that wait for missing bytes."""
        self._end = end
        # Not a bound method: a reference cycle would keep the bytes alive until garbage collection.
        end.add_done_callback(functools.partial(_tell, self._changed))

    def append(self, block: bytes) -> None:
        """Append the next received block."""
        self._starts.append(self._length)
        self._blocks.append(block)
        with self._changed:
            self._length += len(block)
            if self._length >= self._awaited:
                self._awaited = self._size
                self._changed.notify_all()

    def read(self, begin: int, end: int) -> bytes:
        """Return bytes ``begin`` to ``end - 1``, waiting for them; raises the error of a failed download."""
        self._await(end)
        first, last = max(0, bisect_right(self._starts, begin) - 1), bisect_left(self._starts, end)
        return b"".join(
            # A view, so that the bytes are copied only once.
            memoryview(block)[max(0, begin - start) : end - start]
            for block, start in zip(self._blocks[first:last], self._starts[first:last], strict=True)
        )

    def _await(self, length: int) -> None:
        """Wait until ``length`` bytes are received; raises the error if the download failed before."""
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
    """Upload a file atomically: the object appears only when complete.

    Raises:
        UserError: The store cannot be reached or refuses.
    """
    path.endpoint.waited(_write(path, file))


def object_sizes(folder: S3Path) -> dict[str, int]:
    """Return the size in bytes of each object directly in a folder, by name.

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
            # Some tools create an empty object as a folder marker.
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
        # The store would keep the parts of an unfinished upload forever.
        await _called(path, "written", "abort_multipart_upload", **_place(path), **upload)
        raise


async def _sent(path: S3Path, operation: str, content: bytes, **arguments: object) -> Answer:
    """Send bytes with an MD5 digest that the store verifies."""
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
        # The upload is missing if an earlier attempt completed it and the answer was lost.
        if await _size(path) != size:
            raise UserError(f"{path}: its upload was ended by another; write it again.") from None


async def _called(path: S3Path, deed: str, operation: str, **arguments: object) -> Answer:
    return await with_retries(path, deed, lambda: path.endpoint.call(operation, **arguments))


def _place(path: S3Path) -> dict[str, str]:
    return {"Bucket": path.bucket, "Key": path.key}
