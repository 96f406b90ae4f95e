"""Fuzzing of the configurations of a bundle and of a diffusers folder, beside valid weights."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.fuzz.harness import SECONDS, fuzz
from tests.models.exchange.test_diffusers import JSON_FILES, random_bundle
from tests.tiny_models import write_model
from vqd_scale.models.bundle import load_bundle
from vqd_scale.models.exchange.diffusers import plan_diffusers
from vqd_scale.models.exchange.export import export_diffusers


def fuzz_files(
    folder: Path, paths: list[str], read: Callable[[Path], object], seconds: float, failure: Path
) -> int:
    """Fuzz a reader of a folder; the first byte of an input selects the file that the others replace."""
    contents = [(folder / path).read_bytes() for path in paths]

    def target(data: bytes) -> None:
        number = (data or b"\0")[0] % len(paths)
        (folder / paths[number]).write_bytes(data[1:])
        try:
            read(folder)
        finally:
            (folder / paths[number]).write_bytes(contents[number])

    corpus = [bytes([number]) + content for number, content in enumerate(contents)]
    return fuzz(target, corpus, seconds, failure)


@pytest.mark.parametrize("seconds", SECONDS)
def test_configuration_of_a_bundle_is_read_or_refused(seconds: float, tmp_path: Path) -> None:
    paths = ["config.json", "tokenizer/config.json"]
    assert fuzz_files(write_model(tmp_path), paths, load_bundle, seconds, tmp_path / "failure") >= len(paths)


@pytest.mark.parametrize("seconds", SECONDS)
def test_json_of_a_diffusers_folder_is_read_or_refused(seconds: float, tmp_path: Path) -> None:
    folder = tmp_path / "pipeline"
    export_diffusers(random_bundle(), folder)
    count = fuzz_files(folder, JSON_FILES, plan_diffusers, seconds, tmp_path / "failure")
    assert count >= len(JSON_FILES)
