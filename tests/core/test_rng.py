import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vqd_scale.core.rng import Purpose, integers, permutation, philox4x32, sample_codes, uniforms

# Random123's kat_vectors for philox4x32, 10 rounds: counter, key, result.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def philox_of_plain_integers(counter: list[int], key: list[int]) -> list[int]:
    """Compute the paper's round function on Python's unbounded integers."""
    c, (k0, k1) = list(counter), key
    for _ in range(10):
        first, second = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(second >> 32) ^ c[1] ^ k0, second % 2**32, (first >> 32) ^ c[3] ^ k1, first % 2**32]
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_published_vectors_in_numpy_and_torch(counter: str, key: str, expected: str) -> None:
    k0, k1 = words(key)
    n0, n1, n2, n3 = (np.array([word], dtype=np.int64) for word in words(counter))
    t0, t1, t2, t3 = (torch.tensor([word]) for word in words(counter))
    assert [int(word[0]) for word in philox4x32((n0, n1, n2, n3), (k0, k1))] == words(expected)
    assert [int(word[0]) for word in philox4x32((t0, t1, t2, t3), (k0, k1))] == words(expected)
    assert philox_of_plain_integers(words(counter), [k0, k1]) == words(expected)


word32 = st.integers(0, 2**32 - 1)


@given(st.tuples(word32, word32, word32, word32), st.tuples(word32, word32))
def test_numpy_and_torch_equal_plain_integers(
    counter: tuple[int, int, int, int], key: tuple[int, int]
) -> None:
    n0, n1, n2, n3 = (np.array([word], dtype=np.int64) for word in counter)
    t0, t1, t2, t3 = (torch.tensor([word]) for word in counter)
    expected = philox_of_plain_integers(list(counter), list(key))
    assert [int(word[0]) for word in philox4x32((n0, n1, n2, n3), key)] == expected
    assert [int(word[0]) for word in philox4x32((t0, t1, t2, t3), key)] == expected


@given(st.integers(0, 2**40), st.integers(1, 40), st.integers(0, 99))
def test_torch_uniforms_equal_numpy_words(slot: int, count: int, draw: int) -> None:
    torch_uniforms = uniforms(7, Purpose.CORRUPTION, torch.tensor([slot]), count, draw=draw)
    expected = integers(7, Purpose.CORRUPTION, slot, count, draw=draw)
    assert (torch_uniforms[0].double().numpy() * 2**24 == expected >> 8).all()


def test_slot_numbers_do_not_depend_on_batch() -> None:
    together = uniforms(0, Purpose.SAMPLING, torch.arange(10), 13, dtype=torch.float64)
    alone = uniforms(0, Purpose.SAMPLING, torch.tensor([4]), 13, dtype=torch.float64)
    assert torch.equal(together[4:5], alone)


def test_purposes_draws_and_seeds_give_distinct_numbers() -> None:
    slots = torch.arange(4)
    rows = [
        uniforms(seed, purpose, slots, 8, draw=draw)
        for seed in (0, 1)
        for purpose in Purpose
        for draw in (0, 1)
    ]
    assert torch.cat([row.flatten() for row in rows]).unique().numel() > 0.999 * len(rows) * 32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_uniforms_are_evenly_distributed(dtype: torch.dtype) -> None:
    uniform_numbers = uniforms(3, Purpose.SAMPLING, torch.arange(1000), 1000, dtype=dtype)
    assert float(uniform_numbers.min()) >= 0 and float(uniform_numbers.max()) < 1
    counts = torch.histc(uniform_numbers, bins=100, min=0, max=1)
    chi_square = float(((counts - 10_000) ** 2 / 10_000).sum())
    assert chi_square < 160  # 99 degrees of freedom: the 0.9999 quantile


def test_low_precision_uniforms_are_refused() -> None:
    with pytest.raises(ValueError, match="float32 or float64"):
        uniforms(0, Purpose.SAMPLING, torch.arange(1), 1, dtype=torch.bfloat16)


@given(st.integers(0, 300), st.integers(0, 2**33))
def test_permutation_is_bijective(length: int, slot: int) -> None:
    order = permutation(5, Purpose.SHARD_ORDER, slot, length)
    assert sorted(order.tolist()) == list(range(length))


def sample_by_one_running_sum(chances: Tensor, uniform_numbers: Tensor) -> Tensor:
    cumulative = chances.double().cumsum(-1)
    return (cumulative <= uniform_numbers.double().unsqueeze(-1) * cumulative[..., -1:]).sum(-1)


@given(states=st.integers(1, 200), share=st.floats(0, 1), seed=st.integers(0, 2**32 - 1))
def test_categorical_samples_equal_running_sum(states: int, share: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    chances = torch.rand(64, states, generator=generator) ** 8
    chances[torch.rand(64, states, generator=generator) < share] = 0
    chances[:, int(torch.randint(states, (), generator=generator))] = 0.5
    uniform_numbers = torch.rand(64, generator=generator, dtype=torch.float64)
    codes = sample_codes(chances, uniform_numbers)
    assert torch.equal(codes, sample_by_one_running_sum(chances, uniform_numbers))


@given(
    states=st.integers(1, 200), seed=st.integers(0, 2**32 - 1), dtype=st.sampled_from(["float32", "float64"])
)
def test_zero_probability_state_is_never_sampled(states: int, seed: int, dtype: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    chances = torch.rand(256, states, generator=generator, dtype=getattr(torch, dtype)) ** 40
    chances[torch.rand(256, states, generator=generator) < 0.5] = 0
    chances[:, states // 2] = 1e-30
    ends = torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64).repeat(128)
    codes = sample_codes(chances, ends)
    assert int(codes.max()) < states
    assert bool((chances.gather(1, codes[:, None]) > 0).all())
