"""The language of docstrings and documentation: the field's terms, in sentences that are read once.

Each rule is a function from a text to the lines that break it; it is tried on planted offenses before it is
held to the package.
"""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = sorted((ROOT / "vqd_scale").rglob("*.py"))
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

OPENINGS = {"What", "Who", "Whose", "How", "Whether", "Where", "Which", "Of", "Those", "That", "Whatever"}
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
def test_a_planted_opening_is_found(source: str) -> None:
    assert openings(source)


@pytest.mark.parametrize(
    "text", ["For so many slots", "Whoever reads it", "every so-manyth shard", "hence equal"]
)
def test_a_planted_phrase_is_found(text: str) -> None:
    assert phrases(text)


def test_plain_language_passes() -> None:
    assert openings('"""Offsets of a shard."""\ndef f():\n    """Return what is asked."""') == []
    assert phrases("Worker i writes shards i, i + n, i + 2n. This is henceforth many.") == []


@pytest.mark.parametrize("path", PACKAGE, ids=lambda path: str(path.relative_to(ROOT)))
def test_docstrings_open_with_what_is_documented(path: Path) -> None:
    assert openings(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("path", [*PACKAGE, *PAGES], ids=lambda path: str(path.relative_to(ROOT)))
def test_no_banned_phrase_is_used(path: Path) -> None:
    assert phrases(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("term", TERMS)
def test_a_term_of_the_glossary_is_found_in_the_code(term: str) -> None:
    assert term in (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")
    assert any(term in path.read_text(encoding="utf-8") for path in PACKAGE)
