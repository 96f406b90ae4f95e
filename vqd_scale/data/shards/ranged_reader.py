"""Reading of shard bytes: in place on a file system; from S3 by prefetched range requests or via the cache.

A piece is a run of consecutive samples fetched by one request. If the buffer can hold the shuffle windows of
all lanes, pieces are large. Otherwise a piece is one sample, so that nothing is fetched twice.
"""

import os
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import numpy as np
from jaxtyping import Int64

from vqd_scale.core.arrays import NDArray
from vqd_scale.core.errors import UserError
from vqd_scale.core.s3 import PIECE_BYTES, PIECES_AHEAD, PartialDownload, S3Object, S3Path
from vqd_scale.data.config import RangedReadConfig
from vqd_scale.data.shards.cache import ShardCache
from vqd_scale.data.shards.shard_index import Shard, ShardSet, changed

TURNS_AHEAD = 8
"""Prefetch distance in batches for pieces of a single sample, if memory allows."""

_PARALLEL_DOWNLOADS = 2

Extents = Int64[NDArray[np.int64], "count 2"]
"""Byte range [begin, end) of each sample of a shard."""


class SampleBytes(Protocol):
    """Reader of the bytes of one shard."""

    def expect(self, sample: int) -> None:
        """Prefetch a sample that will be read soon."""
        ...

    def read(self, sample: int, begin: int, end: int) -> bytes:
        """Return bytes ``begin`` to ``end - 1`` of the shard, all within one sample.

        Raises:
            UserError: The shard is missing or changed; its store cannot be reached.
        """
        ...


