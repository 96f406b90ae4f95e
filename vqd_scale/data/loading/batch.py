from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import chain
from operator import itemgetter
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Int64, UInt8
from torch import Tensor
from typing_extensions import Self

BatchType = TypeVar("BatchType", bound="Batch")


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Batch of samples; every field is a tensor or a list with one row per sample, or None.

    Attributes:
        slots: Global slot of each sample; also the id of its random numbers.
        valid: False for samples that could not be read. Their rows are zeros and must get zero loss weight.
        keys: Sample keys.
    """

    slots: Int64[Tensor, " batch"]
    valid: Bool[Tensor, " batch"]
    keys: list[str]

    def to(self, device: torch.device, *, non_blocking: bool = False) -> Self:
        """Copy all tensors to a device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        """Copy all tensors to pinned memory, for asynchronous copies to a GPU (``non_blocking=True``)."""
        return self._map(lambda tensor: tensor.pin_memory())

    def select(self, rows: Int64[Tensor, " rows"] | Bool[Tensor, " batch"]) -> Self:
        """Return the rows with the given numbers, or the rows where a mask is true."""
        numbers = rows.nonzero()[:, 0] if rows.dtype == torch.bool else rows
        return self._map(itemgetter(numbers), lambda items: [items[number] for number in numbers.tolist()])

    def split(self, parts: int) -> list[Self]:
        """Split into batches of equal size, in order; tensors are views."""
        size = len(self.keys) // parts
        slices = [itemgetter(slice(start, start + size)) for start in range(0, parts * size, size)]
        return [self._map(rows, rows) for rows in slices]

    @staticmethod
    def cat(batches: Sequence[BatchType]) -> BatchType:
        """Concatenate batches of one type."""
        names = [field.name for field in fields(batches[0])]
        columns = {name: [getattr(batch, name) for batch in batches] for name in names}
        tensors = {name: torch.cat(parts) for name, parts in columns.items() if isinstance(parts[0], Tensor)}
        lists = {name: [*chain(*parts)] for name, parts in columns.items() if isinstance(parts[0], list)}
        return replace(batches[0], **tensors, **lists)

    def _map(
        self,
        on_tensor: Callable[[Tensor], Tensor],
        on_list: Callable[[list[Any]], list[Any]] = lambda items: items,
    ) -> Self:
        """Apply functions to all tensors and to all lists."""
        values = [(field.name, getattr(self, field.name)) for field in fields(self)]
        tensors = {name: on_tensor(value) for name, value in values if isinstance(value, Tensor)}
        lists = {name: on_list(value) for name, value in values if isinstance(value, list)}
        return replace(self, **tensors, **lists)


@dataclass(frozen=True)
class TokenBatch(Batch):
    """Batch of token samples.

    Attributes:
        tokens: Codes of the images, int64.
        text: Caption ids, int64; zero columns if captions are not read.
        labels: Class labels, int64; None if they are not read.
    """

    tokens: Int64[Tensor, "batch length"]
    text: Int64[Tensor, "batch text_length"]
    labels: Int64[Tensor, " batch"] | None = None


@dataclass(frozen=True)
class ImageBatch(Batch):
    """Batch of image samples.

    Attributes:
        images: RGB, uint8.
        captions: Caption strings.
    """

    images: UInt8[Tensor, "batch 3 height width"]
    captions: list[str]
