from dataclasses import fields

import pytest
import torch
from torch import Tensor

from vqd_scale.data.loading.batch import Batch, ImageBatch, TokenBatch

TOKENS = TokenBatch(
    torch.arange(12).view(4, 3),
    torch.arange(4)[:, None],
    slots=torch.arange(8, 12),
    valid=torch.tensor([True, False, True, True]),
    keys=["a", "b", "c", "d"],
)
LABELED = TokenBatch(
    TOKENS.tokens,
    TOKENS.text,
    torch.tensor([3, 0, 1, 2]),
    slots=TOKENS.slots,
    valid=TOKENS.valid,
    keys=TOKENS.keys,
)
IMAGES = ImageBatch(
    torch.arange(4 * 3 * 4, dtype=torch.uint8).view(4, 3, 2, 2),
    ["w", "x", "y", "z"],
    slots=TOKENS.slots,
    valid=TOKENS.valid,
    keys=TOKENS.keys,
)
BATCHES = pytest.mark.parametrize("batch", [TOKENS, LABELED, IMAGES], ids=["tokens", "labels", "images"])


def contents(batch: Batch) -> list[list[object] | None]:
    values = [getattr(batch, field.name) for field in fields(batch)]
    return [value.tolist() if isinstance(value, Tensor) else value for value in values]


def rows(batch: Batch, numbers: list[int]) -> list[list[object] | None]:
    """Return the rows of every field separately."""
    return [values and [values[number] for number in numbers] for values in contents(batch)]


@BATCHES
def test_rows_by_number_and_by_mask(batch: TokenBatch | ImageBatch) -> None:
    assert contents(batch.select(torch.tensor([2, 0, 2]))) == rows(batch, [2, 0, 2])
    assert contents(batch.select(batch.valid)) == rows(batch, [0, 2, 3])
    assert contents(batch.select(torch.zeros(4, dtype=torch.bool))) == rows(batch, [])


@BATCHES
def test_equal_parts_in_order_that_concatenate_to_the_batch(batch: TokenBatch | ImageBatch) -> None:
    parts = batch.split(2)
    assert [contents(part) for part in parts] == [rows(batch, [0, 1]), rows(batch, [2, 3])]
    assert all(part.slots.untyped_storage().data_ptr() == batch.slots.data_ptr() for part in parts)
    assert contents(Batch.cat(parts)) == contents(batch)
    assert type(Batch.cat(parts)) is type(batch)


@BATCHES
def test_all_tensors_are_moved(batch: TokenBatch | ImageBatch) -> None:
    moved = batch.to(torch.device("meta"))
    for field in fields(batch):
        value, original = getattr(moved, field.name), getattr(batch, field.name)
        if isinstance(original, Tensor):
            assert (value.device.type, value.shape, value.dtype) == ("meta", original.shape, original.dtype)
        else:
            assert value == original


@BATCHES
def test_all_tensors_are_pinned(monkeypatch: pytest.MonkeyPatch, batch: TokenBatch | ImageBatch) -> None:
    """Record the calls; memory is pinned only with a GPU (tests/gpu)."""
    recorded: list[Tensor] = []

    def record(tensor: Tensor) -> Tensor:
        recorded.append(tensor)
        return tensor

    monkeypatch.setattr(Tensor, "pin_memory", record)
    pinned = batch.pin_memory()
    values = [getattr(batch, field.name) for field in fields(batch)]
    assert [getattr(pinned, field.name) for field in fields(pinned)] == values
    assert [id(tensor) for tensor in recorded] == [id(value) for value in values if isinstance(value, Tensor)]
