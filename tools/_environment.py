"""Check the Python environment that the project is installed into, and start its tools from it.

    python3 tools/_environment.py check [python] [lock|site]
                                                    exit code 2 and one sentence where .venv is not, or cannot
                                                    be made, of this Python or with that torch
    python3 tools/_environment.py site-torch        line of a .pth file that makes this Python's torch visible
    python3 tools/_environment.py list              newest usable interpreter of each supported version

Written for Python 3.6 and newer: the interpreters that are refused must be able to read this file.
"""

import importlib
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

TREE = Path(__file__).resolve().parent.parent
ENVIRONMENT = TREE / ".venv" / "bin" / "python"
USER_MISTAKE = 2
PROBE_SECONDS = 20
# Debian's python3 comes without `ensurepip`, which `venv` needs.
PROBE = "import sys, venv, ensurepip; print(*sys.version_info[:3]); print(sys.executable)"


def supported_minors() -> "range":
    """Return the minor versions of Python 3 that pyproject.toml allows, oldest first."""
    text = (TREE / "pyproject.toml").read_text(encoding="utf-8")
    bounds = re.search(r'^requires-python = ">=3\.(\d+),<3\.(\d+)"$', text, re.MULTILINE)
    if bounds is None:
        raise ValueError("pyproject.toml: requires-python is not of the form >=3.A,<3.B")
    return range(int(bounds.group(1)), int(bounds.group(2)))


def is_supported(version: "tuple[int, ...]") -> bool:
    """Return whether pyproject.toml allows a version such as (3, 12, 1)."""
    return version[:1] == (3,) and version[1] in supported_minors()


def usable_interpreters() -> "dict[int, str]":
    """Find the interpreters on PATH and in pyenv's folder that can create an environment.

    Returns:
        For each supported minor version that is there, the path of the newest of its interpreters.
    """
    names = ["python3", *(f"python3.{minor}" for minor in supported_minors())]
    folders = [Path(folder) for folder in os.environ.get("PATH", os.defpath).split(os.pathsep)]
    candidates = [folder / name for folder in folders for name in names]
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path("~/.pyenv").expanduser())
    candidates += sorted(pyenv.glob("versions/*/bin/python3"))
    newest: dict[int, tuple[tuple[int, ...], str]] = {}
    for candidate in candidates:
        # The project's own environment must not be the base of its successor.
        if candidate.parent == ENVIRONMENT.parent or not os.access(str(candidate), os.X_OK):
            continue
        version, path = probe(str(candidate))
        # A shim may find the environment through PATH.
        if not version or not is_supported(version) or Path(path).parent == ENVIRONMENT.parent:
            continue
        if (version, path) > newest.get(version[1], ((), "")):
            newest[version[1]] = (version, path)
    return {minor: path for minor, (_, path) in newest.items()}


def probe(interpreter: str) -> "tuple[tuple[int, ...], str]":
    """Return an interpreter's version and path; no version where it does not run or has no venv."""
    try:
        output = subprocess.check_output(  # noqa: S603 - an interpreter, which the user has on PATH
            [interpreter, "-c", PROBE], stderr=subprocess.DEVNULL, timeout=PROBE_SECONDS, encoding="utf-8"
        )
    except (OSError, subprocess.SubprocessError):
        return (), interpreter
    version, path = output.splitlines()[:2]
    return tuple(int(number) for number in version.split()), path


def refusal() -> str:
    """Return why this interpreter cannot create the environment, as a sentence; empty where it can."""
    minors = supported_minors()
    if not is_supported(sys.version_info[:3]):
        reason = f"Python 3.{minors[0]} to 3.{minors[-1]} is needed, and {this_interpreter()} will not do"
    elif not probe(sys.executable)[0]:
        reason = f"{this_interpreter()} has no venv (on Debian: apt-get install python3-venv)"
    else:
        return ""
    usable = [path for _, path in sorted(usable_interpreters().items(), reverse=True)]
    if not usable:
        return f"{reason}; install one of these versions: none is on this machine."
    return f"{reason}; take one that is on this machine: make setup PYTHON={' or PYTHON='.join(usable)}."


