"""The same entry point under DeepSpeed's own launcher, with a hostfile."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.slurm.conftest import ROOT, losses
from tests.slurm.recipe import write_recipe

pytestmark = [pytest.mark.slurm, pytest.mark.long]


@pytest.mark.parametrize("options", [[], ["--no_local_rank"]])
def test_deepspeed_launcher_starts_the_same_run(
    options: list[str], shapes_folder: Path, torchrun_runs: Path, tmp_path: Path
) -> None:
    write_recipe(tmp_path, shapes_folder, tmp_path / "runs")
    (tmp_path / "hostfile").write_text("localhost slots=2\n")
    launcher = Path(sys.executable).with_name("deepspeed")
    completed = subprocess.run(
        [
            *(sys.executable, str(launcher), "--hostfile", str(tmp_path / "hostfile"), "--no_ssh_check"),
            *(
                "--master_addr",
                "127.0.0.1",
                "--master_port",
                "29431",
                *options,
                "tools/train.py",
                str(tmp_path / "pretrain.yaml"),
            ),
        ],
        cwd=ROOT,
        env=os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert completed.returncode == 0, completed.stderr
    assert losses(tmp_path / "runs" / "pretrain") == losses(torchrun_runs / "pretrain")
