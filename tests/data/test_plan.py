import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vqd_scale.core.errors import UserError
from vqd_scale.core.rng import Purpose, permutation
from vqd_scale.data.plan import Plan, owned_lanes

Triple = tuple[int, int, int]

counts_of_shards = st.lists(st.integers(0, 23), min_size=1, max_size=7).filter(lambda counts: sum(counts) > 0)
lane_counts = st.integers(1, 12)
windows = st.integers(1, 9)
seeds = st.integers(0, 2**32 - 1)


def slow_order(counts: list[int], lanes: int, window: int, seed: int, epochs: int) -> list[Triple]:
    """The order as the module's first lines say it, with lists and a walk over all slots."""
    samples = sum(counts)
    order: list[Triple] = []
    for epoch in range(epochs):
        line = [
            (epoch, shard, member)
            for shard in permutation(seed, Purpose.SHARD_ORDER, epoch, len(counts)).tolist()
            for member in range(counts[shard])
        ]
        slots = range(epoch * samples, (epoch + 1) * samples)
        by_slot: dict[int, Triple] = {}
        for lane in range(lanes):
            own = [slot for slot in slots if slot % lanes == lane]
            piece, line = line[: len(own)], line[len(own) :]
            for start in range(0, len(own), window):
                block = piece[start : start + window]
                shuffled = permutation(seed, Purpose.LANE_ORDER, own[start], len(block)).tolist()
                for slot, place in zip(own[start : start + window], shuffled, strict=True):
                    by_slot[slot] = block[place]
        order.extend(by_slot[slot] for slot in slots)
    return order


def located(plan: Plan, slots: list[int]) -> list[Triple]:
    places = plan.locate(np.array(slots, dtype=np.int64))
    columns = (places.epochs.tolist(), places.shards.tolist(), places.members.tolist())
    return list(zip(*columns, strict=True))


@settings(max_examples=40, deadline=None)
@given(counts_of_shards, lane_counts, windows, seeds)
def test_plan_is_the_slow_order(counts: list[int], lanes: int, window: int, seed: int) -> None:
    expected = slow_order(counts, lanes, window, seed, epochs=3)
    assert located(Plan(counts, lanes, window, seed), list(range(len(expected)))) == expected


@settings(max_examples=40, deadline=None)
@given(counts_of_shards, lane_counts, windows, seeds)
def test_every_sample_once_per_epoch(counts: list[int], lanes: int, window: int, seed: int) -> None:
    samples = sum(counts)
    plan = Plan(counts, lanes, window, seed)
    everything = {(shard, member) for shard, count in enumerate(counts) for member in range(count)}
    for epoch in range(3):
        found = located(plan, list(range(epoch * samples, (epoch + 1) * samples)))
        assert {place[0] for place in found} == {epoch}
        assert len(found) == samples
        assert {place[1:] for place in found} == everything


@settings(max_examples=40, deadline=None)
@given(counts_of_shards, lane_counts, windows, seeds, st.data())
def test_any_slot_first(counts: list[int], lanes: int, window: int, seed: int, data: st.DataObject) -> None:
    expected = slow_order(counts, lanes, window, seed, epochs=3)
    slots = data.draw(st.lists(st.integers(0, len(expected) - 1), min_size=1, max_size=20))
    assert located(Plan(counts, lanes, window, seed), slots) == [expected[slot] for slot in slots]


@settings(max_examples=30, deadline=None)
@given(counts_of_shards, seeds, st.sampled_from([1, 2, 3, 4, 6, 12]), st.sampled_from([1, 2, 3, 4, 6, 12]))
def test_ranks_share_each_batch(counts: list[int], seed: int, first: int, second: int) -> None:
    """The same global batches at both numbers of ranks, each rank with a plan of its own."""

    def batches(ranks: int) -> list[list[Triple]]:
        plans = [Plan(counts, 12, 5, seed) for _ in range(ranks)]
        return [
            [
                place
                for rank, plan in enumerate(plans)
                for place in located(plan, [12 * batch + lane for lane in owned_lanes(12, rank, ranks)])
            ]
            for batch in range(4)
        ]

    assert batches(first) == batches(second)


def test_epochs_and_seeds_differ_and_windows_bound_the_shuffle() -> None:
    counts = [100] * 20
    one, other = Plan(counts, 4, 16, 0), Plan(counts, 4, 16, 1)
    epoch = list(range(2_000))
    assert located(one, epoch) != located(other, epoch)
    later = located(one, [slot + 2_000 for slot in epoch])
    assert [place[1:] for place in later] != [place[1:] for place in located(one, epoch)]
    order = permutation(0, Purpose.SHARD_ORDER, 0, 20).tolist()
    lane = [order.index(shard) * 100 + member for _, shard, member in located(one, epoch)[::4]]
    moved = np.abs(np.array(lane) - np.arange(500))
    assert 0 < moved.max() < 16


@settings(max_examples=3, deadline=None)
@given(st.integers(0, 10))
def test_a_far_slot_of_a_large_set(epoch: int) -> None:
    plan = Plan([10_000] * 41_408, 8_192, 1_000, 7)
    start = epoch * plan.samples + int(plan.samples * 0.9)
    places = plan.locate(np.arange(start, start + 8, dtype=np.int64))
    assert set(places.epochs.tolist()) == {epoch}
    assert (places.members < 10_000).all()
    assert (places.shards < 41_408).all()


def test_wrong_uses() -> None:
    with pytest.raises(UserError, match="without samples"):
        Plan([0, 0], 4, 4, 0)
    with pytest.raises(UserError, match="multiple of the ranks"):
        owned_lanes(10, 0, 4)
