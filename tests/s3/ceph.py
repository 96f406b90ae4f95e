"""A real S3 server: a Ceph monitor, a storage daemon that keeps objects in memory, and a RADOS gateway.

All of them listen on 127.0.0.1 and keep their files in a temporary folder; they end with the context. To try
something by hand, a command can be run beside a server, with the variables set that AWS's tools read:

    python -m tests.s3.ceph COMMAND [ARGUMENT ...]
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests.background_programs import ended_afterwards, free_ports

PROGRAMS = ("ceph", "ceph-authtool", "ceph-mon", "ceph-osd", "monmaptool", "radosgw", "radosgw-admin")
PACKAGES = "ceph-common ceph-mon ceph-osd radosgw"
ACCESS_KEY, SECRET_KEY = "shard-reader", "known-to-all-on-this-machine"
SECONDS_TO_START = 120

CONFIGURATION = """
[global]
fsid = {cluster}
mon host = v2:127.0.0.1:{monitor_port}
public addr = 127.0.0.1
cluster addr = 127.0.0.1
keyring = {folder}/keyring
run dir = {folder}
log file = {folder}/$name.log
admin socket =
mon data = {folder}/mon
mon data avail crit = 1
mon allow pool size one = true
mon max pg per osd = 1000
osd data = {folder}/osd
osd objectstore = memstore
memstore device bytes = {capacity}
osd crush chooseleaf type = 0
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 1
osd pool default pg autoscale mode = off
rgw frontends = beast endpoint=127.0.0.1:{port}
rgw thread pool size = 16
"""


def missing_programs() -> list[str]:
    """Return the programs of Ceph that this machine lacks."""
    return [program for program in PROGRAMS if shutil.which(program) is None]


@contextmanager
def s3_server(capacity: int = 4 << 30) -> Generator[dict[str, str]]:
    """Run a server and yield the environment variables for its clients.

    Args:
        capacity: Bytes of objects at most.
    """
    port, monitor_port = free_ports(2)
    cluster, storage = str(uuid.uuid4()), str(uuid.uuid4())
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ceph-")))
        configuration, keyring, monitors = folder / "ceph.conf", folder / "keyring", folder / "monitors"
        configuration.write_text(
            CONFIGURATION.format(
                cluster=cluster, folder=folder, port=port, monitor_port=monitor_port, capacity=capacity
            )
        )
        (folder / "mon").mkdir()
        (folder / "osd").mkdir()

        def run(program: str, *arguments: str) -> None:
            command = [program, "-c", str(configuration), *arguments]
            completed = subprocess.run(
                command, capture_output=True, text=True, check=False, timeout=SECONDS_TO_START
            )
            if completed.returncode != 0:
                raise RuntimeError(f"{' '.join(command)}: {completed.stdout}{completed.stderr}")

        def start(program: str, *arguments: str) -> None:
            stack.enter_context(daemon(program, "-c", str(configuration), "-f", *arguments))

        run("ceph-authtool", "-C", str(keyring), "--gen-key", "-n", "mon.", "--cap", "mon", "allow *")
        everything = ("--cap", "mon", "allow *", "--cap", "osd", "allow *")
        for name in ("client.admin", "osd.0"):
            run("ceph-authtool", str(keyring), "--gen-key", "-n", name, *everything)
        address = f"[v2:127.0.0.1:{monitor_port}]"
        run("monmaptool", "--create", "--fsid", cluster, "--addv", "a", address, str(monitors))
        run("ceph-mon", "--mkfs", "-i", "a", "--monmap", str(monitors), "--keyring", str(keyring))
        start("ceph-mon", "-i", "a")
        run("ceph", "osd", "new", storage)
        run("ceph-osd", "--mkfs", "-i", "0", "--osd-uuid", storage)
        start("ceph-osd", "-i", "0")
        keys = ("--access-key", ACCESS_KEY, "--secret-key", SECRET_KEY)
        run("radosgw-admin", "user", "create", "--uid", "tests", "--display-name", "tests", *keys)
        start("radosgw", "-n", "client.admin")
        endpoint = f"http://127.0.0.1:{port}"
        wait_for(endpoint)
        yield {
            "AWS_ENDPOINT_URL": endpoint,
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
        }


@contextmanager
def daemon(*command: str) -> Generator[None]:
    """Run a program in the background during the block."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    with ended_afterwards(process):
        yield


def wait_for(url: str) -> None:
    """Wait until a server responds."""
    deadline = time.monotonic() + SECONDS_TO_START
    while True:
        try:
            urllib.request.urlopen(url, timeout=5).close()
        except (urllib.error.URLError, OSError):
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)
        else:
            return


if __name__ == "__main__":
    if missing := missing_programs():
        sys.exit(f"missing: {', '.join(missing)}; on Debian and Ubuntu: apt-get install {PACKAGES}")
    with s3_server() as variables:
        sys.exit(subprocess.run(sys.argv[1:], env=os.environ | variables, check=False).returncode)
