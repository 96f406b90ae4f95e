"""Record of a launch and the state of its jobs, readable with or without Slurm's accounting."""

import os
import shutil
import signal
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter
from typing_extensions import TypedDict

from vqd_scale.core.atomic_io import publish_json, read_json
from vqd_scale.core.errors import UserError

Cluster = Literal["slurm", "local", "debug"]

CANCELED = "canceled"
"""Name of the marker file in a launch folder that prevents restarts of its jobs."""


class _Record(TypedDict):
    name: str
    cluster: Cluster
    jobs: tuple[Annotated[str, Field(pattern=r"^[A-Za-z0-9_]+$")], ...]
    run: str
    details: dict[str, Any]


class _Outcome(TypedDict):
    summary: str
    code: int


_RECORD, _OUTCOME = TypeAdapter(_Record), TypeAdapter(_Outcome)
_LAUNCH = "launch.json"
_ENDED = (
    "BOOT_FAIL",
    "CANCELLED",
    "COMPLETED",
    "DEADLINE",
    "FAILED",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "TIMEOUT",
)


@dataclass(frozen=True)
class Launch:
    """Record of a launch, stored as ``launch.json`` in its folder.

    Attributes:
        folder: Folder of the jobs' files.
        name: Name of the launched work, such as ``train``.
        cluster: Cluster on which the jobs run: ``slurm``, ``local`` or ``debug``.
        jobs: Job IDs; more than one for a job array.
        run: Folder of the run or of its results.
        details: Further metadata, such as the commands and the provenance.
    """

    folder: Path
    name: str
    cluster: Cluster
    jobs: tuple[str, ...]
    run: str
    details: dict[str, Any] = field(default_factory=dict[str, Any])

    @classmethod
    def read(cls, folder: Path) -> "Launch":
        """Load the record from a launch folder.

        Raises:
            UserError: The folder contains no launch record, or a damaged one.
        """
        return cls(folder, **read_json(folder / _LAUNCH, "launch", _RECORD))

    def write(self) -> None:
        """Write the record to ``launch.json`` in its folder."""
        values = {name: value for name, value in vars(self).items() if name != "folder"}
        publish_json(self.folder / _LAUNCH, values)

    def logs(self, job: str) -> tuple[Path, Path]:
        """Return the stdout and stderr log paths of a job's rank 0; the number 0 in the name is the rank."""
        logs = self.folder / "logs"
        return logs / f"{job}_0_log.out", logs / f"{job}_0_log.err"

    def states(self) -> dict[str, "State"]:
        """Return the current state of each job."""
        running = _states_of_slurm(self.jobs) if self.cluster == "slurm" else {}
        return {job: self._state(job, running.get(job)) for job in self.jobs}

    def cancel(self) -> None:
        """Cancel all running and queued jobs; they are not requeued.

        Raises:
            UserError: Slurm refuses.
        """
        (self.folder / CANCELED).touch()
        running = [job for job, state in self.states().items() if not state.has_ended]
        if self.cluster == "slurm" and running:
            _slurm("scancel", *running)
        for job in running if self.cluster == "local" else []:
            os.kill(int(job), signal.SIGTERM)

    def _state(self, job: str, slurm_state: str | None) -> "State":
        if slurm_state is not None:
            return State(slurm_state, None)
        if self.cluster == "local" and _is_running(int(job)):
            return State("running", None)
        outcome = outcome_file(self.folder, job)
        if outcome.exists():
            values = read_json(outcome, "outcome", _OUTCOME)
            return State(values["summary"], values["code"])
        summary = "canceled" if (self.folder / CANCELED).exists() else "ended without outcome: see its logs"
        return State(summary, 1)


@dataclass(frozen=True)
class State:
    """State of a job.

    Attributes:
        summary: Description of the state for the user.
        code: Exit code of the job; None while it is queued or running.
    """

    summary: str
    code: int | None

    @property
    def has_ended(self) -> bool:
        """True if the job has ended for good."""
        return self.code is not None


def newest_launch(folder: Path) -> Launch:
    """Load the launch of a launch folder, or the newest launch below a run's folder or a folder of launches.

    Raises:
        UserError: The folder contains no launch record.
    """
    folders = sorted(
        path.parent for pattern in ("", "*/", "jobs/*/") for path in folder.glob(f"{pattern}{_LAUNCH}")
    )
    if not folders:
        raise UserError(f"{folder}: contains no launch; name the folder of a run or of a launch.")
    return Launch.read(max(folders, key=lambda path: path.name))


def check_none_active(folder: Path) -> None:
    """Check that no job of an earlier launch is queued or running.

    Args:
        folder: Folder of the launches of a run.

    Raises:
        UserError: A job is; or Slurm refuses to list its jobs.
    """
    for path in sorted(folder.glob(f"*/{_LAUNCH}")):
        launch = Launch.read(path.parent)
        # Where Slurm is absent, the run was copied from another cluster.
        if launch.cluster == "slurm" and shutil.which("squeue") is None:
            continue
        for job, state in launch.states().items():
            if not state.has_ended:
                raise UserError(
                    f"{launch.run}: job {job} is {state.summary}; cancel it with `python tools/launch.py "
                    f"cancel {launch.folder}`, or choose another run folder."
                )


def outcome_file(folder: Path, job: str) -> Path:
    """Return the path of the file in which rank 0 of a job records its final outcome."""
    return folder / "outcomes" / f"{job}.json"


def is_running_in_slurm(job: str) -> bool:
    """Return whether Slurm lists a job as running; a requeue would revive a canceled or timed-out job."""
    return _slurm("squeue", "--noheader", "--format=%T", f"--jobs={job}").strip() == "RUNNING"


def _states_of_slurm(jobs: Sequence[str]) -> dict[str, str]:
    """Return the state of each job in Slurm's queue; ended and forgotten jobs are omitted."""
    numbers = ",".join(sorted({job.partition("_")[0] for job in jobs}))
    try:
        output = _slurm("squeue", "--noheader", "--array", "--format=%i|%T|%r|%N", f"--jobs={numbers}")
    except UserError as error:
        if "Invalid job id" in str(error):
            return {}
        raise
    states: dict[str, str] = {}
    for line in output.splitlines():
        job, state, reason, nodes = line.split("|")
        if state not in _ENDED:
            states[job] = f"{state.lower()} on {nodes}" if nodes else f"{state.lower()} ({reason})"
    return states


def _slurm(*command: str) -> str:
    program = shutil.which(command[0])
    if program is None:
        raise UserError(f"{command[0]}: not found; this machine has no Slurm.")
    result = subprocess.run([program, *command[1:]], capture_output=True, text=True, check=False)  # noqa: S603
    if result.returncode != 0:
        raise UserError(f"{command[0]}: {last_line_of(result.stderr) or 'failed'}")
    return result.stdout


def _is_running(process: int) -> bool:
    try:
        stat = Path(f"/proc/{process}/stat").read_text(encoding="utf-8")
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def last_line_of(text: str) -> str:
    """Return the last line that is not blank; empty if there is none."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""
