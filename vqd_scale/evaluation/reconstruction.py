"""Reconstruction metrics: PSNR and SSIM of 8-bit images."""

import torch
from jaxtyping import Float64, UInt8
from torch import Tensor
from torch.nn import functional

from vqd_scale.core.errors import UserError

_PEAK = 255.0
_WINDOW = 11
_SIGMA = 1.5
_LUMINANCE_CONSTANT = (0.01 * _PEAK) ** 2
_CONTRAST_CONSTANT = (0.03 * _PEAK) ** 2


def psnr(
    originals: UInt8[Tensor, "batch 3 height width"], reconstructions: UInt8[Tensor, "batch 3 height width"]
) -> Float64[Tensor, " batch"]:
    """Compute each image's peak signal-to-noise ratio in dB, over all channels; infinite for equal images.

    Raises:
        ValueError: The inputs are not uint8 images of the same shape.
    """
    _check(originals, reconstructions)
    error = (originals.double() - reconstructions.double()).square().flatten(1).mean(dim=1)
    return 10 * torch.log10(_PEAK**2 / error)


def ssim(
    originals: UInt8[Tensor, "batch 3 height width"], reconstructions: UInt8[Tensor, "batch 3 height width"]
) -> Float64[Tensor, " batch"]:
    """Compute the structural similarity of each image, averaged over color channels and all full windows.

    Source: Wang, Bovik, Sheikh, Simoncelli, "Image quality assessment: from error visibility to structural
    similarity", 2004, equation 13, with their Gaussian window of 11 pixels and standard deviation 1.5.

    Raises:
        ValueError: The inputs are not uint8 images of the same shape.
        UserError: A side is shorter than the window.
    """
    _check(originals, reconstructions)
    if min(originals.shape[-2:]) < _WINDOW:
        height, width = originals.shape[-2:]
        raise UserError(f"SSIM: images of {width}x{height} pixels are smaller than its window of {_WINDOW}.")
    x, y = originals.double(), reconstructions.double()
    mean_x, mean_y = _windowed(x), _windowed(y)
    variance_x = _windowed(x * x) - mean_x**2
    variance_y = _windowed(y * y) - mean_y**2
    covariance = _windowed(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + _LUMINANCE_CONSTANT) / (mean_x**2 + mean_y**2 + _LUMINANCE_CONSTANT)
    contrast_structure = (2 * covariance + _CONTRAST_CONSTANT) / (
        variance_x + variance_y + _CONTRAST_CONSTANT
    )
    return (luminance * contrast_structure).flatten(1).mean(dim=1)


def _windowed(values: Float64[Tensor, "batch 3 height width"]) -> Float64[Tensor, "batch 3 rows columns"]:
    """Compute the Gaussian-weighted mean over every full window (no padding), one axis at a time."""
    offsets = torch.arange(_WINDOW, dtype=values.dtype, device=values.device) - _WINDOW // 2
    weights = torch.exp(-(offsets**2) / (2 * _SIGMA**2))
    weights = (weights / weights.sum()).expand(3, 1, 1, _WINDOW)
    horizontal = functional.conv2d(values, weights, groups=3)
    return functional.conv2d(horizontal, weights.transpose(2, 3), groups=3)


def _check(originals: Tensor, reconstructions: Tensor) -> None:
    if originals.shape != reconstructions.shape or originals.ndim != 4 or originals.shape[1] != 3:
        raise ValueError(
            f"expected two batches [batch, 3, height, width], got {tuple(originals.shape)} and "
            f"{tuple(reconstructions.shape)}"
        )
    if originals.dtype != torch.uint8 or reconstructions.dtype != torch.uint8:
        raise ValueError(f"expected uint8 images, got {originals.dtype} and {reconstructions.dtype}")
