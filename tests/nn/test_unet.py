import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn import functional

from vqd_scale.core.errors import UserError
from vqd_scale.core.rng import Purpose, uniforms
from vqd_scale.diffusion.guidance import Predict
from vqd_scale.diffusion.objective import Objective, ObjectiveConfig
from vqd_scale.diffusion.samplers import Ancestral, KnownTokens, Sampler, Strided, sample
from vqd_scale.diffusion.schedule import Absorbing, Paper, Schedule, UniformCosine
from vqd_scale.diffusion.transition import MaskAndReplace
from vqd_scale.nn.denoiser import ClassCondition
from vqd_scale.nn.unet import LinearAttention, UNet, UNetConfig, UNetResidualBlock

CODES, GRID, STEPS = 7, (4, 6), 8
LENGTH = GRID[0] * GRID[1]
SMALL = UNetConfig(width=16, channel_multipliers=(1, 2))


def build(config: UNetConfig = SMALL) -> UNet:
    """A small U-Net whose attention counts, as it would after some training."""
    torch.manual_seed(0)
    unet = UNet(config, CODES, GRID, STEPS)
    for module in unet.modules():
        if isinstance(module, LinearAttention):
            nn.init.constant_(module.gate, 0.7)
    return unet


def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, CODES + 1, (3, LENGTH), generator=generator), torch.tensor([0, 4, 7])


def test_the_published_size_is_the_papers_117_million() -> None:
    with torch.device("meta"):
        unet = UNet(UNetConfig(), codes=1024, grid=(16, 16), steps=4000)
    published = sum(parameter.numel() for parameter in unet.parameters()) - UNetConfig().width
    assert published == 117_586_568


def test_each_sample_has_its_own_timestep_and_masks_are_seen() -> None:
    unet = build()
    tokens, t = inputs()
    together = unet(tokens, t, None)
    assert together.shape == (3, LENGTH, CODES)
    for row in range(3):
        alone = unet(tokens[row : row + 1], t[row : row + 1], None)
        torch.testing.assert_close(together[row : row + 1], alone)
    assert not torch.allclose(together, unet(tokens, t.flip(0), None))
    assert not torch.allclose(together, unet(tokens.masked_fill(tokens == CODES, 0), t, None))


def test_every_place_sees_every_other() -> None:
    unet = build()
    tokens, t = inputs()
    changed = tokens.clone()
    changed[:, -1] = (changed[:, -1] + 1) % CODES
    assert (unet(changed, t, None) - unet(tokens, t, None)).abs().amax(dim=2).gt(0).all()


def test_consuming_the_head_equals_its_logits() -> None:
    unet = build()
    tokens, t = inputs()
    torch.testing.assert_close(unet.forward(tokens, t, None, functional.linear), unet(tokens, t, None))


def test_a_class_condition_matters_and_has_a_label_for_none() -> None:
    unet = build(SMALL.model_copy(update={"condition": ClassCondition(classes=2)}))
    tokens, t = inputs()
    results = [unet(tokens, t, torch.full((3,), label)) for label in range(3)]
    assert not torch.allclose(results[0], results[1])
    assert not torch.allclose(results[0], results[2])


def test_linear_attention_is_the_sum_over_places() -> None:
    attention = LinearAttention(5)
    nn.init.constant_(attention.gate, 1.0)
    image = torch.randn(2, 5, 2, 3)
    projected = attention.projections(image).reshape(2, 3, 4, 32, 6)
    query, key, value = projected.double().unbind(1)
    attended = torch.zeros(2, 4, 32, 6, dtype=torch.float64)
    for place in range(6):
        for other in range(6):
            share = key[..., other].exp() / key.exp().sum(-1)
            match = (query[..., place] * share).sum(-1, keepdim=True)
            attended[..., place] += match * value[..., other]
    expected = attention.proj(attended.float().reshape(2, 128, 2, 3))
    torch.testing.assert_close(attention(image) - image, expected, atol=1e-5, rtol=1e-4)


def test_attention_starts_shut() -> None:
    image = torch.randn(2, 5, 2, 3)
    assert torch.equal(LinearAttention(5)(image), image)


def test_a_residual_block_keeps_the_image_where_its_width_stays() -> None:
    block = UNetResidualBlock(8, 8, 4)
    for parameter in block.second.parameters():
        nn.init.zeros_(parameter)
    image = torch.randn(2, 8, 3, 3)
    torch.testing.assert_close(block(image, torch.randn(2, 4)), image)


@pytest.mark.parametrize("grid", [(6, 8), (8, 4), (5, 5)])
def test_a_grid_that_cannot_be_halved_is_one_sentence(grid: tuple[int, int]) -> None:
    config = UNetConfig(width=8, channel_multipliers=(1, 1, 1, 1))
    with pytest.raises(UserError, match=rf"grid of {grid[0]}x{grid[1]} tokens cannot be halved 3 times"):
        UNet(config, CODES, grid, STEPS)


def test_width_must_be_a_multiple_of_the_groups() -> None:
    with pytest.raises(ValidationError, match="not a multiple of 8"):
        UNetConfig(width=12)


def pictures() -> Tensor:
    """Two pictures: rows of rising codes, and columns of falling ones."""
    row, column = torch.arange(GRID[0])[:, None], torch.arange(GRID[1])[None]
    return torch.stack([(row + 0 * column) % CODES, (CODES - 1 - column + 0 * row)]).flatten(1)


def trained(unet: UNet, transition: MaskAndReplace, images: Tensor, iterations: int) -> list[float]:
    """Train as the task does, on the same images again and again; the mean loss of every tenth of the way."""
    objective = Objective(transition, ObjectiveConfig(auxiliary_weight=0.1))
    optimizer = torch.optim.AdamW(unet.parameters(), lr=5e-3)
    losses: list[float] = []
    for iteration in range(iterations):
        slots = torch.arange(len(images)) + iteration * len(images)
        t = (uniforms(0, Purpose.TIMESTEP, slots, 1)[:, 0] * transition.steps).long()
        noise = uniforms(0, Purpose.CORRUPTION, slots, LENGTH, dtype=torch.float64)
        noisy = transition.corrupt(images, t, noise)

        def consume(
            hidden: Tensor, weight: Tensor, bias: Tensor, noisy: Tensor = noisy, t: Tensor = t
        ) -> Tensor:
            return objective(hidden, weight, bias, images, noisy, t).loss_per_image.mean()

        loss = unet.forward(noisy, t, None, consume)
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
def test_it_learns_samples_and_fills_in_under_every_schedule(schedule: Schedule) -> None:
    transition = MaskAndReplace(schedule, CODES)
    torch.manual_seed(0)
    unet = UNet(SMALL, CODES, GRID, STEPS)
    images = pictures()
    tenths = trained(unet, transition, images.repeat(8, 1), iterations=100)
    assert tenths[-1] < 0.5 * tenths[0]
    samplers: list[Sampler] = [Ancestral(), Strided(steps=4)]
    for sampler in samplers:
        drawn = sample(prediction(unet.eval()), sampler, transition, torch.arange(8), LENGTH, seed=0)
        same = (drawn[:, None] == images[None]).double().mean(-1).amax(1)
        assert same.mean() > 0.8
    known = KnownTokens(images[1:].repeat(4, 1), torch.arange(LENGTH).lt(LENGTH // 2).expand(4, -1))
    filled = sample(
        prediction(unet), Strided(steps=4), transition, torch.arange(4), LENGTH, seed=0, known=known
    )
    assert torch.equal(filled[known.known], known.tokens[known.known])
    assert (filled == known.tokens)[~known.known].double().mean() > 0.8
