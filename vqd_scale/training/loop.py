"""Training loop of all tasks."""

import logging
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Generic

import torch
from torch import Tensor
from tqdm import tqdm

from vqd_scale.core.errors import UserError
from vqd_scale.core.progress import progress_bar
from vqd_scale.core.run_lock import RunLock
from vqd_scale.core.signals import TIME_LIMIT_SIGNAL, StopFlag, report_progress
from vqd_scale.core.tensors import with_prefix, without_prefix
from vqd_scale.core.watchdog import beat, phase, watched
from vqd_scale.core.world import World
from vqd_scale.data.loading.batch import BatchType
from vqd_scale.data.loading.stream import Stream
from vqd_scale.nn.flops import peak_flops
from vqd_scale.training.checkpoint.manager import Checkpoints
from vqd_scale.training.config import STACKS, RunConfig
from vqd_scale.training.ema import EMA
from vqd_scale.training.engine import Engine
from vqd_scale.training.health import HealthMonitor
from vqd_scale.training.logging.aggregator import MetricAggregator
from vqd_scale.training.logging.sample_images import write_sample_images
from vqd_scale.training.optim import LearningRate
from vqd_scale.training.partition import gather
from vqd_scale.training.periods import is_due
from vqd_scale.training.resume import claim, with_lanes
from vqd_scale.training.tasks.base import Task
from vqd_scale.training.validation import ValidationSet

logger = logging.getLogger(__name__)


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

    >>> from pathlib import Path
    >>> from vqd_scale import TrainConfig, train
    >>> from vqd_scale.core.config import load_config
    >>> from vqd_scale.core.world import join_world, leave_world
    >>> config = load_config(TrainConfig, Path("train.yaml"), ["run=runs/mine", "total_images=16"])
    >>> world = join_world()
    >>> train(config.build(world), config, world, config.title)
    RunResult(images=16, stopped=False)
    >>> leave_world()

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
    lanes: list[int] = []
    lock = RunLock(config.run)
    with (
        watched(config.health.hang_seconds, config.run / STACKS.format(world.rank)),
        closing(lock),
    ):
        world.on_first_rank(lambda: lanes.append(claim(config, lock)))
        config = with_lanes(config, world.gathered({"lanes": lanes})[0]["lanes"][0])
        with phase("build of the engine"):
            trainer = _Trainer(task, config, world, lock)
        try:
            result = trainer.run(title)
        finally:
            trainer.close()
        if not result.stopped:
            with phase("export"):
                trainer.checkpoints.weights(
                    result.images, lambda weights: task.export(weights, config.run / "export")
                )
    return result


