import errno
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.tiny_models import CONFIG, SHAPE, write_model
from vqd_scale.core.arrays import NDArray
from vqd_scale.core.errors import UserError
from vqd_scale.diffusion.config import (
    Ancestral,
    Confidence,
    ConstantGuidance,
    Halton,
    Linear,
    Purity,
    Strided,
    TopK,
    TopP,
    UniformCosine,
)
from vqd_scale.models import bundle as bundle_module
from vqd_scale.models import pipeline as pipeline_module
from vqd_scale.models.bundle import Model, load_bundle, save_bundle, save_tokenizer
from vqd_scale.models.config import BundleConfig, SamplingConfig
from vqd_scale.models.generate import Prompt, generate, read_generated
from vqd_scale.models.pipeline import TextToImage, image_slots
from vqd_scale.nn.config import ClassCondition, NoCondition, UNetConfig
from vqd_scale.tokenizers.base import to_signal
from vqd_scale.tokenizers.vqgan import VQGAN

PROMPTS = ["a red circle", "a blue star", "nothing at all"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_model(tmp_path)


@pytest.fixture
def pipe(folder: Path) -> TextToImage:
    return TextToImage.load(folder, device="cpu")


def test_saved_bundle_loads_equal(folder: Path) -> None:
    first, second = (load_bundle(folder) for _ in range(2))
    assert first.config == CONFIG
    for name, tensor in first.model.state_dict().items():
        assert torch.equal(tensor, second.model.state_dict()[name])


def test_image_does_not_depend_on_batch(folder: Path) -> None:
    pipe = TextToImage.load(folder, device="cpu")
    together = pipe(PROMPTS, steps=4, guidance=2.0, seed=5)
    assert together[0].size == (8, 8)
    slots = image_slots(5, 3)[1:2]
    alone = pipe.generate_batch(PROMPTS[1:2], slots, Strided(steps=4), guidance=ConstantGuidance(scale=2.0))
    assert torch.equal(together.tensor[1:2], alone)
    other_seed_images = pipe(PROMPTS, steps=4, guidance=2.0, seed=6)
    assert any(
        not np.array_equal(np.asarray(a), np.asarray(b))
        for a, b in zip(together, other_seed_images, strict=True)
    )


def test_prompt_and_guidance_change_the_image(folder: Path) -> None:
    pipe = TextToImage.load(folder, device="cpu")

    def generate(prompt: str, guidance: float) -> NDArray[np.uint8]:
        return np.stack([np.asarray(image) for image in pipe([prompt] * 8, steps=4, guidance=guidance)])

    assert not np.array_equal(generate("a red circle", 1.0), generate("a blue star", 1.0))
    assert not np.array_equal(generate("a red circle", 1.0), generate("a red circle", 6.0))
    # Scale 0 uses the null condition only, for any prompt.
    assert np.array_equal(generate("a red circle", 0.0), generate("a blue star", 0.0))


def test_generation_resumes_after_kill(folder: Path, tmp_path: Path) -> None:
    pipe = TextToImage.load(folder, device="cpu")
    prompts = [Prompt(f"{n:03d}", PROMPTS[n % 3], n) for n in range(7)]
    sampling = SamplingConfig(
        sampler=Strided(steps=3),
        guidance=ConstantGuidance(scale=2.0),
        truncation=TopP(p=0.9),
        batch_size=2,
    )
    generate(pipe, {"name": "model"}, prompts, sampling, tmp_path / "whole")
    generate(pipe, {"name": "model"}, prompts, sampling, tmp_path / "killed")
    for lost in ("003", "006"):
        (tmp_path / "killed" / f"{lost}.png").unlink()
    with pytest.raises(UserError, match=r"003\.png: missing"):
        read_generated(tmp_path / "killed")
    generate(pipe, {"name": "model"}, prompts, sampling, tmp_path / "killed")
    uninterrupted, resumed = (read_generated(tmp_path / name) for name in ("whole", "killed"))
    assert uninterrupted[0] == resumed[0] == prompts
    assert np.array_equal(uninterrupted[1], resumed[1])
    with pytest.raises(UserError, match="other prompts, model or sampling options"):
        generate(pipe, {"name": "model"}, prompts[:-1], sampling, tmp_path / "killed")


def test_missing_and_damaged_bundles_raise_user_error(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no model bundle"):
        TextToImage.load(tmp_path / "nowhere", device="cpu")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-7])
    with pytest.raises(UserError, match="damaged"):
        TextToImage.load(folder, device="cpu")
    weights.unlink()
    with pytest.raises(UserError, match="weights are missing"):
        TextToImage.load(folder, device="cpu")


