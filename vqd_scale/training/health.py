"""What goes wrong in long runs, seen early and said with names: losses, gradients, weights, hangs."""

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
"""How many samples a report names."""


class SpikeConfig(Config):
    """What is done about a batch whose loss stands out: it is not learned from."""

    factor: float = Field(default=3.0, gt=1)
    """A batch is skipped whose loss is over so many times the running average."""
    half_life_images: PositiveInt = 50_000
    """Images after which a batch's part in the average is half; nothing is skipped before so many."""
    max_consecutive: NonNegativeInt = 5
    """How many batches in a row may be skipped; one more stops the run, or rewinds it."""
    rewind: bool = False
    """Go back to the last checkpoint's weights then, once a checkpoint, and on with the next data."""


class HealthConfig(Config):
    """What is watched while a run goes on."""

    nonfinite_gradient: Literal["stop", "skip"] = "stop"
    """What follows on a gradient that is not finite. No weight is touched by it in either case."""
    max_consecutive_nonfinite: NonNegativeInt = 5
    """How many steps in a row may be skipped for it."""
    spike: SpikeConfig | None = None
    checksum_every_images: PositiveInt = 1_000_000
    """Images between two comparisons of all ranks' weights, where they hold them whole (ZeRO under 3)."""
    hang_seconds: PositiveFloat | None = 1800.0
    """After so long without a step every rank writes its stacks and leaves, to be started again."""


def check_losses(
    run: Path,
    images: int,
    losses: Float[Tensor, " batch"],
    valid: Tensor,
    slots: Int[Tensor, " batch"],
    facts: Mapping[str, Tensor],
    world: World,
) -> None:
    """Stop before the optimizer eats a loss that is not finite, and name its samples; all ranks together.

    Once gradients are summed over ranks nobody can tell any more whose it was.

    Args:
        run: The run's folder.
        images: Images seen.
        losses: Each sample's.
        valid: Which samples count.
        slots: The samples' global numbers.
        facts: What else is known of each sample, such as its time.
        world: This process's place among the ranks.

    Raises:
        UserError: Some rank's loss is not finite.
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
    """Each rank's own gradient, looked at before it is averaged with the others'.

    Args:
        module: Whose parameters' gradients are looked at.
    """

    def __init__(self, module: nn.Module) -> None:
        self._norms: list[Tensor] = []
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.register_hook(self._look)

    def _look(self, gradient: Tensor) -> None:
        self._norms.append(torch.linalg.vector_norm(gradient.detach(), dtype=torch.float32))

    def squared_norm(self) -> Tensor:
        """The sum of the squared norms of all gradients since the last call."""
        norms, self._norms = self._norms, []
        return torch.stack(norms).square().sum() if norms else torch.zeros(())


def ranks_of_bad_gradient(squared_norm: Tensor, world: World) -> list[int]:
    """Which ranks' own gradients are not finite; all ranks together."""
    found = world.gathered({"finite": bool(squared_norm.isfinite())})
    return [rank for rank, finding in enumerate(found) if not finding["finite"]]


def noise_scale(small: float, big: float, small_batch: float, big_batch: float) -> float:
    """The gradient-noise scale in images (McCandlish et al., 2018, appendix A.1).

    About the batch at which a larger one stops to pay. Unbiased are its two parts, not their quotient, so
    means over many steps should go in.

    Args:
        small: Mean squared norm of gradients of parts of a batch.
        big: Mean squared norm of the whole batches' gradients.
        small_batch: Images in such a part.
        big_batch: Images in a whole batch.

    Returns:
        tr(Σ) / |G|², or NaN where the gradient cannot be told from its noise.
    """
    signal = (big_batch * big - small_batch * small) / (big_batch - small_batch)
    noise = (small - big) / (1 / small_batch - 1 / big_batch)
    return noise / signal if signal > 0 else math.nan


class SpikeGuard:
    """Says which batches stand out, alike on all ranks since it is told the whole batch's loss.

    Args:
        config: What stands out.
        batch: Images in a global batch.
    """

    def __init__(self, config: SpikeConfig, batch: int) -> None:
        self.config = config
        self.batch = batch
        self._average = math.nan
        self._seen = 0
        self.skipped_in_a_row = 0

    def stands_out(self, loss: float) -> bool:
        """Whether a batch with this loss should be skipped; takes note of it if not."""
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
        """Whether more batches in a row stood out than are tolerated."""
        return self.skipped_in_a_row > self.config.max_consecutive

    def state(self) -> dict[str, Tensor]:
        """What must be saved, equal on all ranks."""
        values = [self._average, self._seen, self.skipped_in_a_row]
        return {"guard": torch.tensor(values, dtype=torch.float64)}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take a state back."""
        self._average, seen, skipped = state["guard"].tolist()
        self._seen, self.skipped_in_a_row = int(seen), int(skipped)


def weights_digest(module: nn.Module) -> Int[Tensor, " parameters"]:
    """A number for each parameter that any one changed bit changes: the sum of its elements' bits."""
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return torch.stack(
        [
            parameter.detach().view(integers[parameter.element_size()]).sum(dtype=torch.int64)
            for parameter in module.parameters()
        ]
    )


def check_weights(run: Path, images: int, module: nn.Module, world: World) -> None:
    """Compare the weights of ranks that must hold the same ones, bit for bit; all ranks together.

    Raises:
        UserError: Some differ, as after a fault of a memory or a processor that nothing else reports.
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
    """Ends a process in which nothing happens any more, after writing down where all its threads are.

    Every rank of a run that hangs waits for some other, so that every rank's watchdog barks.

    Args:
        seconds: How long nothing may happen; ``None`` watches nothing.
        report: Where the stacks are written, the standard error stream beside.
    """

    def __init__(self, seconds: float | None, report: Path) -> None:
        self.seconds = seconds
        self.report = report
        self._ended = threading.Event()
        self._last = time.monotonic()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def beat(self) -> None:
        """Something happened."""
        self._last = time.monotonic()

    def __enter__(self) -> "Watchdog":
        """Start to watch."""
        self.beat()
        if self.seconds is not None:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Watch no longer."""
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
            # No clean-up: it would wait for what hangs.
            os._exit(HUNG_EXIT_CODE)


def _listed(values: Sequence[object]) -> str:
    return ", ".join(str(value) for value in values)
