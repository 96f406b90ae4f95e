"""The one training loop."""

import json
import logging
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Generic, cast

import torch
from torch import Tensor
from tqdm import tqdm

from vqd_scale.core.config import read_yaml, to_yaml
from vqd_scale.core.errors import UserError
from vqd_scale.core.progress import progress_bar
from vqd_scale.core.stop import StopFlag
from vqd_scale.core.store import publish_text
from vqd_scale.core.world import World
from vqd_scale.data.stream import Stream
from vqd_scale.training.checkpoint import Checkpoints, consolidated
from vqd_scale.training.config import RunConfig
from vqd_scale.training.ema import EMA
from vqd_scale.training.engine import Engine
from vqd_scale.training.metrics import MetricsFile
from vqd_scale.training.optim import LearningRate
from vqd_scale.training.task import BatchType, Task

logger = logging.getLogger(__name__)

_CHANGEABLE = (
    "images.",
    "checkpoint.",
    "log.",
    "engine.zero.",
    "engine.accumulation.",
    "engine.persistence_threshold.",
    "engine.bucket_elements.",
    "data.workers.",
    "data.prefetch.",
    "data.max_bad_share.",
)
"""Keys, or beginnings of keys, that may differ when a run goes on: where it ends, how it is spread."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        images: Images seen.
        stopped: Whether a signal ended it early; started again it goes on.
    """

    images: int
    stopped: bool


def train(task: Task[BatchType], config: RunConfig, world: World, title: str) -> Outcome:
    """Train to the configured end, from the newest whole checkpoint if the run has one.

    Args:
        task: What is trained.
        config: The run.
        world: This process's place among the ranks.
        title: What the progress bar says.

    Raises:
        UserError: The folder holds another run, a loss is not finite, the disk is full, data are unusable.
    """
    batch = config.data.lanes
    parts = world.size * config.engine.accumulation
    if batch % parts:
        raise UserError(
            f"data.lanes: a global batch of {batch} cannot be cut into {world.size} ranks times "
            f"{config.engine.accumulation} parts; choose a multiple of {parts}."
        )
    if world.is_first:
        _claim(config.run, config)
    world.barrier()
    engine = Engine(task.module, config.engine, config.optim, batch, world, task.units)
    ema = EMA(config.ema, engine.partition)
    checkpoints = Checkpoints(config.run / "checkpoints", config.checkpoint, engine.partition, ema, world)
    try:
        images = _resume(task, checkpoints, world)
        trainer = _Trainer(task, config, world, engine, ema, checkpoints, images)
        outcome = trainer.run(title)
        checkpoints.wait()
    finally:
        checkpoints.close()
    if not outcome.stopped and world.is_first:
        newest = config.run / "checkpoints" / f"{outcome.images:012d}"
        task.export(consolidated(newest, "ema"), config.run / "export")
    world.barrier()
    return outcome


def _resume(task: Task[BatchType], checkpoints: Checkpoints, world: World) -> int:
    restored = checkpoints.resume()
    if restored is None:
        # Fail now, not after hours, if a checkpoint cannot be written.
        checkpoints.save(0, task.state())
        checkpoints.wait()
        return 0
    task.load_state(restored.state)
    if world.is_first:
        logger.info("going on from the checkpoint at %d images, the newest whole one", restored.images)
    return restored.images


def _claim(folder: Path, config: RunConfig) -> None:
    """Write the resolved configuration into the run's folder, or see that it holds this very run."""
    path = folder / "config.yaml"
    if path.exists():
        theirs = dict(_leaves(read_yaml(path)))
        ours = dict(_leaves(config.model_dump(mode="json")))
        for key in sorted(theirs.keys() | ours.keys()):
            if theirs.get(key) != ours.get(key) and not f"{key}.".startswith(_CHANGEABLE):
                raise UserError(
                    f"{folder}: holds a run with another '{key}' ({json.dumps(theirs.get(key))[:200]} there, "
                    f"{json.dumps(ours.get(key))[:200]} here); choose another run folder, or delete it."
                )
    publish_text(path, to_yaml(config))


