from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.models.exchange.microsoft_files import HEADS, ITHQ_SLIM, Kind, checkpoint_of, write
from vqd_scale.cli import inpaint, sample
from vqd_scale.models.exchange.microsoft import MicrosoftOptions, plan_microsoft


@pytest.fixture
def bundle(tmp_path: Path) -> str:
    path = write(tmp_path, checkpoint_of(Kind(), ITHQ_SLIM))
    plan_microsoft(path, MicrosoftOptions(heads=HEADS)).save(tmp_path / "bundle")
    return str(tmp_path / "bundle")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sampling_writes_a_picture_for_each_prompt(bundle: str, tmp_path: Path, dtype: str) -> None:
    out = tmp_path / "out"
    sample.main([bundle, "a star", "a bus", "--steps", "3", "--dtype", dtype, "--out", str(out)])
    assert Image.open(out / "000001.png").size == (8, 8)
    assert (out / "grid.png").exists()
    # The precision decides the pictures, too: a folder holds those of one.
    other = {"float32": "bfloat16", "bfloat16": "float32"}[dtype]
    with pytest.raises(SystemExit) as end:
        sample.main([bundle, "a star", "a bus", "--steps", "3", "--dtype", other, "--out", str(out)])
    assert end.value.code == 2


def test_inpainting_keeps_the_rest_of_the_picture(bundle: str, tmp_path: Path) -> None:
    pixels = torch.randint(0, 256, (8, 8, 3), generator=torch.Generator().manual_seed(0)).byte().numpy()
    Image.fromarray(pixels).save(tmp_path / "image.png")
    covered = np.zeros((8, 8), dtype=np.uint8)
    covered[:4] = 255
    Image.fromarray(covered).save(tmp_path / "mask.png")
    paths = [str(tmp_path / "image.png"), str(tmp_path / "mask.png")]
    inpaint.main([bundle, *paths, "a star", "--steps", "3", "--count", "2", "--out", str(tmp_path / "out")])
    for name in ("000000.png", "000001.png"):
        drawn = np.asarray(Image.open(tmp_path / "out" / name))
        assert np.array_equal(drawn[4:], pixels[4:])
        assert not np.array_equal(drawn[:4], pixels[:4])


@pytest.mark.parametrize("broken", ["missing", "no picture"])
def test_a_picture_that_cannot_be_read_is_one_sentence(
    bundle: str, tmp_path: Path, broken: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "image.png"
    if broken == "no picture":
        path.write_text("not a picture")
    with pytest.raises(SystemExit) as end:
        inpaint.main([bundle, str(path), str(path), "a star"])
    assert end.value.code == 2
    assert str(path) in capsys.readouterr().err
