"""Lock of a run folder, so that two processes never train in it at once; also over NFS, without `flock`.

The lock is a file ``.lock-N.json`` with its owner. It is created by a hard link, which only one process can
do, and the owner updates its mtime regularly. Another process compares no clocks: it observes whether mtime
changes. If not, it creates ``.lock-(N+1).json`` and deletes the older file. The highest number counts, and a
former owner that continues notices it before its next save.
"""

import logging
import os
import re
import secrets
import socket
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

from pydantic import BaseModel, TypeAdapter

from vqd_scale.core.atomic_io import publish_json, read_json, writing
from vqd_scale.core.errors import UserError
from vqd_scale.core.watchdog import beat

logger = logging.getLogger(__name__)

BEAT_SECONDS = 15.0
"""Seconds between two updates of the lock."""
EXPIRY_SECONDS = 120.0
"""Seconds without an update after which another process takes over; NFS shows updates a minute late."""

_POLL_SECONDS = 0.5


class Owner(BaseModel):
    """Process that trains in a run folder.

    Attributes:
        host: Name of its host.
        pid: Process ID.
        machine: Boot of the host and namespace of its process IDs; empty if unknown.
        started: Start time of the process, in the kernel's ticks: process IDs are reused.
        job: Slurm's job ID; empty outside of jobs.
        restarts: Number of the job's restarts.
        folder: Inode of the run folder: a copy of the folder has another.
        token: Random token of this lock.
    """

    host: str
    pid: int
    machine: str
    started: str
    job: str
    restarts: str
    folder: int
    token: str

    @classmethod
    def of_this_process(cls, folder: Path) -> "Owner":
        """Return this process as the owner of a folder."""
        return cls(
            host=socket.gethostname(),
            pid=os.getpid(),
            machine=_machine(),
            started=_start_of(os.getpid()),
            job=os.environ.get("SLURM_JOB_ID", ""),
            restarts=os.environ.get("SLURM_RESTART_COUNT", "0"),
            folder=folder.stat().st_ino,
            token=secrets.token_hex(8),
        )

    @property
    def description(self) -> str:
        """Return the process as a noun phrase."""
        return f"process {self.pid} on {self.host}" + (f" (job {self.job})" if self.job else "")

    def is_alive(self, observer: "Owner") -> bool | None:
        """Return whether this owner still trains, as seen by another process; ``None`` if that is unknown."""
        if self.folder != observer.folder:
            return False
        if self.machine and self.machine == observer.machine:
            return bool(self.started) and _start_of(self.pid) == self.started
        if self.job and self.job == observer.job and self.restarts != observer.restarts:
            return False
        return None


_OWNER = TypeAdapter(Owner)


class RunLock:
    """Lock of a run folder, held from `acquire` to `close`.

    Args:
        folder: Existing run folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._path: Path | None = None
        self._stop = threading.Event()

    def acquire(self) -> None:
        """Take the lock; wait until an owner on another host shows that it is alive, or expires.

        Raises:
            UserError: Another process trains in this folder.
        """
        owner = Owner.of_this_process(self.folder)
        while self._path is None:
            newest = _newest(self.folder)
            number = 0 if newest is None else int(_number(newest))
            if newest is not None:
                _wait_until_free(self.folder, newest, owner)
            self._link(self.folder / f".lock-{number + 1}.json", owner)
        threading.Thread(target=self._beat, args=(self._path,), name="run lock", daemon=True).start()

    def check(self) -> None:
        """Check that no other process has taken over, as after a suspension of this machine.

        Raises:
            UserError: Another process owns the folder.
        """
        newest = _newest(self.folder)
        if self._path is not None and newest is not None and newest != self._path:
            owner = _owner(newest)
            successor = "another process" if owner is None else owner.description
            raise UserError(
                f"{self.folder}: {successor} took over this run while this process did not respond; end one."
            )

    def close(self) -> None:
        """Release the lock; its number stays in use."""
        self._stop.set()
        if self._path is not None and _newest(self.folder) == self._path:
            # Written in place: a full disk has no room for another file.
            with suppress(OSError):
                os.truncate(self._path, 0)
        self._path = None

    def _link(self, path: Path, owner: Owner) -> None:
        """Create the lock file, unless another process is faster; delete the older ones."""
        content = path.with_name(f".lock-{owner.token}")
        publish_json(content, owner.model_dump())
        try:
            os.link(content, path)
        except FileExistsError:
            return
        except OSError:
            # A file system without hard links: two starts at the same moment are not told apart.
            with writing(path):
                content.rename(path)
        finally:
            content.unlink(missing_ok=True)
        if _newest(self.folder) == path:
            self._path = path
        else:
            path.unlink(missing_ok=True)
        for older in _files(self.folder):
            if int(_number(older)) < int(_number(path)):
                older.unlink(missing_ok=True)

    def _beat(self, path: Path) -> None:
        while not self._stop.wait(BEAT_SECONDS):
            # Deleted by a process that took over: `check` reports it.
            with suppress(OSError):
                os.utime(path)


def check_free(folder: Path) -> None:
    """Check that no process of this host trains in a folder; one on another host is not waited for.

    Raises:
        UserError: Another process trains in this folder.
    """
    newest = _newest(folder)
    owner = None if newest is None else _owner(newest)
    if owner is not None and owner.is_alive(Owner.of_this_process(folder)):
        raise _refusal(folder, owner)


def _wait_until_free(folder: Path, path: Path, observer: Owner) -> None:
    """Return once the owner of a lock has ended or expired; raise `UserError` as soon as it is alive."""
    owner = _owner(path)
    if owner is None:
        return
    is_alive, before, start = owner.is_alive(observer), _mtime(path), time.monotonic()
    if is_alive is None:
        logger.warning(
            "%s: %s trained here; waiting up to %.0f s for a sign of it.",
            folder,
            owner.description,
            EXPIRY_SECONDS,
        )
    while is_alive is None and time.monotonic() - start < EXPIRY_SECONDS:
        time.sleep(_POLL_SECONDS)
        beat()
        if (now := _mtime(path)) is None or _owner(path) != owner:
            # Released, or taken over by a third process.
            return
        if now != before:
            is_alive = True
    if is_alive:
        raise _refusal(folder, owner)
    logger.warning(
        "%s: %s has ended without releasing it; this process takes over.", folder, owner.description
    )


def _refusal(folder: Path, owner: Owner) -> UserError:
    return UserError(f"{folder}: {owner.description} trains here; end it first, or name another run folder.")


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.glob(".lock-*.json") if _number(path)]


def _number(path: Path) -> str:
    match = re.fullmatch(r"\.lock-([0-9]{1,18})\.json", path.name)
    return match[1] if match else ""


def _newest(folder: Path) -> Path | None:
    return max(_files(folder), key=lambda path: int(_number(path)), default=None)


def _owner(path: Path) -> Owner | None:
    """Return the owner in a lock file; ``None`` if it is released, deleted or damaged."""
    try:
        return read_json(path, "lock of a run folder", _OWNER)
    except UserError:
        return None


def _mtime(path: Path) -> int | None:
    try:
        # Opened, because NFS then asks the server.
        with path.open("rb") as file:
            return os.fstat(file.fileno()).st_mtime_ns
    except OSError:
        return None


def _machine() -> str:
    if sys.platform != "linux":
        return ""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    return f"{boot} {Path('/proc/self/ns/pid').stat().st_ino}"


def _start_of(pid: int) -> str:
    """Return the start time of a process; empty if it has ended, or is a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]
