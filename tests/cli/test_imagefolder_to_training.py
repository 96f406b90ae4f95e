"""A user's image folder, from shards to a trained model, through the command line."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from vqd_scale.cli import make_shards, sample, tokenize_shards

pytestmark = pytest.mark.ranks
ROOT = Path(__file__).parents[2]

TOKENIZER = {
    "transform": {"size": 16},
    "total_images": 96,
    "data": {"global_batch_size": 8, "shuffle_window": 8},
    "engine": {"precision": "fp32", "param_persistence_threshold": 0},
    "vqgan": {
        "codebook_size": 16,
        "code_dim": 4,
        "channels": 16,
        "channel_multipliers": [1],
        "patch_size": 4,
        "norm": "none",
    },
    "codebook_warmup_images": 48,
    "dead_code_reset_every_images": 32,
    "log": {"every_images": 32},
}
DENOISER = {
    "total_images": 64,
    "data": {"global_batch_size": 8, "shuffle_window": 8},
    "engine": {"precision": "fp32", "param_persistence_threshold": 0},
    "denoiser": {"width": 16, "layers": 1, "heads": 2, "condition": {"kind": "text", "width": 16}},
    "text": {"kind": "tower", "context_length": 8, "width": 16, "heads": 2, "layers": 1, "bpe_merges": 300},
    "diffusion": {"kind": "paper", "steps": 10},
    "log": {"every_images": 32},
}


def write_images(folder: Path) -> None:
    """Write gradients and noise of different sizes in two formats, one with transparency, with captions."""
    generator = np.random.default_rng(0)
    for number in range(24):
        height, width = 20 + number, 44 - number
        ramp = np.linspace(0, 255, width)[None, :, None] * generator.random(3)
        pixels = (ramp + 20 * generator.random((height, width, 3))).clip(0, 255).astype(np.uint8)
        image = Image.fromarray(pixels)
        if number % 2:
            image.convert("RGBA").save(folder / f"{number:02d}.png")
        else:
            image.save(folder / f"{number:02d}.jpg")
        (folder / f"{number:02d}.txt").write_text(f"gradient number {number}\n")


def test_imagefolder_to_trained_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image_folder = tmp_path / "pictures"
    image_folder.mkdir()
    write_images(image_folder)
    monkeypatch.chdir(ROOT)
    (tmp_path / "tokenizer.yaml").write_text(yaml.safe_dump(TOKENIZER))
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(DENOISER))
    shards, tokens = tmp_path / "shards", tmp_path / "tokens"
    tokenizer, model = tmp_path / "tokenizer", tmp_path / "model"

    def tool(name: str, *arguments: str) -> None:
        subprocess.run([sys.executable, f"tools/{name}", *arguments], cwd=ROOT, check=True)

    make_shards.main(["imagefolder", str(image_folder), str(shards), "image_size=16"])
    tool("train_tokenizer.py", f"{tmp_path}/tokenizer.yaml", f"run={tokenizer}", f"data.path={shards}")
    (tmp_path / "tokenize.yaml").write_text(
        yaml.safe_dump({"size": 16, "captions": {"context_length": 8, "bpe_merges": 300}})
    )
    paths = [f"images={shards}", f"output={tokens}", f"tokenizer={tokenizer}/export"]
    tokenize_shards.main([f"{tmp_path}/tokenize.yaml", *paths])
    paths = [f"run={model}", f"data.path={tokens}", f"tokenizer={tokenizer}/export"]
    tool("train.py", f"{tmp_path}/train.yaml", *paths)
    sample.main([str(model), "gradient number 3", "--steps", "5", "--output", str(tmp_path / "drawn")])
    assert Image.open(tmp_path / "drawn" / "000000.png").size == (16, 16)
    assert Image.open(tmp_path / "drawn" / "grid.png").size[0] > 16


def test_images_without_captions_are_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_images(tmp_path)
    (tmp_path / "05.txt").unlink()
    with pytest.raises(SystemExit) as stopped:
        make_shards.main(["imagefolder", str(tmp_path), str(tmp_path / "shards")])
    assert stopped.value.code == 2
    assert "05.png" in capsys.readouterr().err
