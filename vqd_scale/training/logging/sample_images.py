"""Sample images of a run, generated periodically from fixed prompts and seeds."""

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
    """Sample images of the EMA weights, for monitoring a run."""

    prompts: tuple[str, ...] = Field(min_length=1)
    """Prompts, one image each."""
    every_images: PositiveInt = 1_000_000
    """Images between two grids; the last grid is at the end of the run."""
    steps: PositiveInt = 25
    """Number of sampling steps."""
    guidance: NonNegativeFloat = 3.0
    """Scale of classifier-free guidance."""
    seed: NonNegativeInt = 0
    """Seed of the samples."""


@torch.no_grad()
def whole_parameters(partition: Partition, flats: list[Tensor], world: World) -> dict[str, Tensor]:
    """Gather full parameters from all ranks' pieces, on the CPU in float32; collective.

    Args:
        partition: Pieces of this rank.
        flats: Flat tensors to gather, such as the master weights or the EMA.
        world: This process's rank and device.
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
    """Generate the image grid with a separate copy of the model; called on the first rank only.

    The engine's module is not used: gathering each block at each sampling step would cost more than one copy
    of the weights.

    Args:
        task: Training task; `load_pipeline` must be able to load its bundle.
        parameters: Full weights.
        config: Prompts and sampling options.
        path: Output PNG file.
        world: This process's rank and device.
    """
    with tempfile.TemporaryDirectory(prefix="vqd-scale-") as folder:
        task.export(parameters, Path(folder) / "bundle")
        pipeline = load_pipeline(Path(folder) / "bundle", device=world.device)
    count = len(config.prompts)
    settings = Settings(config.steps, config.guidance, top_p=1.0, seed=config.seed, batch=count)
    drawn = draw_batch(pipeline, config.prompts, picture_slots(config.seed, count), settings)
    images = drawn.permute(0, 2, 3, 1).numpy()
    publish_image(path, image_grid(images, config.prompts, columns=_COLUMNS))
