"""The Triton kernels on a GPU, beside PyTorch's operations and float64.

`tests/diffusion/kernels/test_interpreted.py` runs the same tests without a GPU, through Triton's interpreter.
"""

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from vqd_scale.core import rng
from vqd_scale.core.rng import Purpose
from vqd_scale.diffusion.config import ObjectiveConfig, Paper, Released, Schedule
from vqd_scale.diffusion.kernels.dispatch import is_interpreted
from vqd_scale.diffusion.logit_statistics import LogitRows, LogitStatistics, LossFactors, TorchRows
from vqd_scale.diffusion.noise import uniforms
from vqd_scale.diffusion.objective import Objective, ObjectiveOutput
from vqd_scale.diffusion.transition import MaskAndReplace
from vqd_scale.diffusion.truncation import keep_top_p_by_sorting

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cpu" if is_interpreted() else "cuda")


def normal(rows: int, columns: int, seed: int) -> Tensor:
    uniform_numbers = rng.uniforms(
        seed, Purpose.EVALUATION, torch.arange(rows), 2 * columns, dtype=torch.float64
    )
    radius = (-2 * torch.log1p(-uniform_numbers[:, :columns])).sqrt()
    return radius * torch.cos(2 * math.pi * uniform_numbers[:, columns:])


def some_rows(count: int, codes: int, dtype: torch.dtype) -> tuple[Tensor, LogitRows]:
    logits = (4 * normal(count, codes, 0)).to(DEVICE, dtype)
    places = torch.arange(count, device=DEVICE)
    share = torch.linspace(1, 0, count, device=DEVICE, dtype=dtype)
    return logits, LogitRows(places * 7 % codes, places * 5 % codes, share, 60 * share - 30)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
@pytest.mark.parametrize("codes", [2, 37, 256])
def test_rows_equal_pytorch(codes: int, dtype: torch.dtype, tolerance: float) -> None:
    from vqd_scale.diffusion.kernels.logit_statistics import TritonRows

    logits, rows = some_rows(24, codes, dtype)
    expected, reading = LogitStatistics.empty_for(rows), LogitStatistics.empty_for(rows)
    TorchRows().compute_statistics(logits, rows, expected)
    TritonRows().compute_statistics(logits, rows, reading)
    for name in ("log_true", "log_observed", "code_sum"):
        torch.testing.assert_close(
            getattr(reading, name), getattr(expected, name), rtol=tolerance, atol=codes * tolerance
        )
    assert torch.equal(reading.correct, expected.correct)
    of_true, of_observed, of_sum = normal(3, len(logits), 1).to(logits)
    factors = LossFactors.of(rows, expected.log_observed, of_true, of_observed, of_sum)
    expected_gradient = TorchRows().compute_gradient(logits, rows, factors)
    gradient = TritonRows().compute_gradient(logits, rows, factors)
    torch.testing.assert_close(gradient, expected_gradient, rtol=10 * tolerance, atol=codes * tolerance)
    assert gradient is logits


def test_rows_of_any_layout_and_precision() -> None:
    from vqd_scale.diffusion.kernels.logit_statistics import TritonRows

    logits, rows = some_rows(6, 11, torch.float32)
    low = logits.bfloat16().T.contiguous().T
    assert low.stride() == (1, 6)
    reading, expected = LogitStatistics.empty_for(rows), LogitStatistics.empty_for(rows)
    TritonRows().compute_statistics(low, rows, reading)
    TorchRows().compute_statistics(low.float(), rows, expected)
    torch.testing.assert_close(reading.log_true, expected.log_true, rtol=1e-6, atol=1e-6)


def test_invalid_token_makes_its_row_nan() -> None:
    from vqd_scale.diffusion.kernels.logit_statistics import TritonRows

    logits, rows = some_rows(4, 8, torch.float32)
    rows.true[1], rows.true[2] = 8, -1
    reading = LogitStatistics.empty_for(rows)
    TritonRows().compute_statistics(logits, rows, reading)
    assert reading.log_true.isnan().tolist() == [False, True, True, False]


def loss_and_gradients(
    leaves: list[Tensor], transition: MaskAndReplace, noisy: Tensor, tokens: Tensor, t: Tensor
) -> tuple[ObjectiveOutput, tuple[Tensor, ...]]:
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    hidden, weight, bias = leaves
    output = Objective(transition, ObjectiveConfig())(hidden, weight, bias, tokens, noisy, t)
    factor = torch.linspace(0.5, 2, len(t), device=hidden.device, dtype=output.loss_per_image.dtype)
    return output, torch.autograd.grad((output.loss_per_image * factor).sum(), leaves)


