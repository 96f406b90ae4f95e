import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn import functional

from vqd_scale.core.errors import UserError
from vqd_scale.core.rng import Purpose, uniforms
from vqd_scale.diffusion.config import (
    Absorbing,
    Ancestral,
    ObjectiveConfig,
    Paper,
    SamplerConfig,
    Schedule,
    Strided,
    UniformCosine,
)
from vqd_scale.diffusion.guidance import Predict
from vqd_scale.diffusion.objective import Objective
from vqd_scale.diffusion.samplers import KnownTokens, sample
from vqd_scale.diffusion.transition import MaskAndReplace
from vqd_scale.nn.config import ClassCondition, UNetConfig
from vqd_scale.nn.unet import LinearAttention, UNet, UNetResidualBlock

CODES, GRID, STEPS = 7, (4, 6), 8
LENGTH = GRID[0] * GRID[1]
SMALL = UNetConfig(width=16, channel_multipliers=(1, 2))


def build(config: UNetConfig = SMALL) -> UNet:
    """Return a small U-Net with nonzero attention, as after training."""
    torch.manual_seed(0)
    unet = UNet(config, CODES, GRID, STEPS)
    for module in unet.modules():
        if isinstance(module, LinearAttention):
            nn.init.constant_(module.gate, 0.7)
    return unet


def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, CODES + 1, (3, LENGTH), generator=generator), torch.tensor([0, 4, 7])


def test_published_size_has_117_million_parameters() -> None:
    with torch.device("meta"):
        unet = UNet(UNetConfig(), codes=1024, grid=(16, 16), steps=4000)
    published = sum(parameter.numel() for parameter in unet.parameters()) - UNetConfig().width
    assert published == 117_586_568


def test_each_sample_has_its_own_timestep_and_masks_matter() -> None:
    unet = build()
    tokens, t = inputs()
    together = unet(tokens, t, None)
    assert together.shape == (3, LENGTH, CODES)
    for row in range(3):
        alone = unet(tokens[row : row + 1], t[row : row + 1], None)
        torch.testing.assert_close(together[row : row + 1], alone)
    assert not torch.allclose(together, unet(tokens, t.flip(0), None))
    assert not torch.allclose(together, unet(tokens.masked_fill(tokens == CODES, 0), t, None))


def test_logits_depend_on_all_positions() -> None:
    unet = build()
    tokens, t = inputs()
    changed = tokens.clone()
    changed[:, -1] = (changed[:, -1] + 1) % CODES
    assert (unet(changed, t, None) - unet(tokens, t, None)).abs().amax(dim=2).gt(0).all()


def test_head_consumer_equals_logits() -> None:
    unet = build()
    tokens, t = inputs()
    torch.testing.assert_close(unet.forward(tokens, t, None, functional.linear), unet(tokens, t, None))


def test_class_condition_matters_and_has_a_null_label() -> None:
    unet = build(SMALL.model_copy(update={"condition": ClassCondition(classes=2)}))
    tokens, t = inputs()
    results = [unet(tokens, t, torch.full((3,), label)) for label in range(3)]
    assert not torch.allclose(results[0], results[1])
    assert not torch.allclose(results[0], results[2])


def test_linear_attention_equals_sum_over_positions() -> None:
    attention = LinearAttention(5)
    nn.init.constant_(attention.gate, 1.0)
    image = torch.randn(2, 5, 2, 3)
    projected = attention.projections(image).reshape(2, 3, 4, 32, 6)
    query, key, value = projected.double().unbind(1)
    attended = torch.zeros(2, 4, 32, 6, dtype=torch.float64)
    for place in range(6):
        for key_place in range(6):
            share = key[..., key_place].exp() / key.exp().sum(-1)
            match = (query[..., place] * share).sum(-1, keepdim=True)
            attended[..., place] += match * value[..., key_place]
    expected = attention.proj(attended.float().reshape(2, 128, 2, 3))
    torch.testing.assert_close(attention(image) - image, expected, atol=1e-5, rtol=1e-4)


def test_linear_attention_starts_as_identity() -> None:
    image = torch.randn(2, 5, 2, 3)
    assert torch.equal(LinearAttention(5)(image), image)


