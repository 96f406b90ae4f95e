"""S3 objects (and S3-compatible stores): atomic writes, and reads that resume after a broken connection.

A read is a ranged GET that requires the object version of the first response (``If-Match``). The length is
checked. After a broken connection, the read resumes at the byte after the last one received. A short read is
never returned. Each of s3fs's own readers lacks some of this (docs/data.md). s3fs writes, lists and deletes
objects.
"""

import itertools
import threading
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vqd_scale.core.errors import UserError
from vqd_scale.core.s3_endpoint import S3Endpoint

if TYPE_CHECKING:
    from vqd_scale.core.s3_client import S3Client

SCHEME = "s3://"

PIECE_BYTES = 32 << 20
"""Size in bytes of one request of a sequential read; up to `PIECES_AHEAD` further requests are prefetched."""
PIECES_AHEAD = 2

_CHUNK_BYTES = 1 << 18
"""Size in bytes of one read from a connection."""
_NOTIFICATION_BYTES = 1 << 22
"""Number of new bytes after which waiting readers are notified."""


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
        location, _, query = text.removeprefix(SCHEME).partition("?")
        bucket, _, key = location.partition("/")
        if not text.startswith(SCHEME) or not bucket:
            raise ValueError(f"given {text!r}, allowed: s3://bucket/key")
        return cls(bucket, key.strip("/"), S3Endpoint.parse(query))

    def __str__(self) -> str:
        return f"{SCHEME}{self.bucket}/{self.key}{self.endpoint}"

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
        return _head(self) is not None

    is_file = exists
    """Return whether the object exists; every object is a file."""

    def read_bytes(self) -> bytes:
        """Return the object's bytes.

        Raises:
            FileNotFoundError: The object does not exist.
            UserError: The store cannot be reached or refuses.
        """
        reader = S3Object(self)
        return reader.read(0, reader.size)

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
        _client(self).rm_file(f"{self.bucket}/{self.key}")


class S3Object:
    """Reader of one object; all bytes come from the version of the first response.

    Args:
        path: Path of the object.
        size: Expected size in bytes; requested from the store if not given.
        etag: ETag of the expected version; any if not given.

    Raises:
        FileNotFoundError: The object does not exist.
        UserError: The store cannot be reached or refuses.

    Attributes:
        etag: ETag of the version that is read, as soon as it is known.
    """

    def __init__(self, path: S3Path, size: int | None = None, etag: str | None = None) -> None:
        if size is None:
            head = _head(path)
            if head is None:
                raise FileNotFoundError(f"{path}: there is no such object")
            size, etag = int(head["ContentLength"]), str(head["ETag"])
        self.path = path
        self.size = size
        self.etag = etag

    def read(self, begin: int, end: int) -> bytes:
        """Read bytes ``begin`` to ``end - 1``; never a short read.

        Raises:
            FileNotFoundError: The object does not exist.
            UserError: The store cannot be reached or refuses; the size of the object differs from the
                expected one, or the object was replaced since the first response.
        """
        return self.fetch(begin, end).read(0, end - begin)

    def fetch(self, begin: int, end: int) -> "PartialDownload":
        """Start a `read` in the background; waiting for missing bytes raises the errors of `read`."""
        client, download = _client(self.path), PartialDownload(end - begin)
        download.follow(client.start(self._receive(client, begin, end, download)))
        return download

    def blocks(self) -> Iterator[bytes]:
        """Yield all bytes in order, with prefetch; raises what `read` raises."""
        downloads: list[PartialDownload] = []
        for begin in range(0, self.size, PIECE_BYTES):
            downloads.append(self.fetch(begin, min(begin + PIECE_BYTES, self.size)))
            if len(downloads) > PIECES_AHEAD:
                yield from downloads.pop(0)
        while downloads:
            yield from downloads.pop(0)

    async def _receive(self, client: "S3Client", begin: int, end: int, download: "PartialDownload") -> None:
        from vqd_scale.core.s3_client import IncompleteReadError

        async def attempt() -> None:
            offset = begin + len(download)
            condition = {} if self.etag is None else {"IfMatch": self.etag}
            response = await client.request(
                "get_object", **_arguments(self.path), Range=f"bytes={offset}-{end - 1}", **condition
            )
            async with response["Body"] as body:
                self._check(response, f"bytes {offset}-{end - 1}/{self.size}")
                while chunk := await body.read(min(_CHUNK_BYTES, end - begin - len(download))):
                    download.append(chunk)
            if len(download) < end - begin:
                raise IncompleteReadError(actual_bytes=len(download), expected_bytes=end - begin)

        if end > begin:
            await client.with_retries(self.path, "read", attempt, download.__len__)

    def _check(self, response: dict[str, Any], expected_range: str) -> None:
        content_range, etag = response.get("ContentRange"), response["ETag"]
        if content_range != expected_range:
            raise UserError(
                f"{self.path}: not as large as expected, or its store does not answer ranged reads: asked "
                f"for '{expected_range}', given '{content_range}'."
            )
        if self.etag is None:
            self.etag = etag
        # Two concurrent first requests are sent without `If-Match`.
        if self.etag != etag:
            raise UserError(f"{self.path}: was replaced while it was read; start again.")


