from dataclasses import dataclass

from jaxtyping import Bool, Int64, UInt8
from torch import Tensor


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
