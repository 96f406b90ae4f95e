"""Options of the pipelines: checked keywords, and plain Python values for numbers of any library."""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypedDict, cast

import torch

from vqd_scale.core.config import Config, validated
from vqd_scale.core.errors import UserError
from vqd_scale.diffusion.config import GuidanceScale, SamplerConfig, Truncation
from vqd_scale.models.conditions import Prompts
from vqd_scale.models.config import SamplingConfig

_DIFFUSERS = {
    "guidance_scale": "it is called 'guidance' here",
    "num_inference_steps": "it is called 'steps' here",
    "negative_prompt": "it is called 'negative' here",
    "prompt": "the prompts are the first argument",
    "num_images_per_prompt": "repeat the prompt in a list instead",
    "generator": "give an integer, or one per image, as 'seed'",
    "truncation_rate": "it is called 'truncation' here",
    "output_type": "the result contains PIL images, and all pixels in '.tensor'",
    "height": "a model generates images of one size",
    "width": "a model generates images of one size",
    "batch_size": "it is called 'batch' here",
    "callback": "use 'progress'",
}
"""Keywords of diffusers' pipelines, which must not be taken for keywords without effect."""
_DTYPES = ("float32", "bfloat16", "float16")


class AutoregressiveOptions(TypedDict, total=False):
    """Sampling options: keywords of `AutoregressiveTextToImage`."""

    guidance: float
    """Scale of classifier-free guidance; 1 turns guidance off. Default: 3."""
    truncation: float | None
    """Probability mass kept of each prediction (top-p). Default: no truncation."""
    seed: int | Sequence[int]
    """Seed below 2**31. Image i of a seed does not depend on the batch. A list has one seed per image."""


class SamplingOptions(TypedDict, total=False):
    """Sampling options: keywords of every sampling method of `TextToImage`."""

    steps: int
    """Number of sampling steps (network evaluations), 1 to the schedule's T, with the exact strided
    posterior. Default: 25."""
    sampler: SamplerConfig
    """Sampler that replaces ``steps``: any of `vqd_scale.diffusion.samplers`."""
    guidance: float | GuidanceScale
    """Scale of classifier-free guidance, or a schedule of it; 1 turns guidance off. Default: 3."""
    truncation: float | Truncation | None
    """Probability mass kept of each prediction (top-p); 0.86 is the papers' 0.86r. Default: no truncation."""
    negative: str | Sequence[str] | None
    """Negative prompt for all images, or one per image, used instead of the null condition."""
    seed: int | Sequence[int]
    """Seed below 2**31. Image i of a seed does not depend on the batch. A list has one seed per image;
    each image is then the first image of its seed."""
    batch: int
    """Number of images per batch. Default: 16."""
    progress: bool
    """Show a progress bar. Default: True."""


def sampling_config(options: Mapping[str, Any], allowed: Iterable[str]) -> SamplingConfig:
    """Validate options as the tools do.

    Args:
        options: Keywords and values.
        allowed: Known keywords.

    Returns:
        Sampler, guidance, truncation and batch size.

    Raises:
        TypeError: A keyword is unknown.
        UserError: A value is wrong.
    """
    for name in sorted(options.keys() - set(allowed)):
        near = difflib.get_close_matches(name, allowed, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"known are {', '.join(sorted(allowed))}"
        raise TypeError(f"unknown keyword '{name}': {_DIFFUSERS.get(name, hint)}")

    def tagged(name: str, kind: str, key: str) -> Any:  # noqa: ANN401 - plain values
        value = options[name]
        return (
            value.model_dump(mode="json")
            if isinstance(value, Config)
            else {"kind": kind, key: number(value, name)}
        )

    values: dict[str, Any] = {
        "sampler": {"kind": "strided", "steps": number(options.get("steps", 25), "steps")}
    }
    values["batch_size"] = number(options.get("batch", 16), "batch")
    if options.get("sampler") is not None:
        values["sampler"] = tagged("sampler", "strided", "steps")
    if "guidance" in options:
        values["guidance"] = tagged("guidance", "constant", "scale")
    if options.get("truncation") is not None:
        values["truncation"] = tagged("truncation", "top_p", "p")
    return validated(SamplingConfig, values, "sampling options")


def number(value: object, name: str) -> int | float:
    """Return a number as Python's, also of a numpy scalar or of an array or tensor with one element.

    Raises:
        UserError: The value is a truth value or no number.
    """
    value = _plain(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(f"{name}: given {value!r:.99}, allowed: a number.")
    return value


def as_list(prompts: Prompts, name: str = "prompts") -> Sequence[str] | Sequence[int]:
    """Return one or several prompts as a list.

    Raises:
        UserError: A prompt is neither text nor an integer.
    """
    plain: Any = _plain(prompts)
    listed: list[Any] = [plain] if isinstance(plain, str | int) else [_plain(item) for item in _items(plain)]
    if not listed or any(isinstance(item, bool) or not isinstance(item, str | int) for item in listed):
        raise UserError(
            f"{name}: there must be a prompt, and each must be a caption or a label, not {plain!r:.99}."
        )
    return listed


def seeds_of(seed: object, count: int) -> tuple[list[int], bool]:
    """Return one seed per image, and whether it was a single one.

    Raises:
        UserError: A seed is no integer or out of range, or the number of seeds differs from that of images.
    """
    plain = _plain(seed)
    is_single = isinstance(plain, int | float)
    seeds = [plain] * count if is_single else [_plain(item) for item in _items(plain)]
    if len(seeds) != count:
        raise UserError(f"seed: {len(seeds)} seeds for {count} images; give one seed, or one per image.")
    if any(type(value) is not int or not 0 <= value < 1 << 31 for value in seeds):
        raise UserError("seed: every seed must be an integer between 0 and 2**31 - 1.")
    return cast(list[int], seeds), is_single


def target_of(target: object) -> torch.dtype | torch.device:
    """Return a dtype or a device, also by its name.

    Raises:
        UserError: There is no such dtype or device, or networks cannot compute in it.
    """
    if isinstance(target, str) and target in _DTYPES:
        return getattr(torch, target)
    if isinstance(target, torch.dtype):
        if not target.is_floating_point or target.itemsize < 2:
            raise UserError(f"dtype: given {target}, allowed: {', '.join(_DTYPES)}.")
        return target
    try:
        device = torch.device(cast(Any, target))
    except (RuntimeError, TypeError):
        raise UserError(
            f"given {target!r:.99}, allowed: a device such as 'cpu' or 'cuda', or one of the dtypes "
            f"{', '.join(_DTYPES)}."
        ) from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("device: given 'cuda', but torch finds no such device here; take 'cpu'.")
    return device


def _plain(value: object) -> object:
    # Arrays and scalars of numpy, and tensors.
    return cast(Any, value).tolist() if hasattr(value, "tolist") else value


def _items(value: object) -> list[object]:
    return (
        list(cast(Iterable[object], value))
        if isinstance(value, Iterable) and not isinstance(value, bytes)
        else []
    )
