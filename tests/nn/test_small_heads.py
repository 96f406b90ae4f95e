"""The compiled attention against the plain formula, forward and backward."""

import ctypes
import logging
import multiprocessing
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from vqd_scale.core import compiled
from vqd_scale.nn import small_heads
from vqd_scale.nn.attention import attention
from vqd_scale.nn.small_heads import is_faster, small_heads_attention

QKV = tuple[Tensor, Tensor, Tensor]


def qkv(batch: int, queries: int, keys: int, heads: int, dim: int, seed: int = 0) -> QKV:
    generator = torch.Generator().manual_seed(seed)

    def random_tensor(tokens: int) -> Tensor:
        return torch.randn(batch, tokens, heads, dim, generator=generator).requires_grad_()

    return random_tensor(queries), random_tensor(keys), random_tensor(keys)


def with_gradients(result: Tensor, inputs: QKV) -> tuple[Tensor, ...]:
    slope = torch.sin(torch.arange(result.numel(), dtype=torch.float32)).view(result.shape).to(result.dtype)
    return result.detach(), *torch.autograd.grad(result, inputs, slope)


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    kernel = small_heads._kernel  # pyright: ignore[reportPrivateUsage]
    kernel.cache_clear()
    yield tmp_path
    kernel.cache_clear()


@pytest.fixture(params=[None, 4, 8, 16])
def width(request: pytest.FixtureRequest, empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The processor's own width, then those of all processors: the compiler splits what is too wide here,
    for a long time if it is to do it well."""
    if request.param is not None:
        monkeypatch.setattr(compiled, "FLAGS", f"{compiled.FLAGS} -DWIDTH={request.param} -O1")


@pytest.mark.usefixtures("width")
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    batch=st.integers(1, 3),
    queries=st.integers(1, 40),
    keys=st.integers(1, 70),
    heads=st.integers(1, 3),
    dim=st.sampled_from([1, 12, 13]),
    seed=st.integers(0, 99),
)
def test_result_equals_plain_formula(
    batch: int, queries: int, keys: int, heads: int, dim: int, seed: int
) -> None:
    inputs = qkv(batch, queries, keys, heads, dim, seed)
    results = with_gradients(small_heads_attention(*inputs), inputs)
    query, key, value = (part.detach().double().requires_grad_() for part in inputs)
    expected = with_gradients(attention(query, key, value, "reference"), (query, key, value))
    for actual, exact in zip(results, expected, strict=True):
        torch.testing.assert_close(actual.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [5.0, 6.765, 30.0])  # e^(2 * 6.765^2) / 17 is just no float any more
def test_padding_keys_are_ignored_at_very_low_scores(
    size: float,
) -> None:
    _, _, value = qkv(1, 3, 17, 1, 4)
    query, key = torch.full((1, 3, 1, 4), size), torch.full((1, 17, 1, 4), -size)
    inputs = query.requires_grad_(), key.requires_grad_(), value
    results = with_gradients(small_heads_attention(*inputs), inputs)
    expected = with_gradients(attention(*inputs, "reference"), inputs)
    torch.testing.assert_close(results[0], value.mean(dim=1, keepdim=True).expand_as(results[0]))
    torch.testing.assert_close(results, expected, rtol=1e-4, atol=1e-4)


def test_nonfinite_inputs_give_nonfinite_results() -> None:
    """Training's health guard checks losses."""
    for spoiled in range(3):
        query, key, value = (part.detach() for part in qkv(1, 9, 40, 2, 12))
        (query, key, value)[spoiled][0, 5, 0, 3] = torch.nan
        attended = small_heads_attention(query, key, value)
        expected = attention(query, key, value, "reference")
        assert torch.equal(attended.isnan(), expected.isnan())
        assert attended.isnan().any()


def test_input_layout_does_not_matter() -> None:
    inputs = qkv(2, 8, 9, 3, 12)
    moved = tuple(part.transpose(1, 2).contiguous().transpose(1, 2) for part in inputs)
    assert torch.equal(small_heads_attention(*inputs), small_heads_attention(*moved))


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
def test_bits_do_not_depend_on_thread_count() -> None:
    inputs = qkv(2, 33, 40, 3, 12)
    results_by_threads: list[tuple[Tensor, ...]] = []
    for count in (1, 2, 4):
        torch.set_num_threads(count)
        results_by_threads.append(with_gradients(small_heads_attention(*inputs), inputs))
    for results in results_by_threads[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results_by_threads[0], results, strict=True))


