"""``launch``: submission of a tool as a job through Submitit, on a cluster or on this machine."""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer

from vqd_scale.cli.base import RunConfigOptions, Tool
from vqd_scale.core.atomic_io import Location
from vqd_scale.core.config import Config
from vqd_scale.core.errors import UserError
from vqd_scale.core.outputs import JOBS, TRAINING, check_output, safe_name
from vqd_scale.core.run_lock import check_free
from vqd_scale.data.config import StreamConfig
from vqd_scale.data.shards.shard_index import ShardSet
from vqd_scale.launchers.job_record import Cluster, Launch, check_none_active, newest_launch
from vqd_scale.preparation.config import TokenizeConfig
from vqd_scale.training.tasks.config import TOKEN_RUNS, TOKENIZER_RUNS

_POLL_SECONDS = 2.0

_tool = Tool(
    "Submit a tool as a job: to Slurm, or on this machine. The job runs a copy of the code. It saves a "
    "checkpoint and is requeued after a stop signal, and is requeued after a hang or a lost node.",
    "python tools/launch.py train configs/f/pretrain.yaml --nodes 8 --gpus-per-node 8 --hours 24",
)
_TRAINING = ("train", "tokenizer")
"""Commands whose job needs the run folder for itself."""
_COMMANDS = ("train", "tokenizer", "tokenize", "eval", "status", "cancel")

LaunchFolder = Annotated[
    Path, typer.Argument(metavar="FOLDER", help="run folder (its newest launch), or the folder of a launch")
]


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of ``tools/launch.py``; the subcommand ``train`` may be omitted."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words and words[0] not in _COMMANDS and not words[0].startswith("-"):
        words = ["train", *words]
    _tool(words)


def _nodes(text: str) -> str:
    least, dash, most = text.partition("-")
    numbers = (least, most if dash else least)
    if not all(number.isdigit() for number in numbers) or not 1 <= int(numbers[0]) <= int(numbers[1]):
        raise typer.BadParameter(f"given {text!r}, expected a number, or a minimum and maximum: 4-8")
    return text


@dataclass(frozen=True, kw_only=True)
class JobOptions:
    """Resources of a job, and what is printed about it."""

    cluster: Annotated[Cluster, typer.Option(help="where the job runs; local and debug: on this machine")] = (
        "slurm"
    )
    nodes: Annotated[
        str, typer.Option(parser=_nodes, metavar="N[-MAX]", help="number of nodes, or minimum and maximum")
    ] = "1"
    gpus_per_node: Annotated[int, typer.Option(min=0, help="GPUs of a node; one rank for each")] = 0
    ranks_per_node: Annotated[
        int | None, typer.Option(min=1, help="ranks of a node (default: its number of GPUs, or 1)")
    ] = None
    cpus_per_task: Annotated[int, typer.Option(min=1, help="CPU cores of a rank")] = 1
    hours: Annotated[float, typer.Option(min=0.01, max=10_000, help="time limit")] = 1.0
    signal_seconds: Annotated[
        int, typer.Option(min=1, help="seconds before the time limit at which ranks save a checkpoint")
    ] = 300
    max_requeues: Annotated[int, typer.Option(min=0, help="maximum number of restarts, for any reason")] = 20
    partition: Annotated[str | None, typer.Option(help="Slurm partition")] = None
    account: Annotated[str | None, typer.Option(help="Slurm account")] = None
    qos: Annotated[str | None, typer.Option(help="Slurm quality of service")] = None
    constraint: Annotated[str | None, typer.Option(help="node features, in Slurm's syntax")] = None
    follow: Annotated[
        bool, typer.Option("--follow", help="print the first rank's log until the job ends")
    ] = False


@_tool.command("python tools/launch.py configs/f/pretrain.yaml --nodes 4-8 --gpus-per-node 8 --follow")
def train(options: RunConfigOptions, job: JobOptions) -> None:
    """Train a model on token shards."""
    config = options.load(TOKEN_RUNS)
    _check_data(config.data)
    check_output(config.run, TRAINING, siblings=[JOBS])
    _launch("train", config.run / JOBS, config.run, [["train.py"]], job, config)


@_tool.command("python tools/launch.py tokenizer configs/demo/tokenizer.yaml --gpus-per-node 8")
def tokenizer(options: RunConfigOptions, job: JobOptions) -> None:
    """Train a tokenizer on image shards."""
    config = options.load(TOKENIZER_RUNS)
    _check_data(config.data)
    check_output(config.run, TRAINING, siblings=[JOBS])
    _launch("tokenizer", config.run / JOBS, config.run, [["train_tokenizer.py"]], job, config)


@_tool.command("python tools/launch.py tokenize configs/demo/tokenize.yaml --num-workers 16 --hours 12")
def tokenize(
    options: RunConfigOptions,
    job: JobOptions,
    num_workers: Annotated[int, typer.Option(min=1, help="jobs that divide the shards among them")] = 1,
) -> None:
    """Encode image shards as token shards, as an array of jobs."""
    config = options.load(TokenizeConfig)
    ShardSet.open(config.images)
    commands = [
        ["tokenize_shards.py", "--worker", str(worker), "--num-workers", str(num_workers)]
        for worker in range(num_workers)
    ]
    # The output may be in S3; the records of the launch are local.
    folder = Path("runs") / JOBS / safe_name(config.output.name)
    _launch("tokenize", folder, config.output, commands, job, config)


