"""What `make setup` and the tools answer to an interpreter that will not do."""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tools" / "_environment.py"
THIS = ".".join(map(str, sys.version_info[:3]))


def ask(script: Path, *arguments: str, **variables: str) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, str(script), *arguments],
        env=os.environ | variables,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A tree that supports only a Python of the future, and its copy of the script."""
    shutil.copytree(ROOT / "tools", tmp_path / "tools")
    text = (ROOT / "pyproject.toml").read_text()
    bounds = re.sub(r'requires-python = ".*"', 'requires-python = ">=3.98,<3.100"', text)
    (tmp_path / "pyproject.toml").write_text(bounds)
    return tmp_path


def test_interpreters_that_are_refused_can_read_the_script() -> None:
    ast.parse(SCRIPT.read_text(encoding="utf-8"), feature_version=(3, 6))


def test_an_interpreter_outside_the_range_is_refused_and_another_named(tree: Path) -> None:
    script = tree / "tools" / "_environment.py"
    alone = {"PATH": "", "PYENV_ROOT": str(tree / "none")}
    code, _, sentence = ask(script, "check", "python", "lock", **alone)
    assert (code, sentence.count("\n")) == (2, 1)
    assert sentence.startswith("make setup: Python 3.98 to 3.99 is needed, and ")
    assert sentence.endswith("install one of these versions: none is on this machine.\n")
    newer = tree / "bin" / "python3.99"
    newer.parent.mkdir()
    newer.write_text("#!/bin/sh\necho 3 99 1\necho /opt/python3.99\n")
    newer.chmod(0o755)
    _, _, sentence = ask(script, "check", "python", "lock", **alone | {"PATH": str(newer.parent)})
    assert sentence.endswith("on this machine: make setup PYTHON=/opt/python3.99.\n")
    _, listed, _ = ask(script, "list", **alone | {"PATH": str(newer.parent)})
    assert listed == "3.98 missing\n3.99 /opt/python3.99\n"


def test_a_python_without_the_package_says_so() -> None:
    done = subprocess.run(
        # Without `site` no installed package is seen.
        [sys.executable, "-S", "tools/sample.py", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(
        r"sample\.py: .* lacks the package '\w+'; (run `make setup`|start the tool).*\n", done.stderr
    )


def test_a_defect_of_the_package_keeps_its_traceback(tmp_path: Path) -> None:
    run = "from _environment import run; run('vqd_scale.cli.no_such_tool')"
    done = subprocess.run(
        [sys.executable, "-c", run],
        env=os.environ | {"PYTHONPATH": str(ROOT / "tools")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "ModuleNotFoundError: No module named 'vqd_scale.cli.no_such_tool'" in done.stderr


def test_the_environment_there_is_compared_with_the_one_asked_for(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "tools", tmp_path / "tools")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    script = tmp_path / "tools" / "_environment.py"
    assert ask(script, "check", "python", "lock") == (0, "", "")
    interpreter = tmp_path / ".venv" / "bin" / "python"
    interpreter.parent.mkdir(parents=True)
    interpreter.symlink_to(sys.executable)
    (tmp_path / ".venv" / "done").mkdir()
    (tmp_path / ".venv" / "done" / "torch").write_text("lock\n")
    assert ask(script, "check", "python", "lock") == (0, "", "")
    remedy = "; remove it, then try again.\n"
    code, _, sentence = ask(script, "check", "site")
    assert (code, sentence) == (2, f"make setup: {tmp_path / '.venv'} is with TORCH=lock{remedy}")
    interpreter.unlink()
    interpreter.write_text("#!/bin/sh\necho 3 98 1\necho /opt/python3.98\n")
    interpreter.chmod(0o755)
    assert ask(script, "check", "lock") == (0, "", "")
    code, _, sentence = ask(script, "check", "python")
    assert (code, sentence) == (
        2,
        f"make setup: {tmp_path / '.venv'} is of Python 3.98.1, not {THIS}{remedy}",
    )


@pytest.mark.parametrize(
    ("version", "code", "sentence"),
    [
        ("2.10.0", 0, ""),
        ("2.10.0a0+b4e4ee81d3.nv25.11", 0, ""),
        ("3.0.1+cpu", 0, ""),
        ("2.9.1", 2, r"is 2\.9\.1, and 2\.10 or newer is needed"),
        ("", 2, r"is of an unknown version"),
    ],
)
def test_a_torch_of_the_site_is_taken_from_the_lowest_version_on(
    tmp_path: Path, version: str, code: int, sentence: str
) -> None:
    for name in ("torch", "torchvision"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise RuntimeError('it must not be imported')")
    (tmp_path / "torch" / "version.py").write_text(f"__version__ = '{version}'\n" if version else "")
    found, line, complaint = ask(SCRIPT, "site-torch", PYTHONPATH=str(tmp_path))
    assert found == code
    assert re.search(sentence, complaint)
    if not code:
        assert line == f"import site; [site.addsitedir(folder) for folder in [{str(tmp_path)!r}]]\n"


def test_a_site_without_torchvision_is_told_to_install_it(tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").touch()
    done = subprocess.run(
        [sys.executable, "-S", str(SCRIPT), "site-torch"],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "has no torchvision; install it there, or leave TORCH out" in done.stderr