def _leaves(values: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """The values of nested mappings under their dotted keys."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(cast(Mapping[str, Any], value), f"{path}{key}.")
        else:
            yield f"{path}{key}", value


class _Trainer(Generic[BatchType]):
    """The state of a run between two steps."""

    def __init__(
        self,
        task: Task[BatchType],
        config: RunConfig,
        world: World,
        engine: Engine,
        ema: EMA,
        checkpoints: Checkpoints,
        images: int,
    ) -> None:
        self.task = task
        self.config = config
        self.world = world
        self.engine = engine
        self.ema = ema
        self.checkpoints = checkpoints
        self.images = images
        self.batch = config.data.lanes
        self.rate = LearningRate(config.optim, self.batch, config.images)
        self.stop = StopFlag()
        self.report = _Report(config, world, images)

    def run(self, title: str) -> Outcome:
        if self.images >= self.config.images:
            return Outcome(self.images, stopped=False)
        stream = Stream(
            self.config.data,
            self.task.samples(),
            seed=self.config.seed,
            rank=self.world.rank,
            ranks=self.world.size,
            cursor=self.images,
            quarantine=self.config.run / f"quarantine-{self.world.rank:05d}.jsonl",
        )
        bar = progress_bar(
            title, self.config.images, done=self.images, unit="img", quiet=not self.world.is_first
        )
        with closing(iter(stream)) as batches, bar:
            return self._run(batches, bar)

    def _run(self, batches: Iterator[BatchType], bar: "tqdm[Any]") -> Outcome:
        self.report.start()
        while self.images < self.config.images:
            batch = self.report.waited_for(batches)
            stopping = self._step(batch)
            self.images += self.batch
            self.ema.update(self.images, self.batch)
            self.task.stepped(self.images)
            bar.update(self.batch)
            if _crosses(self.images, self.batch, self.config.log.every):
                bar.set_postfix(loss=f"{self.report.write(self.images, self.engine):.4f}", refresh=False)
            if stopping or self._checkpoint_is_due():
                self.checkpoints.save(self.images, self.task.state())
            if stopping:
                return Outcome(self.images, stopped=True)
        return Outcome(self.images, stopped=False)

    def _checkpoint_is_due(self) -> bool:
        return self.images >= self.config.images or _crosses(
            self.images, self.batch, self.config.checkpoint.every
        )

    def _step(self, batch: BatchType) -> bool:
        """One optimizer step; returns whether any rank was asked to stop."""
        parts = self.config.engine.accumulation
        rate = self.rate.at(self.images)
        valid = torch.zeros(())
        stopping = False
        for part in _split(batch, parts):
            losses = self.task.losses(self.engine, part, self.images)
            total = torch.where(part.valid.to(self.world.device), losses.per_sample, 0.0).sum()
            bad = ~losses.per_sample.detach().isfinite().cpu() & part.valid
            # All that ranks must agree on goes into one message: each is a wait for the slowest.
            said = torch.stack([batch.valid.sum(), bad.sum(), torch.tensor(self.stop.requested)]).double()
            valid, bad_anywhere, stops = self.world.sum(said.to(self.world.device))
            stopping = stopping or bool(stops)
            if bad_anywhere:
                self._refuse(bad, part)
            # The engine averages over ranks and parts; what is wanted is the mean over valid samples.
            self.engine.backward(total * (self.world.size * parts) / valid.clamp(min=1).to(total))
            self.engine.step(rate)
            self.report.add(total.detach(), losses.statistics)
        self.report.add_step(valid, rate)
        return stopping

    def _refuse(self, bad: Tensor, batch: BatchType) -> None:
        """Stop before the optimizer eats a loss that is not finite; DeepSpeed alone would say nothing."""
        slots = batch.slots[bad].tolist()[:4]
        whose = f"slots {slots} on rank {self.world.rank}" if slots else "another rank's samples"
        raise UserError(
            f"{self.config.run}: after {self.images} images the loss of {whose} is not finite; lower "
            f"optim.lr or lengthen optim.warmup and start again, it goes on from the last checkpoint."
        )


class _Report:
    """Sums between two rows of metrics, brought together over ranks only when a row is due."""

    def __init__(self, config: RunConfig, world: World, images: int) -> None:
        self.world = world
        self.file = MetricsFile(config.run / "metrics.jsonl", images) if world.is_first else None
        self.start()

    def start(self) -> None:
        self.sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros(2, dtype=torch.float64))
        self.valid = torch.zeros(())
        self.rate = 0.0
        self.waited = 0.0
        self.since = time.monotonic()

    def waited_for(self, batches: Iterator[BatchType]) -> BatchType:
        before = time.monotonic()
        batch = next(batches)
        self.waited += time.monotonic() - before
        return batch

    def add(self, loss: Tensor, statistics: Mapping[str, Tensor]) -> None:
        self.sums["loss"] = self.sums["loss"] + torch.stack([loss, loss.new_zeros(())]).double().cpu()
        for name, value in statistics.items():
            self.sums[name] = self.sums[name] + value.double().cpu()

    def add_step(self, valid: Tensor, rate: float) -> None:
        self.valid = self.valid + valid.cpu()
        self.rate = rate

    def write(self, images: int, engine: Engine) -> float:
        """Write the row that is due; returns the mean loss since the last one."""
        names = sorted(self.sums)
        totals = self.world.sum(torch.stack([self.sums[name] for name in names]).to(self.world.device)).cpu()
        valid = float(self.valid)
        seconds = time.monotonic() - self.since
        means = {
            name: float(total / (valid if name == "loss" else count))
            for name, (total, count) in zip(names, totals, strict=True)
            if name == "loss" or count > 0
        }
        row = {
            "images": images,
            **means,
            "learning_rate": self.rate,
            "gradient_norm": engine.gradient_norm,
            "images_per_second": valid / seconds,
            "data_wait_share": self.waited / seconds,
        }
        if self.file is not None:
            self.file.write(row)
        self.start()
        return means["loss"]


def _crosses(images: int, batch: int, period: int) -> bool:
    """Whether a multiple of the period lies within the last batch."""
    return images // period > (images - batch) // period


def _split(batch: BatchType, parts: int) -> list[BatchType]:
    """A batch cut into parts of equal size, in order."""
    size = len(batch.valid) // parts
    return [
        type(batch)(**{field.name: _rows(getattr(batch, field.name), start, size) for field in fields(batch)})
        for start in range(0, parts * size, size)
    ]


def _rows(value: Any, start: int, size: int) -> Any:  # noqa: ANN401 - the type of a batch's field
    return None if value is None else value[start : start + size]
