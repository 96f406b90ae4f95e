"""Training task of VQ-Diffusion: token denoising with the variational bound and the auxiliary loss."""

from collections.abc import Mapping
from typing import cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from vqd_scale.core.errors import UserError
from vqd_scale.core.rng import Purpose
from vqd_scale.core.world import World
from vqd_scale.data.loading.batch import TokenBatch
from vqd_scale.diffusion.noise import uniforms
from vqd_scale.diffusion.objective import Objective
from vqd_scale.diffusion.timestep_sampler import TimeSampler
from vqd_scale.diffusion.transition import MaskAndReplace
from vqd_scale.models.bundle import Model, schedule_of
from vqd_scale.models.config import BundleConfig
from vqd_scale.nn.flops import forward_flops
from vqd_scale.training.partition import Partition
from vqd_scale.training.tasks.base import Forward, Losses, mean_of
from vqd_scale.training.tasks.config import TrainConfig
from vqd_scale.training.tasks.token_task import TokenTask

_TIME_BINS = 10
_VALIDATION_TIMES = 8
"""Number of equidistant timesteps at which each validation sample is evaluated."""


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
        condition_ids: Tensor,
        dropped: Bool[Tensor, " batch"],
        valid: Bool[Tensor, " batch"],
    ) -> tuple[Float[Tensor, " batch"], ...]:
        """Return each sample's loss (differentiable), bound term and cross-entropy, and the accuracies."""
        condition = self.model.condition_inputs(condition_ids, dropped)

        def head_function(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
            output = self.objective(hidden, weight, bias, tokens, noisy, t)
            counts = (
                output.masked_correct,
                output.masked_count,
                output.visible_correct,
                output.visible_count,
            )
            accuracies = torch.stack([(value * valid).sum() for value in counts])
            return output.loss_per_image, output.vlb_per_image, output.cross_entropy_per_image, accuracies

        return self.model.denoiser(noisy, t, condition, head_function)


class DenoisingTask(TokenTask):
    """Training task of a denoiser.

    Args:
        config: Run configuration.
        world: This process's rank and device.

    Raises:
        UserError: See `TokenTask`.
    """

    def __init__(self, config: TrainConfig, world: World) -> None:
        super().__init__(config, world)
        self.config = config
        self.bundle = bundle = BundleConfig(
            codebook_size=self.meta.codes,
            grid=self.meta.grid,
            denoiser=config.denoiser,
            text=config.text,
            diffusion=config.diffusion,
        )
        model = self.use(lambda: Model(bundle))
        self.transition = MaskAndReplace(config.diffusion, self.meta.codes)
        self.module = DenoisingStep(model, Objective(self.transition, config.objective))
        self.times = TimeSampler(config.timestep_sampler, self.transition.steps, world.device)

    @property
    def forward_flops(self) -> int:
        """FLOPs of the denoiser's forward pass, without the text encoder."""
        config, meta, samples = self.config, self.meta, self.samples()
        return forward_flops(
            lambda: cast(nn.Module, config.denoiser.build(meta.codes, meta.grid, config.diffusion.steps)),
            samples.length,
            config.denoiser.condition,
            samples.text_length,
            timed=True,
        )

    def init_weights(self, partition: Partition) -> None:
        """Load a trained model's weights if ``init_from`` is set.

        Raises:
            UserError: See `TokenTask.init_weights`; or the model has another number of timesteps.
        """
        start, steps = self.config.init_from, self.transition.steps
        if start is not None and (trained_steps := schedule_of(start.bundle).steps) != steps:
            raise UserError(
                f"{start.bundle}: this model was trained with {trained_steps} timesteps, and diffusion.steps "
                f"is {steps}; set diffusion.steps to {trained_steps}."
            )
        super().init_weights(partition)

    def losses(self, forward: Forward, batch: TokenBatch, images: int) -> Losses:
        """Denoise, with timestep, noise and condition dropout keyed by each sample's slot."""
        seed, slots, tokens, valid = self.config.seed, batch.slots, batch.tokens, batch.valid
        t, probability = self.times.sample(uniforms(seed, Purpose.TIMESTEP, slots, 1)[:, 0])
        # float64: after a rare replacement, the remaining bits of a 24-bit uniform reach only a few codes.
        noise = uniforms(seed, Purpose.CORRUPTION, slots, tokens.shape[1], dtype=torch.float64)
        noisy = self.transition.corrupt(tokens, t, noise)
        condition, dropped = self.condition_inputs(batch)
        loss, bound, cross_entropy, accuracies = forward(tokens, noisy, t, condition, dropped, valid)
        self.times.observe(t, bound * tokens.shape[1], valid.float())
        weight = valid.double()
        statistics = {
            "bound": mean_of(bound / probability, weight),
            "cross_entropy": mean_of(cross_entropy, weight),
            "accuracy_masked": accuracies[:2],
            "accuracy_visible": accuracies[2:],
        }
        for bin in range(_TIME_BINS):
            bin_weight = weight * (t * _TIME_BINS // self.transition.steps == bin)
            statistics[f"cross_entropy_t{bin}"] = mean_of(cross_entropy, bin_weight)
        return Losses(loss / probability, statistics, {"t": t})

    def validate(self, forward: Forward, batch: TokenBatch) -> dict[str, Tensor]:
        """Compute bound and cross-entropy in nats per token, at equidistant timesteps with fixed noise."""
        steps, slots, tokens, valid = self.transition.steps, batch.slots, batch.tokens, batch.valid
        condition, _ = self.condition_inputs(batch)
        weight = valid.double()
        metrics: dict[str, Tensor] = {}
        for number in range(_VALIDATION_TIMES):
            t = torch.full_like(slots, (2 * number + 1) * steps // (2 * _VALIDATION_TIMES))
            # A fixed seed, independent of the run's seed, and different noise at every timestep.
            noise_slots = slots * _VALIDATION_TIMES + number
            noise = uniforms(0, Purpose.EVALUATION, noise_slots, tokens.shape[1], dtype=torch.float64)
            noisy = self.transition.corrupt(tokens, t, noise)
            _, bound, cross_entropy, _ = forward(tokens, noisy, t, condition, torch.zeros_like(valid), valid)
            metrics[f"bound_t{number}"] = mean_of(bound * steps, weight)
            metrics[f"cross_entropy_t{number}"] = mean_of(cross_entropy, weight)
        for name in ("bound", "cross_entropy"):
            per_time = [value for key, value in metrics.items() if key.startswith(f"{name}_t")]
            metrics[name] = torch.stack(per_time).sum(dim=0)
        return metrics

    def on_step_end(self, images: int) -> None:
        """Update the timestep distribution with the losses of all ranks."""
        self.times.synchronize(self.world.sum)

    def state(self) -> dict[str, Tensor]:
        """Return the timestep distribution."""
        return self.times.state_dict()

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore the timestep distribution."""
        self.times.load_state_dict(dict(state))