@pytest.mark.parametrize("schedule", [Released(), Paper()])
@pytest.mark.parametrize(
    ("dtype", "loss_error", "gradient_error"),
    [(torch.float32, 1e-5, 1e-4), (torch.bfloat16, 1e-5, 1e-2)],
)
def test_head_form_equals_float64(
    schedule: Schedule, dtype: torch.dtype, loss_error: float, gradient_error: float
) -> None:
    codes, length, width = 150, 5, 16
    transition = MaskAndReplace(schedule, codes)
    t = torch.tensor([0, 1, 60, 99])
    tokens = torch.arange(4 * length).view(4, length) * 11 % codes
    noisy = transition.corrupt(
        tokens, t, rng.uniforms(0, Purpose.CORRUPTION, torch.arange(4), length, dtype=torch.float64)
    )
    leaves = [
        normal(4 * length, width, 0).view(4, length, width),
        normal(codes, width, 1),
        normal(1, codes, 2)[0],
    ]
    leaves = [leaf.to(DEVICE, dtype) for leaf in leaves]
    tokens, noisy, t = (part.to(DEVICE) for part in (tokens, noisy, t))
    output, gradients = loss_and_gradients(leaves, transition, noisy, tokens, t)
    exact, exact_gradients = loss_and_gradients(
        [leaf.double() for leaf in leaves], transition, noisy, tokens, t
    )
    torch.testing.assert_close(
        output.loss_per_image.double(), exact.loss_per_image, rtol=loss_error, atol=loss_error
    )
    for gradient, expected in zip(gradients, exact_gradients, strict=True):
        scale = float(expected.abs().max())
        assert float((gradient.double() - expected).abs().max()) < gradient_error * scale


@pytest.fixture
def no_device_synchronization() -> Iterator[None]:
    """Raise an error on every synchronization with the device."""
    if DEVICE.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.usefixtures("no_device_synchronization")
def test_objective_does_not_synchronize_with_device() -> None:
    with torch.device(DEVICE):
        transition = MaskAndReplace(Paper(), 30)
        tokens, noisy = torch.zeros(2, 5, dtype=torch.long), torch.full((2, 5), 30)
        t = torch.arange(2)
        leaves = [torch.ones(2, 5, 4), torch.ones(30, 4), torch.ones(30)]
    loss_and_gradients(leaves, transition, noisy, tokens, t)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("count", [1, 4, 5, 700])
def test_philox_is_bit_equal_on_all_backends(count: int, dtype: torch.dtype) -> None:
    slots = torch.tensor([0, 1, 5, 2**32 - 1, 2**32, 2**40 + 3])
    for seed, draw in ((0, 0), (7, 1), (2**32 - 1, 2**32 - 1)):
        expected = rng.uniforms(seed, Purpose.GUMBEL, slots, count, draw=draw, dtype=dtype)
        plain = rng.uniforms(seed, Purpose.GUMBEL, slots.to(DEVICE), count, draw=draw, dtype=dtype)
        kernel = uniforms(seed, Purpose.GUMBEL, slots.to(DEVICE), count, draw=draw, dtype=dtype)
        assert torch.equal(plain.cpu(), expected) and torch.equal(kernel.cpu(), expected)


def test_philox_kernel_refuses_what_the_generator_refuses() -> None:
    slots = torch.arange(2, device=DEVICE)
    with pytest.raises(ValueError, match="float32 or float64"):
        uniforms(0, Purpose.GUMBEL, slots, 4, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="seed -1"):
        uniforms(-1, Purpose.GUMBEL, slots, 4)
    assert uniforms(0, Purpose.GUMBEL, slots[:0], 4).shape == (0, 4)


@pytest.mark.parametrize("codes", [1, 37, 256])
@pytest.mark.parametrize("rate", [0.0, 0.5, 0.86])
def test_top_p_equals_sorting(codes: int, rate: float) -> None:
    from vqd_scale.diffusion.kernels.top_p import keep_top_p

    log_p = (4 * normal(6, codes, 0)).float().log_softmax(-1).view(2, 3, codes).to(DEVICE)
    log_p[1, 1] = log_p[1, 1].round().log_softmax(-1)
    torch.testing.assert_close(keep_top_p(log_p, rate), keep_top_p_by_sorting(log_p, rate), rtol=0, atol=0)
    log_p[0, 0, 0] = math.nan
    assert torch.equal(keep_top_p(log_p, rate)[0, 0].isnan(), log_p[0, 0].isnan())
