"""From prompts to pictures with VQ-AR: one token after the other, with what was seen kept or read again."""

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
"""Logits of the token at a place, from those before it; places come in order."""


class AutoregressiveTextToImage:
    """Prompts to pictures, token by token: the peer that the papers compare `TextToImage` with.

    Args:
        bundle: A loaded model.
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
        """Load a bundle, or the one that a finished run exported; see `TextToImage.load`.

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
        """Draw one picture for each prompt, all at once.

        Args:
            prompts: A caption or several; an empty one is no caption.
            guidance: Scale of classifier-free guidance, 1 is none.
            truncation: Share of the probability that each prediction keeps.
            seed: Below 2**31. Picture i under a seed is the same in whatever batch.

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
        """Draw one batch.

        Args:
            prompts: Captions.
            slots: int64, each picture's own number, which names its random numbers; see `picture_slots`.
            guidance: Scale of classifier-free guidance.
            truncation: Which codes each prediction keeps; all if not given.
            negative: Takes the place of the null condition.
            keep_seen: Whether keys and values of the tokens before are kept, or computed at each place again.
            on_step: Called after each token with the number of tokens done and of all.

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
    """What `sample_in_order` draws from: log p of the token at a place, guided, as [batch, 1, K].

    Guidance takes both predictions from one pass over twice the batch; without a condition there is none.

    Args:
        network: The network.
        conditions: Of the batch.
        guidance: The scale.
        batch: Number of images.
        keep_seen: See `AutoregressiveTextToImage.draw`.
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
    """Each place once: keys and values of what was seen are kept."""
    memories = network.memories(condition, batch)
    return lambda tokens, place: network.step(tokens, place, memories)


def uncached(network: Autoregressive, condition: Tensor | None) -> Evaluate:
    """The slow twin of `cached`: everything before a place is read again at every place."""
    return lambda tokens, place: network(tokens[:, : place + 1], condition)[:, place]


@torch.no_grad()
def sample_in_order(
    predict: Predict,
    slots: Int[Tensor, " batch"],
    length: int,
    seed: int,
    on_step: Callable[[int, int], None] | None = None,
) -> Int[Tensor, "batch length"]:
    """Draw tokens in raster order, each by inverse CDF from one uniform number.

    Args:
        predict: log p(x_i | x_1 .. x_{i-1}) as [batch, 1, K], from the tokens so far and the place i; compose
            it with `guidance.guided_pair` and `guidance.truncated`. Places are asked for in order.
        slots: Each image's global number, int64; with ``seed`` it names the image's random numbers.
        length: Tokens of an image.
        seed: 0 to 2**32 - 1.
        on_step: Called after each token with the number of tokens done and of all.

    Returns:
        int64 tokens, 0 to K-1.

    Raises:
        UserError: The prediction is not finite.
    """
    # float64: a codebook's tail needs the digits.
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
