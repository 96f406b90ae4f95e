"""What was launched, and what has become of it: read by whoever asks, with or without Slurm's accounting."""

import os
import shutil
import signal
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from vqd_scale.core.atomic_io import publish_json, read_json
from vqd_scale.core.errors import UserError

Cluster = Literal["slurm", "local", "debug"]

CANCELLED = "cancelled"
"""A file of this name in a launch's folder says that its jobs are not to be started again."""

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
    """What was launched; its folder says so in ``launch.json``.

    Attributes:
        folder: Of the job's files.
        what: In words, such as ``train``.
        cluster: Where it runs.
        jobs: The numbers of its jobs, more than one for an array.
        run: The folder of the run, or of what it makes.
        details: What else is worth remembering.
    """

    folder: Path
    what: str
    cluster: Cluster
    jobs: tuple[str, ...]
    run: str
    details: dict[str, Any] = field(default_factory=dict[str, Any])

    @classmethod
    def read(cls, folder: Path) -> "Launch":
        """Read it back.

        Raises:
            UserError: Nothing was launched there.
        """
        values = read_json(folder / _LAUNCH, "launch")
        return cls(**(values | {"folder": folder, "jobs": tuple(values["jobs"])}))

    def write(self) -> None:
        """Write it into its folder."""
        values = {name: value for name, value in vars(self).items() if name != "folder"}
        publish_json(self.folder / _LAUNCH, values)

    def logs(self, job: str) -> tuple[Path, Path]:
        """Standard output and standard error of a job's first rank; other ranks' have other numbers."""
        logs = self.folder / "logs"
        return logs / f"{job}_0_log.out", logs / f"{job}_0_log.err"

    def states(self) -> dict[str, "State"]:
        """What has become of each job."""
        running = _states_of_slurm(self.jobs) if self.cluster == "slurm" else {}
        return {job: self._state(job, running.get(job)) for job in self.jobs}

    def cancel(self) -> None:
        """End all jobs that have not ended; they are not queued again.

        Raises:
            UserError: Slurm refuses.
        """
        (self.folder / CANCELLED).touch()
        going_on = [job for job, state in self.states().items() if not state.has_ended]
        if self.cluster == "slurm" and going_on:
            _slurm("scancel", *going_on)
        for job in going_on if self.cluster == "local" else []:
            os.kill(int(job), signal.SIGTERM)

    def _state(self, job: str, of_slurm: str | None) -> "State":
        if of_slurm is not None:
            return State(of_slurm, None)
        if self.cluster == "local" and _is_running(int(job)):
            return State("running", None)
        outcome = outcome_file(self.folder, job)
        if outcome.exists():
            values = read_json(outcome, "outcome")
            return State(values["said"], values["code"])
        why = "cancelled" if (self.folder / CANCELLED).exists() else "ended without a word: see its logs"
        return State(why, 1)


@dataclass(frozen=True)
class State:
    """What has become of a job.

    Attributes:
        said: In words.
        code: Its exit code, if it has ended.
    """

    said: str
    code: int | None

    @property
    def has_ended(self) -> bool:
        """Whether nothing more will come of it."""
        return self.code is not None


def newest_launch(folder: Path) -> Launch:
    """The launch that a folder is of, or the newest of a run's or of several.

    Raises:
        UserError: Nothing was launched there.
    """
    found = sorted(
        path.parent for pattern in ("", "*/", "jobs/*/") for path in folder.glob(f"{pattern}{_LAUNCH}")
    )
    if not found:
        raise UserError(f"{folder}: nothing was launched there; name a run's folder, or a launch's own.")
    return Launch.read(max(found, key=lambda path: path.name))


def outcome_file(folder: Path, job: str) -> Path:
    """Where a job's first rank writes how it ended for good."""
    return folder / "outcomes" / f"{job}.json"


def goes_on(job: str) -> bool:
    """Whether Slurm lets a job run; one that is cancelled or past its limit, a requeue would revive."""
    return _slurm("squeue", "--noheader", "--format=%T", f"--jobs={job}").strip() == "RUNNING"


def _states_of_slurm(jobs: Sequence[str]) -> dict[str, str]:
    """What the queue says; jobs that it has forgotten are left out."""
    numbers = ",".join(sorted({job.partition("_")[0] for job in jobs}))
    command = ["squeue", "--noheader", "--array", "--format=%i|%T|%r|%N", f"--jobs={numbers}"]
    try:
        listed = _slurm(*command)
    except UserError as error:
        if "Invalid job id" in str(error):
            return {}
        raise
    found: dict[str, str] = {}
    for line in listed.splitlines():
        job, state, reason, nodes = line.split("|")
        if state not in _ENDED:
            found[job] = f"{state.lower()} on {nodes}" if nodes else f"{state.lower()} ({reason})"
    return found


def _slurm(*command: str) -> str:
    program = shutil.which(command[0])
    if program is None:
        raise UserError(f"{command[0]}: not found; this machine knows no Slurm.")
    done = subprocess.run([program, *command[1:]], capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode != 0:
        raise UserError(f"{command[0]}: {last_line_of(done.stderr) or 'failed'}")
    return done.stdout


def _is_running(process: int) -> bool:
    try:
        stat = Path(f"/proc/{process}/stat").read_text(encoding="utf-8")
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def last_line_of(text: str) -> str:
    """The last line that says anything."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""
