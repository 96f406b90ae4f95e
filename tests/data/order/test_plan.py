from collections.abc import Sequence
from fractions import Fraction
from math import floor

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from vqd_scale.core.errors import UserError
from vqd_scale.core.rng import Purpose, permutation
from vqd_scale.data.order.mixture import shares
from vqd_scale.data.order.plan import LaneOrder, Plan, owned_lanes

Triple = tuple[int, int, int]

counts_of_shards = st.lists(st.integers(0, 23), min_size=1, max_size=7).filter(lambda counts: sum(counts) > 0)
lane_counts = st.integers(1, 12)
windows = st.integers(1, 9)
weights = st.lists(st.integers(1, 9), min_size=1, max_size=4)
seeds = st.integers(0, 2**32 - 1)


def owners(weights: list[int], lanes: int, batches: int) -> list[int]:
    """Return the owner of each slot by the definition of `vqd_scale.data.order.mixture`."""
    ends = [Fraction(sum(weights[: number + 1]), sum(weights)) for number in range(len(weights))]
    owner: list[int] = []
    for batch in range(batches):
        edges = [floor((batch + 1) * lanes * end) - floor(batch * lanes * end) for end in ends]
        owner.extend(sum(lane >= edge for edge in edges) for lane in range(lanes))
    return owner


