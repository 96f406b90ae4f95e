"""The trainer as its users start it: whole processes, one rank and two."""

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

from tests.training.forked import TRAIN, Ranks
from vqd_scale.core.config import load_config
from vqd_scale.core.signals import REQUEUE_EXIT_CODE
from vqd_scale.core.world import World
from vqd_scale.data.loading.batch import TokenBatch
from vqd_scale.data.loading.stream import Stream
from vqd_scale.text.clip import CaptionTokenizer
from vqd_scale.training.checkpoint.manager import consolidated
from vqd_scale.training.logging.metrics import read_metrics
from vqd_scale.training.optim import LearningRate, build_optimizer
from vqd_scale.training.tasks.denoising import DenoisingTask, TrainConfig

pytestmark = pytest.mark.ranks
RunTool = Callable[..., "subprocess.CompletedProcess[str]"]


class Alone(World):
    """One process that talks to nobody."""

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(run / "metrics.jsonl")]


def digest(run: Path) -> str:
    return hashlib.sha256((run / "export" / "model.safetensors").read_bytes()).hexdigest()


def assert_weights_agree(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.numel() > 0
        # A key's bias moves all scores of a query alike: its gradient is zero but for rounding, which AdamW
        # then scales up to whole steps.
        if not name.endswith(("key.bias", "in_proj_bias")):
            torch.testing.assert_close(tensor, theirs[name], rtol=1e-3, atol=1e-5, msg=name)


def newest(run: Path) -> Path:
    return max(path for path in (run / "checkpoints").iterdir() if path.name.isdigit())


@pytest.fixture(scope="module")
def undisturbed(
    token_world: Path, tmp_path_factory: pytest.TempPathFactory, launch_tool: RunTool
) -> dict[int, Path]:
    """The same run on one rank and on two, never stopped."""
    runs = {ranks: tmp_path_factory.mktemp("runs") / f"ranks-{ranks}" for ranks in (1, 2)}
    for ranks, run in runs.items():
        done = launch_tool("train.py", str(token_world / "train.yaml"), f"run={run}", ranks=ranks)
        assert done.returncode == 0, done.stderr
    return runs


def test_one_rank_and_two_ranks_have_the_same_losses(undisturbed: dict[int, Path]) -> None:
    one, two = losses(undisturbed[1]), losses(undisturbed[2])
    assert len(one) == 20
    assert two == pytest.approx(one, rel=1e-5)
    first, second = (load_file(undisturbed[ranks] / "export" / "model.safetensors") for ranks in (1, 2))
    assert_weights_agree(first, second)


def test_zero_3_equals_plain_adamw_average_included(
    token_world: Path, undisturbed: dict[int, Path], tmp_path: Path
) -> None:
    """The engine's slow twin: one process, one optimizer, no sharding, whole tensors."""
    config = load_config(TrainConfig, token_world / "train.yaml", [f"run={tmp_path}"])

    task = DenoisingTask(config, Alone(0, 1, torch.device("cpu")))
    optimizer = build_optimizer(task.module, config.optim)
    for group in optimizer.param_groups:
        # Where the engine's goes through memory once, this one is the formula, operation by operation.
        group["fused"] = False
    rate = LearningRate(config.optim, batch=8, horizon=config.total_images)
    average = {name: tensor.detach().clone() for name, tensor in task.module.named_parameters()}
    stream = Stream(
        config.data, task.samples(), seed=0, rank=0, ranks=1, cursor=0, quarantine=tmp_path / "q.jsonl"
    )
    expected: list[float] = []
    with closing(iter(stream)) as batches:
        for images in range(0, config.total_images, 8):
            loss = task.losses(task.module, next(batches), images).per_sample.mean()
            expected.append(loss.item())
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(task.module.parameters(), config.optim.gradient_clipping)
            for group in optimizer.param_groups:
                group["lr"] = rate.at(images)
            optimizer.step()
            task.on_step_end(images + 8)
            half_life = min(config.ema.half_life_images, config.ema.warmup_ratio * (images + 8))
            for name, parameter in task.module.named_parameters():
                average[name].lerp_(parameter.detach(), 1 - 0.5 ** (8 / half_life))
    assert losses(undisturbed[2]) == pytest.approx(expected, rel=1e-5)
    exported = load_file(undisturbed[2] / "export" / "model.safetensors")
    assert_weights_agree(exported, {name.removeprefix("model."): tensor for name, tensor in average.items()})
    weights = {name: tensor.detach() for name, tensor in task.module.named_parameters()}
    assert_weights_agree(consolidated(newest(undisturbed[2]), "master"), weights)


def files_of(checkpoint: Path) -> list[dict[str, object]]:
    """Names, sizes and SHA-256 of all that a checkpoint holds: weights, moments, average, state."""
    return json.loads((checkpoint / "manifest.json").read_text())["files"]


def is_writing(run: Path) -> bool:
    return any((run / "checkpoints").glob("*.partial"))


def disturb(arguments: list[str], run: Path, said: Path, chance: random.Random) -> str:
    """Start on two ranks and end them, or one of them, at a random moment; returns what was done."""
    began = len(read_metrics(run / "metrics.jsonl"))
    how = chance.choice(["kill one", "kill all", "terminate all"])
    rows, while_writing = chance.randrange(1, 12), chance.random() < 0.5
    delay = chance.random() * 0.02
    started = Ranks(TRAIN, arguments, 2, said)
    deadline = time.monotonic() + 180
    while started.poll() is None and time.monotonic() < deadline:
        has_moved = len(read_metrics(run / "metrics.jsonl")) >= began + rows
        if has_moved and (not while_writing or is_writing(run)):
            break
        time.sleep(0.001 if while_writing else 0.01)
    time.sleep(delay)
    ended = [chance.choice(started.pids)] if how == "kill one" else started.pids
    if started.poll() is None:
        for pid in ended:
            os.kill(pid, signal.SIGTERM if how == "terminate all" else signal.SIGKILL)
    code = started.wait()
    now = read_metrics(run / "metrics.jsonl")[-1:]
    when = f"{rows} rows{' and while writing' if while_writing else ''}"
    return f"{how} after {when}: exit code {code}, {now[0]['images'] if now else 0} images"


@pytest.mark.parametrize(("kills", "images"), [(3, 240), pytest.param(20, 1360, marks=pytest.mark.long)])
def test_chaos_ends_as_the_undisturbed_run_does(
    kills: int,
    images: int,
    token_world: Path,
    tmp_path: Path,
    run_tool: RunTool,
) -> None:
    """`make chaos` is the long form: ended at whatever moments, a run ends as if nobody had touched it."""
    calm, run = tmp_path / "calm", tmp_path / "run"
    common = [str(token_world / "train.yaml"), f"total_images={images}", "checkpoint.every_images=24"]
    done = run_tool("train.py", *common, f"run={calm}", ranks=2)
    assert done.returncode == 0, done.stderr
    # Under this seed the first three are one of each kind, two of them during a write.
    chance = random.Random(6)
    for kill in range(kills):
        done = disturb([*common, f"run={run}"], run, tmp_path / f"said-{kill}", chance)
        print(f"\n{kill + 1}/{kills} {done}", end="", flush=True)
        assert not (run / "export").exists(), "it ended before it was disturbed often enough"
    done = run_tool("train.py", *common, f"run={run}", ranks=2)
    assert done.returncode == 0, done.stderr
    assert losses(run) == losses(calm)
    assert digest(run) == digest(calm)
    assert files_of(newest(run)) == files_of(newest(calm))
    assert not is_writing(run)


def test_damaged_newest_checkpoint_is_passed_over_and_another_world_size_goes_on(
    token_world: Path, undisturbed: dict[int, Path], tmp_path: Path, run_tool: RunTool
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
    # The schedule follows the configured end, which the first start gave differently.
    second = run_tool("train.py", str(config), f"run={run}", "total_images=88", ranks=1)
    assert second.returncode == 0, second.stderr
    assert "damaged" in second.stderr
    assert "going on from the checkpoint at 80 images" in second.stderr
    whole = tmp_path / "whole"
    third = run_tool("train.py", str(config), f"run={whole}", "total_images=88", ranks=1)
    assert third.returncode == 0, third.stderr
    assert losses(run) == pytest.approx(losses(whole), rel=1e-5)


def test_sigterm_saves_and_asks_to_be_started_again(
    token_world: Path,
    undisturbed: dict[int, Path],
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
    assert losses(run) == losses(undisturbed[1])


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["optim.lrr=1"], "optim.lrr: unknown key"),
        (["optim.lr=fast"], "optim.lr: given 'fast'"),
        (["data.path=/nowhere"], "/nowhere"),
        (["tokenizer=/nowhere"], "no tokenizer bundle"),
        (["text.bpe_merges=301"], "captions were tokenized otherwise"),
        (["denoiser.condition.width=8"], "denoiser.condition"),
        (
            ["engine.gradient_accumulation_steps=3"],
            "data.global_batch_size: a global batch of 8 cannot be cut",
        ),
    ],
)
def test_wrong_use_is_one_sentence_and_nothing_is_left(
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
    said = capsys.readouterr().err
    assert stopped.value.code == 2
    assert sentence in said
    assert "Traceback" not in said
    assert not run.exists()


def test_a_full_disk_is_one_sentence_and_leaves_nothing_half_written(
    token_world: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    # No file may grow over 16 KiB: the configuration fits, the first checkpoint does not.
    limited = f"ulimit -f 16; exec {sys.executable} tools/train.py {token_world / 'train.yaml'} run={run}"
    done = subprocess.run(
        ["bash", "-c", limited], cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2, done.stderr
    assert "cannot be written" in done.stderr
    assert "Traceback" not in done.stderr
    assert list((run / "checkpoints").iterdir()) == []


def test_one_batch_can_be_learned_by_heart(token_world: Path, tmp_path: Path) -> None:
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
    task = DenoisingTask(config, Alone(0, 1, torch.device("cpu")))
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


def test_trap_35_times_and_noise_are_those_of_the_slots_whatever_rank_has_them(
    token_world: Path, tmp_path: Path
) -> None:
    config = load_config(TrainConfig, token_world / "train.yaml", [f"run={tmp_path}"])
    drawn: list[tuple[torch.Tensor, torch.Tensor]] = []

    def forward(tokens: torch.Tensor, noisy: torch.Tensor, t: torch.Tensor, *rest: torch.Tensor) -> object:
        drawn.append((t, noisy))
        return torch.zeros(len(t)), torch.zeros(len(t)), torch.zeros(len(t)), torch.zeros(4)

    task = DenoisingTask(config, Alone(0, 1, torch.device("cpu")))
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
    whole, first, second = drawn
    for of_whole, of_first, of_second in zip(whole, first, second, strict=True):
        assert torch.equal(of_whole, torch.cat([of_first, of_second]))
        assert not torch.equal(of_first, of_second)
