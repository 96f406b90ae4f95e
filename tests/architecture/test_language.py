"""Language rules for docstrings, documentation and identifiers.

Each rule is a function from a text to the lines that break it. It is tried on planted offenses before it is
applied to the repository.
"""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = sorted((ROOT / "vqd_scale").rglob("*.py"))
TOOLS = sorted((ROOT / "tools").rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

OPENINGS = {"What", "Who", "Whose", "How", "Whether", "Where", "Which", "Of", "Those", "That", "Whatever"}
BINDINGS = re.compile(
    "found|told|made|kept|rest|whole|theirs|ours|drawn|shown|there|here|more|given|wanted|taken|seen|said|asked"
    "|known|left|gone|put|held|own|done|others?|what|where|which|when|how|who|many|much|few|less|those|these|them"
    "|written|beside|bad|good"
)
"""Words that do not say the contents of what they name; a variable is a noun that does."""

EXCEPTIONS: dict[str, str] = {}
"""Allowed identifiers of `BINDINGS`, each with its reason."""

LONGEST_TEST_NAME = 70
PHRASES = re.compile(r"\b(so many|so-manyth|every so-many|whoever|nobody|hence)\b", re.IGNORECASE)
TERMS = (
    "KV cache",
    "gradient checkpointing",
    "adaLN-Zero",
    "backoff",
    "straggler",
    "atomic",
    "collate",
    "prefetch",
    "noise schedule",
    "batch size",
    "validation",
    "resume",
)


def openings(source: str) -> list[int]:
    """Return the lines of definitions whose docstring opens with a question word instead of what it is."""
    lines: list[int] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            words = (ast.get_docstring(node) or "").split()
            if words and words[0].strip("`,.") in OPENINGS:
                lines.append(node.body[0].lineno)
    return lines


def bindings(source: str) -> list[int]:
    """Return the lines that bind a word of `BINDINGS` to a variable, argument, attribute or definition."""
    lines: list[int] = []
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Name(id=name, ctx=ast.Store()) | ast.arg(arg=name):
                pass
            case ast.Attribute(value=ast.Name(id="self" | "cls"), attr=name, ctx=ast.Store()):
                pass
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                pass
            case ast.ExceptHandler(name=str(name)) | ast.alias(asname=str(name)):
                pass
            case _:
                continue
        if BINDINGS.fullmatch(name.lstrip("_").lower()) and name not in EXCEPTIONS:
            lines.append(node.lineno)
    return lines


def unsuitable_test_names(source: str) -> list[int]:
    """Return the lines of test functions whose names are too long or number a trap."""
    return [
        node.lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test")
        if len(node.name) > LONGEST_TEST_NAME or "trap_" in node.name
    ]


def long_lines(page: str) -> list[str]:
    """Return the lines of a page's prose over 120 characters; code, tables, formulas and images are free."""
    prose = re.sub(r"^```.*?^```", "", page, flags=re.MULTILINE | re.DOTALL)
    return [
        line for line in prose.splitlines() if len(line) > 120 and not line.startswith(("|", "    ", "!"))
    ]


def phrases(text: str) -> list[int]:
    """Return the lines that contain a banned phrase."""
    return [number for number, line in enumerate(text.splitlines(), start=1) if PHRASES.search(line)]


@pytest.mark.parametrize(
    "source",
    [
        '"""What a shard holds."""',
        'def f():\n    """How often it is read."""',
        'class A:\n    """Whether it is there."""',
        'class A:\n    async def f(self):\n        """Where it lies."""',
    ],
)
def test_planted_opening_is_found(source: str) -> None:
    assert openings(source)


@pytest.mark.parametrize(
    "text", ["For so many slots", "Whoever reads it", "every so-manyth shard", "hence equal"]
)
def test_planted_phrase_is_found(text: str) -> None:
    assert phrases(text)


@pytest.mark.parametrize(
    "source",
    [
        "found = 1",
        "for theirs in []: pass",
        "with f() as (here, there): pass",
        "[given for given in []]",
        "if (other := f()): pass",
        "def f(*, kept): pass",
        "lambda *rest: 1",
        "def drawn(): pass",
        "class Made: pass",
        "class A:\n    held: int",
        "class A:\n    def f(self):\n        self._said = 1",
        "try:\n    f()\nexcept OSError as gone:\n    pass",
        "import numpy as ours",
    ],
)
def test_planted_binding_is_found(source: str) -> None:
    assert bindings(source)


@pytest.mark.parametrize("name", ["test_trap_20_backends", "test_" + "a" * 66])
def test_planted_test_name_is_found(name: str) -> None:
    assert unsuitable_test_names(f"def {name}(): pass")


def test_plain_language_passes() -> None:
    assert openings('"""Offsets of a shard."""\ndef f():\n    """Return what is asked."""') == []
    assert phrases("Worker i writes shards i, i + n, i + 2n. This is henceforth many.") == []
    assert bindings("found_codes = other.kept\nx.left = f(given=1)\nfrom hypothesis import given") == []
    assert unsuitable_test_names("def test_backends_agree(): pass\ndef trap_1(): pass") == []


@pytest.mark.parametrize("path", [*PACKAGE, *TOOLS, *TESTS], ids=lambda path: str(path.relative_to(ROOT)))
def test_docstrings_open_with_what_is_documented(path: Path) -> None:
    assert openings(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "path", [*PACKAGE, *TOOLS, *TESTS, *PAGES], ids=lambda path: str(path.relative_to(ROOT))
)
def test_no_banned_phrase_is_used(path: Path) -> None:
    if path != Path(__file__):
        assert phrases(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("path", [*PACKAGE, *TOOLS, *TESTS], ids=lambda path: str(path.relative_to(ROOT)))
def test_no_banned_word_is_bound(path: Path) -> None:
    assert bindings(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("path", TESTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_test_names_are_short_and_descriptive(path: Path) -> None:
    assert unsuitable_test_names(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_prose_is_wrapped(path: Path) -> None:
    assert long_lines(path.read_text(encoding="utf-8")) == []


def test_long_line_of_prose_is_found() -> None:
    line = "word " * 25
    assert long_lines(f"short\n{line}\n")
    assert long_lines(f"```\n{line}\n```\n| {line}\n    {line}\n") == []


@pytest.mark.parametrize("term", TERMS)
def test_glossary_term_occurs_in_code(term: str) -> None:
    assert term in (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")
    assert any(term in path.read_text(encoding="utf-8") for path in PACKAGE)
