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

_LIST = "samples.json"

Pipeline: TypeAlias = TextToImage | AutoregressiveTextToImage
"""Pipeline that generates an image for a prompt."""


@dataclass(frozen=True)
class Prompt:
    """A caption and the file name (stem) of its image."""

    key: str
    caption: str


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
    """Load the pipeline for the kind of model in a bundle; see `TextToImage.load`.

    Raises:
        UserError: There is no such model, or a file of it is missing or damaged.
    """
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
    if not (folder / _LIST).exists():
        publish_json(folder / _LIST, record)
    elif read_json(folder / _LIST, "list of samples") != record:
        raise UserError(
            f"{folder}: contains images of other prompts, model or sampling options; give another --output."
        )
    with progress_bar("sample", len(prompts), unit="img") as bar:
        for start in range(0, len(prompts), config.batch_size):
            part = prompts[start : start + config.batch_size]
            if not all((folder / f"{prompt.key}.png").exists() for prompt in part):
                slots = image_slots(config.seed, len(prompts))[start : start + len(part)]
                images = generate_batch(pipe, [prompt.caption for prompt in part], slots, config)
                for prompt, image in zip(part, images.permute(0, 2, 3, 1).numpy(), strict=True):
                    publish_image(folder / f"{prompt.key}.png", Image.fromarray(image))
            bar.update(len(part))


def read_generated(folder: Path) -> tuple[list[Prompt], UInt8[NDArray[np.uint8], "count height width 3"]]:
    """Read the prompts and images written by `generate`.

    Raises:
        UserError: The list or an image is missing.
    """
    record = read_json(folder / _LIST, "list of samples (sample.py writes it)")
    prompts = [Prompt(key, caption) for key, caption in record["prompts"].items()]
    missing = [prompt.key for prompt in prompts if not (folder / f"{prompt.key}.png").exists()]
    if missing:
        raise UserError(
            f"{folder}: {len(missing)} images are missing, {missing[0]}.png first; run sample.py again."
        )
    return prompts, np.stack([np.asarray(Image.open(folder / f"{prompt.key}.png")) for prompt in prompts])
