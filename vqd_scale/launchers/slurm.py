"""Submission, monitoring and requeueing of jobs through Submitit. No other module imports Submitit.

Submitit runs `Rank` on every rank of a job. `Rank` starts the tool as a child process with torchrun's
environment variables and outlives it. The job can therefore be requeued after a hang or a kill as well as
after a saved checkpoint. Submitit's own signal handler is replaced while the tool runs: it acts only on
rank 0 and exits at once, while a checkpoint needs all ranks.
"""

import contextlib
import io
import os
import shutil
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import submitit
from submitit.core.job_environment import JobEnvironment
from submitit.core.logger import get_logger
from submitit.core.utils import DelayedSubmission, FailedJobError, FailedSubmissionError, JobPaths

from vqd_scale.core.atomic_io import Location, publish_json, publish_text
from vqd_scale.core.config import Config, to_yaml
from vqd_scale.core.environment import OWN_LOG
from vqd_scale.core.errors import USER_ERROR_EXIT_CODE, UserError
from vqd_scale.core.provenance import modified_files, provenance
from vqd_scale.core.signals import PROGRESS_FILE, REQUEUE_EXIT_CODE
from vqd_scale.launchers.base import (
    copy_source,
    decisive_exit_code,
    forward_signals,
    free_port,
    rank_with_user_error,
    read_exit_codes,
    start_process,
    write_exit_code,
)
from vqd_scale.launchers.job_record import (
    CANCELED,
    Cluster,
    Launch,
    is_running_in_slurm,
    last_line_of,
    outcome_file,
)

_POLL_SECONDS = 0.5
_RENDEZVOUS_SECONDS = 600.0
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
        process = start_process(self.command, self._environment(job, ends), self.workplace)
        with forward_signals([process]):
            code = _watched(process, ends) if job.global_rank == 0 else process.wait()
        # A negative exit code is a signal number.
        code = code if code >= 0 else 128 - code
        write_exit_code(ends, job.global_rank, code)
        if job.global_rank == 0:
            self._conclude(job, ends, code, start, requeue)

    def checkpoint(self) -> DelayedSubmission:
        """Return the submission for Submitit's restart; the tool resumes from its own checkpoint."""
        return DelayedSubmission(replace(self, starts=self.starts + 1))

    def _environment(self, job: JobEnvironment, ends: Path) -> dict[str, str]:
        # As in slurm/env.sh: what the user set is kept, unless it is another job's.
        address, port = (os.environ.get(name) for name in ("MASTER_ADDR", "MASTER_PORT"))
        if os.environ.get("RENDEZVOUS_OF_JOB", job.raw_job_id) != job.raw_job_id:
            address = port = None
        return {
            **os.environ,
            "PYTHONPATH": str(self.code),
            "RANK": str(job.global_rank),
            "LOCAL_RANK": str(job.local_rank),
            "WORLD_SIZE": str(job.num_tasks),
            "MASTER_ADDR": address or (job.hostnames[0] if job.cluster == "slurm" else "127.0.0.1"),
            "MASTER_PORT": port or _rendezvous_port(job, ends.with_suffix(".port")),
            PROGRESS_FILE: str(ends.with_suffix(".progress")),
            OWN_LOG: "1",
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", os.environ.get("SLURM_CPUS_PER_TASK", "1")),
        }

    def _conclude(self, job: JobEnvironment, ends: Path, code: int, start: int, requeue: object) -> None:
        exit_codes = read_exit_codes(ends)
        failed = rank_with_user_error(exit_codes)
        if code == 0:
            self._record(job, 0, "done")
            return
        code = decisive_exit_code(exit_codes, code)
        if failed is not None:
            code = USER_ERROR_EXIT_CODE
            summary = _last_line(JobPaths(job.paths.folder, job.job_id, failed).stderr)
        elif (self.folder / CANCELED).exists() or (
            job.cluster == "slurm" and not is_running_in_slurm(job.job_id)
        ):
            summary = "canceled, or past its time limit"
        elif start >= self.requeues or not callable(requeue):
            summary = (
                f"ended with exit code {code} after all {start} restarts that --max-requeues allows; look at "
                "the logs, then launch it again: it resumes from its newest checkpoint."
            )
        elif code != REQUEUE_EXIT_CODE and _is_stuck(ends, code):
            summary = f"ended twice with exit code {code} before any progress; look at the logs"
        else:
            get_logger().warning("ended with exit code %d; the job is queued again", code)
            requeue(job._usr_sig(), None)  # pyright: ignore[reportPrivateUsage]
            return
        self._record(job, code, summary)
        raise SystemExit(code)

    def _record(self, job: JobEnvironment, code: int, summary: str) -> None:
        publish_json(outcome_file(self.folder, job.job_id), {"code": code, "summary": summary})


def _rendezvous_port(job: JobEnvironment, file: Path) -> str:
    """Return the rendezvous port of this start, which the first rank chooses on its node.

    Args:
        job: This rank's job.
        file: File in which the first rank publishes the port.

    Raises:
        TimeoutError: The first rank published none.
    """
    if job.global_rank == 0:
        publish_text(file, str(free_port(zlib.crc32(file.name.encode()))))
    deadline = time.monotonic() + _RENDEZVOUS_SECONDS
    while not file.exists():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{file}: was not written by the first rank")
        time.sleep(_POLL_SECONDS)
    return file.read_text(encoding="utf-8")


