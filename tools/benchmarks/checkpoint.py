"""Training time per checkpoint: written by a thread, and written while training waits."""

import tempfile
import time
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any, Literal

import torch
from benchmarks.step import FusedStep, StepProblem

from vqd_scale.core.progress import progress
from vqd_scale.core.world import World, join_world
from vqd_scale.nn.config import DenoiserConfig
from vqd_scale.nn.denoiser import Denoiser
from vqd_scale.training.checkpoint.manager import Checkpoints, consolidated
from vqd_scale.training.config import AdamWConfig, CheckpointConfig, EMAConfig, EngineConfig
from vqd_scale.training.ema import EMA
from vqd_scale.training.engine import Engine

_STEPS = 20
_RATE = 1e-4
Save = Literal["none", "ours", "alternative"]

PROBLEM = StepProblem(width=512, layers=8, heads=8, side=8, codes=1024, batch=1)
"""Some 44 million parameters: a checkpoint of 0.7 GB, at steps of about a second on two cores. Longer ones
would hide what it costs twenty of them in how much a shared machine's speed drifts."""


class _Run:
    """A run that takes twenty steps, and saves in their middle or not."""

    def __init__(self, problem: StepProblem, world: World, folder: Path) -> None:
        torch.manual_seed(0)
        config = DenoiserConfig(width=problem.width, layers=problem.layers, heads=problem.heads)
        denoiser = Denoiser(config, problem.codes, (problem.side, problem.side), problem.transition.steps)
        module = FusedStep(denoiser, problem)
        self.engine = Engine(
            module, EngineConfig(precision="fp32"), AdamWConfig(), problem.batch, world, Denoiser.units
        )
        self.batch = problem.batch_of(world.device)
        ema = EMA(EMAConfig(), self.engine.partition)
        self.checkpoints = {
            kind: Checkpoints(
                folder / kind,
                CheckpointConfig(asynchronous=kind == "ours", keep_last=1),
                self.engine.partition,
                ema,
                world,
            )
            for kind in ("ours", "alternative")
        }
        self.saves = 0

    def steps(self, save: Save) -> tuple[float, float]:
        """Seconds of twenty steps with a save after the tenth, and of waiting for it afterwards."""
        began = time.perf_counter()
        for number in range(_STEPS):
            loss = self.engine(*self.batch)
            self.engine.backward(loss)
            self.engine.step(_RATE)
            if save != "none" and number == _STEPS // 2:
                self.saves += 1
                self.checkpoints[save].save(self.saves, {})
        seconds = time.perf_counter() - began
        for checkpoints in self.checkpoints.values():
            checkpoints.wait()
        return seconds, time.perf_counter() - began - seconds


def benchmark_checkpoint(rounds: int, problem: StepProblem = PROBLEM) -> dict[str, Any]:
    """The time that a save adds to the twenty steps around it, by a thread and in the foreground.

    Args:
        rounds: How often each is timed, in turn. What counts is the median of the differences within rounds,
            since the speed of a shared machine drifts from round to round. Every other round goes backwards:
            what drifts within a round falls on either.
        problem: The sizes.

    Raises:
        AssertionError: The two do not write the same weights.
    """
    with tempfile.TemporaryDirectory(prefix="vqd-scale-") as name:
        folder = Path(name)
        run = _Run(problem, join_world(), folder)
        _compare(run, folder)
        # The first steps of a process are slower than those to come.
        run.steps("none")
        kinds: tuple[Save, ...] = ("none", "ours", "alternative")
        seconds: dict[Save, list[float]] = {kind: [] for kind in kinds}
        afterwards: dict[Save, list[float]] = {kind: [] for kind in kinds}
        for number in progress(range(rounds), "checkpoint", rounds):
            for kind in kinds if number % 2 == 0 else reversed(kinds):
                during, after = run.steps(kind)
                seconds[kind].append(during)
                afterwards[kind].append(after)
        size = sum(path.stat().st_size for path in max((folder / "ours").iterdir()).iterdir())
        for checkpoints in run.checkpoints.values():
            checkpoints.close()
    extra = {
        kind: [with_save - calm for with_save, calm in zip(seconds[kind], seconds["none"], strict=True)]
        for kind in ("ours", "alternative")
    }
    stall = {kind: median(values) for kind, values in extra.items()}
    return {
        **stall,
        "standard_errors_of_the_means": {
            kind: stdev(values) / rounds**0.5 if rounds > 1 else None for kind, values in extra.items()
        },
        "means": {kind: fmean(values) for kind, values in extra.items()},
        "ratio": stall["alternative"] / stall["ours"],
        "share_of_synchronous": stall["ours"] / stall["alternative"],
        "megabytes": round(size / 1e6, 1),
        "seconds_of_twenty_steps": seconds,
        "seconds_until_whole_afterwards": median(afterwards["ours"]),
    }


def _compare(run: _Run, folder: Path) -> None:
    for checkpoints in run.checkpoints.values():
        checkpoints.save(0, {})
        checkpoints.wait()
    package_weights, alternative_weights = (
        consolidated(folder / kind / f"{0:012d}", "master") for kind in run.checkpoints
    )
    for name, tensor in package_weights.items():
        torch.testing.assert_close(tensor, alternative_weights[name], rtol=0, atol=0, msg=name)
