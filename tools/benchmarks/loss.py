"""The objective against the released code's log-one-hot formulation, on the same hidden layer and head."""

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any, TypeAlias

import torch
from benchmarks.measuring import extra_peak, in_fresh_process
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from vqd_scale.core.progress import progress
from vqd_scale.core.rng import Purpose, uniforms
from vqd_scale.diffusion.config import ObjectiveConfig, Released
from vqd_scale.diffusion.objective import Objective
from vqd_scale.diffusion.transition import MaskAndReplace

Tensors: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]

_LOWEST_LOG = -70.0
_LOG_OF_ZERO = 1e-30


@dataclass(frozen=True)
class LossProblem:
    """Input batch of the objective; the defaults are the released size, 32 x 32 tokens of 2,887 codes."""

    batch: int = 4
    length: int = 1024
    codes: int = 2887
    width: int = 192

    def tensors(self) -> Tensors:
        """Hidden layer [batch, length, width], head [codes, width], x_0, x_t [batch, length], t [batch]."""
        slots = torch.arange(self.batch)
        tokens = (uniforms(0, Purpose.EVALUATION, slots, self.length) * self.codes).long()
        t = torch.linspace(1, 98, self.batch).long()
        uniform_numbers = uniforms(0, Purpose.CORRUPTION, slots, self.length, dtype=torch.float64)
        noisy = MaskAndReplace(Released(), self.codes).corrupt(tokens, t, uniform_numbers)
        hidden = torch.sin(torch.arange(self.batch * self.length * self.width, dtype=torch.float32))
        # Sums of products of sines and cosines: the logits are waves with an amplitude of about 3.
        weight = torch.cos(torch.arange(self.codes * self.width, dtype=torch.float32)).mul_(6 / self.width)
        hidden = hidden.view(self.batch, self.length, self.width).requires_grad_()
        return hidden, weight.view(self.codes, self.width).requires_grad_(), tokens, noisy, t


def closed_form_loss(problem: LossProblem) -> Callable[..., Tensor]:
    """Return the package's objective: the scalar that training differentiates."""
    objective = Objective(MaskAndReplace(Released(), problem.codes), ObjectiveConfig())

    def loss(hidden: Tensor, weight: Tensor, tokens: Tensor, noisy: Tensor, t: Tensor) -> Tensor:
        return objective(hidden, weight, None, tokens, noisy, t).loss_per_image.mean()

    return loss


def log_one_hot_loss(problem: LossProblem) -> Callable[..., Tensor]:
    """Return the same objective by the released code's operations in their order."""
    naive = NaiveObjective(MaskAndReplace(Released(), problem.codes), ObjectiveConfig())

    def loss(hidden: Tensor, weight: Tensor, tokens: Tensor, noisy: Tensor, t: Tensor) -> Tensor:
        return naive((hidden @ weight.T).transpose(1, 2), tokens, noisy, t).mean()

    return loss


class NaiveObjective:
    """The log-one-hot formulation: every distribution as log probabilities [batch, codes + 1, length].

    Written from the published description of the released VQ-Diffusion code: log-softmax in float64, then
    q_posterior once for the truth and once for the model, all states and tokens at once.
    """

    def __init__(self, transition: MaskAndReplace, config: ObjectiveConfig) -> None:
        self.transition, self.config, self.codes = transition, config, transition.codes
        times = torch.arange(transition.steps)
        step = transition.rates.between(times, times - 1)
        # The identity comes last, where index -1 finds it.
        chain = transition.rates.at(torch.cat([times, torch.tensor([-1])]))
        self.step = [
            part.log().clamp(min=_LOWEST_LOG) for part in (step.keep, step.replace / self.codes, step.mask)
        ]
        self.chain = [
            part.log().clamp(min=_LOWEST_LOG) for part in (chain.keep, chain.replace / self.codes, chain.mask)
        ]

    def __call__(
        self,
        logits: Float[Tensor, "batch codes length"],
        tokens: Int[Tensor, "batch length"],
        noisy: Int[Tensor, "batch length"],
        t: Int[Tensor, " batch"],
    ) -> Float[Tensor, " batch"]:
        """Loss of each image in nats per token."""
        log_true, log_noisy = self._log_one_hot(tokens), self._log_one_hot(noisy)
        log_p = functional.log_softmax(logits.double(), dim=1).float()
        lowest = torch.full_like(log_p[:, :1], _LOWEST_LOG)
        log_p = torch.cat([log_p, lowest], dim=1).clamp(_LOWEST_LOG, 0)
        log_model = self._posterior(log_p, log_noisy, t)
        log_posterior = self._posterior(log_true, log_noisy, t)
        divergence = (log_posterior.exp() * (log_posterior - log_model)).sum((1, 2))
        decoder = -(log_true.exp() * log_model).sum((1, 2))
        bound = torch.where(t == 0, decoder, divergence)
        auxiliary = (log_true[:, :-1].exp() * (log_true[:, :-1] - log_p[:, :-1])).sum((1, 2))
        adaptive = 2 - t / self.transition.steps
        weighted = self.config.auxiliary_weight * adaptive * torch.where(t == 0, decoder, auxiliary)
        return (bound + weighted) / tokens.shape[1]

    def _log_one_hot(self, tokens: Int[Tensor, "batch length"]) -> Float[Tensor, "batch states length"]:
        one_hot = functional.one_hot(tokens, self.codes + 1).permute(0, 2, 1)
        return one_hot.float().clamp(min=_LOG_OF_ZERO).log()

    def _moved(self, log_x: Tensor, rates: list[Tensor], t: Tensor) -> Float[Tensor, "batch states length"]:
        keep, replace, mask = (part[t].float()[:, None, None] for part in rates)
        stay_unmasked = torch.log1p(-mask.exp() + 1e-20)
        codes = _log_add(log_x[:, :-1] + keep, replace)
        masks = _log_add(log_x[:, -1:] + stay_unmasked, mask)
        return torch.cat([codes, masks], dim=1)

    def _posterior(
        self, log_x0: Float[Tensor, "batch states length"], log_noisy: Tensor, t: Tensor
    ) -> Float[Tensor, "batch states length"]:
        masked = (log_noisy.argmax(1) == self.codes).unsqueeze(1)
        bottom = log_noisy.new_full((len(t), 1, log_noisy.shape[2]), _LOG_OF_ZERO).log()
        arrived = self._moved(log_noisy, self.chain, t)[:, :-1]
        from_mask = self.chain[2][t].float()[:, None, None].expand_as(arrived)
        arrived = ~masked * arrived + masked * from_mask
        stepped = torch.cat([self._moved(log_noisy, self.step, t)[:, :-1], bottom], dim=1)
        step_mask = self.step[2][t].float()[:, None, None].expand_as(arrived)
        stepped = ~masked * stepped + masked * torch.cat([step_mask, torch.zeros_like(bottom)], dim=1)
        quotient = torch.cat([log_x0[:, :-1] - arrived, bottom], dim=1)
        total = quotient.logsumexp(1, keepdim=True)
        return (self._moved(quotient - total, self.chain, t - 1) + stepped + total).clamp(_LOWEST_LOG, 0)


