import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vqd_scale.tokenizers.codebook.usage import usage_of


def test_two_definitions_of_usage() -> None:
    usage = usage_of(torch.tensor([0, 1, 9, 10, 11, 0, 0, 0]))
    assert usage.used == 4 / 8
    assert usage.used_often == 2 / 8
    assert (usage.codes, usage.tokens) == (8, 31)


def test_perplexity_of_uniform_and_single_code_counts() -> None:
    assert usage_of(torch.full((64,), 3)).perplexity == pytest.approx(64)
    assert usage_of(torch.tensor([0, 7, 0])).perplexity == pytest.approx(1)
    halves = usage_of(torch.tensor([2, 1, 1]))
    assert halves.perplexity == pytest.approx(math.exp(0.5 * math.log(2) + 0.5 * math.log(4)))


@given(st.lists(st.integers(0, 20), min_size=1, max_size=30))
def test_usage_and_perplexity_bounds(counts: list[int]) -> None:
    usage = usage_of(torch.tensor(counts))
    assert 0 <= usage.used_often <= usage.used <= 1
    assert usage.perplexity <= usage.used * len(counts) + 1e-9
    assert (usage.perplexity >= 1 - 1e-9) == (sum(counts) > 0)
