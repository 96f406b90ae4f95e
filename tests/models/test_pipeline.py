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
from vqd_scale.diffusion.guidance import ConstantGuidance, Linear, TopK, TopP
from vqd_scale.diffusion.samplers import Ancestral, Strided
from vqd_scale.diffusion.schedule import UniformCosine
from vqd_scale.diffusion.unmasking import Confidence, Halton, Purity
from vqd_scale.models import bundle as bundle_module
from vqd_scale.models import pipeline as pipeline_module
from vqd_scale.models.bundle import BundleConfig, Model, load_bundle, save_bundle, save_tokenizer
from vqd_scale.models.generate import Prompt, Settings, generate, read_generated
from vqd_scale.models.pipeline import TextToImage, picture_slots
from vqd_scale.nn.denoiser import ClassCondition, NoCondition
from vqd_scale.nn.unet import UNetConfig
from vqd_scale.tokenizers.base import to_signal
from vqd_scale.tokenizers.vqgan import VQGAN

PROMPTS = ["a red circle", "a blue star", "nothing at all"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_model(tmp_path)


@pytest.fixture
def pipe(folder: Path) -> TextToImage:
    return TextToImage.load(folder, device="cpu")


def test_a_saved_bundle_loads_equal(folder: Path) -> None:
    first, second = (load_bundle(folder) for _ in range(2))
    assert first.config == CONFIG
    for name, tensor in first.model.state_dict().items():
        assert torch.equal(tensor, second.model.state_dict()[name])


def test_a_picture_is_the_same_in_any_batch(folder: Path) -> None:
    pipe = TextToImage.load(folder, device="cpu")
    together = pipe(PROMPTS, steps=4, guidance=2.0, seed=5)
    assert together[0].size == (8, 8)
    slots = picture_slots(5, 3)[1:2]
    alone = pipe.draw(PROMPTS[1:2], slots, Strided(steps=4), guidance=ConstantGuidance(scale=2.0))
    assert torch.equal(together.tensor[1:2], alone)
    other = pipe(PROMPTS, steps=4, guidance=2.0, seed=6)
    assert any(not np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(together, other, strict=True))


def test_the_prompt_and_the_guidance_matter(folder: Path) -> None:
    pipe = TextToImage.load(folder, device="cpu")

    def drawn(prompt: str, guidance: float) -> NDArray[np.uint8]:
        return np.stack([np.asarray(image) for image in pipe([prompt] * 8, steps=4, guidance=guidance)])

    assert not np.array_equal(drawn("a red circle", 1.0), drawn("a blue star", 1.0))
    assert not np.array_equal(drawn("a red circle", 1.0), drawn("a red circle", 6.0))
    # Scale 0 is the null condition alone, whatever the prompt.
    assert np.array_equal(drawn("a red circle", 0.0), drawn("a blue star", 0.0))


def test_generation_goes_on_where_it_was_killed(folder: Path, tmp_path: Path) -> None:
    pipe = TextToImage.load(folder, device="cpu")
    prompts = [Prompt(f"{n:03d}", PROMPTS[n % 3]) for n in range(7)]
    settings = Settings(steps=3, guidance=2.0, top_p=0.9, seed=0, batch=2)
    generate(pipe, "model", prompts, settings, tmp_path / "whole")
    generate(pipe, "model", prompts, settings, tmp_path / "killed")
    for lost in ("003", "006"):
        (tmp_path / "killed" / f"{lost}.png").unlink()
    with pytest.raises(UserError, match=r"2 pictures are missing, 003\.png first"):
        read_generated(tmp_path / "killed")
    generate(pipe, "model", prompts, settings, tmp_path / "killed")
    whole, killed = (read_generated(tmp_path / name) for name in ("whole", "killed"))
    assert whole[0] == killed[0] == prompts
    assert np.array_equal(whole[1], killed[1])
    with pytest.raises(UserError, match="other prompts, model or settings"):
        generate(pipe, "model", prompts[:-1], settings, tmp_path / "killed")


def test_missing_and_damaged_bundles_are_one_sentence(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no model bundle"):
        TextToImage.load(tmp_path / "nowhere", device="cpu")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-7])
    with pytest.raises(UserError, match="damaged"):
        TextToImage.load(folder, device="cpu")
    weights.unlink()
    with pytest.raises(UserError, match="weights are missing"):
        TextToImage.load(folder, device="cpu")


def test_more_steps_than_the_schedule_has_are_refused(folder: Path) -> None:
    with pytest.raises(UserError, match="11"):
        TextToImage.load(folder, device="cpu")(PROMPTS, steps=11)


