"""Reference implementation of the diffusion formulas with dense (K+1) x (K+1) matrices, in float64.

Slow and simple. Each function implements one statement of ``docs/maths.md``.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vqd_scale.diffusion.schedule import Rates


def step_matrix(rates: Rates, t: int) -> Float[Tensor, "to from"]:
    """Return Q_t[m, n] = q(x_t = m | x_{t-1} = n); the last row and column are the mask."""
    probabilities = rates.between(t, t - 1)
    codes = rates.codes
    matrix = torch.zeros(codes + 1, codes + 1, dtype=torch.float64)
    matrix[:codes, :codes] = (
        probabilities.keep * torch.eye(codes, dtype=torch.float64) + probabilities.replace / codes
    )
    matrix[codes, :codes] = probabilities.mask
    matrix[codes, codes] = 1
    return matrix


def chain_matrix(rates: Rates, t: int, s: int) -> Float[Tensor, "to from"]:
    """Return q(x_t | x_s), the product of one-step matrices Q_t · … · Q_{s+1}; the identity for t = s."""
    matrix = torch.eye(rates.codes + 1, dtype=torch.float64)
    for time in range(s + 1, t + 1):
        matrix = step_matrix(rates, time) @ matrix
    return matrix


def posterior(rates: Rates, t: int, s: int) -> Float[Tensor, "x_t x_s x_0"]:
    """Compute q(x_s | x_t, x_0) by Bayes' rule for every pair; NaN where x_0 cannot become x_t."""
    step = chain_matrix(rates, t, s)
    start = chain_matrix(rates, s, -1)[:, : rates.codes]
    end = chain_matrix(rates, t, -1)[:, : rates.codes]
    return step[:, :, None] * start[None, :, :] / end[:, None, :]


def mixture(
    rates: Rates, probabilities: Float[Tensor, "*batch codes"], x_t: Int[Tensor, "*batch"], t: int, s: int
) -> Float[Tensor, "*batch states"]:
    """Compute p(x_s | x_t) = Σ over x_0 of q(x_s | x_t, x_0) p(x_0)."""
    return (posterior(rates, t, s)[x_t] * probabilities[..., None, :]).sum(-1)


def plug_in(
    rates: Rates, probabilities: Float[Tensor, "*batch codes"], x_t: Int[Tensor, "*batch"], t: int, s: int
) -> Float[Tensor, "*batch states"]:
    """Compute VQ-DDM's θ(x_t, p): q(x_t | x_s) · q(x_s | x_0 ~ p), renormalized over x_s."""
    step = chain_matrix(rates, t, s)[x_t]
    start = probabilities @ chain_matrix(rates, s, -1)[:, : rates.codes].T
    joint = step * start
    return joint / joint.sum(-1, keepdim=True)


def divergence(
    rates: Rates,
    logits: Float[Tensor, "*batch codes"],
    x_0: Int[Tensor, "*batch"],
    x_t: Int[Tensor, "*batch"],
    t: int,
) -> Float[Tensor, "*batch"]:
    """Compute KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)) in nats; -log p(x_0 | x_t) at t = 0."""
    truth = posterior(rates, t, t - 1)[x_t, :, x_0]
    model = mixture(rates, logits.double().softmax(-1), x_t, t, t - 1)
    possible = truth > 0
    ratio = torch.where(possible, truth, 1.0) / torch.where(possible, model, 1.0)
    return (truth * ratio.log()).sum(-1)