def _log_add(first: Tensor, second: Tensor) -> Tensor:
    highest = torch.maximum(first, second)
    return highest + torch.log(torch.exp(first - highest) + torch.exp(second - highest))


Loss = Callable[[LossProblem], Callable[..., Tensor]]


def benchmark_loss(rounds: int, problem: LossProblem | None = None) -> dict[str, Any]:
    """Measure forward and backward of the objective and the head in float32 on the CPU.

    Both sides must first return equal losses and gradients.

    Args:
        rounds: Number of timings per side, in turn; the median is reported.
        problem: Sizes of the benchmark.

    Raises:
        AssertionError: Losses or gradients differ.
    """
    problem = LossProblem() if problem is None else problem
    sides: dict[str, Loss] = {"ours": closed_form_loss, "alternative": log_one_hot_loss}
    tensors = problem.tensors()
    losses = compared_losses(sides, problem, tensors)
    memory = {
        name: in_fresh_process(partial(extra_peak_bytes, side, problem)) for name, side in sides.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in progress(range(rounds), "loss", rounds):
        for name, side in sides.items():
            loss = side(problem)
            gc.collect()
            started = time.perf_counter()
            _differentiated(loss, tensors)
            seconds[name].append(time.perf_counter() - started)
    medians = {name: median(values) for name, values in seconds.items()}
    return {
        **medians,
        "ratio": medians["alternative"] / medians["ours"],
        "memory_ratio": memory["ours"] / memory["alternative"],
        "extra_peak_megabytes": {name: round(value / 1e6, 1) for name, value in memory.items()},
        "seconds": {name: [round(value, 4) for value in values] for name, values in seconds.items()},
        "losses": losses,
        "shape": [problem.batch, problem.length, problem.width, problem.codes],
    }


def compared_losses(sides: Mapping[str, Loss], problem: LossProblem, tensors: Tensors) -> dict[str, float]:
    """Return each side's loss, after comparing losses and gradients.

    Raises:
        AssertionError: Losses or gradients differ.
    """
    losses: dict[str, float] = {}
    expected: tuple[Tensor, ...] = ()
    for name, side in sides.items():
        value = side(problem)(*tensors)
        gradients = torch.autograd.grad(value, tensors[:2])
        losses[name] = float(value.detach())
        for gradient, reference in zip(gradients, expected or gradients, strict=True):
            scale = float(reference.abs().max())
            torch.testing.assert_close(gradient, reference, rtol=1e-3, atol=1e-5 * scale)
        expected = gradients
    first, *other_losses = losses.values()
    for side_losses in other_losses:
        torch.testing.assert_close(side_losses, first, rtol=1e-4, atol=1e-6)
    return losses


def extra_peak_bytes(side: Loss, problem: LossProblem) -> int:
    """Return the increase of resident memory over the inputs in one forward and backward."""
    tensors = problem.tensors()
    loss = side(problem)
    return extra_peak(lambda: _differentiated(loss, tensors))


def _differentiated(loss: Callable[..., Tensor], tensors: Tensors) -> None:
    loss(*tensors).backward()
    tensors[0].grad = tensors[1].grad = None
