import json
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from PIL import Image
from webdataset.writer import TarWriter

from tests.evaluation.test_evaluate import change_model
from tests.models.exchange.microsoft_files import HEADS, ITHQ_SLIM, Kind, checkpoint_of, write
from vqd_scale.cli import inpaint, sample
from vqd_scale.core.config import Config
from vqd_scale.core.errors import UserError
from vqd_scale.data.shards.index_builder import build_index
from vqd_scale.diffusion.config import SamplerConfig
from vqd_scale.models.exchange.microsoft import MicrosoftOptions, plan_microsoft
from vqd_scale.models.generate import prompts_of


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


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as end:
        sample.main(arguments)
    assert end.value.code == 2
    return capsys.readouterr().err


def test_images_of_a_retrained_model_are_not_reused(
    bundle: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = [bundle, "a star", "--steps", "3", "--output", str(out)]
    sample.main(arguments)
    image = (out / "000000.png").read_bytes()
    change_model(Path(bundle), "weights")
    assert "model.weights_sha256" in refused(arguments, capsys)
    # Without the record, an image still belongs to its inputs.
    (out / "samples.json").unlink()
    assert f"{out / '000000.png'}: not the image of this prompt" in refused(arguments, capsys)
    assert (out / "000000.png").read_bytes() == image
    (out / "000000.png").unlink()
    sample.main(arguments)
    assert (out / "000000.png").read_bytes() != image


def test_refused_call_writes_nothing(bundle: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [bundle, "a star", "--output", str(tmp_path / "out")]
    assert "101 exceeds the 100 steps" in refused([*arguments, "--steps", "101"], capsys)
    assert not (tmp_path / "out").exists()
    sample.main([*arguments, "--steps", "3"])


def test_one_image_of_a_batch_is_drawn_again_alone(bundle: str, tmp_path: Path) -> None:
    prompts, options = ["a star", "a bus", "a cat"], ["--steps", "3", "--seed", "7", "--output"]
    sample.main([bundle, *prompts, *options, str(tmp_path / "batch")])
    sample.main([bundle, *prompts, "--index", "2", *options, str(tmp_path / "listed")])
    sample.main([bundle, "a cat", "--index", "2", *options, str(tmp_path / "alone")])
    image = (tmp_path / "batch" / "000002.png").read_bytes()
    for folder in ("listed", "alone"):
        assert (tmp_path / folder / "000002.png").read_bytes() == image
        assert len(list((tmp_path / folder).glob("*.png"))) == 2


def test_another_batch_size_continues_and_gives_equal_images(bundle: str, tmp_path: Path) -> None:
    arguments = [bundle, *("a star" for _ in range(5)), "--steps", "3", "--output", str(tmp_path / "out")]
    sample.main([*arguments, "--batch-size", "5"])
    paths = sorted((tmp_path / "out").glob("00*.png"))
    images = [path.read_bytes() for path in paths]
    for path in paths[1:]:
        path.unlink()
    sample.main([*arguments, "--batch-size", "2"])
    assert [path.read_bytes() for path in paths] == images


def test_negative_prompt_changes_the_image(bundle: str, tmp_path: Path) -> None:
    for name, options in {"with": ["--negative", "a bus"], "without": []}.items():
        sample.main([bundle, *["a star"] * 4, "--steps", "3", *options, "--output", str(tmp_path / name)])
    grids = [(tmp_path / name / "grid.png").read_bytes() for name in ("with", "without")]
    assert grids[0] != grids[1]


@pytest.mark.parametrize("content", ["[]", "null", '{"prompts": {"a": "b"}}', "[" * 100_000])
def test_list_of_samples_of_another_shape_is_refused(
    bundle: str, tmp_path: Path, content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [bundle, "a star", "--steps", "3", "--output", str(tmp_path / "out")]
    sample.main(arguments)
    (tmp_path / "out" / "samples.json").write_text(content)
    assert str(tmp_path / "out") in refused(arguments, capsys)


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


def test_captions_of_a_dataset_are_prompts_and_a_missing_one_is_named(tmp_path: Path) -> None:
    with TarWriter(str(tmp_path / "0.tar")) as writer:
        writer.write({"__key__": "a", "txt": "", "json": {"captions": ["", "words"]}})
        writer.write({"__key__": "b", "caption": "words"})
    shards = build_index(tmp_path)
    assert [prompt.caption for prompt in prompts_of(shards, 1)] == ["words"]
    with pytest.raises(UserError, match=r"0\.tar: sample 'b' has no 'txt', only 'caption'"):
        prompts_of(shards, 2)
