"""The attention backends on a GPU; what each is measured against is the plain formula in float64."""

import pytest
import torch
from torch import Tensor

from vqd_scale.nn import attention as module
from vqd_scale.nn.attention import AttentionBackend, attention
from vqd_scale.nn.denoiser import Denoiser, DenoiserConfig

pytestmark = pytest.mark.gpu


def qkv(dim: int, dtype: torch.dtype, keys: int) -> list[Tensor]:
    generator = torch.Generator(device="cuda").manual_seed(dim)
    shapes = [(2, 1024, 4, dim), (2, keys, 4, dim), (2, keys, 4, dim)]
    return [torch.randn(shape, generator=generator, device="cuda").to(dtype) for shape in shapes]


def with_gradients(inputs: list[Tensor], backend: AttentionBackend, *, causal: bool) -> tuple[Tensor, ...]:
    """The result, and the gradients of a fixed weighted sum of it."""
    query, key, value = (tensor.detach().requires_grad_() for tensor in inputs)
    result = attention(query, key, value, backend, causal=causal)
    weights = torch.linspace(-1, 1, result.numel(), device="cuda").view_as(result).to(result.dtype)
    return result.detach(), *torch.autograd.grad(result, (query, key, value), weights)


@pytest.mark.parametrize(("keys", "causal"), [(1024, False), (1024, True), (77, False)])
@pytest.mark.parametrize("dim", [12, 32, 64, 88])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 5e-3), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("backend", ["xformers", "sdpa", "reference", "auto"])
def test_trap_20_backends_agree_forward_and_backward(
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
        # Otherwise sdpa would stand in, and this would compare it with itself.
        assert module._xformers_serves(dtype, inputs[0].device)  # pyright: ignore[reportPrivateUsage]
    found = with_gradients(inputs, backend, causal=causal)
    expected = with_gradients([tensor.double() for tensor in inputs], "reference", causal=causal)
    for ours, exact in zip(found, expected, strict=True):
        assert ours.dtype == dtype
        assert ((ours.double() - exact).norm() / exact.norm()).item() < tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_denoiser_prepared_on_a_gpu_equals_the_plain_forward(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    config = DenoiserConfig(size="S", layers=2, rope_2d=True, qk_norm=True)
    denoiser = Denoiser(config, codes=50, grid=(8, 8), steps=10).to("cuda", dtype)
    tokens = torch.randint(0, 51, (2, 64), device="cuda")
    text = torch.randn(2, 77, 512, device="cuda", dtype=dtype)
    plain = denoiser(tokens, torch.full((2,), 7, device="cuda"), text).float()
    found = denoiser.prepared(text)(tokens, 7).float()
    tolerance = 1e-4 if dtype is torch.float32 else 3e-2
    assert ((found - plain).norm() / plain.norm()).item() < tolerance
