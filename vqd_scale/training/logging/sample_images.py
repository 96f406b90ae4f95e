"""What a run draws of the same prompts under the same seeds, now and then."""

import tempfile
from pathlib import Path

import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt
from torch import Tensor

from vqd_scale.core.config import Config
from vqd_scale.core.world import World
from vqd_scale.models.generate import Settings, draw_batch, load_pipeline
from vqd_scale.models.pipeline import picture_slots
from vqd_scale.reports.plots import image_grid, publish_image
from vqd_scale.training.partition import Partition
from vqd_scale.training.tasks.base import BatchType, Task

_COLUMNS = 4


class SampleImagesConfig(Config):
    """Which pictures a run draws of its averaged weights, for whoever watches it."""

    prompts: tuple[str, ...] = Field(min_length=1)
    every_images: PositiveInt = 1_000_000
    """Images between two sheets; the last one is at the end of the run."""
    steps: PositiveInt = 25
    guidance: NonNegativeFloat = 3.0
    seed: NonNegativeInt = 0


@torch.no_grad()
def whole_parameters(partition: Partition, flats: list[Tensor], world: World) -> dict[str, Tensor]:
    """Whole parameters from all ranks' pieces, on the CPU in float32; all ranks together.

    Args:
        partition: This rank's pieces.
        flats: The weights that are meant: masters, or the average's.
        world: This process's place among the ranks.
    """
    whole: dict[str, Tensor] = {}
    for piece in partition.pieces:
        flat = torch.zeros(torch.Size(piece.shape).numel(), device=world.device)
        if piece.length:
            flat[piece.start : piece.start + piece.length] = partition.view(flats, piece)
        whole[piece.name] = world.sum(flat).view(piece.shape).cpu()
    return whole


def draw_pictures(
    task: Task[BatchType], parameters: dict[str, Tensor], config: SampleImagesConfig, path: Path, world: World
) -> None:
    """Draw the sheet of prompts with a model of its own; called on the first rank only.

    The engine's module is left alone: gathering each block for each of the sampler's steps would cost more
    than the one copy of the weights that is drawn with.

    Args:
        task: What is trained; its bundle must be one that `load_pipeline` loads.
        parameters: Whole weights.
        config: What is drawn.
        path: The PNG file.
        world: This process's place among the ranks.
    """
    with tempfile.TemporaryDirectory(prefix="vqd-scale-") as folder:
        task.export(parameters, Path(folder) / "bundle")
        pipeline = load_pipeline(Path(folder) / "bundle", device=world.device)
    count = len(config.prompts)
    settings = Settings(config.steps, config.guidance, top_p=1.0, seed=config.seed, batch=count)
    drawn = draw_batch(pipeline, config.prompts, picture_slots(config.seed, count), settings)
    images = drawn.permute(0, 2, 3, 1).numpy()
    publish_image(path, image_grid(images, config.prompts, columns=_COLUMNS))
