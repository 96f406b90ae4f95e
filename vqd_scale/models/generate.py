"""Resumable generation of images for many prompts, one file each; a kill loses at most one batch."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from jaxtyping import Int, UInt8
from PIL import Image
from torch import Tensor

from vqd_scale.core.arrays import NDArray
from vqd_scale.core.atomic_io import publish_json, read_json
from vqd_scale.core.errors import UserError
from vqd_scale.core.outputs import check_output, reserve, safe_name
from vqd_scale.core.progress import progress_bar
from vqd_scale.data.shards.shard_index import ShardSet
from vqd_scale.data.shards.shard_io import KEY, read_shard
from vqd_scale.diffusion.config import ConstantGuidance
from vqd_scale.models.autoregressive_sampling import AutoregressiveTextToImage
from vqd_scale.models.bundle import is_autoregressive
from vqd_scale.models.config import SamplingConfig
from vqd_scale.models.pipeline import FOLDERS, TextToImage, image_slots
from vqd_scale.models.s3_download import local_folder
from vqd_scale.reports.plots import publish_image

GRID = "grid.png"
"""Name of the contact sheet beside the images."""

_LIST = "samples.json"
_PURPOSE = "sample.py"

Pipeline: TypeAlias = TextToImage | AutoregressiveTextToImage
"""Pipeline that generates an image for a prompt."""


@dataclass(frozen=True)
class Prompt:
    """A caption and its key in a dataset, which names its image."""

    key: str
    caption: str

    def path(self, folder: Path) -> Path:
        """Return the path of the image."""
        return folder / f"{safe_name(self.key, [GRID.removesuffix('.png')])}.png"


def prompts_of(shards: ShardSet, count: int) -> list[Prompt]:
    """Return the captions of the first ``count`` samples of a dataset.

    Raises:
        UserError: The dataset has fewer samples.
    """
    if count > shards.count:
        raise UserError(f"{shards.folder}: holds {shards.count} samples, fewer than the {count} asked for.")
    prompts: list[Prompt] = []
    for shard in shards.shards:
        for sample in read_shard(shard):
            if len(prompts) == count:
                return prompts
            prompts.append(Prompt(sample[KEY], sample["txt"].decode("utf-8").strip()))
    return prompts


def load_pipeline(
    path: Path | str, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> Pipeline:
    """Load the pipeline for the kind of model in a bundle; see `TextToImage.load`."""
    with local_folder(path, FOLDERS) as folder:
        kind = AutoregressiveTextToImage if is_autoregressive(folder) else TextToImage
        return kind.load(folder, dtype=dtype, device=device)


def generate_batch(
    pipe: Pipeline, prompts: Sequence[str], slots: Int[Tensor, " batch"], config: SamplingConfig
) -> UInt8[Tensor, "batch 3 height width"]:
    """Generate one batch of images, on the CPU.

    Args:
        pipe: Pipeline.
        prompts: Captions, or class indices as text.
        slots: Unique index of each image, which includes the seed; see `image_slots`.
        config: Sampling options.

    Raises:
        UserError: The sampler does not fit the noise schedule, or the guidance does not fit the model.
    """
    if isinstance(pipe, AutoregressiveTextToImage):
        if not isinstance(config.guidance, ConstantGuidance):
            raise UserError("guidance: an autoregressive model takes kind 'constant' only.")
        return pipe.generate_batch(prompts, slots, guidance=config.guidance, truncation=config.truncation)
    return pipe.generate_batch(
        prompts, slots, config.sampler, guidance=config.guidance, truncation=config.truncation
    )


def generate(pipe: Pipeline, model: str, prompts: list[Prompt], config: SamplingConfig, folder: Path) -> None:
    """Generate an image for each prompt into ``folder``; batches with all images present are skipped.

    Args:
        pipe: Pipeline.
        model: Name of the model in the list of samples.
        prompts: Captions and the names of their files.
        config: Sampling options.
        folder: Output folder for the images and the list of samples.

    Raises:
        UserError: The folder contains images of other prompts, model or options, or cannot be written.
    """
    record = {
        "model": model,
        "sampling": config.model_dump(mode="json"),
        "dtype": str(pipe.bundle.dtype).removeprefix("torch."),
        "prompts": {prompt.key: prompt.caption for prompt in prompts},
    }
    check_output(folder, _PURPOSE)
    if (folder / _LIST).exists() and read_json(folder / _LIST, "list of samples") != record:
        raise UserError(
            f"{folder}: contains images of other prompts, model or sampling options; give another --output."
        )
    reserve(folder, _PURPOSE, [_LIST, GRID, *(prompt.path(folder).name for prompt in prompts)])
    publish_json(folder / _LIST, record)
    with progress_bar("sample", len(prompts), unit="img") as bar:
        for start in range(0, len(prompts), config.batch_size):
            part = prompts[start : start + config.batch_size]
            if not all(prompt.path(folder).exists() for prompt in part):
                slots = image_slots(config.seed, len(prompts))[start : start + len(part)]
                images = generate_batch(pipe, [prompt.caption for prompt in part], slots, config)
                for prompt, image in zip(part, images.permute(0, 2, 3, 1).numpy(), strict=True):
                    publish_image(prompt.path(folder), Image.fromarray(image))
            bar.update(len(part))


def read_generated(folder: Path) -> tuple[list[Prompt], UInt8[NDArray[np.uint8], "count height width 3"]]:
    """Read the prompts and images written by `generate`.

    Raises:
        UserError: The list or an image is missing or damaged.
    """
    record = read_json(folder / _LIST, "list of samples (sample.py writes it)")
    prompts = [Prompt(key, caption) for key, caption in record["prompts"].items()]
    images: list[NDArray[np.uint8]] = []
    for path in (prompt.path(folder) for prompt in prompts):
        try:
            images.append(np.asarray(Image.open(path)))
        except OSError:
            raise UserError(f"{path}: missing or no image; delete it and run sample.py again.") from None
    return prompts, np.stack(images)
