"""The trainer from the command line, in one and two processes."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.training.checkpoint.damages import flip_a_byte
from tests.training.plain_training import SingleRankWorld, train_plainly
from tests.training.rank_processes import TRAIN, Ranks
from vqd_scale.core.config import load_config
from vqd_scale.core.signals import REQUEUE_EXIT_CODE
from vqd_scale.data.loading.batch import TokenBatch
from vqd_scale.data.loading.stream import Stream
from vqd_scale.text.clip import CaptionTokenizer
from vqd_scale.training.checkpoint.manager import consolidated
from vqd_scale.training.logging.metrics import read_metrics
from vqd_scale.training.tasks.config import TrainConfig
from vqd_scale.training.tasks.denoising import DenoisingTask

pytestmark = pytest.mark.ranks
RunTool = Callable[..., "subprocess.CompletedProcess[str]"]


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(run / "metrics.jsonl")]


def digest(run: Path) -> str:
    return hashlib.sha256((run / "export" / "model.safetensors").read_bytes()).hexdigest()


def assert_weights_agree(weights: dict[str, torch.Tensor], expected_weights: dict[str, torch.Tensor]) -> None:
    assert weights.keys() == expected_weights.keys()
    for name, tensor in weights.items():
        assert tensor.numel() > 0
        # A key's bias shifts all scores of a query equally: its gradient is rounding error, which AdamW
        # then scales up to full steps.
        if not name.endswith(("key.bias", "in_proj_bias")):
            torch.testing.assert_close(tensor, expected_weights[name], rtol=1e-3, atol=1e-5, msg=name)


def newest(run: Path) -> Path:
    return max(path for path in (run / "checkpoints").iterdir() if path.name.isdigit())


@pytest.fixture(scope="module")
def uninterrupted_runs(
    token_world: Path, tmp_path_factory: pytest.TempPathFactory, launch_tool: RunTool
) -> dict[int, Path]:
    """Run folders of the same run on one rank and on two, uninterrupted."""
    runs = {ranks: tmp_path_factory.mktemp("runs") / f"ranks-{ranks}" for ranks in (1, 2)}
    for ranks, run in runs.items():
        completed = launch_tool("train.py", str(token_world / "train.yaml"), f"run={run}", ranks=ranks)
        assert completed.returncode == 0, completed.stderr
    return runs


def test_one_rank_and_two_ranks_have_equal_losses(uninterrupted_runs: dict[int, Path]) -> None:
    one, two = losses(uninterrupted_runs[1]), losses(uninterrupted_runs[2])
    assert len(one) == 20
    assert two == pytest.approx(one, rel=1e-5)
    first, second = (
        load_file(uninterrupted_runs[ranks] / "export" / "model.safetensors") for ranks in (1, 2)
    )
    assert_weights_agree(first, second)


def test_zero_3_equals_plain_adamw_with_ema(
    token_world: Path, uninterrupted_runs: dict[int, Path], tmp_path: Path
) -> None:
    """Train by plain PyTorch: one process, one optimizer, no sharding."""
    plain = train_plainly(load_config(TrainConfig, token_world / "train.yaml", [f"run={tmp_path}"]))
    assert losses(uninterrupted_runs[2]) == pytest.approx(plain.losses, rel=1e-5)
    exported = load_file(uninterrupted_runs[2] / "export" / "model.safetensors")
    average = {name.removeprefix("model."): tensor for name, tensor in plain.average.items()}
    assert_weights_agree(exported, average)
    assert_weights_agree(consolidated(newest(uninterrupted_runs[2]), "master"), plain.weights)


def files_of(checkpoint: Path) -> list[dict[str, object]]:
    """Return names, sizes and SHA-256 of a checkpoint's files: weights, moments, EMA, state."""
    return json.loads((checkpoint / "manifest.json").read_text())["files"]


def is_writing(run: Path) -> bool:
    return any((run / "checkpoints").glob("*.partial"))


