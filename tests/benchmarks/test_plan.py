from dataclasses import replace

import numpy as np
import pytest
from benchmarks.plan import PlanProblem, benchmark_plan, check_complete

from vqd_scale.data.order.plan import LaneOrder, Slots

SMALL = PlanProblem(shards=37, samples=20, ranks=5, workers=3, shuffle_window=7)


def test_every_process_reads_its_own_and_together_they_read_all() -> None:
    """What `check_complete` concludes from pieces and some lanes, by walking over all."""
    check_complete(SMALL, walked=4)
    order, seen = SMALL.order(), set[tuple[int, int]]()
    for worker in range(SMALL.lanes):
        first = SMALL.first_slots(worker, 0)
        assert first.tolist() == [worker]
        _, shards, members = order.locate(np.arange(first[0], SMALL.total, SMALL.lanes))
        own = set(zip(shards.tolist(), members.tolist(), strict=True))
        assert not own & seen
        seen |= own
    assert len(seen) == SMALL.total


def test_a_sample_that_comes_twice_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = LaneOrder.locate

    def spoilt(order: LaneOrder, slots: Slots) -> tuple[Slots, Slots, Slots]:
        epochs, shards, members = whole(order, slots)
        members[3] = members[4]
        shards[3] = shards[4]
        return epochs, shards, members

    monkeypatch.setattr(LaneOrder, "locate", spoilt)
    with pytest.raises(ValueError, match="lane 0 does not go through its piece"):
        check_complete(SMALL, walked=4)


@pytest.mark.long
def test_the_figures() -> None:
    figures = benchmark_plan(1, replace(SMALL, shards=11))
    assert figures["seconds"] > 0
    assert figures["megabytes"] > 0
    assert figures["lanes_walked"] == SMALL.lanes
