"""Training loop of all tasks."""

import json
import logging
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, NoReturn, cast

import torch
from torch import Tensor
from tqdm import tqdm

from vqd_scale.core.atomic_io import publish_json, publish_text
from vqd_scale.core.config import read_yaml, to_yaml
from vqd_scale.core.errors import UserError
from vqd_scale.core.nested import leaves
from vqd_scale.core.progress import progress_bar
from vqd_scale.core.provenance import modified_files, provenance
from vqd_scale.core.signals import StopFlag
from vqd_scale.core.world import World
from vqd_scale.data.loading.batch import BatchType
from vqd_scale.data.loading.stream import Stream
from vqd_scale.nn.flops import peak_flops
from vqd_scale.training.checkpoint.manager import Checkpoints, Restored, consolidated
from vqd_scale.training.config import RunConfig
from vqd_scale.training.ema import EMA
from vqd_scale.training.engine import Engine
from vqd_scale.training.health import (
    GradientProbe,
    SpikeGuard,
    Watchdog,
    check_losses,
    check_weights,
    ranks_of_bad_gradient,
)
from vqd_scale.training.logging.aggregator import MetricAggregator
from vqd_scale.training.logging.sample_images import draw_pictures, whole_parameters
from vqd_scale.training.optim import LearningRate
from vqd_scale.training.tasks.base import Losses, Task
from vqd_scale.training.validation import ValidationSet

logger = logging.getLogger(__name__)

_CHANGEABLE = (
    "total_images.",
    "checkpoint.",
    "log.",
    "health.",
    "validation.",
    "sample_images.",
    "engine.zero.",
    "engine.gradient_accumulation_steps.",
    "engine.param_persistence_threshold.",
    "engine.bucket_size.",
    "engine.compile.",
    "engine.deterministic.",
    "denoiser.attention.",
    "denoiser.gradient_checkpointing.",
    "network.attention.",
    "data.num_workers.",
    "data.prefetch_batches.",
    "data.max_bad_fraction.",
    "data.ranged_reads.",
)
"""Configuration keys, or key prefixes, that may change when a run resumes."""


@dataclass(frozen=True)
class RunResult:
    """Result of a run.

    Attributes:
        images: Images seen.
        stopped: ``True`` if a signal ended the run early; a restart resumes it.
    """

    images: int
    stopped: bool


def train(task: Task[BatchType], config: RunConfig, world: World, title: str) -> RunResult:
    """Train to the configured end, resuming from the newest valid checkpoint if there is one.

    Args:
        task: Training task.
        config: Run configuration.
        world: This process's rank and device.
        title: Title of the progress bar.

    Raises:
        UserError: The folder contains another run, a loss is not finite, the disk is full, or the data are
            unusable.
    """
    batch = config.data.global_batch_size
    parts = world.size * config.engine.gradient_accumulation_steps
    if batch % parts:
        raise UserError(
            f"data.global_batch_size: a global batch of {batch} cannot be cut into {world.size} ranks times "
            f"{config.engine.gradient_accumulation_steps} parts; choose a multiple of {parts}."
        )
    world.on_first_rank(lambda: _lock_run_folder(config.run, config))
    trainer = _Trainer(task, config, world)
    try:
        outcome = trainer.run(title)
    finally:
        trainer.close()
    if not outcome.stopped:
        newest = config.run / "checkpoints" / f"{outcome.images:012d}"
        world.on_first_rank(lambda: task.export(consolidated(newest, "ema"), config.run / "export"))
    return outcome


def _lock_run_folder(folder: Path, config: RunConfig) -> None:
    """Check that the run folder contains no other run, then write the resolved configuration to it."""
    path = folder / "config.yaml"
    if path.exists():
        theirs = dict(leaves(read_yaml(path)))
        ours = dict(leaves(config.model_dump(mode="json")))
        for key in sorted(theirs.keys() | ours.keys()):
            if theirs.get(key) != ours.get(key) and not f"{key}.".startswith(_CHANGEABLE):
                raise UserError(
                    f"{folder}: holds a run with another '{key}' ({json.dumps(theirs.get(key))[:200]} there, "
                    f"{json.dumps(ours.get(key))[:200]} here); choose another run folder, or delete it."
                )
    publish_text(path, to_yaml(config))
    publish_json(folder / "environment.json", {**provenance(), "modified_files": modified_files()})


