"""Resumable generation of images for many prompts, one file each; a kill loses at most one batch."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
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
from vqd_scale.diffusion.guidance import ConstantGuidance, TopP
from vqd_scale.diffusion.samplers import Strided
from vqd_scale.models.autoregressive_sampling import AutoregressiveTextToImage
from vqd_scale.models.bundle import is_autoregressive
from vqd_scale.models.pipeline import FOLDERS, TextToImage, picture_slots
from vqd_scale.models.s3_download import fetched
from vqd_scale.reports.plots import publish_image

_LIST = "samples.json"

Pipeline: TypeAlias = TextToImage | AutoregressiveTextToImage
"""Pipeline that generates an image for a prompt."""


@dataclass(frozen=True)
class Prompt:
    """A caption and the file name (stem) of its image."""

    key: str
    caption: str


@dataclass(frozen=True)
class Settings:
    """All sampling options that determine the images, besides model and prompts; see `TextToImage.draw`."""

    steps: int
    """Number of sampling steps; ignored by an autoregressive model, which takes one step per token."""
    guidance: float
    top_p: float
    seed: int
    batch: int


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
    with fetched(path, FOLDERS) as folder:
        kind = AutoregressiveTextToImage if is_autoregressive(folder) else TextToImage
        return kind.load(folder, dtype=dtype, device=device)


def draw_batch(
    pipe: Pipeline, prompts: Sequence[str], slots: Int[Tensor, " batch"], settings: Settings
) -> UInt8[Tensor, "batch 3 height width"]:
    """Generate one batch of images, on the CPU.

    Args:
        pipe: Pipeline.
        prompts: Captions.
        slots: Unique index of each image, which includes the seed; see `picture_slots`.
        settings: Sampling options.

    Raises:
        UserError: The number of steps does not fit the schedule.
    """
    guidance = ConstantGuidance(scale=settings.guidance)
    truncation = TopP(p=settings.top_p) if settings.top_p < 1 else None
    if isinstance(pipe, AutoregressiveTextToImage):
        return pipe.draw(prompts, slots, guidance=guidance, truncation=truncation)
    sampler = Strided(steps=settings.steps)
    return pipe.draw(prompts, slots, sampler, guidance=guidance, truncation=truncation)


def generate(pipe: Pipeline, model: str, prompts: list[Prompt], settings: Settings, folder: Path) -> None:
    """Generate an image for each prompt into ``folder``; batches with all images present are skipped.

    Args:
        pipe: Pipeline.
        model: Name of the model in the list of samples.
        prompts: Captions and the names of their files.
        settings: Sampling options.
        folder: Output folder for the images and the list of samples.

    Raises:
        UserError: The folder contains images of other prompts, model or settings, or cannot be written.
    """
    listed = {
        "model": model,
        "settings": {**asdict(settings), "dtype": str(pipe.bundle.dtype).removeprefix("torch.")},
        "prompts": {prompt.key: prompt.caption for prompt in prompts},
    }
    if not (folder / _LIST).exists():
        publish_json(folder / _LIST, listed)
    elif read_json(folder / _LIST, "list of samples") != listed:
        raise UserError(f"{folder}: holds pictures of other prompts, model or settings; name another folder.")
    batches = range(0, len(prompts), settings.batch)
    with progress_bar("sample", len(prompts), unit="img") as bar:
        for start in batches:
            part = prompts[start : start + settings.batch]
            if not all((folder / f"{prompt.key}.png").exists() for prompt in part):
                slots = picture_slots(settings.seed, len(prompts))[start : start + len(part)]
                images = draw_batch(pipe, [prompt.caption for prompt in part], slots, settings)
                for prompt, image in zip(part, images.permute(0, 2, 3, 1).numpy(), strict=True):
                    publish_image(folder / f"{prompt.key}.png", Image.fromarray(image))
            bar.update(len(part))


def read_generated(folder: Path) -> tuple[list[Prompt], UInt8[NDArray[np.uint8], "count height width 3"]]:
    """Read the prompts and images written by `generate`.

    Raises:
        UserError: The list or an image is missing.
    """
    listed = read_json(folder / _LIST, "list of samples (sample.py writes it)")
    prompts = [Prompt(key, caption) for key, caption in listed["prompts"].items()]
    missing = [prompt.key for prompt in prompts if not (folder / f"{prompt.key}.png").exists()]
    if missing:
        raise UserError(
            f"{folder}: {len(missing)} pictures are missing, {missing[0]}.png first; run sample.py again."
        )
    return prompts, np.stack([np.asarray(Image.open(folder / f"{prompt.key}.png")) for prompt in prompts])
