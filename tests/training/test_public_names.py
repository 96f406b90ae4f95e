"""The public names of the package: each is importable from it, and its docstring has an example that runs."""

import doctest
import json
from pathlib import Path

import pytest

import vqd_scale
from tests.tiny_models import write_model
from vqd_scale.core.outputs import TRAINING, reserve

# In the order of use: a run is trained before its curves are plotted.
NAMES = [name for name in vqd_scale.__all__ if name != "launch"] + ["launch"]


@pytest.fixture(scope="module")
def folder(token_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the examples name: a model, token shards, a tokenizer and a configuration."""
    folder = tmp_path_factory.mktemp("examples")
    write_model(folder)
    (folder / "runs" / "demo").mkdir(parents=True)
    (folder / "bundle").rename(folder / "runs" / "demo" / "model")
    (folder / "train.yaml").write_text((token_world / "train.yaml").read_text())
    reserve(folder / "runs" / "mine", TRAINING, ["metrics.jsonl"])
    rows = [{"images": images, "loss": 1 / images} for images in (8, 16)]
    (folder / "runs" / "mine" / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_public_name_has_an_example_that_runs(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    finder = doctest.DocTestFinder(recurse=False)
    (example,) = finder.find(getattr(vqd_scale, name), name, globs={})
    assert f"from vqd_scale import {name}" in (example.docstring or "") or name == "train"
    result = doctest.DocTestRunner(optionflags=doctest.FAIL_FAST).run(example)
    assert result.attempted > 1 and result.failed == 0


def test_names_are_those_of_the_documentation() -> None:
    root = Path(__file__).parents[2]
    pages = [root / "README.md", *(root / "docs").glob("*.md")]
    text = "\n".join(page.read_text() for page in pages)
    assert [name for name in vqd_scale.__all__ if name not in text] == []
