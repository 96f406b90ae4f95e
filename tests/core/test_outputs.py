import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vqd_scale.core.atomic_io import publish_text
from vqd_scale.core.errors import UserError
from vqd_scale.core.outputs import MARKER, check_output, published_folder, reserve, safe_name

KILLED_WHILE_WRITING = """
import os, signal, sys
from pathlib import Path
from vqd_scale.core.outputs import published_folder

with published_folder(Path(sys.argv[1]), "tool") as partial:
    (partial / "config.json").write_text("half of")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def names_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def write(folder: Path, text: str, *further: str, purpose: str = "tool") -> None:
    """Publish a folder of a description, weights in a subfolder, and further files."""
    with published_folder(folder, purpose) as partial:
        for name in ("config.json", "part/weights", *further):
            (partial / name).parent.mkdir(exist_ok=True)
            (partial / name).write_text(text)


def test_published_folder_lists_its_files(tmp_path: Path) -> None:
    write(tmp_path / "new" / "out", "first")
    assert names_in(tmp_path) == [f"new/out/{name}" for name in (MARKER, "config.json", "part/weights")]
    marker = json.loads((tmp_path / "new" / "out" / MARKER).read_text())
    assert marker == {"tool": ["config.json", "part/weights"]}


def test_published_folder_replaces_only_its_files(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(out, "first")
    (out / "part" / "notes.txt").write_text("mine")
    (out / "more").write_text("mine")
    write(out, "second")
    assert names_in(out) == [MARKER, "config.json", "more", "part/notes.txt", "part/weights"]
    assert [(out / name).read_text() for name in names_in(out)[1:]] == ["second", "mine", "mine", "second"]
    with pytest.raises(UserError, match=f"{out / 'more'}: is in the way"):
        write(out, "third", "more")
    assert [(out / name).read_text() for name in names_in(out)[1:]] == ["second", "mine", "mine", "second"]
    assert list(tmp_path.iterdir()) == [out]


def test_published_folder_follows_no_link_inside_it(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(out, "first")
    (out / "part").rename(tmp_path / "elsewhere")
    (out / "part").symlink_to("../elsewhere")
    with pytest.raises(UserError, match=f"{out / 'part'}: is in the way"):
        write(out, "second")
    assert (tmp_path / "elsewhere" / "weights").read_text() == "first"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_exception_keeps_the_old_folder(tmp_path: Path, error: type[BaseException]) -> None:
    write(tmp_path / "out", "first")
    with pytest.raises(error), published_folder(tmp_path / "out", "tool") as partial:
        (partial / "config.json").write_text("second")
        raise error
    assert (tmp_path / "out" / "config.json").read_text() == "first"
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_killed_writer_leaves_no_folder_and_is_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out"
    (tmp_path / "out.partial").mkdir()
    (tmp_path / ".out.partial").write_text("mine")
    command = [sys.executable, "-c", KILLED_WHILE_WRITING, str(out)]
    assert subprocess.run(command, check=False).returncode == -9
    assert len(list(tmp_path.iterdir())) == 3
    assert not out.exists()
    write(out, "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.partial", "out", "out.partial"]


def test_folder_of_another_purpose_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "out", "first")
    with pytest.raises(UserError, match=r"is in the way, as other did not write it"):
        reserve(tmp_path / "out", "other", [])
    with pytest.raises(UserError, match=r"is in the way, as other did not write it"):
        write(tmp_path / "out", "", purpose="other")


def test_reserved_names_stay_and_new_ones_are_checked(tmp_path: Path) -> None:
    out = tmp_path / "out"
    reserve(out, "tool", ["a.png"])
    publish_text(out / "a.png", "ours")
    (out / "b.png").write_text("mine")
    reserve(out, "tool", ["a.png"])
    with pytest.raises(UserError, match=f"{out / 'b.png'}: is in the way, as tool did not write it"):
        reserve(out, "tool", ["a.png", "b.png"])
    reserve(out, "tool", ["c.png"])
    assert check_output(out, "tool") == {"tool": ["a.png", "c.png"]}


def test_entries_beside_the_output_are_allowed_by_name(tmp_path: Path) -> None:
    (tmp_path / "run" / "jobs").mkdir(parents=True)
    with pytest.raises(UserError, match="jobs: is in the way"):
        check_output(tmp_path / "run", "tool")
    reserve(tmp_path / "run", "tool", ["a"], siblings=["jobs"])
    (tmp_path / "run" / "notes").write_text("mine")
    reserve(tmp_path / "run", "plotter", ["b"], siblings=None)
    assert check_output(tmp_path / "run", "tool") == {"tool": ["a"], "plotter": ["b"]}


def test_link_to_an_output_folder_is_followed(tmp_path: Path) -> None:
    write(tmp_path / "out", "first")
    (tmp_path / "link").symlink_to("out")
    write(tmp_path / "link", "second")
    assert (tmp_path / "out" / "config.json").read_text() == "second"
    assert (tmp_path / "link").is_symlink()


@pytest.mark.parametrize("content", ["[]", "{", '{"tool": "a"}', '{"tool": [1]}', "null"])
def test_damaged_marker_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / MARKER).write_text(content)
    with pytest.raises(UserError, match=f"{MARKER}: damaged"):
        check_output(tmp_path / "out", "tool")


def test_files_that_a_marker_of_others_lists_are_not_deleted(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "notes").write_text("mine")
    names = ["../notes", str(tmp_path / "notes"), "config.json"]
    (tmp_path / "out" / MARKER).write_text(json.dumps({"tool": names}))
    write(tmp_path / "out", "ours")
    assert (tmp_path / "notes").read_text() == "mine"


@pytest.mark.parametrize("name", ["", ".", "..", "/", "a/..", "a\0b", "a\udcff", "x" * 300])
def test_path_without_a_usable_name_is_refused(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"allowed: a folder with a name of its own|name is too long"):
        reserve(Path(name), "tool", [])
    assert not list(tmp_path.iterdir())


HOSTILE = [
    *("", ".", "..", "../up", "/absolute", "a/b", "a\\b", "a\0b", "a\nb", "x" * 300, "\u00e4" * 200),
    *("~", "\udcff", "nul", "con.txt", "com1", "-rf", ".hidden", "end.", "end ", "Cat", "cat", "CAT"),
    *("a:b", "*", "\u202e", "grid"),
]


def test_hostile_keys_become_different_names_in_the_folder(tmp_path: Path) -> None:
    names = {safe_name(key, ["grid"]).casefold() for key in HOSTILE}
    assert len(names) == len(HOSTILE)
    for name in names:
        (tmp_path / f"{name}.png").write_text("")
    assert len(list(tmp_path.iterdir())) == len(HOSTILE)


@given(st.lists(st.text(max_size=150), unique=True, max_size=20))
def test_different_keys_have_different_names(keys: list[str]) -> None:
    every_key = {*keys, *map(safe_name, keys)}
    assert len(set(map(safe_name, every_key))) == len(every_key)
    for key in keys:
        name = safe_name(key)
        assert name == name.casefold() == Path(name).name
        assert 0 < len(name.encode()) <= 100
        assert name not in (".", "..")


@pytest.mark.parametrize(
    "key", ["000012", "n01440764_10026", "00001-00002", "seed=0,sampler=strided 4,scale=1.0"]
)
def test_plain_keys_stay(key: str) -> None:
    assert safe_name(key) == key
