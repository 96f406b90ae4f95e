from dataclasses import replace

import numpy as np
import pytest
from benchmarks.plan import PlanProblem, benchmark_plan, check_complete

from vqd_scale.data.order.plan import LaneOrder, Slots

SMALL = PlanProblem(shards=37, samples=20, ranks=5, workers=3, shuffle_window=7)


def test_processes_read_disjoint_shares_of_all_samples() -> None:
    """Check by a walk over all lanes what `check_complete` concludes from some of them."""
    check_complete(SMALL, walked=4)
    order, located_samples = SMALL.order(), set[tuple[int, int]]()
    for worker in range(SMALL.lanes):
        first = SMALL.first_slots(worker, 0)
        assert first.tolist() == [worker]
        _, shards, members = order.locate(np.arange(first[0], SMALL.total, SMALL.lanes))
        worker_samples = set(zip(shards.tolist(), members.tolist(), strict=True))
        assert not worker_samples & located_samples
        located_samples |= worker_samples
    assert len(located_samples) == SMALL.total


def test_duplicate_sample_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    locate = LaneOrder.locate

    def with_duplicate(order: LaneOrder, slots: Slots) -> tuple[Slots, Slots, Slots]:
        epochs, shards, members = locate(order, slots)
        members[3] = members[4]
        shards[3] = shards[4]
        return epochs, shards, members

    monkeypatch.setattr(LaneOrder, "locate", with_duplicate)
    with pytest.raises(ValueError, match="lane 0 does not go through its piece"):
        check_complete(SMALL, walked=4)


@pytest.mark.long
def test_plan_figures() -> None:
    figures = benchmark_plan(1, replace(SMALL, shards=11))
    assert figures["seconds"] > 0
    assert figures["megabytes"] > 0
    assert figures["lanes_walked"] == SMALL.lanes
