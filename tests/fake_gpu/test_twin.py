"""The twin finds what it is made to find."""

from collections.abc import Callable, Generator

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorDeviceMismatchError
from torch.nn import functional

from tests.fake_gpu.twin import DEVICE, FakeGPU, fake_gpu

MEBI = 1 << 20


@pytest.fixture(name="gpu")
def _gpu() -> Generator[FakeGPU]:
    with fake_gpu() as gpu:
        yield gpu


def _mask() -> Tensor:
    return torch.ones(3, dtype=torch.bool, device=DEVICE)


def _rows() -> Tensor:
    return torch.zeros(3, 2, device=DEVICE)


WAITS: dict[str, Callable[[], object]] = {
    "float": lambda: float(torch.zeros((), device=DEVICE)),
    "bool": lambda: bool(torch.zeros((), device=DEVICE) > 0),
    "item": lambda: torch.zeros(1, dtype=torch.int64, device=DEVICE).item(),
    "to the host": lambda: torch.zeros(3, device=DEVICE).cpu(),
    "into a tensor of the host": lambda: torch.zeros(3).copy_(torch.zeros(3, device=DEVICE)),
    "from the host": lambda: torch.zeros(3).to(DEVICE),
    "a number from the host": lambda: torch.tensor(2.5, device=DEVICE),
    "nonzero": lambda: _mask().nonzero(),
    "unique": lambda: _mask().unique(),  # pyright: ignore[reportUnknownLambdaType]
    "bincount": lambda: torch.zeros(3, dtype=torch.int64, device=DEVICE).bincount(minlength=2),
    "mask": lambda: torch.zeros(3, 2, device=DEVICE)[_mask()],
    "assignment by a mask": lambda: torch.zeros(3, 2, device=DEVICE).__setitem__(_mask(), _rows()),
    "equal": lambda: torch.equal(torch.zeros(2, device=DEVICE), torch.zeros(2, device=DEVICE)),
}
NO_WAITS: dict[str, Callable[[], object]] = {
    "arithmetic": lambda: torch.zeros(3, device=DEVICE) + 1,
    "a filled tensor": lambda: torch.full((), 2.5, device=DEVICE),
    "an asynchronous copy": lambda: torch.zeros(3).to(DEVICE, non_blocking=True),
    "a fill by a mask": lambda: _rows().__setitem__(_mask(), 1.0),
    "where": lambda: torch.where(_mask(), 1.0, 0.0),
    "values of the host": lambda: float(torch.ones(3).sum()),
}


@pytest.mark.parametrize("name", WAITS)
def test_host_wait_is_counted_once(name: str, gpu: FakeGPU) -> None:
    WAITS[name]()
    assert sum(gpu.waits.values()) == 1


@pytest.mark.parametrize("name", NO_WAITS)
def test_work_without_host_wait_is_not_counted(name: str, gpu: FakeGPU) -> None:
    NO_WAITS[name]()
    assert not gpu.waits


def test_values_of_the_host_are_real(gpu: FakeGPU) -> None:
    assert float(torch.arange(4).sum()) == 6
    assert torch.zeros(3, device=DEVICE).isfinite().cpu().all()


def test_wrong_device_is_refused(gpu: FakeGPU) -> None:
    with pytest.raises(FakeTensorDeviceMismatchError):
        torch.zeros(3, device=DEVICE).add(torch.zeros(3))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_product_of_two_dtypes_is_refused(dtype: torch.dtype, gpu: FakeGPU) -> None:
    with torch.device(DEVICE):
        linear, convolution = nn.Linear(4, 4), nn.Conv2d(4, 4, 1)
    with pytest.raises(TypeError, match=r"addmm.* of torch\.float"):
        linear(torch.zeros(2, 4, device=DEVICE, dtype=dtype))
    with pytest.raises(RuntimeError, match=r"should be the same"):
        convolution(torch.zeros(2, 4, 3, 3, device=DEVICE, dtype=dtype))


def test_wide_product_is_reported(gpu: FakeGPU) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        matrix = torch.zeros(2, 2, device=DEVICE, dtype=dtype)
        assert (matrix @ matrix).dtype is dtype
    assert sum(gpu.wide_products.values()) == 1


def test_operators_are_counted_and_views_are_not(gpu: FakeGPU) -> None:
    matrix = torch.zeros(4, 4, device=DEVICE)
    gpu.reset()
    matrix.T[:2].unsqueeze(0).add_(1)
    assert gpu.operators == {"add_": 1}


def test_live_bytes_follow_storages(gpu: FakeGPU) -> None:
    first = torch.zeros(MEBI, device=DEVICE)
    view = first[1:]
    second = first + 1
    assert gpu.bytes == 8 * MEBI
    del first, second
    assert (gpu.bytes, gpu.peak) == (4 * MEBI, 8 * MEBI)
    del view
    assert gpu.bytes == 0


def test_gradients_flow_and_activations_are_freed(gpu: FakeGPU) -> None:
    weight = torch.zeros(64, 64, device=DEVICE, requires_grad=True)
    loss = (weight @ weight).relu().sum()
    assert gpu.bytes > weight.nbytes
    loss.backward()
    assert weight.grad is not None
    assert weight.grad.device == DEVICE
    assert weight.grad.is_cuda
    assert gpu.bytes == 2 * weight.nbytes + loss.nbytes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_attention_stores_no_weights(dtype: torch.dtype, gpu: FakeGPU) -> None:
    query = torch.zeros(1, 2, 1024, 64, device=DEVICE, dtype=dtype, requires_grad=True)
    functional.scaled_dot_product_attention(query, query, query).sum().backward()
    assert gpu.peak < 2 * 1024 * 1024 * dtype.itemsize


def test_machine_is_as_before() -> None:
    with fake_gpu():
        torch.zeros(2, device=DEVICE)
    weight = torch.ones(2, requires_grad=True)
    (2 * weight).sum().backward()
    assert weight.grad is not None
    assert weight.grad.tolist() == [2, 2]
