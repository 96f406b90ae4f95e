"""Lion (Chen et al., arXiv 2302.06675), algorithm 2."""

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class Lion(Optimizer):
    """Step along the sign of interpolated momentum and gradient, with decoupled weight decay.

    Args:
        params: Parameter groups.
        lr: Learning rate.
        betas: Weights of the momentum in the interpolation for the step and in its own update.
        weight_decay: Weight decay of groups that do not set one.
    """

    def __init__(
        self,
        params: list[dict[str, Any]],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update all parameters that have a gradient; evaluates no closure."""
        for group in self.param_groups:
            step_beta, momentum_beta = group["betas"]
            for parameter in group["params"]:
                gradient: Tensor | None = parameter.grad
                if gradient is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["step"] = torch.zeros((), device=parameter.device)
                    state["exp_avg"] = torch.zeros_like(parameter)
                momentum: Tensor = state["exp_avg"]
                direction = momentum.lerp(gradient, 1 - step_beta).sign_()
                parameter.mul_(1 - group["lr"] * group["weight_decay"]).sub_(direction, alpha=group["lr"])
                momentum.lerp_(gradient, 1 - momentum_beta)
                state["step"] += 1
