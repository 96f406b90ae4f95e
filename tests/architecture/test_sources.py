"""Constructs that no source file of the package may contain.

Each rule is a function from one parsed file to the lines that break it. It is tried on planted sources before
it is applied to the package.
"""

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "vqd_scale"
LONGEST_FILE = 450

Rule = Callable[[ast.Module], list[int]]


def calls(tree: ast.Module) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def keyword_value(call: ast.Call, name: str) -> object:
    """Return the constant that a call passes to a keyword, or ``None``."""
    values = [word.value for word in call.keywords if word.arg == name]
    return values[0].value if values and isinstance(values[0], ast.Constant) else None


def lenient_loading(tree: ast.Module) -> list[int]:
    """Return the lines with `strict=False`, which loads only the keys that match."""
    return [
        call.lineno for name, call in calls(tree) if name != "zip" and keyword_value(call, "strict") is False
    ]


def unsafe_loading(tree: ast.Module) -> list[int]:
    """Return the lines that unpickle: reading weights must not run code."""
    loads = [
        call.lineno
        for name, call in calls(tree)
        if (name == "torch.load" and keyword_value(call, "weights_only") is not True)
        or keyword_value(call, "allow_pickle") is True
    ]
    banned = {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import) and banned & {alias.name.split(".")[0] for alias in node.names}:
            loads.append(node.lineno)
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in banned:
            loads.append(node.lineno)
        if (
            isinstance(node, ast.ImportFrom)
            and node.module == "torch"
            and "load" in {a.name for a in node.names}
        ):
            loads.append(node.lineno)
    return loads


def shell(tree: ast.Module) -> list[int]:
    """Return the lines that start a shell: a file's name must not become a command."""
    return [
        call.lineno
        for name, call in calls(tree)
        if name in ("os.system", "os.popen", "subprocess.getoutput") or keyword_value(call, "shell") is True
    ]


def printing(tree: ast.Module) -> list[int]:
    """Return the lines that print: a library returns its results."""
    return [call.lineno for name, call in calls(tree) if name == "print"]


def assertions(tree: ast.Module) -> list[int]:
    """Return the lines with assertions, which `python -O` removes."""
    return [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Assert)]


def network_classes(tree: ast.Module) -> list[int]:
    """Return the lines that define network classes: the mathematics has no weights."""
    return [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
        if any(re.search(r"\b(Module|Sequential|ModuleList)\b", ast.unparse(base)) for base in node.bases)
    ]


def stubs(tree: ast.Module) -> list[int]:
    """Return the lines that raise NotImplementedError: unfinished functions are not merged."""
    return [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Raise) and node.exc and "NotImplementedError" in ast.unparse(node.exc)
    ]


def undocumented(tree: ast.Module) -> list[int]:
    """Return the lines of public classes, functions and methods without a docstring."""
    missing: list[int] = []
    pending: list[ast.Module | ast.ClassDef] = [tree]
    while pending:
        for node in pending.pop().body:
            is_definition = isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
            if not is_definition or node.name.startswith("_"):
                continue
            decorators = {ast.unparse(decorator) for decorator in node.decorator_list}
            is_repetition = decorators & {"override", "overload", f"{node.name}.setter"}
            if ast.get_docstring(node) is None and not is_repetition:
                missing.append(node.lineno)
            if isinstance(node, ast.ClassDef):
                pending.append(node)
    return missing


EVERYWHERE: list[Rule] = [lenient_loading, unsafe_loading, shell, assertions, stubs, undocumented]

