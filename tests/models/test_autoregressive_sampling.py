from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from vqd_scale.core.errors import UserError
from vqd_scale.core.rng import Purpose, uniforms
from vqd_scale.diffusion.config import ConstantGuidance, Strided, TopK, TopP, Truncation, UniformCosine
from vqd_scale.diffusion.guidance import truncate
from vqd_scale.models.autoregressive_sampling import AutoregressiveTextToImage, build_predict, sample_in_order
from vqd_scale.models.bundle import (
    AutoregressiveModel,
    Model,
    load_autoregressive_bundle,
    load_bundle,
    save_bundle,
    save_tokenizer,
)
from vqd_scale.models.conditions import Conditions
from vqd_scale.models.config import AutoregressiveBundleConfig, BundleConfig, SamplingConfig
from vqd_scale.models.generate import (
    Prompt,
    generate,
    generate_batch,
    load_pipeline,
    read_generated,
)
from vqd_scale.models.pipeline import TextToImage, image_slots
from vqd_scale.nn.autoregressive import Autoregressive
from vqd_scale.nn.config import AutoregressiveConfig, NoCondition, TextCondition, UNetConfig
from vqd_scale.text.config import Tower
from vqd_scale.tokenizers.config import VQGANConfig
from vqd_scale.tokenizers.vqgan import VQGAN

