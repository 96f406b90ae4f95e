"""Health checks of long runs: nonfinite losses and gradients, loss spikes, diverging weights."""

import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from vqd_scale.core.errors import UserError
from vqd_scale.core.world import World
from vqd_scale.training.config import HealthConfig, SpikeConfig

logger = logging.getLogger(__name__)

_MAX_LISTED = 4
"""Maximum number of samples listed in a report."""


class GradientProbe:
    """Norms of this rank's own gradients, before the all-reduce.

    Args:
        module: Module whose parameter gradients are measured.
    """

    def __init__(self, module: nn.Module) -> None:
        self._norms: list[Tensor] = []
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.register_hook(self._add_norm)

    def _add_norm(self, gradient: Tensor) -> None:
        self._norms.append(torch.linalg.vector_norm(gradient.detach(), dtype=torch.float32))

    def squared_norm(self) -> Tensor:
        """Return the sum of the squared norms of all gradients since the last call."""
        norms, self._norms = self._norms, []
        return torch.stack(norms).square().sum() if norms else torch.zeros(())


def noise_scale(small: float, big: float, small_batch: float, big_batch: float) -> float:
    """Return the gradient noise scale in images (McCandlish et al., 2018, appendix A.1).

    It approximates the batch size beyond which a larger batch stops to pay off. Numerator and denominator are
    unbiased, but their quotient is not: pass means over many steps.

    Args:
        small: Mean squared gradient norm of micro-batches.
        big: Mean squared gradient norm of global batches.
        small_batch: Images in a micro-batch.
        big_batch: Images in a global batch.

    Returns:
        tr(Σ) / |G|², or NaN if the estimate of |G|² is not positive.
    """
    signal = (big_batch * big - small_batch * small) / (big_batch - small_batch)
    noise = (small - big) / (1 / small_batch - 1 / big_batch)
    return noise / signal if signal > 0 else math.nan


