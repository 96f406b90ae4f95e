"""Resumable generation of images for many prompts, one file each; a kill loses at most one batch."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from jaxtyping import Int, UInt8
from PIL import Image
from pydantic import TypeAdapter
from torch import Tensor
from typing_extensions import TypedDict

from vqd_scale.core.arrays import NDArray
from vqd_scale.core.atomic_io import publish_json, read_json
from vqd_scale.core.errors import UserError
from vqd_scale.core.fingerprint import configs_digest, first_difference, json_digest, tensors_digest
from vqd_scale.core.outputs import check_output, reserve, safe_name
from vqd_scale.core.progress import progress_bar
from vqd_scale.core.safe_json import JSON_OBJECT
from vqd_scale.data.shards.decode import BadSample, decode_captions
from vqd_scale.data.shards.shard_index import ShardSet
from vqd_scale.data.shards.shard_io import KEY, read_shard
from vqd_scale.diffusion.config import ConstantGuidance, GuidanceScale
from vqd_scale.models.autoregressive_sampling import AutoregressiveTextToImage
from vqd_scale.models.bundle import is_autoregressive
from vqd_scale.models.conditions import check_prompts
from vqd_scale.models.config import SamplingConfig
from vqd_scale.models.pipeline import FOLDERS, TextToImage, image_slots
from vqd_scale.models.s3_download import local_folder
from vqd_scale.reports.plots import inputs_of, publish_image

GRID = "grid.png"
"""Name of the contact sheet beside the images."""

_LIST = "samples.json"
_PURPOSE = "sample.py"

Pipeline: TypeAlias = TextToImage | AutoregressiveTextToImage
"""Pipeline that generates an image for a prompt."""


_VERSION = 1
"""Version of the meaning of sampling; raised when equal inputs give other images."""


@dataclass(frozen=True)
class Prompt:
    """A caption, its key in a dataset, which names its image, and the number of its random numbers."""

    key: str
    caption: str
    number: int

    def path(self, folder: Path) -> Path:
        """Return the path of the image."""
        return folder / f"{safe_name(self.key, [GRID.removesuffix('.png')])}.png"


def prompts_of(shards: ShardSet, count: int) -> list[Prompt]:
    """Return the captions of the first ``count`` samples of a dataset.

    Raises:
        UserError: The dataset has fewer samples, or one of them has no caption.
    """
    if count > shards.count:
        raise UserError(f"{shards.folder}: holds {shards.count} samples, fewer than the {count} asked for.")
    prompts: list[Prompt] = []
    for shard in shards.shards:
        for sample in read_shard(shard):
            if len(prompts) == count:
                return prompts
            try:
                caption = decode_captions(sample)[0]
            except BadSample as error:
                raise UserError(f"{shard.path}: sample '{sample[KEY]}' {error}.") from None
            prompts.append(Prompt(sample[KEY], caption, len(prompts)))
    return prompts


def load_pipeline(
    path: Path | str, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> Pipeline:
    """Load the pipeline for the kind of model in a bundle; see `TextToImage.load`."""
    with local_folder(path, FOLDERS) as folder:
        kind = AutoregressiveTextToImage if is_autoregressive(folder) else TextToImage
        return kind.load(folder, dtype=dtype, device=device)


def model_identity(name: str, pipe: Pipeline) -> dict[str, Any]:
    """Return a model's name, and digests of everything that its images depend on besides the sampling.

    The digests are those of the loaded configuration and tensors, in the dtype of ``pipe``.
    """
    bundle = pipe.bundle
    return {
        "name": name,
        "version": _VERSION,
        "config_sha256": json_digest(bundle.config.model_dump(mode="json", exclude={"origin"})),
        "weights_sha256": tensors_digest(bundle.model.state_dict()),
        "tokenizer_config_sha256": configs_digest(bundle.tokenizer),
        "tokenizer_sha256": tensors_digest(bundle.tokenizer.state_dict()),
    }


def check_sampling(pipe: Pipeline, prompts: Sequence[str], config: SamplingConfig) -> None:
    """Check before the first output that a model, its prompts and the sampling options go together.

    Raises:
        UserError: The sampler does not fit the noise schedule, the guidance or the negative prompt does not
            fit the model, or a prompt is no class of the model.
    """
    negative = None if config.negative is None else [config.negative]
    check_prompts(pipe.bundle.model.condition, prompts, negative)
    if isinstance(pipe, AutoregressiveTextToImage):
        _constant(config.guidance)
    else:
        config.sampler.build().plan(pipe.transition, pipe.transition.steps - 1)


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
        UserError: See `check_sampling`; or a prediction is not finite.
    """
    negative = None if config.negative is None else [config.negative] * len(prompts)
    if isinstance(pipe, AutoregressiveTextToImage):
        return pipe.generate_batch(
            prompts,
            slots,
            guidance=_constant(config.guidance),
            truncation=config.truncation,
            negative=negative,
        )
    return pipe.generate_batch(
        prompts,
        slots,
        config.sampler,
        guidance=config.guidance,
        truncation=config.truncation,
        negative=negative,
    )