def other_environment(checks: "set[str]") -> str:
    """Return how an existing .venv differs from the one asked for, as a sentence; empty where it does not.

    Args:
        asked: ``python`` where this interpreter is asked for, ``lock`` or ``site`` where a torch is.
    """
    folder = ENVIRONMENT.parent.parent
    if not ENVIRONMENT.exists():
        return ""
    record = folder / "done" / "torch"
    torch = record.read_text(encoding="utf-8").strip() if record.exists() else "lock"
    version = probe(str(ENVIRONMENT))[0]
    differences: list[str] = []
    if "python" in checks and version[:2] != sys.version_info[:2]:
        python = ".".join(map(str, version)) or "a version that does not run"
        differences.append(f"of Python {python}, not {'.'.join(map(str, sys.version_info[:3]))}")
    if checks - {"python"} - {torch}:
        differences.append(f"with TORCH={torch}")
    if not differences:
        return ""
    return f"{folder} is {' and '.join(differences)}; remove it, then try again."


def site_torch() -> "tuple[list[str], str]":
    """Find the torch and the torchvision of this interpreter.

    Returns:
        The folders that hold them, and why they cannot be used, as a sentence; empty where they can.
    """
    text = (TREE / "pyproject.toml").read_text(encoding="utf-8")
    lowest = re.search(r'"torch>=(\d+)\.(\d+)"', text)
    if lowest is None:
        raise ValueError("pyproject.toml: torch's bound is not of the form torch>=A.B")
    folders: list[str] = []
    for name in ("torch", "torchvision"):
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            return (
                [],
                f"TORCH=site, but {this_interpreter()} has no {name}; install it there, or leave TORCH out.",
            )
        folders.append(str(Path(spec.origin).parent.parent))
    # Read, not imported: importing torch takes seconds, and what it prints would come first.
    source = (Path(folders[0]) / "torch" / "version.py").read_text(encoding="utf-8")
    version = re.search(r"__version__ = .*?((\d+)\.(\d+)[^'\"]*)", source)
    if version is None or tuple(map(int, version.group(2, 3))) < tuple(map(int, lowest.group(1, 2))):
        number = version.group(1) if version else "of an unknown version"
        needed = ".".join(lowest.group(1, 2))
        return (
            [],
            f"TORCH=site: the torch of {this_interpreter()} is {number}, and {needed} or newer is needed.",
        )
    return list(dict.fromkeys(folders)), ""


def this_interpreter() -> str:
    """Return this interpreter's path and version, for a sentence."""
    return f"{sys.executable} ({'.'.join(map(str, sys.version_info[:3]))})"


def run(module: str) -> None:
    """Run the tool that a module of the package holds, or name the interpreter that has the package.

    Args:
        module: Full name of a module with a function `main`.

    Raises:
        SystemExit: Exit code 2 where this interpreter lacks the package or something that it needs.
    """
    try:
        # The tool imports some packages only when it needs them.
        importlib.import_module(module).main()
        return
    except ModuleNotFoundError as error:
        missing = str(error.name).partition(".")[0]
        if missing == "vqd_scale" and importlib.util.find_spec(missing) is not None:
            raise
    remedy = f"start the tool with {ENVIRONMENT}"
    if not ENVIRONMENT.exists():
        remedy = f"run `make setup` in {TREE}, then {remedy}"
    print(
        f"{Path(sys.argv[0]).name}: {this_interpreter()} lacks the package '{missing}'; {remedy}.",
        file=sys.stderr,
    )
    raise SystemExit(USER_MISTAKE)


def main(arguments: "list[str]") -> None:
    """Run one of the commands of this file's head."""
    sentence = ""
    if arguments == ["list"]:
        usable = usable_interpreters()
        for minor in supported_minors():
            print(f"3.{minor} {usable.get(minor, 'missing')}")
    elif arguments[:1] == ["check"]:
        checks = set(arguments[1:])
        torches = checks - {"python"}
        if torches - {"lock", "site"}:
            sentence = f"TORCH={torches.pop()}: give site, or leave TORCH out."
        else:
            sentence = refusal() if "python" in checks else ""
            sentence = sentence or other_environment(checks)
            sentence = sentence or (site_torch()[1] if checks == {"python", "site"} else "")
    elif arguments == ["site-torch"]:
        folders, sentence = site_torch()
        if not sentence:
            print(f"import site; [site.addsitedir(folder) for folder in {folders!r}]")
    else:
        sentence = "usage: _environment.py check [python] [lock|site], site-torch, or list"
    if sentence:
        print(f"make setup: {sentence}", file=sys.stderr)
        raise SystemExit(USER_MISTAKE)


if __name__ == "__main__":
    main(sys.argv[1:])
