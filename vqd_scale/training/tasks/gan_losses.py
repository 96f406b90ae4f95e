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
from pydantic import NonNegativeFloat, NonNegativeInt
from torch import Tensor

from vqd_scale.core.config import Config
from vqd_scale.core.world import World
from vqd_scale.tokenizers.discriminator import Discriminator, DiscriminatorConfig, adaptive_weight, hinge
from vqd_scale.tokenizers.perceptual import PerceptualConfig, build_perceptual
from vqd_scale.training.config import RunConfig
from vqd_scale.training.engine import Engine
from vqd_scale.training.logging.sample_images import whole_parameters
from vqd_scale.training.optim import ConstantRate, LearningRate, OptimConfig
from vqd_scale.training.partition import fill
from vqd_scale.training.tasks.base import mean_of

_MOMENTS = ("exp_avg", "exp_avg_sq")
_STEPS = "steps"

PerSample = Float[Tensor, " batch"]


class AdversarialConfig(Config):
    """Patch discriminator and the weight of its loss."""

    start_images: NonNegativeInt = 250_000
    """Images before the adversarial loss starts; earlier reconstructions are too poor for it to help."""
    weight: NonNegativeFloat = 0.8
    """Weight of the adversarial loss, as a multiple of the adaptive weight (VQ-GAN eq. 7), which makes its
    gradient as large as that of all other losses."""
    adaptive: bool = True
    """Compute the adaptive weight at every step; if false, the adaptive weight is 1."""
    network: DiscriminatorConfig = DiscriminatorConfig()
    optim: OptimConfig = OptimConfig(lr=4.5e-6, betas=(0.5, 0.9), weight_decay=0.0, schedule=ConstantRate())


