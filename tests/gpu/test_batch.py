import pytest
import torch

from vqd_scale.data.loading.batch import TokenBatch

pytestmark = pytest.mark.gpu


def test_pinned_batch_equals_the_batch() -> None:
    batch = TokenBatch(
        tokens=torch.arange(12).view(3, 4),
        text=torch.zeros(3, 0, dtype=torch.int64),
        slots=torch.arange(3),
        valid=torch.tensor([True, False, True]),
        keys=["a", "b", "c"],
    )
    pinned = batch.pin_memory()
    assert (pinned.keys, pinned.labels) == (batch.keys, None)
    for name in ("tokens", "text", "slots", "valid"):
        tensor = getattr(pinned, name)
        assert tensor.is_pinned() or tensor.numel() == 0
        assert torch.equal(tensor.to("cuda", non_blocking=True).cpu(), getattr(batch, name))
