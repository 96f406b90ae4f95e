"""``launch``: submission of a tool as a job through Submitit, on a cluster or on this machine."""

import argparse
import contextlib
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast, get_args

from vqd_scale.cli.base import add_config_arguments, config_from, run_tool, tool_parser
from vqd_scale.cli.run import TOKEN_RUNS, TOKENIZER_RUNS
from vqd_scale.core.atomic_io import Location, publish_text
from vqd_scale.core.config import Config, to_yaml
from vqd_scale.core.errors import UserError
from vqd_scale.core.provenance import modified_files, provenance
from vqd_scale.data.loading.stream import StreamConfig
from vqd_scale.data.shards.shard_index import ShardSet
from vqd_scale.launchers.base import copy_source
from vqd_scale.launchers.job_record import Cluster, Launch, newest_launch
from vqd_scale.launchers.slurm import Resources, submit
from vqd_scale.preparation.tokenize_shards import TokenizeConfig
from vqd_scale.training.logging.metrics import read_metrics

_POLL_SECONDS = 2.0
_JOBS = "jobs"
_LONGEST_HOURS = 10_000.0

Tool = tuple[argparse.ArgumentParser, Callable[[argparse.Namespace], None]]


@dataclass(frozen=True)
class _Work:
    """Work of a launch.

    Attributes:
        what: Name of the work, such as ``train``.
        folder: Parent folder of the launch folders.
        result: Folder of the run or of its results.
        config: Configuration, written to a file that is the tool's first argument; None for no file.
        commands: Tool file name and further arguments, for each job.
    """

    what: str
    folder: Path
    result: str
    config: Config | None
    commands: list[list[str]]


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of ``tools/launch.py``; the subcommand ``train`` may be omitted."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    tools = {
        "train": _train(),
        "tokenizer": _tokenizer(),
        "tokenize": _tokenize(),
        "eval": _eval(),
        "status": _status(),
        "cancel": _cancel(),
    }
    overview = tool_parser(
        "Run a tool as a job: on Slurm, or on this machine. A job that is asked to stop saves and is queued "
        "again, as is one that hung or lost a node; it runs a copy of the code as it was.",
        "python tools/launch.py configs/f/pretrain.yaml --nodes 8 --gpus-per-node 8 --hours 24",
    )
    overview.add_argument(
        "what", choices=list(tools), help="each has a --help of its own; train may be left out"
    )
    if given and given[0] not in tools and not given[0].startswith("-"):
        given = ["train", *given]
    what = cast(str, overview.parse_args(given[:1]).what)
    parser, command = tools[what]
    parser.prog = f"{overview.prog} {what}"
    run_tool(parser, command, given[1:])


def _train() -> Tool:
    parser = tool_parser(
        "Train on token shards.",
        "launch.py configs/f/pretrain.yaml --nodes 4-8 --gpus-per-node 8 --hours 24 --follow",
    )
    add_config_arguments(parser, file_required=True)
    _add_resources(parser)

    def run(arguments: argparse.Namespace) -> None:
        config = config_from(TOKEN_RUNS, arguments)
        _check_data(config.data)
        _launch(_Work("train", config.run / _JOBS, str(config.run), config, [["train.py"]]), arguments)

    return parser, run


def _tokenizer() -> Tool:
    parser = tool_parser(
        "Train a VQ-GAN on image shards.", "launch.py tokenizer configs/demo/tokenizer.yaml --gpus-per-node 8"
    )
    add_config_arguments(parser, file_required=True)
    _add_resources(parser)

    def run(arguments: argparse.Namespace) -> None:
        config = config_from(TOKENIZER_RUNS, arguments)
        _check_data(config.data)
        work = _Work("tokenizer", config.run / _JOBS, str(config.run), config, [["train_tokenizer.py"]])
        _launch(work, arguments)

    return parser, run


