import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vqd_scale.tokenizers.codebook.usage import usage_of


def test_trap_40_both_definitions_of_usage_are_told_apart() -> None:
    found = usage_of(torch.tensor([0, 1, 9, 10, 11, 0, 0, 0]))
    assert found.used == 4 / 8
    assert found.used_often == 2 / 8
    assert (found.codes, found.tokens) == (8, 31)


def test_perplexity_is_k_where_all_codes_are_equally_frequent_and_1_where_one_is_all() -> None:
    assert usage_of(torch.full((64,), 3)).perplexity == pytest.approx(64)
    assert usage_of(torch.tensor([0, 7, 0])).perplexity == pytest.approx(1)
    halves = usage_of(torch.tensor([2, 1, 1]))
    assert halves.perplexity == pytest.approx(math.exp(0.5 * math.log(2) + 0.5 * math.log(4)))


@given(st.lists(st.integers(0, 20), min_size=1, max_size=30))
def test_what_holds_of_all_counts(counts: list[int]) -> None:
    found = usage_of(torch.tensor(counts))
    assert 0 <= found.used_often <= found.used <= 1
    assert found.perplexity <= found.used * len(counts) + 1e-9
    assert (found.perplexity >= 1 - 1e-9) == (sum(counts) > 0)
