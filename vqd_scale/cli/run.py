"""Functions shared by the tools: checks before torch is imported, and the training run."""

import logging
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from vqd_scale.core.atomic_io import Location
from vqd_scale.core.environment import place_among_ranks
from vqd_scale.core.errors import UserError
from vqd_scale.core.outputs import JOBS, TRAINING, check_output
from vqd_scale.core.s3 import SCHEME
from vqd_scale.core.signals import REQUEUE_EXIT_CODE, StopFlag
from vqd_scale.core.watchdog import phase, watched
from vqd_scale.data.shards.manifest import INDEX
from vqd_scale.data.shards.shard_index import ShardSet
from vqd_scale.training.config import STACKS
from vqd_scale.training.tasks.config import TokenizerRun, TokenRun

if TYPE_CHECKING:
    from vqd_scale.training.tasks.base import Task


def check_datasets(*folders: Location) -> None:
    """Raise a `UserError` unless the indices of local datasets exist; the first rank reads them later."""
    for folder in folders:
        if isinstance(folder, Path) and not (folder / INDEX).exists():
            ShardSet.open(folder)


def check_bundles(*folders: Path) -> None:
    """Raise a `UserError` unless tokenizer bundles exist."""
    for folder in folders:
        if not (folder / "config.json").is_file():
            raise UserError(f"{folder}: there is no tokenizer bundle here; train_tokenizer.py makes one.")


def check_model(model: str) -> None:
    """Raise a `UserError` unless a local folder contains a model, in any layout that can be loaded."""
    folder = Path(model)
    configs = (folder / "config.json", folder / "export" / "config.json", folder / "model_index.json")
    if not model.startswith(SCHEME) and not any(path.is_file() for path in configs):
        raise UserError(f"{folder}: there is no model bundle here; name a bundle, or the folder of a run.")


def run_task(config: TokenRun | TokenizerRun) -> bool:
    """Join the process group, train the task of the configuration, and leave the process group.

    Returns:
        True on rank 0, which prints and writes all further results.

    Raises:
        UserError: See `train`.
        SystemExit: With `REQUEUE_EXIT_CODE` after a signal and a saved checkpoint; a restart resumes the run.
    """
    check_datasets(*(source.path for source in config.data.mixed))
    check_output(config.run, TRAINING, siblings=[JOBS])

    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    logging.getLogger("vqd_scale").setLevel(logging.INFO)
    stacks = config.run / STACKS.format(place_among_ranks()[0])
    # Before the imports: they take long on a busy file system, and a signal during them must not be lost.
    with closing(StopFlag()), watched(config.health.hang_seconds, stacks):
        with phase("imports"):
            from vqd_scale.core.world import join_world, leave_world
            from vqd_scale.training.loop import train

        world = join_world()
        with phase("build of the network"):
            task = cast("Task[Any]", config.build(world))
        result = train(task, config, world, config.title)
        leave_world()
    if result.stopped:
        raise SystemExit(REQUEUE_EXIT_CODE)
    if world.is_first:
        print(f"trained on {result.images:,} images; the model is {config.run / 'export'}")
    return world.is_first
