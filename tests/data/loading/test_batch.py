from dataclasses import fields

import pytest
import torch
from torch import Tensor

from vqd_scale.data.loading.batch import ImageBatch, TokenBatch, pinned

TOKENS = TokenBatch(torch.ones(2, 3), torch.ones(2, 1), torch.arange(2), torch.ones(2).bool(), ["a", "b"])
IMAGES = ImageBatch(
    torch.ones(2, 3, 4, 4), ["x", "y"], None, torch.arange(2), torch.ones(2).bool(), ["a", "b"]
)


@pytest.mark.parametrize("batch", [TOKENS, IMAGES])
def test_all_tensors_are_pinned_and_nothing_else_changes(
    monkeypatch: pytest.MonkeyPatch, batch: TokenBatch | ImageBatch
) -> None:
    """Memory is pinned where there is a GPU only (tests/gpu); here what would be is noted."""
    noted: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        noted.append(tensor)
        return tensor

    monkeypatch.setattr(Tensor, "pin_memory", note)
    found = pinned(batch)
    values = [getattr(batch, field.name) for field in fields(batch)]
    assert [getattr(found, field.name) for field in fields(found)] == values
    assert [id(tensor) for tensor in noted] == [id(value) for value in values if isinstance(value, Tensor)]