class PartialDownload:
    """Byte range during its download, as the list of received blocks.

    One thread appends, other threads read. Blocks are not joined, which would copy all bytes once more.

    Args:
        size: Size of the range in bytes.
        step: Number of new bytes after which waiting readers are notified; frequent notification slows the
            receiving thread.
    """

    def __init__(self, size: int, step: int = _NOTIFICATION_BYTES) -> None:
        self._size, self._step = size, step
        self._blocks: list[bytes] = []
        self._starts: list[int] = []
        self._length = 0
        self._notified_length = size
        self._condition = threading.Condition()
        self._future: Future[None] = Future()

    def __len__(self) -> int:
        """Return the number of bytes received so far."""
        return self._length

    def __iter__(self) -> Iterator[bytes]:
        """Yield the blocks as they arrive; raises the error that ended the download early."""
        position = 0
        for index in itertools.count():
            self._wait(position + 1)
            if index == len(self._blocks):
                return
            yield self._blocks[index]
            position += len(self._blocks[index])

    def follow(self, future: "Future[None]") -> None:
        """Set the future of the download; its error is raised to readers that wait for missing bytes."""
        self._future, condition = future, self._condition

        # Not a bound method: a reference cycle would keep the bytes alive until garbage collection.
        def notify(_: object) -> None:
            with condition:
                condition.notify_all()

        future.add_done_callback(notify)

    def append(self, block: bytes) -> None:
        """Append the next received block."""
        self._starts.append(self._length)
        self._blocks.append(block)
        with self._condition:
            self._length += len(block)
            if self._length >= self._notified_length:
                self._notified_length = self._size
                self._condition.notify_all()

    def read(self, begin: int, end: int) -> bytes:
        """Return bytes ``begin`` to ``end - 1``, waiting for them; raises the error of a failed download."""
        self._wait(end)
        first, last = max(0, bisect_right(self._starts, begin) - 1), bisect_left(self._starts, end)
        return b"".join(
            # A view, so that the bytes are copied only once.
            memoryview(block)[max(0, begin - start) : end - start]
            for block, start in zip(self._blocks[first:last], self._starts[first:last], strict=True)
        )

    def _wait(self, length: int) -> None:
        """Wait until ``length`` bytes are received; raises the error if the download failed before."""
        if self._length >= length:
            return
        rounded_length = min(self._size, -(-length // self._step) * self._step)
        with self._condition:
            while self._length < rounded_length and not self._future.done():
                self._notified_length = min(self._notified_length, rounded_length)
                self._condition.wait()
        if self._length < length:
            self._future.result()


def write_object(path: S3Path, file: Path) -> None:
    """Upload a file atomically: the object appears only when complete.

    Raises:
        UserError: The store cannot be reached or refuses.
    """
    try:
        # Parts that are sent after a failed one would outlive the upload.
        _client(path).put_file(str(file), f"{path.bucket}/{path.key}", max_concurrency=1)
    except FileNotFoundError:
        # The upload is missing if an earlier attempt completed it and the response was lost.
        head = _head(path)
        if head is None or int(head["ContentLength"]) != file.stat().st_size:
            raise UserError(f"{path}: another client ended its upload; write it again.") from None


def object_sizes(folder: S3Path) -> dict[str, int]:
    """Return the size in bytes of each object directly in a folder, by name.

    Raises:
        UserError: The store cannot be reached or refuses.
    """
    return _client(folder).object_sizes(folder.bucket, f"{folder.key}/" if folder.key else "")


def _client(path: S3Path) -> "S3Client":
    # Imported here because the import takes half a second, which users without S3 should not pay.
    from vqd_scale.core.s3_client import client_of

    return client_of(path.endpoint)


def _head(path: S3Path) -> dict[str, Any] | None:
    try:
        return _client(path).call_s3("head_object", **_arguments(path))
    except FileNotFoundError:
        return None


def _arguments(path: S3Path) -> dict[str, str]:
    return {"Bucket": path.bucket, "Key": path.key}
