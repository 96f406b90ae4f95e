"""Finite scalar quantisation (Mentzer et al., arXiv 2309.15505): the codebook is a grid, not learned."""

import math
from typing import Annotated, Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn

from vqd_scale.core.errors import UserError
from vqd_scale.tokenizers.autoencoder import StraightThrough
from vqd_scale.tokenizers.convolutions import ConvolutionsConfig

_MARGIN = 1e-3
"""By how much the outermost levels are kept off the bound, so that rounding never leads beyond them."""


class FSQConfig(ConvolutionsConfig):
    """Shape of the autoencoder; K is the product of the levels."""

    kind: Literal["fsq"] = "fsq"
    levels: tuple[Annotated[int, Field(ge=2)], ...] = Field(default=(8, 5, 5, 5), min_length=1)
    """How many values each number of a latent is rounded to."""


class Grid(nn.Module):
    """All combinations of a few values a channel; the first channel's value changes fastest with the id.

    The levels are saved with the weights: they alone say what an id means, and the fingerprint of the weights
    is to tell tokens of other levels apart.

    Args:
        levels: How many values each channel has.
    """

    def __init__(self, levels: tuple[int, ...]) -> None:
        super().__init__()
        self.codes = math.prod(levels)
        strides = [math.prod(levels[:place]) for place in range(len(levels))]
        self.register_buffer("levels", torch.tensor(levels))
        self.register_buffer("strides", torch.tensor(strides), persistent=False)
        self.levels: Tensor
        self.strides: Tensor
        self.register_load_state_dict_pre_hook(_check_levels)

    def bounded(self, vectors: Float[Tensor, "*shape width"]) -> Float[Tensor, "*shape width"]:
        """Latents squeezed smoothly between the outermost levels, in units of half the range (section 3)."""
        half = (self.levels - 1) * (1 - _MARGIN) / 2
        # An even number of levels has none in the middle: half a step aside, and zero stays near zero.
        offset = (self.levels % 2 == 0) / 2
        return ((vectors + torch.tan(offset / half)).tanh() * half - offset) / (self.levels // 2)

    def nearest(self, vectors: Float[Tensor, "count width"]) -> Int[Tensor, " count"]:
        """The id of the grid point that bounded vectors are rounded to."""
        half = self.levels // 2
        return (((vectors.float() * half).round().long() + half) * self.strides).sum(dim=-1)

    def lookup(self, ids: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape width"]:
        """The grid points of ids, each number in [-1, 1]."""
        half = self.levels // 2
        return (ids.unsqueeze(-1) // self.strides % self.levels - half) / half


def _check_levels(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: object) -> None:
    saved = state.get(f"{prefix}levels")
    if isinstance(module, Grid) and saved is not None and saved.tolist() != module.levels.tolist():
        raise UserError(
            f"levels: the weights were trained with {saved.tolist()}, not with {module.levels.tolist()}; "
            f"take theirs."
        )


class FSQ(StraightThrough[Grid]):
    """Encoder, rounding and decoder.

    Args:
        config: The autoencoder's shape.
    """

    def __init__(self, config: FSQConfig) -> None:
        super().__init__(config, len(config.levels), Grid(config.levels))
        self.config = config

    def latents(
        self, images: Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "batch code rows columns"]:
        """Images to bounded vectors."""
        z = super().latents(images).permute(0, 2, 3, 1)
        return self.quantize.bounded(z).permute(0, 3, 1, 2)