def test_more_steps_than_the_schedule_are_refused(folder: Path) -> None:
    with pytest.raises(UserError, match="11"):
        TextToImage.load(folder, device="cpu")(PROMPTS, steps=11)


def test_images_as_pillow_list_and_tensor(pipe: TextToImage) -> None:
    images = pipe("a red circle", steps=2)
    assert len(images) == 1
    assert images.tensor.shape == (1, 3, 8, 8)
    assert images.tensor.dtype == torch.uint8
    assert np.array_equal(np.asarray(images[0]), images.tensor[0].permute(1, 2, 0).numpy())
    assert [image.size for image in pipe(PROMPTS, steps=2)] == [(8, 8)] * 3


def test_per_image_seed_equals_single_image_seed(pipe: TextToImage) -> None:
    seeds = [7, 3, 7]
    together = pipe(["a star"] * 3, steps=4, seed=seeds).tensor
    for seed, expected in zip(seeds, together, strict=True):
        assert torch.equal(pipe("a star", steps=4, seed=seed).tensor[0], expected)
    assert not torch.equal(together[0], together[1])
    with pytest.raises(UserError, match="2 seeds for 3 images"):
        pipe(PROMPTS, seed=[1, 2])
    with pytest.raises(UserError, match=r"between 0 and 2\*\*31 - 1"):
        pipe(PROMPTS, seed=-1)


def test_images_of_different_seeds_share_no_random_numbers() -> None:
    slots = torch.cat([image_slots(seed, 5) for seed in (0, 1, 2**31 - 1)])
    assert slots.unique().numel() == 15
    assert int(slots.min()) == 0


def test_batch_size_changes_nothing(pipe: TextToImage) -> None:
    all = pipe(PROMPTS * 2, steps=4, seed=2)
    assert torch.equal(pipe(PROMPTS * 2, steps=4, seed=2, batch=4).tensor, all.tensor)
    with pytest.raises(UserError, match="batch_size: given 0, allowed: greater than 0"):
        pipe(PROMPTS, batch=0)
    with pytest.raises(UserError, match="there must be a prompt"):
        pipe([])


def test_negative_prompt_replaces_null_condition(pipe: TextToImage) -> None:
    def generate(**options: Any) -> torch.Tensor:
        return pipe(["a red circle"] * 8, steps=4, **options).tensor

    # A negative prompt equal to the caption cancels guidance at any scale.
    assert torch.equal(generate(guidance=4.0, negative="a red circle"), generate(guidance=1.0))
    assert not torch.equal(generate(guidance=4.0, negative="a blue star"), generate(guidance=4.0))
    assert torch.equal(generate(guidance=4.0, negative=""), generate(guidance=4.0))
    each = generate(guidance=4.0, negative=[""] * 4 + ["a blue star"] * 4)
    assert torch.equal(each[:4], generate(guidance=4.0)[:4])
    assert torch.equal(each[4:], generate(guidance=4.0, negative="a blue star")[4:])
    with pytest.raises(UserError, match="1 for 8 prompts"):
        generate(negative=["a"])


def test_empty_prompt_is_the_null_condition(pipe: TextToImage) -> None:
    alone = pipe([""] * 4, steps=4, guidance=1.0).tensor
    assert torch.equal(pipe([""] * 4, steps=4, guidance=5.0).tensor, alone)
    assert torch.equal(pipe(["a red circle"] * 4, steps=4, guidance=0.0).tensor, alone)


