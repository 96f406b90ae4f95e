"""Submission, monitoring and requeueing of jobs through Submitit. No other module imports Submitit.

Submitit runs `Rank` on every rank of a job. `Rank` starts the tool as a child process with torchrun's
environment variables and outlives it. The job can therefore be requeued after a hang or a kill as well as
after a saved checkpoint. Submitit's own signal handler is replaced while the tool runs: it acts only on
rank 0 and exits at once, while a checkpoint needs all ranks.
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
"""Seconds until rank 0 is killed after another rank failed; it usually fails by itself before."""


@dataclass(frozen=True)
class Resources:
    """Resources of a job.

    Attributes:
        cluster: ``slurm``, ``local`` (processes of this machine) or ``debug`` (the current process).
        nodes: Number of nodes, or a minimum and maximum such as ``1-8``.
        gpus_per_node: Number of GPUs per node.
        ranks_per_node: Number of ranks per node.
        cpus_per_task: CPU cores per rank.
        minutes: Time limit in minutes.
        signal_seconds: Seconds before the time limit at which ranks receive the signal to save a checkpoint.
        requeues: Maximum number of restarts of the job, for any reason.
        partition: Slurm partition; Slurm's default if None.
        account: Slurm account that is charged.
        qos: Slurm quality of service.
        constraint: Required node features, in Slurm's syntax.
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
    """One rank of a job, called by Submitit; has only plain fields because Submitit pickles it.

    Attributes:
        command: Program and arguments.
        code: Folder of the package that the program imports.
        workplace: Working directory of the program.
        folder: Folder of the job's files.
        requeues: Maximum number of restarts of the job.
        starts: Number of restarts so far, where ``SLURM_RESTART_COUNT`` is not set.
    """

    command: tuple[str, ...]
    code: Path
    workplace: Path
    folder: Path
    requeues: int
    starts: int = 0

    def __call__(self) -> None:
        """Run the tool, then record the outcome or requeue the job (rank 0).

        Raises:
            SystemExit: On rank 0, with the job's exit code, or after a requeue.
        """
        job = JobEnvironment()
        start = int(os.environ.get("SLURM_RESTART_COUNT", self.starts))
        ends = self.folder / "ends" / f"{job.job_id}-{start}"
        requeue = signal.getsignal(job._usr_sig())  # pyright: ignore[reportPrivateUsage]
        process = started(self.command, self._environment(job), self.workplace)
        with forwarding_signals([process]):
            code = _watched(process, ends) if job.global_rank == 0 else process.wait()
        # A negative exit code is a signal number.
        code = code if code >= 0 else 128 - code
        note_end(ends, job.global_rank, code)
        if job.global_rank == 0:
            self._conclude(job, noted_ends(ends), code, start, requeue)

    def checkpoint(self) -> DelayedSubmission:
        """Return the submission for Submitit's restart; the tool resumes from its own checkpoint."""
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
            # As in slurm/env.sh: a port derived from the job ID, below the ephemeral ports.
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
    """Wait for rank 0 and return its exit code; kill it if it keeps running after another rank failed."""
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
    """Submit one command as a job, or several commands as a job array.

    Args:
        what: Name of the work, used in the job name.
        commands: Program and arguments of each job; all ranks of a job run the same command.
        resources: Resources of each job.
        folder: Folder of the jobs' files, on a file system shared by all nodes.
        code: Folder of the package that the programs import.
        run: Folder of the run or of its results.
        details: Further metadata for the launch record.

    Raises:
        UserError: Slurm is not installed, or refuses the job.
    """
    folder, code = folder.absolute(), code.absolute()
    try:
        executor = submitit.AutoExecutor(folder / "logs", cluster=resources.cluster, **_bounds(resources))
        executor.update_parameters(**_parameters(what, resources))
        ranks = [Rank(tuple(command), code, Path.cwd(), folder, resources.requeues) for command in commands]
        # The nodes import the launcher from the submission's working directory, thus from the code copy.
        # Submitit copies sbatch's message to stderr; it is suppressed because the UserError repeats it.
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
        # The outcome file has the exit code of the tool.
        get_logger().debug("a job in this process ended early")


def _bounds(resources: Resources) -> dict[str, Any]:
    """Return Submitit's limit on restarts, set to ``requeues`` so that it is not the tighter one."""
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
        # Only rank 0 exits with a nonzero code, after it has decided between a requeue and the end.
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
    """Return the first error line of Slurm's or Submitit's message, or its last line if none is marked."""
    lines = [line.partition("error: ")[2] for line in str(error).splitlines() if "error: " in line]
    text = next(iter(lines), last_line_of(str(error))).rstrip(".")
    return "this machine knows no Slurm: launch with --cluster local" if '"srun"' in text else text


def _last_line(log: Path) -> str:
    try:
        return last_line_of(log.read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return "a rank found a mistake, and its log cannot be read"
