import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vqd_scale.tokenizers.codebook.reservoir import Reservoir

EACH = 4
"""Vectors of an image."""


def vectors_of(slots: Tensor) -> Tensor:
    """The vectors of images, of which each says whose it is."""
    return (slots[:, None] * EACH + torch.arange(EACH)).flatten()[:, None].float().repeat(1, 2)


def filled(size: int, batches: list[Tensor], seed: int = 0) -> Reservoir:
    reservoir = Reservoir(size, seed)
    for slots in batches:
        reservoir.add(vectors_of(slots), slots)
    return reservoir


def alone(tensor: Tensor) -> Tensor:
    return tensor


@given(st.integers(1, 60), st.permutations(list(range(12))), st.integers(1, 5))
def test_what_stays_depends_neither_on_order_nor_on_batches(size: int, order: list[int], batch: int) -> None:
    whole = filled(size, [torch.arange(12)]).pooled(alone)
    other = filled(size, list(torch.tensor(order).split(batch))).pooled(alone)
    assert torch.equal(whole, other)
    assert len(whole) == min(size, 12 * EACH)
    assert len(whole[:, 0].unique()) == len(whole)


def test_several_ranks_keep_what_one_would() -> None:
    whole = filled(10, [torch.arange(12)]).pooled(alone)
    ranks = [filled(10, [torch.arange(rank, 12, 3)]) for rank in range(3)]
    held: list[list[Tensor]] = []
    for rank in ranks:
        parts: list[Tensor] = []
        rank.pooled(lambda tensor, parts=parts: parts.append(tensor) or tensor)
        held.append(parts)
    joined = iter([torch.cat([parts[0] for parts in held]), torch.cat([parts[1] for parts in held])])
    assert torch.equal(ranks[0].pooled(lambda _: next(joined)), whole)


def test_every_vector_is_equally_likely_to_stay() -> None:
    """Chi-squared of 600 reservoirs of 5 out of 40 vectors; 99.9 % of fair ones lie below 72.1."""
    counts = torch.zeros(40)
    for seed in range(600):
        counts[filled(5, [torch.arange(10)], seed).pooled(alone)[:, 0].long()] += 1
    expected = 600 * 5 / 40
    assert float(((counts - expected).square() / expected).sum()) < 72.1 * (1 - 5 / 40)
