"""Functions shared by the training tools: task selection and the training run."""

import logging
from collections.abc import Callable

from vqd_scale.core.signals import REQUEUE_EXIT_CODE
from vqd_scale.core.world import World, join_world, leave_world
from vqd_scale.training.config import RunConfig
from vqd_scale.training.loop import train
from vqd_scale.training.tasks.autoencoding import AutoencodingTask, TokenizerTrainConfig
from vqd_scale.training.tasks.autoregression import AutoregressionConfig, AutoregressionTask
from vqd_scale.training.tasks.base import BatchType, Task
from vqd_scale.training.tasks.denoising import DenoisingTask, TrainConfig
from vqd_scale.training.tasks.refitting import RefitConfig, RefitTask

TOKEN_RUNS = (TrainConfig, AutoregressionConfig)
"""Configuration classes of runs on token shards."""


def token_task(
    config: TrainConfig | AutoregressionConfig, world: World
) -> DenoisingTask | AutoregressionTask:
    """Build the task of a run on token shards.

    Raises:
        UserError: The shards do not fit the configuration.
    """
    if isinstance(config, TrainConfig):
        return DenoisingTask(config, world)
    return AutoregressionTask(config, world)


TOKENIZER_RUNS = (TokenizerTrainConfig, RefitConfig)
"""Configuration classes of runs on image shards."""


def tokenizer_task(config: TokenizerTrainConfig | RefitConfig, world: World) -> AutoencodingTask | RefitTask:
    """Build the task of a run on image shards.

    Raises:
        UserError: Images and tokenizer do not match.
    """
    if isinstance(config, RefitConfig):
        return RefitTask(config, world)
    return AutoencodingTask(config, world)


def run_task(build: Callable[[World], Task[BatchType]], config: RunConfig, title: str) -> bool:
    """Join the process group, train the task that ``build`` returns, and leave the process group.

    Returns:
        True on rank 0, which prints and writes all further results.

    Raises:
        UserError: See `train`.
        SystemExit: With `REQUEUE_EXIT_CODE` after a signal and a saved checkpoint; a restart resumes the run.
    """
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    logging.getLogger("vqd_scale").setLevel(logging.INFO)
    world = join_world()
    outcome = train(build(world), config, world, title)
    leave_world()
    if outcome.stopped:
        raise SystemExit(REQUEUE_EXIT_CODE)
    if world.is_first:
        print(f"trained on {outcome.images:,} images; the model is {config.run / 'export'}")
    return world.is_first