class SpikeDetector:
    """Loss-spike detector, identical on all ranks because its input is the global batch's loss.

    Args:
        config: Detection thresholds.
        batch: Global batch size.

    Attributes:
        consecutive: Number of spikes since the last other batch.
    """

    def __init__(self, config: SpikeConfig, batch: int) -> None:
        self.config = config
        self.batch = batch
        self.consecutive = 0
        self._average = math.nan
        self._images = 0

    def is_spike(self, loss: float) -> bool:
        """Return ``True`` if a batch with this loss is a spike; otherwise add the loss to the average."""
        if self._images >= self.config.half_life_images and loss > self.config.factor * self._average:
            self.consecutive += 1
            return True
        weight = 0.5 ** (self.batch / self.config.half_life_images)
        self._average = weight * self._average + (1 - weight) * loss if self._images else loss
        self._images += self.batch
        self.consecutive = 0
        return False

    def state(self) -> dict[str, Tensor]:
        """Return the detector's state as tensors, equal on all ranks."""
        values = [self._average, self._images, self.consecutive]
        return {"spike": torch.tensor(values, dtype=torch.float64)}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore the result of `state`."""
        self._average, images, consecutive = state["spike"].tolist()
        self._images, self.consecutive = int(images), int(consecutive)


class HealthMonitor:
    """Decisions about nonfinite losses and gradients, loss spikes and differing replicas; equal on all ranks.

    Args:
        config: Health checks.
        run: Run folder, named in messages.
        batch: Global batch size.
        lr: Learning rate of the configuration, for advice.
        module: Module whose parameter gradients are measured.
        world: This process's rank and device.

    Attributes:
        skipped_batches: Number of batches skipped since the start.
    """

    def __init__(
        self, config: HealthConfig, run: Path, batch: int, lr: float, module: nn.Module, world: World
    ) -> None:
        self.config = config
        self.run = run
        self.batch = batch
        self.lr = lr
        self.world = world
        self.skipped_batches = 0
        self.probe = GradientProbe(module)
        self._spikes = SpikeDetector(config.spike, batch) if config.spike is not None else None
        self._consecutive_nonfinite = 0
        self._last_rewind: int | None = None

    def check_losses(
        self,
        images: int,
        losses: Float[Tensor, " batch"],
        valid: Bool[Tensor, " batch"],
        slots: Int[Tensor, " batch"],
        facts: Mapping[str, Tensor],
    ) -> None:
        """Raise on a nonfinite loss before the optimizer step, listing the samples; collective.

        After the gradient all-reduce, the rank of a nonfinite value is unknown.

        Args:
            images: Images seen before the batch.
            losses: Loss of each sample.
            valid: Mask of the samples that count.
            slots: Global index of each sample in the data order.
            facts: Further values to report for each sample, such as its timestep.

        Raises:
            UserError: A loss of some rank is not finite.
        """
        nonfinite = ~losses.detach().isfinite().cpu() & valid.cpu()
        samples = {
            name: values.detach().cpu()[nonfinite][:_MAX_LISTED].tolist()
            for name, values in {"slot": slots, **facts}.items()
        }
        reports = self.world.gathered({"count": int(nonfinite.sum()), "samples": samples})
        sources = [
            f"{report['count']} samples of rank {rank} ("
            + ", ".join(f"{name} {_listed(values)}" for name, values in report["samples"].items())
            + ")"
            for rank, report in enumerate(reports)
            if report["count"]
        ]
        if sources:
            raise UserError(
                f"{self.run}: after {images} images the loss of {' and '.join(sources)} is not finite; "
                f"{self._advice(images)}."
            )

    def check_replicas(self, images: int, module: nn.Module) -> None:
        """Compare replicated weights across ranks, bit for bit; collective.

        Raises:
            UserError: Weights differ, as after an otherwise silent memory or processor fault.
        """
        digests = self.world.concatenated(weights_digest(module)[None])
        differing = (digests != digests.mode(dim=0).values).cpu()
        if differing.any():
            names = [name for name, _ in module.named_parameters()]
            ranks = differing.any(dim=1).nonzero().flatten().tolist()
            first = names[int(differing.any(dim=0).nonzero()[0])]
            raise UserError(
                f"{self.run}: after {images} images the weights of rank {_listed(ranks)} differ from the "
                f"others', '{first}' first; check that machine's memory, and run the same command again."
            )

    def skips(self, images: int) -> bool:
        """Return ``True``, and count it, if the batch after ``images`` images is one of ``skip_batches``."""
        if not any(images <= count < images + self.batch for count in self.config.skip_batches):
            return False
        self.skipped_batches += 1
        self._warn("after %d images a batch of health.skip_batches is skipped.", images)
        return True

    def _advice(self, images: int, alternative: str = "") -> str:
        """Return overrides with which the run continues after the batch at ``images`` stopped it."""
        batches = json.dumps(sorted({*self.config.skip_batches, images}), separators=(",", ":"))
        return (
            f"run the same command again with optim.lr={self.lr / 2:g}, {alternative}or with "
            f"health.skip_batches={batches} to leave out this batch"
        )

    def is_spike(self, loss: float) -> bool:
        """Return ``True`` if a batch with this mean loss must be skipped."""
        return self._spikes is not None and self._spikes.is_spike(loss)

    def skip_spike(self, images: int, loss: float, rewind: Callable[[int], int | None]) -> None:
        """Count a batch skipped for its loss; after too many in a row, rewind or stop.

        Args:
            images: Images seen before the batch.
            loss: Mean loss of the batch.
            rewind: Function that loads the newest checkpoint with fewer images than its argument, and returns
                the checkpoint's images, or ``None`` without a checkpoint.

        Raises:
            UserError: Too many batches in a row were skipped.
        """
        config, spikes = self.config.spike, self._spikes
        if config is None or spikes is None:
            raise RuntimeError("no batch is skipped for its loss unless health.spike is configured")
        self.skipped_batches += 1
        event = f"after {images} images a batch's loss of {loss:.4g} is a spike"
        if spikes.consecutive <= config.max_consecutive:
            self._warn("%s; the batch is skipped.", event)
            return
        event = f"{event}, number {spikes.consecutive} in a row"
        if not config.rewind:
            raise UserError(
                f"{self.run}: {event}; {self._advice(images, 'with health.spike.rewind=true, ')}."
            )
        # Skipped batches do not change the weights: rewind to before the first skipped batch.
        checkpoint = rewind(images - (spikes.consecutive - 1) * self.batch)
        if checkpoint is None or checkpoint == self._last_rewind:
            raise UserError(
                f"{self.run}: {event}, and rewinding to the last checkpoint did not help; "
                f"{self._advice(images)}."
            )
        self._last_rewind = checkpoint
        self._warn("%s; the run is rewound to the weights at %d images.", event, checkpoint)

    def skip_nonfinite_gradient(self, images: int, slots: Tensor, squared_norm: Tensor) -> None:
        """Count a batch skipped for a nonfinite gradient of finite losses, or stop; collective.

        Args:
            images: Images seen before the batch.
            slots: Global index of each sample of this rank in the data order.
            squared_norm: Squared norm of this rank's own gradient.

        Raises:
            UserError: The configuration does not allow it, or not as often in a row.
        """
        report = {"finite": bool(squared_norm.isfinite()), "slots": f"{int(slots[0])} to {int(slots[-1])}"}
        sources = [
            f"rank {rank} (slots {report['slots']})"
            for rank, report in enumerate(self.world.gathered(report))
            if not report["finite"]
        ]
        event = (
            f"after {images} images the gradient of {' and '.join(sources) or 'no single rank'} is not finite"
        )
        self.skipped_batches += 1
        self._consecutive_nonfinite += 1
        is_excessive = self._consecutive_nonfinite > self.config.max_consecutive_nonfinite
        if self.config.nonfinite_gradient == "stop" or is_excessive:
            maximum = f"health.max_consecutive_nonfinite={2 * self.config.max_consecutive_nonfinite + 1}"
            setting = maximum if is_excessive else "health.nonfinite_gradient=skip"
            raise UserError(f"{self.run}: {event}; {self._advice(images, f'with {setting}, ')}.")
        self._warn("%s; the batch is skipped.", f"{self.run}: {event}")

    def on_applied_step(self) -> None:
        """End a series of nonfinite gradients."""
        self._consecutive_nonfinite = 0

    def state(self) -> dict[str, Tensor]:
        """Return the spike detector's state, equal on all ranks."""
        return {} if self._spikes is None else self._spikes.state()

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore the result of `state`; a detector that was disabled before starts anew."""
        if self._spikes is not None and state:
            self._spikes.load_state(state)

    def _warn(self, message: str, *values: object) -> None:
        if self.world.is_first:
            logger.warning(message, *values)


def weights_digest(module: nn.Module) -> Int[Tensor, " parameters"]:
    """Return a checksum per parameter, the sum of its elements' bits; any single bit flip changes it."""
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return torch.stack(
        [
            parameter.detach().view(integers[parameter.element_size()]).sum(dtype=torch.int64)
            for parameter in module.parameters()
        ]
    )


def _listed(values: Sequence[object]) -> str:
    return ", ".join(str(value) for value in values)