class _Trainer(Generic[BatchType]):
    """State of a run between two steps."""

    def __init__(self, task: Task[BatchType], config: RunConfig, world: World, lock: RunLock) -> None:
        self.task = task
        self.lock = lock
        self.config = config
        self.world = world
        self.batch = config.data.global_batch_size
        self.images = 0
        self.health = HealthMonitor(
            config.health, config.run, self.batch, config.optim.lr, task.module, world
        )
        self.engine = Engine(task.module, config.engine, config.optim, self.batch, world, task.units)
        self.ema = EMA(config.ema, self.engine.partition)
        self.rate = LearningRate(config.optim, self.batch, config.total_images)
        self.checkpoints = Checkpoints(
            config.run / "checkpoints", config.checkpoint, self.engine.partition, self.ema, world
        )
        self.validation = None
        if config.validation is not None:
            quarantine = config.run / f"quarantine-validation-{world.rank:05d}.jsonl"
            self.validation = ValidationSet(config.validation, task, world, quarantine)
        self.stop = StopFlag()
        with phase("load of a checkpoint"):
            self._resume()
        self.metrics = MetricAggregator(config, world, self.images, self._ideal_seconds())

    def _resume(self) -> None:
        """Load the newest valid checkpoint, or initialize the weights of a new run."""
        images = self._load_checkpoint()
        if images is not None:
            self.images = images
            if self.world.is_first:
                logger.info("resumed from the checkpoint at %d images", images)
            return
        self.task.init_weights(self.engine.partition)
        self.ema.restart()
        # Fail now instead of after hours if a checkpoint cannot be written.
        self._save(must=True)

    def _ideal_seconds(self) -> float | None:
        """Return the seconds per image at peak FLOPS of all devices; ``None`` except for bf16 on GPUs."""
        peak = peak_flops(self.world.device) if self.config.engine.precision == "bf16" else None
        # Backward costs twice the forward. MFU excludes recomputation by gradient checkpointing.
        return 3 * self.task.forward_flops / (peak * self.world.size) if peak is not None else None

    def run(self, title: str) -> RunResult:
        """Train until the end of the run or a stop signal."""
        if self._is_finished:
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
        has_replicas = self.config.engine.zero.stage < 3
        with closing(iter(stream)) as batches, bar, phase("training"):
            if self.world.any(self.stop.received == TIME_LIMIT_SIGNAL):
                raise UserError(
                    f"{self.config.run}: the signal before the time limit came before the first step; allow "
                    "more time (--time, --hours), or send it later (--signal=USR2@SECONDS, --signal-seconds)."
                )
            if self.world.any(self.stop.requested):
                return RunResult(self.images, stopped=True)
            self.metrics.reset()
            while not self._is_finished:
                is_stopping = self._step(self.metrics.next_batch(batches))
                self.images += self.batch
                self.ema.update(self.images, self.batch)
                self.task.on_step_end(self.images)
                beat()
                report_progress()
                bar.update(self.batch)
                self._log(self._validate(), bar)
                self._sample_images()
                if has_replicas and self._is_due(self.config.health.checksum_every_images):
                    self.health.check_replicas(self.images, self.engine.module)
                is_last = is_stopping or self._is_finished
                if is_last or self._is_due(self.config.checkpoint.every_images):
                    self._save(must=is_last)
                if is_stopping:
                    return RunResult(self.images, stopped=True)
        return RunResult(self.images, stopped=False)

    def close(self) -> None:
        """Abandon a save in progress, close the metric writers and restore the signal handlers."""
        self.checkpoints.close(lambda: self.stop.requested or not self._is_finished)
        self.stop.close()
        self.metrics.close()

    def _save(self, *, must: bool) -> None:
        self.world.on_first_rank(self.lock.check)
        self.checkpoints.save(self.images, self._state(), must=must)

    @property
    def _is_finished(self) -> bool:
        return self.images >= self.config.total_images

    def _is_due(self, period: int) -> bool:
        """Return True if the last batch reached a multiple of a period in images."""
        return is_due(period, self.images, self.batch)

    def _step(self, batch: BatchType) -> bool:
        """Run one optimizer step and return ``True`` if any rank received a stop signal."""
        parts = batch.split(self.config.engine.gradient_accumulation_steps)
        learning_rate = self.rate.at(self.images)
        if self.health.skips(self.images):
            self.metrics.add_step(0.0, learning_rate)
            return bool(self._sum_over_ranks(self.stop.requested)[0])
        valid, loss_sum, mean_loss = 1.0, 0.0, 0.0
        is_stopping = is_spike = is_applied = False
        for number, part in enumerate(parts, start=1):
            on_device = part.to(self.world.device, non_blocking=True)
            losses = self.task.losses(self.engine, on_device, self.images)
            loss = torch.where(on_device.valid, losses.per_sample, 0.0).sum()
            nonfinite = ~losses.per_sample.detach().isfinite() & on_device.valid
            valid, nonfinite_count, stop_count, part_loss = self._sum_over_ranks(
                batch.valid.sum(), nonfinite.sum(), self.stop.requested, loss.detach()
            )
            if nonfinite_count:
                facts = losses.facts or {}
                self.health.check_losses(self.images, losses.per_sample, part.valid, part.slots, facts)
            is_stopping = is_stopping or bool(stop_count)
            loss_sum += part_loss
            mean_loss = loss_sum / max(1.0, valid)
            is_spike = number == len(parts) and self.health.is_spike(mean_loss)
            # The engine averages over ranks and micro-batches; rescale to the mean over valid samples.
            scale = self.world.size * len(parts) / max(1.0, valid)
            self.engine.backward(loss * scale, discard=is_spike)
            is_applied = self.engine.step(learning_rate)
            self.metrics.add_losses(loss.detach(), losses.statistics)
        squared_norm = self.health.probe.squared_norm()
        if is_spike:
            self.health.skip_spike(self.images, mean_loss, self._rewind)
        elif not is_applied:
            self.health.skip_nonfinite_gradient(self.images, batch.slots, squared_norm)
        else:
            self.health.on_applied_step()
            self.rate.observe(self.images + self.batch, mean_loss)
            self.metrics.add_gradient(squared_norm, self.engine.gradient_norm)
        self.metrics.add_step(valid, learning_rate)
        return is_stopping

    def _sum_over_ranks(self, *values: Tensor | float) -> list[float]:
        """Sum values over the ranks: in one message, since each waits for the slowest rank.

        The step waits for the device here only, so numbers of the host are filled in, not copied.
        """
        device = self.world.device
        local_values = [
            value.double()
            if isinstance(value, Tensor) and value.device == device
            else torch.full((), float(value), dtype=torch.float64, device=device)
            for value in values
        ]
        return self.world.sum(torch.stack(local_values)).cpu().tolist()

    def _validate(self) -> dict[str, float]:
        """Return the validation metrics of the EMA weights if due, else an empty mapping."""
        config = self.config.validation
        if self.validation is None or config is None:
            return {}
        if not self._is_finished and not self._is_due(config.every_images):
            return {}
        with phase("validation"), self.ema.in_place_of_weights():
            metrics = self.validation.metrics(self.engine)
        return {f"validation_{name}": value for name, value in metrics.items()}

    def _log(self, validation: dict[str, float], bar: "tqdm[Any]") -> None:
        """Write a row of metrics if due, or if there are validation metrics."""
        if not validation and not self._is_due(self.config.log.every_images):
            return
        loss = self.metrics.write(self.images, {**validation, "skipped_batches": self.health.skipped_batches})
        postfix = {"loss": f"{loss:.4f}", "wait": f"{self.metrics.wait_fraction:.0%}"}
        if self.metrics.utilization is not None:
            postfix["mfu"] = f"{self.metrics.utilization:.0%}"
        bar.set_postfix(postfix, refresh=False)

    def _sample_images(self) -> None:
        """Write sample images of the EMA weights if due."""
        config = self.config.sample_images
        if config is None or not (self._is_finished or self._is_due(config.every_images)):
            return
        path = self.config.run / "sample_images" / f"{self.images:012d}.png"
        with phase("sample images"):
            parameters = gather(self.engine.partition, self.ema.flats, self.world)
            self.world.on_first_rank(
                lambda: write_sample_images(self.task, parameters, config, path, self.world)
            )

    @property
    def _stateful(self) -> dict[str, Task[BatchType] | LearningRate | HealthMonitor]:
        """Components with a state apart from weights, moments, EMA and data cursor."""
        return {"task.": self.task, "learning_rate.": self.rate, "health.": self.health}

    def _state(self) -> dict[str, Tensor]:
        state: dict[str, Tensor] = {}
        for prefix, component in self._stateful.items():
            state |= with_prefix(prefix, component.state())
        return state

    def _load_checkpoint(self, before: int | None = None) -> int | None:
        """Load the newest valid checkpoint, with fewer than ``before`` images; return its images, if any."""
        restored = self.checkpoints.resume(before)
        if restored is None:
            return None
        for prefix, component in self._stateful.items():
            component.load_state(without_prefix(restored.state, prefix))
        return restored.images

    def _rewind(self, before: int) -> int | None:
        """Load the newest checkpoint with fewer images; the data cursor continues."""
        self.checkpoints.wait()
        return self._load_checkpoint(before)
