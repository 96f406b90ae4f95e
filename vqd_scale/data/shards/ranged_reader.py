"""The bytes of shards: those of a file system are read in place, those of S3 in pieces and ahead, or kept.

A piece is a run of samples that one request brings. Pieces are large where a process reads on through a shard
and can hold what its lanes shuffle; where it cannot, a piece is one sample, and nothing is fetched twice.
"""

import os
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from jaxtyping import Int64
from pydantic import Field

from vqd_scale.core.arrays import NDArray
from vqd_scale.core.config import Config
from vqd_scale.core.errors import UserError
from vqd_scale.core.s3 import PIECE_BYTES, PIECES_AHEAD, PartialDownload, S3Object, S3Path
from vqd_scale.data.shards.cache import CacheConfig, ShardCache
from vqd_scale.data.shards.shard_index import Shard, ShardSet

TURNS_AHEAD = 8
"""So many batches before it is due a single sample is asked for, if memory allows."""

_KEPT_AT_ONCE = 2

Extents = Int64[NDArray[np.int64], "count 2"]
"""For each sample of a shard its first byte and the one after its last."""


class RangedReadConfig(Config):
    """How shards in S3 are read; others are read where they are.

    Attributes:
        buffer_megabytes: Memory for what was read ahead, per reading process.
        cache: Keep whole shards on this machine's disk; for sets that are read more than once.
    """

    buffer_megabytes: int = Field(default=512, ge=1)
    cache: CacheConfig | None = None


class SampleBytes(Protocol):
    """The bytes of one shard."""

    def expect(self, sample: int) -> None:
        """Say that a sample will be read soon."""
        ...

    def read(self, sample: int, begin: int, end: int) -> bytes:
        """Bytes ``begin`` to ``end - 1`` of the shard, all within a sample.

        Raises:
            UserError: The shard is missing or not what it was; its store cannot be reached.
        """
        ...


@dataclass(frozen=True)
class ReadAheadPolicy:
    """In which steps a process reads distant shards.

    Attributes:
        samples: How many are fetched by one request.
        turns: How many batches before they are due.
    """

    samples: int
    turns: int


class RangedReader:
    """How one process reads shards: its steps, its memory, and what the machine keeps.

    Args:
        tempo: The steps.
        config: Memory and cache.
    """

    def __init__(self, tempo: ReadAheadPolicy, config: RangedReadConfig) -> None:
        self.tempo = tempo
        self._pieces = _Pieces(config.buffer_megabytes << 20)
        self._cache = None if config.cache is None else ShardCache(config.cache)
        self._pool = ThreadPoolExecutor(_KEPT_AT_ONCE)

    @classmethod
    def in_order(cls, shard: Shard) -> "RangedReader":
        """For a shard that is read once, from its first sample to its last."""
        samples = max(1, PIECE_BYTES * shard.count // max(1, shard.size))
        # What was read is let go early: memory that was used before is much faster than fresh memory.
        memory = RangedReadConfig(buffer_megabytes=(PIECES_AHEAD + 2) * PIECE_BYTES >> 20)
        return cls(ReadAheadPolicy(samples, PIECES_AHEAD), memory)

    @classmethod
    def in_lanes(
        cls, sets: Sequence[ShardSet], lanes: int, window: int, config: RangedReadConfig
    ) -> "RangedReader":
        """For lanes of some sets that are read in turn, each shuffled within a window.

        What a lane needs at one time is its window, the next one as far as it is read ahead, and the ends of
        the pieces that reach over them.
        """
        if not any(isinstance(shards.tars, S3Path) for shards in sets):
            return cls(ReadAheadPolicy(1, 0), config)
        size, count = sum(sum(shards.sizes) for shards in sets), sum(shards.count for shards in sets)
        mean = max(1, size // count)
        each = (config.buffer_megabytes << 20) // (lanes * mean)
        samples = max(1, min(window, PIECE_BYTES // mean, (each - 2 * window) // 2))
        if config.cache is not None:
            return cls(ReadAheadPolicy(samples, window), config)
        # A window ahead but one batch: the next one is asked for when the first batch of this one
        # has come, which does not wait for it.
        turns = window - 1 if samples > 1 else max(1, min(TURNS_AHEAD, each - 1))
        return cls(ReadAheadPolicy(samples, turns), config)

    def open(self, shard: Shard, extents: Callable[[], Extents]) -> SampleBytes:
        """Open a shard.

        Args:
            shard: The shard.
            extents: Where its samples lie; asked for where pieces are read.

        Raises:
            UserError: The shard cannot be read.
        """
        path, cache = shard.path, self._cache
        if not isinstance(path, S3Path):
            try:
                return _InPlace(shard, os.open(path, os.O_RDONLY))
            except OSError as error:
                raise UserError(f"{path}: this shard cannot be read ({error.strerror}).") from None

        def in_pieces() -> SampleBytes:
            return _InPieces(S3Object(path, shard.size), extents(), self.tempo.samples, self._pieces)

        def kept(cache: ShardCache) -> SampleBytes:
            descriptor = cache.open(shard)
            return in_pieces() if descriptor is None else _InPlace(shard, descriptor)

        return in_pieces() if cache is None else _Awaited(self._pool.submit(kept, cache))


class _InPlace:
    """A shard on a file system."""

    def __init__(self, shard: Shard, descriptor: int) -> None:
        self._shard, self._descriptor = shard, descriptor
        weakref.finalize(self, os.close, descriptor)

    def expect(self, sample: int) -> None:
        del sample

    def read(self, sample: int, begin: int, end: int) -> bytes:
        content = os.pread(self._descriptor, end - begin, begin)
        if len(content) != end - begin:
            raise UserError(f"{self._shard.path}: shorter than its table says; make or fetch it again.")
        return content


class _Awaited:
    """A shard that this machine is fetching."""

    def __init__(self, kept: "Future[SampleBytes]") -> None:
        self._kept = kept

    def expect(self, sample: int) -> None:
        if self._kept.done():
            self._kept.result().expect(sample)

    def read(self, sample: int, begin: int, end: int) -> bytes:
        return self._kept.result().read(sample, begin, end)


class _InPieces:
    """A shard in S3, read in runs of samples."""

    def __init__(self, content: S3Object, extents: Extents, samples: int, pieces: "_Pieces") -> None:
        firsts = np.arange(0, len(extents), samples)
        self._content, self._samples, self._pieces = content, samples, pieces
        # A string, which knows its hash: every read of every sample looks its piece up.
        self._name = str(content.path)
        self._begins: list[int] = np.minimum.reduceat(extents[:, 0], firsts).tolist()
        self._ends: list[int] = np.maximum.reduceat(extents[:, 1], firsts).tolist()

    def expect(self, sample: int) -> None:
        self._piece(sample // self._samples)

    def read(self, sample: int, begin: int, end: int) -> bytes:
        number = sample // self._samples
        start = self._begins[number]
        try:
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
    """Pieces that were fetched or are being fetched; those asked for longest ago make room for others."""

    def __init__(self, capacity: int) -> None:
        self._free = capacity
        self._kept: OrderedDict[tuple[str, int], tuple[int, PartialDownload]] = OrderedDict()

    def get(self, key: tuple[str, int], size: int, fetch: Callable[[], PartialDownload]) -> PartialDownload:
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key][1]
        self._free -= size
        while self._free < 0 and self._kept:
            _, (dropped, _) = self._kept.popitem(last=False)
            self._free += dropped
        self._kept[key] = size, fetch()
        return self._kept[key][1]
