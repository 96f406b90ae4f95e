"""Health checks of long runs: nonfinite losses and gradients, loss spikes, diverging weights, hangs."""

import faulthandler
import math
import os
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn

from vqd_scale.core.config import Config
from vqd_scale.core.errors import UserError
from vqd_scale.core.signals import HUNG_EXIT_CODE
from vqd_scale.core.world import World

_NAMED = 4
"""Maximum number of samples listed in a report."""


class SpikeConfig(Config):
    """Skipping of batches with a loss spike."""

    factor: float = Field(default=3.0, gt=1)
    """Skip threshold for a batch's loss, as a multiple of the moving average of the loss."""
    half_life_images: PositiveInt = 50_000
    """Half-life of the moving average in images. No batch is skipped before this many images."""
    max_consecutive: NonNegativeInt = 5
    """Maximum number of consecutive skipped batches; one more stops or rewinds the run."""
    rewind: bool = False
    """Rewind to the weights of the last checkpoint instead of stopping, and continue with the next data. At
    most one rewind per checkpoint."""


class HealthConfig(Config):
    """Health checks of a run."""

    nonfinite_gradient: Literal["stop", "skip"] = "stop"
    """Reaction to a nonfinite gradient. The weights are unchanged in either case."""
    max_consecutive_nonfinite: NonNegativeInt = 5
    """Maximum number of consecutive steps skipped for a nonfinite gradient."""
    spike: SpikeConfig | None = None
    """Skipping of loss spikes; disabled by default."""
    checksum_every_images: PositiveInt = 1_000_000
    """Images between two comparisons of the weights across ranks (ZeRO stages 1 and 2 only)."""
    hang_seconds: PositiveFloat | None = 1800.0
    """Seconds without a step before every rank writes its stack traces and exits, to be restarted."""


def check_losses(
    run: Path,
    images: int,
    losses: Float[Tensor, " batch"],
    valid: Tensor,
    slots: Int[Tensor, " batch"],
    facts: Mapping[str, Tensor],
    world: World,
) -> None:
    """Raise on a nonfinite loss before the optimizer step, listing the samples; collective.

    After the gradient all-reduce, the rank of a nonfinite value is unknown.

    Args:
        run: Run folder.
        images: Images seen.
        losses: Loss of each sample.
        valid: Mask of the samples that count.
        slots: Global index of each sample in the data order.
        facts: Further values to report for each sample, such as its timestep.
        world: This process's rank and device.

    Raises:
        UserError: A loss of some rank is not finite.
    """
    bad = ~losses.detach().isfinite().cpu() & valid.cpu()
    named = {
        "slot": slots.cpu()[bad][:_NAMED].tolist(),
        **{name: values.detach().cpu()[bad][:_NAMED].tolist() for name, values in facts.items()},
    }
    found = world.gathered({"count": int(bad.sum()), "named": named})
    whose = [
        f"{finding['count']} samples of rank {rank} ("
        + ", ".join(f"{name} {_listed(values)}" for name, values in finding["named"].items())
        + ")"
        for rank, finding in enumerate(found)
        if finding["count"]
    ]
    if whose:
        raise UserError(
            f"{run}: after {images} images the loss of {' and '.join(whose)} is not finite; lower optim.lr "
            f"or lengthen optim.warmup_images and start again, it goes on from the last checkpoint."
        )


class GradientProbe:
    """Norms of this rank's own gradients, before the all-reduce.

    Args:
        module: Module whose parameter gradients are measured.
    """

    def __init__(self, module: nn.Module) -> None:
        self._norms: list[Tensor] = []
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.register_hook(self._look)

    def _look(self, gradient: Tensor) -> None:
        self._norms.append(torch.linalg.vector_norm(gradient.detach(), dtype=torch.float32))

    def squared_norm(self) -> Tensor:
        """Return the sum of the squared norms of all gradients since the last call."""
        norms, self._norms = self._norms, []
        return torch.stack(norms).square().sum() if norms else torch.zeros(())


def ranks_of_bad_gradient(squared_norm: Tensor, world: World) -> list[int]:
    """Return the ranks whose own gradient is not finite; collective."""
    found = world.gathered({"finite": bool(squared_norm.isfinite())})
    return [rank for rank, finding in enumerate(found) if not finding["finite"]]


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


