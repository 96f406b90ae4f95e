"""Which time each image is trained at: uniform, or by importance (Improved DDPM, arXiv 2102.09672)."""

from collections.abc import Callable, Mapping
from typing import Annotated, Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from vqd_scale.core.config import Config
from vqd_scale.core.errors import UserError


class Uniform(Config):
    """Every time alike."""

    kind: Literal["uniform"] = "uniform"


class Importance(Config):
    """Times whose loss is large more often: p(t) ∝ sqrt(history of squared losses), as VQ-Diffusion trains.

    Until every time was observed more than ``warm_up`` times it is uniform.
    """

    kind: Literal["importance"] = "importance"
    warmup: int = Field(default=10, ge=0)
    decay: float = Field(default=0.9, gt=0, lt=1)
    floor: float = Field(default=0.0001, gt=0)


Times = Annotated[Uniform | Importance, Field(discriminator="kind")]


class TimeSampler:
    """Draws times and learns from their losses, alike on all ranks.

    Ranks observe for themselves and fold their sums together once per optimizer step (`synchronise`); what is
    drawn in between depends on the folded history alone. The state lives on ``device``; nothing waits for it.

    Attributes:
        history: Running mean of squared losses at each time, float64 [steps].
        count: How many losses the history has seen, float64 [steps].
    """

    def __init__(self, times: Times, steps: int, device: torch.device | None = None) -> None:
        self.times = times
        self.steps = steps
        self.history = torch.zeros(steps, dtype=torch.float64, device=device)
        self.count = torch.zeros(steps, dtype=torch.float64, device=device)
        self._observed = torch.zeros(2, steps, dtype=torch.float64, device=device)

    def distribution(self) -> Float[Tensor, " steps"]:
        """p(t), float64, on the device of the state."""
        uniform = torch.full_like(self.history, 1 / self.steps)
        if not isinstance(self.times, Importance):
            return uniform
        weight = self.history.sqrt() + self.times.floor
        # The decoder term at t = 0 is no KL; the reference gives it its neighbour's weight.
        weight = torch.cat([weight[1:2], weight[1:]]) if self.steps > 1 else weight
        return torch.where((self.count > self.times.warmup).all(), weight / weight.sum(), uniform)

    def draw(
        self, uniforms: Float[Tensor, " batch"]
    ) -> tuple[Int[Tensor, " batch"], Float[Tensor, " batch"]]:
        """Times by inverse CDF, one uniform number per image.

        Args:
            uniforms: In [0, 1), on the device of the state.

        Returns:
            t, int64, 0 to steps-1, and its probability p(t), float32: ``loss / probability`` is unbiased.
        """
        distribution = self.distribution()
        cumulative = distribution.cumsum(0)
        place = uniforms.double() * cumulative[-1]
        t = torch.searchsorted(cumulative, place, right=True).clamp(max=self.steps - 1)
        return t, distribution[t].float()

    def observe(
        self,
        t: Int[Tensor, " batch"],
        loss: Float[Tensor, " batch"],
        weight: Float[Tensor, " batch"] | None = None,
    ) -> None:
        """Add this rank's losses to its sums; the next `synchronise` puts them to use.

        Args:
            t: The times drawn.
            loss: Each image's bound at its time, summed over its tokens as in the reference (``floor`` is in
                this unit) and before any weighting by probability. One that is not finite is left out: it
                must not spoil the distribution of all that follow.
            weight: 1 for images that count and 0 for the places of bad samples; ``None`` counts all.
        """
        finite = loss.detach().isfinite()
        counted = finite.double() if weight is None else finite * weight.double()
        squared = torch.where(finite, loss.detach().double(), 0.0).square() * counted
        self._observed[0].index_add_(0, t, squared)
        self._observed[1].index_add_(0, t, counted)

    def synchronise(self, all_reduce: Callable[[Tensor], Tensor]) -> None:
        """Fold the sums of all ranks into the history, once per optimizer step.

        n losses at one time enter as their mean with weight ``1 - decay ** n``, so that neither the order nor
        the number of ranks nor that of accumulation steps matters.

        Args:
            all_reduce: Gives the sum over ranks of a float64 tensor [2, steps]; the identity on one rank.
        """
        squared, count = all_reduce(self._observed)
        if isinstance(self.times, Importance):
            kept = self.times.decay**count
            mean = squared / count.clamp(min=1)
            self.history = kept * self.history + (1 - kept) * mean
        self.count = self.count + count
        self._observed = torch.zeros_like(self._observed)

    def state_dict(self) -> dict[str, Tensor]:
        """The history and its counts, the same on all ranks; take it after `synchronise`."""
        return {"history": self.history.clone(), "count": self.count.clone()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a `state_dict`.

        Raises:
            UserError: It is another schedule's: its number of times differs.
        """
        for name in ("history", "count"):
            if state[name].shape != (self.steps,):
                raise UserError(
                    f"the saved time sampler knows {len(state[name])} times, this schedule has {self.steps}; "
                    "continue with the schedule the run was started with."
                )
        self.history = state["history"].to(self.history, copy=True)
        self.count = state["count"].to(self.count, copy=True)
        self._observed = torch.zeros_like(self._observed)
