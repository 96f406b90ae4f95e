from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from vqd_scale.core.errors import UserError
from vqd_scale.core.rng import Purpose, uniforms
from vqd_scale.diffusion.guidance import ConstantGuidance, TopK, TopP, Truncation, truncated
from vqd_scale.diffusion.samplers import Strided
from vqd_scale.diffusion.schedule import UniformCosine
from vqd_scale.models.autoregressive_sampling import AutoregressiveTextToImage, prediction, sample_in_order
from vqd_scale.models.bundle import (
    AutoregressiveBundleConfig,
    AutoregressiveModel,
    BundleConfig,
    Model,
    load_autoregressive_bundle,
    load_bundle,
    save_bundle,
    save_tokenizer,
)
from vqd_scale.models.conditions import Conditions
from vqd_scale.models.generate import (
    Prompt,
    Settings,
    draw_batch,
    generate,
    load_pipeline,
    read_generated,
)
from vqd_scale.models.pipeline import TextToImage, picture_slots
from vqd_scale.nn.autoregressive import Autoregressive, AutoregressiveConfig
from vqd_scale.nn.denoiser import NoCondition, TextCondition
from vqd_scale.nn.unet import UNetConfig
from vqd_scale.text.clip import Tower
from vqd_scale.tokenizers.vqgan import VQGAN, VQGANConfig

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


def conditions(rows: int) -> Conditions:
    generator = torch.Generator().manual_seed(1)
    given, absent = torch.randn(2, rows, 5, 16, generator=generator)
    return Conditions(given, absent)


def by_hand(
    network: Autoregressive, told: Conditions, scale: float, truncation: Truncation | None, slots: Tensor
) -> Tensor:
    """One image and one token at a time, by the definitions."""
    drawn = uniforms(0, Purpose.SAMPLING, slots, LENGTH, dtype=torch.float64)
    rows: list[list[int]] = []
    for row in range(len(slots)):
        tokens: list[int] = []
        for place in range(LENGTH):
            prefix = torch.tensor([[*tokens, 0]])
            log_p = network(prefix, None if told.given is None else told.given[row : row + 1])[
                0, -1
            ].log_softmax(-1)
            if told.absent is not None:
                unconditional = network(prefix, told.absent[row : row + 1])[0, -1].log_softmax(-1)
                log_p = (unconditional + scale * (log_p - unconditional)).log_softmax(-1)
            chances = log_p.exp().double()
            order = chances.argsort(descending=True)
            kept = torch.zeros(CODES, dtype=torch.bool)
            for rank, code in enumerate(order):
                before = chances[order[:rank]].sum()
                match truncation:
                    case TopP(p=rate):
                        kept[code] = rank == 0 or before < rate
                    case TopK(k=count):
                        kept[code] = rank < count
                    case None:
                        kept[code] = True
            cumulative = (chances * kept).cumsum(0)
            tokens.append(int((cumulative <= drawn[row, place] * cumulative[-1]).sum()))
        rows.append(tokens)
    return torch.tensor(rows)


@pytest.mark.parametrize("keep_seen", [True, False], ids=["cached", "uncached"])
@pytest.mark.parametrize("scale", [1.0, 2.5])
@pytest.mark.parametrize("truncation", [None, TopP(p=0.8), TopK(k=3)])
def test_tokens_are_those_of_the_definitions(
    scale: float, truncation: Truncation | None, *, keep_seen: bool
) -> None:
    slots = torch.arange(4) * 7
    model, told = network(), conditions(4)
    predict = prediction(model, told, ConstantGuidance(scale=scale), 4, keep_seen=keep_seen)
    if truncation is not None:
        predict = truncated(predict, truncation)
    drawn = sample_in_order(predict, slots, LENGTH, seed=0)
    assert torch.equal(drawn, by_hand(model, told, scale, truncation, slots))


def test_without_a_condition_there_is_no_guidance() -> None:
    model, told = network(NoCondition()), Conditions(None, None)
    slots = torch.arange(3)
    drawn = [
        sample_in_order(
            prediction(model, told, ConstantGuidance(scale=scale), 3, keep_seen=True), slots, LENGTH, 0
        )
        for scale in (1.0, 4.0)
    ]
    assert torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[0], by_hand(model, told, 1.0, None, slots))


def test_an_image_is_the_same_in_any_batch() -> None:
    model, told = network(), conditions(4)
    guidance = ConstantGuidance(scale=2.0)
    together = sample_in_order(
        prediction(model, told, guidance, 4, keep_seen=True), torch.arange(4), LENGTH, seed=3
    )
    assert told.given is not None
    assert told.absent is not None
    alone = Conditions(told.given[2:3], told.absent[2:3])
    one = sample_in_order(
        prediction(model, alone, guidance, 1, keep_seen=True), torch.tensor([2]), LENGTH, seed=3
    )
    assert torch.equal(together[2:3], one)
    assert len(together.unique(dim=0)) == 4


def test_unusable_weights_are_one_sentence() -> None:
    model = network()
    model.head.bias.fill_(torch.nan)
    predict = prediction(model, conditions(1), ConstantGuidance(scale=1.0), 1, keep_seen=True)
    with pytest.raises(UserError, match="NaN or infinity"):
        sample_in_order(predict, torch.arange(1), LENGTH, seed=0)


def test_a_bundle_draws_what_its_network_says(folder: Path) -> None:
    pipe = AutoregressiveTextToImage.load(folder, device="cpu")
    together = pipe(PROMPTS, guidance=2.0, truncation=0.9, seed=5)
    assert together[0].size == (8, 8)
    steps: list[tuple[int, int]] = []
    again = pipe.draw(
        PROMPTS,
        picture_slots(5, 3),
        guidance=ConstantGuidance(scale=2.0),
        truncation=TopP(p=0.9),
        keep_seen=False,
        on_step=lambda done, of: steps.append((done, of)),
    )
    assert torch.equal(again, together.tensor)
    assert steps == [(place + 1, LENGTH) for place in range(LENGTH)]
    assert not np.array_equal(pipe(PROMPTS, guidance=2.0, seed=6).tensor, together.tensor)
    assert not torch.equal(
        pipe("a red circle", guidance=1.0).tensor, pipe("a blue star", guidance=1.0).tensor
    )


def test_what_draws_many_pictures_takes_either_kind(folder: Path, tmp_path: Path) -> None:
    pipe = load_pipeline(folder, device="cpu")
    assert isinstance(pipe, AutoregressiveTextToImage)
    prompts = [Prompt(str(number), prompt) for number, prompt in enumerate(PROMPTS)]
    generate(pipe, "model", prompts, Settings(25, 2.0, 0.9, seed=5, batch=2), tmp_path / "drawn")
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
    slots = picture_slots(5, 2)
    drawn = draw_batch(denoiser, ["", ""], slots, Settings(2, 1.0, 1.0, seed=5, batch=2))
    strided = denoiser.draw(["", ""], slots, Strided(steps=2), guidance=ConstantGuidance(scale=1.0))
    assert torch.equal(drawn, strided)


def test_a_bundle_of_one_kind_is_not_taken_for_one_of_another(folder: Path) -> None:
    bundle = load_autoregressive_bundle(folder)
    assert bundle.config == CONFIG
    with pytest.raises(UserError, match="holds an autoregressive model"):
        load_bundle(folder)
    assert "VQ-AR" in (folder / "README.md").read_text()