def test_residual_block_with_zero_second_branch_is_identity() -> None:
    block = UNetResidualBlock(8, 8, 4)
    for parameter in block.second.parameters():
        nn.init.zeros_(parameter)
    image = torch.randn(2, 8, 3, 3)
    torch.testing.assert_close(block(image, torch.randn(2, 4)), image)


@pytest.mark.parametrize("grid", [(6, 8), (8, 4), (5, 5)])
def test_indivisible_grid_raises_user_error(grid: tuple[int, int]) -> None:
    config = UNetConfig(width=8, channel_multipliers=(1, 1, 1, 1))
    with pytest.raises(UserError, match=rf"grid of {grid[0]}x{grid[1]} tokens cannot be halved 3 times"):
        UNet(config, CODES, grid, STEPS)


def test_width_must_be_a_multiple_of_the_groups() -> None:
    with pytest.raises(ValidationError, match="not a multiple of 8"):
        UNetConfig(width=12)


def training_images() -> Tensor:
    """Return two images: rows of rising codes, and columns of falling codes."""
    row, column = torch.arange(GRID[0])[:, None], torch.arange(GRID[1])[None]
    return torch.stack([(row + 0 * column) % CODES, (CODES - 1 - column + 0 * row)]).flatten(1)


def trained(unet: UNet, transition: MaskAndReplace, images: Tensor, iterations: int) -> list[float]:
    """Train as the task does on the same images; return the mean loss of every tenth of the steps."""
    objective = Objective(transition, ObjectiveConfig(auxiliary_weight=0.1))
    optimizer = torch.optim.AdamW(unet.parameters(), lr=5e-3)
    losses: list[float] = []
    for iteration in range(iterations):
        slots = torch.arange(len(images)) + iteration * len(images)
        t = (uniforms(0, Purpose.TIMESTEP, slots, 1)[:, 0] * transition.steps).long()
        noise = uniforms(0, Purpose.CORRUPTION, slots, LENGTH, dtype=torch.float64)
        noisy = transition.corrupt(images, t, noise)

        def head_function(
            hidden: Tensor, weight: Tensor, bias: Tensor, noisy: Tensor = noisy, t: Tensor = t
        ) -> Tensor:
            return objective(hidden, weight, bias, images, noisy, t).loss_per_image.mean()

        loss = unet.forward(noisy, t, None, head_function)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    tenth = iterations // 10
    return [sum(losses[start : start + tenth]) / tenth for start in range(0, iterations, tenth)]


def prediction(unet: UNet) -> Predict:
    def predict(tokens: Tensor, t: int) -> Tensor:
        return unet(tokens, torch.full((len(tokens),), t), None).log_softmax(-1)

    return predict


@pytest.mark.parametrize("schedule", [UniformCosine(steps=STEPS), Paper(steps=STEPS), Absorbing(steps=STEPS)])
def test_unet_learns_samples_and_inpaints_under_every_schedule(schedule: Schedule) -> None:
    transition = MaskAndReplace(schedule, CODES)
    torch.manual_seed(0)
    unet = UNet(SMALL, CODES, GRID, STEPS)
    images = training_images()
    tenths = trained(unet, transition, images.repeat(8, 1), iterations=100)
    assert tenths[-1] < 0.5 * tenths[0]
    samplers: list[SamplerConfig] = [Ancestral(), Strided(steps=4)]
    for sampler in samplers:
        sampled = sample(prediction(unet.eval()), sampler, transition, torch.arange(8), LENGTH, seed=0)
        same = (sampled[:, None] == images[None]).double().mean(-1).amax(1)
        assert same.mean() > 0.8
    known_tokens = KnownTokens(images[1:].repeat(4, 1), torch.arange(LENGTH).lt(LENGTH // 2).expand(4, -1))
    filled = sample(
        prediction(unet),
        Strided(steps=4),
        transition,
        torch.arange(4),
        LENGTH,
        seed=0,
        known_tokens=known_tokens,
    )
    assert torch.equal(filled[known_tokens.is_known], known_tokens.tokens[known_tokens.is_known])
    assert (filled == known_tokens.tokens)[~known_tokens.is_known].double().mean() > 0.8
