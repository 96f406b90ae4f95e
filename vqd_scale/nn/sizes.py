"""Named model sizes: shape, number of codes, and grid (for parameter counts).

A configuration selects one with ``denoiser: {size: L}`` and may override any key. Runs and bundles store the
expanded shape, so changes in this module do not affect trained models.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

SizeName = Literal["S", "B", "F", "L", "ImageNet", "FFHQ", "3B", "7B"]


@dataclass(frozen=True)
class Size:
    """One model size, as in the papers.

    Attributes:
        shape: Keys that differ from the defaults of `vqd_scale.nn.config.DenoiserConfig`, as in YAML.
        codes: K, the number of codes of the tokenizer.
        grid: Rows and columns of tokens.
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
        _PUBLISHED_16
        | {"layers": 24, "condition": {"kind": "class", "classes": 1000, "null_condition": "mean"}},
        974,
        (16, 16),
    ),
    "FFHQ": Size(_PUBLISHED_16 | {"layers": 20, "condition": {"kind": "none"}}, 1024, (16, 16)),
    "3B": Size({"width": 2048, "layers": 38, "heads": 32}, 2887, (32, 32)),
    "7B": Size({"width": 3072, "layers": 40, "heads": 48}, 2887, (32, 32)),
}
"""S, B and L are from VQ-Diffusion (arXiv 2111.14822, section 5). F is B, pretrained. ImageNet and FFHQ are
the paper's class-conditional and unconditional models. 3B and 7B are larger than any published model, with
64 features per head and about L's depth."""