def interrupt_randomly(arguments: list[str], run: Path, output_folder: Path, chance: random.Random) -> str:
    """Start two ranks, end one or both at a random moment, and return a description."""
    began = len(read_metrics(run / "metrics.jsonl"))
    disturbance = chance.choice(["kill one", "kill all", "terminate all"])
    rows, while_writing = chance.randrange(1, 12), chance.random() < 0.5
    delay = chance.random() * 0.02
    started = Ranks(TRAIN, arguments, 2, output_folder)
    deadline = time.monotonic() + 180
    while started.poll() is None and time.monotonic() < deadline:
        has_moved = len(read_metrics(run / "metrics.jsonl")) >= began + rows
        if has_moved and (not while_writing or is_writing(run)):
            break
        time.sleep(0.001 if while_writing else 0.01)
    time.sleep(delay)
    ended = [chance.choice(started.pids)] if disturbance == "kill one" else started.pids
    if started.poll() is None:
        for pid in ended:
            os.kill(pid, signal.SIGTERM if disturbance == "terminate all" else signal.SIGKILL)
    code = started.wait()
    now = read_metrics(run / "metrics.jsonl")[-1:]
    kill_moment = f"{rows} rows{' and while writing' if while_writing else ''}"
    return f"{disturbance} after {kill_moment}: exit code {code}, {now[0]['images'] if now else 0} images"


def flip_a_byte_randomly(run: Path, chance: random.Random) -> str:
    """Damage a file of the newest of several checkpoints, in half of the cases, and return a description."""
    checkpoints = [path for path in (run / "checkpoints").glob("*") if path.name.isdigit()]
    if len(checkpoints) < 2 or chance.random() < 0.5:
        return "no damage"
    path = chance.choice(sorted(max(checkpoints).iterdir()))
    flip_a_byte(path)
    return f"a flipped byte in {path.parent.name}/{path.name}"


@pytest.mark.parametrize(("kills", "images"), [(3, 240), pytest.param(20, 1360, marks=pytest.mark.long)])
def test_chaos_ends_as_the_uninterrupted_run(
    kills: int,
    images: int,
    token_world: Path,
    tmp_path: Path,
    run_tool: RunTool,
) -> None:
    """A run that is ended at random moments gives the uninterrupted result; `make chaos` is the long form."""
    calm, run = tmp_path / "calm", tmp_path / "run"
    common = [str(token_world / "train.yaml"), f"total_images={images}", "checkpoint.every_images=24"]
    completed = run_tool("train.py", *common, f"run={calm}", ranks=2)
    assert completed.returncode == 0, completed.stderr
    # With this seed the first three are one of each kind, two of them during a write.
    chance, damage_chance = random.Random(6), random.Random(1)
    for kill in range(kills):
        print(f"\n{flip_a_byte_randomly(run, damage_chance)}", end="")
        completed = interrupt_randomly([*common, f"run={run}"], run, tmp_path / f"said-{kill}", chance)
        print(f"\n{kill + 1}/{kills} {completed}", end="", flush=True)
        assert not (run / "export").exists(), "it ended before it was disturbed often enough"
    completed = run_tool("train.py", *common, f"run={run}", ranks=2)
    assert completed.returncode == 0, completed.stderr
    assert losses(run) == losses(calm)
    assert digest(run) == digest(calm)
    assert files_of(newest(run)) == files_of(newest(calm))
    assert not is_writing(run)


def test_damaged_checkpoint_is_skipped_and_other_world_size_resumes(
    token_world: Path, uninterrupted_runs: dict[int, Path], tmp_path: Path, run_tool: RunTool
) -> None:
    run, config = tmp_path / "run", token_world / "train.yaml"
    first = run_tool(
        "train.py", str(config), f"run={run}", "total_images=88", "checkpoint.every_images=40", ranks=2
    )
    assert first.returncode == 0, first.stderr
    damaged = next(newest(run).glob("slices-00001*"))
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    # The schedule follows the configured end, which differed in the first start.
    second = run_tool("train.py", str(config), f"run={run}", "total_images=88", ranks=1)
    assert second.returncode == 0, second.stderr
    assert "damaged" in second.stderr
    assert "resumed from the checkpoint at 80 images" in second.stderr
    uninterrupted_run = tmp_path / "whole"
    third = run_tool("train.py", str(config), f"run={uninterrupted_run}", "total_images=88", ranks=1)
    assert third.returncode == 0, third.stderr
    assert losses(run) == pytest.approx(losses(uninterrupted_run), rel=1e-5)


