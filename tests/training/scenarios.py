"""Short runs in turn on the same ranks, because starting ranks takes longer than training.

Started by `tests/training/test_scenarios.py` as a tool would be: with ``WORLD OUT`` it writes what each run
did to ``OUT/results.json``.
"""

import json
import logging
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.training.checkpoint.damages import DAMAGES
from tests.training.plain_training import train_plainly
from vqd_scale.core.atomic_io import sha256_of
from vqd_scale.core.config import load_config
from vqd_scale.core.errors import UserError
from vqd_scale.core.world import World, join_world, leave_world
from vqd_scale.data.loading.batch import TokenBatch
from vqd_scale.training.checkpoint.manager import Checkpoints
from vqd_scale.training.ema import EMA
from vqd_scale.training.engine import Engine
from vqd_scale.training.logging.metrics import read_metrics
from vqd_scale.training.loop import train
from vqd_scale.training.tasks.base import Forward, Losses
from vqd_scale.training.tasks.config import TrainConfig
from vqd_scale.training.tasks.denoising import DenoisingTask

OVERRIDE = re.compile(r"[a-z_]+(?:\.[a-z_]+)*=(?:\[[^\]]*\]|[^\s,;]*[^\s,;.])")

Result = dict[str, Any]
Prepare = Callable[[DenoisingTask], None]


class Spiky(DenoisingTask):
    """Task whose losses at some image counts are a hundred times larger."""

    at: tuple[int, ...] = ()

    def losses(self, forward: Forward, batch: TokenBatch, images: int) -> Losses:
        losses = super().losses(forward, batch, images)
        if images in self.at:
            return losses._replace(per_sample=losses.per_sample * 100)
        return losses


class NaNLoss(DenoisingTask):
    """Task with a loss that is not finite after 40 images."""

    def losses(self, forward: Forward, batch: TokenBatch, images: int) -> Losses:
        losses = super().losses(forward, batch, images)
        return losses._replace(per_sample=losses.per_sample * (torch.nan if images == 40 else 1.0))


class NaNGradient(DenoisingTask):
    """Task with a gradient of finite losses that is not finite after 40 images."""

    def losses(self, forward: Forward, batch: TokenBatch, images: int) -> Losses:
        losses = super().losses(forward, batch, images)
        spoiled = losses.per_sample + (losses.per_sample * 0).sqrt()
        return losses._replace(per_sample=spoiled if images == 40 else losses.per_sample)


class Runner:
    def __init__(self, world: World, folder: Path, out: Path) -> None:
        self.world, self.folder, self.out = world, folder, out

    def run(
        self,
        name: str,
        *overrides: str,
        images: int = 64,
        kind: type[DenoisingTask] = DenoisingTask,
        prepare: Prepare = lambda task: None,
    ) -> Result:
        run = self.out / name
        common = [
            f"run={run}",
            f"total_images={images}",
            "checkpoint.every_images=24",
            "health.hang_seconds=1200",
        ]
        config = load_config(TrainConfig, self.folder / "train.yaml", [*common, *overrides])
        task = kind(config, self.world)
        prepare(task)
        listener = _Listener()
        logging.getLogger("vqd_scale").addHandler(listener)
        error = ""
        try:
            train(task, config, self.world, name)
        except UserError as mistake:
            error = str(mistake)
        finally:
            logging.getLogger("vqd_scale").removeHandler(listener)
        rows = read_metrics(run / "metrics.jsonl")
        return {"rows": rows, "error": error, "warnings": listener.messages}

    def losses(self, name: str, *overrides: str, **named: Any) -> list[float]:
        result = self.run(name, *overrides, **named)
        if result["error"]:
            raise RuntimeError(result["error"])
        return [row["loss"] for row in result["rows"]]


