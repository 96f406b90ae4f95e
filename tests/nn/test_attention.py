import ctypes
import importlib.metadata
import json
import logging
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock, call

import pytest
import torch
from torch.nn import functional

from vqd_scale.nn import attention as module
from vqd_scale.nn.attention import attention
from vqd_scale.nn.config import AttentionBackend

HEAD_DIMS = [12, 32, 64, 88]
TOLERANCES = [(torch.float32, 1e-6), (torch.bfloat16, 3e-2)]


def qkv(dim: int, dtype: torch.dtype, queries: int = 5) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(dim)
    return (
        torch.randn(2, queries, 3, dim, generator=generator).to(dtype),
        torch.randn(2, 7, 3, dim, generator=generator).to(dtype),
        torch.randn(2, 7, 3, dim, generator=generator).to(dtype),
    )


def by_loops(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, causal: bool = False
) -> torch.Tensor:
    """Compute attention by its definition, one head and one query at a time, in float64."""
    result = torch.empty(query.shape, dtype=torch.float64)
    for batch in range(query.shape[0]):
        for head in range(query.shape[2]):
            for place in range(query.shape[1]):
                visible = slice(place + 1) if causal else slice(None)
                scores = torch.stack(
                    [query[batch, place, head].double() @ k.double() for k in key[batch, visible, head]]
                )
                weights = (scores / query.shape[-1] ** 0.5).softmax(0)
                result[batch, place, head] = weights @ value[batch, visible, head].double()
    return result


