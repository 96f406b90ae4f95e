"""Jobs through Submitit: submitted, watched, started again. Nothing else in the package imports it.

Submitit starts `Rank` on every rank of a job. That one starts the tool as a process of its own, with the
variables that torchrun would set, and lives on when the tool ends: so a tool that hung or was killed can be
started again as well as one that saved itself. Submitit's own handler for signals does nothing before then,
for it acts on the first rank alone and leaves, and a save needs all ranks.
"""

import contextlib
import io
import os
import signal
import subprocess
import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import submitit
from submitit.core.job_environment import JobEnvironment
from submitit.core.logger import get_logger
from submitit.core.utils import DelayedSubmission, FailedJobError, FailedSubmissionError, JobPaths

from vqd_scale.core.atomic_io import publish_json
from vqd_scale.core.errors import UserError
from vqd_scale.launchers.base import (
    MISTAKE,
    forwarding_signals,
    mistaken_rank,
    note_end,
    noted_ends,
    started,
)
from vqd_scale.launchers.job_record import CANCELLED, Cluster, Launch, goes_on, last_line_of, outcome_file

_POLL_SECONDS = 0.5
_GRACE_SECONDS = 60.0
"""How long the first rank may go on after another one ended badly; it usually fails by itself."""


@dataclass(frozen=True)
class Resources:
    """What a job asks for.

    Attributes:
        cluster: Where it runs: Slurm, processes of this machine, or this very process.
        nodes: How many nodes, or the least and the most, ``1-8``.
        gpus_per_node: GPUs on each.
        ranks_per_node: Processes on each.
        cpus_per_task: Cores of each process.
        minutes: The time limit.
        signal_seconds: How long before it ranks are asked to save.
        requeues: How often the job may be started again, whatever for.
        partition: Slurm's; its default otherwise.
        account: Who pays.
        qos: Quality of service.
        constraint: Features that nodes must have.
    """

    cluster: Cluster = "slurm"
    nodes: str = "1"
    gpus_per_node: int = 0
    ranks_per_node: int = 1
    cpus_per_task: int = 1
    minutes: int = 60
    signal_seconds: int = 300
    requeues: int = 20
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None


@dataclass(frozen=True)
class Rank:
    """One rank of a job, as Submitit calls it; small and plain, since Submitit pickles it.

    Attributes:
        command: A program and its arguments.
        code: Folder of the package that the program imports.
        workplace: Folder in which it runs.
        folder: Of the job's files.
        requeues: How often the job may be started again.
        starts: How often it was, where no Slurm counts.
    """

    command: tuple[str, ...]
    code: Path
    workplace: Path
    folder: Path
    requeues: int
    starts: int = 0

    def __call__(self) -> None:
        """Run the tool to its end.

        Raises:
            SystemExit: On the first rank, with the job's exit code, or after the job was queued again.
        """
        job = JobEnvironment()
        start = int(os.environ.get("SLURM_RESTART_COUNT", self.starts))
        ends = self.folder / "ends" / f"{job.job_id}-{start}"
        requeue = signal.getsignal(job._usr_sig())  # pyright: ignore[reportPrivateUsage]
        process = started(self.command, self._environment(job), self.workplace)
        with forwarding_signals([process]):
            code = _watched(process, ends) if job.global_rank == 0 else process.wait()
        # A negative one is a signal's number.
        code = code if code >= 0 else 128 - code
        note_end(ends, job.global_rank, code)
        if job.global_rank == 0:
            self._conclude(job, noted_ends(ends), code, start, requeue)

    def checkpoint(self) -> DelayedSubmission:
        """What Submitit starts the next time; the tool itself knows where it was."""
        return DelayedSubmission(replace(self, starts=self.starts + 1))

    def _environment(self, job: JobEnvironment) -> dict[str, str]:
        raw = "".join(filter(str.isdigit, job.raw_job_id))
        return {
            **os.environ,
            "PYTHONPATH": str(self.code),
            "RANK": str(job.global_rank),
            "LOCAL_RANK": str(job.local_rank),
            "WORLD_SIZE": str(job.num_tasks),
            "MASTER_ADDR": job.hostnames[0] if job.cluster == "slurm" else "127.0.0.1",
            # As in slurm/env.sh: the job's own, below the ephemeral ones.
            "MASTER_PORT": str(10_000 + int(raw) % 20_000),
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", os.environ.get("SLURM_CPUS_PER_TASK", "1")),
        }

    def _conclude(
        self,
        job: JobEnvironment,
        ends: Mapping[int, int],
        code: int,
        start: int,
        requeue: Any,  # noqa: ANN401 - a handler of signals
    ) -> None:
        if code == 0:
            self._say(job, 0, "done")
            return
        mistaken = mistaken_rank(ends)
        if mistaken is not None:
            log = JobPaths(job.paths.folder, job.job_id, mistaken).stderr
            self._say(job, MISTAKE, _last_line(log))
            raise SystemExit(MISTAKE)
        if (self.folder / CANCELLED).exists() or (job.cluster == "slurm" and not goes_on(job.job_id)):
            self._say(job, code, "cancelled, or past its time limit")
            raise SystemExit(code)
        if start >= self.requeues or not callable(requeue):
            self._say(
                job,
                code,
                f"ended with exit code {code} after all {start} restarts that --requeues allows; look at the "
                "logs, then launch it again: it goes on from its newest checkpoint.",
            )
            raise SystemExit(code)
        get_logger().warning("ended with exit code %d; the job is queued again", code)
        requeue(job._usr_sig(), None)  # pyright: ignore[reportPrivateUsage]

    def _say(self, job: JobEnvironment, code: int, said: str) -> None:
        publish_json(outcome_file(self.folder, job.job_id), {"code": code, "said": said})


