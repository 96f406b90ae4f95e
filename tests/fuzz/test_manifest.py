"""Fuzzing of a checkpoint's files: any change of any of them is damage, and never loaded."""

from pathlib import Path

import pytest

from tests.fuzz.harness import SECONDS, fuzz
from tests.training.checkpoint.test_manager import FILES, saved
from vqd_scale.core.errors import UserError
from vqd_scale.training.checkpoint.manager import consolidated
from vqd_scale.training.checkpoint.manifest import Manifest, parsed

DESCRIPTIONS = [b'{"name": "a.safetensors", "bytes": 3, "sha256": "00"}', b"[]", b"null", b"[" * 5000]


@pytest.mark.parametrize("seconds", SECONDS)
@pytest.mark.parametrize("file", [FILES[0], *FILES[2:]])
def test_changed_checkpoint_is_refused(seconds: float, file: str, tmp_path: Path) -> None:
    saved(tmp_path, 8)
    checkpoint = tmp_path / "000000000008"
    content = (checkpoint / file).read_bytes()

    def target(data: bytes) -> None:
        (checkpoint / file).write_bytes(data)
        try:
            manifest = parsed(Manifest, checkpoint / "manifest.json")
            consolidated(checkpoint, "ema")
        except UserError:
            assert data != content
            raise
        # White space of the manifest is no content.
        assert data == content or (file == FILES[3] and manifest.sealed()["sha256"] == manifest.sha256)

    assert fuzz(target, [content, *DESCRIPTIONS], seconds, tmp_path / "failure") > len(DESCRIPTIONS)
