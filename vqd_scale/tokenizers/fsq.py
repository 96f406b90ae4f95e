"""Finite scalar quantization (Mentzer et al., arXiv 2309.15505): a fixed grid as codebook."""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from vqd_scale.core.errors import UserError
from vqd_scale.tokenizers.autoencoder import StraightThrough
from vqd_scale.tokenizers.base import Images, Latents
from vqd_scale.tokenizers.codebook.quantizer import CodeIds, Vectors
from vqd_scale.tokenizers.config import FSQConfig

_MARGIN = 1e-3
"""Relative margin between the outermost levels and the bound, so that rounding cannot exceed the grid."""


class Grid(nn.Module):
    """Codebook of all combinations of the channels' levels; the first channel changes fastest with the id.

    The levels are saved with the weights, because they define the meaning of an id. The fingerprint of the
    weights then distinguishes tokens of different levels.

    Args:
        levels: Number of levels of each channel.
    """

    def __init__(self, levels: tuple[int, ...]) -> None:
        super().__init__()
        self.codes = math.prod(levels)
        strides = [math.prod(levels[:channel]) for channel in range(len(levels))]
        self.register_buffer("levels", torch.tensor(levels))
        self.register_buffer("strides", torch.tensor(strides), persistent=False)
        self.levels: Tensor
        self.strides: Tensor
        self.register_load_state_dict_pre_hook(_check_levels)

    def bound(self, vectors: Float[Tensor, "*shape width"]) -> Float[Tensor, "*shape width"]:
        """Squash latents between the outermost levels, in units of half the range (section 3)."""
        half = (self.levels - 1) * (1 - _MARGIN) / 2
        # An even number of levels has no middle level: a shift by half a step keeps zero near zero.
        offset = (self.levels % 2 == 0) / 2
        return ((vectors + torch.tan(offset / half)).tanh() * half - offset) / (self.levels // 2)

    def nearest(self, vectors: Vectors) -> CodeIds:
        """Return the id of the grid point nearest to each bounded vector."""
        half = self.levels // 2
        return (((vectors.float() * half).round().long() + half) * self.strides).sum(dim=-1)

    def lookup(self, ids: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape width"]:
        """Return the grid points of ids, with coordinates in [-1, 1]."""
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
    """Encoder, finite scalar quantization and decoder.

    Args:
        config: Architecture of the autoencoder.
    """

    def __init__(self, config: FSQConfig) -> None:
        super().__init__(config, len(config.levels), Grid(config.levels))

    def latents(self, images: Images) -> Latents:
        """Encode images to bounded vectors."""
        z = super().latents(images).permute(0, 2, 3, 1)
        return self.quantize.bound(z).permute(0, 3, 1, 2)
