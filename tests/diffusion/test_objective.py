import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from tests.diffusion import reference as dense
from vqd_scale.core.errors import UserError
from vqd_scale.core.rng import Purpose, uniforms
from vqd_scale.diffusion import fused_loss as statistics
from vqd_scale.diffusion.config import Absorbing, ObjectiveConfig, Paper, Released, Schedule, UniformCosine
from vqd_scale.diffusion.kernels.dispatch import is_interpreted
from vqd_scale.diffusion.objective import Objective, ObjectiveOutput
from vqd_scale.diffusion.transition import MaskAndReplace

steps = st.integers(2, 12)
schedules = st.one_of(
    st.builds(Released, steps=steps),
    st.builds(Paper, steps=steps, mask_rate=st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0])),
    st.builds(UniformCosine, steps=steps),
    st.builds(Absorbing, steps=steps),
)
BOUND = ObjectiveConfig(auxiliary_weight=0)


def every_pair(codes: int) -> tuple[Tensor, Tensor]:
    x_0, x_t = torch.meshgrid(torch.arange(codes), torch.arange(codes + 1), indexing="ij")
    return x_0.flatten(), x_t.flatten()


def normal(rows: int, columns: int, seed: int) -> Tensor:
    uniform_numbers = uniforms(seed, Purpose.EVALUATION, torch.arange(rows), 2 * columns, dtype=torch.float64)
    radius = (-2 * torch.log1p(-uniform_numbers[:, :columns])).sqrt()
    return radius * torch.cos(2 * math.pi * uniform_numbers[:, columns:])


def from_logits(
    objective: Objective, logits: Tensor, tokens: Tensor, noisy: Tensor, t: Tensor
) -> ObjectiveOutput:
    """Evaluate the objective at given logits: they are the hidden layer of a head that is the identity."""
    return objective(logits, torch.eye(logits.shape[-1], dtype=logits.dtype), None, tokens, noisy, t)


# Triton's interpreter, under which `kernels/test_interpreted.py` runs this file, takes a millisecond a row.
@given(schedules, st.integers(2, 9), st.integers(0, 99), st.data())
@settings(max_examples=6 if is_interpreted() else 100, deadline=None)
def test_bound_and_gradient_equal_dense_reference(
    schedule: Schedule, codes: int, seed: int, data: st.DataObject
) -> None:
    transition = MaskAndReplace(schedule, codes)
    time = data.draw(st.integers(0, transition.steps - 1))
    x_0, x_t = every_pair(codes)
    occurs = dense.chain_matrix(transition.rates, time, -1)[x_t, x_0] > 0
    x_0, x_t = x_0[occurs], x_t[occurs]
    logits = (2 * normal(len(x_0), codes, seed)).requires_grad_()
    factor = normal(1, len(x_0), seed + 1)[0]

    t = torch.full_like(x_0, time)
    output = from_logits(Objective(transition, BOUND), logits[:, None], x_0[:, None], x_t[:, None], t)
    (gradient,) = torch.autograd.grad((output.loss_per_image * factor).sum(), logits)
    # Without replacement a visible token stays and has no gradient; the dense reference has 0/0 there.
    could_change = (x_t == codes) | (transition.rates.at(time).replace > 0)
    for still in (output.vlb_per_image[~could_change], gradient[~could_change]):
        torch.testing.assert_close(still, torch.zeros_like(still), rtol=0, atol=1e-9)

    logits, x_0, x_t = logits.detach()[could_change].requires_grad_(), x_0[could_change], x_t[could_change]
    expected = dense.divergence(transition.rates, logits, x_0, x_t, time)
    torch.testing.assert_close(output.vlb_per_image[could_change], expected.detach(), rtol=1e-9, atol=1e-9)
    if len(x_0):
        (expected_gradient,) = torch.autograd.grad((expected * factor[could_change]).sum(), logits)
        torch.testing.assert_close(gradient[could_change], expected_gradient, rtol=1e-9, atol=1e-9)


