from dataclasses import dataclass, fields
from typing import Any, TypeVar, cast

from jaxtyping import Bool, Int64, UInt8
from torch import Tensor

BatchType = TypeVar("BatchType")


@dataclass(frozen=True)
class TokenBatch:
    """Batch of token samples.

    Attributes:
        tokens: Codes of the images, int64.
        text: Caption ids, int64; zero columns if captions are not read.
        slots: Global slot of each sample; also the id of its random numbers.
        valid: False for samples that could not be read. Their tokens are zeros and must get zero loss weight.
        keys: Sample keys.
        labels: Class labels, int64; None if they are not read.
    """

    tokens: Int64[Tensor, "batch length"]
    text: Int64[Tensor, "batch text_length"]
    slots: Int64[Tensor, " batch"]
    valid: Bool[Tensor, " batch"]
    keys: list[str]
    labels: Int64[Tensor, " batch"] | None = None


@dataclass(frozen=True)
class ImageBatch:
    """Batch of image samples.

    Attributes:
        images: RGB, uint8.
        captions: Caption strings.
        text: Caption ids, int64; None without a caption tokenizer.
        slots: Global slot of each sample; also the id of its random numbers.
        valid: False for samples that could not be read. Their images are black and must get zero loss weight.
        keys: Sample keys.
    """

    images: UInt8[Tensor, "batch 3 height width"]
    captions: list[str]
    text: Int64[Tensor, "batch text_length"] | None
    slots: Int64[Tensor, " batch"]
    valid: Bool[Tensor, " batch"]
    keys: list[str]


def pinned(batch: BatchType) -> BatchType:
    """Copy a batch to pinned memory, for asynchronous copies to a GPU (``non_blocking=True``)."""
    of = cast(Any, batch)
    values = {field.name: getattr(of, field.name) for field in fields(of)}
    return type(of)(
        **{name: value.pin_memory() if isinstance(value, Tensor) else value for name, value in values.items()}
    )
