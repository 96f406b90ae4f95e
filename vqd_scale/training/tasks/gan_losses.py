"""Perceptual and adversarial losses of an autoencoder.

Both losses are evaluated on the reconstruction, detached from the autoencoder. Their gradients with respect
to the reconstruction are computed first. The autoencoder then gets a surrogate loss with exactly these
gradients. This needs no access to weights sharded over the ranks, separates the gradients of autoencoder and
discriminator, and gives the adaptive weight without a second backward pass. The discriminator has its own
engine inside the task; the training loop is independent of it.
"""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from vqd_scale.core.tensors import with_prefix, without_prefix
from vqd_scale.core.world import World
from vqd_scale.tokenizers.discriminator import Discriminator, adaptive_weight, hinge
from vqd_scale.training.config import RunConfig
from vqd_scale.training.engine import Engine
from vqd_scale.training.optim import LearningRate
from vqd_scale.training.partition import fill, gather
from vqd_scale.training.tasks.base import mean_of
from vqd_scale.training.tasks.config import AdversarialConfig, AutoencodingConfig

_STEPS = "steps"

PerSample = Float[Tensor, " batch"]


class DiscriminatorTrainer:
    """A discriminator with its own engine and learning-rate schedule.

    Args:
        config: Discriminator configuration.
        run: Run configuration.
        world: This process's rank and device.
    """

    def __init__(self, config: AdversarialConfig, run: RunConfig, world: World) -> None:
        self.config = config
        self.world = world
        self.batch = run.data.global_batch_size
        self.parts = world.size * run.engine.gradient_accumulation_steps
        module = Discriminator(config.network)
        self.engine = Engine(module, run.engine, config.optim, self.batch, world, units=())
        self.rate = LearningRate(config.optim, self.batch, run.total_images)

    def generator_loss(self, images: Tensor, valid: Tensor) -> tuple[PerSample, Tensor]:
        """Return each image's generator loss and its gradient at the image, without weight gradients."""
        images = images.detach().requires_grad_()
        loss = -self.engine.module(images).mean(dim=1)
        (gradient,) = torch.autograd.grad(torch.where(valid, loss, 0.0).sum(), images)
        return loss.detach(), gradient

    def step(self, real: Tensor, generated: Tensor, valid: Tensor, images: int) -> PerSample:
        """Train the discriminator on a micro-batch and return its loss per image."""
        logits = self.engine(torch.cat([real, generated.detach()]))
        loss = hinge(*logits.chunk(2))
        # The engine averages over ranks and micro-batches; a bad sample contributes a loss of zero.
        total = torch.where(valid, loss, 0.0).sum() * self.parts / self.batch
        self.engine.backward(total)
        self.engine.step(self.rate.at(images))
        return loss.detach()

    def state(self) -> dict[str, Tensor]:
        """Return full weights and optimizer moments; collective."""
        partition = self.engine.partition
        state = {_STEPS: torch.tensor(partition.steps)}
        for kind, flats in partition.tensors().items():
            state |= with_prefix(f"{kind}.", gather(partition, flats, self.world))
        return state

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore the result of `state`; each rank loads its partition."""
        partition = self.engine.partition
        for kind, flats in partition.tensors().items():
            fill(partition, flats, without_prefix(state, f"{kind}."))
        partition.steps = int(state[_STEPS])
        partition.masters_changed()


class GANLosses:
    """Perceptual and adversarial losses of a run.

    Args:
        config: Run configuration.
        world: This process's rank and device.

    Raises:
        UserError: The weights of the perceptual distance cannot be read.
    """

    def __init__(self, config: AutoencodingConfig, world: World) -> None:
        self.config = config.losses
        self.pixel_losses = config.reconstruction
        self.world = world
        perceptual, discriminator = config.losses.perceptual, config.losses.discriminator
        self.perceptual = None if perceptual is None else perceptual.build().to(world.device)
        self.discriminator = (
            None if discriminator is None else DiscriminatorTrainer(discriminator, config, world)
        )

    def __call__(
        self, reconstructions: Tensor, signal: Tensor, valid: Tensor, images: int
    ) -> tuple[PerSample | None, dict[str, Tensor]]:
        """Compute the added loss of each sample and train the discriminator on this micro-batch.

        Args:
            reconstructions: Reconstructions with their graph to the autoencoder.
            signal: Original images, in [-1, 1].
            valid: Mask of the samples that count.
            images: Images seen before this batch.

        Returns:
            Loss terms with the values and gradients of the enabled losses, or ``None`` if none is active yet;
            and metrics.
        """
        discriminator = self.discriminator
        if discriminator is not None and images < discriminator.config.start_images:
            discriminator = None
        if self.perceptual is None and discriminator is None:
            return None, {}
        statistics: dict[str, Tensor] = {}
        generated = reconstructions.detach().float().requires_grad_()
        pixels, _ = self.pixel_losses.pixels(generated, signal)
        loss, total = torch.zeros_like(pixels.detach()), pixels
        if self.perceptual is not None:
            distance = self.perceptual(generated, signal)
            statistics["perceptual"] = mean_of(distance, valid.double())
            loss = loss + self.config.perceptual_weight * distance.detach()
            total = pixels + self.config.perceptual_weight * distance
        total_gradient, gradient = _gradients(pixels, total, generated, valid)
        if discriminator is not None:
            generator_loss, generator_gradient = discriminator.generator_loss(generated, valid)
            weight = self._weight(discriminator.config, total_gradient, generator_gradient)
            loss, gradient = loss + weight * generator_loss, gradient + weight * generator_gradient
            discriminator_loss = discriminator.step(signal, generated, valid, images)
            statistics |= {
                "generator": mean_of(generator_loss, valid.double()),
                "discriminator": mean_of(discriminator_loss, valid.double()),
                "adversarial_weight": torch.stack([weight, torch.ones_like(weight)]).double(),
            }
        # Surrogate term: value zero, with the gradients computed above.
        surrogate = (reconstructions.float() * gradient).flatten(1).sum(dim=1)
        return loss + surrogate - surrogate.detach(), statistics

    def state(self) -> dict[str, Tensor]:
        """Return the discriminator's state; collective."""
        return {} if self.discriminator is None else self.discriminator.state()

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore the result of `state`."""
        if self.discriminator is not None:
            self.discriminator.load_state(state)

    def _weight(
        self, config: AdversarialConfig, total_gradient: Tensor, generator_gradient: Tensor
    ) -> Tensor:
        """Return the weight of the adversarial loss; if adaptive, computed over all ranks' samples."""
        if not config.adaptive:
            return total_gradient.new_full((), config.weight)
        squares = torch.stack([total_gradient.square().sum(), generator_gradient.square().sum()])
        return config.weight * adaptive_weight(*self.world.sum(squares).sqrt().unbind())


def _gradients(pixels: Tensor, total: Tensor, images: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients at the images of all losses but the adversarial one, and of their added part."""

    def gradient_of(loss: Tensor) -> Tensor:
        return torch.autograd.grad(torch.where(valid, loss, 0.0).sum(), images, retain_graph=True)[0]

    pixel_gradient = gradient_of(pixels)
    total_gradient = pixel_gradient if total is pixels else gradient_of(total)
    return total_gradient, total_gradient - pixel_gradient