def _watched(process: "subprocess.Popen[bytes]", ends: Path) -> int:
    """The first rank's exit code; it is ended if it goes on waiting for one that ended badly."""
    deadline = float("inf")
    while True:
        try:
            return process.wait(timeout=_POLL_SECONDS)
        except subprocess.TimeoutExpired:
            if deadline == float("inf") and any(noted_ends(ends).values()):
                deadline = time.monotonic() + _GRACE_SECONDS
            if time.monotonic() > deadline:
                process.kill()


def submit(
    what: str,
    commands: Sequence[Sequence[str]],
    resources: Resources,
    folder: Path,
    code: Path,
    run: str,
    details: Mapping[str, Any],
) -> Launch:
    """Submit a command, or several as the tasks of an array.

    Args:
        what: In words.
        commands: Programs and their arguments, each for all ranks of one job.
        resources: What each job asks for.
        folder: For the jobs' files, seen by all nodes.
        code: Folder of the package that the programs import.
        run: The folder of the run.
        details: What else is worth remembering.

    Raises:
        UserError: There is no Slurm here, or it refuses the job.
    """
    folder, code = folder.absolute(), code.absolute()
    try:
        executor = submitit.AutoExecutor(folder / "logs", cluster=resources.cluster, **_bounds(resources))
        executor.update_parameters(**_parameters(what, resources))
        ranks = [Rank(tuple(command), code, Path.cwd(), folder, resources.requeues) for command in commands]
        # The launcher's own part on the nodes is imported from where it is submitted.
        # Submitit repeats what sbatch says there, and so does this.
        with _inside(code), contextlib.redirect_stderr(io.StringIO()), executor.batch():
            jobs = [executor.submit(rank) for rank in ranks]
    except (RuntimeError, ValueError, FailedJobError, FailedSubmissionError) as error:
        raise UserError(f"{_reason(error)}; nothing was submitted.") from None
    launch = Launch(folder, what, resources.cluster, tuple(job.job_id for job in jobs), run, dict(details))
    launch.write()
    if resources.cluster == "debug":
        for job in jobs:
            _run_here(job)
    return launch


def _run_here(job: submitit.Job[Any]) -> None:
    try:
        job.results()
    except SystemExit:
        # What the tool ended with is in the job's outcome.
        get_logger().debug("a job in this process ended early")


def _bounds(resources: Resources) -> dict[str, Any]:
    """Submitit's own bound on restarts must not be the narrower one."""
    bound = {"max_num_timeout": resources.requeues}
    return (
        {} if resources.cluster == "debug" else {f"{resources.cluster}_{key}": n for key, n in bound.items()}
    )


def _parameters(what: str, resources: Resources) -> dict[str, Any]:
    least, _, most = resources.nodes.partition("-")
    values: dict[str, Any] = {
        "name": f"vqd-{what}",
        "nodes": int(most or least),
        "tasks_per_node": resources.ranks_per_node,
        "gpus_per_node": resources.gpus_per_node,
        "cpus_per_task": resources.cpus_per_task,
        "timeout_min": resources.minutes,
    }
    if resources.cluster != "slurm":
        return values
    return values | {
        "slurm_partition": resources.partition,
        "slurm_account": resources.account,
        "slurm_qos": resources.qos,
        "slurm_constraint": resources.constraint,
        "slurm_signal_delay_s": resources.signal_seconds,
        "slurm_additional_parameters": {"requeue": True, "nodes": resources.nodes},
        # Only the first rank ends in another way than 0, when it is clear what is to follow.
        "slurm_srun_args": ["--kill-on-bad-exit=1", f"--cpus-per-task={resources.cpus_per_task}"],
    }


@contextlib.contextmanager
def _inside(folder: Path) -> Generator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def _reason(error: Exception) -> str:
    """What Slurm or Submitit said, in the first line that names an error."""
    lines = [line.partition("error: ")[2] for line in str(error).splitlines() if "error: " in line]
    text = next(iter(lines), last_line_of(str(error))).rstrip(".")
    return "this machine knows no Slurm: launch with --cluster local" if '"srun"' in text else text


def _last_line(log: Path) -> str:
    try:
        return last_line_of(log.read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return "a rank found a mistake, and its log cannot be read"
