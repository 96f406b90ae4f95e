import pytest
import torch
from torch import Tensor, nn

from vqd_scale.tokenizers.discriminator import (
    Discriminator,
    DiscriminatorConfig,
    adaptive_weight,
    hinge,
)

SMALL = DiscriminatorConfig(channels=32, layers=2)


def discriminator(config: DiscriminatorConfig = SMALL) -> Discriminator:
    torch.manual_seed(0)
    return Discriminator(config)


def test_the_published_shape() -> None:
    published = discriminator(DiscriminatorConfig())
    shapes = [tuple(layer.weight.shape) for layer in published.main if isinstance(layer, nn.Conv2d)]
    assert shapes == [(64, 3, 4, 4), (128, 64, 4, 4), (256, 128, 4, 4), (512, 256, 4, 4), (1, 512, 4, 4)]
    assert published(torch.zeros(2, 3, 256, 256)).shape == (2, 30 * 30)


@pytest.mark.parametrize(("layers", "side_of_patch"), [(1, 16), (2, 34), (3, 70)])
def test_a_patch_is_all_that_a_judgement_sees(layers: int, side_of_patch: int) -> None:
    """By gradients, the norms' statistics left out: they are of the whole picture."""
    config = DiscriminatorConfig(channels=32, layers=layers)
    judge = discriminator(config).double()
    for name, layer in list(judge.main.named_children()):
        if isinstance(layer, nn.GroupNorm):
            judge.main[int(name)] = nn.Identity()
    side = 160
    images = torch.rand(1, 3, side, side, dtype=torch.float64, requires_grad=True)
    x = judge.main(images)
    middle = x.shape[-1] // 2
    x[0, 0, middle, middle].backward()
    gradient = images.grad
    assert gradient is not None
    seen = gradient.abs().sum(dim=(0, 1, 2)).nonzero()
    assert int(seen.max() - seen.min()) + 1 == side_of_patch


def test_a_picture_is_judged_alike_in_any_batch() -> None:
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    judge = discriminator()
    torch.testing.assert_close(judge(images), torch.cat([judge(images[:1]), judge(images[1:])]))


def test_hinge_counts_only_what_is_not_yet_beyond_the_margin() -> None:
    real, made = torch.tensor([[2.0, 0.0], [1.0, 1.0]]), torch.tensor([[-3.0, -0.5], [-1.0, -1.0]])
    assert hinge(real, made).tolist() == [(0.5 + 0.25) / 2, 0.0]


def test_the_weight_makes_both_gradients_equal_and_is_bounded() -> None:
    assert float(adaptive_weight(torch.tensor(3.0), torch.tensor(0.5))) == 6.0
    assert float(adaptive_weight(torch.tensor(3.0), torch.tensor(0.0))) == 1e4
    assert float(adaptive_weight(torch.tensor(0.0), torch.tensor(0.0))) == 0.0


def test_it_learns_to_tell_real_from_made() -> None:
    judge = discriminator()
    generator = torch.Generator().manual_seed(2)
    optimizer = torch.optim.Adam(judge.parameters(), lr=1e-3)

    def batch() -> tuple[Tensor, Tensor]:
        noise = torch.rand(2, 4, 3, 32, 32, generator=generator) * 2 - 1
        return noise[0], torch.nn.functional.avg_pool2d(noise[1], 3, 1, 1)

    losses: list[float] = []
    for _ in range(12):
        real, made = batch()
        loss = hinge(judge(real), judge(made)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.3 * losses[0]
