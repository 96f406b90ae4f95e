"""Training task of VQ-Diffusion: token denoising with the variational bound and the auxiliary loss."""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from vqd_scale.core.errors import UserError
from vqd_scale.core.rng import Purpose
from vqd_scale.core.world import World
from vqd_scale.data.loading.batch import TokenBatch
from vqd_scale.data.loading.sample_readers import TokenSamples
from vqd_scale.diffusion.noise import uniforms
from vqd_scale.diffusion.objective import Objective, ObjectiveConfig
from vqd_scale.diffusion.schedule import Paper, Schedule
from vqd_scale.diffusion.timestep_sampler import Times, TimeSampler, Uniform
from vqd_scale.diffusion.transition import MaskAndReplace
from vqd_scale.models.bundle import BundleConfig, Model, save_bundle, schedule_of
from vqd_scale.nn.denoiser import DenoiserConfig
from vqd_scale.nn.flops import forward_flops
from vqd_scale.nn.network import NetworkConfig, build_network
from vqd_scale.training.engine import placement
from vqd_scale.training.partition import Partition
from vqd_scale.training.tasks.base import Forward, Losses, mean_of
from vqd_scale.training.tasks.token_task import TokenRunConfig, TokenSource, weights_of_model

_TIME_BINS = 10
_JUDGED_TIMES = 8
"""Number of equidistant timesteps at which each validation sample is evaluated."""


class TrainConfig(TokenRunConfig):
    """Configuration for training a denoiser on token shards."""

    kind: Literal["denoising"] = "denoising"
    denoiser: NetworkConfig = DenoiserConfig()
    diffusion: Schedule = Paper()
    objective: ObjectiveConfig = ObjectiveConfig()
    timestep_sampler: Times = Uniform()


