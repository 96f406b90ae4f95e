import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.background_programs import free_ports
from tests.training.rank_threads import on_ranks
from vqd_scale.core.errors import UserError
from vqd_scale.core.signals import HUNG_EXIT_CODE
from vqd_scale.core.world import (
    World,
    _device,  # pyright: ignore[reportPrivateUsage]
    join_world,
    leave_world,
)
from vqd_scale.launchers.local import run_locally

SRUN = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "1", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "2"}


@pytest.fixture(autouse=True)
def no_launcher_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("SLURM_") or name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR"):
            monkeypatch.delenv(name)
    # Set first, so that the fixture also removes them after joining sets them.
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, "0")
        monkeypatch.delenv(name)


@pytest.mark.parametrize("step", [None, "batch", "4294967291", "4294967290"])
def test_batch_script_is_not_a_rank(step: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (SRUN | {"SLURM_STEP_ID": step, "SLURM_NTASKS": "2"}).items():
        if value is not None:
            monkeypatch.setenv(name, value)
    world = join_world()
    leave_world()
    assert (world.rank, world.size) == (0, 1)


def test_srun_without_rendezvous_raises_user_error(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SRUN.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=r"source slurm/env\.sh"):
        join_world()


LONE_RANK = """
from vqd_scale.core.watchdog import watched
from vqd_scale.core.world import join_world
with watched(5):
    join_world()
"""


def test_missing_rank_ends_the_rendezvous_with_a_sentence() -> None:
    (port,) = free_ports(1)
    rank = {
        "RANK": "1",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    completed = subprocess.run(
        [sys.executable, "-c", LONE_RANK], env=os.environ | rank, capture_output=True, text=True, check=False
    )
    assert completed.returncode == HUNG_EXIT_CODE, completed.stderr
    assert f"in this phase: rendezvous of 2 ranks at 127.0.0.1:{port}" in completed.stderr


SLOW_FIRST_RANK = """
import time
from vqd_scale.core import watchdog
from vqd_scale.core.watchdog import beat, watched
from vqd_scale.core.world import join_world

def generate_images(progresses):
    for _ in range(45):
        time.sleep(0.2)
        if progresses:
            beat()

watchdog._LONGEST_INTERVAL = 0.3
with watched(60):
    world = join_world()
    # From here on: the imports took longer.
    beat()
    watchdog._watchdogs[0]._seconds = 6
    world.on_first_rank(lambda: generate_images(True))
    print("no rank has left", flush=True)
    world.on_first_rank(lambda: generate_images(False))
"""


def test_ranks_wait_for_a_first_rank_that_progresses(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tool.py").write_text(SLOW_FIRST_RANK)
    code = run_locally(tmp_path / "tool.py", [], ranks=2)
    output = capfd.readouterr()
    assert code == HUNG_EXIT_CODE, output.err
    assert output.out.count("no rank has left") == 2
    assert "generate_images" in output.err


@pytest.mark.parametrize(("visible", "index"), [(1, 0), (2, 1), (8, 1)])
def test_rank_takes_its_only_visible_gpu(visible: int, index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    selected: list[int] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    monkeypatch.setattr(torch.cuda, "set_device", selected.append)
    assert _device(local_rank=1) == torch.device("cuda", index)
    assert selected == [index]


def test_rank_without_gpu_raises_user_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match="only 2 are visible; start one rank per GPU"):
        _device(local_rank=2)


def test_first_rank_error_reaches_every_rank() -> None:
    def leave(world: World, failing: bool) -> str:
        completed_ranks: list[int] = []

        def act() -> None:
            completed_ranks.append(world.rank)
            if failing:
                raise UserError("The disk is full.")

        try:
            world.on_first_rank(act)
        except UserError as error:
            return f"{type(error).__name__}: {error}"
        return str(completed_ranks)

    assert on_ranks(3, lambda world: leave(world, False)) == ["[0]", "[]", "[]"]
    first_rank_error = "FirstRankError: The disk is full."
    assert on_ranks(3, lambda world: leave(world, True)) == [
        "UserError: The disk is full.",
        first_rank_error,
        first_rank_error,
    ]