def generate(
    pipe: Pipeline, model: dict[str, Any], prompts: list[Prompt], config: SamplingConfig, folder: Path
) -> None:
    """Generate an image for each prompt into ``folder``; batches with all images present are skipped.

    Nothing is written before the first batch is generated, so a refused call leaves no trace.

    Args:
        pipe: Pipeline.
        model: Identity of the model; see `model_identity`.
        prompts: Captions, the names of their files, and their numbers.
        config: Sampling options.
        folder: Output folder for the images and the list of samples.

    Raises:
        UserError: The folder contains images of other prompts, model or options, or cannot be written; two
            prompts have the same key; or see `check_sampling`.
    """
    paths = [prompt.path(folder) for prompt in prompts]
    if len(set(paths)) < len(paths):
        key = Counter(prompt.key for prompt in prompts).most_common(1)[0][0]
        raise UserError(
            f"samples: the key '{key}' occurs twice, and keys name the images; index other shards."
        )
    check_sampling(pipe, [prompt.caption for prompt in prompts], config)
    inputs = {
        "model": {key: value for key, value in model.items() if key != "name"},
        "sampling": config.model_dump(mode="json", exclude={"batch_size"}),
        "dtype": str(pipe.bundle.dtype).removeprefix("torch."),
    }
    record = {**inputs, "prompts": [[prompt.number, prompt.key, prompt.caption] for prompt in prompts]}
    check_output(folder, _PURPOSE)
    if (folder / _LIST).exists():
        difference = first_difference(read_json(folder / _LIST, "list of samples", JSON_OBJECT), record)
        if difference is not None:
            raise UserError(
                f"{folder}: contains images of other prompts, model or sampling options ({difference}); give "
                "another --output."
            )
    fingerprints = [json_digest([inputs, prompt.number, prompt.caption]) for prompt in prompts]
    present = [_is_present(path, fingerprint) for path, fingerprint in zip(paths, fingerprints, strict=True)]
    numbers = torch.tensor([prompt.number for prompt in prompts])
    slots = image_slots(config.seed, 1) + numbers
    with progress_bar("sample", len(prompts), unit="img") as bar:
        for start in range(0, len(prompts), config.batch_size):
            part = range(start, min(start + config.batch_size, len(prompts)))
            if not all(present[index] for index in part):
                captions = [prompts[index].caption for index in part]
                images = generate_batch(pipe, captions, slots[part.start : part.stop], config)
                if not (folder / _LIST).exists():
                    reserve(folder, _PURPOSE, [_LIST, GRID, *(path.name for path in paths)])
                    publish_json(folder / _LIST, record)
                for index, image in zip(part, images.permute(0, 2, 3, 1).numpy(), strict=True):
                    publish_image(paths[index], Image.fromarray(image), fingerprints[index])
            bar.update(len(part))


def _is_present(path: Path, fingerprint: str) -> bool:
    if not path.exists():
        return False
    if inputs_of(path) != fingerprint:
        raise UserError(
            f"{path}: not the image of this prompt, model and sampling; delete it, or give another --output."
        )
    return True


def _constant(guidance: GuidanceScale) -> ConstantGuidance:
    if not isinstance(guidance, ConstantGuidance):
        raise UserError("guidance: an autoregressive model takes kind 'constant' only.")
    return guidance


class _Record(TypedDict):
    """List of samples, as far as it is read back."""

    prompts: list[tuple[int, str, str]]


_RECORD = TypeAdapter(_Record)


def is_grid(path: Path) -> bool:
    """Return whether a file is the contact sheet of a folder of samples."""
    return path.name == GRID and (path.parent / _LIST).exists()


def read_generated(folder: Path) -> tuple[list[Prompt], UInt8[NDArray[np.uint8], "count height width 3"]]:
    """Read the prompts and images written by `generate`.

    Raises:
        UserError: The list or an image is missing or damaged.
    """
    record = read_json(folder / _LIST, "list of samples (sample.py writes it)", _RECORD)
    prompts = [Prompt(key, caption, number) for number, key, caption in record["prompts"]]
    images: list[NDArray[np.uint8]] = []
    for path in (prompt.path(folder) for prompt in prompts):
        try:
            images.append(np.asarray(Image.open(path, formats=["PNG"])))
        except (OSError, SyntaxError, ValueError):
            raise UserError(f"{path}: missing or no image; delete it and run sample.py again.") from None
    return prompts, np.stack(images)
