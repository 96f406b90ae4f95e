import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vqd_scale.core.config import Config, validated
from vqd_scale.core.errors import UserError
from vqd_scale.diffusion.config import (
    ConstantGuidance,
    GuidanceScale,
    IntervalGuidance,
    Linear,
    Paper,
    TopK,
    TopP,
)
from vqd_scale.diffusion.guidance import Predict, apply_guidance, truncate
from vqd_scale.diffusion.transition import MaskAndReplace

TOKENS = torch.zeros(1, 1, dtype=torch.long)
CONDITIONAL = torch.tensor([0.5, 0.3, 0.2]).log()
UNCONDITIONAL = torch.tensor([0.2, 0.2, 0.6]).log()


def constant(log_p: Tensor) -> Predict:
    return lambda tokens, t: log_p.expand(*tokens.shape, len(log_p))


def refused(tokens: Tensor, t: int) -> Tensor:
    raise AssertionError("the unconditional network was asked where its answer is not used")


def guided(conditional: Predict, unconditional: Predict, scale: GuidanceScale) -> Predict:
    return apply_guidance(
        conditional, lambda tokens, t: (conditional(tokens, t), unconditional(tokens, t)), scale
    )


@given(st.floats(0, 8))
def test_guidance_equals_renormalized_formula(scale: float) -> None:
    predict = guided(constant(CONDITIONAL), constant(UNCONDITIONAL), ConstantGuidance(scale=scale))
    weights = [
        math.exp(float(u) + scale * (float(c) - float(u)))
        for c, u in zip(CONDITIONAL, UNCONDITIONAL, strict=True)
    ]
    expected = torch.tensor([weight / sum(weights) for weight in weights])
    torch.testing.assert_close(predict(TOKENS, 5)[0, 0].exp(), expected, rtol=1e-4, atol=1e-6)


def test_guidance_scale_one_and_zero() -> None:
    one = guided(constant(CONDITIONAL), refused, ConstantGuidance(scale=1.0))
    assert torch.equal(one(TOKENS, 5)[0, 0], CONDITIONAL)
    zero = guided(constant(CONDITIONAL), constant(UNCONDITIONAL), ConstantGuidance(scale=0.0))
    torch.testing.assert_close(zero(TOKENS, 5)[0, 0], UNCONDITIONAL)


def test_guidance_ignores_constant_offsets() -> None:
    plain = guided(constant(CONDITIONAL), constant(UNCONDITIONAL), ConstantGuidance(scale=4.0))
    moved = guided(constant(CONDITIONAL + 3), constant(UNCONDITIONAL - 2), ConstantGuidance(scale=4.0))
    torch.testing.assert_close(moved(TOKENS, 5), plain(TOKENS, 5))


def test_guidance_precedes_truncation() -> None:
    """In the other order, codes that either prediction truncated would be combined as -inf."""
    pair = guided(constant(CONDITIONAL), constant(UNCONDITIONAL), ConstantGuidance(scale=0.0))
    is_kept = truncate(pair, TopP(p=0.5))(TOKENS, 5)[0, 0].isfinite()
    assert is_kept.tolist() == [False, False, True]


def test_scales_over_time() -> None:
    assert [Linear(noisy=1, clean=3, noisy_time=80).at(t) for t in (0, 40, 80, 99)] == [3, 2, 1, 1]
    assert [IntervalGuidance(scale=4, first=60, last=20).at(t) for t in (99, 60, 20, 19)] == [1, 4, 4, 1]
    guided(constant(CONDITIONAL), refused, IntervalGuidance(first=60, last=20))(TOKENS, 99)


def test_reversed_interval_is_refused() -> None:
    class Holder(Config):
        scale: GuidanceScale

    with pytest.raises(UserError, match="sampling goes from first down to last"):
        validated(Holder, {"scale": {"kind": "interval", "first": 10, "last": 20}}, source="a test")


@pytest.mark.parametrize(
    ("rate", "kept_codes"),
    [(0.0, [0]), (0.5, [0]), (0.51, [0, 1]), (0.8, [0, 1]), (0.82, [0, 1, 2]), (1.0, [0, 1, 2])],
)
def test_top_p_keeps_the_crossing_code(rate: float, kept_codes: list[int]) -> None:
    p = torch.tensor([0.5, 0.3125, 0.1875])
    log_p = truncate(constant(p.log()), TopP(p=rate))(TOKENS, 5)[0, 0]
    assert log_p.isfinite().nonzero().flatten().tolist() == kept_codes
    assert torch.equal(log_p[kept_codes], p.log()[kept_codes])


@given(st.permutations(range(6)), st.integers(1, 8))
def test_top_k_keeps_the_most_probable_codes(order: list[int], count: int) -> None:
    log_p = torch.arange(6.0).log_softmax(-1)[torch.tensor(order)]
    is_kept = truncate(constant(log_p), TopK(k=count))(TOKENS, 5)[0, 0].isfinite()
    assert sorted(torch.tensor(order)[is_kept].tolist()) == list(range(6))[-count:]


def test_truncation_needs_no_renormalization() -> None:
    transition = MaskAndReplace(Paper(), 3)
    p = truncate(constant(CONDITIONAL), TopP(p=0.6))(TOKENS, 5).exp()
    for x_t in range(4):
        raw = transition.posterior(p, torch.tensor([[x_t]]), 50, 30)
        normal = transition.posterior(p / p.sum(), torch.tensor([[x_t]]), 50, 30)
        torch.testing.assert_close(raw / raw.sum(), normal, rtol=1e-5, atol=1e-7)


def test_truncations_of_one_prediction_are_independent() -> None:
    predict = constant(CONDITIONAL)
    narrow, wide = truncate(predict, TopP(p=0.1)), truncate(predict, TopP(p=1.0))
    assert int(narrow(TOKENS, 5).isfinite().sum()) == 1
    assert int(wide(TOKENS, 5).isfinite().sum()) == 3
    assert int(predict(TOKENS, 5).isfinite().sum()) == 3