def test_sigterm_saves_and_exits_with_requeue_code(
    token_world: Path,
    uninterrupted_runs: dict[int, Path],
    tmp_path: Path,
    run_tool: RunTool,
    start_tool: Callable[..., "subprocess.Popen[bytes]"],
) -> None:
    run, config = tmp_path / "run", token_world / "train.yaml"
    process = start_tool("train.py", str(config), f"run={run}")
    while not read_metrics(run / "metrics.jsonl") and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == REQUEUE_EXIT_CODE
    assert int(newest(run).name) > 0
    resumed = run_tool("train.py", str(config), f"run={run}")
    assert resumed.returncode == 0, resumed.stderr
    assert losses(run) == losses(uninterrupted_runs[1])


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["optim.lrr=1"], "optim.lrr: unknown key"),
        (["optim.lr=fast"], "optim.lr: given 'fast'"),
        (["data.path=/nowhere"], "/nowhere"),
        (["tokenizer=/nowhere"], "no tokenizer bundle"),
        (["text.bpe_merges=301"], "captions were not tokenized with"),
        (["denoiser.condition.width=8"], "denoiser.condition"),
        (
            ["engine.gradient_accumulation_steps=3"],
            "data.global_batch_size: a global batch of 8 cannot be cut",
        ),
    ],
)
def test_user_errors_leave_no_files(
    token_world: Path,
    tmp_path: Path,
    overrides: list[str],
    sentence: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from vqd_scale.cli.train import main

    monkeypatch.chdir(Path(__file__).parents[2])
    run = tmp_path / "run"
    with pytest.raises(SystemExit) as stopped:
        main([str(token_world / "train.yaml"), f"run={run}", *overrides])
    error_output = capsys.readouterr().err
    assert stopped.value.code == 2
    assert sentence in error_output
    assert "Traceback" not in error_output
    assert not run.exists()


def test_full_disk_raises_user_error_and_leaves_no_partial_files(token_world: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    # Files are limited to 16 KiB: the configuration fits, the first checkpoint does not.
    limited = f"ulimit -f 16; exec {sys.executable} tools/train.py {token_world / 'train.yaml'} run={run}"
    completed = subprocess.run(
        ["bash", "-c", limited], cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False
    )
    assert completed.returncode == 2, completed.stderr
    assert "cannot be written" in completed.stderr
    assert "Traceback" not in completed.stderr
    assert list((run / "checkpoints").iterdir()) == []


def test_one_batch_can_be_overfitted(token_world: Path, tmp_path: Path) -> None:
    overrides = [
        f"run={tmp_path}",
        "condition_dropout=0",
        "timestep_sampler.kind=uniform",
        "denoiser.width=32",
    ]
    path = tmp_path / "train.yaml"
    values = yaml.safe_load((token_world / "train.yaml").read_text())
    values["timestep_sampler"] = {"kind": "uniform"}
    path.write_text(yaml.safe_dump(values))
    config = load_config(TrainConfig, path, overrides)
    task = DenoisingTask(config, SingleRankWorld(0, 1, torch.device("cpu")))
    captions = [f"a {word} picture" for word in ("red", "green", "blue", "white")]
    tokens = torch.randint(0, 12, (4, 9), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(task.module.parameters(), lr=5e-3)
    accuracy = 0.0
    for step in range(150):
        batch = TokenBatch(
            tokens=tokens,
            text=torch.from_numpy(CaptionTokenizer(8, 300)(captions)),
            slots=torch.arange(4 * step, 4 * step + 4),
            valid=torch.ones(4, dtype=torch.bool),
            keys=captions,
        )
        losses = task.losses(task.module, batch, 4 * step)
        optimizer.zero_grad()
        losses.per_sample.mean().backward()
        optimizer.step()
        correct, count = losses.statistics["accuracy_masked"].tolist()
        accuracy = 0.9 * accuracy + 0.1 * correct / max(count, 1)
    assert accuracy > 0.9


def test_times_and_noise_belong_to_slots_on_any_rank(token_world: Path, tmp_path: Path) -> None:
    config = load_config(TrainConfig, token_world / "train.yaml", [f"run={tmp_path}"])
    forward_inputs: list[tuple[torch.Tensor, torch.Tensor]] = []

    def forward(
        tokens: torch.Tensor, noisy: torch.Tensor, t: torch.Tensor, *text_inputs: torch.Tensor
    ) -> object:
        forward_inputs.append((t, noisy))
        return torch.zeros(len(t)), torch.zeros(len(t)), torch.zeros(len(t)), torch.zeros(4)

    task = DenoisingTask(config, SingleRankWorld(0, 1, torch.device("cpu")))
    for ranks in (1, 2):
        for rank in range(ranks):
            stream = Stream(
                config.data,
                task.samples(),
                seed=0,
                rank=rank,
                ranks=ranks,
                cursor=16,
                quarantine=tmp_path / "q.jsonl",
            )
            with closing(iter(stream)) as batches:
                task.losses(forward, next(batches), 16)
    full_batch, first, second = forward_inputs
    for of_whole, of_first, of_second in zip(full_batch, first, second, strict=True):
        assert torch.equal(of_whole, torch.cat([of_first, of_second]))
        assert not torch.equal(of_first, of_second)
