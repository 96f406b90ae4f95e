"""Timestep sampling for training: uniform, or by importance (Improved DDPM, arXiv 2102.09672)."""

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vqd_scale.core.errors import UserError
from vqd_scale.diffusion.config import Importance, Times

FLOOR = 1e-4
"""Addend of the weights before normalization, so that no timestep has probability 0."""


class TimeSampler:
    """Timestep sampler that adapts to the losses, identically on all ranks.

    Each rank accumulates its own losses; `synchronize` all-reduces them once per optimizer step. Sampling
    uses only the all-reduced history. The state lives on ``device``, without host synchronization.

    Attributes:
        history: Running mean of squared losses per time, float64 [steps].
        count: Number of observed losses per time, float64 [steps].
    """

    def __init__(self, times: Times, steps: int, device: torch.device | None = None) -> None:
        self.times = times
        self.steps = steps
        self.history = torch.zeros(steps, dtype=torch.float64, device=device)
        self.count = torch.zeros(steps, dtype=torch.float64, device=device)
        self._observed = torch.zeros(2, steps, dtype=torch.float64, device=device)

    def distribution(self) -> Float[Tensor, " steps"]:
        """Return p(t), float64, on the device of the state."""
        uniform = torch.full_like(self.history, 1 / self.steps)
        if not isinstance(self.times, Importance):
            return uniform
        weight = self.history.sqrt() + FLOOR
        # The decoder term at t = 0 is not a KL; the reference code gives it the weight of t = 1.
        weight = torch.cat([weight[1:2], weight[1:]]) if self.steps > 1 else weight
        return torch.where((self.count > self.times.warmup).all(), weight / weight.sum(), uniform)

    def sample(
        self, uniforms: Float[Tensor, " batch"]
    ) -> tuple[Int[Tensor, " batch"], Float[Tensor, " batch"]]:
        """Sample times by inverse CDF, with one uniform number per image.

        Args:
            uniforms: Uniform numbers in [0, 1), on the device of the state.

        Returns:
            t, int64, 0 to steps-1, and its probability p(t), float32: ``loss / probability`` is unbiased.
        """
        distribution = self.distribution()
        cumulative = distribution.cumsum(0)
        thresholds = uniforms.double() * cumulative[-1]
        t = torch.searchsorted(cumulative, thresholds, right=True).clamp(max=self.steps - 1)
        return t, distribution[t].float()

    def observe(
        self,
        t: Int[Tensor, " batch"],
        loss: Float[Tensor, " batch"],
        weight: Float[Tensor, " batch"] | None = None,
    ) -> None:
        """Accumulate this rank's losses for the next `synchronize`.

        Args:
            t: Sampled times.
            loss: Bound of each image at its time, summed over tokens as in the reference code (`FLOOR` has
                this unit), before any weighting by probability. Non-finite losses are skipped, because they
                would corrupt the distribution permanently.
            weight: 1 for valid images, 0 for slots of bad samples; ``None`` counts all images.
        """
        finite = loss.detach().isfinite()
        counted = finite.double() if weight is None else finite * weight.double()
        squared = torch.where(finite, loss.detach().double(), 0.0).square() * counted
        self._observed[0].index_add_(0, t, squared)
        self._observed[1].index_add_(0, t, counted)

    def synchronize(self, all_reduce: Callable[[Tensor], Tensor]) -> None:
        """All-reduce the accumulated losses into the history, once per optimizer step.

        n losses at one time enter as their mean with weight ``1 - decay ** n``. The result does not depend on
        their order, the number of ranks, or the number of gradient accumulation steps.

        Args:
            all_reduce: Returns the sum over ranks of a float64 tensor [2, steps]; the identity on one rank.
        """
        squared, count = all_reduce(self._observed)
        if isinstance(self.times, Importance):
            old_weight = self.times.decay**count
            mean = squared / count.clamp(min=1)
            self.history = old_weight * self.history + (1 - old_weight) * mean
        self.count = self.count + count
        self._observed = torch.zeros_like(self._observed)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the history and its counts; equal on all ranks after `synchronize`."""
        return {"history": self.history.clone(), "count": self.count.clone()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore the state from a `state_dict`.

        Raises:
            UserError: The state has another number of times than the schedule.
        """
        for name in ("history", "count"):
            if state[name].shape != (self.steps,):
                raise UserError(
                    f"the saved timestep sampler has {len(state[name])} times, this schedule {self.steps}; "
                    "continue with the schedule the run was started with."
                )
        self.history = state["history"].to(self.history, copy=True)
        self.count = state["count"].to(self.count, copy=True)
        self._observed = torch.zeros_like(self._observed)
