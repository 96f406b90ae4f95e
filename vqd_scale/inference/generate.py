"""Many pictures for many prompts, one file each, so that a kill costs one batch."""

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from numpy.typing import NDArray
from PIL import Image

from vqd_scale.core.errors import UserError
from vqd_scale.core.progress import progress_bar
from vqd_scale.core.report import publish_image
from vqd_scale.core.store import publish_json, read_json
from vqd_scale.data.index import ShardSet
from vqd_scale.data.shards import KEY, read_shard
from vqd_scale.diffusion.guidance import Constant, TopP
from vqd_scale.diffusion.sampler import Strided
from vqd_scale.inference.pipeline import TextToImage, picture_slots

_LIST = "samples.json"


@dataclass(frozen=True)
class Prompt:
    """A caption, and the name of its picture's file."""

    key: str
    caption: str


@dataclass(frozen=True)
class Settings:
    """All that decides the pictures beside model and prompts, see `TextToImage.draw`."""

    steps: int
    guidance: float
    top_p: float
    seed: int
    batch: int


def prompts_of(shards: ShardSet, count: int) -> list[Prompt]:
    """The captions of the first ``count`` samples of a set.

    Raises:
        UserError: The set holds fewer.
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


def generate(pipe: TextToImage, model: str, prompts: list[Prompt], settings: Settings, folder: Path) -> None:
    """Draw a picture for each prompt into ``folder``; pictures that are there are not drawn again.

    Args:
        pipe: The model.
        model: What to call it in the list of samples.
        prompts: Captions and the names of their files.
        settings: How to draw.
        folder: Where the pictures go, with a list of what they are.

    Raises:
        UserError: The folder holds pictures drawn otherwise, or cannot be written.
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
                images = pipe.draw(
                    [prompt.caption for prompt in part],
                    slots,
                    Strided(steps=settings.steps),
                    guidance=Constant(scale=settings.guidance),
                    truncation=TopP(rate=settings.top_p) if settings.top_p < 1 else None,
                )
                for prompt, image in zip(part, images.permute(0, 2, 3, 1).numpy(), strict=True):
                    publish_image(folder / f"{prompt.key}.png", Image.fromarray(image))
            bar.update(len(part))


def read_generated(folder: Path) -> tuple[list[Prompt], UInt8[NDArray[np.uint8], "count height width 3"]]:
    """The prompts and pictures that `generate` wrote.

    Raises:
        UserError: There are none, or not all of them.
    """
    listed = read_json(folder / _LIST, "list of samples (sample.py writes it)")
    prompts = [Prompt(key, caption) for key, caption in listed["prompts"].items()]
    missing = [prompt.key for prompt in prompts if not (folder / f"{prompt.key}.png").exists()]
    if missing:
        raise UserError(
            f"{folder}: {len(missing)} pictures are missing, {missing[0]}.png first; run sample.py again."
        )
    return prompts, np.stack([np.asarray(Image.open(folder / f"{prompt.key}.png")) for prompt in prompts])
