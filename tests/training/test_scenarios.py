"""What short runs on real ranks do: see `tests/training/scenarios.py`."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training import forked
from vqd_scale.core.errors import UserError
from vqd_scale.training.checkpoint.manager import consolidated
from vqd_scale.training.engine import imported_weights

pytestmark = pytest.mark.ranks
Results = dict[str, Any]


@pytest.fixture(scope="module")
def results(token_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Results]:
    """Of all scenarios, or of those named, on so many ranks; each is run once."""
    known: dict[tuple[int, tuple[str, ...]], Results] = {}

    def get(ranks: int, *names: str) -> Results:
        if (ranks, names) not in known:
            out = tmp_path_factory.mktemp(f"ranks-{ranks}")
            done = forked.run(
                "tests.training.scenarios", str(token_world), str(out), *names, ranks=ranks, said=out
            )
            assert done.returncode == 0, done.stderr[-4000:]
            known[ranks, names] = json.loads((out / "results.json").read_text())
        return known[ranks, names]

    return get


ONE = (1, "invariance", "held_out")
TWO = (2,)


def assert_same(found: list[float], expected: list[float], rel: float = 1e-5) -> None:
    assert len(found) == len(expected) > 0
    assert found == pytest.approx(expected, rel=rel)


def test_losses_are_those_of_one_rank_however_a_batch_with_bad_samples_is_cut(
    results: Callable[..., Results],
) -> None:
    one, two = (results(*which)["invariance"] for which in (ONE, TWO))
    expected = one["accumulation 1"]
    for cut in (*one.values(), *two.values()):
        assert_same(cut, expected)
    assert len(one) + len(two) == 6
    # The poison is felt: it weighs nothing, rather than being replaced.
    assert two["accumulation 1"] != results(*TWO)["held_out"]["losses without"]


@pytest.mark.long
def test_four_ranks_are_one_rank_too(results: Callable[..., Results]) -> None:
    expected = results(*ONE)["invariance"]["accumulation 1"]
    four = results(4, "invariance", "stages")
    for cut in four["invariance"].values():
        assert_same(cut, expected)
    for losses in four["stages"].values():
        assert_same(losses, results(*TWO)["stages"]["stage 3"])


def test_losses_are_the_same_in_every_stage_offloaded_or_not(results: Callable[..., Results]) -> None:
    stages = results(*TWO)["stages"]
    assert len(stages) == 6
    for losses in stages.values():
        assert_same(losses, stages["stage 3"])


@pytest.mark.long
def test_compiled_blocks_compute_the_same(results: Callable[..., Results]) -> None:
    for losses in results(2, "compiled")["compiled"].values():
        assert_same(losses, results(*TWO)["stages"]["stage 3"], rel=1e-4)


def test_half_precision_learns_what_full_precision_learns(results: Callable[..., Results]) -> None:
    full = results(*TWO)["stages"]["stage 3"]
    for losses in results(*TWO)["half_precision"].values():
        assert_same(losses, full, rel=0.05)


def test_a_bad_gradient_of_one_rank_stops_the_run_and_names_it(results: Callable[..., Results]) -> None:
    stop = results(*TWO)["health"]["stop"]
    assert "after 16 images the gradient of rank 1 (slots 20 to 23) is not finite" in stop["error"]
    assert [row["images"] for row in stop["rows"]] == [8, 16]


@pytest.mark.parametrize("case", ["skip", "skip at stage 1"])
def test_a_bad_gradient_of_one_rank_is_skipped_where_asked(
    results: Callable[..., Results], case: str
) -> None:
    skip = results(*TWO)["health"][case]
    assert skip["error"] == ""
    assert [row["images"] for row in skip["rows"]] == list(range(8, 65, 8))
    assert [row["skipped_batches"] for row in skip["rows"]] == [0] * 2 + [1] * 6
    assert all(math.isfinite(row["loss"]) for row in skip["rows"])
    (warning,) = skip["said"]
    assert "the gradient of rank 1 (slots 20 to 23) is not finite; the batch is skipped" in warning
    # Up to the step it is the run without the fault; rates follow images, skipped ones too.
    calm = results(*TWO)["held_out"]["losses without"]
    assert_same([row["loss"] for row in skip["rows"]][:3], calm[:3])


def test_a_batch_that_stands_out_is_skipped_counted_and_forgotten(results: Callable[..., Results]) -> None:
    health = results(*TWO)["health"]
    spike = health["spike"]
    assert spike["error"] == ""
    assert [row["skipped_batches"] for row in spike["rows"]] == [0] * 5 + [1] * 3
    assert "after 40 images a batch's loss of" in spike["said"][0]
    calm = results(*TWO)["held_out"]["losses without"]
    assert_same([row["loss"] for row in spike["rows"]][:5], calm[:5])
    assert spike["rows"][5]["loss"] == pytest.approx(100 * calm[5], rel=1e-5)
    assert max(row["loss"] for row in spike["rows"][6:]) < 10


def test_too_many_of_them_stop_the_run_or_rewind_it(results: Callable[..., Results]) -> None:
    health = results(*TWO)["health"]
    assert "the 2. in a row" in health["spikes"]["error"]
    rewound = health["rewound"]
    assert rewound["error"] == ""
    assert "the weights are those of 24 images again" in rewound["said"][-1]
    assert [row["images"] for row in rewound["rows"]] == list(range(8, 65, 8))


def test_held_out_samples_are_judged_alike_on_any_number_of_ranks(results: Callable[..., Results]) -> None:
    one, two = (results(*which)["held_out"]["figures"] for which in (ONE, TWO))
    looked = [index for index, figures in enumerate(one) if figures]
    assert looked == [3, 7]
    for index in looked:
        assert one[index] == pytest.approx(two[index], rel=1e-5)
        names = {f"validation_{name}" for name in ("bound", "cross_entropy")}
        assert names <= one[index].keys()
        assert len(one[index]) == 2 + 2 * 8
        # The means over all times are those of the means at each.
        at_times = [one[index][f"validation_bound_t{number}"] for number in range(8)]
        assert one[index]["validation_bound"] == pytest.approx(sum(at_times) / 8)
    assert one[7]["validation_bound"] < one[3]["validation_bound"]


def test_a_look_at_held_out_samples_leaves_every_bit_of_the_run(results: Callable[..., Results]) -> None:
    """Weights and average swap places and come back, and no random number is used up."""
    for which in (ONE, TWO):
        held_out = results(*which)["held_out"]
        assert held_out["losses"] == held_out["losses without"]


def test_a_folder_of_deepspeeds_own_is_read_as_the_same_weights(results: Callable[..., Results]) -> None:
    native = results(*TWO)["native"]
    theirs = imported_weights(Path(native["native"]))
    ours = consolidated(Path(native["ours"]), "master")
    assert ours.keys() == {name for name in theirs if name in ours}
    assert all(torch.equal(theirs[name], tensor) for name, tensor in ours.items())
    with pytest.raises(UserError, match="holds no checkpoint of DeepSpeed's"):
        imported_weights(Path(native["ours"]))
