"""Short runs on real ranks: see `tests/training/scenarios.py`."""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training import rank_processes
from tests.training.scenarios import DAMAGED_CHECKPOINTS
from vqd_scale.core.errors import UserError
from vqd_scale.training.checkpoint.manager import consolidated
from vqd_scale.training.engine import imported_weights

pytestmark = pytest.mark.ranks
Results = dict[str, Any]


@pytest.fixture(scope="module")
def results(token_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Results]:
    """Return the results of the named scenarios, or of all, per number of ranks; each is run once."""
    cached_results: dict[tuple[int, tuple[str, ...]], Results] = {}

    def get(ranks: int, *names: str) -> Results:
        if (ranks, names) not in cached_results:
            out = tmp_path_factory.mktemp(f"ranks-{ranks}")
            completed = rank_processes.run(
                "tests.training.scenarios", str(token_world), str(out), *names, ranks=ranks, output_folder=out
            )
            assert completed.returncode == 0, completed.stderr[-4000:]
            cached_results[ranks, names] = json.loads((out / "results.json").read_text())
        return cached_results[ranks, names]

    return get


ONE = (1, "invariance", "held_out", "lion")
TWO = (2,)


def assert_same(losses: list[float], expected: list[float], rel: float = 1e-5) -> None:
    assert len(losses) == len(expected) > 0
    assert losses == pytest.approx(expected, rel=rel)


def test_losses_do_not_depend_on_ranks_or_accumulation(
    results: Callable[..., Results],
) -> None:
    one, two = (results(*selection)["invariance"] for selection in (ONE, TWO))
    expected = one["accumulation 1"]
    for cut in (*one.values(), *two.values()):
        assert_same(cut, expected)
    assert len(one) + len(two) == 6
    # Bad samples have weight 0 and are not replaced.
    assert two["accumulation 1"] != results(*TWO)["held_out"]["losses without"]


@pytest.mark.long
def test_four_ranks_have_the_losses_of_one(results: Callable[..., Results]) -> None:
    expected = results(*ONE)["invariance"]["accumulation 1"]
    four = results(4, "invariance", "stages")
    for cut in four["invariance"].values():
        assert_same(cut, expected)
    for losses in four["stages"].values():
        assert_same(losses, results(*TWO)["stages"]["stage 3"])


def test_losses_are_equal_in_every_stage_and_offloaded(results: Callable[..., Results]) -> None:
    stages = results(*TWO)["stages"]
    assert len(stages) == 6
    for losses in stages.values():
        assert_same(losses, stages["stage 3"])


@pytest.mark.parametrize("selection", [ONE, TWO])
def test_lion_equals_plain_training_in_every_stage(results: Callable[..., Results], selection: Any) -> None:
    """On any number of ranks, and resumed in the same or another stage."""
    runs = results(*selection)["lion"]
    assert len(runs) == 6
    for losses in runs.values():
        assert_same(losses, runs["plain"])
    # In the same stage a resumed run is the uninterrupted one, bit for bit.
    assert runs["resumed in stage 3"] == runs["stage 3"]


@pytest.mark.long
def test_compiled_blocks_compute_equal_losses(results: Callable[..., Results]) -> None:
    for losses in results(2, "compiled")["compiled"].values():
        assert_same(losses, results(*TWO)["stages"]["stage 3"], rel=1e-4)


def test_half_precision_learns_what_full_precision_learns(results: Callable[..., Results]) -> None:
    full = results(*TWO)["stages"]["stage 3"]
    for losses in results(*TWO)["half_precision"].values():
        assert_same(losses, full, rel=0.05)


def test_nonfinite_gradient_stops_the_run_and_names_the_rank(results: Callable[..., Results]) -> None:
    stop = results(*TWO)["health"]["stop"]
    assert "after 16 images the gradient of rank 1 (slots 20 to 23) is not finite" in stop["error"]
    assert [row["images"] for row in stop["rows"]] == [8, 16]


@pytest.mark.parametrize("case", ["skip", "skip at stage 1"])
def test_nonfinite_gradient_is_skipped_when_allowed(results: Callable[..., Results], case: str) -> None:
    skip = results(*TWO)["health"][case]
    assert skip["error"] == ""
    assert [row["images"] for row in skip["rows"]] == list(range(8, 65, 8))
    assert [row["skipped_batches"] for row in skip["rows"]] == [0] * 2 + [1] * 6
    assert all(math.isfinite(row["loss"]) for row in skip["rows"])
    (warning,) = skip["warnings"]
    assert "the gradient of rank 1 (slots 20 to 23) is not finite; the batch is skipped" in warning
    # Equal to the run without the fault up to the step; rates count skipped images too.
    calm = results(*TWO)["held_out"]["losses without"]
    assert_same([row["loss"] for row in skip["rows"]][:3], calm[:3])


def test_spike_is_skipped_counted_and_excluded(results: Callable[..., Results]) -> None:
    health = results(*TWO)["health"]
    spike = health["spike"]
    assert spike["error"] == ""
    assert [row["skipped_batches"] for row in spike["rows"]] == [0] * 5 + [1] * 3
    assert "after 40 images a batch's loss of" in spike["warnings"][0]
    calm = results(*TWO)["held_out"]["losses without"]
    assert_same([row["loss"] for row in spike["rows"]][:5], calm[:5])
    assert spike["rows"][5]["loss"] == pytest.approx(100 * calm[5], rel=1e-5)
    assert max(row["loss"] for row in spike["rows"][6:]) < 10