def test_pictures_are_images_by_place_and_one_tensor(pipe: TextToImage) -> None:
    pictures = pipe("a red circle", steps=2)
    assert len(pictures) == 1
    assert pictures.tensor.shape == (1, 3, 8, 8)
    assert pictures.tensor.dtype == torch.uint8
    assert np.array_equal(np.asarray(pictures[0]), pictures.tensor[0].permute(1, 2, 0).numpy())
    assert [image.size for image in pipe(PROMPTS, steps=2)] == [(8, 8)] * 3


def test_a_seed_for_each_picture_draws_what_it_draws_alone(pipe: TextToImage) -> None:
    seeds = [7, 3, 7]
    together = pipe(["a star"] * 3, steps=4, seed=seeds).tensor
    for seed, picture in zip(seeds, together, strict=True):
        assert torch.equal(pipe("a star", steps=4, seed=seed).tensor[0], picture)
    assert not torch.equal(together[0], together[1])
    with pytest.raises(UserError, match="2 seeds for 3 pictures"):
        pipe(PROMPTS, seed=[1, 2])
    with pytest.raises(UserError, match=r"between 0 and 2\*\*31 - 1"):
        pipe(PROMPTS, seed=-1)


def test_pictures_of_different_seeds_share_no_random_numbers() -> None:
    slots = torch.cat([picture_slots(seed, 5) for seed in (0, 1, 2**31 - 1)])
    assert slots.unique().numel() == 15
    assert int(slots.min()) == 0


def test_the_size_of_a_batch_changes_nothing(pipe: TextToImage) -> None:
    all = pipe(PROMPTS * 2, steps=4, seed=2)
    assert torch.equal(pipe(PROMPTS * 2, steps=4, seed=2, batch=4).tensor, all.tensor)
    with pytest.raises(UserError, match="batch must be at least 1"):
        pipe(PROMPTS, batch=0)
    with pytest.raises(UserError, match="there must be a prompt"):
        pipe([])


def test_a_negative_prompt_takes_the_place_of_no_caption(pipe: TextToImage) -> None:
    def drawn(**given: Any) -> torch.Tensor:
        return pipe(["a red circle"] * 8, steps=4, **given).tensor

    # Led away from the caption itself, by whatever scale, a picture is that of the caption alone.
    assert torch.equal(drawn(guidance=4.0, negative="a red circle"), drawn(guidance=1.0))
    assert not torch.equal(drawn(guidance=4.0, negative="a blue star"), drawn(guidance=4.0))
    assert torch.equal(drawn(guidance=4.0, negative=""), drawn(guidance=4.0))
    each = drawn(guidance=4.0, negative=[""] * 4 + ["a blue star"] * 4)
    assert torch.equal(each[:4], drawn(guidance=4.0)[:4])
    assert torch.equal(each[4:], drawn(guidance=4.0, negative="a blue star")[4:])
    with pytest.raises(UserError, match="1 for 8 prompts"):
        drawn(negative=["a"])


def test_an_empty_prompt_is_no_caption(pipe: TextToImage) -> None:
    alone = pipe([""] * 4, steps=4, guidance=1.0).tensor
    assert torch.equal(pipe([""] * 4, steps=4, guidance=5.0).tensor, alone)
    assert torch.equal(pipe(["a red circle"] * 4, steps=4, guidance=0.0).tensor, alone)


@pytest.mark.parametrize(
    "sampler", [Ancestral(), Strided(steps=3), Purity(steps=3), Confidence(steps=3), Halton(steps=3)]
)
def test_any_sampler_can_be_given(pipe: TextToImage, sampler: Any) -> None:
    pictures = pipe(PROMPTS, sampler=sampler)
    slots = picture_slots(0, 3)
    assert torch.equal(
        pipe.draw(PROMPTS, slots, sampler, guidance=ConstantGuidance(scale=3.0)), pictures.tensor
    )


def test_guidance_may_follow_the_time_and_truncation_may_be_of_any_kind(pipe: TextToImage) -> None:
    def drawn(**given: Any) -> torch.Tensor:
        return pipe(["a red circle"] * 8, steps=5, **given).tensor

    assert torch.equal(drawn(guidance=Linear(noisy=2.0, clean=2.0, noisy_time=9)), drawn(guidance=2.0))
    assert not torch.equal(drawn(guidance=Linear(noisy=1.0, clean=6.0, noisy_time=9)), drawn(guidance=2.0))
    assert torch.equal(drawn(truncation=0.5), drawn(truncation=TopP(p=0.5)))
    assert not torch.equal(drawn(truncation=0.5), drawn())
    assert torch.equal(drawn(truncation=TopK(k=9)), drawn())
    # The likeliest code alone leaves nothing to chance but the order of revealing.
    assert not torch.equal(drawn(truncation=TopK(k=1)), drawn())