@_tool.command(
    "python tools/launch.py eval runs/f/finetune --gpus-per-node 1 -- --data data/coco/val", name="eval"
)
def evaluate(
    run: Annotated[Path, typer.Argument(metavar="MODEL", help="run folder, or model bundle")],
    job: JobOptions,
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="...", help="after a --: arguments of eval_coco_fid.py")
    ] = None,
) -> None:
    """Evaluate a trained model."""
    if not run.is_dir():
        raise UserError(f"{run}: there is no such folder; name the run, or its export.")
    command = ["eval_coco_fid.py", str(run), *(arguments or [])]
    _launch("eval", run / JOBS, run, [command], job)


@_tool.command("python tools/launch.py status runs/f/pretrain")
def status(folder: LaunchFolder) -> None:
    """Print the state of each job of a launch."""
    launch = newest_launch(folder)
    for job, state in launch.states().items():
        print(f"{launch.name} {job}: {state.summary}{_progress(launch)}")
        print(f"  {launch.logs(job)[1]}")


@_tool.command("python tools/launch.py cancel runs/f/pretrain")
def cancel(folder: LaunchFolder) -> None:
    """Cancel the jobs of a launch: they save a checkpoint and are not requeued."""
    launch = newest_launch(folder)
    launch.cancel()
    print(f"canceled: {', '.join(launch.jobs)}")


def _check_data(data: StreamConfig) -> None:
    """Raise a `UserError` unless the shards exist, before the job is queued."""
    for source in data.mixed:
        ShardSet.open(source.path)


def _launch(
    kind: str,
    parent: Path,
    result: Location,
    commands: list[list[str]],
    job: JobOptions,
    config: Config | None = None,
) -> None:
    """Submit one job for each command, and print where its state and logs are.

    Args:
        kind: Name of the work, such as ``train``.
        parent: Parent folder of the launch folders.
        result: Folder of the run or of its results.
        commands: Tool file name and further arguments, for each job.
        job: Resources.
        config: Configuration, written to a file that is the tools' first argument.
    """
    minutes = max(1, round(60 * job.hours))
    if job.cluster == "slurm" and job.signal_seconds >= 60 * minutes:
        raise UserError(
            f"--signal-seconds: given {job.signal_seconds}, allowed: less than the time limit of "
            f"{60 * minutes} s (--hours); ranks would be stopped before their first step."
        )
    if kind in _TRAINING:
        check_none_active(parent)
        check_free(parent.parent)

    from vqd_scale.launchers import slurm

    resources = slurm.Resources(
        cluster=job.cluster,
        nodes=job.nodes,
        gpus_per_node=job.gpus_per_node,
        ranks_per_node=job.ranks_per_node or max(1, job.gpus_per_node),
        cpus_per_task=job.cpus_per_task,
        minutes=minutes,
        signal_seconds=job.signal_seconds,
        requeues=job.max_requeues,
        partition=job.partition,
        account=job.account,
        qos=job.qos,
        constraint=job.constraint,
    )
    folder = parent / f"{datetime.now():%Y%m%d-%H%M%S-%f}"
    launch = slurm.launch(kind, commands, resources, folder, result, config)
    for number in launch.jobs:
        print(f"{kind}: job {number} ({launch.cluster}); its log is {launch.logs(number)[1]}")
    print(f"next: python tools/launch.py status {folder}")
    if job.follow or launch.cluster == "debug":
        _follow(launch)


def _follow(launch: Launch) -> None:
    """Print the logs of each job's rank 0 until all jobs have ended.

    Raises:
        SystemExit: A job failed; with the largest exit code.
    """
    positions: dict[Path, int] = {}
    while True:
        states = launch.states()
        for log in (log for job in launch.jobs for log in launch.logs(job)):
            positions[log] = _print_log(log, positions.get(log, 0))
        if all(state.has_ended for state in states.values()):
            break
        time.sleep(_POLL_SECONDS)
    for job, state in states.items():
        print(f"{launch.name} {job}: {state.summary}")
    worst = max(state.code or 0 for state in states.values())
    if worst:
        raise SystemExit(worst)


def _print_log(log: Path, start: int) -> int:
    """Print a log from byte ``start`` on; returns the new end position."""
    if not log.exists():
        return start
    with log.open("rb") as file:
        file.seek(start)
        content = file.read()
    sys.stdout.write(content.decode(errors="replace"))
    sys.stdout.flush()
    return start + len(content)


def _progress(launch: Launch) -> str:
    from vqd_scale.training.logging.metrics import read_metrics

    rows = read_metrics(Path(launch.run) / "metrics.jsonl") if launch.name in _TRAINING else []
    return f", {rows[-1]['images']:,} images seen" if rows else ""