def test_too_many_spikes_stop_or_rewind_the_run(results: Callable[..., Results]) -> None:
    health = results(*TWO)["health"]
    assert "number 2 in a row" in health["spikes"]["error"]
    rewound = health["rewound"]
    assert rewound["error"] == ""
    assert "the run is rewound to the weights at 24 images" in rewound["warnings"][-1]
    assert [row["images"] for row in rewound["rows"]] == list(range(8, 65, 8))


@pytest.mark.parametrize(
    ("case", "overrides"),
    [
        ("loss", {"optim.lr=0.0005": False, "health.skip_batches=[40]": True}),
        ("second loss", {"optim.lr=0.0005": False, "health.skip_batches=[8,40]": True}),
        (
            "gradient",
            {
                "optim.lr=0.0005": False,
                "health.nonfinite_gradient=skip": True,
                "health.skip_batches=[40]": True,
            },
        ),
        (
            "gradients",
            {
                "optim.lr=0.0005": False,
                "health.max_consecutive_nonfinite=1": True,
                "health.skip_batches=[40]": True,
            },
        ),
        (
            "spikes",
            {"optim.lr=0.0005": False, "health.spike.rewind=true": True, "health.skip_batches=[48]": True},
        ),
        ("another run", {"seed=0": True, "run": True}),
    ],
)
def test_advice_to_resume_can_be_followed(
    results: Callable[..., Results], case: str, overrides: dict[str, bool]
) -> None:
    """Each override in the message is accepted; with all but the learning rate, these runs end."""
    stopped = results(1, "advice")["advice"][case]
    error = stopped.pop("error")

    def sentence(message: str) -> str:
        # The value of a spike depends on the steps repeated at the lower rate: a run that stops abandons the
        # save in progress, so the one before may be resumed.
        return re.sub(r"loss of [\d.]+", "loss of some value", message.partition(": ")[2])

    with_lower_rate = sentence(error).replace("optim.lr=0.0005", "optim.lr=0.00025")
    assert len(stopped) == len(overrides), error
    for (override, result), (expected, ends) in zip(stopped.items(), overrides.items(), strict=True):
        assert override.startswith(expected), error
        assert sentence(result["error"]) == ("" if ends else with_lower_rate), override
        if override.startswith("health.skip_batches"):
            assert [row["images"] for row in result["rows"]] == list(range(8, 65, 8))
            assert result["rows"][5]["skipped_batches"] >= 1
            assert "loss" not in result["rows"][5] or case == "spikes"


def test_validation_is_equal_on_any_number_of_ranks(results: Callable[..., Results]) -> None:
    one, two = (results(*selection)["held_out"]["figures"] for selection in (ONE, TWO))
    looked = [index for index, figures in enumerate(one) if figures]
    assert looked == [3, 7]
    for index in looked:
        assert one[index] == pytest.approx(two[index], rel=1e-5)
        names = {f"validation_{name}" for name in ("bound", "cross_entropy")}
        assert names <= one[index].keys()
        assert len(one[index]) == 2 + 2 * 8
        # The mean over all timesteps equals the mean of the means at each.
        at_times = [one[index][f"validation_bound_t{number}"] for number in range(8)]
        assert one[index]["validation_bound"] == pytest.approx(sum(at_times) / 8)
    assert one[7]["validation_bound"] < one[3]["validation_bound"]


def test_validation_does_not_change_the_run(results: Callable[..., Results]) -> None:
    """Weights and EMA are swapped and restored, and no random number is consumed."""
    for selection in (ONE, TWO):
        held_out = results(*selection)["held_out"]
        assert held_out["losses"] == held_out["losses without"]


def test_deepspeed_checkpoint_has_equal_weights(results: Callable[..., Results]) -> None:
    native = results(*TWO)["native"]
    imported_state = imported_weights(Path(native["native"]))
    package_state = consolidated(Path(native["ours"]), "master")
    assert package_state.keys() == {name for name in imported_state if name in package_state}
    assert all(torch.equal(imported_state[name], tensor) for name, tensor in package_state.items())
    with pytest.raises(UserError, match="holds no checkpoint of DeepSpeed's"):
        imported_weights(Path(native["ours"]))


DAMAGE = [
    (TWO, "damage"),
    pytest.param((2, "damage_matrix"), "damage_matrix", marks=pytest.mark.long),
]


@pytest.mark.parametrize(("selection", "scenario"), DAMAGE)
def test_damaged_checkpoint_is_set_aside_and_redone(
    results: Callable[..., Results], selection: Any, scenario: str
) -> None:
    """In every kind of file, with the model of the undisturbed run in the end."""
    cases = results(*selection)[scenario]
    undisturbed = cases.pop("undisturbed")
    for case, result in cases.items():
        place, file, _ = case.split(": ")
        assert result["error"] == "", case
        assert result["digest"] == undisturbed["digest"], case
        # A damaged checkpoint that is older than the newest valid one is not read.
        damaged = [] if place == "last but one" else DAMAGED_CHECKPOINTS[place]
        assert len(result["warnings"]) == len(damaged), case
        for count, warning in zip(damaged, result["warnings"], strict=True):
            assert f"{count:012d}: not used, {file} is " in warning, case
            assert f"{count:012d}.damaged" in result["checkpoints"], case
        for count in {16, 32, 48} - (set() if damaged else {32}):
            name = f"{count:012d}"
            assert result["checkpoints"][name] == undisturbed["checkpoints"][name], case
