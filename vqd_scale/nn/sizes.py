"""The sizes of the field, by name: shape, codes and grid, so that their parameters can be counted.

A configuration names one as ``denoiser: {size: L}`` and may change any part of it. What a run or a bundle
writes down is the shape itself, so that nothing here can change what a trained model means.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

SizeName = Literal["S", "B", "F", "L", "ImageNet", "FFHQ", "3B", "7B"]


@dataclass(frozen=True)
class Size:
    """One size, as the papers' models were trained.

    Attributes:
        shape: What differs from the defaults of `vqd_scale.nn.denoiser.DenoiserConfig`, as YAML would say it.
        codes: K of the tokenizer.
        grid: Rows and columns of its tokens.
    """

    shape: Mapping[str, Any]
    codes: int
    grid: tuple[int, int]


_PUBLISHED_16 = {"width": 512, "feed_forward": {"kind": "conv", "mlp_ratio": 4}, "position_grid": (32, 32)}

SIZES: Mapping[SizeName, Size] = {
    "S": Size({"width": 192, "layers": 18, "feed_forward": {"kind": "conv", "mlp_ratio": 2}}, 2887, (32, 32)),
    "B": Size({}, 2887, (32, 32)),
    "F": Size({}, 2887, (32, 32)),
    "L": Size({"width": 1408, "layers": 36}, 4096, (32, 32)),
    "ImageNet": Size(
        _PUBLISHED_16 | {"layers": 24, "condition": {"kind": "class", "classes": 1000, "null": "mean"}},
        974,
        (16, 16),
    ),
    "FFHQ": Size(_PUBLISHED_16 | {"layers": 20, "condition": {"kind": "none"}}, 1024, (16, 16)),
    "3B": Size({"width": 2048, "layers": 38, "heads": 32}, 2887, (32, 32)),
    "7B": Size({"width": 3072, "layers": 40, "heads": 48}, 2887, (32, 32)),
}
"""S, B and L of VQ-Diffusion (arXiv 2111.14822, section 5); F is B, pretrained; its class-conditional and its
unconditional model; and two that are larger than any published, with heads of 64 and about L's depth."""