class _Listener(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def a_bad_gradient(world: World, *backwards: int) -> Prepare:
    """Make the last rank's gradient NaN in these backward passes."""

    def prepare(task: DenoisingTask) -> None:
        calls = 0

        def spoil(gradient: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            is_time = calls in backwards and world.rank == world.size - 1
            return torch.full_like(gradient, torch.nan) if is_time else gradient

        next(task.module.parameters()).register_hook(spoil)

    return prepare


def spikes(*images: int) -> type[DenoisingTask]:
    return type("SpikyHere", (Spiky,), {"at": images})


def invariance(runner: Runner) -> Result:
    """Losses for different numbers of ranks and accumulation steps, with bad samples."""
    poisoned = [f"data.path={runner.folder / 'poisoned'}", "data.max_bad_fraction=1"]
    return {
        f"accumulation {parts}": runner.losses(
            f"accumulation-{parts}", *poisoned, f"engine.gradient_accumulation_steps={parts}"
        )
        for parts in (1, 2, 4)
        if 8 % (parts * runner.world.size) == 0
    }


def stages(runner: Runner) -> Result:
    """Losses in every ZeRO stage, with and without offload."""
    variants = {
        "stage 3": [],
        "stage 2": ["engine.zero.stage=2", "health.checksum_every_images=16"],
        "stage 1, in parts": ["engine.zero.stage=1", "engine.gradient_accumulation_steps=2"],
        "blocks computed again": ["denoiser.gradient_checkpointing=true"],
        "stage 2, offloaded": ["engine.zero.stage=2", "engine.zero.offload_optimizer=true"],
        "persistent": ["engine.param_persistence_threshold=1000"],
    }
    return {
        name: runner.losses(name.replace(" ", "-"), *overrides, images=32)
        for name, overrides in variants.items()
    }


def lion(runner: Runner) -> Result:
    """Lion without the engine, in every stage, and resumed in the same and in another stage."""
    common = ["optim.kind=lion", "optim.lr=1e-4", "optim.schedule.kind=constant"]
    plain = [*common, f"run={runner.out / 'lion-plain'}", "total_images=64"]
    variants: Result = {
        "plain": train_plainly(load_config(TrainConfig, runner.folder / "train.yaml", plain)).losses,
        "stage 3": runner.losses("lion-3", *common),
        "stage 2, offloaded": runner.losses(
            "lion-2", *common, "engine.zero.stage=2", "engine.zero.offload_optimizer=true"
        ),
        "stage 1": runner.losses("lion-1", *common, "engine.zero.stage=1"),
    }
    for stage in (3, 1):
        name = f"lion-resumed-{stage}"
        runner.losses(name, *common, images=40)
        variants[f"resumed in stage {stage}"] = runner.losses(name, *common, f"engine.zero.stage={stage}")
    return variants


def compiled(runner: Runner) -> Result:
    """Losses with torch.compile, without sharding and with full sharding."""
    return {
        f"stage {stage}": runner.losses(
            f"compiled-{stage}", "engine.compile=true", f"engine.zero.stage={stage}", images=32
        )
        for stage in (1, 3)
    }


def half_precision(runner: Runner) -> Result:
    return {
        f"stage {stage}": runner.losses(
            f"bf16-{stage}", "engine.precision=bf16", f"engine.zero.stage={stage}", images=32
        )
        for stage in (1, 2, 3)
    }


def health(runner: Runner) -> Result:
    spoil = a_bad_gradient(runner.world, 3)
    guard = ["health.spike.factor=10", "health.spike.half_life_images=24", "health.spike.max_consecutive=1"]
    return {
        "stop": runner.run("nan-stop", prepare=spoil),
        "skip": runner.run("nan-skip", "health.nonfinite_gradient=skip", prepare=spoil),
        "skip at stage 1": runner.run(
            "nan-skip-1", "health.nonfinite_gradient=skip", "engine.zero.stage=1", prepare=spoil
        ),
        "spike": runner.run("spike", *guard, "engine.gradient_accumulation_steps=2", kind=spikes(40)),
        "spikes": runner.run("spikes", *guard, kind=spikes(40, 48)),
        "rewound": runner.run("rewound", *guard, "health.spike.rewind=true", kind=spikes(40, 48)),
    }


def advice(runner: Runner) -> Result:
    """Runs that stop, and copies of them that follow each override in the message."""
    guard = ["health.spike.factor=10", "health.spike.half_life_images=24", "health.spike.max_consecutive=1"]
    skip = ["health.nonfinite_gradient=skip", "health.max_consecutive_nonfinite=0"]
    stopped: dict[str, tuple[type[DenoisingTask], list[str], list[str]]] = {
        "loss": (NaNLoss, [], []),
        "second loss": (NaNLoss, ["health.skip_batches=[8]"], []),
        "gradient": (NaNGradient, [], []),
        "gradients": (NaNGradient, skip, []),
        "spikes": (spikes(40, 48), guard, []),
        "another run": (DenoisingTask, [], ["seed=7"]),
    }
    results: Result = {}
    for case, (kind, overrides, changes) in stopped.items():
        name = f"advice-{case.replace(' ', '-')}"
        first = runner.run(name, *overrides, images=64, kind=kind)
        first = runner.run(name, *overrides, *changes, images=64, kind=kind) if changes else first
        results[case] = {"error": first["error"]}
        for number, override in enumerate(OVERRIDE.findall(first["error"])):
            shutil.copytree(runner.out / name, runner.out / f"{name}-{number}")
            results[case][override] = runner.run(
                f"{name}-{number}", *overrides, *changes, override, images=64, kind=kind
            )
    return results


def held_out(runner: Runner) -> Result:
    """Validation figures, and losses with and without validation."""
    validation_overrides = [
        f"validation.path={runner.folder / 'shards'}",
        "validation.every_images=32",
        "validation.samples=19",
    ]
    validation_overrides += ["validation.batch_size=4"]
    with_it = runner.run("held-out", *validation_overrides)
    without = runner.run("not-held-out")
    return {
        "figures": [
            {name: value for name, value in row.items() if name.startswith("validation_")}
            for row in with_it["rows"]
        ],
        "losses": [row["loss"] for row in with_it["rows"]],
        "losses without": [row["loss"] for row in without["rows"]],
    }


def native(runner: Runner) -> Result:
    """Equal weights as DeepSpeed's own checkpoint and as the package's."""
    config = load_config(TrainConfig, runner.folder / "train.yaml", [f"run={runner.out / 'native'}"])
    task = DenoisingTask(config, runner.world)
    engine = Engine(task.module, config.engine, config.optim, 8, runner.world, task.units)
    engine._engine.save_checkpoint(str(runner.out / "native"))  # pyright: ignore[reportPrivateUsage]
    checkpoints = Checkpoints(
        runner.out / "ours",
        config.checkpoint,
        engine.partition,
        EMA(config.ema, engine.partition),
        runner.world,
    )
    checkpoints.save(0, {})
    checkpoints.wait()
    return {"native": str(runner.out / "native"), "ours": str(runner.out / "ours" / f"{0:012d}")}


DAMAGED_CHECKPOINTS = {"newest": (48,), "last but one": (32,), "both": (48, 32)}
"""Image counts of the checkpoints that are damaged; the run ends at the first."""


def damage(runner: Runner, is_full_matrix: bool = False) -> Result:
    """Finished runs whose checkpoints are damaged in one kind of file, started again.

    The short form covers every kind of file, every damage and every choice of checkpoints at least once.
    """
    run, finished = runner.out / "damaged", runner.out / "damaged-finished"
    overrides = ["checkpoint.every_images=16", "checkpoint.keep_last=3"]

    def start(case: str = "undisturbed") -> Result:
        result = runner.run("damaged", *overrides, images=48)
        checkpoints = {
            path.name: {file.name: sha256_of(file) for file in path.iterdir()}
            for path in (run / "checkpoints").iterdir()
        }
        digest = sha256_of(run / "export" / "model.safetensors")
        return {**result, "case": case, "digest": digest, "checkpoints": checkpoints}

    def disturb(file: str, damage: str, images: Sequence[int]) -> None:
        shutil.rmtree(run)
        shutil.copytree(finished, run)
        shutil.rmtree(run / "export")
        for count in images:
            DAMAGES[damage](run / "checkpoints" / f"{count:012d}" / file)

    results = [start()]
    runner.world.on_first_rank(lambda: shutil.copytree(run, finished))
    shards = [
        f"slices-{rank:05d}-of-{runner.world.size:05d}.safetensors" for rank in range(runner.world.size)
    ]
    files = ["manifest.json", "state.safetensors", *shards]
    matrix = [(file, kind, place) for file in files for kind in DAMAGES for place in DAMAGED_CHECKPOINTS]
    if not is_full_matrix:
        kinds, places = list(DAMAGES), ["newest", "both", "newest", "last but one"]
        matrix = list(zip(files, kinds, places, strict=False))
    for file, kind, place in matrix:
        images = DAMAGED_CHECKPOINTS[place]
        runner.world.on_first_rank(lambda file=file, kind=kind, images=images: disturb(file, kind, images))
        results.append(start(f"{place}: {file}: {kind}"))
        runner.world.barrier()
    return {result["case"]: result for result in results}


def damage_matrix(runner: Runner) -> Result:
    """Every kind of file, damage and choice of checkpoints."""
    return damage(runner, is_full_matrix=True)


SCENARIOS: dict[str, Callable[[Runner], Result]] = {
    scenario.__name__: scenario
    for scenario in (
        invariance,
        stages,
        lion,
        compiled,
        half_precision,
        health,
        advice,
        held_out,
        native,
        damage,
        damage_matrix,
    )
}


def main(arguments: Sequence[str]) -> None:
    world = join_world()
    folder, out = Path(arguments[0]), Path(arguments[1])
    names = arguments[2:] or [
        name for name in SCENARIOS if name not in ("advice", "compiled", "damage_matrix")
    ]
    runner = Runner(world, folder, out)
    results = {name: SCENARIOS[name](runner) for name in names}
    if world.is_first:
        (out / "results.json").write_text(json.dumps(results))
    leave_world()
