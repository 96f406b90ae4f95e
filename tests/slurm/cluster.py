"""A real Slurm on this machine: an authentication daemon, a controller, and a daemon for each node.

Each node is a process namespace, so that it can be lost as a machine is: at once and with
all that runs on it. Everything listens on the loopback device, keeps its files in a temporary folder and ends
with the context. Names of nodes must have addresses, so /etc/hosts has a few more lines while it runs. A
command can be run beside a cluster:

    python -m tests.slurm.cluster bash
"""

import fcntl
import os
import re
import secrets
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from tests.background_programs import ended_afterwards, free_ports

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel", "unshare")
PACKAGES = "slurm-wlm munge"
HOSTS = Path("/etc/hosts")
MARK = "# a Slurm cluster of vqd-scale's tests:"
SECONDS_TO_START = 60
SECONDS_TO_NOTICE_A_LOST_NODE = 45
"""Longer than the watchdog of a test whose node is frozen, which bounds the imports too."""
NODES_ARE_CHECKED_EVERY = 30
"""Seconds between two looks of the controller at its nodes, and at the time limits of its jobs."""

# A requeue waits for credentials to expire, so cred_expire is short. A container may lack cgroups.
CONFIGURATION = """
ClusterName=tests
SlurmctldHost={machine}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmctldDebug=info
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SlurmdParameters=config_overrides
SlurmdTimeout={seconds_to_notice}
KillWait=3
MinJobAge=600
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerParameters=batch_sched_delay=0,sched_interval=2,sched_min_interval=0,requeue_delay=1
{nodes}
PartitionName=tests Nodes=ALL Default=YES MaxTime=60 State=UP PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=ALL MaxTime=60 State=UP PriorityTier=10 PreemptMode=OFF
"""


def missing() -> str | None:
    """Return why a cluster cannot be started on this machine, or ``None``."""
    absent = [program for program in PROGRAMS if shutil.which(program, path=_path()) is None]
    if absent:
        return f"Slurm is not installed ({', '.join(absent)}): as root, apt-get install {PACKAGES}"
    if os.geteuid() != 0:
        return "a cluster of nodes on one machine is started by root only"
    alone = ["unshare", "--pid", "--fork", "--mount-proc", "true"]
    if subprocess.run(alone, capture_output=True, check=False).returncode != 0:
        return "this machine allows no process namespaces, which stand for nodes"
    return None


@dataclass(frozen=True)
class Job:
    """State of a job in the controller; ``scontrol show job`` has more.

    Attributes:
        state: Such as ``RUNNING``, ``COMPLETED``, ``FAILED``.
        restarts: How often it was requeued.
        exit_code: Of its script.
        nodes: The names of its nodes, as Slurm abbreviates them.
    """

    state: str
    restarts: int
    exit_code: int
    nodes: str

    @property
    def has_ended(self) -> bool:
        """Return whether the job is in a final state."""
        return self.state not in ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "REQUEUED", "SUSPENDED")


