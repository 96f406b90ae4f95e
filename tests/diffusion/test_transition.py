from typing import cast

import pytest
import torch
from diffusers.schedulers.scheduling_vq_diffusion import VQDiffusionScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import Float
from torch import Tensor

from tests.diffusion import reference as dense
from vqd_scale.core.errors import UserError
from vqd_scale.core.rng import Purpose, uniforms
from vqd_scale.diffusion.config import Absorbing, Paper, Released, Schedule, UniformCosine
from vqd_scale.diffusion.transition import MaskAndReplace

steps = st.integers(2, 12)
schedules = st.one_of(
    st.builds(Released, steps=steps),
    st.builds(Paper, steps=steps, mask_rate=st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0])),
    st.builds(UniformCosine, steps=steps),
    st.builds(Absorbing, steps=steps),
)
code_counts = st.integers(2, 9)


def times(transition: MaskAndReplace) -> st.SearchStrategy[tuple[int, int]]:
    return st.integers(0, transition.steps - 1).flatmap(
        lambda t: st.tuples(st.just(t), st.integers(-1, t - 1))
    )


def random_probabilities(codes: int, rows: int, seed: int) -> Tensor:
    noise = uniforms(seed, Purpose.EVALUATION, torch.arange(rows), codes, dtype=torch.float64)
    return (4 * noise).softmax(-1)


@given(schedules, code_counts)
@settings(max_examples=50, deadline=None)
def test_cumulative_rates_are_the_product_of_matrices(schedule: Schedule, codes: int) -> None:
    transition = MaskAndReplace(schedule, codes)
    for t in range(transition.steps):
        chances = transition.rates.at(t)
        chain = dense.chain_matrix(transition.rates, t, -1)[:, :codes]
        expected = torch.full((codes + 1, codes), float(chances.replace) / codes, dtype=torch.float64)
        expected[:codes] += chances.keep * torch.eye(codes, dtype=torch.float64)
        expected[codes] = chances.mask
        torch.testing.assert_close(chain, expected, rtol=0, atol=1e-12)


@given(schedules, code_counts, st.data())
@settings(max_examples=150, deadline=None)
def test_posterior_of_known_x_0_equals_bayes_rule(
    schedule: Schedule, codes: int, data: st.DataObject
) -> None:
    transition = MaskAndReplace(schedule, codes)
    t, s = data.draw(times(transition))
    expected = dense.posterior(transition.rates, t, s)
    for x_t in range(codes + 1):
        posterior = transition.posterior(
            torch.eye(codes, dtype=torch.float64)[None], torch.full((1, codes), x_t), t, s
        )[0]
        possible = expected[x_t].isfinite().all(0)
        torch.testing.assert_close(posterior.T[:, possible], expected[x_t][:, possible], rtol=0, atol=1e-9)


@given(schedules, code_counts, st.data())
@settings(max_examples=150, deadline=None)
def test_mixture_posterior_equals_brute_force_sum(
    schedule: Schedule, codes: int, data: st.DataObject
) -> None:
    transition = MaskAndReplace(schedule, codes)
    t, s = data.draw(times(transition))
    x_t = torch.arange(codes + 1)[None]
    p = random_probabilities(codes, codes + 1, data.draw(st.integers(0, 99)))[None]
    posterior = transition.posterior(p, x_t, t, s)
    expected = dense.mixture(transition.rates, p, x_t, t, s)
    possible = expected.isfinite().all(-1)
    assert possible.any()
    torch.testing.assert_close(posterior[possible], expected[possible], rtol=0, atol=1e-9)
    torch.testing.assert_close(posterior.sum(-1), torch.ones_like(posterior.sum(-1)), rtol=0, atol=1e-9)


def test_plug_in_differs_from_mixture_where_tokens_are_replaced() -> None:
    transition = MaskAndReplace(Paper(), 5)
    p = random_probabilities(5, 6, 0)[None]
    x_t = torch.arange(6)[None]
    difference = (
        transition.posterior(p, x_t, 50, 49) - dense.plug_in(transition.rates, p, x_t, 50, 49)
    ).abs()
    assert float(difference[0, :5].max()) > 1e-3
    assert float(difference[0, 5].max()) < 1e-12
    one_hot = torch.eye(5, dtype=torch.float64)[[0, 1, 2, 3, 4, 0]][None]
    known_difference = transition.posterior(one_hot, x_t, 50, 49) - dense.plug_in(
        transition.rates, one_hot, x_t, 50, 49
    )
    assert float(known_difference.abs().max()) < 1e-12


