import hashlib
import resource
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vqd_scale.core.atomic_io import (
    is_partial,
    publish_json,
    publish_text,
    published,
    read_json,
    sha256_of,
    writing,
)
from vqd_scale.core.errors import UserError

KILLED_WHILE_WRITING = """
import os, signal, sys
from pathlib import Path
from vqd_scale.core.atomic_io import published

with published(Path(sys.argv[1])) as partial:
    partial.write_text("half of")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def small_disk(tmp_path: Path) -> Generator[Path]:
    """Folder without room for a file of 64 KiB: a small file system if this user may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=32k", "none", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode == 0:
        yield folder
        subprocess.run(["umount", str(folder)], check=True)
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (32 * 1024, hard))
    yield folder
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_published_file_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folders" / "file.txt"
    with published(path) as partial:
        partial.write_text("whole")
        assert not path.exists()
    assert path.read_text() == "whole"
    assert names_in(path.parent) == ["file.txt"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_exception_keeps_the_old_file(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "file.txt"
    publish_text(path, "old")
    with pytest.raises(error), published(path) as partial:
        partial.write_text("new")
        raise error
    assert path.read_text() == "old"
    assert names_in(tmp_path) == ["file.txt"]


def test_killed_writer_leaves_no_file_and_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    killed = subprocess.run([sys.executable, "-c", KILLED_WHILE_WRITING, str(path)], check=False)
    assert killed.returncode == -9
    (name,) = names_in(tmp_path)
    assert is_partial(name)
    publish_text(path, "whole")
    assert names_in(tmp_path) == ["file.txt"]
    assert path.read_text() == "whole"


def test_full_disk_raises_user_error_and_leaves_no_file(small_disk: Path) -> None:
    path = small_disk / "big.txt"
    publish_text(path, "old")
    reason = "the disk is full|the file would be larger than this file system or its limit allows"
    with pytest.raises(UserError, match=rf"{path}: cannot be written: ({reason})"):
        publish_text(path, "x" * 65536)
    assert path.read_text() == "old"
    assert names_in(small_disk) == ["big.txt"]


def test_unwritable_folder_raises_user_error() -> None:
    # Even root cannot create folders in /sys.
    with pytest.raises(
        UserError, match=r"/sys/vqd/file: cannot be written: (permission was denied|the file system is)"
    ):
        publish_text(Path("/sys/vqd/file"), "text")


def test_file_in_place_of_folder_and_reverse(tmp_path: Path) -> None:
    publish_text(tmp_path / "file", "text")
    for path in (tmp_path / "file" / "below", tmp_path / "file" / "far" / "below"):
        with pytest.raises(UserError, match="a part of the path is a file, not a folder"):
            publish_text(path, "text")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="a folder of this name is in the way"):
        publish_text(tmp_path / "folder", "text")
    assert names_in(tmp_path) == ["file", "folder"]


def test_other_errors_keep_their_traceback(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), writing(tmp_path / "target"):
        (tmp_path / "absent").read_bytes()


json_values = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.text()
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(), inner, max_size=3)),
    max_leaves=10,
)


@given(json_values)
def test_json_round_trip(tmp_path_factory: pytest.TempPathFactory, value: object) -> None:
    path = tmp_path_factory.getbasetemp() / "value.json"
    publish_json(path, value)
    assert read_json(path, "value") == value


def test_json_rejects_nan(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        publish_json(tmp_path / "value.json", float("nan"))
    assert names_in(tmp_path) == []


def test_missing_and_invalid_json_raise_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent\.json: there is no index here"):
        read_json(tmp_path / "absent.json", "index")
    (tmp_path / "broken.json").write_text('{"a":')
    with pytest.raises(UserError, match=r"broken\.json: this index cannot be read"):
        read_json(tmp_path / "broken.json", "index")


@pytest.mark.parametrize("size", [0, 1, (1 << 20) - 1, 1 << 20, (1 << 20) + 1])
def test_sha256_around_block_size(tmp_path: Path, size: int) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * size)
    assert sha256_of(path) == hashlib.sha256(b"x" * size).hexdigest()


def test_folder_may_be_renamed_once_file_is_visible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace = Path.replace

    def and_rename_the_folder(self: Path, target: Path) -> Path:
        replace(self, target)
        return self.parent.rename(tmp_path / "final")

    monkeypatch.setattr(Path, "replace", and_rename_the_folder)
    publish_text(tmp_path / "partial" / "file", "whole")
    assert (tmp_path / "final" / "file").read_text() == "whole"


def test_concurrent_publishers_of_one_file(tmp_path: Path) -> None:
    path = tmp_path / "index.json"
    with published(path, shared=True) as first:
        first.write_text("first")
        with published(path, shared=True) as second:
            second.write_text("second")
        assert path.read_text() == "second"
    assert path.read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]
