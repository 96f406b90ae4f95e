from dataclasses import dataclass, fields
from typing import Any, TypeVar, cast

from jaxtyping import Bool, Int64, UInt8
from torch import Tensor

BatchType = TypeVar("BatchType")


@dataclass(frozen=True)
class TokenBatch:
    """Token samples.

    Attributes:
        tokens: Codes of the images, int64.
        text: Caption ids, int64; no columns where captions are not read.
        slots: Global slot of each sample, the name under which it draws its random numbers.
        valid: Whether the sample could be read; where not, its tokens are zeros and must weigh nothing.
        keys: The samples' keys.
        labels: Classes, int64, where they are read.
    """

    tokens: Int64[Tensor, "batch length"]
    text: Int64[Tensor, "batch text_length"]
    slots: Int64[Tensor, " batch"]
    valid: Bool[Tensor, " batch"]
    keys: list[str]
    labels: Int64[Tensor, " batch"] | None = None


@dataclass(frozen=True)
class ImageBatch:
    """Image samples.

    Attributes:
        images: RGB, uint8.
        captions: The captions as written.
        text: Caption ids, int64, where a caption tokenizer was given.
        slots: Global slot of each sample, the name under which it draws its random numbers.
        valid: Whether the sample could be read; where not, its image is black and must weigh nothing.
        keys: The samples' keys.
    """

    images: UInt8[Tensor, "batch 3 height width"]
    captions: list[str]
    text: Int64[Tensor, "batch text_length"] | None
    slots: Int64[Tensor, " batch"]
    valid: Bool[Tensor, " batch"]
    keys: list[str]


def pinned(batch: BatchType) -> BatchType:
    """The same batch in memory from which a GPU can fetch it while it computes (``non_blocking=True``)."""
    of = cast(Any, batch)
    values = {field.name: getattr(of, field.name) for field in fields(of)}
    return type(of)(
        **{name: value.pin_memory() if isinstance(value, Tensor) else value for name, value in values.items()}
    )