class SpikeGuard:
    """Loss-spike detector, identical on all ranks because its input is the global batch's loss.

    Args:
        config: Detection thresholds.
        batch: Global batch size.
    """

    def __init__(self, config: SpikeConfig, batch: int) -> None:
        self.config = config
        self.batch = batch
        self._average = math.nan
        self._seen = 0
        self.skipped_in_a_row = 0

    def stands_out(self, loss: float) -> bool:
        """Return ``True`` if a batch with this loss is a spike; otherwise add the loss to the average."""
        if self._seen >= self.config.half_life_images and loss > self.config.factor * self._average:
            self.skipped_in_a_row += 1
            return True
        kept = 0.5 ** (self.batch / self.config.half_life_images)
        self._average = kept * self._average + (1 - kept) * loss if self._seen else loss
        self._seen += self.batch
        self.skipped_in_a_row = 0
        return False

    @property
    def has_had_enough(self) -> bool:
        """``True`` if more than ``max_consecutive`` batches in a row were spikes."""
        return self.skipped_in_a_row > self.config.max_consecutive

    def state(self) -> dict[str, Tensor]:
        """Return the detector's state as tensors, equal on all ranks."""
        values = [self._average, self._seen, self.skipped_in_a_row]
        return {"guard": torch.tensor(values, dtype=torch.float64)}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore the result of `state`."""
        self._average, seen, skipped = state["guard"].tolist()
        self._seen, self.skipped_in_a_row = int(seen), int(skipped)


def weights_digest(module: nn.Module) -> Int[Tensor, " parameters"]:
    """Return a checksum per parameter, the sum of its elements' bits; any single bit flip changes it."""
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return torch.stack(
        [
            parameter.detach().view(integers[parameter.element_size()]).sum(dtype=torch.int64)
            for parameter in module.parameters()
        ]
    )


def check_weights(run: Path, images: int, module: nn.Module, world: World) -> None:
    """Compare replicated weights across ranks, bit for bit; collective.

    Raises:
        UserError: Weights differ, as after an otherwise silent memory or processor fault.
    """
    digests = world.concatenated(weights_digest(module)[None])
    usual = digests.mode(dim=0).values
    differing = (digests != usual).cpu()
    if differing.any():
        names = [name for name, _ in module.named_parameters()]
        ranks = differing.any(dim=1).nonzero().flatten().tolist()
        first = names[int(differing.any(dim=0).nonzero()[0])]
        raise UserError(
            f"{run}: after {images} images the weights of rank {_listed(ranks)} differ from the others', "
            f"'{first}' first; look at its machine, and start again from the last checkpoint."
        )


class Watchdog:
    """Hang detector: writes the stack traces of all threads, then exits the process.

    In a hung run every rank waits for another one, so the watchdog of every rank fires.

    Args:
        seconds: Timeout between two heartbeats; ``None`` disables the watchdog.
        report: File for the stack traces, which also go to the standard error stream.
    """

    def __init__(self, seconds: float | None, report: Path) -> None:
        self.seconds = seconds
        self.report = report
        self._ended = threading.Event()
        self._last = time.monotonic()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def beat(self) -> None:
        """Record a heartbeat."""
        self._last = time.monotonic()

    def __enter__(self) -> "Watchdog":
        """Start the watchdog thread."""
        self.beat()
        if self.seconds is not None:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop the watchdog thread."""
        self._ended.set()

    def _watch(self) -> None:
        if self.seconds is None:
            return
        while not self._ended.wait(min(1.0, self.seconds / 10)):
            idle = time.monotonic() - self._last
            if idle > self.seconds:
                self._bark(idle)

    def _bark(self, idle: float) -> None:
        said = f"nothing has happened for {idle:.0f} s; all threads' stacks are in {self.report}\n"
        sys.stderr.write(said)
        sys.stderr.flush()
        faulthandler.dump_traceback(sys.stderr, all_threads=True)
        try:
            with self.report.open("a", encoding="utf-8") as file:
                file.write(said)
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
        finally:
            # No cleanup: it would wait for the hung operation.
            os._exit(HUNG_EXIT_CODE)


def _listed(values: Sequence[object]) -> str:
    return ", ".join(str(value) for value in values)