@dataclass
class Cluster:
    """A running cluster.

    Attributes:
        folder: Its configuration, state and logs.
        names: Its nodes.
        variables: Environment of Slurm's commands and of the jobs.
    """

    folder: Path
    names: list[str]
    variables: dict[str, str]
    _nodes: dict[str, "subprocess.Popen[bytes]"] = field(default_factory=dict[str, "subprocess.Popen[bytes]"])

    def run(self, *command: str, check: bool = True) -> "subprocess.CompletedProcess[str]":
        """Run a command of the cluster."""
        completed = subprocess.run(
            command, env=os.environ | self.variables, capture_output=True, text=True, check=False, timeout=120
        )
        if check and completed.returncode != 0:
            raise RuntimeError(f"{' '.join(command)}: {completed.stdout}{completed.stderr}")
        return completed

    def submit(self, *arguments: str, **variables: str) -> str:
        """Run ``sbatch`` and return the job's number."""
        command = ["sbatch", "--parsable", *arguments]
        completed = subprocess.run(
            command,
            env=os.environ | self.variables | variables,
            capture_output=True,
            text=True,
            check=False,
        )
        if completed.returncode != 0:
            raise RuntimeError(f"{' '.join(command)}: {completed.stdout}{completed.stderr}")
        return completed.stdout.strip().partition(";")[0]

    def job(self, number: str) -> Job:
        """Return the state of a job, or of a task of an array (``12_3``)."""
        description = self.run("scontrol", "--oneliner", "show", "job", number).stdout

        def value(key: str) -> str:
            match = re.search(rf"\b{key}=(\S*)", description)
            return match.group(1) if match else ""

        code, _, killed_by = value("ExitCode").partition(":")
        status = int(code or 0) or (128 + int(killed_by) if killed_by and int(killed_by) else 0)
        return Job(value("JobState"), int(value("Restarts") or 0), status, value("NodeList"))

    def until(self, happens: Callable[[], bool], seconds: float = 240, why: str = "") -> None:
        """Wait for a condition of a job or of the controller.

        Raises:
            TimeoutError: The condition was not met in time.
        """
        deadline = time.monotonic() + seconds
        while not happens():
            if time.monotonic() > deadline:
                state = (
                    self.run("squeue", "--all", check=False).stdout + self.run("sinfo", check=False).stdout
                )
                log_lines = (self.folder / "slurmctld.log").read_text().splitlines()[-20:]
                raise TimeoutError("\n".join([f"not within {seconds} s: {why}", state, *log_lines]))
            time.sleep(0.2)

    def finished(self, number: str, seconds: float = 300) -> Job:
        """Wait until a job is in a final state and return it."""
        self.until(lambda: self.job(number).has_ended, seconds, f"the end of job {number}")
        return self.job(number)

    def lose(self, name: str) -> None:
        """Kill a node with all its processes."""
        node = self._nodes.pop(name)
        node.kill()
        node.wait()

    def freeze(self, name: str) -> None:
        """Freeze a node, as behind a cut network."""
        for pid in self.processes(name):
            os.kill(pid, signal.SIGSTOP)

    @contextmanager
    def frozen(self, words: str) -> Generator[None]:
        """Stop all processes whose command line begins with ``words`` during the block; signals wait."""
        pids = [pid for name in self._nodes for pid in self.processes(name, words)]
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)

    def start(self, name: str) -> None:
        """Start a node and wait until it is ready."""
        # `unshare` is the parent of the namespace's first process; with it all of the namespace ends.
        command = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child", "slurmd", "-D", "-N", name]
        self._nodes[name] = _started(command, self.folder / f"{name}.out", self.variables)
        ready = ("idle", "mixed", "allocated")
        self.until(lambda: self.state(name) in ready, SECONDS_TO_START, f"{name} is ready")

    def state(self, name: str) -> str:
        """Return a node's state in the controller."""
        return self.run(
            "sinfo", "--noheader", "--nodes", name, "--format", "%T", "-p", "tests"
        ).stdout.strip()

    def processes(self, name: str, words: str = "") -> list[int]:
        """Return a node's processes whose command line begins with these words."""
        first = self._nodes[name].pid
        parents = {pid: _parent(pid) for pid in _all_processes()}

        def is_of_node(pid: int) -> bool:
            while pid > 1:
                if pid == first:
                    return True
                pid = parents.get(pid, 0)
            return False

        return [pid for pid in parents if pid != first and is_of_node(pid) and _words(pid).startswith(words)]

    def close(self) -> None:
        """Kill all nodes."""
        for name in list(self._nodes):
            self.lose(name)


