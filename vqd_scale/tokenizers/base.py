"""What the rest of the package asks of an image tokenizer."""

from typing import Protocol

from jaxtyping import Float, Int, UInt8
from torch import Tensor


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

    def encode(self, images: Float[Tensor, "batch 3 height width"]) -> Int[Tensor, "batch rows columns"]:
        """Images in [-1, 1] to codes 0..K-1, deterministic."""
        ...

    def decode(self, tokens: Int[Tensor, "batch rows columns"]) -> Float[Tensor, "batch 3 height width"]:
        """Codes to images in [-1, 1]."""
        ...


def to_signal(images: UInt8[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch 3 height width"]:
    """Bytes 0..255 to float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def to_bytes(signal: Float[Tensor, "batch 3 height width"]) -> UInt8[Tensor, "batch 3 height width"]:
    """Float images in [-1, 1], values outside clamped, to bytes 0..255."""
    return ((signal.float().clamp(-1, 1) + 1) * 127.5).round().byte()
