"""Fuzzing of configuration files, overrides and published tokenizer configurations."""

from contextlib import suppress
from pathlib import Path

import pytest

from tests.fuzz.harness import SECONDS, fuzz
from tests.training.shipped_configs import CONFIGS, KINDS
from vqd_scale.core.config import load_config, read_yaml, to_yaml
from vqd_scale.core.errors import UserError
from vqd_scale.tokenizers.taming import taming_config

SHIPPED = [path.read_bytes() for path in CONFIGS]
HOSTILE = [
    b"a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]",
    b"!!int abc",
    b"seed: 1:30\ntotal_images: 0100",
    b'run: "\\ud800\\0"',
    b"%YAML 1.1\n--- {run: [], kind: {}, data: {path: 3}}\n...",
]
OVERRIDES = [b"run=x", b"optim.lr=1e-4", b"denoiser.kind=[unet]", b"data={path: [a], num_workers: true}"]
TAMING = b"""
model:
  target: taming.models.vqgan.VQModel
  params:
    embed_dim: 256
    n_embed: 1024
    ddconfig:
      double_z: False
      z_channels: 256
      resolution: 256
      in_channels: 3
      out_ch: 3
      ch: 128
      ch_mult: [1, 1, 2, 2, 4]
      num_res_blocks: 2
      attn_resolutions: [16]
      dropout: 0.0
"""


@pytest.mark.parametrize("seconds", SECONDS)
def test_configuration_file_is_loaded_or_refused(seconds: float, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"

    def target(data: bytes) -> None:
        path.write_bytes(data)
        for kind in KINDS.values():
            with suppress(UserError):
                config = load_config(kind, path)
                path.write_text(to_yaml(config))
                assert load_config(kind, path) == config

    assert fuzz(target, [*SHIPPED, *HOSTILE], seconds, tmp_path / "failure") > len(HOSTILE)


@pytest.mark.parametrize("seconds", SECONDS)
def test_override_is_applied_or_refused(seconds: float, tmp_path: Path) -> None:
    def target(data: bytes) -> None:
        for kind in KINDS.values():
            with suppress(UserError):
                load_config(kind, None, [data.decode(errors="surrogateescape")])

    assert fuzz(target, OVERRIDES, seconds, tmp_path / "failure") > len(OVERRIDES)


@pytest.mark.parametrize("seconds", SECONDS)
def test_published_tokenizer_is_described_or_refused(seconds: float, tmp_path: Path) -> None:
    path = tmp_path / "model.yaml"

    def target(data: bytes) -> None:
        path.write_bytes(data)
        taming_config(read_yaml(path), "model.yaml")

    assert fuzz(target, [TAMING], seconds, tmp_path / "failure") > 1