def picture_of(pipe: TextToImage, prompt: str = "a blue star") -> Image.Image:
    return pipe(prompt, steps=4, seed=1)[0]


def test_inpainting_keeps_what_the_mask_leaves_pixel_for_pixel(pipe: TextToImage) -> None:
    image = picture_of(pipe)
    covered = np.zeros((8, 8), dtype=np.uint8)
    covered[0:3, 3:8] = 255
    mask = Image.fromarray(covered)
    drawn = pipe.inpaint(image, mask, ["a red circle"] * 16, steps=5).tensor
    original = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)
    kept = torch.from_numpy(covered == 0)
    assert torch.equal(drawn[..., kept], original[:, kept].expand(16, 3, -1))
    assert (drawn != original).any(1)[:, ~kept].any(1).sum() > 8
    assert not torch.equal(drawn, pipe.inpaint(image, mask, ["a blue star"] * 16, steps=5).tensor)


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the sampler is told by name, and the tokens that it draws, of every call."""
    calls: list[Any] = []
    original = pipeline_module.sample

    def watching(*given: Any, **named: Any) -> torch.Tensor:
        calls.append((named, original(*given, **named)))
        return calls[-1][1]

    monkeypatch.setattr(pipeline_module, "sample", watching)
    return calls


def test_inpainting_tells_the_network_the_tokens_that_are_known(
    pipe: TextToImage, watched: list[Any]
) -> None:
    image = picture_of(pipe)
    covered = np.zeros((8, 8), dtype=np.uint8)
    covered[4, 4] = 255
    pipe.inpaint(image, Image.fromarray(covered), ["a red circle"] * 2, steps=5, batch=1)
    # One pixel of the mask frees its whole token of 2 x 2 pixels, and no other.
    for named, tokens in watched[-2:]:
        known = named["known"]
        assert (~known.known).nonzero().tolist() == [[0, 10]]
        assert torch.equal(tokens[known.known], known.tokens[known.known])


def test_a_mask_must_fit_and_cover_something(pipe: TextToImage) -> None:
    image = picture_of(pipe)
    with pytest.raises(UserError, match="make them alike"):
        pipe.inpaint(image, Image.new("L", (4, 4), 255), "a star")
    with pytest.raises(UserError, match="covers nothing"):
        pipe.inpaint(image, Image.new("L", (8, 8)), "a star")


def test_a_picture_of_another_size_is_fitted(pipe: TextToImage) -> None:
    image = Image.new("RGB", (40, 20), "red")
    mask = Image.new("L", (40, 20), 255)
    assert pipe.inpaint(image, mask, "a star", steps=2)[0].size == (8, 8)
    assert pipe.vary(image.convert("RGBA"), "a star", steps=2)[0].size == (8, 8)


def test_a_varied_picture_begins_from_the_tokens_of_the_image(pipe: TextToImage, watched: list[Any]) -> None:
    image = picture_of(pipe)
    pictures = pipe.vary(image, ["a red circle"] * 2, 0.3, steps=10, batch=1)
    pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None]
    tokens = pipe.bundle.tokenizer.encode(to_signal(pixels)).flatten(1)
    for named, drawn in watched[-2:]:
        assert named["start"].strength == 0.3
        assert torch.equal(named["start"].tokens, tokens)
        assert pipe.bundle.tokenizer.decode(drawn.view(1, 4, 4)).shape == (1, 3, 8, 8)
    assert not torch.equal(pictures.tensor, pipe.vary(image, ["a red circle"] * 2, 1.0, steps=10).tensor)
    with pytest.raises(UserError, match="strength 0"):
        pipe.vary(image, "a star", 0.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_it_draws_in_half_precision_and_goes_back(folder: Path, dtype: torch.dtype) -> None:
    pipe = TextToImage.load(folder, dtype=dtype, device="cpu")
    assert pipe.bundle.dtype == dtype
    whole = TextToImage.load(folder, device="cpu")
    prompts = ["a red circle"] * 64
    low, high = (one(prompts, steps=1, progress=False).tensor.float() for one in (pipe, whole))
    # The same numbers choose the same tokens, but where rounding moves a boundary past them.
    assert (low - high).abs().mean() < 0.2 * (high - high.flip(0)).abs().mean()
    assert pipe.to(torch.float32).bundle.dtype == torch.float32


def test_trap_39_a_bundle_of_another_schedule_than_its_weights_is_refused(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["diffusion"] = {"kind": "released", "steps": 10}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"config.json says the schedule .*released.* trained under .*paper"):
        TextToImage.load(folder, device="cpu")


def test_trap_39_another_number_of_steps_is_refused(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["diffusion"]["steps"] = 20
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"do not fit their config.json"):
        TextToImage.load(folder, device="cpu")


def test_a_tokenizer_of_another_codebook_is_refused(folder: Path, tmp_path: Path) -> None:
    other = SHAPE.model_copy(update={"codebook_size": 7})
    save_tokenizer(tmp_path / "other", other, VQGAN(other).state_dict())
    save_bundle(tmp_path / "mixed", CONFIG, Model(CONFIG).state_dict(), tmp_path / "other")
    with pytest.raises(UserError, match="the tokenizer has 7 codes, but the model was made for 9"):
        TextToImage.load(tmp_path / "mixed", device="cpu")


def test_the_card_says_what_the_model_is_and_whose(folder: Path, tmp_path: Path) -> None:
    card = (folder / "README.md").read_text()
    for fact in ("4 x 4 tokens of 9 codes", '"kind":"paper","steps":10', "a caption", '"kind": "vqgan"'):
        assert fact in card
    assert f"{sum(value.numel() for value in Model(CONFIG).state_dict().values()):,}" in card
    assert "Who trained it decides on its licence" in card
    named = CONFIG.model_copy(update={"origin": "Found in a drawer."})
    save_bundle(tmp_path / "named", named, Model(CONFIG).state_dict(), folder / "tokenizer")
    assert "Found in a drawer." in (tmp_path / "named" / "README.md").read_text()


def test_a_bundle_is_written_whole_or_not_at_all(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (folder / "model.safetensors").read_bytes()

    def full(*paths: Path) -> None:
        raise OSError(errno.ENOSPC, "full", str(paths[0]))

    monkeypatch.setattr(bundle_module.shutil, "copytree", full)
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
def test_a_class_conditional_model_takes_labels(folder: Path, tmp_path: Path, null: Any) -> None:
    torch.manual_seed(0)
    pipe = saved(tmp_path, class_config(ClassCondition(classes=5, null=null)), folder / "tokenizer")
    labelled = pipe([0, 4, 4], steps=4, seed=[1, 1, 1]).tensor
    assert torch.equal(labelled[1], labelled[2])
    assert torch.equal(pipe(["0", "4"], steps=4, seed=[1, 1]).tensor, labelled[:2])
    none = pipe([5] * 8, steps=4).tensor
    assert torch.equal(pipe([3] * 8, steps=4, guidance=0.0).tensor, none)
    with pytest.raises(UserError, match="label 'a cat': this model knows the classes 0 to 4"):
        pipe("a cat")
    with pytest.raises(UserError, match="takes no text; leave the negative prompt out"):
        pipe(3, negative="a cat")


def test_an_unconditional_model_draws_as_many_as_prompts(folder: Path, tmp_path: Path) -> None:
    pipe = saved(tmp_path, class_config(NoCondition()), folder / "tokenizer")
    pictures = pipe([""] * 4, steps=4).tensor
    assert pictures.shape == (4, 3, 8, 8)
    assert torch.equal(pipe([""] * 4, steps=4, guidance=7.0).tensor, pictures)


def test_the_unet_draws_through_the_same_pipeline(folder: Path, tmp_path: Path) -> None:
    config = CONFIG.model_copy(
        update={
            "text": None,
            "denoiser": UNetConfig(condition=ClassCondition(classes=3), width=32, channel_multipliers=(1, 2)),
        }
    )
    pipe = saved(tmp_path, config, folder / "tokenizer")
    assert pipe([0, 1, 2], steps=3).tensor.shape == (3, 3, 8, 8)


def test_the_unet_of_a_uniform_chain_inpaints(folder: Path, tmp_path: Path, watched: list[Any]) -> None:
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
    drawn = pipe.inpaint(image, Image.fromarray(covered), [""] * 16, steps=10).tensor
    # No mask ever stood for what is to be drawn, and the known tokens are noised and found again.
    named, tokens = watched[-1]
    known = named["known"]
    assert known.known.sum(1).tolist() == [12] * 16
    assert torch.equal(tokens[known.known], known.tokens[known.known])
    assert int(tokens.min()) >= 0
    assert int(tokens.max()) < config.codebook_size
    assert len(tokens[~known.known].view(16, 4).unique(dim=0)) > 8
    kept = torch.from_numpy(covered == 0)
    original = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)
    assert torch.equal(drawn[..., kept], original[:, kept].expand(16, 3, -1))


def test_a_location_that_is_no_path_is_one_sentence() -> None:
    with pytest.raises(UserError, match="model: given 'gs://bucket/model', allowed"):
        TextToImage.load("gs://bucket/model")
