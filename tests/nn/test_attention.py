import pytest
import torch

from vqd_scale.nn import attention as module
from vqd_scale.nn.attention import AttentionBackend, attention

HEAD_DIMS = [12, 32, 64, 88]


def qkv(dim: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(dim)
    return (
        torch.randn(2, 5, 3, dim, generator=generator).to(dtype),
        torch.randn(2, 7, 3, dim, generator=generator).to(dtype),
        torch.randn(2, 7, 3, dim, generator=generator).to(dtype),
    )


def by_loops(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """The definition, one head and one query at a time, in float64."""
    result = torch.empty(query.shape, dtype=torch.float64)
    for batch in range(query.shape[0]):
        for head in range(query.shape[2]):
            for place in range(query.shape[1]):
                scores = torch.stack(
                    [query[batch, place, head].double() @ k.double() for k in key[batch, :, head]]
                )
                weights = (scores / query.shape[-1] ** 0.5).softmax(0)
                result[batch, place, head] = weights @ value[batch, :, head].double()
    return result


@pytest.mark.parametrize("backend", ["auto", "sdpa", "reference"])
@pytest.mark.parametrize("dim", HEAD_DIMS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 3e-2)])
def test_backends_equal_the_definition(
    backend: AttentionBackend, dim: int, dtype: torch.dtype, tolerance: float
) -> None:
    query, key, value = qkv(dim, dtype)
    result = attention(query, key, value, backend)
    assert result.dtype == dtype
    torch.testing.assert_close(result.double(), by_loops(query, key, value), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dim", HEAD_DIMS)
def test_padding_for_the_kernels_changes_nothing(dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def kernel(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, scale: float) -> torch.Tensor:
        """What xformers computes, refusing the head dims that its kernels refuse."""
        seen.append(query.shape[-1])
        assert query.shape[-1] % 8 == 0
        weights = torch.einsum("bqhd,bkhd->bhqk", query, key).mul(scale).softmax(-1)
        return torch.einsum("bhqk,bkhd->bqhd", weights, value)

    monkeypatch.setattr(module, "_memory_efficient_attention", lambda: kernel)
    query, key, value = qkv(dim, torch.float32)
    torch.testing.assert_close(
        attention(query, key, value, "xformers"), attention(query, key, value, "reference")
    )
    assert seen