def _is_stuck(ends: Path, code: int) -> bool:
    """Return whether this start and the one before ended with the same code and without any progress."""
    if ends.with_suffix(".progress").exists():
        return False
    ends.with_suffix(".stuck").write_text(f"{code}", encoding="utf-8")
    job, _, start = ends.name.rpartition("-")
    previous = ends.with_name(f"{job}-{int(start) - 1}.stuck")
    return previous.exists() and previous.read_text(encoding="utf-8") == f"{code}"


def _watched(process: "subprocess.Popen[bytes]", ends: Path) -> int:
    """Wait for rank 0 and return its exit code; kill it if it keeps running after another rank failed."""
    deadline = float("inf")
    while True:
        try:
            return process.wait(timeout=_POLL_SECONDS)
        except subprocess.TimeoutExpired:
            if deadline == float("inf") and any(read_exit_codes(ends).values()):
                deadline = time.monotonic() + _GRACE_SECONDS
            if time.monotonic() > deadline:
                process.kill()


def launch(
    name: str,
    commands: Sequence[Sequence[str]],
    resources: Resources,
    folder: Path,
    result: Location,
    config: Config | None = None,
) -> Launch:
    """Submit tools as jobs, one job for each command; a job runs a copy of the code.

    >>> from pathlib import Path
    >>> from vqd_scale import launch
    >>> from vqd_scale.launchers.slurm import Resources
    >>> run = Path("runs/mine")
    >>> jobs = launch("plot", [["plot_run.py", str(run)]], Resources(cluster="debug"), Path("jobs"), run)
    >>> [state.summary for state in jobs.states().values()]
    ['done']

    Args:
        name: Name of the work, such as ``train``; part of the job name.
        commands: File name of a tool, and its further arguments, for each job.
        resources: Resources of each job.
        folder: New folder of the jobs' files, on a file system shared by all nodes.
        result: Folder of the run or of its results.
        config: Configuration, written to a file that is the tools' first argument.

    Raises:
        UserError: ``folder`` exists; Slurm is not installed, or refuses the job, which leaves no ``folder``.
    """
    missing_parents = [path for path in folder.parents if not path.exists()]
    folder = folder.absolute()
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        raise UserError(f"{folder}: is in the way; name a new folder for the jobs.") from None
    try:
        code = copy_source(folder / "code")
        first_arguments: list[str] = []
        if config is not None:
            publish_text(folder / "config.yaml", to_yaml(config))
            first_arguments = [str(folder / "config.yaml")]
        lines = [
            [sys.executable, str(code / "tools" / tool), *first_arguments, *arguments]
            for tool, *arguments in commands
        ]
        details = {"commands": lines, **provenance(), "modified_files": modified_files()}
        ranks = [Rank(tuple(line), code, Path.cwd(), folder, resources.requeues) for line in lines]
        jobs = _submit(name, ranks, resources)
        job_ids = tuple(job.job_id for job in jobs)
        launch = Launch(folder, name, resources.cluster, job_ids, str(result), details)
        launch.write()
    except UserError:
        shutil.rmtree(folder, ignore_errors=True)
        for path in missing_parents:
            with contextlib.suppress(OSError):
                path.rmdir()
        raise
    for job in jobs if resources.cluster == "debug" else ():
        # Rank 0 exits with the tool's exit code, which the outcome file has as well.
        with contextlib.suppress(SystemExit):
            job.results()
    return launch


def _submit(name: str, ranks: Sequence[Rank], resources: Resources) -> list[submitit.Job[Any]]:
    """Submit one job, or several jobs as a job array."""
    # Submitit's limit on restarts, so that it is not the tighter one.
    limit = {f"{resources.cluster}_max_num_timeout": resources.requeues}
    limit = {} if resources.cluster == "debug" else limit
    try:
        executor = submitit.AutoExecutor(ranks[0].folder / "logs", cluster=resources.cluster, **limit)
        executor.update_parameters(**_parameters(name, resources))
        # The nodes import the launcher from the submission's working directory, thus from the code copy.
        # Submitit copies sbatch's message to stderr; it is suppressed because the UserError repeats it.
        with _inside(ranks[0].code), contextlib.redirect_stderr(io.StringIO()), executor.batch():
            return [executor.submit(rank) for rank in ranks]
    except (RuntimeError, ValueError, FailedJobError, FailedSubmissionError) as error:
        raise UserError(f"{_reason(error)}; nothing was submitted.") from None


def _parameters(name: str, resources: Resources) -> dict[str, Any]:
    fewest, _, nodes = resources.nodes.partition("-")
    values: dict[str, Any] = {
        "name": f"vqd-{name}",
        "nodes": int(nodes or fewest),
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
        # As in slurm/env.sh.
        "slurm_setup": ["unset SLURM_EXPORT_ENV", "export PATH"],
        "slurm_additional_parameters": {"requeue": True, "nodes": resources.nodes},
        # Only rank 0 exits with a nonzero code, after it has decided between a requeue and the end.
        "slurm_srun_args": ["--kill-on-bad-exit=1", f"--cpus-per-task={resources.cpus_per_task}"],
    }


@contextlib.contextmanager
def _inside(folder: Path) -> Generator[None]:
    previous = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(previous)


def _reason(error: Exception) -> str:
    """Return the first error line of Slurm's or Submitit's message, or its last line if none is marked."""
    lines = [line.partition("error: ")[2] for line in str(error).splitlines() if "error: " in line]
    text = next(iter(lines), last_line_of(str(error))).rstrip(".")
    return "this machine has no Slurm: launch with --cluster local" if '"srun"' in text else text


def _last_line(log: Path) -> str:
    try:
        return last_line_of(log.read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return "a rank ended with a user error, and its log cannot be read"