class DenoisingStep(nn.Module):
    """Module wrapped by the engine: tokens to losses in one forward.

    Args:
        model: Denoiser with its conditioning.
        objective: Loss, called inside the head because ZeRO-3 gathers the head's weight only there.
    """

    def __init__(self, model: Model, objective: Objective) -> None:
        super().__init__()
        self.model = model
        self.objective = objective

    def forward(
        self,
        tokens: Int[Tensor, "batch length"],
        noisy: Int[Tensor, "batch length"],
        t: Int[Tensor, " batch"],
        given: Tensor,
        dropped: Bool[Tensor, " batch"],
        valid: Bool[Tensor, " batch"],
    ) -> tuple[Float[Tensor, " batch"], ...]:
        """Return each sample's loss (differentiable), bound term and cross-entropy, and the accuracies."""
        condition = self.model.condition_inputs(given, dropped)

        def consume(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
            output = self.objective(hidden, weight, bias, tokens, noisy, t)
            counted = (
                output.masked_correct,
                output.masked_count,
                output.visible_correct,
                output.visible_count,
            )
            accuracies = torch.stack([(value * valid).sum() for value in counted])
            return output.loss_per_image, output.vlb_per_image, output.cross_entropy_per_image, accuracies

        return self.model.denoiser(noisy, t, condition, consume)


class DenoisingTask:
    """Implementation of `vqd_scale.training.tasks.base.Task` for a denoiser.

    Args:
        config: Run configuration.
        world: This process's rank and device.

    Raises:
        UserError: The token shards were produced by another tokenizer or for another caption vocabulary.
    """

    def __init__(self, config: TrainConfig, world: World) -> None:
        self.config = config
        self.world = world
        self.source = TokenSource(config, world)
        meta = self.source.meta
        self.bundle = BundleConfig(
            codebook_size=meta.codes,
            grid=meta.grid,
            denoiser=config.denoiser,
            text=config.text,
            diffusion=config.diffusion,
        )
        torch.manual_seed(config.seed)
        where = placement(config.engine, world)
        model = Model(self.bundle, where)
        self.read = self.source.samples(model)
        self.source.start(model.denoiser.code_tables, where)
        self.units = model.denoiser.units
        self.transition = MaskAndReplace(config.diffusion, meta.codes)
        self.module = DenoisingStep(model, Objective(self.transition, config.objective))
        self.times = TimeSampler(config.timestep_sampler, self.transition.steps, world.device)

    @property
    def forward_flops(self) -> int:
        """FLOPs of the denoiser's forward pass, without the text encoder."""
        bundle = self.bundle
        rows, columns = bundle.grid
        return forward_flops(
            lambda: cast(
                nn.Module,
                build_network(bundle.denoiser, bundle.codebook_size, bundle.grid, bundle.diffusion.steps),
            ),
            rows * columns,
            bundle.denoiser.condition,
            self.read.text_length,
            timed=True,
        )

    def init_weights(self, partition: Partition) -> None:
        """Load a trained model's weights if ``init_from`` is set.

        Raises:
            UserError: See `TokenSource.init_weights`; or the model has another number of timesteps.
        """
        start, steps = self.config.init_from, self.transition.steps
        if start is not None and (theirs := schedule_of(start.bundle).steps) != steps:
            raise UserError(
                f"{start.bundle}: this model knows {theirs} timesteps, and diffusion.steps is {steps}; give "
                "the run the model's number."
            )
        self.source.init_weights(partition)

    def samples(self) -> TokenSamples:
        """Return tokens with captions or classes as the kind of samples."""
        return self.read

    def losses(self, forward: Forward, batch: TokenBatch, images: int) -> Losses:
        """Denoise, with timestep, noise and condition dropout keyed by each sample's slot."""
        seed, slots, tokens, valid = self.config.seed, batch.slots, batch.tokens, batch.valid
        t, probability = self.times.draw(uniforms(seed, Purpose.TIMESTEP, slots, 1)[:, 0])
        # float64: after a rare replacement, the remaining bits of a 24-bit uniform reach only a few codes.
        noise = uniforms(seed, Purpose.CORRUPTION, slots, tokens.shape[1], dtype=torch.float64)
        noisy = self.transition.corrupt(tokens, t, noise)
        given, dropped = self.source.condition_inputs(batch)
        loss, bound, cross_entropy, accuracies = forward(tokens, noisy, t, given, dropped, valid)
        self.times.observe(t, bound * tokens.shape[1], valid.float())
        weight = valid.double()
        statistics = {
            "bound": mean_of(bound / probability, weight),
            "cross_entropy": mean_of(cross_entropy, weight),
            "accuracy_masked": accuracies[:2],
            "accuracy_visible": accuracies[2:],
        }
        for bin in range(_TIME_BINS):
            inside = weight * (t * _TIME_BINS // self.transition.steps == bin)
            statistics[f"cross_entropy_t{bin}"] = mean_of(cross_entropy, inside)
        return Losses(loss / probability, statistics, {"t": t})

    def validate(self, forward: Forward, batch: TokenBatch) -> dict[str, Tensor]:
        """Compute bound and cross-entropy in nats per token, at equidistant timesteps with fixed noise."""
        steps, slots, tokens, valid = self.transition.steps, batch.slots, batch.tokens, batch.valid
        given, _ = self.source.condition_inputs(batch)
        weight = valid.double()
        found: dict[str, Tensor] = {}
        for number in range(_JUDGED_TIMES):
            t = torch.full_like(slots, (2 * number + 1) * steps // (2 * _JUDGED_TIMES))
            # A fixed seed, independent of the run's seed, and different noise at every timestep.
            drawn = slots * _JUDGED_TIMES + number
            noise = uniforms(0, Purpose.EVALUATION, drawn, tokens.shape[1], dtype=torch.float64)
            noisy = self.transition.corrupt(tokens, t, noise)
            _, bound, cross_entropy, _ = forward(tokens, noisy, t, given, torch.zeros_like(valid), valid)
            found[f"bound_t{number}"] = mean_of(bound * steps, weight)
            found[f"cross_entropy_t{number}"] = mean_of(cross_entropy, weight)
        for name in ("bound", "cross_entropy"):
            at_times = [value for key, value in found.items() if key.startswith(f"{name}_t")]
            found[name] = torch.stack(at_times).sum(dim=0)
        return found

    def on_step_end(self, images: int) -> None:
        """Update the timestep distribution with the losses of all ranks."""
        self.times.synchronise(self.world.sum)

    def state(self) -> dict[str, Tensor]:
        """Return the timestep distribution."""
        return self.times.state_dict()

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore the timestep distribution."""
        self.times.load_state_dict(dict(state))

    def export(self, parameters: Mapping[str, Tensor], folder: Path) -> None:
        """Write a bundle for `vqd_scale.models.pipeline.TextToImage`."""
        save_bundle(folder, self.bundle, weights_of_model(parameters), self.config.tokenizer)
