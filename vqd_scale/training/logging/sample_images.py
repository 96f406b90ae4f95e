"""Sample images of a run, generated periodically from fixed prompts and seeds."""

import tempfile
from pathlib import Path

from torch import Tensor

from vqd_scale.core.world import World
from vqd_scale.data.loading.batch import BatchType
from vqd_scale.diffusion.config import ConstantGuidance, Strided
from vqd_scale.models.config import SamplingConfig
from vqd_scale.models.generate import generate_batch, load_pipeline
from vqd_scale.models.pipeline import image_slots
from vqd_scale.reports.plots import image_grid, publish_image
from vqd_scale.training.config import SampleImagesConfig
from vqd_scale.training.tasks.base import Task

_COLUMNS = 4


def write_sample_images(
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
    sampling = SamplingConfig(
        sampler=Strided(steps=config.steps), guidance=ConstantGuidance(scale=config.guidance)
    )
    batch = generate_batch(pipeline, config.prompts, image_slots(config.seed, count), sampling)
    images = batch.permute(0, 2, 3, 1).numpy()
    publish_image(path, image_grid(images, config.prompts, columns=_COLUMNS))