CODES, GRID = 9, (4, 4)
LENGTH = 16
NETWORK = AutoregressiveConfig(width=16, layers=2, heads=2, init_std=0.5, condition=TextCondition(width=16))
CONFIG = AutoregressiveBundleConfig(
    codebook_size=CODES,
    grid=GRID,
    network=NETWORK,
    text=Tower(context_length=8, width=16, heads=2, layers=1, bpe_merges=300),
)
SHAPE = VQGANConfig(
    codebook_size=CODES, code_dim=4, channels=8, channel_multipliers=(1, 2), num_res_blocks=1, norm="none"
)
PROMPTS = ["a red circle", "a blue star", "nothing at all"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    vqgan = VQGAN(SHAPE)
    vqgan.quantize.embedding.copy_(torch.randn(CODES, 4))
    save_tokenizer(tmp_path / "tokenizer", SHAPE, vqgan.state_dict())
    save_bundle(tmp_path / "bundle", CONFIG, AutoregressiveModel(CONFIG).state_dict(), tmp_path / "tokenizer")
    return tmp_path / "bundle"


def network(condition: TextCondition | NoCondition = NETWORK.condition) -> Autoregressive:
    torch.manual_seed(0)
    config = NETWORK.model_copy(update={"condition": condition})
    return Autoregressive(config, CODES, GRID).requires_grad_(False)


def conditions(rows: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    condition, null_condition = torch.randn(2, rows, 5, 16, generator=generator)
    return condition, null_condition


def by_hand(
    network: Autoregressive, condition: Conditions, scale: float, truncation: Truncation | None, slots: Tensor
) -> Tensor:
    """Sample one image and one token at a time, by the definitions."""
    uniform_numbers = uniforms(0, Purpose.SAMPLING, slots, LENGTH, dtype=torch.float64)
    rows: list[list[int]] = []
    for row in range(len(slots)):
        tokens: list[int] = []
        for place in range(LENGTH):
            prefix = torch.tensor([[*tokens, 0]])
            inputs = None if condition is None else condition[0][row : row + 1]
            log_p = network(prefix, inputs)[0, -1].log_softmax(-1)
            if condition is not None:
                unconditional = network(prefix, condition[1][row : row + 1])[0, -1].log_softmax(-1)
                log_p = (unconditional + scale * (log_p - unconditional)).log_softmax(-1)
            chances = log_p.exp().double()
            order = chances.argsort(descending=True)
            is_kept = torch.zeros(CODES, dtype=torch.bool)
            for rank, code in enumerate(order):
                before = chances[order[:rank]].sum()
                match truncation:
                    case TopP(p=rate):
                        is_kept[code] = rank == 0 or before < rate
                    case TopK(k=count):
                        is_kept[code] = rank < count
                    case None:
                        is_kept[code] = True
            cumulative = (chances * is_kept).cumsum(0)
            tokens.append(int((cumulative <= uniform_numbers[row, place] * cumulative[-1]).sum()))
        rows.append(tokens)
    return torch.tensor(rows)


@pytest.mark.parametrize("keep_seen", [True, False], ids=["cached", "uncached"])
@pytest.mark.parametrize("scale", [1.0, 2.5])
@pytest.mark.parametrize("truncation", [None, TopP(p=0.8), TopK(k=3)])
def test_tokens_equal_definition(scale: float, truncation: Truncation | None, *, keep_seen: bool) -> None:
    slots = torch.arange(4) * 7
    model, condition = network(), conditions(4)
    predict = build_predict(model, condition, ConstantGuidance(scale=scale), 4, use_cache=keep_seen)
    if truncation is not None:
        predict = truncate(predict, truncation)
    sampled = sample_in_order(predict, slots, LENGTH, seed=0)
    assert torch.equal(sampled, by_hand(model, condition, scale, truncation, slots))


def test_unconditional_model_ignores_guidance() -> None:
    model, condition = network(NoCondition()), None
    slots = torch.arange(3)
    sampled = [
        sample_in_order(
            build_predict(model, condition, ConstantGuidance(scale=scale), 3, use_cache=True),
            slots,
            LENGTH,
            0,
        )
        for scale in (1.0, 4.0)
    ]
    assert torch.equal(sampled[0], sampled[1])
    assert torch.equal(sampled[0], by_hand(model, condition, 1.0, None, slots))


def test_image_does_not_depend_on_batch() -> None:
    model, condition = network(), conditions(4)
    guidance = ConstantGuidance(scale=2.0)
    together = sample_in_order(
        build_predict(model, condition, guidance, 4, use_cache=True), torch.arange(4), LENGTH, seed=3
    )
    alone = (condition[0][2:3], condition[1][2:3])
    one = sample_in_order(
        build_predict(model, alone, guidance, 1, use_cache=True), torch.tensor([2]), LENGTH, seed=3
    )
    assert torch.equal(together[2:3], one)
    assert len(together.unique(dim=0)) == 4


def test_unusable_weights_raise_user_error() -> None:
    model = network()
    model.head.bias.fill_(torch.nan)
    predict = build_predict(model, conditions(1), ConstantGuidance(scale=1.0), 1, use_cache=True)
    with pytest.raises(UserError, match="NaN or infinity"):
        sample_in_order(predict, torch.arange(1), LENGTH, seed=0)


def test_bundle_samples_from_its_network(folder: Path) -> None:
    pipe = AutoregressiveTextToImage.load(folder, device="cpu")
    together = pipe(PROMPTS, guidance=2.0, truncation=0.9, seed=5)
    assert together[0].size == (8, 8)
    steps: list[tuple[int, int]] = []
    again = pipe.generate_batch(
        PROMPTS,
        image_slots(5, 3),
        guidance=ConstantGuidance(scale=2.0),
        truncation=TopP(p=0.9),
        use_cache=False,
        on_step=lambda step, of: steps.append((step, of)),
    )
    assert torch.equal(again, together.tensor)
    assert steps == [(place + 1, LENGTH) for place in range(LENGTH)]
    assert not np.array_equal(pipe(PROMPTS, guidance=2.0, seed=6).tensor, together.tensor)
    assert not torch.equal(
        pipe("a red circle", guidance=1.0).tensor, pipe("a blue star", guidance=1.0).tensor
    )


def test_batch_sampling_takes_either_model_kind(folder: Path, tmp_path: Path) -> None:
    pipe = load_pipeline(folder, device="cpu")
    assert isinstance(pipe, AutoregressiveTextToImage)
    prompts = [Prompt(str(number), prompt, number) for number, prompt in enumerate(PROMPTS)]
    sampling = SamplingConfig(
        guidance=ConstantGuidance(scale=2.0), truncation=TopP(p=0.9), seed=5, batch_size=2
    )
    generate(pipe, {"name": "model"}, prompts, sampling, tmp_path / "drawn")
    expected = pipe(PROMPTS, guidance=2.0, truncation=0.9, seed=5).tensor.permute(0, 2, 3, 1).numpy()
    assert np.array_equal(read_generated(tmp_path / "drawn")[1], expected)
    config = BundleConfig(
        codebook_size=CODES,
        grid=GRID,
        denoiser=UNetConfig(width=8, channel_multipliers=(1, 1)),
        diffusion=UniformCosine(steps=4),
    )
    save_bundle(tmp_path / "unet", config, Model(config).state_dict(), folder / "tokenizer")
    denoiser = load_pipeline(tmp_path / "unet", device="cpu")
    assert isinstance(denoiser, TextToImage)
    slots = image_slots(5, 2)
    unguided = SamplingConfig(sampler=Strided(steps=2), guidance=ConstantGuidance(scale=1.0))
    sampled = generate_batch(denoiser, ["", ""], slots, unguided)
    strided = denoiser.generate_batch(["", ""], slots, Strided(steps=2), guidance=ConstantGuidance(scale=1.0))
    assert torch.equal(sampled, strided)


def test_bundle_of_the_other_kind_is_refused(folder: Path) -> None:
    bundle = load_autoregressive_bundle(folder)
    assert bundle.config == CONFIG
    with pytest.raises(UserError, match="contains an autoregressive model"):
        load_bundle(folder)
    assert "VQ-AR" in (folder / "README.md").read_text()
