"""Options, numbers and images that a user gives to the pipelines."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.tiny_models import write_model
from vqd_scale.core.errors import UserError
from vqd_scale.data.shards.decode import decode_image
from vqd_scale.models.images import fitted_image, fitted_mask, read_image
from vqd_scale.models.pipeline import TextToImage

PROMPTS = ["a red circle", "a blue star"]


@pytest.fixture
def pipe(tmp_path: Path) -> TextToImage:
    return TextToImage.load(write_model(tmp_path), device="cpu")


def test_decoder_overflow_in_half_precision_is_no_black_image(pipe: TextToImage) -> None:
    tokenizer: Any = pipe.bundle.tokenizer
    tokenizer.decoder.conv_out.bias.fill_(6e4)
    tokenizer.decoder.conv_out.weight.fill_(6e4)
    pipe(PROMPTS, steps=2)
    with pytest.raises(UserError, match="in float16 the decoder's values overflow, take bfloat16 or float32"):
        pipe.to(torch.float16)(PROMPTS, steps=2)


def test_encoder_overflow_in_half_precision_gives_no_tokens(pipe: TextToImage) -> None:
    tokenizer: Any = pipe.bundle.tokenizer
    tokenizer.encoder.conv_out.bias.fill_(6e4)
    tokenizer.encoder.conv_out.weight.fill_(6e4)
    image = Image.new("RGB", (8, 8), "white")
    pipe.vary(image, PROMPTS[0], steps=2)
    with pytest.raises(UserError, match="in float16 its values overflow, take bfloat16 or float32"):
        pipe.to(torch.float16).vary(image, PROMPTS[0], steps=2)


@pytest.mark.parametrize(
    ("keyword", "sentence"),
    [
        ("guidance_scale", "called 'guidance'"),
        ("num_inference_steps", "called 'steps'"),
        ("negative_prompt", "called 'negative'"),
        ("num_images_per_prompt", "repeat the prompt"),
        ("generator", "as 'seed'"),
        ("guidence", "did you mean 'guidance'"),
        ("cfg", "known are batch, guidance"),
    ],
)
def test_unknown_keywords_are_refused(pipe: TextToImage, keyword: str, sentence: str) -> None:
    image = Image.new("RGB", (8, 8), "white")
    options: Any = {keyword: 1}
    for generate in (
        lambda: pipe("a star", **options),
        lambda: pipe.inpaint(image, image, "a star", **options),
        lambda: pipe.vary(image, "a star", **options),
    ):
        with pytest.raises(TypeError, match=f"unknown keyword '{keyword}': .*{sentence}"):
            generate()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"steps": 0}, r"steps: given 0, allowed: greater than or equal to 1"),
        ({"steps": 2.5}, "steps: given 2.5"),
        ({"steps": True}, "steps: given True, allowed: a number"),
        ({"steps": np.True_}, "steps: given True, allowed: a number"),
        ({"steps": "4"}, "steps: given '4', allowed: a number"),
        ({"steps": torch.ones(2)}, "steps: given .*allowed: a number"),
        ({"guidance": float("nan")}, "guidance.scale: given nan, allowed: a finite number"),
        ({"guidance": -1}, "guidance.scale: given -1"),
        ({"guidance": 1e38}, r"guidance.scale: given 1e\+38"),
        ({"guidance": None}, "guidance: given None"),
        ({"truncation": 1.5}, "truncation.p: given 1.5"),
        ({"truncation": float("inf")}, "truncation.p: given inf"),
        ({"batch": 0}, "batch"),
        ({"sampler": "halton"}, "sampler: given 'halton'"),
        ({"seed": 1.5}, "every seed must be an integer"),
        ({"seed": True}, "every seed must be an integer"),
        ({"seed": [1, -2]}, "every seed must be an integer"),
        # Its text is an address, which differs between processes.
        pytest.param({"seed": torch.Generator()}, "0 seeds for 2 images", id="generator"),
        ({"negative": [1.5, None]}, "negative: there must be a prompt"),
    ],
    ids=str,
)
def test_numbers_out_of_range_are_refused_in_one_sentence(
    pipe: TextToImage, options: Any, sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        pipe(PROMPTS, **options)


@pytest.mark.parametrize("prompts", [[], None, 1.5, b"a star", [None], [True], [["a"]], {}], ids=str)
def test_prompts_that_are_no_prompts_are_refused(pipe: TextToImage, prompts: Any) -> None:
    with pytest.raises(UserError, match="prompts: there must be a prompt"):
        pipe(prompts)


@pytest.mark.parametrize(
    "options",
    [
        {"steps": np.int64(4), "guidance": np.float32(2), "truncation": np.float64(0.5), "seed": np.int32(3)},
        {
            "steps": torch.tensor(4),
            "guidance": torch.tensor(2.0),
            "seed": torch.tensor(3),
            "batch": np.uint8(1),
        },
        {"steps": np.array(4), "guidance": np.array(2.0), "seed": np.int64(3)},
        {"steps": 4, "guidance": 2, "seed": 3},
    ],
    ids=str,
)
def test_numbers_of_other_libraries_are_accepted(pipe: TextToImage, options: Any) -> None:
    options = {"truncation": 0.5, **options}
    assert torch.equal(
        pipe(PROMPTS, **options).tensor, pipe(PROMPTS, steps=4, guidance=2.0, truncation=0.5, seed=3).tensor
    )
    arrays: Any = {"prompts": np.array(PROMPTS), "seed": torch.tensor([5, 6])}
    each = pipe(steps=2, **arrays).tensor
    assert torch.equal(each, pipe(PROMPTS, steps=2, seed=[5, 6]).tensor)


def test_dtypes_and_devices_are_accepted_by_name(tmp_path: Path) -> None:
    folder = write_model(tmp_path)
    pipe = TextToImage.load(str(folder), dtype="bfloat16", device="cpu")
    assert pipe.bundle.dtype == torch.bfloat16
    assert pipe.to("float32").bundle.dtype == torch.float32
    for target in ("float8", "int8", torch.int8, "gpu", 1.5):
        with pytest.raises(UserError, match="allowed: "):
            pipe.to(target)  # pyright: ignore[reportArgumentType]


def picture(mode: str) -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (20, 40, 4), dtype=np.uint8)
    if mode == "I;16":
        return Image.fromarray(noise[..., 0].astype(np.uint16) * 257)
    return Image.fromarray(noise).convert("RGB" if mode == "P" else "RGBA").convert(mode)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I;16"])
@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_images_are_read_alike_from_memory_and_file(
    pipe: TextToImage, tmp_path: Path, mode: str, orientation: int
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / ("image.tif" if mode in ("CMYK", "YCbCr") else "image.png")
    picture(mode).save(path, exif=exif)
    expected = decode_image(path.read_bytes())
    for image in (Image.open(io.BytesIO(path.read_bytes())), path, str(path)):
        assert np.array_equal(fitted_image(read_image(image, "image"), *expected.shape[1::-1]), expected)
    mask = Image.new("L", read_image(path, "image").size, 255)
    assert torch.equal(
        pipe.inpaint(Image.open(io.BytesIO(path.read_bytes())), mask, "a star", steps=2).tensor,
        pipe.inpaint(path, mask, "a star", steps=2).tensor,
    )


@pytest.mark.parametrize("color", [(255, 255, 255), (0, 0, 0), (200, 30, 40)])
@pytest.mark.parametrize("background", [(255, 255, 255), (0, 0, 0)])
def test_opaque_part_of_a_mask_with_transparency_is_painted(
    pipe: TextToImage, color: tuple[int, ...], background: tuple[int, ...]
) -> None:
    image = pipe("a star", steps=2)[0]
    mask = Image.new("RGBA", (8, 8), (*background, 0))
    mask.paste((*color, 255), (0, 0, 8, 3))
    inpainted = pipe.inpaint(image, mask, ["a circle"] * 8, steps=4).tensor
    original = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    assert torch.equal(inpainted[:, :, 3:], original[:, 3:].expand(8, 3, 5, 8))
    assert not torch.equal(inpainted[:, :, :3], original[:, :3].expand(8, 3, 3, 8))


@pytest.mark.parametrize("size", [(8, 8), (16, 16), (1000, 1000), (777, 1234), (1234, 777), (5, 5)])
def test_thin_strokes_of_a_mask_survive_resizing(size: tuple[int, int]) -> None:
    columns, rows = size
    for row, column in ((rows // 2, columns // 2), (rows // 2 - 2, columns // 2 + 1)):
        painted = np.zeros((rows, columns), dtype=np.uint8)
        painted[row, column] = 255
        fitted = fitted_mask(Image.fromarray(painted), 8, 8)
        assert 1 <= fitted.sum() <= (1 if min(size) >= 8 else 4) * 4
    assert fitted_mask(Image.new("L", size, 255), 8, 8).all()
    assert not fitted_mask(Image.new("L", size, 0), 8, 8).any()


@pytest.mark.parametrize("image", ["absent.png", 5, None, np.zeros((2, 2), dtype=np.complex128)], ids=str)
def test_argument_that_is_no_image_is_refused(pipe: TextToImage, image: Any) -> None:
    with pytest.raises(UserError, match="image: "):
        pipe.vary(image, "a star")
    with pytest.raises(UserError, match="image: floating-point pixels"):
        pipe.vary(Image.new("F", (8, 8)), "a star")