@given(schedules, code_counts, st.data())
@settings(max_examples=60, deadline=None)
def test_stride_equals_single_steps_for_known_x_0(
    schedule: Schedule, codes: int, data: st.DataObject
) -> None:
    transition = MaskAndReplace(schedule, codes)
    t, s = data.draw(times(transition))
    x_0 = data.draw(st.integers(0, codes - 1))
    p = torch.eye(codes, dtype=torch.float64)[x_0].expand(1, codes + 1, codes)
    start = transition.corrupt(
        torch.full((1, 200), x_0), torch.tensor([t]), uniforms(0, Purpose.EVALUATION, torch.arange(1), 200)
    )
    state = int(start[0, data.draw(st.integers(0, 199))])
    strided = transition.posterior(p, torch.arange(codes + 1)[None], t, s)[0, state]
    composed = torch.eye(codes + 1, dtype=torch.float64)[state]
    for time in range(t, s, -1):
        composed = composed @ transition.posterior(p, torch.arange(codes + 1)[None], time, time - 1)[0]
    torch.testing.assert_close(strided, composed, rtol=0, atol=1e-9)


@pytest.mark.parametrize("schedule", [Released(), Paper(), UniformCosine(steps=100)])
def test_first_step_posterior_is_the_prediction(schedule: Schedule) -> None:
    transition = MaskAndReplace(schedule, 5)
    p = random_probabilities(5, 6, 1)[None]
    result = transition.posterior(p, torch.arange(6)[None], 0, -1)
    torch.testing.assert_close(result[..., :5], p, rtol=1e-9, atol=1e-12)
    assert float(result[..., 5].abs().max()) == 0


def test_absorbing_chain_keeps_visible_tokens() -> None:
    transition = MaskAndReplace(Absorbing(), 4)
    p = random_probabilities(4, 4, 2)[None]
    for t, s in [(0, -1), (50, 49), (99, -1)]:
        result = transition.posterior(p, torch.arange(4)[None], t, s)[0]
        torch.testing.assert_close(result, torch.eye(4, 5).double(), rtol=0, atol=1e-12)


def test_mask_persists_with_scheduled_probability() -> None:
    transition = MaskAndReplace(Paper(), 5)
    p = random_probabilities(5, 1, 3)[None]
    result = transition.posterior(p, torch.tensor([[5]]), 60, 59)
    assert float(result[0, 0, 5]) == pytest.approx(60 / 61, rel=1e-12)


def posterior_of_diffusers(
    scheduler: VQDiffusionScheduler, p: Tensor, x_t: Tensor, t: int
) -> Float[Tensor, "batch length states"]:
    log_p = p.log().float().transpose(1, 2)
    return scheduler.q_posterior(log_p, cast(torch.LongTensor, x_t), t).exp().transpose(1, 2)


@pytest.mark.parametrize(("count", "codes"), [(100, 40), (37, 5), (2, 2887)])
def test_posterior_equals_diffusers_at_every_time(count: int, codes: int) -> None:
    transition = MaskAndReplace(Released(steps=count), codes)
    scheduler = VQDiffusionScheduler(num_vec_classes=codes + 1, num_train_timesteps=count)
    for t in range(count):
        p = random_probabilities(codes, 50, seed=t)[None]
        x_t = (uniforms(t, Purpose.PRIOR, torch.arange(1), 50) * (codes + 1)).long()
        x_t[0, :10] = codes
        # At t = 0 diffusers computes no posterior: it samples from p itself.
        diffusers_posterior = (
            torch.cat([p, torch.zeros_like(p[..., :1])], -1).float()
            if t == 0
            else posterior_of_diffusers(scheduler, p, x_t, t)
        )
        posterior = transition.posterior(p.float(), x_t, t, t - 1)
        torch.testing.assert_close(posterior, diffusers_posterior, rtol=0, atol=1e-5)