@pytest.mark.parametrize(
    "sampler", [Ancestral(), Strided(steps=3), Purity(steps=3), Confidence(steps=3), Halton(steps=3)]
)
def test_any_sampler_can_be_given(pipe: TextToImage, sampler: Any) -> None:
    generated = pipe(PROMPTS, sampler=sampler)
    slots = image_slots(0, 3)
    assert torch.equal(
        pipe.generate_batch(PROMPTS, slots, sampler, guidance=ConstantGuidance(scale=3.0)), generated.tensor
    )


def test_time_dependent_guidance_and_all_truncation_kinds(pipe: TextToImage) -> None:
    def generate(**options: Any) -> torch.Tensor:
        return pipe(["a red circle"] * 8, steps=5, **options).tensor

    assert torch.equal(generate(guidance=Linear(noisy=2.0, clean=2.0, noisy_time=9)), generate(guidance=2.0))
    assert not torch.equal(
        generate(guidance=Linear(noisy=1.0, clean=6.0, noisy_time=9)), generate(guidance=2.0)
    )
    assert torch.equal(generate(truncation=0.5), generate(truncation=TopP(p=0.5)))
    assert not torch.equal(generate(truncation=0.5), generate())
    assert torch.equal(generate(truncation=TopK(k=9)), generate())
    # With only the most probable code, only the order of revealing is random.
    assert not torch.equal(generate(truncation=TopK(k=1)), generate())


def image_of(pipe: TextToImage, prompt: str = "a blue star") -> Image.Image:
    return pipe(prompt, steps=4, seed=1)[0]


def test_inpainting_keeps_unmasked_pixels_exactly(pipe: TextToImage) -> None:
    image = image_of(pipe)
    covered = np.zeros((8, 8), dtype=np.uint8)
    covered[0:3, 3:8] = 255
    mask = Image.fromarray(covered)
    inpainted = pipe.inpaint(image, mask, ["a red circle"] * 16, steps=5).tensor
    original = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)
    is_unmasked = torch.from_numpy(covered == 0)
    assert torch.equal(inpainted[..., is_unmasked], original[:, is_unmasked].expand(16, 3, -1))
    assert (inpainted != original).any(1)[:, ~is_unmasked].any(1).sum() > 8
    assert not torch.equal(inpainted, pipe.inpaint(image, mask, ["a blue star"] * 16, steps=5).tensor)


@pytest.fixture
def sampler_calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Record the sampler's keyword arguments and sampled tokens of every call."""
    calls: list[Any] = []
    original = pipeline_module.sample

    def record_call(*arguments: Any, **keywords: Any) -> torch.Tensor:
        calls.append((keywords, original(*arguments, **keywords)))
        return calls[-1][1]

    monkeypatch.setattr(pipeline_module, "sample", record_call)
    return calls


def test_inpainting_gives_known_tokens_to_the_sampler(pipe: TextToImage, sampler_calls: list[Any]) -> None:
    image = image_of(pipe)
    covered = np.zeros((8, 8), dtype=np.uint8)
    covered[4, 4] = 255
    pipe.inpaint(image, Image.fromarray(covered), ["a red circle"] * 2, steps=5, batch=1)
    # One pixel of the mask frees exactly its token of 2 x 2 pixels.
    for named, tokens in sampler_calls[-2:]:
        known_tokens = named["known_tokens"]
        assert (~known_tokens.is_known).nonzero().tolist() == [[0, 10]]
        assert torch.equal(tokens[known_tokens.is_known], known_tokens.tokens[known_tokens.is_known])


def test_mask_must_fit_and_cover_a_pixel(pipe: TextToImage) -> None:
    image = image_of(pipe)
    with pytest.raises(UserError, match="give both the same size"):
        pipe.inpaint(image, Image.new("L", (4, 4), 255), "a star")
    with pytest.raises(UserError, match="mask is all black"):
        pipe.inpaint(image, Image.new("L", (8, 8)), "a star")


