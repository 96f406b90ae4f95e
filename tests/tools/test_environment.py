"""Messages of `make setup` and the tools for an unsuitable interpreter."""

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


def run_script(script: Path, *arguments: str, **variables: str) -> tuple[int, str, str]:
    completed = subprocess.run(
        [sys.executable, str(script), *arguments],
        env=os.environ | variables,
        capture_output=True,
        text=True,
        check=False,
    )
    return completed.returncode, completed.stdout, completed.stderr


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Return the script's copy in a tree that supports only a future Python."""
    shutil.copytree(ROOT / "tools", tmp_path / "tools")
    text = (ROOT / "pyproject.toml").read_text()
    bounds = re.sub(r'requires-python = ".*"', 'requires-python = ">=3.98,<3.100"', text)
    (tmp_path / "pyproject.toml").write_text(bounds)
    return tmp_path


def test_refused_interpreters_can_parse_the_script() -> None:
    ast.parse(SCRIPT.read_text(encoding="utf-8"), feature_version=(3, 6))


def test_interpreter_outside_the_range_is_refused(tree: Path) -> None:
    script = tree / "tools" / "_environment.py"
    alone = {"PATH": "", "PYENV_ROOT": str(tree / "none")}
    code, _, sentence = run_script(script, "check", "python", "lock", **alone)
    assert (code, sentence.count("\n")) == (2, 1)
    assert sentence.startswith("make setup: Python 3.98 to 3.99 is needed, and ")
    assert sentence.endswith("install one of these versions: none is on this machine.\n")
    newer = tree / "bin" / "python3.99"
    newer.parent.mkdir()
    newer.write_text("#!/bin/sh\necho 3 99 1\necho /opt/python3.99\n")
    newer.chmod(0o755)
    _, _, sentence = run_script(script, "check", "python", "lock", **alone | {"PATH": str(newer.parent)})
    assert sentence.endswith("on this machine: make setup PYTHON=/opt/python3.99.\n")
    _, listed, _ = run_script(script, "list", **alone | {"PATH": str(newer.parent)})
    assert listed == "3.98 missing\n3.99 /opt/python3.99\n"


def test_python_without_the_package_exits_2() -> None:
    completed = subprocess.run(
        # Without `site` no installed package is importable.
        [sys.executable, "-S", "tools/sample.py", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (completed.returncode, completed.stdout) == (2, "")
    assert re.fullmatch(
        r"sample\.py: .* lacks the package '\w+'; (run `make setup`|start the tool).*\n", completed.stderr
    )


def test_import_error_of_the_package_keeps_its_traceback(tmp_path: Path) -> None:
    run = "from _environment import run; run('vqd_scale.cli.no_such_tool')"
    completed = subprocess.run(
        [sys.executable, "-c", run],
        env=os.environ | {"PYTHONPATH": str(ROOT / "tools")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert completed.returncode == 1
    assert "ModuleNotFoundError: No module named 'vqd_scale.cli.no_such_tool'" in completed.stderr


def test_environment_is_compared_with_requested_checks(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "tools", tmp_path / "tools")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    script = tmp_path / "tools" / "_environment.py"
    assert run_script(script, "check", "python", "lock") == (0, "", "")
    interpreter = tmp_path / ".venv" / "bin" / "python"
    interpreter.parent.mkdir(parents=True)
    interpreter.symlink_to(sys.executable)
    (tmp_path / ".venv" / "done").mkdir()
    (tmp_path / ".venv" / "done" / "torch").write_text("lock\n")
    assert run_script(script, "check", "python", "lock") == (0, "", "")
    remedy = "; remove it, then try again.\n"
    code, _, sentence = run_script(script, "check", "site")
    assert (code, sentence) == (2, f"make setup: {tmp_path / '.venv'} is with TORCH=lock{remedy}")
    interpreter.unlink()
    interpreter.write_text("#!/bin/sh\necho 3 98 1\necho /opt/python3.98\n")
    interpreter.chmod(0o755)
    assert run_script(script, "check", "lock") == (0, "", "")
    code, _, sentence = run_script(script, "check", "python")
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
def test_site_torch_is_accepted_from_the_lowest_version(
    tmp_path: Path, version: str, code: int, sentence: str
) -> None:
    for name in ("torch", "torchvision"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise RuntimeError('it must not be imported')")
    (tmp_path / "torch" / "version.py").write_text(f"__version__ = '{version}'\n" if version else "")
    exit_code, line, complaint = run_script(SCRIPT, "site-torch", PYTHONPATH=str(tmp_path))
    assert exit_code == code
    assert re.search(sentence, complaint)
    if not code:
        assert line == f"import site; [site.addsitedir(folder) for folder in [{str(tmp_path)!r}]]\n"


def test_site_torch_without_torchvision_exits_2(tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").touch()
    completed = subprocess.run(
        [sys.executable, "-S", str(SCRIPT), "site-torch"],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert completed.returncode == 2
    assert "has no torchvision; install it there, or leave TORCH out" in completed.stderr
