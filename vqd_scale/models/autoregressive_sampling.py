"""Text-to-image sampling with VQ-AR, token by token, with or without a KV cache."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeAlias

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from typing_extensions import Self

from vqd_scale.core.errors import UserError
from vqd_scale.core.rng import Purpose, drawn_codes, uniforms
from vqd_scale.diffusion.guidance import ConstantGuidance, Predict, TopP, Truncation, guided_pair, truncated
from vqd_scale.models.bundle import AutoregressiveBundle, load_autoregressive_bundle
from vqd_scale.models.conditions import Conditions, Prompts, conditions_of
from vqd_scale.models.pipeline import FOLDERS, Pictures, listed, picture_slots
from vqd_scale.models.s3_download import fetched
from vqd_scale.nn.autoregressive import Autoregressive
from vqd_scale.tokenizers.base import to_bytes

Evaluate: TypeAlias = Callable[[Int[Tensor, "batch length"], int], Float[Tensor, "batch codes"]]
"""Function from the previous tokens and a position to that position's logits; positions are called in
order."""


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
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Self:
        """Load a model from its bundle or a finished run; see `TextToImage.load`.

        Raises:
            UserError: There is no such model, or a file of it is missing or damaged.
        """
        chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        with fetched(path, FOLDERS) as folder:
            bundle = load_autoregressive_bundle(folder)
        for place in (dtype or torch.float32, chosen):
            bundle.to(place)
        return cls(bundle)

    def __call__(
        self, prompts: Prompts, *, guidance: float = 3.0, truncation: float = 1.0, seed: int = 0
    ) -> Pictures:
        """Generate one image per prompt, all in one batch.

        Args:
            prompts: One or several captions; an empty one means no caption.
            guidance: Scale of classifier-free guidance; 1 turns guidance off.
            truncation: Probability mass kept of each prediction (top-p).
            seed: Seed below 2**31. Image i of a seed does not depend on the batch.

        Raises:
            UserError: The seed is out of range.
        """
        prompts = listed(prompts)
        slots = picture_slots(seed, len(prompts))
        kept = TopP(p=truncation) if truncation < 1 else None
        return Pictures(self.draw(prompts, slots, guidance=ConstantGuidance(scale=guidance), truncation=kept))

    @torch.no_grad()
    def draw(
        self,
        prompts: Sequence[str] | Sequence[int],
        slots: Int[Tensor, " batch"],
        *,
        guidance: ConstantGuidance,
        truncation: Truncation | None = None,
        negative: Sequence[str] | None = None,
        keep_seen: bool = True,
        on_step: Callable[[int, int], None] | None = None,
    ) -> UInt8[Tensor, "batch 3 height width"]:
        """Generate one batch of images.

        Args:
            prompts: Captions.
            slots: Unique index of each image, int64; key of its random numbers, see `picture_slots`.
            guidance: Scale of classifier-free guidance.
            truncation: Truncation of each prediction's codes. Default: none.
            negative: Negative prompts, used instead of the null condition.
            keep_seen: Use a KV cache; False recomputes the keys and values of all previous tokens at each
                position.
            on_step: Called after each token with the number of finished tokens and the total.

        Returns:
            Pixels, on the CPU.
        """
        rows, columns = self.bundle.config.grid
        conditions = conditions_of(self.bundle, prompts, negative)
        predict = prediction(
            self.bundle.model.network, conditions, guidance, len(prompts), keep_seen=keep_seen
        )
        if truncation is not None:
            predict = truncated(predict, truncation)
        slots = slots.to(self.bundle.device)
        tokens = sample_in_order(predict, slots, rows * columns, seed=0, on_step=on_step)
        return to_bytes(self.bundle.tokenizer.decode(tokens.unflatten(1, (rows, columns)))).cpu()


def prediction(
    network: Autoregressive,
    conditions: Conditions,
    guidance: ConstantGuidance,
    batch: int,
    *,
    keep_seen: bool,
) -> Predict:
    """Return the prediction function of `sample_in_order`: guided log p of one token, [batch, 1, K].

    With guidance, one forward pass over twice the batch computes both predictions. An unconditional model has
    no guidance.

    Args:
        network: Network.
        conditions: Conditions of the batch.
        guidance: Scale of classifier-free guidance.
        batch: Number of images.
        keep_seen: Use a KV cache; see `AutoregressiveTextToImage.draw`.
    """
    told, is_guided = conditions.given, False
    if guidance.scale != 1 and conditions.given is not None and conditions.absent is not None:
        told, is_guided = torch.cat([conditions.given, conditions.absent]), True
    evaluate = cached(network, told, (1 + is_guided) * batch) if keep_seen else uncached(network, told)

    def log_p(tokens: Tensor, place: int) -> Float[Tensor, "batch 1 codes"]:
        return evaluate(tokens, place).float().log_softmax(dim=-1)[:, None]

    def pair(tokens: Tensor, place: int) -> tuple[Tensor, Tensor]:
        with_prompt, without = log_p(torch.cat([tokens, tokens]), place).chunk(2)
        return with_prompt, without

    return guided_pair(log_p, pair, guidance) if is_guided else log_p


def cached(network: Autoregressive, condition: Tensor | None, batch: int) -> Evaluate:
    """Return an evaluation with a KV cache; each position is computed once."""
    memories = network.memories(condition, batch)
    return lambda tokens, place: network.step(tokens, place, memories)


def uncached(network: Autoregressive, condition: Tensor | None) -> Evaluate:
    """Return an evaluation without a KV cache; all previous positions are recomputed at each position."""
    return lambda tokens, place: network(tokens[:, : place + 1], condition)[:, place]


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
            compose it with `guidance.guided_pair` and `guidance.truncated`. Called with positions in order.
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
    drawn = uniforms(seed, Purpose.SAMPLING, slots, length, dtype=torch.float64)
    tokens = slots.new_zeros((len(slots), length))
    sound = torch.ones((), dtype=torch.bool, device=slots.device)
    for place in range(length):
        log_p = predict(tokens, place)
        sound = sound & log_p.amax(-1).isfinite().all()
        here = slice(place, place + 1)
        tokens[:, here] = drawn_codes(log_p.exp(), drawn[:, here])
        if on_step is not None:
            on_step(place + 1, length)
    if not bool(sound):
        raise UserError(
            "the network's prediction held NaN or infinity while sampling; its weights are unusable."
        )
    return tokens
