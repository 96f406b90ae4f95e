"""The compiled attention is the plain formula's, forward and backward, in every corner."""

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

from vqd_scale.nn import small_heads
from vqd_scale.nn.attention import attention
from vqd_scale.nn.small_heads import is_faster, small_heads_attention

QKV = tuple[Tensor, Tensor, Tensor]


def qkv(batch: int, queries: int, keys: int, heads: int, dim: int, seed: int = 0) -> QKV:
    generator = torch.Generator().manual_seed(seed)

    def drawn(tokens: int) -> Tensor:
        return torch.randn(batch, tokens, heads, dim, generator=generator).requires_grad_()

    return drawn(queries), drawn(keys), drawn(keys)


def with_gradients(result: Tensor, inputs: QKV) -> tuple[Tensor, ...]:
    slope = torch.sin(torch.arange(result.numel(), dtype=torch.float32)).view(result.shape).to(result.dtype)
    return result.detach(), *torch.autograd.grad(result, inputs, slope)


@pytest.fixture
def nothing_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    kernel = small_heads._kernel  # pyright: ignore[reportPrivateUsage]
    kernel.cache_clear()
    yield tmp_path
    kernel.cache_clear()


@pytest.fixture(params=[None, 4, 8, 16])
def width(request: pytest.FixtureRequest, nothing_built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The processor's own width, then those of all processors: the compiler splits what is too wide here,
    for a long time if it is to do it well."""
    if request.param is not None:
        flags = small_heads._FLAGS  # pyright: ignore[reportPrivateUsage]
        monkeypatch.setattr(small_heads, "_FLAGS", (*flags, f"-DWIDTH={request.param}", "-O1"))


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
def test_it_is_the_plain_formula(
    batch: int, queries: int, keys: int, heads: int, dim: int, seed: int
) -> None:
    inputs = qkv(batch, queries, keys, heads, dim, seed)
    ours = with_gradients(small_heads_attention(*inputs), inputs)
    query, key, value = (part.detach().double().requires_grad_() for part in inputs)
    expected = with_gradients(attention(query, key, value, "reference"), (query, key, value))
    for found, wanted in zip(ours, expected, strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [5.0, 6.765, 30.0])  # e^(2 * 6.765^2) / 17 is just no float any more
def test_keys_that_fill_the_last_panel_do_not_count_even_where_all_scores_are_far_below_theirs(
    size: float,
) -> None:
    _, _, value = qkv(1, 3, 17, 1, 4)
    query, key = torch.full((1, 3, 1, 4), size), torch.full((1, 17, 1, 4), -size)
    inputs = query.requires_grad_(), key.requires_grad_(), value
    ours = with_gradients(small_heads_attention(*inputs), inputs)
    expected = with_gradients(attention(*inputs, "reference"), inputs)
    torch.testing.assert_close(ours[0], value.mean(dim=1, keepdim=True).expand_as(ours[0]))
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def test_what_is_not_finite_stays_so() -> None:
    """The guard of training's health looks at losses."""
    for spoiled in range(3):
        query, key, value = (part.detach() for part in qkv(1, 9, 40, 2, 12))
        (query, key, value)[spoiled][0, 5, 0, 3] = torch.nan
        found = small_heads_attention(query, key, value)
        expected = attention(query, key, value, "reference")
        assert torch.equal(found.isnan(), expected.isnan())
        assert found.isnan().any()


def test_layout_of_the_inputs_does_not_matter() -> None:
    inputs = qkv(2, 8, 9, 3, 12)
    moved = tuple(part.transpose(1, 2).contiguous().transpose(1, 2) for part in inputs)
    assert torch.equal(small_heads_attention(*inputs), small_heads_attention(*moved))


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
def test_bits_do_not_depend_on_the_number_of_threads() -> None:
    inputs = qkv(2, 33, 40, 3, 12)
    found: list[tuple[Tensor, ...]] = []
    for count in (1, 2, 4):
        torch.set_num_threads(count)
        found.append(with_gradients(small_heads_attention(*inputs), inputs))
    for other in found[1:]:
        assert all(torch.equal(one, two) for one, two in zip(found[0], other, strict=True))


def test_half_precision_is_computed_in_float32() -> None:
    inputs = tuple(part.detach().bfloat16() for part in qkv(1, 9, 40, 2, 12))
    found = small_heads_attention(*inputs)
    assert found.dtype is torch.bfloat16
    assert torch.equal(found, small_heads_attention(*(part.float() for part in inputs)).bfloat16())


def test_torch_knows_it_as_an_operation() -> None:
    torch.library.opcheck(torch.ops.vqd_scale.small_heads.default, qkv(1, 5, 6, 2, 4))


def test_auto_takes_it_where_it_pays() -> None:
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
    ("compiler", "said"), [("no-such-compiler", "no C compiler"), ("false", "sdpa serves")]
)
def test_without_a_compiler_sdpa_serves_and_that_is_said(
    compiler: str,
    said: str,
    nothing_built: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("CC", compiler)
    inputs = qkv(1, 5, 512, 1, 12)
    with caplog.at_level(logging.WARNING):
        found = attention(*inputs)
    assert torch.equal(found, attention(*inputs, backend="sdpa"))
    assert [said in record.message for record in caplog.records] == [True]
    assert not list(nothing_built.rglob("*.so"))
    with pytest.raises(ValueError, match="use sdpa"):
        small_heads_attention(*inputs)


def test_where_nothing_can_be_kept_sdpa_serves_and_that_is_said(
    nothing_built: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (nothing_built / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(nothing_built / "file"))
    inputs = qkv(1, 5, 512, 1, 12)
    with caplog.at_level(logging.WARNING):
        found = attention(*inputs)
    assert torch.equal(found, attention(*inputs, backend="sdpa"))
    assert ["sdpa serves" in text for text in caplog.messages] == [True]


def test_it_is_built_once_and_kept(nothing_built: Path) -> None:
    inputs = qkv(1, 3, 3, 1, 12)
    small_heads_attention(*inputs)
    (built,) = nothing_built.rglob("*.so")
    assert ctypes.CDLL(str(built)).forward
    stamp = built.stat().st_mtime_ns
    small_heads._kernel.cache_clear()  # pyright: ignore[reportPrivateUsage]
    small_heads_attention(*inputs)
    assert built.stat().st_mtime_ns == stamp
    assert len(list((nothing_built / "vqd_scale").iterdir())) == 1


def _sum_in_child(inputs: tuple[Tensor, ...]) -> float:
    return float(small_heads_attention(*inputs).sum())


def test_a_forked_process_has_threads_of_its_own() -> None:
    inputs = tuple(part.detach() for part in qkv(2, 33, 40, 3, 12))
    expected = _sum_in_child(inputs)
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply_async(_sum_in_child, (inputs,)).get(timeout=60) == expected
        # Ended in peace: a signal would end it only where no earlier test has set a handler.
        pool.close()
        pool.join()