@pytest.mark.parametrize("backend", ["auto", "sdpa", "reference"])
@pytest.mark.parametrize("dim", HEAD_DIMS)
@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES)
def test_backends_equal_definition(
    backend: AttentionBackend, dim: int, dtype: torch.dtype, tolerance: float
) -> None:
    query, key, value = qkv(dim, dtype)
    result = attention(query, key, value, backend)
    assert result.dtype == dtype
    torch.testing.assert_close(result.double(), by_loops(query, key, value), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("backend", ["auto", "sdpa", "reference"])
@pytest.mark.parametrize("dim", HEAD_DIMS)
@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES)
def test_causal_backends_equal_definition(
    backend: AttentionBackend, dim: int, dtype: torch.dtype, tolerance: float
) -> None:
    query, key, value = qkv(dim, dtype, queries=7)
    result = attention(query, key, value, backend, causal=True)
    expected = by_loops(query, key, value, causal=True)
    torch.testing.assert_close(result.double(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dim", HEAD_DIMS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-2)])
def test_backends_have_equal_gradients(
    dim: int, dtype: torch.dtype, tolerance: float, *, causal: bool
) -> None:
    gradients: list[tuple[torch.Tensor, ...]] = []
    upstream = torch.randn(2, 7, 3, dim, generator=torch.Generator().manual_seed(1)).to(dtype)
    backends: tuple[AttentionBackend, ...] = ("sdpa", "reference")
    for backend in backends:
        query, key, value = (tensor.requires_grad_() for tensor in qkv(dim, dtype, queries=7))
        result = attention(query, key, value, backend, causal=causal)
        gradients.append(torch.autograd.grad(result, (query, key, value), upstream))
    torch.testing.assert_close(gradients[0], gradients[1], atol=tolerance, rtol=tolerance)


def test_causal_attention_requires_equal_lengths() -> None:
    with pytest.raises(ValueError, match="5 queries over 7 keys"):
        attention(*qkv(12, torch.float32), causal=True)


@pytest.fixture
def cleared_findings() -> Iterator[None]:
    """Clear the cached capabilities of xformers and the warnings given."""
    caches = (module._is_xformers_usable, module._warn_sdpa_fallback)  # pyright: ignore[reportPrivateUsage]
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


@pytest.fixture
def sdpa_dtypes(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """Record the dtype of every call of sdpa."""
    dtypes: list[torch.dtype] = []
    sdpa = functional.scaled_dot_product_attention

    def recorded(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, is_causal: bool
    ) -> torch.Tensor:
        dtypes.append(query.dtype)
        return sdpa(query, key, value, is_causal=is_causal)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", recorded)
    return dtypes


@pytest.mark.parametrize(
    ("dtype", "keys", "by_sdpa"),
    [
        (torch.float32, 64, True),
        (torch.float32, 1024, True),
        (torch.bfloat16, 64, False),
        (torch.bfloat16, 512, False),
        (torch.bfloat16, 1024, True),
    ],
)
def test_auto_selects_the_fast_cpu_backend(
    sdpa_dtypes: list[torch.dtype], dtype: torch.dtype, keys: int, *, by_sdpa: bool
) -> None:
    query, context = torch.randn(1, 4, 1, 16, dtype=dtype), torch.randn(1, keys, 1, 16, dtype=dtype)
    attention(query, context, context)
    assert sdpa_dtypes == [dtype] * by_sdpa


@pytest.mark.usefixtures("cleared_findings")
def test_missing_xformers_kernel_warns_once_and_uses_sdpa(
    caplog: pytest.LogCaptureFixture, sdpa_dtypes: list[torch.dtype]
) -> None:
    with caplog.at_level(logging.WARNING):
        for dtype in (torch.float32, torch.bfloat16, torch.float32):
            query, key, value = qkv(12, dtype)
            torch.testing.assert_close(
                attention(query, key, value, "xformers"), attention(query, key, value, "sdpa")
            )
    assert len(sdpa_dtypes) == 6
    assert [record.getMessage() for record in caplog.records] == [
        "xformers attention is not available (it has no kernel for a cpu); torch's sdpa is used instead."
    ]


def refusing(query: torch.Tensor, *_: torch.Tensor, **options: object) -> torch.Tensor:
    raise NotImplementedError("No operator found for `memory_efficient_attention_forward`\nwith inputs: ...")


@pytest.mark.usefixtures("cleared_findings")
@pytest.mark.parametrize(
    ("ops", "reason"),
    [
        (
            Mock(side_effect=ModuleNotFoundError("No module named 'xformers'", name="xformers")),
            "it is not installed",
        ),
        (Mock(side_effect=ModuleNotFoundError("No module named 'x'", name="x")), "No module named 'x'"),
        (
            Mock(return_value=SimpleNamespace(memory_efficient_attention=refusing)),
            "No operator found for `memory_efficient_attention_forward`",
        ),
    ],
    ids=["absent", "incomplete", "refusing the card"],
)
def test_unusable_xformers_on_gpu_uses_sdpa(
    ops: Mock, reason: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    probe = torch.zeros(1, 8, 1, 8)
    monkeypatch.setattr(torch, "zeros", Mock(return_value=probe))
    monkeypatch.setattr(module, "_xformers", ops)
    on_a_gpu = Mock(dtype=torch.bfloat16, device=torch.device("cuda"), is_cuda=True)
    backends: tuple[AttentionBackend, ...] = ("auto", "xformers", "auto")
    with caplog.at_level(logging.WARNING):
        selected = [
            module._select_backend(backend, on_a_gpu, on_a_gpu)  # pyright: ignore[reportPrivateUsage]
            for backend in backends
        ]
    assert selected == ["sdpa"] * 3
    assert [record.getMessage() for record in caplog.records] == [
        f"xformers attention is not available ({reason}); torch's sdpa is used instead."
    ]


@pytest.mark.skipif(
    (sys.platform, platform.machine()) != ("linux", "x86_64") or torch.version.cuda is None,
    reason="xformers has packages for CUDA on Linux x86_64 only",
)
def test_xformers_has_operators_for_every_head_dim() -> None:
    """Check xformers' choice of operators without a GPU; tests/gpu runs the kernels."""
    completed = subprocess.run(
        [sys.executable, "-m", "tests.nn.xformers_operators"],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert completed.returncode == 0, completed.stderr
    assert completed.stderr == ""
    operators: dict[str, Any] = json.loads(completed.stdout)
    assert not operators["imported_on_cpu"]
    assert operators["built_with_cuda"]
    kernels = {"bfloat16": ("fa2F", "fa2B"), "float32": ("cutlassF", "cutlassB")}
    for row in operators["rows"]:
        forward, backward = kernels[row["dtype"]]
        assert row["operators"][0].startswith(forward), row
        assert row["operators"][1].startswith(backward), row
    assert len(operators["rows"]) == 2 * len(kernels) * len(HEAD_DIMS) * 2


@pytest.mark.usefixtures("cleared_findings")
def test_cuda_runtime_is_loaded_before_xformers(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = Mock()
    loaded.xformers.side_effect = ImportError
    monkeypatch.setattr(module, "_load_cuda_runtime", loaded.runtime)
    monkeypatch.setattr(module, "_xformers", loaded.xformers)
    module._is_xformers_usable(torch.bfloat16, torch.device("cuda"))  # pyright: ignore[reportPrivateUsage]
    assert loaded.mock_calls == [call.runtime(), call.xformers()]


@pytest.fixture
def opened_libraries(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Record name and mode of every library that is opened; none is loaded before."""
    libraries: list[tuple[str, int]] = []

    def open_library(name: str, mode: int = ctypes.DEFAULT_MODE) -> None:
        libraries.append((name, mode))
        if mode & os.RTLD_NOLOAD:
            raise OSError(f"{name} is not loaded")

    monkeypatch.setattr(ctypes, "CDLL", open_library)
    return libraries


def test_cuda_runtime_is_searched_in_its_package_only(
    opened_libraries: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path("/site-packages/nvidia/cuda_runtime/lib")
    names = ("libcudart.so.12", "libcudart_static.a")
    files = [Mock(locate=Mock(return_value=folder / name)) for name in names]
    for file, name in zip(files, names, strict=True):
        file.name = name
    queried_packages: list[str] = []

    def files_of(package: str) -> list[Mock]:
        queried_packages.append(package)
        return files

    monkeypatch.setattr(importlib.metadata, "files", files_of)
    module._load_cuda_runtime()  # pyright: ignore[reportPrivateUsage]
    assert queried_packages == ["nvidia-cuda-runtime-cu12"]
    # Its symbols stay out of the global scope, which has torch's own runtime.
    assert opened_libraries[1:] == [(str(folder / "libcudart.so.12"), os.RTLD_LOCAL)]


def test_missing_cuda_runtime_package_loads_nothing(
    opened_libraries: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    absent = Mock(side_effect=importlib.metadata.PackageNotFoundError)
    monkeypatch.setattr(importlib.metadata, "files", absent)
    module._load_cuda_runtime()  # pyright: ignore[reportPrivateUsage]
    assert opened_libraries == [("libcudart.so.12", os.RTLD_NOLOAD)]


@pytest.mark.usefixtures("cleared_findings")
def test_incomplete_cuda_runtime_package_warns_and_uses_sdpa(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    missing = Mock(locate=Mock(return_value=Path("/nowhere/libabsent.so.12")))
    missing.name = "libabsent.so.12"
    monkeypatch.setattr(module, "_CUDA_RUNTIME", missing.name)
    monkeypatch.setattr(importlib.metadata, "files", Mock(return_value=[missing]))
    cuda = torch.device("cuda")
    with caplog.at_level(logging.WARNING):
        assert not module._is_xformers_usable(torch.bfloat16, cuda)  # pyright: ignore[reportPrivateUsage]
    assert "/nowhere/libabsent.so.12: cannot open shared object file" in caplog.text


def test_cuda_runtime_loaded_by_torch_is_reused(monkeypatch: pytest.MonkeyPatch) -> None:
    files, library = Mock(), Mock()
    monkeypatch.setattr(ctypes, "CDLL", library)
    monkeypatch.setattr(importlib.metadata, "files", files)
    module._load_cuda_runtime()  # pyright: ignore[reportPrivateUsage]
    library.assert_called_once_with("libcudart.so.12", mode=os.RTLD_NOLOAD)
    files.assert_not_called()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dim", HEAD_DIMS)
def test_padding_for_kernels_keeps_the_result(
    dim: int, monkeypatch: pytest.MonkeyPatch, *, causal: bool
) -> None:
    head_dims: list[int] = []

    def kernel(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, attn_bias: object, scale: float
    ) -> torch.Tensor:
        """Compute xformers' result, refusing the head dims that its kernels refuse."""
        head_dims.append(query.shape[-1])
        assert query.shape[-1] % 8 == 0
        scores = torch.einsum("bqhd,bkhd->bhqk", query, key).mul(scale)
        if attn_bias == "lower triangular":
            scores = scores + torch.full(scores.shape[-2:], -torch.inf).triu(1)
        return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), value)

    ops = SimpleNamespace(memory_efficient_attention=kernel, LowerTriangularMask=lambda: "lower triangular")
    monkeypatch.setattr(module, "_xformers", lambda: ops)
    monkeypatch.setattr(module, "_select_backend", Mock(return_value="xformers"))
    query, key, value = qkv(dim, torch.float32, queries=7)
    padded = attention(query, key, value, "xformers", causal=causal)
    monkeypatch.undo()
    torch.testing.assert_close(padded, attention(query, key, value, "reference", causal=causal))
    assert head_dims
