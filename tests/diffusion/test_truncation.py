"""Truncation without a sort against its definition."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vqd_scale.diffusion import truncation
from vqd_scale.diffusion.truncation import keep_top_k, keep_top_p, keep_top_p_by_sorting


def predictions(codes: int, sharpness: float, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (sharpness * torch.randn(3, 5, codes, generator=generator)).log_softmax(-1)


@given(
    codes=st.sampled_from([1, 2, 37, 1024, 2887]),
    sharpness=st.sampled_from([0.0, 1e-5, 0.1, 1.0, 5.0, 50.0]),
    rate=st.sampled_from([0.0, 1e-9, 0.5, 0.86, 0.999, 1.0]),
    seed=st.integers(0, 99),
)
def test_top_p_equals_its_definition(codes: int, sharpness: float, rate: float, seed: int) -> None:
    log_p = predictions(codes, sharpness, seed)
    expected = log_p if rate == 1 else keep_top_p_by_sorting(log_p, rate)
    assert torch.equal(keep_top_p(log_p, rate), expected)


@given(st.lists(st.integers(0, 12), min_size=1, max_size=40), st.sampled_from([0.0, 0.25, 0.5, 0.75]))
def test_ties_are_kept_in_the_order_of_codes(exponents: list[int], rate: float) -> None:
    """Powers of two sum without rounding, and many of them are equal."""
    log_p = -math.log(2) * torch.tensor(exponents, dtype=torch.float32).view(1, 1, -1)
    log_p = log_p.exp().mul(2**10).round().div(2**12).log()
    assert torch.equal(keep_top_p(log_p, rate), keep_top_p_by_sorting(log_p, rate))


def test_row_with_nan_is_unchanged() -> None:
    log_p = predictions(64, 1.0, 0)
    log_p[1, 2, 3] = torch.nan
    result = keep_top_p(log_p, 0.5)
    assert torch.equal(result[1, 2].nan_to_num(7.0), log_p[1, 2].nan_to_num(7.0))
    assert torch.equal(result[0], keep_top_p_by_sorting(log_p[:1], 0.5)[0])


def test_result_depends_on_neither_layout_nor_threads() -> None:
    log_p = predictions(257, 1.0, 0)
    expected = keep_top_p(log_p, 0.7)
    transposed = log_p.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(keep_top_p(transposed, 0.7), expected)
    count = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        assert torch.equal(keep_top_p(log_p, 0.7), expected)
    finally:
        torch.set_num_threads(count)


def test_missing_compiler_sorts(monkeypatch: pytest.MonkeyPatch) -> None:
    log_p = predictions(64, 1.0, 0)
    expected = keep_top_p(log_p, 0.7)
    monkeypatch.setattr(truncation, "_library", lambda: None)
    assert torch.equal(keep_top_p(log_p, 0.7), expected)


@given(codes=st.sampled_from([1, 5, 64]), count=st.integers(1, 70), seed=st.integers(0, 9))
def test_top_k_keeps_the_first_codes_of_the_order(codes: int, count: int, seed: int) -> None:
    log_p = predictions(codes, 1.0, seed)
    is_kept = keep_top_k(log_p, count).isfinite()
    assert torch.equal(is_kept.sum(-1), torch.full((3, 5), min(count, codes)))
    smallest = log_p.masked_fill(~is_kept, torch.inf).amin(-1)
    assert bool((log_p.masked_fill(is_kept, -torch.inf).amax(-1) <= smallest).all())
