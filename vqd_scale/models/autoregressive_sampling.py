"""Text-to-image sampling with VQ-AR, token by token, with or without a KV cache."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from typing_extensions import Self, Unpack

from vqd_scale.core.errors import UserError
from vqd_scale.core.rng import Purpose, sample_codes, uniforms
from vqd_scale.core.watchdog import beat
from vqd_scale.diffusion.config import ConstantGuidance, Truncation
from vqd_scale.diffusion.guidance import Predict, apply_guidance, truncate
from vqd_scale.models.bundle import AutoregressiveBundle, load_autoregressive_bundle
from vqd_scale.models.conditions import Conditions, Prompts, conditions_of
from vqd_scale.models.options import AutoregressiveOptions, as_list, sampling_config, target_of
from vqd_scale.models.pipeline import FOLDERS, GeneratedImages, image_slots
from vqd_scale.models.s3_download import local_folder
from vqd_scale.nn.autoregressive import Autoregressive
from vqd_scale.tokenizers.base import to_pixels


class AutoregressiveTextToImage:
    """Autoregressive text-to-image pipeline, the baseline to which the papers compare `TextToImage`.

    Args:
        bundle: Loaded model.
    """

    def __init__(self, bundle: AutoregressiveBundle) -> None:
        self.bundle = bundle

    @classmethod
    def load(
        cls,
        path: Path | str,
        *,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
    ) -> Self:
        """Load a model from its bundle or a finished run; see `TextToImage.load`."""
        with local_folder(path, FOLDERS) as folder:
            bundle = load_autoregressive_bundle(folder)
        bundle.to(target_of(dtype or torch.float32))
        bundle.to(target_of(device or ("cuda" if torch.cuda.is_available() else "cpu")))
        return cls(bundle)

    def __call__(self, prompts: Prompts, **options: Unpack[AutoregressiveOptions]) -> GeneratedImages:
        """Generate one image per prompt, all in one batch.

        Args:
            prompts: One or several captions; an empty one means no caption.
            **options: See `AutoregressiveOptions`.

        Raises:
            TypeError: A keyword is unknown.
            UserError: A value is wrong.
        """
        prompts = as_list(prompts)
        config = sampling_config(options, AutoregressiveOptions.__annotations__)
        if not isinstance(config.guidance, ConstantGuidance):
            raise UserError("guidance: an autoregressive model takes a constant scale only.")
        slots = image_slots(options.get("seed", 0), len(prompts))
        return GeneratedImages(
            self.generate_batch(prompts, slots, guidance=config.guidance, truncation=config.truncation)
        )

    @torch.no_grad()
    def generate_batch(
        self,
        prompts: Sequence[str] | Sequence[int],
        slots: Int[Tensor, " batch"],
        *,
        guidance: ConstantGuidance,
        truncation: Truncation | None = None,
        negative: Sequence[str] | None = None,
        use_cache: bool = True,
        on_step: Callable[[int, int], None] | None = None,
    ) -> UInt8[Tensor, "batch 3 height width"]:
        """Generate one batch of images.

        Args:
            prompts: Captions.
            slots: Unique index of each image, int64; key of its random numbers, see `image_slots`.
            guidance: Scale of classifier-free guidance.
            truncation: Truncation of each prediction's codes. Default: none.
            negative: Negative prompts, used instead of the null condition.
            use_cache: Use a KV cache; False recomputes the keys and values of all previous tokens at each
                position.
            on_step: Called after each token with the number of finished tokens and the total.

        Returns:
            Pixels, on the CPU.
        """
        rows, columns = self.bundle.config.grid
        conditions = conditions_of(self.bundle, prompts, negative)
        predict = build_predict(
            self.bundle.model.network, conditions, guidance, len(prompts), use_cache=use_cache
        )
        if truncation is not None:
            predict = truncate(predict, truncation)
        slots = slots.to(self.bundle.device)
        tokens = sample_in_order(predict, slots, rows * columns, seed=0, on_step=on_step)
        return to_pixels(self.bundle.tokenizer.decode(tokens.unflatten(1, (rows, columns))))


def build_predict(
    network: Autoregressive,
    conditions: Conditions,
    guidance: ConstantGuidance,
    batch: int,
    *,
    use_cache: bool,
) -> Predict:
    """Return the prediction function of `sample_in_order`: guided log p of one token, [batch, 1, K].

    With guidance, one forward pass over twice the batch computes both predictions. An unconditional model has
    no guidance.

    Args:
        network: Network.
        conditions: Conditions of the batch.
        guidance: Scale of classifier-free guidance.
        batch: Number of images.
        use_cache: Use a KV cache; see `AutoregressiveTextToImage.generate_batch`.
    """
    condition, is_guided = conditions and conditions[0], False
    if conditions is not None and guidance.scale != 1:
        condition, is_guided = torch.cat(conditions), True
    caches = network.new_caches(condition, (1 + is_guided) * batch) if use_cache else None

    def log_p(tokens: Tensor, position: int) -> Float[Tensor, "batch 1 codes"]:
        if caches is None:
            logits = network(tokens[:, : position + 1], condition)[:, position]
        else:
            logits = network.step(tokens, position, caches)
        return logits.float().log_softmax(dim=-1)[:, None]

    def pair(tokens: Tensor, position: int) -> tuple[Tensor, Tensor]:
        prompt_log_p, null_log_p = log_p(torch.cat([tokens, tokens]), position).chunk(2)
        return prompt_log_p, null_log_p

    return apply_guidance(log_p, pair, guidance) if is_guided else log_p


@torch.no_grad()
def sample_in_order(
    predict: Predict,
    slots: Int[Tensor, " batch"],
    length: int,
    seed: int,
    on_step: Callable[[int, int], None] | None = None,
) -> Int[Tensor, "batch length"]:
    """Sample tokens in raster order, each by inverse CDF from one uniform number.

    Args:
        predict: log p(x_i | x_1 .. x_{i-1}) as [batch, 1, K], from the tokens so far and the position i;
            compose it with `guidance.apply_guidance` and `guidance.truncate`. Called with positions in order.
        slots: Global index of each image, int64; ``seed`` and slot are the key of the image's random numbers.
        length: Number of tokens per image.
        seed: 0 to 2**32 - 1.
        on_step: Called after each token with the number of finished tokens and the total.

    Returns:
        Tokens, int64, 0 to K-1.

    Raises:
        UserError: A prediction is not finite.
    """
    # float64: float32 is too coarse for the rarest codes.
    uniform_numbers = uniforms(seed, Purpose.SAMPLING, slots, length, dtype=torch.float64)
    tokens = slots.new_zeros((len(slots), length))
    all_finite = torch.ones((), dtype=torch.bool, device=slots.device)
    for position in range(length):
        beat()
        log_p = predict(tokens, position)
        all_finite = all_finite & log_p.amax(-1).isfinite().all()
        column = slice(position, position + 1)
        tokens[:, column] = sample_codes(log_p.exp(), uniform_numbers[:, column])
        if on_step is not None:
            on_step(position + 1, length)
    if not bool(all_finite):
        raise UserError("the network's prediction contains NaN or infinity; its weights are unusable.")
    return tokens