@contextmanager
def slurm_cluster(nodes: int = 2) -> Generator[Cluster]:
    """Run a cluster.

    Args:
        nodes: How many.
    """
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="slurm-")))
        names = [f"vqd{number}" for number in range(1, nodes + 1)]
        addresses = {name: f"127.0.10.{number}" for number, name in enumerate(names, start=1)}
        stack.enter_context(_named(addresses, f"{MARK} {folder.name}"))
        port, *ports = free_ports(1 + nodes)
        machine = os.uname().nodename
        described = [
            f"NodeName={name} NodeHostname={machine} NodeAddr={addresses[name]} Port={its_port} CPUs=96 "
            f"RealMemory=64000 Gres=gpu:8 State=UNKNOWN"
            for name, its_port in zip(names, ports, strict=True)
        ]
        configuration = folder / "slurm.conf"
        configuration.write_text(
            CONFIGURATION.format(
                machine=machine,
                folder=folder,
                port=port,
                nodes="\n".join(described),
                seconds_to_notice=SECONDS_TO_NOTICE_A_LOST_NODE,
            )
        )
        # Eight dummy devices stand for GPUs, so that scripts can request them.
        for number in range(8):
            os.mknod(folder / f"gpu{number}", stat.S_IFCHR | 0o600, Path(os.devnull).stat().st_rdev)
        (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-7]\n")
        (folder / "state").mkdir()
        # Otherwise Gloo resolves the machine's name, which may have no address.
        variables = {
            "SLURM_CONF": str(configuration),
            "PATH": _path(),
            "GLOO_SOCKET_IFNAME": "lo",
            "OMP_NUM_THREADS": "1",
        }
        key = folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(128))
        munge = ["munged", "--foreground", "--force", f"--key-file={key}", f"--socket={folder}/munge.socket"]
        munge += [f"--{file_kind}-file={folder}/munged.{file_kind}" for file_kind in ("pid", "seed", "log")]
        stack.enter_context(_daemon(munge, folder / "munged.out", variables))
        cluster = Cluster(folder, names, variables)
        cluster.until((folder / "munge.socket").exists, SECONDS_TO_START, "munged answers")
        stack.enter_context(_daemon(["slurmctld", "-D"], folder / "slurmctld.out", variables))
        stack.callback(cluster.close)
        answers = ("scontrol", "ping")
        cluster.until(
            lambda: "UP" in cluster.run(*answers, check=False).stdout, SECONDS_TO_START, "slurmctld answers"
        )
        for name in names:
            cluster.start(name)
        yield cluster


@contextmanager
def _named(addresses: dict[str, str], mark: str) -> Generator[None]:
    """Add names to /etc/hosts during the block, in lines that end with a marker."""
    with _hosts() as file:
        _rewrite(file, [*file, *(f"{address} {name} {mark}\n" for name, address in addresses.items())])
    try:
        yield
    finally:
        with _hosts() as file:
            _rewrite(file, [line for line in file if mark not in line])


@contextmanager
def _hosts() -> Generator[IO[str]]:
    with HOSTS.open("r+", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield file


def _rewrite(file: IO[str], lines: list[str]) -> None:
    file.seek(0)
    file.truncate()
    file.writelines(lines)


@contextmanager
def _daemon(command: list[str], output: Path, variables: dict[str, str]) -> Generator[None]:
    with ended_afterwards(_started(command, output, variables)):
        yield


def _started(command: list[str], output: Path, variables: dict[str, str]) -> "subprocess.Popen[bytes]":
    with output.open("ab") as file:
        return subprocess.Popen(
            command, env=os.environ | variables, stdin=subprocess.DEVNULL, stdout=file, stderr=file
        )


def _path() -> str:
    """Return PATH with the folders in which Debian installs the daemons."""
    return f"{os.environ['PATH']}:/usr/sbin:/sbin"


def _all_processes() -> list[int]:
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]


def _parent(pid: int) -> int:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return int(stat.rpartition(")")[2].split()[1])


def _words(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except (FileNotFoundError, ProcessLookupError):
        return ""


if __name__ == "__main__":
    if reason := missing():
        sys.exit(reason)
    with slurm_cluster() as running:
        sys.exit(subprocess.run(sys.argv[1:], env=os.environ | running.variables, check=False).returncode)
