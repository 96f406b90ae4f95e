"""PatchGAN discriminator (Isola et al., arXiv 1611.07004), its hinge loss and the adaptive loss weight."""

from itertools import pairwise

from jaxtyping import Float
from torch import Tensor, nn

from vqd_scale.tokenizers.base import Images
from vqd_scale.tokenizers.config import NORM_GROUPS, DiscriminatorConfig

_KERNEL = 4
_SLOPE = 0.2
_DEVIATION = 0.02
"""Standard deviation of the initial convolution weights, as published."""
_SMALLEST_NORM = 1e-8
_LARGEST_WEIGHT = 1e4


class Discriminator(nn.Module):
    """PatchGAN: one logit per image patch; high means real.

    Group norm replaces the published batch norm, so an image's logits depend neither on its batch nor on the
    number of ranks.

    Args:
        config: Architecture.
    """

    def __init__(self, config: DiscriminatorConfig) -> None:
        super().__init__()
        widths = [config.channels * min(2**layer, 8) for layer in range(config.layers + 1)]
        layers: list[nn.Module] = [nn.Conv2d(3, widths[0], _KERNEL, 2, 1), nn.LeakyReLU(_SLOPE)]
        for layer, (width, out_width) in enumerate(pairwise(widths), start=1):
            stride = 2 if layer < config.layers else 1
            layers += [
                nn.Conv2d(width, out_width, _KERNEL, stride, 1),
                nn.GroupNorm(NORM_GROUPS, out_width),
                nn.LeakyReLU(_SLOPE),
            ]
        layers.append(nn.Conv2d(widths[-1], 1, _KERNEL, 1, 1))
        self.main = nn.Sequential(*layers)
        for layer in layers:
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, std=_DEVIATION)

    def forward(self, images: Images) -> Float[Tensor, "batch patches"]:
        """Compute the patch logits of images in [-1, 1], in the dtype of the weights."""
        first = self.main[0]
        return self.main(images.to(next(first.parameters()).dtype)).flatten(1).float()


def hinge(
    real: Float[Tensor, "batch patches"], fake: Float[Tensor, "batch patches"]
) -> Float[Tensor, " batch"]:
    """Compute the discriminator loss: half the sum of the mean hinge losses of real and generated images."""
    return ((1 - real).relu().mean(dim=1) + (1 + fake).relu().mean(dim=1)) / 2


def adaptive_weight(reconstruction: Float[Tensor, ""], adversarial: Float[Tensor, ""]) -> Float[Tensor, ""]:
    """Compute the adaptive weight of the adversarial loss (VQ-GAN, arXiv 2012.09841, equation 7).

    The weight is a ratio of gradient norms. The paper takes the gradients at the decoder's last weight. Under
    ZeRO no rank has that gradient, so here they are taken at the decoder's output, the reconstructed image.

    Args:
        reconstruction: Norm of the gradient of all other losses.
        adversarial: Norm of the gradient of the adversarial loss.
    """
    return (reconstruction / adversarial.clamp(min=_SMALLEST_NORM)).clamp(max=_LARGEST_WEIGHT).detach()