def test_image_of_another_size_is_fitted(pipe: TextToImage) -> None:
    image = Image.new("RGB", (40, 20), "red")
    mask = Image.new("L", (40, 20), 255)
    assert pipe.inpaint(image, mask, "a star", steps=2)[0].size == (8, 8)
    assert pipe.vary(image.convert("RGBA"), "a star", steps=2)[0].size == (8, 8)


def test_variation_starts_from_tokens_of_the_image(pipe: TextToImage, sampler_calls: list[Any]) -> None:
    image = image_of(pipe)
    variations = pipe.vary(image, ["a red circle"] * 2, 0.3, steps=10, batch=1)
    pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None]
    tokens = pipe.bundle.tokenizer.encode(to_signal(pixels)).flatten(1)
    for named, generated_tokens in sampler_calls[-2:]:
        assert named["start"].strength == 0.3
        assert torch.equal(named["start"].tokens, tokens)
        assert pipe.bundle.tokenizer.decode(generated_tokens.view(1, 4, 4)).shape == (1, 3, 8, 8)
    assert not torch.equal(variations.tensor, pipe.vary(image, ["a red circle"] * 2, 1.0, steps=10).tensor)
    with pytest.raises(UserError, match="strength 0"):
        pipe.vary(image, "a star", 0.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_round_trip(folder: Path, dtype: torch.dtype) -> None:
    pipe = TextToImage.load(folder, dtype=dtype, device="cpu")
    assert pipe.bundle.dtype == dtype
    full_precision_pipe = TextToImage.load(folder, device="cpu")
    prompts = ["a red circle"] * 64
    low, high = (one(prompts, steps=1, progress=False).tensor.float() for one in (pipe, full_precision_pipe))
    # Equal random numbers select equal tokens, unless rounding moves a boundary past them.
    assert (low - high).abs().mean() < 0.2 * (high - high.flip(0)).abs().mean()
    assert pipe.to(torch.float32).bundle.dtype == torch.float32


def test_bundle_with_another_schedule_than_its_weights_is_refused(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["diffusion"] = {"kind": "released", "steps": 10}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"config.json has the schedule .*released.* trained under .*paper"):
        TextToImage.load(folder, device="cpu")


def test_bundle_with_another_number_of_steps_is_refused(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["diffusion"]["steps"] = 20
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"do not fit their config.json"):
        TextToImage.load(folder, device="cpu")


def test_tokenizer_with_another_codebook_size_is_refused(folder: Path, tmp_path: Path) -> None:
    other_shape = SHAPE.model_copy(update={"codebook_size": 7})
    save_tokenizer(tmp_path / "other", other_shape, VQGAN(other_shape).state_dict())
    save_bundle(tmp_path / "mixed", CONFIG, Model(CONFIG).state_dict(), tmp_path / "other")
    with pytest.raises(UserError, match="the tokenizer has 7 codes, but the model has 9"):
        TextToImage.load(tmp_path / "mixed", device="cpu")


def test_model_card_describes_model_and_origin(folder: Path, tmp_path: Path) -> None:
    card = (folder / "README.md").read_text()
    for fact in ("4 x 4 tokens of 9 codes", '"kind":"paper","steps":10', "a caption", '"kind": "vqgan"'):
        assert fact in card
    assert f"{sum(value.numel() for value in Model(CONFIG).state_dict().values()):,}" in card
    assert "Its license is the trainer" in card
    named = CONFIG.model_copy(update={"origin": "Found in a drawer."})
    save_bundle(tmp_path / "named", named, Model(CONFIG).state_dict(), folder / "tokenizer")
    assert "Found in a drawer." in (tmp_path / "named" / "README.md").read_text()


def test_bundle_is_written_atomically(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (folder / "model.safetensors").read_bytes()

    def full(*paths: Path) -> None:
        raise OSError(errno.ENOSPC, "full", str(paths[0]))

    monkeypatch.setattr(bundle_module.shutil, "copyfile", full)
    with pytest.raises(UserError, match="the disk is full"):
        save_bundle(folder, CONFIG, Model(CONFIG).state_dict(), tmp_path / "tokenizer")
    monkeypatch.undo()
    assert (folder / "model.safetensors").read_bytes() == before
    assert not list(folder.parent.glob("*.partial"))
    TextToImage.load(folder, device="cpu")


def class_config(condition: Any) -> BundleConfig:
    return CONFIG.model_copy(
        update={"text": None, "denoiser": CONFIG.denoiser.model_copy(update={"condition": condition})}
    )


def saved(tmp_path: Path, config: BundleConfig, tokenizer: Path) -> TextToImage:
    save_bundle(tmp_path / "other", config, Model(config).state_dict(), tokenizer)
    return TextToImage.load(tmp_path / "other", device="cpu")


@pytest.mark.parametrize("null", ["learned", "mean"])
def test_class_conditional_model_takes_labels(folder: Path, tmp_path: Path, null: Any) -> None:
    torch.manual_seed(0)
    pipe = saved(tmp_path, class_config(ClassCondition(classes=5, null_condition=null)), folder / "tokenizer")
    labeled = pipe([0, 4, 4], steps=4, seed=[1, 1, 1]).tensor
    assert torch.equal(labeled[1], labeled[2])
    assert torch.equal(pipe(["0", "4"], steps=4, seed=[1, 1]).tensor, labeled[:2])
    none = pipe([5] * 8, steps=4).tensor
    assert torch.equal(pipe([3] * 8, steps=4, guidance=0.0).tensor, none)
    with pytest.raises(UserError, match="label 'a cat': the classes of this model are 0 to 4"):
        pipe("a cat")
    with pytest.raises(UserError, match="takes no text; leave the negative prompt out"):
        pipe(3, negative="a cat")


def test_unconditional_model_samples_one_image_per_prompt(folder: Path, tmp_path: Path) -> None:
    pipe = saved(tmp_path, class_config(NoCondition()), folder / "tokenizer")
    images = pipe([""] * 4, steps=4).tensor
    assert images.shape == (4, 3, 8, 8)
    assert torch.equal(pipe([""] * 4, steps=4, guidance=7.0).tensor, images)


def test_unet_samples_through_the_same_pipeline(folder: Path, tmp_path: Path) -> None:
    config = CONFIG.model_copy(
        update={
            "text": None,
            "denoiser": UNetConfig(condition=ClassCondition(classes=3), width=32, channel_multipliers=(1, 2)),
        }
    )
    pipe = saved(tmp_path, config, folder / "tokenizer")
    assert pipe([0, 1, 2], steps=3).tensor.shape == (3, 3, 8, 8)


def test_unet_with_uniform_chain_inpaints(folder: Path, tmp_path: Path, sampler_calls: list[Any]) -> None:
    torch.manual_seed(0)
    config = CONFIG.model_copy(
        update={
            "text": None,
            "denoiser": UNetConfig(width=32, channel_multipliers=(1, 2)),
            "diffusion": UniformCosine(steps=10),
        }
    )
    pipe = saved(tmp_path, config, folder / "tokenizer")
    image = pipe("", steps=10, seed=1)[0]
    covered = np.zeros((8, 8), dtype=np.uint8)
    covered[2:6, 2:6] = 255
    inpainted = pipe.inpaint(image, Image.fromarray(covered), [""] * 16, steps=10).tensor
    # No mask token is used, and the known tokens are noised and restored.
    named, tokens = sampler_calls[-1]
    known_tokens = named["known_tokens"]
    assert known_tokens.is_known.sum(1).tolist() == [12] * 16
    assert torch.equal(tokens[known_tokens.is_known], known_tokens.tokens[known_tokens.is_known])
    assert int(tokens.min()) >= 0
    assert int(tokens.max()) < config.codebook_size
    assert len(tokens[~known_tokens.is_known].view(16, 4).unique(dim=0)) > 8
    is_unmasked = torch.from_numpy(covered == 0)
    original = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)
    assert torch.equal(inpainted[..., is_unmasked], original[:, is_unmasked].expand(16, 3, -1))


def test_invalid_location_raises_user_error() -> None:
    with pytest.raises(UserError, match="model: given 'gs://bucket/model', allowed"):
        TextToImage.load("gs://bucket/model")