class _Trainer(Generic[BatchType]):
    """State of a run between two steps."""

    def __init__(self, task: Task[BatchType], config: RunConfig, world: World) -> None:
        self.task = task
        self.config = config
        self.world = world
        self.batch = config.data.global_batch_size
        self.images = 0
        self.probe = GradientProbe(task.module)
        self.engine = Engine(task.module, config.engine, config.optim, self.batch, world, task.units)
        self.ema = EMA(config.ema, self.engine.partition)
        self.rate = LearningRate(config.optim, self.batch, config.total_images)
        spike = config.health.spike
        self.guard = SpikeGuard(spike, self.batch) if spike is not None else None
        self.bad_gradients = 0
        self.rewound_to = -1
        folder = config.run / "checkpoints"
        self.checkpoints = Checkpoints(folder, config.checkpoint, self.engine.partition, self.ema, world)
        self.held_out = (
            ValidationSet(
                config.validation, task, world, config.run / f"quarantine-held-out-{world.rank:05d}.jsonl"
            )
            if config.validation is not None
            else None
        )
        self.stop = StopFlag()
        self.watchdog = Watchdog(config.health.hang_seconds, config.run / f"stacks-{world.rank:05d}.txt")
        self._resume()
        self.report = MetricAggregator(config, world, self.images, self._ideal_seconds())

    def _ideal_seconds(self) -> float | None:
        """Return the seconds per image at peak FLOPS of all devices; ``None`` except for bf16 on GPUs."""
        peak = peak_flops(self.world.device) if self.config.engine.precision == "bf16" else None
        # Backward costs twice the forward. MFU excludes recomputation by gradient checkpointing.
        return 3 * self.task.forward_flops / (peak * self.world.size) if peak is not None else None

    def run(self, title: str) -> RunResult:
        if self.images >= self.config.total_images:
            return RunResult(self.images, stopped=False)
        stream = Stream(
            self.config.data,
            self.task.samples(),
            seed=self.config.seed,
            rank=self.world.rank,
            ranks=self.world.size,
            cursor=self.images,
            quarantine=self.config.run / f"quarantine-{self.world.rank:05d}.jsonl",
            pinned=self.world.device.type == "cuda",
        )
        bar = progress_bar(
            title, self.config.total_images, initial=self.images, unit="img", quiet=not self.world.is_first
        )
        with closing(iter(stream)) as batches, bar, self.watchdog:
            return self._run(batches, bar)

    def close(self) -> None:
        self.checkpoints.close()
        self.report.close()

    def _run(self, batches: Iterator[BatchType], bar: "tqdm[Any]") -> RunResult:
        self.report.start()
        while self.images < self.config.total_images:
            batch = self.report.waited_for(batches)
            stopping = self._step(batch)
            self.images += self.batch
            self.ema.update(self.images, self.batch)
            self.task.on_step_end(self.images)
            self.watchdog.beat()
            bar.update(self.batch)
            judged = self._judged()
            if judged or self._is_due(self.config.log.every_images):
                loss = self.report.write(self.images, judged)
                shown = {"loss": f"{loss:.4f}", "wait": f"{self.report.wait_share:.0%}"}
                if self.report.utilisation is not None:
                    shown["mfu"] = f"{self.report.utilisation:.0%}"
                bar.set_postfix(shown, refresh=False)
            self._draw()
            if self.config.engine.zero.stage < 3 and self._is_due(self.config.health.checksum_every_images):
                check_weights(self.config.run, self.images, self.engine.module, self.world)
            ends = self.images >= self.config.total_images
            if stopping or ends or self._is_due(self.config.checkpoint.every_images):
                self.checkpoints.save(self.images, self._state(), must=stopping or ends)
            if stopping:
                return RunResult(self.images, stopped=True)
        return RunResult(self.images, stopped=False)

    def _is_due(self, period: int) -> bool:
        """Return ``True`` if the last batch reached a multiple of the period."""
        return self.images // period > (self.images - self.batch) // period

    def _step(self, batch: BatchType) -> bool:
        """Run one optimizer step and return ``True`` if any rank received a stop signal."""
        parts = batch.split(self.config.engine.gradient_accumulation_steps)
        rate = self.rate.at(self.images)
        valid, summed = torch.ones(()), 0.0
        stopping = stands_out = was_applied = False
        for number, part in enumerate(parts, start=1):
            on_device = part.to(self.world.device, non_blocking=True)
            losses = self.task.losses(self.engine, on_device, self.images)
            total = torch.where(on_device.valid, losses.per_sample, 0.0).sum()
            bad = ~losses.per_sample.detach().isfinite().cpu() & part.valid
            # One all-reduce for all values: each all-reduce waits for the slowest rank.
            said = [batch.valid.sum(), bad.sum(), torch.tensor(self.stop.requested), total.detach().cpu()]
            agreed = self.world.sum(torch.stack([value.double() for value in said]).to(self.world.device))
            valid, bad_anywhere, stops, part_total = agreed.cpu()
            stopping = stopping or bool(stops)
            if bad_anywhere:
                self._refuse(losses, part)
            summed += float(part_total)
            if number == len(parts) and self.guard is not None:
                stands_out = self.guard.stands_out(summed / max(1.0, float(valid)))
            # The engine averages over ranks and micro-batches; rescale to the mean over valid samples.
            scale = self.world.size * len(parts) / valid.clamp(min=1)
            self.engine.backward(total * scale.to(total), spoiled=stands_out)
            was_applied = self.engine.step(rate)
            self.report.add(total.detach(), losses.statistics)
        own = self.probe.squared_norm()
        if stands_out:
            self._skip_spike(summed / float(valid))
        elif not was_applied:
            self._handle_nonfinite_gradient(batch, own)
        else:
            self.bad_gradients = 0
            self.rate.observe(self.images + self.batch, summed / max(1.0, float(valid)))
            self.report.add_gradient(own, self.engine.gradient_norm)
        self.report.add_step(valid, rate)
        return stopping

    def _refuse(self, losses: Losses, part: BatchType) -> NoReturn:
        """Raise on a nonfinite loss before the optimizer step; DeepSpeed reports nothing."""
        run, facts = self.config.run, losses.facts or {}
        check_losses(run, self.images, losses.per_sample, part.valid, part.slots, facts, self.world)
        raise RuntimeError("a rank said that a loss is not finite, and now none is")

    def _handle_nonfinite_gradient(self, batch: BatchType, own: Tensor) -> None:
        """Skip or stop after the engine discarded a nonfinite gradient of finite losses."""
        ranks = ranks_of_bad_gradient(own, self.world)
        slots = batch.slots.tolist()
        found = self.world.gathered({"slots": f"{slots[0]} to {slots[-1]}"})
        whose = " and ".join(f"rank {rank} (slots {found[rank]['slots']})" for rank in ranks)
        whose = whose or "no single rank"
        what = f"{self.config.run}: after {self.images} images the gradient of {whose} is not finite"
        self.bad_gradients += 1
        self.report.add_skipped()
        health = self.config.health
        if health.nonfinite_gradient == "stop" or self.bad_gradients > health.max_consecutive_nonfinite:
            raise UserError(
                f"{what}; nothing was learned from it: lower optim.lr, or set "
                "health.nonfinite_gradient=skip, and start again, it goes on from the last checkpoint."
            )
        if self.world.is_first:
            logger.warning("%s; the batch is skipped.", what)

    def _skip_spike(self, loss: float) -> None:
        """Report a batch skipped for its loss; after too many in a row, rewind or stop."""
        guard = cast(SpikeGuard, self.guard)
        self.report.add_skipped()
        what = f"after {self.images} images a batch's loss of {loss:.4g} stands out"
        if not guard.has_had_enough:
            if self.world.is_first:
                logger.warning("%s; the batch is skipped.", what)
            return
        enough = f"{what}, the {guard.skipped_in_a_row}. in a row"
        if not guard.config.rewind:
            raise UserError(
                f"{self.config.run}: {enough}; lower optim.lr, or set health.spike.rewind=true, and start "
                "again, it goes on from the last checkpoint."
            )
        self.checkpoints.wait()
        # Skipped batches do not change the weights: rewind to before the first skipped batch.
        restored = self.checkpoints.resume(self.images - (guard.skipped_in_a_row - 1) * self.batch)
        if restored is None or restored.images == self.rewound_to:
            raise UserError(
                f"{self.config.run}: {enough}, and going back to the last checkpoint did not help; lower "
                "optim.lr."
            )
        self._take(restored)
        self.rewound_to = restored.images
        if self.world.is_first:
            logger.warning("%s; the weights are those of %d images again.", enough, restored.images)

    def _judged(self) -> dict[str, float]:
        """Return the validation metrics of the EMA weights if due, else an empty mapping."""
        config = self.config.validation
        if self.held_out is None or config is None:
            return {}
        if not self._is_due(config.every_images) and self.images < self.config.total_images:
            return {}
        with self.ema.in_place_of_weights():
            figures = self.held_out.measured(self.engine)
        return {f"validation_{name}": value for name, value in figures.items()}

    def _draw(self) -> None:
        """Generate the sample images if due."""
        config = self.config.sample_images
        if config is None or not (
            self._is_due(config.every_images) or self.images >= self.config.total_images
        ):
            return
        parameters = whole_parameters(self.engine.partition, self.ema.flats, self.world)
        path = self.config.run / "pictures" / f"{self.images:012d}.png"
        self.world.on_first_rank(lambda: draw_pictures(self.task, parameters, config, path, self.world))
        self.watchdog.beat()

    def _state(self) -> dict[str, Tensor]:
        """Return the run's state apart from weights, moments, EMA and data cursor."""
        guard = self.guard.state() if self.guard is not None else {}
        task = {f"task.{name}": value for name, value in self.task.state().items()}
        return {**task, **self.rate.state(), **guard}

    def _take(self, restored: Restored) -> None:
        self.task.load_state(
            {
                name.removeprefix("task."): value
                for name, value in restored.state.items()
                if name.startswith("task.")
            }
        )
        self.rate.load_state(restored.state)
        if self.guard is not None and "guard" in restored.state:
            self.guard.load_state(restored.state)

    def _resume(self) -> None:
        restored = self.checkpoints.resume()
        if restored is None:
            self.task.init_weights(self.engine.partition)
            self.ema.restart()
            # Fail now instead of after hours if a checkpoint cannot be written.
            self.checkpoints.save(0, self._state(), must=True)
            return
        self._take(restored)
        self.images = restored.images
        if self.world.is_first:
            logger.info("going on from the checkpoint at %d images, the newest whole one", restored.images)