def _tokenize() -> Tool:
    parser = tool_parser(
        "Turn image shards into token shards, many at a time: an array of jobs.",
        "launch.py tokenize configs/demo/tokenize.yaml --workers 16 --gpus-per-node 1 --hours 12",
    )
    add_config_arguments(parser, file_required=True)
    parser.add_argument("--workers", type=_at_least(1), default=1, help="jobs that share the shards out (1)")
    _add_resources(parser)

    def run(arguments: argparse.Namespace) -> None:
        config = config_from(TokenizeConfig, arguments)
        ShardSet.open(config.images)
        workers = [
            ["tokenize_shards.py", "--worker", str(worker), "--workers", str(arguments.workers)]
            for worker in range(arguments.workers)
        ]
        work = _Work("tokenize", _beside(config.output), str(config.output), config, workers)
        _launch(work, arguments)

    return parser, run


def _eval() -> Tool:
    parser = tool_parser(
        "Score a trained model: what follows a -- goes to eval_coco_fid.py.",
        "launch.py eval runs/f/finetune --gpus-per-node 1 -- --data data/coco/val",
    )
    parser.add_argument("run", type=Path, help="the run's folder, or a bundle")
    parser.add_argument("rest", nargs="*", metavar="...", help="arguments of eval_coco_fid.py")
    _add_resources(parser)

    def run(arguments: argparse.Namespace) -> None:
        if not arguments.run.is_dir():
            raise UserError(f"{arguments.run}: there is no such folder; name the run, or its export.")
        command = ["eval_coco_fid.py", str(arguments.run), *arguments.rest]
        _launch(_Work("eval", arguments.run / _JOBS, str(arguments.run), None, [command]), arguments)

    return parser, run


def _status() -> Tool:
    parser = tool_parser("Say what has become of a launch.", "launch.py status runs/f/pretrain")
    parser.add_argument("folder", type=Path, help="a run's folder (its newest launch), or a launch's own")

    def run(arguments: argparse.Namespace) -> None:
        launch = newest_launch(arguments.folder)
        for job, state in launch.states().items():
            print(f"{launch.name} {job}: {state.summary}{_progress(launch)}")
            print(f"  {launch.logs(job)[1]}")

    return parser, run


def _cancel() -> Tool:
    parser = tool_parser(
        "End a launch's jobs: they save, and are not queued again.", "launch.py cancel runs/f/pretrain"
    )
    parser.add_argument("folder", type=Path, help="a run's folder (its newest launch), or a launch's own")

    def run(arguments: argparse.Namespace) -> None:
        launch = newest_launch(arguments.folder)
        launch.cancel()
        print(f"canceled: {', '.join(launch.jobs)}")

    return parser, run


def _check_data(data: StreamConfig) -> None:
    """Check that the shards exist, before the job is queued.

    Raises:
        UserError: Shards are missing.
    """
    for source in data.mixed:
        ShardSet.open(source.path)


def _add_resources(parser: argparse.ArgumentParser) -> None:
    defaults = Resources()
    group = parser.add_argument_group("what the job asks for")
    group.add_argument("--cluster", choices=get_args(Cluster), default=defaults.cluster)
    group.add_argument(
        "--nodes", type=_nodes, default=defaults.nodes, help="a number, or the least and the most: 4-8 (1)"
    )
    group.add_argument("--gpus-per-node", type=_at_least(0), default=0, help="a rank for each (0)")
    group.add_argument("--ranks-per-node", type=_at_least(1), help="where there are no GPUs (1)")
    group.add_argument(
        "--cpus-per-task", type=_at_least(1), default=defaults.cpus_per_task, help="of a rank (1)"
    )
    group.add_argument("--hours", type=_hours, default=1.0, help="the time limit (1)")
    group.add_argument(
        "--signal-seconds", type=_at_least(1), default=300, help="before it, ranks are asked to save (300)"
    )
    group.add_argument("--requeues", type=_at_least(0), default=20, help="restarts, whatever for (20)")
    for name in ("partition", "account", "qos", "constraint"):
        group.add_argument(f"--{name}", help="Slurm's")
    group.add_argument("--follow", action="store_true", help="show the first rank's log to the job's end")