def slow_order(
    counts: list[int], lanes: int, window: int, seed: int, slots: Sequence[int], number: int = 0
) -> dict[int, Triple]:
    """Return the order of a dataset by the module's definition, with lists and a walk over its slots."""
    samples, name = sum(counts), number << 48
    order: dict[int, Triple] = {}
    # A window is identified by its lane and the dataset's number of earlier slots in it.
    turns = [0] * lanes
    for epoch in range(len(slots) // samples):
        line = [
            (epoch, shard, member)
            for shard in permutation(seed, Purpose.SHARD_ORDER, name + epoch, len(counts)).tolist()
            for member in range(counts[shard])
        ]
        of_epoch = slots[epoch * samples : (epoch + 1) * samples]
        for lane in range(lanes):
            lane_slots = [slot for slot in of_epoch if slot % lanes == lane]
            piece, line = line[: len(lane_slots)], line[len(lane_slots) :]
            for start in range(0, len(lane_slots), window):
                block = piece[start : start + window]
                first = name + turns[lane] * lanes + lane
                shuffled = permutation(seed, Purpose.LANE_ORDER, first, len(block)).tolist()
                for slot, place in zip(lane_slots[start : start + window], shuffled, strict=True):
                    order[slot] = block[place]
                    turns[lane] += 1
    return order


def plan_of(counts: list[int], lanes: int, window: int, seed: int) -> Plan:
    (share,) = shares([1], lanes)
    return Plan([share], [LaneOrder(counts, share, window, seed)])


def located(plan: Plan, slots: list[int]) -> list[Triple]:
    places = plan.locate(np.array(slots, dtype=np.int64))
    columns = (places.epochs.tolist(), places.shards.tolist(), places.members.tolist())
    return list(zip(*columns, strict=True))


@settings(max_examples=40, deadline=None)
@given(counts_of_shards, lane_counts, windows, seeds)
def test_plan_equals_slow_order(counts: list[int], lanes: int, window: int, seed: int) -> None:
    expected = slow_order(counts, lanes, window, seed, range(3 * sum(counts)))
    assert located(plan_of(counts, lanes, window, seed), list(expected)) == list(expected.values())


@settings(max_examples=40, deadline=None)
@given(counts_of_shards, lane_counts, windows, seeds)
def test_every_sample_once_per_epoch(counts: list[int], lanes: int, window: int, seed: int) -> None:
    samples = sum(counts)
    plan = plan_of(counts, lanes, window, seed)
    everything = {(shard, member) for shard, count in enumerate(counts) for member in range(count)}
    for epoch in range(3):
        locations = located(plan, list(range(epoch * samples, (epoch + 1) * samples)))
        assert {place[0] for place in locations} == {epoch}
        assert len(locations) == samples
        assert {place[1:] for place in locations} == everything


@settings(max_examples=40, deadline=None)
@given(counts_of_shards, lane_counts, windows, seeds, st.data())
def test_plan_is_random_access(
    counts: list[int], lanes: int, window: int, seed: int, data: st.DataObject
) -> None:
    expected = slow_order(counts, lanes, window, seed, range(3 * sum(counts)))
    slots = data.draw(st.lists(st.integers(0, len(expected) - 1), min_size=1, max_size=20))
    assert located(plan_of(counts, lanes, window, seed), slots) == [expected[slot] for slot in slots]


@settings(max_examples=30, deadline=None)
@given(counts_of_shards, seeds, st.sampled_from([1, 2, 3, 4, 6, 12]), st.sampled_from([1, 2, 3, 4, 6, 12]))
def test_ranks_partition_each_batch(counts: list[int], seed: int, first: int, second: int) -> None:
    """Global batches are equal for both numbers of ranks, each rank with its own plan."""

    def batches(ranks: int) -> list[list[Triple]]:
        plans = [plan_of(counts, 12, 5, seed) for _ in range(ranks)]
        return [
            [
                place
                for rank, plan in enumerate(plans)
                for place in located(plan, [12 * batch + lane for lane in owned_lanes(12, rank, ranks)])
            ]
            for batch in range(4)
        ]

    assert batches(first) == batches(second)


@settings(max_examples=60, deadline=None)
@given(weights, lane_counts, st.integers(1, 40))
def test_shares_equal_a_walk_over_the_slots(weights: list[int], lanes: int, batches: int) -> None:
    assume(min(weights) * lanes >= sum(weights))
    owner = np.array(owners(weights, lanes, batches))
    slots = np.arange(len(owner))
    for number, share in enumerate(shares(weights, lanes)):
        is_own_slot = owner == number
        assert np.array_equal(share.owns(slots), is_own_slot)
        assert np.array_equal(share.before(slots), np.cumsum(is_own_slot) - is_own_slot)
        assert [share.slot(n) for n in range(is_own_slot.sum())] == slots[is_own_slot].tolist()
        for lane in range(lanes):
            turns = np.cumsum(is_own_slot & (slots % lanes == lane)) - (is_own_slot & (slots % lanes == lane))
            assert np.array_equal(share.turns(np.full_like(slots, lane), slots), turns)


@settings(max_examples=60, deadline=None)
@given(weights, st.integers(1, 200), st.integers(0, 10**9))
def test_proportions_are_exact_over_any_number_of_batches(
    weights: list[int], lanes: int, batches: int
) -> None:
    assume(min(weights) * lanes >= sum(weights))
    counts = [int(share.before(np.array([batches * lanes]))[0]) for share in shares(weights, lanes)]
    assert sum(counts) == batches * lanes
    for count, weight in zip(counts, weights, strict=True):
        assert abs(count - Fraction(batches * lanes * weight, sum(weights))) < 1


def test_weights_are_read_as_decimals() -> None:
    assert shares([0.7, 0.3], 10) == shares([7, 3], 10)
    with pytest.raises(UserError, match="too many digits"):
        shares([0.1 + 0.2, 0.7], 10)
    with pytest.raises(UserError, match="a weight of 1 is less than one sample in a batch of 9"):
        shares([1, 9], 9)


@settings(max_examples=40, deadline=None)
@given(st.lists(counts_of_shards, min_size=2, max_size=4), weights, lane_counts, windows, seeds)
def test_mixed_datasets_follow_their_slow_orders(
    counts: list[list[int]], weights: list[int], lanes: int, window: int, seed: int
) -> None:
    weights = (weights * 4)[: len(counts)]
    assume(min(weights) * lanes >= sum(weights))
    owner = owners(weights, lanes, 150)
    mixed = shares(weights, lanes)
    orders = [LaneOrder(of, mixed[number], window, seed, number << 48) for number, of in enumerate(counts)]
    locations = Plan(mixed, orders).locate(np.arange(len(owner)))
    assert locations.sets.tolist() == owner
    for number, of in enumerate(counts):
        set_slots = [slot for slot, set_number in enumerate(owner) if set_number == number]
        expected = slow_order(of, lanes, window, seed, set_slots, number)
        columns = (locations.epochs, locations.shards, locations.members)
        assert list(zip(*(column[set_slots].tolist() for column in columns), strict=True))[
            : len(expected)
        ] == list(dict(sorted(expected.items())).values())
        # Exactly once in each epoch of the dataset, in the order of the slots.
        everything = {(shard, member) for shard, count in enumerate(of) for member in range(count)}
        for epoch in range(len(set_slots) // sum(of)):
            part = set_slots[epoch * sum(of) : (epoch + 1) * sum(of)]
            epoch_samples = list(
                zip(locations.shards[part].tolist(), locations.members[part].tolist(), strict=True)
            )
            assert set(epoch_samples) == everything
            assert len(epoch_samples) == len(everything)


def test_epochs_and_seeds_differ_and_windows_bound_the_shuffle() -> None:
    counts = [100] * 20
    one, other_seed = plan_of(counts, 4, 16, 0), plan_of(counts, 4, 16, 1)
    epoch = list(range(2_000))
    assert located(one, epoch) != located(other_seed, epoch)
    later = located(one, [slot + 2_000 for slot in epoch])
    assert [place[1:] for place in later] != [place[1:] for place in located(one, epoch)]
    order = permutation(0, Purpose.SHARD_ORDER, 0, 20).tolist()
    lane = [order.index(shard) * 100 + member for _, shard, member in located(one, epoch)[::4]]
    moved = np.abs(np.array(lane) - np.arange(500))
    assert 0 < moved.max() < 16


@settings(max_examples=3, deadline=None)
@given(st.integers(0, 10))
def test_late_slot_of_a_large_dataset(epoch: int) -> None:
    plan = plan_of([10_000] * 41_408, 8_192, 1_000, 7)
    start = int((epoch + 0.9) * 414_080_000)
    places = plan.locate(np.arange(start, start + 8, dtype=np.int64))
    assert set(places.epochs.tolist()) == {epoch}
    assert (places.members < 10_000).all()
    assert (places.shards < 41_408).all()


def test_invalid_use_raises_user_error() -> None:
    with pytest.raises(UserError, match="without samples"):
        plan_of([0, 0], 4, 4, 0)
    with pytest.raises(UserError, match="multiple of the ranks"):
        owned_lanes(10, 0, 4)