@given(st.integers(2, 100), st.integers(2, 40), st.data())
@settings(max_examples=40, deadline=None)
def test_posterior_equals_diffusers_for_every_x_t(count: int, codes: int, data: st.DataObject) -> None:
    t = data.draw(st.integers(1, count - 1))
    transition = MaskAndReplace(Released(steps=count), codes)
    scheduler = VQDiffusionScheduler(num_vec_classes=codes + 1, num_train_timesteps=count)
    p = random_probabilities(codes, codes + 1, data.draw(st.integers(0, 99)))[None]
    x_t = torch.arange(codes + 1)[None]
    posterior = transition.posterior(p.float(), x_t, t, t - 1)
    torch.testing.assert_close(posterior, posterior_of_diffusers(scheduler, p, x_t, t), rtol=0, atol=1e-5)


@pytest.mark.parametrize("schedule", [Released(), Paper(), Paper(mask_rate=0.0), UniformCosine(steps=100)])
@pytest.mark.parametrize("t", [-1, 0, 40, 99])
def test_corrupt_samples_the_forward_distribution(schedule: Schedule, t: int) -> None:
    codes, count = 4, 200_000
    transition = MaskAndReplace(schedule, codes)
    uniform_numbers = uniforms(1, Purpose.CORRUPTION, torch.arange(1), count, dtype=torch.float64)
    noisy = transition.corrupt(torch.full((1, count), 2), torch.tensor([t]), uniform_numbers)
    chain = dense.chain_matrix(transition.rates, t, -1)[:, 2]
    counts = torch.bincount(noisy[0], minlength=codes + 1).double()
    spread = (count * chain * (1 - chain)).sqrt()
    assert ((counts - count * chain).abs() <= 5 * spread + 1e-9).all()


def test_corrupt_is_a_function_of_each_image() -> None:
    transition = MaskAndReplace(Paper(), 6)
    tokens = torch.arange(24).reshape(4, 6) % 6
    uniform_numbers = uniforms(1, Purpose.CORRUPTION, torch.arange(4), 6)
    t = torch.tensor([0, 30, 60, 99])
    together = transition.corrupt(tokens, t, uniform_numbers)
    alone = transition.corrupt(tokens[2:3], t[2:3], uniform_numbers[2:3])
    assert torch.equal(together[2:3], alone)


@pytest.mark.parametrize("schedule", [Released(), Paper(), UniformCosine(), Absorbing()])
def test_prior_contains_masks_and_every_code(schedule: Schedule) -> None:
    codes, count = 4, 100_000
    transition = MaskAndReplace(schedule, codes)
    prior_tokens = transition.prior(uniforms(2, Purpose.PRIOR, torch.arange(1), count, dtype=torch.float64))
    share = schedule.prior_mask
    expected = torch.tensor([(1 - share) / codes] * codes + [share], dtype=torch.float64)
    counts = torch.bincount(prior_tokens[0], minlength=codes + 1)
    assert ((counts - count * expected).abs() <= 5 * (count * expected * (1 - expected)).sqrt()).all()


def test_invalid_input_is_refused() -> None:
    transition = MaskAndReplace(Paper(), 5)
    with pytest.raises(UserError, match="token 5 is not between 0 and 4"):
        transition.check_tokens(torch.tensor([[0, 5]]), masks_allowed=False)
    transition.check_tokens(torch.tensor([[0, 5]]), masks_allowed=True)
    with pytest.raises(UserError, match="time 100 is not between 0 and 99"):
        transition.check_times(torch.tensor([3, 100]))
    with pytest.raises(UserError, match="has 6 classes, but the diffusion schedule has 5"):
        transition.posterior(torch.full((1, 1, 6), 1 / 6), torch.tensor([[0]]), 3, 2)
    with pytest.raises(UserError, match="t=3, s=3"):
        transition.posterior(torch.full((1, 1, 5), 1 / 5), torch.tensor([[0]]), 3, 3)
    with pytest.raises(UserError, match="at least two"):
        MaskAndReplace(Paper(), 1)