class GANLossesConfig(Config):
    """Perceptual and adversarial losses, in addition to the pixel loss."""

    perceptual: PerceptualConfig | None = None
    """Perceptual distance; disabled if not given."""
    perceptual_weight: NonNegativeFloat = 1.0
    """Weight of the perceptual distance."""
    discriminator: AdversarialConfig | None = None


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

    def gradient(self, images: Tensor, valid: Tensor) -> tuple[PerSample, Tensor]:
        """Return each image's generator loss and its gradient at the image, without weight gradients."""
        seen = images.detach().requires_grad_()
        value = -self.engine.module(seen).mean(dim=1)
        (gradient,) = torch.autograd.grad(torch.where(valid, value, 0.0).sum(), seen)
        return value.detach(), gradient

    def learn(self, real: Tensor, made: Tensor, valid: Tensor, images: int) -> PerSample:
        """Train the discriminator on a micro-batch and return its loss per image."""
        judged = self.engine(torch.cat([real, made.detach()]))
        loss = hinge(*judged.chunk(2))
        # The engine averages over ranks and micro-batches; a bad sample contributes a loss of zero.
        total = torch.where(valid, loss, 0.0).sum() * self.parts / self.batch
        self.engine.backward(total)
        self.engine.step(self.rate.at(images))
        return loss.detach()

    def state(self) -> dict[str, Tensor]:
        """Return full weights and optimizer moments; collective."""
        partition = self.engine.partition
        kinds = {"master": partition.masters, **{name: partition.moments(name) for name in _MOMENTS}}
        found = {
            f"{kind}.{name}": value
            for kind, flats in kinds.items()
            for name, value in whole_parameters(partition, flats, self.world).items()
        }
        return found | {_STEPS: torch.tensor(partition.steps)}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore the result of `state`; each rank loads its partition."""
        partition = self.engine.partition
        for kind, flats in (
            ("master", partition.masters),
            *((name, partition.moments(name)) for name in _MOMENTS),
        ):
            prefix = f"{kind}."
            fill(
                partition,
                flats,
                {name.removeprefix(prefix): state[name] for name in state if name.startswith(prefix)},
            )
        partition.steps = int(state[_STEPS])
        partition.masters_changed()


class GANLosses:
    """Perceptual and adversarial losses of a run.

    Args:
        config: Enabled losses.
        run: Run configuration.
        world: This process's rank and device.

    Raises:
        UserError: The weights of the perceptual distance cannot be read.
    """

    def __init__(self, config: GANLossesConfig, run: RunConfig, world: World) -> None:
        self.config = config
        self.world = world
        self.perceptual = None if config.perceptual is None else build_perceptual(config.perceptual)
        if self.perceptual is not None:
            self.perceptual.to(world.device)
        self.adversary = (
            None if config.discriminator is None else DiscriminatorTrainer(config.discriminator, run, world)
        )

    def validate(
        self, made: Tensor, signal: Tensor, pixels: PerSample, shown: Tensor, valid: Tensor, images: int
    ) -> tuple[PerSample | None, dict[str, Tensor]]:
        """Compute the added loss of each sample and train the discriminator on this micro-batch.

        Args:
            made: Reconstructions with their graph to the autoencoder.
            signal: Original images, in [-1, 1].
            pixels: Pixel loss of each sample, differentiable with respect to ``shown``.
            shown: Reconstructions detached from the autoencoder, float32.
            valid: Mask of the samples that count.
            images: Images seen before this batch.

        Returns:
            Loss terms with the values and gradients of the enabled losses, or ``None`` if none is active yet;
            and metrics.
        """
        statistics: dict[str, Tensor] = {}
        adversary = self.adversary
        is_on = adversary is not None and images >= adversary.config.start_images
        if self.perceptual is None and not is_on:
            return None, statistics
        weighed = torch.zeros_like(pixels.detach())
        rest = pixels
        if self.perceptual is not None:
            looks = self.perceptual(shown, signal)
            statistics["perceptual"] = mean_of(looks, valid.double())
            weighed = weighed + self.config.perceptual_weight * looks.detach()
            rest = pixels + self.config.perceptual_weight * looks
        (known, gradient) = self._gradients(pixels, rest, shown, valid, is_on)
        if adversary is not None and is_on:
            value, pull = adversary.gradient(shown, valid)
            weight = self._weight(adversary, known, pull)
            weighed, gradient = weighed + weight * value, gradient + weight * pull
            loss = adversary.learn(signal, shown, valid, images)
            statistics |= {
                "made_looks_made": mean_of(value, valid.double()),
                "discriminator": mean_of(loss, valid.double()),
                "adversarial_weight": torch.stack([weight.double().cpu(), torch.ones(()).double()]),
            }
        # Surrogate term: value zero, with the gradients computed above.
        pull = (made.float() * gradient).flatten(1).sum(dim=1)
        return weighed + pull - pull.detach(), statistics

    def state(self) -> dict[str, Tensor]:
        """Return the discriminator's state; collective."""
        return {} if self.adversary is None else self.adversary.state()

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore the result of `state`."""
        if self.adversary is not None:
            self.adversary.load_state(state)

    def _gradients(
        self, pixels: Tensor, rest: Tensor, shown: Tensor, valid: Tensor, needed: bool
    ) -> tuple[Tensor, Tensor]:
        """Return the gradients at the image of all losses but the adversarial one, and of the added part."""
        of_pixels = torch.zeros_like(shown)
        if needed or rest is not pixels:
            total = torch.where(valid, pixels, 0.0).sum()
            (of_pixels,) = torch.autograd.grad(total, shown, retain_graph=rest is not pixels)
        if rest is pixels:
            return of_pixels, torch.zeros_like(shown)
        (of_all,) = torch.autograd.grad(torch.where(valid, rest, 0.0).sum(), shown)
        return of_all, of_all - of_pixels

    def _weight(self, adversary: DiscriminatorTrainer, known: Tensor, pull: Tensor) -> Tensor:
        """Return the weight of the adversarial loss; if adaptive, computed over all ranks' samples."""
        if not adversary.config.adaptive:
            return known.new_tensor(adversary.config.weight)
        squared = torch.stack([known.square().sum(), pull.square().sum()])
        return adversary.config.weight * adaptive_weight(*self.world.sum(squared).sqrt().unbind())
