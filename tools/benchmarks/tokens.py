"""The token half of the loader's benchmark: batches of codes, caption ids and keys."""

import functools
import itertools
import tempfile
import time
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from benchmarks.webdataset_baseline import plain_token_batches
from jaxtyping import Int64

from vqd_scale.core.arrays import NDArray
from vqd_scale.core.progress import progress
from vqd_scale.core.rng import Purpose, integers
from vqd_scale.data.config import StreamConfig
from vqd_scale.data.loading.batch import TokenBatch
from vqd_scale.data.loading.sample_readers import TokenSamples
from vqd_scale.data.loading.stream import Stream
from vqd_scale.data.shards.shard_index import ShardSet
from vqd_scale.data.shards.shard_io import KEY, Sample, ShardRecipe, shard_name, write_shard_set

Ids = Int64[NDArray[np.int64], " length"]


@dataclass(frozen=True)
class TokenProblem:
    """Token shards as written by `tokenize_shards.py` for images of 256 pixels.

    Attributes:
        shards: Number of shards.
        samples: Samples per shard.
        length: Codes per image.
        codes: Size of the codebook.
        text_length: Ids per caption.
        batch: Samples per batch.
    """

    shards: int = 16
    samples: int = 1000
    length: int = 1024
    codes: int = 2887
    text_length: int = 77
    batch: int = 128

    def write(self, folder: Path) -> ShardSet:
        """Write the shards."""
        recipes = [
            ShardRecipe(shard_name(number), self.samples, functools.partial(self._shard, number))
            for number in range(self.shards)
        ]
        return write_shard_set(folder, {"content": "tokens"}, recipes, "writing tokens")

    def arrays(self, number: int) -> tuple[Ids, Ids]:
        """Return a sample's codes and caption ids."""
        words = integers(0, Purpose.EVALUATION, number, self.length + self.text_length)
        return words[: self.length] % self.codes, words[self.length :] % 49_408

    def _shard(self, shard: int) -> Iterator[Sample]:
        for number in range(shard * self.samples, (shard + 1) * self.samples):
            tokens, text = self.arrays(number)
            yield {
                KEY: f"{number:09d}",
                "json": {"source": f"{number:09d}.jpg"},
                "text.npy": text.astype(np.int32),
                "tokens.npy": tokens.astype(np.uint16),
                "txt": f"picture {number}",
            }


def token_batches(problem: TokenProblem, folder: Path, workers: int) -> Generator[TokenBatch]:
    """Return the package's stream, with its readers in a thread of this process or in processes."""
    config = StreamConfig(path=folder, global_batch_size=problem.batch, num_workers=workers)
    kind = TokenSamples(problem.length, problem.codes, problem.text_length)
    stream: Stream[TokenBatch] = Stream(
        config, kind, seed=0, rank=0, ranks=1, cursor=0, quarantine=folder / "quarantine.jsonl"
    )
    return iter(stream)


def token_figures(rounds: int, problem: TokenProblem, workers: tuple[int, ...] = (0, 1, 2)) -> dict[str, Any]:
    """Measure token samples per second by number of reader processes, and of webdataset's pipeline.

    A reader thread and webdataset use one core; reader processes use two.
    Samples for each second that this process computes, its reader in a thread, are told beside them: a
    machine that does other work as well changes them little.

    Args:
        rounds: How often each is timed over as many samples as an epoch has, in turn; the median counts.
        problem: The sizes.
        workers: Numbers of reading processes, the first of them 0, a thread.

    Raises:
        ValueError: A sample is not what was written.
    """
    with tempfile.TemporaryDirectory(prefix="vqd-scale-") as temporary:
        folder = Path(temporary)
        shards = problem.write(folder)
        speeds: dict[str, list[float]] = {str(number): [] for number in workers} | {"alternative": []}
        per_processor_second: list[float] = []
        for number in workers:
            check_tokens(problem, folder, number)
        for _ in progress(range(rounds), "tokens", rounds):
            for number in workers:
                speed, by_processor = _speed(problem, folder, number)
                speeds[str(number)].append(speed)
                if number == 0:
                    per_processor_second.append(by_processor)
            started = time.perf_counter()
            tars = [shard.path for shard in shards.shards if isinstance(shard.path, Path)]
            count = sum(len(keys) for keys, _, _ in plain_token_batches(tars, problem.batch))
            speeds["alternative"].append(count / (time.perf_counter() - started))
    medians = {name: median(values) for name, values in speeds.items()}
    return {
        "token_samples_per_second": round(max(medians[str(number)] for number in workers)),
        "token_samples_per_second_by_workers": {str(n): round(medians[str(n)]) for n in workers},
        "token_samples_per_second_of_webdataset": round(medians["alternative"]),
        "token_samples_per_processor_second": round(median(per_processor_second)),
        "token_ratio": round(medians[str(workers[0])] / medians["alternative"], 2),
        "token_shape": [problem.shards, problem.samples, problem.length, problem.text_length, problem.batch],
        "token_rounds": {name: [round(value) for value in values] for name, values in speeds.items()},
    }


def check_tokens(problem: TokenProblem, folder: Path, workers: int) -> None:
    """See that an epoch is every sample once, and each what was written.

    Raises:
        ValueError: It is not.
    """
    total = problem.shards * problem.samples
    keys: list[str] = []
    with closing(token_batches(problem, folder, workers)) as batches:
        for batch in itertools.islice(batches, -(-total // problem.batch)):
            keys.extend(batch.keys)
            for key, tokens, text in zip(batch.keys, batch.tokens.numpy(), batch.text.numpy(), strict=True):
                codes, ids = problem.arrays(int(key))
                if not (np.array_equal(tokens, codes) and np.array_equal(text, ids)):
                    raise ValueError(f"sample {key} is not what was written")
    if sorted(keys[:total]) != [f"{number:09d}" for number in range(total)]:
        raise ValueError("an epoch does not hold every sample once")


def _speed(problem: TokenProblem, folder: Path, workers: int) -> tuple[float, float]:
    """Samples a second over an epoch once the readers are there, and for each that this process computes."""
    count = problem.shards * problem.samples // problem.batch
    with closing(token_batches(problem, folder, workers)) as batches:
        # Batches that were prefetched between timings must not count.
        for _ in itertools.islice(batches, 32):
            pass
        started, computed = time.perf_counter(), time.process_time()
        for _ in itertools.islice(batches, count):
            pass
        samples = count * problem.batch
        return samples / (time.perf_counter() - started), samples / (time.process_time() - computed)
