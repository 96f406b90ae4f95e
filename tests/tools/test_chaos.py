"""Tools that are killed at random moments: the same command then ends as an undisturbed one."""

import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest

from tests.tools.test_outputs import FOLDER_TOOLS, inputs
from tests.training.rank_processes import Ranks
from vqd_scale.core.atomic_io import sha256_of

__all__ = ["inputs"]

KILLED = (
    "tokenize_shards",
    "train",
    "consolidate",
    "export",
    "eval_coco_fid",
    "remap",
    "sample",
    "evaluate_tokenizer",
    "imagefolder",
    "reduce",
)
ROUNDS_OF_EACH = 2


def start(name: str, folder: Path, out: Path, output_folder: Path) -> Ranks:
    main, arguments, _ = FOLDER_TOOLS[name]
    modules = [module for module in sys.modules if module.startswith("vqd_scale.cli.")]
    module = next(module for module in modules if getattr(sys.modules[module], "main", None) is main)
    return Ranks(module, arguments(folder, str(out)), 1, output_folder)


def digests(out: Path) -> dict[str, str]:
    """Return the digests of weights, shards and images: other files contain times and paths."""
    kinds = (".safetensors", ".tar", ".npz", ".png")
    paths = [path for path in out.rglob("*") if path.suffix in kinds]
    return {str(path.relative_to(out)): sha256_of(path) for path in paths}


@pytest.mark.long
@pytest.mark.parametrize("name", KILLED)
def test_chaos_of_tools_ends_as_undisturbed(inputs: Path, tmp_path: Path, name: str) -> None:
    seconds = 0.0
    # The first start also starts the server from which the processes are forked.
    for calm in ("first", "second"):
        began = time.monotonic()
        undisturbed = start(name, inputs, tmp_path / calm, tmp_path / f"output-{calm}")
        assert undisturbed.wait() == 0, undisturbed.output()
        seconds = time.monotonic() - began
    expected = digests(tmp_path / "first")
    assert digests(tmp_path / "second") == expected
    assert expected
    chance = random.Random(name)
    for number in range(ROUNDS_OF_EACH):
        out = tmp_path / f"out-{number}"
        killed = start(name, inputs, out, tmp_path / f"output-{number}")
        # Imports take the first half.
        moment = seconds * chance.uniform(0.4, 0.9)
        deadline = time.monotonic() + moment
        while killed.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        if killed.poll() is None:
            os.kill(killed.pids[0], signal.SIGKILL)
        code = killed.wait()
        again = start(name, inputs, out, tmp_path / f"output-again-{number}")
        assert again.wait() == 0, again.output()
        print(f"\n{name}: killed after {moment:.1f} s with exit code {code}, then equal", end="", flush=True)
        assert digests(out) == expected