class RangedReader:
    """Shard access of one process: read-ahead policy, buffer and cache.

    Args:
        samples: Number of samples fetched by one request.
        turns: Prefetch distance in batches.
        config: Buffer size and cache.
    """

    def __init__(self, samples: int, turns: int, config: RangedReadConfig) -> None:
        self.samples, self.turns = samples, turns
        self._pieces = _Pieces(config.buffer_megabytes << 20)
        self._cache = None if config.cache is None else ShardCache(config.cache)
        self._pool = ThreadPoolExecutor(_PARALLEL_DOWNLOADS)

    @classmethod
    def in_order(cls, shard: Shard) -> "RangedReader":
        """Create a reader for one sequential pass over a shard."""
        samples = max(1, PIECE_BYTES * shard.count // max(1, shard.size))
        # A small buffer releases pieces early: reused memory is much faster than fresh memory.
        memory = RangedReadConfig(buffer_megabytes=(PIECES_AHEAD + 2) * PIECE_BYTES >> 20)
        return cls(samples, PIECES_AHEAD, memory)

    @classmethod
    def in_lanes(
        cls, sets: Sequence[ShardSet], lanes: int, window: int, config: RangedReadConfig
    ) -> "RangedReader":
        """Create a reader for lanes that are read in turn, each shuffled within a window.

        A lane needs buffer space for its current window, the prefetched part of its next window, and the
        pieces that extend beyond both.
        """
        if not any(isinstance(shards.tars, S3Path) for shards in sets):
            return cls(1, 0, config)
        size, count = sum(sum(shards.sizes) for shards in sets), sum(shards.count for shards in sets)
        mean = max(1, size // count)
        lane_capacity = (config.buffer_megabytes << 20) // (lanes * mean)
        samples = max(1, min(window, PIECE_BYTES // mean, (lane_capacity - 2 * window) // 2))
        if config.cache is not None:
            return cls(samples, window, config)
        # One batch less than a window: the next window is requested after the first batch of this one has
        # arrived, so that this batch does not wait for it.
        turns = window - 1 if samples > 1 else max(1, min(TURNS_AHEAD, lane_capacity - 1))
        return cls(samples, turns, config)

    def open(self, shard: Shard, extents: Callable[[], Extents]) -> SampleBytes:
        """Open a shard.

        Args:
            shard: Shard to open.
            extents: Function that returns the byte ranges of the samples; called only for range requests.

        Raises:
            UserError: The shard cannot be read.
        """
        path, cache = shard.path, self._cache
        if not isinstance(path, S3Path):
            try:
                reader = _InPlace(shard, os.open(path, os.O_RDONLY))
            except OSError as error:
                raise UserError(f"{path}: this shard cannot be read ({error.strerror}).") from None
            if reader.size != shard.size:
                raise changed(path, f"it has {reader.size} bytes, not {shard.size}")
            return reader

        def in_pieces() -> SampleBytes:
            return _InPieces(S3Object(path, shard.size, shard.etag), extents(), self.samples, self._pieces)

        def from_cache(cache: ShardCache) -> SampleBytes:
            descriptor = cache.open(shard)
            return in_pieces() if descriptor is None else _InPlace(shard, descriptor)

        return in_pieces() if cache is None else _Awaited(self._pool.submit(from_cache, cache))


class _InPlace:
    """Reader of a shard on a file system."""

    def __init__(self, shard: Shard, descriptor: int) -> None:
        self._shard, self._descriptor = shard, descriptor
        self.size = os.fstat(descriptor).st_size
        weakref.finalize(self, os.close, descriptor)

    def expect(self, sample: int) -> None:
        del sample

    def read(self, sample: int, begin: int, end: int) -> bytes:
        content = os.pread(self._descriptor, end - begin, begin)
        if len(content) != end - begin:
            raise changed(self._shard.path, "it is shorter")
        return content


class _Awaited:
    """Reader of a shard whose download to the cache is pending."""

    def __init__(self, pending: "Future[SampleBytes]") -> None:
        self._pending = pending

    def expect(self, sample: int) -> None:
        if self._pending.done():
            self._pending.result().expect(sample)

    def read(self, sample: int, begin: int, end: int) -> bytes:
        return self._pending.result().read(sample, begin, end)


class _InPieces:
    """Reader of a shard in S3, in runs of samples."""

    def __init__(self, content: S3Object, extents: Extents, samples: int, pieces: "_Pieces") -> None:
        firsts = np.arange(0, len(extents), samples)
        self._content, self._samples, self._pieces = content, samples, pieces
        # A string caches its hash, and every read looks up its piece.
        self._name = str(content.path)
        self._begins: list[int] = np.minimum.reduceat(extents[:, 0], firsts).tolist()
        self._ends: list[int] = np.maximum.reduceat(extents[:, 1], firsts).tolist()

    def expect(self, sample: int) -> None:
        self._piece(sample // self._samples)

    def read(self, sample: int, begin: int, end: int) -> bytes:
        number = sample // self._samples
        start = self._begins[number]
        try:
            if begin < start or end > self._ends[number]:
                # A link to an earlier member.
                return self._content.read(begin, end)
            return self._piece(number).read(begin - start, end - start)
        except FileNotFoundError:
            raise UserError(
                f"{self._content.path}: missing, although the set's index lists it; make the set again."
            ) from None

    def _piece(self, number: int) -> PartialDownload:
        begin, end = self._begins[number], self._ends[number]
        key = self._name, number
        return self._pieces.get(key, end - begin, lambda: self._content.fetch(begin, end))


class _Pieces:
    """LRU buffer of pieces that were fetched or are being fetched."""

    def __init__(self, capacity: int) -> None:
        self._free = capacity
        self._buffer: OrderedDict[tuple[str, int], tuple[int, PartialDownload]] = OrderedDict()

    def get(self, key: tuple[str, int], size: int, fetch: Callable[[], PartialDownload]) -> PartialDownload:
        if key in self._buffer:
            self._buffer.move_to_end(key)
            return self._buffer[key][1]
        self._free -= size
        while self._free < 0 and self._buffer:
            _, (dropped, _) = self._buffer.popitem(last=False)
            self._free += dropped
        self._buffer[key] = size, fetch()
        return self._buffer[key][1]