def test_image_loss_is_mean_of_token_losses() -> None:
    transition = MaskAndReplace(Paper(), 4)
    x_0, x_t = every_pair(4)
    logits = normal(len(x_0), 4, 0)
    image = from_logits(Objective(transition, BOUND), logits[None], x_0[None], x_t[None], torch.tensor([50]))
    expected = dense.divergence(transition.rates, logits, x_0, x_t, 50).mean()
    torch.testing.assert_close(image.loss_per_image[0], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("schedule", [Paper(), Released(), Paper(mask_rate=0.5)])
def test_float32_bound_at_codebook_size(schedule: Schedule) -> None:
    codes, length = 2887, 24
    transition = MaskAndReplace(schedule, codes)
    t = torch.tensor([0, 1, 50, 98, 99])
    tokens = torch.arange(len(t) * length).reshape(len(t), length) * 37 % codes
    uniform_numbers = uniforms(0, Purpose.CORRUPTION, torch.arange(len(t)), length, dtype=torch.float64)
    noisy = transition.corrupt(tokens, t, uniform_numbers)
    noisy[:, :4] = tokens[:, :4]
    noisy[:, 4:6] = (tokens[:, 4:6] + 1) % codes
    noisy[:, 6:8] = codes
    logits = 3 * normal(tokens.numel(), codes, 0).view(*tokens.shape, codes)
    logits[:, 1:20:2].scatter_(-1, tokens[:, 1:20:2, None], 25.0)
    results: list[tuple[ObjectiveOutput, Tensor]] = []
    for dtype in (torch.float32, torch.float64):
        leaf = logits.to(dtype).requires_grad_()
        output = from_logits(Objective(transition, ObjectiveConfig()), leaf, tokens, noisy, t)
        (gradient,) = torch.autograd.grad(output.loss_per_image.sum(), leaf)
        results.append((output, gradient))
    (single, single_gradient), (double, double_gradient) = results
    torch.testing.assert_close(single.vlb_per_image.double(), double.vlb_per_image, rtol=1e-4, atol=1e-5)
    scale = double_gradient.abs().amax((1, 2), keepdim=True)
    assert float(((single_gradient.double() - double_gradient).abs() / scale).max()) < 1e-4


@pytest.mark.parametrize("with_bias", [True, False])
def test_head_form_equals_identity_head_on_logits_with_all_gradients(
    with_bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Chunks of three tokens, so that images and chunks are not aligned and the last one is short.
    monkeypatch.setattr(statistics, "_CHUNK_ON_CPU", 3 * 7)
    transition = MaskAndReplace(Paper(), 7)
    hidden = normal(3 * 5, 4, 0).view(3, 5, 4).requires_grad_()
    weight = normal(7, 4, 1).requires_grad_()
    bias = normal(1, 7, 2)[0].requires_grad_() if with_bias else None
    tokens = torch.arange(15).view(3, 5) % 7
    t = torch.tensor([0, 40, 99])
    noisy = transition.corrupt(tokens, t, uniforms(0, Purpose.CORRUPTION, torch.arange(3), 5))
    loss = Objective(transition, ObjectiveConfig())
    factor = torch.tensor([0.3, 7.0, 0.0], dtype=torch.float64)
    leaves = [hidden, weight] if bias is None else [hidden, weight, bias]

    fused = loss(hidden, weight, bias, tokens, noisy, t).loss_per_image
    plain = from_logits(loss, functional.linear(hidden, weight, bias), tokens, noisy, t).loss_per_image
    torch.testing.assert_close(fused, plain, rtol=1e-12, atol=1e-12)
    fused_gradients = torch.autograd.grad((fused * factor).sum(), leaves)
    plain_gradients = torch.autograd.grad((plain * factor).sum(), leaves)
    for gradient, expected in zip(fused_gradients, plain_gradients, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-12)
    assert float(fused_gradients[0][2].abs().max()) == 0


def test_weight_may_be_freed_between_forward_and_backward() -> None:
    """ZeRO-3 empties a weight after the module's forward and fills it again before backward."""
    transition = MaskAndReplace(Paper(), 7)
    weight = torch.nn.Parameter(normal(7, 4, 1))
    hidden = normal(6, 4, 0)[None].requires_grad_()
    tokens, noisy, t = torch.zeros(1, 6, dtype=torch.long), torch.full((1, 6), 7), torch.tensor([50])
    loss = Objective(transition, ObjectiveConfig())
    expected = torch.autograd.grad(loss(hidden, weight, None, tokens, noisy, t).loss_per_image.sum(), weight)
    output = loss(hidden, weight, None, tokens, noisy, t).loss_per_image.sum()
    stored_weight, weight.data = weight.data, torch.empty(0, dtype=weight.dtype)
    weight.data = stored_weight.clone()
    stored_weight.zero_()
    torch.testing.assert_close(torch.autograd.grad(output, weight), expected)


def test_retained_graph_repeats_the_gradient() -> None:
    loss_of = Objective(MaskAndReplace(Paper(), 7), ObjectiveConfig())
    logits = normal(6, 7, 0)[None].requires_grad_()
    tokens, noisy, t = torch.arange(6)[None], torch.full((1, 6), 7), torch.tensor([50])
    output = from_logits(loss_of, logits, tokens, noisy, t)
    loss = output.loss_per_image.sum()
    (first,) = torch.autograd.grad(loss, logits, retain_graph=True)
    before = first.clone()
    (second,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(second, before, rtol=1e-12, atol=0)
    assert torch.equal(first, before)
    with torch.no_grad():
        repeated = from_logits(loss_of, logits, tokens, noisy, t)
    torch.testing.assert_close(repeated.loss_per_image, output.loss_per_image)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_loss_of_peaked_logits_equals_float32(dtype: torch.dtype) -> None:
    logits = torch.full((1, 8, 16), -30.0)
    logits[0, :, 3] = 30.0
    tokens, noisy = torch.arange(8)[None], torch.full((1, 8), 16)
    loss = Objective(MaskAndReplace(Paper(), 16), BOUND)
    low, full = (
        from_logits(loss, values, tokens, noisy, torch.tensor([50])).cross_entropy_per_image
        for values in (logits.to(dtype), logits.double())
    )
    torch.testing.assert_close(low.double(), full, rtol=1e-6, atol=0)


def test_low_precision_input_is_summed_in_float32() -> None:
    transition = MaskAndReplace(Paper(), 64)
    tokens = torch.arange(32)[None]
    noisy, t = torch.full((1, 32), 64), torch.tensor([50])
    hidden, weight = normal(32, 16, 0).bfloat16()[None], (8 * normal(64, 16, 1)).bfloat16()
    loss = Objective(transition, BOUND)
    low = loss(hidden, weight, None, tokens, noisy, t)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = loss(hidden, weight.float(), None, tokens, noisy, t)
    full = loss(hidden.double(), weight.double(), None, tokens, noisy, t)
    assert low.loss_per_image.dtype == torch.float32
    torch.testing.assert_close(
        low.cross_entropy_per_image.double(), full.cross_entropy_per_image, rtol=1e-5, atol=0
    )
    torch.testing.assert_close(mixed.loss_per_image, low.loss_per_image, rtol=1e-6, atol=0)


def test_backward_dtypes_under_autocast_and_bf16() -> None:
    transition = MaskAndReplace(Paper(), 8)
    hidden, weight = (
        normal(6, 4, 0).bfloat16()[None].requires_grad_(),
        normal(8, 4, 1).float().requires_grad_(),
    )
    tokens, noisy, t = torch.arange(6)[None], torch.full((1, 6), 8), torch.tensor([50])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = Objective(transition, BOUND)(hidden, weight, None, tokens, noisy, t).loss_per_image.sum()
        gradients = torch.autograd.grad(output, [hidden, weight])
    assert [gradient.dtype for gradient in gradients] == [torch.bfloat16, torch.float32]
    exact = weight.detach().double().requires_grad_()
    output = Objective(transition, BOUND)(hidden.double(), exact, None, tokens, noisy, t).loss_per_image.sum()
    torch.testing.assert_close(
        gradients[1].double(), torch.autograd.grad(output, exact)[0], rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("schedule", [Released(), Paper(), UniformCosine(steps=100)])
def test_decoder_term_is_cross_entropy(schedule: Schedule) -> None:
    transition = MaskAndReplace(schedule, 5)
    x_0, x_t = (part[None] for part in every_pair(5))
    logits = normal(x_0.shape[1], 5, 3)[None]
    output = from_logits(Objective(transition, BOUND), logits, x_0, x_t, torch.tensor([0]))
    expected = functional.cross_entropy(logits[0], x_0[0])
    torch.testing.assert_close(output.vlb_per_image[0], expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(output.cross_entropy_per_image[0], expected, rtol=1e-12, atol=0)


@given(st.integers(1, 99), st.integers(0, 9))
@settings(max_examples=20, deadline=None)
def test_absorbing_bound_is_weighted_cross_entropy_of_masks(t: int, seed: int) -> None:
    transition = MaskAndReplace(Absorbing(), 6)
    tokens = torch.arange(12)[None] % 6
    noisy = torch.where(torch.arange(12) % 2 == 0, 6, tokens)
    logits = normal(12, 6, seed)[None].requires_grad_()
    output = from_logits(Objective(transition, BOUND), logits, tokens, noisy, torch.tensor([t]))
    entropy = functional.cross_entropy(logits[0], tokens[0], reduction="none")
    expected = (entropy * (noisy[0] == 6)).mean() / (t + 1)
    torch.testing.assert_close(output.loss_per_image[0], expected, rtol=1e-9, atol=1e-9)
    for value, expected_value in zip(
        torch.autograd.grad(output.loss_per_image.sum(), logits),
        torch.autograd.grad(expected, logits),
        strict=True,
    ):
        torch.testing.assert_close(value, expected_value, rtol=1e-9, atol=1e-9)


def test_expected_loss_is_bound_per_token_at_any_length() -> None:
    codes, count = 5, 12
    transition = MaskAndReplace(Paper(steps=count), codes)
    total_bound = 0.0
    for t in range(count):
        chance = dense.chain_matrix(transition.rates, t, -1)[:, 0]
        states = torch.arange(codes + 1)
        cost = dense.divergence(
            transition.rates, torch.zeros(codes + 1, codes), torch.zeros_like(states), states, t
        )
        total_bound += float((chance * torch.where(chance > 0, cost, 0.0)).sum())
    t = torch.arange(count).repeat_interleave(40)
    loss = Objective(transition, BOUND)
    for length in (200, 400):
        tokens = torch.zeros(len(t), length, dtype=torch.long)
        uniform_numbers = uniforms(4, Purpose.CORRUPTION, torch.arange(len(t)), length)
        noisy = transition.corrupt(tokens, t, uniform_numbers)
        output = from_logits(loss, torch.zeros(*tokens.shape, codes), tokens, noisy, t)
        assert float((output.loss_per_image * count).mean()) == pytest.approx(total_bound, rel=0.02)


@pytest.mark.parametrize(("t", "factor"), [(0, 2.0), (99, 1.01), (50, 1.5)])
def test_auxiliary_term_counts_all_tokens_and_adapts(t: int, factor: float) -> None:
    transition = MaskAndReplace(Paper(), 3)
    logits = torch.tensor([[[1.0, 0.0, 0.0], [0.0, 2.0, 0.0]]])
    tokens, noisy, time = torch.tensor([[0, 1]]), torch.tensor([[3, 1]]), torch.tensor([t])
    entropy = (math.log(math.e + 2) - 1 + math.log(math.e**2 + 2) - 2) / 2
    bound = from_logits(Objective(transition, BOUND), logits, tokens, noisy, time).loss_per_image
    adaptive = ObjectiveConfig(auxiliary_weight=0.1, adaptive_auxiliary=True)
    constant = ObjectiveConfig(auxiliary_weight=0.1, adaptive_auxiliary=False)
    for config, expected in ((adaptive, 0.1 * factor * entropy), (constant, 0.1 * entropy)):
        loss = from_logits(Objective(transition, config), logits, tokens, noisy, time).loss_per_image
        assert float(loss - bound) == pytest.approx(expected, rel=1e-4)


def test_mask_and_visible_weights_do_not_affect_decoder_term() -> None:
    transition = MaskAndReplace(Paper(), 3)
    logits = normal(2, 3, 0)[None].expand(2, 2, 3)
    tokens, noisy, t = torch.tensor([[0, 1]] * 2), torch.tensor([[3, 2]] * 2), torch.tensor([0, 60])

    def loss(mask: float, visible: float) -> list[float]:
        config = ObjectiveConfig(auxiliary_weight=0, mask_weight=mask, visible_weight=visible)
        return from_logits(Objective(transition, config), logits, tokens, noisy, t).loss_per_image.tolist()

    plain, masks, codes = loss(1, 1), loss(1, 0), loss(0, 1)
    assert plain[0] == masks[0] == codes[0]
    assert masks[1] + codes[1] == pytest.approx(plain[1])
    assert masks[1] > 0 and codes[1] > 0


def test_accuracy_on_masked_and_visible_tokens_excludes_ties() -> None:
    transition = MaskAndReplace(Paper(), 3)
    tokens, noisy = torch.tensor([[0, 1, 2, 0, 1]]), torch.tensor([[3, 3, 2, 1, 1]])
    logits = torch.zeros(1, 5, 3)
    for position, code in enumerate([0, 0, 2, 0]):
        logits[0, position, code] = 4.0
    output = from_logits(Objective(transition, BOUND), logits, tokens, noisy, torch.tensor([5]))
    assert [float(output.masked_correct), float(output.masked_count)] == [1, 2]
    assert [float(output.visible_correct), float(output.visible_count)] == [2, 3]


def test_extreme_logits_give_finite_losses_and_gradients() -> None:
    for schedule in (Released(), Paper(), Absorbing(), UniformCosine(), Paper(mask_rate=1.0)):
        transition = MaskAndReplace(schedule, 4)
        x_0, x_t = (part[None] for part in every_pair(4))
        for t in (0, 1, transition.steps - 1):
            logits = torch.zeros(1, x_0.shape[1], 4)
            logits[..., 1] = 200.0
            logits.requires_grad_()
            loss = Objective(transition, ObjectiveConfig())
            output = from_logits(loss, logits, x_0, x_t, torch.tensor([t]))
            (gradient,) = torch.autograd.grad(output.loss_per_image.sum(), logits)
            assert bool(output.loss_per_image.isfinite().all()) and bool(gradient.isfinite().all())


def test_improbable_token_has_uncapped_loss_and_gradient() -> None:
    """Without replacement, the loss of a code with probability e^-150 must not be capped."""
    transition = MaskAndReplace(Absorbing(), 3)
    logits = torch.tensor([[[150.0, 0.0, 0.0]]], requires_grad=True)
    loss, t = Objective(transition, BOUND), torch.tensor([49])
    output = from_logits(loss, logits, torch.tensor([[1]]), torch.tensor([[3]]), t)
    (gradient,) = torch.autograd.grad(output.loss_per_image.sum(), logits)
    assert float(output.loss_per_image.detach()) == pytest.approx(150 / 50)
    assert gradient.flatten().tolist() == pytest.approx([1 / 50, -1 / 50, 0.0], abs=1e-6)


def test_nan_values_are_unchecked_by_default() -> None:
    """A check would wait for the device; the training loop detects a nonfinite loss one step later."""
    loss = Objective(MaskAndReplace(Paper(), 3), ObjectiveConfig())
    tokens, noisy, t = torch.tensor([[0]]), torch.tensor([[3]]), torch.tensor([5])
    output = from_logits(loss, torch.full((1, 1, 3), math.nan), tokens, noisy, t)
    assert bool(output.loss_per_image.isnan())


def test_invalid_input_is_refused() -> None:
    transition = MaskAndReplace(Paper(), 3)
    checked = Objective(transition, ObjectiveConfig(check_values=True))
    logits, tokens, t = torch.zeros(2, 1, 3), torch.zeros(2, 1, dtype=torch.long), torch.tensor([4, 5])
    with pytest.raises(UserError, match="token 3 is not between 0 and 2"):
        from_logits(checked, logits, tokens + 3, tokens, t)
    with pytest.raises(UserError, match="token 4 is not between 0 and 3"):
        from_logits(checked, logits, tokens, tokens + 4, t)
    with pytest.raises(UserError, match="time -1"):
        from_logits(checked, logits, tokens, tokens, t - 5)
    with pytest.raises(UserError, match=r"image 1 of the batch \(t = 5\) is not finite"):
        from_logits(checked, logits.index_fill(0, torch.tensor([1]), math.nan), tokens, tokens, t)
    with pytest.raises(UserError, match="head has 4 classes"):
        checked(torch.zeros(2, 1, 8), torch.zeros(4, 8), None, tokens, tokens, t)
