"""Sampling from a model in a bucket."""

from pathlib import Path

import pytest
import torch

from tests.models.exchange.microsoft_files import HEADS, ITHQ_SLIM, Kind, checkpoint_of, write
from vqd_scale.core.errors import UserError
from vqd_scale.core.s3 import S3Path, write_object
from vqd_scale.models.bundle import load_bundle
from vqd_scale.models.exchange.export import export_diffusers
from vqd_scale.models.exchange.microsoft import MicrosoftOptions, plan_microsoft
from vqd_scale.models.pipeline import TextToImage


def upload(local: Path, folder: S3Path) -> None:
    for file in sorted(local.rglob("*")):
        if file.is_file():
            write_object(folder / file.relative_to(local).as_posix(), file)


def test_bundle_run_and_diffusers_folder_load_from_s3(folder: S3Path, tmp_path: Path) -> None:
    path = write(tmp_path, checkpoint_of(Kind(), ITHQ_SLIM))
    plan_microsoft(path, MicrosoftOptions(heads=HEADS)).save(tmp_path / "bundle")
    export_diffusers(load_bundle(tmp_path / "bundle"), tmp_path / "theirs")
    expected = TextToImage.load(tmp_path / "bundle", device="cpu")("a star", steps=3).tensor
    upload(tmp_path / "bundle", folder / "bundle")
    upload(tmp_path / "bundle", folder / "run" / "export")
    upload(tmp_path / "theirs", folder / "theirs")
    for name in ("bundle", "run", "theirs"):
        pipe = TextToImage.load(str(folder / name), device="cpu")
        assert torch.equal(pipe("a star", steps=3).tensor, expected), name
    with pytest.raises(UserError, match="no model found"):
        TextToImage.load(str(folder / "nothing"), device="cpu")
