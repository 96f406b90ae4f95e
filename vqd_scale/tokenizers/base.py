"""What the rest of the package asks of an image tokenizer."""

from typing import NamedTuple, Protocol

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

_PEAK = 1 + 1e-3
"""How far a picture's values may lie from zero: rounding is forgiven, another scale is not."""


class Draws(NamedTuple):
    """Names the random numbers by which codes are sampled; see `vqd_scale.core.rng`.

    Attributes:
        seed: The seed.
        slots: int64 [batch], each image's own number.
    """

    seed: int
    slots: Tensor


class ImageTokenizer(Protocol):
    """Images to a grid of discrete codes and back; another tokenizer is one file with one such class."""

    @property
    def codes(self) -> int:
        """K, the number of codes."""
        ...

    @property
    def factor(self) -> int:
        """How many pixels one token spans in each direction."""
        ...

    def encode(
        self, images: Float[Tensor, "batch 3 height width"], draws: Draws | None = None
    ) -> Int[Tensor, "batch rows columns"]:
        """Images in [-1, 1] to codes 0..K-1, deterministic unless ``draws`` ask for samples.

        Raises:
            UserError: Samples are asked of a tokenizer that has no probabilities.
        """
        ...

    def decode(self, tokens: Int[Tensor, "batch rows columns"]) -> Float[Tensor, "batch 3 height width"]:
        """Codes to float32 images in about [-1, 1]."""
        ...

    def latents(
        self, images: Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "batch code rows columns"]:
        """The vectors of images in [-1, 1] before codes are chosen for them."""
        ...

    def code_vectors(self) -> Float[Tensor, "codes width"]:
        """What the decoder is given for each code; a network's embeddings may start from them."""
        ...

    def compute_in(self, dtype: torch.dtype) -> object:
        """Encode and decode in another dtype from now on; what chooses a code stays float32."""
        ...


def to_signal(images: UInt8[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch 3 height width"]:
    """Bytes 0..255 to float32 in [-1, 1].

    Raises:
        ValueError: The images are not bytes, so that their range is not known.
    """
    if images.dtype != torch.uint8:
        raise ValueError(f"expected uint8 images, 0..255, got {images.dtype}")
    return images.float() / 127.5 - 1


def to_bytes(signal: Float[Tensor, "batch 3 height width"]) -> UInt8[Tensor, "batch 3 height width"]:
    """Float images in [-1, 1], values outside clamped, to bytes 0..255."""
    return ((signal.float().clamp(-1, 1) + 1) * 127.5).round().byte()


def check_signal(images: Float[Tensor, "batch 3 height width"], factor: int) -> None:
    """See that images are what `to_signal` gives and can be cut into whole tokens.

    Raises:
        ValueError: They are not.
    """
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise ValueError(
            f"expected float images [batch, 3, height, width], got {images.dtype} {list(images.shape)}"
        )
    height, width = images.shape[2:]
    if height % factor or width % factor or not images.numel():
        raise ValueError(f"images of {width}x{height} pixels are not multiples of the factor {factor}")
    peak = images.abs().amax().item()
    if not peak <= _PEAK:
        raise ValueError(f"expected images in [-1, 1] as `to_signal` gives them, found the value {peak:.4g}")


def check_tokens(tokens: Int[Tensor, "batch rows columns"], codes: int) -> None:
    """See that tokens are codes 0..K-1: on a GPU a wrong one would only be a device-side assertion.

    Raises:
        ValueError: They are not.
    """
    if tokens.ndim != 3 or tokens.is_floating_point() or not tokens.numel():
        raise ValueError(f"expected tokens [batch, rows, columns], got {tokens.dtype} {list(tokens.shape)}")
    low, high = (int(extreme) for extreme in tokens.aminmax())
    if low < 0 or high >= codes:
        raise ValueError(f"expected codes 0..{codes - 1}, found {low}..{high}")
