"""Baseline loader: webdataset's standard pipeline, without an index.

This loader is not exact: a truncated tar ends early without an error, the order has no cursor, and the length
of an epoch is unknown.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import cast

import numpy as np
from jaxtyping import Integer, UInt8
from PIL import Image
from torchvision.transforms.v2 import CenterCrop, Compose, InterpolationMode, Resize
from webdataset.compat import WebDataset

from vqd_scale.core.arrays import NDArray

PlainBatch = tuple[list[str], UInt8[NDArray[np.uint8], "batch height width 3"], list[str]]
"""Keys, images and captions."""

PlainTokenBatch = tuple[
    list[str], Integer[NDArray[np.integer], "batch length"], Integer[NDArray[np.integer], "batch text_length"]
]
"""Keys, codes and caption ids."""


def plain_batches(tars: Sequence[Path], size: int, batch: int) -> Iterator[PlainBatch]:
    """Yield image batches as in webdataset's manual: decode with Pillow, resize, center crop, collate.

    The short side is resized to ``size``.

    Args:
        tars: Paths of tars whose samples have a ``jpg`` and a ``txt``.
        size: Height and width of the images in pixels.
        batch: Batch size.
    """
    fit = Compose([Resize(size, interpolation=InterpolationMode.BICUBIC), CenterCrop(size)])

    def pixels(image: Image.Image) -> NDArray[np.uint8]:
        return np.asarray(fit(image))

    # webdataset runs a `pipe:` path in a shell; an absolute path is never parsed as a scheme.
    files = [str(path.absolute()) for path in tars]
    samples = WebDataset(files, shardshuffle=False).decode("pil").to_tuple("__key__", "jpg", "txt")
    batches = samples.map_tuple(str, pixels, str).batched(batch)
    yield from cast("Iterable[PlainBatch]", batches)


def plain_token_batches(tars: Sequence[Path], batch: int) -> Iterator[PlainTokenBatch]:
    """Yield token batches.

    Args:
        tars: Paths of tars whose samples have a ``tokens.npy`` and a ``text.npy``.
        batch: Batch size.
    """
    files = [str(path.absolute()) for path in tars]
    samples = WebDataset(files, shardshuffle=False).decode().to_tuple("__key__", "tokens.npy", "text.npy")
    yield from cast("Iterable[PlainTokenBatch]", samples.batched(batch))
