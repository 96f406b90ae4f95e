"""Text-to-image sampling with a trained diffusion model."""

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import cast, overload

import torch
from jaxtyping import Int, UInt8
from PIL import Image
from torch import Tensor
from typing_extensions import Self, Unpack

from vqd_scale.core.errors import UserError
from vqd_scale.core.progress import progress_bar
from vqd_scale.diffusion.config import GuidanceScale, SamplerConfig, Truncation
from vqd_scale.diffusion.guidance import Predict, PredictPair, apply_guidance, truncate
from vqd_scale.diffusion.samplers import KnownTokens, Start, sample
from vqd_scale.diffusion.transition import MaskAndReplace
from vqd_scale.models.bundle import Bundle, load_bundle
from vqd_scale.models.conditions import Conditions, Prompts, conditions_of
from vqd_scale.models.exchange.diffusers import COMPONENTS, INDEX, plan_diffusers
from vqd_scale.models.images import ImageInput, fitted_image, fitted_mask, read_image
from vqd_scale.models.options import (
    SamplingOptions,
    as_list,
    number,
    sampling_config,
    seeds_of,
    target_of,
)
from vqd_scale.models.s3_download import local_folder
from vqd_scale.tokenizers.base import to_pixels, to_signal

FOLDERS = ("export", "export/tokenizer", *COMPONENTS)
"""Subfolders that a model folder may contain, in any of the layouts that can be loaded."""
_SEEDS = 1 << 32


class GeneratedImages(Sequence[Image.Image]):
    """Sequence of PIL images, with all pixels as one tensor.

    Args:
        tensor: Pixels, on the CPU.
    """

    def __init__(self, tensor: UInt8[Tensor, "count 3 height width"]) -> None:
        self.tensor = tensor

    def __len__(self) -> int:
        return len(self.tensor)

    @overload
    def __getitem__(self, index: int) -> Image.Image: ...
    @overload
    def __getitem__(self, index: slice) -> "GeneratedImages": ...
    def __getitem__(self, index: int | slice) -> "Image.Image | GeneratedImages":
        if isinstance(index, slice):
            return GeneratedImages(self.tensor[index])
        return Image.fromarray(self.tensor[index].permute(1, 2, 0).numpy())


