"""Who looks at a reconstruction beside the pixels: a perceptual distance, and a discriminator that learns.

Both look at the decoder's last activation, the picture, cut off from the network that made it: their
gradients at the picture are taken first, and the network then gets a loss with these very gradients. So
nothing is asked of a weight that lies cut among the ranks, no gradient of the one reaches the other, and the
adaptive weight costs no second pass. The discriminator is the second engine of a task: the loop knows nothing
of it.
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
    """A discriminator of patches, and what its judgement counts."""

    start_images: NonNegativeInt = 250_000
    """Images after which it joins: until then there is nothing worth telling apart."""
    weight: NonNegativeFloat = 0.8
    """Of its judgement, in units of the weight that makes its gradient as large as that of all else."""
    adaptive: bool = True
    """Whether that unit is measured at every step; else it is 1."""
    network: DiscriminatorConfig = DiscriminatorConfig()
    optim: OptimConfig = OptimConfig(lr=4.5e-6, betas=(0.5, 0.9), weight_decay=0.0, schedule=ConstantRate())


class GANLossesConfig(Config):
    """What a reconstruction is judged by beside its pixels."""

    perceptual: PerceptualConfig | None = None
    """A distance of how pictures look; none: by pixels alone."""
    perceptual_weight: NonNegativeFloat = 1.0
    discriminator: AdversarialConfig | None = None


class DiscriminatorTrainer:
    """A discriminator with its engine and learning rate.

    Args:
        config: What it is.
        run: The run that it takes part in.
        world: This process's place among the ranks.
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
        """How made each picture looks, and its gradient at the picture; no weight gets one."""
        seen = images.detach().requires_grad_()
        value = -self.engine.module(seen).mean(dim=1)
        (gradient,) = torch.autograd.grad(torch.where(valid, value, 0.0).sum(), seen)
        return value.detach(), gradient

    def learn(self, real: Tensor, made: Tensor, valid: Tensor, images: int) -> PerSample:
        """Learn from a part of a batch; returns the loss of each picture."""
        judged = self.engine(torch.cat([real, made.detach()]))
        loss = hinge(*judged.chunk(2))
        # The engine averages over ranks and parts; a bad sample counts as one that taught nothing.
        total = torch.where(valid, loss, 0.0).sum() * self.parts / self.batch
        self.engine.backward(total)
        self.engine.step(self.rate.at(images))
        return loss.detach()

    def state(self) -> dict[str, Tensor]:
        """Whole weights and moments; all ranks together."""
        partition = self.engine.partition
        kinds = {"master": partition.masters, **{name: partition.moments(name) for name in _MOMENTS}}
        found = {
            f"{kind}.{name}": value
            for kind, flats in kinds.items()
            for name, value in whole_parameters(partition, flats, self.world).items()
        }
        return found | {_STEPS: torch.tensor(partition.steps)}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take them back, each rank its share."""
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
    """All critics of a run.

    Args:
        config: Which there are.
        run: The run.
        world: This process's place among the ranks.

    Raises:
        UserError: The perceptual distance's weights cannot be read.
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
        """What the critics add to each sample's loss, and the discriminator's step.

        Args:
            made: The reconstructions as the network made them, differentiable.
            signal: What they should be, [-1, 1].
            pixels: Each sample's loss of pixels, differentiable at ``shown``.
            shown: The same reconstructions cut off from the network, float32.
            valid: Which samples count.
            images: Images the run had seen before this batch.

        Returns:
            Loss terms with the critics' values and gradients, or ``None`` if there are no critics yet; and
            statistics.
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
        # Of value zero, and of the gradients found.
        pull = (made.float() * gradient).flatten(1).sum(dim=1)
        return weighed + pull - pull.detach(), statistics

    def state(self) -> dict[str, Tensor]:
        """What the discriminator is; all ranks together."""
        return {} if self.adversary is None else self.adversary.state()

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take it back."""
        if self.adversary is not None:
            self.adversary.load_state(state)

    def _gradients(
        self, pixels: Tensor, rest: Tensor, shown: Tensor, valid: Tensor, needed: bool
    ) -> tuple[Tensor, Tensor]:
        """Gradients at the picture: of all that is no discriminator's, and of what the critics add to it."""
        of_pixels = torch.zeros_like(shown)
        if needed or rest is not pixels:
            total = torch.where(valid, pixels, 0.0).sum()
            (of_pixels,) = torch.autograd.grad(total, shown, retain_graph=rest is not pixels)
        if rest is pixels:
            return of_pixels, torch.zeros_like(shown)
        (of_all,) = torch.autograd.grad(torch.where(valid, rest, 0.0).sum(), shown)
        return of_all, of_all - of_pixels

    def _weight(self, adversary: DiscriminatorTrainer, known: Tensor, pull: Tensor) -> Tensor:
        """The discriminator's weight, measured over all ranks' samples."""
        if not adversary.config.adaptive:
            return known.new_tensor(adversary.config.weight)
        squared = torch.stack([known.square().sum(), pull.square().sum()])
        return adversary.config.weight * adaptive_weight(*self.world.sum(squared).sqrt().unbind())