def test_half_precision_is_computed_in_float32() -> None:
    inputs = tuple(part.detach().bfloat16() for part in qkv(1, 9, 40, 2, 12))
    attended = small_heads_attention(*inputs)
    assert attended.dtype is torch.bfloat16
    assert torch.equal(attended, small_heads_attention(*(part.float() for part in inputs)).bfloat16())


def test_torch_operator_passes_opcheck() -> None:
    torch.library.opcheck(torch.ops.vqd_scale.small_heads.default, qkv(1, 5, 6, 2, 4))


def test_auto_selects_small_heads_where_faster() -> None:
    long, short = qkv(1, 5, 512, 1, 12), qkv(1, 512, 77, 1, 12)
    assert is_faster(long[0], long[1])
    assert not is_faster(short[0], short[1])
    assert not is_faster(long[0].to("meta"), long[1].to("meta"))
    assert not is_faster(long[0].double(), long[1].double())
    assert torch.equal(attention(*long), small_heads_attention(*long))
    torch.testing.assert_close(attention(*long), attention(*long, backend="sdpa"))
    causal = qkv(1, 512, 512, 1, 12)
    torch.testing.assert_close(
        attention(*causal, causal=True), attention(*causal, backend="reference", causal=True)
    )


@pytest.mark.parametrize(
    ("compiler", "message"), [("no-such-compiler", "no C compiler"), ("false", "sdpa is used")]
)
def test_missing_compiler_warns_and_uses_sdpa(
    compiler: str,
    message: str,
    empty_cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("CC", compiler)
    inputs = qkv(1, 5, 512, 1, 12)
    with caplog.at_level(logging.WARNING):
        attended = attention(*inputs)
    assert torch.equal(attended, attention(*inputs, backend="sdpa"))
    assert [message in record.message for record in caplog.records] == [True]
    assert not list(empty_cache.rglob("*.so"))
    with pytest.raises(ValueError, match="use sdpa"):
        small_heads_attention(*inputs)


def test_unwritable_cache_warns_and_uses_sdpa(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (empty_cache / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(empty_cache / "file"))
    inputs = qkv(1, 5, 512, 1, 12)
    with caplog.at_level(logging.WARNING):
        attended = attention(*inputs)
    assert torch.equal(attended, attention(*inputs, backend="sdpa"))
    assert ["sdpa is used" in text for text in caplog.messages] == [True]


def test_library_is_built_once_and_cached(empty_cache: Path) -> None:
    inputs = qkv(1, 3, 3, 1, 12)
    small_heads_attention(*inputs)
    (built,) = empty_cache.rglob("*.so")
    assert ctypes.CDLL(str(built)).forward
    stamp = built.stat().st_mtime_ns
    small_heads._kernel.cache_clear()  # pyright: ignore[reportPrivateUsage]
    small_heads_attention(*inputs)
    assert built.stat().st_mtime_ns == stamp
    assert len(list((empty_cache / "vqd_scale").iterdir())) == 1


def _sum_in_child(inputs: tuple[Tensor, ...]) -> float:
    return float(small_heads_attention(*inputs).sum())


def test_forked_process_has_its_own_threads() -> None:
    inputs = tuple(part.detach() for part in qkv(2, 33, 40, 3, 12))
    expected = _sum_in_child(inputs)
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply_async(_sum_in_child, (inputs,)).get(timeout=60) == expected
        # Exit normally: a signal has no effect if an earlier test has set a handler.
        pool.close()
        pool.join()
