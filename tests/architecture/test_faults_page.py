"""Every test that `docs/faults.md` names exists, in the file beside it if one is named there."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "faults.md"
TEST = re.compile(r"`(test_\w+)`(?: \(`(tests/[\w/]+\.py)`\))?")


def missing_tests(page: str, sources: dict[str, str]) -> list[str]:
    """Return the tests that a page names and no file defines, or the file named does not."""
    missing: list[str] = []
    for name, file in TEST.findall(page):
        definition = re.compile(rf"^def {name}\(", re.MULTILINE)
        texts = [sources.get(file, "")] if file else sources.values()
        if not any(definition.search(text) for text in texts):
            missing.append(f"{name} ({file})" if file else name)
    return missing


def test_absent_tests_and_wrong_files_are_found() -> None:
    sources = {"tests/a.py": "def test_one() -> None: ...", "tests/b.py": ""}
    assert missing_tests("`test_one` and `test_one` (`tests/a.py`)", sources) == []
    assert missing_tests("`test_two`, `test_one` (`tests/b.py`)", sources) == [
        "test_two",
        "test_one (tests/b.py)",
    ]


def test_every_test_of_the_faults_page_exists() -> None:
    sources = {
        str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
        for path in (ROOT / "tests").rglob("*.py")
    }
    page = PAGE.read_text(encoding="utf-8")
    assert len(TEST.findall(page)) > 100
    assert missing_tests(page, sources) == []