BROKEN: list[tuple[Rule, str]] = [
    (lenient_loading, "model.load_state_dict(weights, strict=False)"),
    (unsafe_loading, "torch.load(path)"),
    (unsafe_loading, "torch.load(path, weights_only=False)"),
    (unsafe_loading, "def f():\n    from torch import load"),
    (unsafe_loading, "import pickle"),
    (unsafe_loading, "from cloudpickle import loads"),
    (unsafe_loading, "numpy.load(path, allow_pickle=True)"),
    (shell, "subprocess.run(line, shell=True)"),
    (shell, "os.system(line)"),
    (printing, "def f():\n    print(1)"),
    (assertions, "def f(x):\n    assert x > 0"),
    (network_classes, "class Schedule(nn.Module):\n    pass"),
    (network_classes, "class Schedule(Module):\n    pass"),
    (stubs, "def f():\n    raise NotImplementedError"),
    (stubs, "def f():\n    raise NotImplementedError('later')"),
    (undocumented, "def f():\n    return 1"),
    (undocumented, "class A:\n    'Documented.'\n    def f(self):\n        return 1"),
    (undocumented, "class A:\n    x: int"),
]

SOUND = '''
class Config(Base):
    """Documented."""

    @override
    def forward(self): return 1

    @width.setter
    def width(self, value): self._width = value

    def _private(self): return zip(a, b, strict=False)

def load(path):
    """Documented."""
    try: probe()
    except NotImplementedError: return
    model.load_state_dict(torch.load(path, weights_only=True), strict=True)
    subprocess.run(["ls", path], check=True)
    print_config()
'''


@pytest.mark.parametrize(("rule", "source"), BROKEN)
def test_each_rule_finds_planted_offense(rule: Rule, source: str) -> None:
    assert rule(ast.parse(source))


@pytest.mark.parametrize("rule", [*EVERYWHERE, printing, network_classes])
def test_each_rule_passes_valid_source(rule: Rule) -> None:
    assert rule(ast.parse(SOUND)) == []


def offenses(rule: Rule, *folders: Path) -> list[str]:
    paths = [path for folder in folders for path in sorted(folder.rglob("*.py"))]
    assert paths
    return [
        f"{path.relative_to(ROOT)}:{line}" for path in paths for line in rule(ast.parse(path.read_text()))
    ]


@pytest.mark.parametrize("rule", EVERYWHERE)
def test_package_satisfies_rule(rule: Rule) -> None:
    assert offenses(rule, PACKAGE) == []


def test_only_command_line_prints() -> None:
    library = [folder for folder in PACKAGE.iterdir() if (folder / "__init__.py").exists()]
    assert offenses(printing, *(folder for folder in library if folder.name != "cli")) == []


def test_diffusion_imports_no_networks() -> None:
    assert offenses(network_classes, PACKAGE / "diffusion") == []


def test_file_length_limit() -> None:
    lengths = {path: len(path.read_text().splitlines()) for path in PACKAGE.rglob("*.py")}
    assert {path: length for path, length in lengths.items() if length > LONGEST_FILE} == {}


def test_every_folder_is_a_package_with_empty_init() -> None:
    for path in PACKAGE.rglob("*.py"):
        assert (path.parent / "__init__.py").exists(), path
        if path.name == "__init__.py" and path.parent != PACKAGE:
            assert path.read_text() == "", path


LOCKED = re.compile(r"[a-z0-9-]+==[^\s:]+( ; [^:]+)?( \\\n    --hash=sha256:[0-9a-f]{64})+")


@pytest.mark.parametrize(
    "line",
    [
        "torch==2.0",
        "torch>=2.0 \\\n    --hash=sha256:" + "0" * 64,
        "torch @ https://host/torch.whl \\\n    --hash=sha256:" + "0" * 64,
        "--index-url https://host/simple",
        "-e .",
    ],
)
def test_unpinned_lock_line_is_found(line: str) -> None:
    assert LOCKED.fullmatch(line) is None


def test_lock_file_pins_versions_and_hashes_without_urls() -> None:
    entries = re.split(r"\n(?! )", (ROOT / "requirements.lock").read_text().strip())
    assert len(entries) > 50
    assert [entry for entry in entries if not LOCKED.fullmatch(entry)] == []