class TextToImage:
    """Text-to-image pipeline.

    >>> from vqd_scale import TextToImage
    >>> pipe = TextToImage.load("runs/demo/model")
    >>> pipe("a red circle on white", steps=10, guidance=2.0, progress=False)[0].save("circle.png")

    The prompts of a class-conditional model are labels. For an unconditional model, pass one empty prompt per
    image.

    Args:
        bundle: Loaded model.
    """

    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle
        self.transition = MaskAndReplace(bundle.config.diffusion, bundle.config.codebook_size)

    @classmethod
    def load(
        cls,
        path: Path | str,
        *,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
    ) -> Self:
        """Load a model from its bundle, a finished run, or a diffusers VQDiffusionPipeline folder.

        Args:
            path: Model folder; an ``s3://`` folder is downloaded first.
            dtype: Compute dtype of the networks: float32 (default), bfloat16 or float16.
            device: Device. Default: a GPU if there is one.

        Raises:
            UserError: There is no such model, or a file of it is missing or damaged.
        """
        with local_folder(path, FOLDERS) as folder:
            is_diffusers = (folder / INDEX).is_file()
            bundle = plan_diffusers(folder).bundle() if is_diffusers else load_bundle(folder)
        return cls(bundle).to(
            dtype or torch.float32, device or ("cuda" if torch.cuda.is_available() else "cpu")
        )

    def to(self, *targets: torch.dtype | torch.device | str) -> Self:
        """Move the networks to a device, or set their compute dtype, in place.

        Token selection (softmax, guidance, posterior) stays in float32 and float64.

        Raises:
            UserError: There is no such device or dtype.
        """
        for target in map(target_of, targets):
            self.bundle.to(target)
        return self

    def __call__(self, prompts: Prompts, **options: Unpack[SamplingOptions]) -> GeneratedImages:
        """Generate one image per prompt.

        Args:
            prompts: One or several captions; an empty one means no caption.
            **options: See `SamplingOptions`.

        Raises:
            TypeError: A keyword is unknown.
            UserError: A value is wrong, the sampler does not fit the schedule, or lengths do not fit the
                prompts.
        """
        return self._generate(as_list(prompts), None, None, options)

    def inpaint(
        self, image: ImageInput, mask: ImageInput, prompts: Prompts, **options: Unpack[SamplingOptions]
    ) -> GeneratedImages:
        """Generate the masked part of an image and keep the rest.

        A token is fixed where the mask excludes all its pixels; all other tokens are sampled.

        Args:
            image: Input image; center-cropped to the model's aspect ratio and resized.
            mask: Mask of the image's size; what is painted is generated, other pixels are kept exactly. What
                is opaque is painted if the mask has transparent pixels, else what is white (128 and above).
            prompts: Prompts for the whole image, one output image each.
            **options: See `SamplingOptions`.

        Raises:
            UserError: Image and mask differ in size, the mask is all black, or see `__call__`.
        """
        image, mask = read_image(image, "image"), read_image(mask, "mask")
        if image.size != mask.size:
            raise UserError(
                f"the image has {image.size} pixels and its mask {mask.size}; give both the same size."
            )
        pixels, is_generated = self._fit(image), torch.from_numpy(fitted_mask(mask, *self._size))
        if not is_generated.any():
            raise UserError(
                "the mask is all black in the center of the image; paint the part to generate white."
            )
        factor = self.bundle.tokenizer.factor
        free = is_generated.unflatten(0, (-1, factor)).unflatten(2, (-1, factor)).any(3).any(1)
        known_tokens = KnownTokens(self._tokens(pixels), ~free.flatten()[None].to(self.bundle.device))
        images = self._generate(as_list(prompts), known_tokens, None, options)
        return GeneratedImages(torch.where(is_generated, images.tensor, pixels))

    def vary(
        self, image: ImageInput, prompts: Prompts, strength: float = 0.5, **options: Unpack[SamplingOptions]
    ) -> GeneratedImages:
        """Generate variations of an image: add noise to its tokens and denoise them under the prompt.

        Args:
            image: Input image; cropped and resized as in `inpaint`.
            prompts: Prompts, one output image each.
            strength: Fraction of the noise to add, in (0, 1]; also the fraction of sampling steps taken.
            **options: See `SamplingOptions`.

        Raises:
            UserError: The sampler cannot start from an image, or see `__call__`.
        """
        pixels = self._fit(read_image(image, "image"))
        start = Start(self._tokens(pixels), number(strength, "strength"))
        return self._generate(as_list(prompts), None, start, options)

    @torch.no_grad()
    def generate_batch(
        self,
        prompts: Sequence[str] | Sequence[int],
        slots: Int[Tensor, " batch"],
        sampler: SamplerConfig,
        *,
        guidance: GuidanceScale,
        truncation: Truncation | None = None,
        negative: Sequence[str] | None = None,
        known_tokens: KnownTokens | None = None,
        start: Start | None = None,
        on_step: Callable[[int, int], None] | None = None,
    ) -> UInt8[Tensor, "batch 3 height width"]:
        """Generate one batch of images; all other sampling methods call this one.

        Args:
            prompts: Captions, or labels.
            slots: Unique index of each image, int64; key of its random numbers, see `image_slots`.
            sampler: Sampler.
            guidance: Scale of classifier-free guidance.
            truncation: Truncation of each prediction's codes. Default: none.
            negative: Negative prompts, used instead of the null condition.
            known_tokens: Tokens to keep.
            start: Tokens to start from.
            on_step: Called after each step with the number of finished steps and the total.

        Returns:
            Pixels, on the CPU.

        Raises:
            UserError: The sampler does not fit the schedule.
        """
        rows, columns = self.bundle.config.grid
        conditions = conditions_of(self.bundle, prompts, negative)
        predict = apply_guidance(*self.predictions(conditions), guidance)
        if truncation is not None:
            predict = truncate(predict, truncation)
        slots = slots.to(self.bundle.device)
        tokens = sample(
            predict,
            sampler,
            self.transition,
            slots,
            rows * columns,
            seed=0,
            known_tokens=known_tokens,
            start=start,
            on_step=on_step,
        )
        return to_pixels(self.bundle.tokenizer.decode(tokens.unflatten(1, (rows, columns))))

    def _generate(
        self,
        prompts: Sequence[str] | Sequence[int],
        known_tokens: KnownTokens | None,
        start: Start | None,
        options: SamplingOptions,
    ) -> GeneratedImages:
        """Generate all images, batch by batch."""
        config = sampling_config(options, SamplingOptions.__annotations__)
        count, size = len(prompts), config.batch_size
        negative = options.get("negative")
        if negative is not None:
            negative = cast(Sequence[str], as_list(negative, "negative"))
            if isinstance(options.get("negative"), str):
                negative = list(negative) * count
            if len(negative) != count:
                raise UserError(
                    f"negative: {len(negative)} for {count} prompts; give one, or one per prompt."
                )
        slots = image_slots(options.get("seed", 0), count)
        parts = [slice(first, first + size) for first in range(0, count, size)]
        with progress_bar("sample", 0, unit="step", quiet=not options.get("progress", True)) as bar:

            def on_step(_: int, steps: int) -> None:
                bar.total = steps * len(parts)
                bar.update()

            images = [
                self.generate_batch(
                    prompts[part],
                    slots[part],
                    config.sampler,
                    guidance=config.guidance,
                    truncation=config.truncation,
                    negative=negative and negative[part],
                    known_tokens=known_tokens and _expand_known(known_tokens, len(slots[part])),
                    start=start and Start(start.tokens.expand(len(slots[part]), -1), start.strength),
                    on_step=on_step,
                )
                for part in parts
            ]
        return GeneratedImages(torch.cat(images))

    def predictions(self, conditions: Conditions) -> tuple[Predict, PredictPair]:
        """Return functions for log p(x0 | x_t, prompt), and for the pair of it and log p(x0 | x_t).

        The pair takes one forward pass over twice the batch.
        """

        @cache
        def prepare(with_negative: bool) -> Callable[[Tensor, int], Tensor]:
            condition = conditions and (torch.cat(conditions) if with_negative else conditions[0])
            return self.bundle.model.denoiser.prepare(condition)

        def conditional(tokens: Tensor, t: int) -> Tensor:
            return prepare(False)(tokens, t).float().log_softmax(dim=-1)

        def pair(tokens: Tensor, t: int) -> tuple[Tensor, Tensor]:
            if conditions is None:
                # Guidance has no effect on an unconditional model.
                log_p = conditional(tokens, t)
                return log_p, log_p
            logits = prepare(True)(torch.cat([tokens, tokens]), t)
            prompt, negative = logits.float().log_softmax(dim=-1).chunk(2)
            return prompt, negative

        return conditional, pair

    @property
    def _size(self) -> tuple[int, int]:
        """Width and height of the images in pixels."""
        rows, columns = self.bundle.config.grid
        return columns * self.bundle.tokenizer.factor, rows * self.bundle.tokenizer.factor

    def _fit(self, image: Image.Image) -> UInt8[Tensor, "3 height width"]:
        """Center-crop an image to the model's aspect ratio and resize it to the model's size."""
        return torch.from_numpy(fitted_image(image, *self._size)).permute(2, 0, 1)

    @torch.no_grad()
    def _tokens(self, pixels: UInt8[Tensor, "3 height width"]) -> Int[Tensor, "1 length"]:
        return self.bundle.tokenizer.encode(to_signal(pixels[None].to(self.bundle.device))).flatten(1)


def image_slots(seed: int | Sequence[int], count: int) -> Int[Tensor, " count"]:
    """Return the keys of the images' random numbers: seed in the upper 32 bits, image index in the lower.

    Raises:
        UserError: A seed is out of range, or the number of seeds differs from the number of images.
    """
    seeds, is_single = seeds_of(seed, count)
    targets = torch.arange(count) if is_single else torch.zeros(count, dtype=torch.int64)
    return torch.tensor(seeds) * _SEEDS + targets


def _expand_known(known_tokens: KnownTokens, count: int) -> KnownTokens:
    return KnownTokens(known_tokens.tokens.expand(count, -1), known_tokens.is_known.expand(count, -1))