def _launch(work: _Work, arguments: argparse.Namespace) -> None:
    folder = work.folder / time.strftime("%Y%m%d-%H%M%S")
    before = [parent for parent in folder.parents if not parent.exists()]
    try:
        launch = _submitted(work, folder, arguments)
    except UserError:
        shutil.rmtree(folder, ignore_errors=True)
        for parent in before:
            with contextlib.suppress(OSError):
                parent.rmdir()
        raise
    for job in launch.jobs:
        print(f"{work.what}: job {job} ({launch.cluster}); its log is {launch.logs(job)[1]}")
    print(f"next: python tools/launch.py status {folder}")
    if arguments.follow or launch.cluster == "debug":
        _follow(launch)


def _submitted(work: _Work, folder: Path, arguments: argparse.Namespace) -> Launch:
    code = copy_source(folder / "code").absolute()
    configuration: list[str] = []
    if work.config is not None:
        publish_text(folder / "config.yaml", to_yaml(work.config))
        configuration = [str((folder / "config.yaml").absolute())]
    commands = [
        [sys.executable, str(code / "tools" / tool), *configuration, *rest] for tool, *rest in work.commands
    ]
    details = {"commands": commands, **provenance(), "modified_files": modified_files()}
    return submit(work.what, commands, _resources(arguments), folder, code, work.result, details)


def _resources(arguments: argparse.Namespace) -> Resources:
    return Resources(
        cluster=arguments.cluster,
        nodes=arguments.nodes,
        gpus_per_node=arguments.gpus_per_node,
        ranks_per_node=arguments.ranks_per_node or max(1, arguments.gpus_per_node),
        cpus_per_task=arguments.cpus_per_task,
        minutes=max(1, round(60 * arguments.hours)),
        signal_seconds=arguments.signal_seconds,
        requeues=arguments.requeues,
        partition=arguments.partition,
        account=arguments.account,
        qos=arguments.qos,
        constraint=arguments.constraint,
    )


def _follow(launch: Launch) -> None:
    """Print the logs of each job's rank 0 until all jobs have ended.

    Raises:
        SystemExit: A job failed; with the largest exit code.
    """
    shown: dict[Path, int] = {}
    while True:
        states = launch.states()
        for log in (log for job in launch.jobs for log in launch.logs(job)):
            shown[log] = _show(log, shown.get(log, 0))
        if all(state.has_ended for state in states.values()):
            break
        time.sleep(_POLL_SECONDS)
    for job, state in states.items():
        print(f"{launch.name} {job}: {state.summary}")
    worst = max(state.code or 0 for state in states.values())
    if worst:
        raise SystemExit(worst)


def _show(log: Path, start: int) -> int:
    """Print a log from byte ``start`` on; returns the new end position."""
    if not log.exists():
        return start
    with log.open("rb") as file:
        file.seek(start)
        written = file.read()
    sys.stdout.write(written.decode(errors="replace"))
    sys.stdout.flush()
    return start + len(written)


def _progress(launch: Launch) -> str:
    rows = read_metrics(Path(launch.run) / "metrics.jsonl") if launch.name in ("train", "tokenizer") else []
    return f", {rows[-1]['images']:,} images seen" if rows else ""


def _beside(out: Location) -> Path:
    """Return a local folder for the launches of jobs whose output may be in S3."""
    return Path("runs") / _JOBS / out.name


def _at_least(least: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if not text.isdigit() or int(text) < least:
            raise argparse.ArgumentTypeError(f"given {text!r}, expected a number, {least} or more")
        return int(text)

    return number


def _hours(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < _LONGEST_HOURS:
        raise argparse.ArgumentTypeError(f"given {text!r}, expected hours, such as 24 or 0.5")
    return value


def _nodes(text: str) -> str:
    least, dash, most = text.partition("-")
    number = _at_least(1)
    if number(least) > number(most if dash else least):
        raise argparse.ArgumentTypeError(f"given {text!r}, expected a number, or the least and the most: 4-8")
    return text
