from pathlib import Path

import numpy as np
import pytest
import torch

from vqd_scale.core.errors import UserError
from vqd_scale.diffusion.guidance import Constant
from vqd_scale.diffusion.sampler import Strided
from vqd_scale.diffusion.schedule import Paper
from vqd_scale.inference.bundle import BundleConfig, Model, load_bundle, save_bundle, save_tokenizer
from vqd_scale.inference.generate import Prompt, Settings, generate, read_generated
from vqd_scale.inference.pipeline import TextToImage, picture_slots
from vqd_scale.nn.denoiser import DenoiserConfig, TextCondition
from vqd_scale.text.clip import Tower
from vqd_scale.tokenizers.vqgan import VQGAN, VQGANConfig

CONFIG = BundleConfig(
    codes=9,
    grid=(4, 4),
    denoiser=DenoiserConfig(
        width=16, layers=1, heads=2, initial_deviation=0.5, condition=TextCondition(width=16)
    ),
    text=Tower(context_length=8, width=16, heads=2, layers=1, merges=300),
    diffusion=Paper(steps=10),
)
SHAPE = VQGANConfig(codes=9, code_width=4, channels=8, multipliers=(1, 2), residual_blocks=1, norm="none")
PROMPTS = ["a red circle", "a blue star", "nothing at all"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    vqgan = VQGAN(SHAPE)
    vqgan.quantize.embedding.copy_(torch.randn(9, 4))
    save_tokenizer(tmp_path / "tokenizer", SHAPE, vqgan.state_dict())
    save_bundle(tmp_path / "bundle", CONFIG, Model(CONFIG).state_dict(), tmp_path / "tokenizer")
    return tmp_path / "bundle"


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
    alone = pipe.draw(PROMPTS[1:2], slots, Strided(steps=4), guidance=Constant(scale=2.0))
    assert torch.equal(together.tensor[1:2], alone)
    other = pipe(PROMPTS, steps=4, guidance=2.0, seed=6)
    assert any(not np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(together, other, strict=True))


def test_the_prompt_and_the_guidance_matter(folder: Path) -> None:
    pipe = TextToImage.load(folder, device="cpu")

    def drawn(prompt: str, guidance: float) -> np.ndarray:
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
