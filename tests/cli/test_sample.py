import json
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from PIL import Image

from tests.models.exchange.microsoft_files import HEADS, ITHQ_SLIM, Kind, checkpoint_of, write
from vqd_scale.cli import inpaint, sample
from vqd_scale.core.config import Config
from vqd_scale.diffusion.config import SamplerConfig
from vqd_scale.models.exchange.microsoft import MicrosoftOptions, plan_microsoft


@pytest.fixture
def bundle(tmp_path: Path) -> str:
    path = write(tmp_path, checkpoint_of(Kind(), ITHQ_SLIM))
    plan_microsoft(path, MicrosoftOptions(heads=HEADS)).save(tmp_path / "bundle")
    return str(tmp_path / "bundle")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sampling_writes_one_image_per_prompt(bundle: str, tmp_path: Path, dtype: str) -> None:
    out = tmp_path / "out"
    sample.main([bundle, "a star", "a bus", "--steps", "3", "--dtype", dtype, "--output", str(out)])
    assert Image.open(out / "000001.png").size == (8, 8)
    assert (out / "grid.png").exists()
    # The precision changes the images, so a folder contains images of one precision.
    other_dtype = {"float32": "bfloat16", "bfloat16": "float32"}[dtype]
    with pytest.raises(SystemExit) as end:
        sample.main([bundle, "a star", "a bus", "--steps", "3", "--dtype", other_dtype, "--output", str(out)])
    assert end.value.code == 2


@pytest.mark.parametrize("kind", get_args(get_args(SamplerConfig)[0]), ids=lambda kind: kind().kind)
def test_every_sampler_is_selectable(bundle: str, tmp_path: Path, kind: type[Config]) -> None:
    name = kind.model_fields["kind"].default
    steps = ["--steps", "3"] if "steps" in kind.model_fields else []
    sample.main([bundle, "a star", "--sampler", name, *steps, "--output", str(tmp_path / "out")])
    sampling = json.loads((tmp_path / "out" / "samples.json").read_text())["sampling"]
    assert sampling["sampler"] == kind.model_validate({"steps": 3} if steps else {}).model_dump(mode="json")
    assert Image.open(tmp_path / "out" / "000000.png").size == (8, 8)


def test_option_of_a_sampler_changes_the_samples(bundle: str, tmp_path: Path) -> None:
    for weight in ("0", "50"):
        options = ["--sampler", "purity", "--sampler-option", f"weight={weight}", "--steps", "3"]
        sample.main([bundle, *("a star" for _ in range(4)), *options, "--output", str(tmp_path / weight)])
    grids = [(tmp_path / weight / "grid.png").read_bytes() for weight in ("0", "50")]
    assert grids[0] != grids[1]


def test_inpainting_keeps_unmasked_pixels(bundle: str, tmp_path: Path) -> None:
    pixels = torch.randint(0, 256, (8, 8, 3), generator=torch.Generator().manual_seed(0)).byte().numpy()
    Image.fromarray(pixels).save(tmp_path / "image.png")
    covered = np.zeros((8, 8), dtype=np.uint8)
    covered[:4] = 255
    Image.fromarray(covered).save(tmp_path / "mask.png")
    paths = [str(tmp_path / "image.png"), str(tmp_path / "mask.png")]
    inpaint.main(
        [bundle, *paths, "a star", "--steps", "3", "--num-samples", "2", "--output", str(tmp_path / "out")]
    )
    for name in ("000000.png", "000001.png"):
        inpainted_pixels = np.asarray(Image.open(tmp_path / "out" / name))
        assert np.array_equal(inpainted_pixels[4:], pixels[4:])
        assert not np.array_equal(inpainted_pixels[:4], pixels[:4])


@pytest.mark.parametrize("broken", ["missing", "no picture"])
def test_unreadable_image_exits_2(
    bundle: str, tmp_path: Path, broken: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "image.png"
    if broken == "no picture":
        path.write_text("not a picture")
    with pytest.raises(SystemExit) as end:
        inpaint.main([bundle, str(path), str(path), "a star"])
    assert end.value.code == 2
    assert str(path) in capsys.readouterr().err
