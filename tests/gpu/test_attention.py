"""The attention backends on a GPU against the plain formula in float64."""

import pytest
import torch
from torch import Tensor

from vqd_scale.nn import attention as module
from vqd_scale.nn.attention import attention
from vqd_scale.nn.config import AttentionBackend, DenoiserConfig
from vqd_scale.nn.denoiser import Denoiser

pytestmark = pytest.mark.gpu


def qkv(dim: int, dtype: torch.dtype, keys: int) -> list[Tensor]:
    generator = torch.Generator(device="cuda").manual_seed(dim)
    shapes = [(2, 1024, 4, dim), (2, keys, 4, dim), (2, keys, 4, dim)]
    return [torch.randn(shape, generator=generator, device="cuda").to(dtype) for shape in shapes]


def with_gradients(inputs: list[Tensor], backend: AttentionBackend, *, causal: bool) -> tuple[Tensor, ...]:
    """Return the result, and the gradients of a fixed weighted sum of it."""
    query, key, value = (tensor.detach().requires_grad_() for tensor in inputs)
    result = attention(query, key, value, backend, causal=causal)
    weights = torch.linspace(-1, 1, result.numel(), device="cuda").view_as(result).to(result.dtype)
    return result.detach(), *torch.autograd.grad(result, (query, key, value), weights)


@pytest.mark.parametrize(("keys", "causal"), [(1024, False), (1024, True), (77, False)])
@pytest.mark.parametrize("dim", [12, 32, 64, 88])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 5e-3), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("backend", ["xformers", "sdpa", "reference", "auto"])
def test_backends_agree_forward_and_backward(
    backend: AttentionBackend,
    dtype: torch.dtype,
    tolerance: float,
    dim: int,
    keys: int,
    *,
    causal: bool,
) -> None:
    inputs = qkv(dim, dtype, keys)
    if backend == "xformers":
        # Otherwise sdpa would serve, and the test would compare it with itself.
        assert module._is_xformers_usable(dtype, inputs[0].device)  # pyright: ignore[reportPrivateUsage]
    backend_results = with_gradients(inputs, backend, causal=causal)
    expected = with_gradients([tensor.double() for tensor in inputs], "reference", causal=causal)
    for actual, exact in zip(backend_results, expected, strict=True):
        assert actual.dtype == dtype
        assert ((actual.double() - exact).norm() / exact.norm()).item() < tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prepared_denoiser_equals_plain_forward_on_gpu(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    config = DenoiserConfig(size="S", layers=2, rope_2d=True, qk_norm=True)
    denoiser = Denoiser(config, codes=50, grid=(8, 8), steps=10).to("cuda", dtype)
    tokens = torch.randint(0, 51, (2, 64), device="cuda")
    text = torch.randn(2, 77, 512, device="cuda", dtype=dtype)
    plain = denoiser(tokens, torch.full((2,), 7, device="cuda"), text).float()
    prepared_logits = denoiser.prepare(text)(tokens, 7).float()
    tolerance = 1e-4 if dtype is torch.float32 else 3e-2
    assert ((prepared_logits - plain).norm() / plain.norm()).item() < tolerance
