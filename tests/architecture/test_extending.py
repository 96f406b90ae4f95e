"""The examples of ``docs/extending.md`` are applied to a copy of the package and run there.

A section has Python blocks with a title, which are new files; diff blocks, which edit a registry; and one
Python block without a title, which uses the extension.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "extending.md").read_text()
_BLOCK = re.compile(r'^```(python|diff)(?: title="([^"]+)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)
SECTIONS = {
    section.partition("\n")[0]: _BLOCK.findall(section)
    for section in PAGE.split("\n## ")[1:]
    if "```" in section
}


def edited(text: str, diff: str) -> str:
    """Apply the hunks of a diff; the lines that a hunk replaces must occur exactly once."""
    for hunk in diff.split("@@\n"):
        lines = hunk.splitlines()
        current = "".join(f"{line[1:]}\n" for line in lines if not line.startswith("+"))
        changed = "".join(f"{line[1:]}\n" for line in lines if not line.startswith("-"))
        assert text.count(current) == 1, f"these lines are not in the file once:\n{current}"
        text = text.replace(current, changed)
    return text


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of the package with all extensions."""
    copy = tmp_path_factory.mktemp("extended")
    shutil.copytree(ROOT / "vqd_scale", copy / "vqd_scale", ignore=shutil.ignore_patterns("__pycache__"))
    for language, title, text in (block for blocks in SECTIONS.values() for block in blocks):
        if title and language == "diff":
            (copy / title).write_text(edited((copy / title).read_text(), text))
        elif title:
            assert not (copy / title).exists()
            (copy / title).write_text(text)
    return copy


@pytest.mark.parametrize("section", SECTIONS)
def test_example_works_in_a_copy_of_the_package(section: str, extended: Path, tmp_path: Path) -> None:
    uses = [text for language, title, text in SECTIONS[section] if language == "python" and not title]
    assert len(uses) == 1 and "assert" in uses[0]
    result = subprocess.run(
        [sys.executable, "-c", uses[0]],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(extended)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("section", SECTIONS)
def test_extension_is_one_file_and_one_registry(section: str) -> None:
    titles = [title for _, title, _ in SECTIONS[section] if title]
    assert len(set(titles)) <= 2
    assert sum(language == "diff" for language, title, _ in SECTIONS[section] if title) == 1


def test_every_kind_of_extension_has_an_example() -> None:
    kinds = {"tokenizer", "sampler", "schedule", "data source", "metric", "optimizer", "task"}
    assert {
        section.removeprefix("A ").removeprefix("An ").lower().removeprefix("noise ") for section in SECTIONS
    } == kinds


def test_hunk_that_does_not_fit_is_refused() -> None:
    assert edited("a\nb\n", " a\n-b\n+c\n") == "a\nc\n"
    with pytest.raises(AssertionError, match="not in the file once"):
        edited("a\na\n", "-a\n+b\n")
