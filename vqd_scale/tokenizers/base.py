"""Image tokenizer interface, and conversion between bytes and floats."""

from abc import ABC, abstractmethod
from typing import NamedTuple, TypeAlias

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from vqd_scale.core.errors import UserError

Images: TypeAlias = Float[Tensor, "batch 3 height width"]
TokenGrid: TypeAlias = Int[Tensor, "batch rows columns"]
Latents: TypeAlias = Float[Tensor, "batch code rows columns"]

_PEAK = 1 + 1e-3
"""Largest accepted absolute value of an image: tolerates rounding, rejects another value range."""


class SamplingKey(NamedTuple):
    """Key of the random numbers used to sample codes; see `vqd_scale.core.rng`.

    Attributes:
        seed: Seed of the random numbers.
        slots: Unique index of each image, int64 [batch].
    """

    seed: int
    slots: Tensor


class ImageTokenizer(nn.Module, ABC):
    """Image tokenizer: images to a grid of discrete codes and back.

    >>> import torch
    >>> from vqd_scale import ImageTokenizer
    >>> from vqd_scale.tokenizers.config import VQGANConfig
    >>> tokenizer: ImageTokenizer = VQGANConfig(codebook_size=16, channels=32).build()
    >>> tokens = tokenizer.encode(torch.zeros(1, 3, 32, 32))
    >>> tokens.shape, tokenizer.decode(tokens).shape
    (torch.Size([1, 4, 4]), torch.Size([1, 3, 32, 32]))

    Attributes:
        codes: K, the number of codes.
        factor: Downsampling factor: pixels per token in each direction.
    """

    codes: int
    factor: int

    @abstractmethod
    def encode(self, images: Images, sampling_key: SamplingKey | None = None) -> TokenGrid:
        """Encode images in [-1, 1] to codes 0..K-1; deterministic unless ``sampling_key`` is given.

        Raises:
            UserError: ``sampling_key`` is given, but the tokenizer has no code probabilities.
        """

    @abstractmethod
    def decode(self, tokens: TokenGrid) -> Images:
        """Decode codes to float32 images in about [-1, 1]."""

    @abstractmethod
    def latents(self, images: Images) -> Latents:
        """Return the vectors of images in [-1, 1] before quantization."""

    @abstractmethod
    def code_vectors(self) -> Float[Tensor, "codes width"]:
        """Return the decoder's input vector for each code, a possible initialization of token embeddings."""

    @abstractmethod
    def compute_in(self, dtype: torch.dtype) -> None:
        """Set the dtype of encoding and decoding; the selection of codes stays float32."""


def to_signal(images: UInt8[Tensor, "batch 3 height width"]) -> Images:
    """Convert bytes 0..255 to float32 in [-1, 1].

    Raises:
        ValueError: The dtype is not uint8, so the value range is unknown.
    """
    if images.dtype != torch.uint8:
        raise ValueError(f"expected uint8 images, 0..255, got {images.dtype}")
    return images.float() / 127.5 - 1


def to_bytes(signal: Images) -> UInt8[Tensor, "batch 3 height width"]:
    """Convert float images in [-1, 1] to bytes 0..255; values outside are clamped."""
    return ((signal.float().clamp(-1, 1) + 1) * 127.5).round().byte()


def to_pixels(signal: Images) -> UInt8[Tensor, "batch 3 height width"]:
    """Convert a decoder's images in [-1, 1] to bytes on the CPU.

    Raises:
        UserError: A value is NaN or infinite, which bytes cannot represent.
    """
    is_finite = signal.isfinite().all()
    # The copy waits for the device anyway; the check is read after it.
    pixels = to_bytes(signal).cpu()
    if not bool(is_finite):
        raise UserError(
            "the decoded images contain NaN or infinity: in float16 the decoder's values overflow, take "
            "bfloat16 or float32; in other dtypes its weights are unusable."
        )
    return pixels


def check_signal(images: Images, factor: int) -> None:
    """Raise a `ValueError` unless images are those of `to_signal`, of a size divisible by ``factor``."""
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


def check_tokens(tokens: TokenGrid, codes: int) -> None:
    """Check that tokens are codes 0..K-1; on a GPU a wrong code raises only a device-side assertion.

    Raises:
        ValueError: The dtype or shape is wrong, or a token is not a code.
    """
    if tokens.ndim != 3 or tokens.is_floating_point() or not tokens.numel():
        raise ValueError(f"expected tokens [batch, rows, columns], got {tokens.dtype} {list(tokens.shape)}")
    # One copy from the device for both.
    low, high = torch.stack(tokens.aminmax()).cpu().tolist()
    if low < 0 or high >= codes:
        raise ValueError(f"expected codes 0..{codes - 1}, found {low}..{high}")
