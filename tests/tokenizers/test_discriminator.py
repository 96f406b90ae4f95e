import pytest
import torch
from torch import Tensor, nn

from vqd_scale.tokenizers.config import DiscriminatorConfig
from vqd_scale.tokenizers.discriminator import Discriminator, adaptive_weight, hinge

SMALL = DiscriminatorConfig(channels=32, layers=2)


def discriminator(config: DiscriminatorConfig = SMALL) -> Discriminator:
    torch.manual_seed(0)
    return Discriminator(config)


def test_published_architecture() -> None:
    published = discriminator(DiscriminatorConfig())
    shapes = [tuple(layer.weight.shape) for layer in published.main if isinstance(layer, nn.Conv2d)]
    assert shapes == [(64, 3, 4, 4), (128, 64, 4, 4), (256, 128, 4, 4), (512, 256, 4, 4), (1, 512, 4, 4)]
    assert published(torch.zeros(2, 3, 256, 256)).shape == (2, 30 * 30)


@pytest.mark.parametrize(("layers", "side_of_patch"), [(1, 16), (2, 34), (3, 70)])
def test_receptive_field_is_one_patch(layers: int, side_of_patch: int) -> None:
    """Measure the receptive field by gradients, without norms, whose statistics cover the full image."""
    config = DiscriminatorConfig(channels=32, layers=layers)
    network = discriminator(config).double()
    for name, layer in list(network.main.named_children()):
        if isinstance(layer, nn.GroupNorm):
            network.main[int(name)] = nn.Identity()
    side = 160
    images = torch.rand(1, 3, side, side, dtype=torch.float64, requires_grad=True)
    x = network.main(images)
    middle = x.shape[-1] // 2
    x[0, 0, middle, middle].backward()
    gradient = images.grad
    assert gradient is not None
    patch_positions = gradient.abs().sum(dim=(0, 1, 2)).nonzero()
    assert int(patch_positions.max() - patch_positions.min()) + 1 == side_of_patch


def test_score_of_an_image_does_not_depend_on_batch() -> None:
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    network = discriminator()
    torch.testing.assert_close(network(images), torch.cat([network(images[:1]), network(images[1:])]))


def test_hinge_loss_is_zero_beyond_the_margin() -> None:
    real, generated = torch.tensor([[2.0, 0.0], [1.0, 1.0]]), torch.tensor([[-3.0, -0.5], [-1.0, -1.0]])
    assert hinge(real, generated).tolist() == [(0.5 + 0.25) / 2, 0.0]


def test_adaptive_weight_balances_gradients_and_is_bounded() -> None:
    assert float(adaptive_weight(torch.tensor(3.0), torch.tensor(0.5))) == 6.0
    assert float(adaptive_weight(torch.tensor(3.0), torch.tensor(0.0))) == 1e4
    assert float(adaptive_weight(torch.tensor(0.0), torch.tensor(0.0))) == 0.0


def test_discriminator_learns_to_separate_real_from_generated() -> None:
    network = discriminator()
    generator = torch.Generator().manual_seed(2)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)

    def batch() -> tuple[Tensor, Tensor]:
        noise = torch.rand(2, 4, 3, 32, 32, generator=generator) * 2 - 1
        return noise[0], torch.nn.functional.avg_pool2d(noise[1], 3, 1, 1)

    losses: list[float] = []
    for _ in range(12):
        real, generated = batch()
        loss = hinge(network(real), network(generated)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.3 * losses[0]
