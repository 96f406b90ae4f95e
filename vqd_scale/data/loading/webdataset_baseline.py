"""Tars as webdataset's ordinary pipeline reads them, without an index.

For looking at somebody's tars, and as what our loader is measured beside. Nothing here is exact: a tar that
was cut ends early and nobody is told, the order has no cursor, and an epoch has no known length.
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
"""Keys, pictures and captions."""

PlainTokenBatch = tuple[
    list[str], Integer[NDArray[np.integer], "batch length"], Integer[NDArray[np.integer], "batch text_length"]
]
"""Keys, codes and caption ids."""


def plain_batches(tars: Sequence[Path], size: int, batch: int) -> Iterator[PlainBatch]:
    """Decode with Pillow, resize the short side, cut the centre, put together: what webdataset's manual does.

    Args:
        tars: Paths of tars whose samples have a ``jpg`` and a ``txt``.
        size: Height and width of the pictures.
        batch: How many samples are put together.
    """
    fit = Compose([Resize(size, interpolation=InterpolationMode.BICUBIC), CenterCrop(size)])

    def pixels(image: Image.Image) -> NDArray[np.uint8]:
        return np.asarray(fit(image))

    # webdataset runs what follows `pipe:` in a shell; nothing that begins with a slash is taken for a scheme.
    files = [str(path.absolute()) for path in tars]
    samples = WebDataset(files, shardshuffle=False).decode("pil").to_tuple("__key__", "jpg", "txt")
    batches = samples.map_tuple(str, pixels, str).batched(batch)
    yield from cast("Iterable[PlainBatch]", batches)


def plain_token_batches(tars: Sequence[Path], batch: int) -> Iterator[PlainTokenBatch]:
    """Decode the arrays and put them together.

    Args:
        tars: Paths of tars whose samples have a ``tokens.npy`` and a ``text.npy``.
        batch: How many samples are put together.
    """
    files = [str(path.absolute()) for path in tars]
    samples = WebDataset(files, shardshuffle=False).decode().to_tuple("__key__", "tokens.npy", "text.npy")
    yield from cast("Iterable[PlainTokenBatch]", samples.batched(batch))
