import math

import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_vq_diffusion import VQDiffusionScheduler
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from vqd_scale.core.config import Config, validated
from vqd_scale.core.errors import UserError
from vqd_scale.diffusion.config import Absorbing, Paper, Released, Schedule, UniformCosine
from vqd_scale.diffusion.schedule import rates_of

steps = st.integers(2, 60)
schedules = st.one_of(
    st.builds(Released, steps=steps),
    st.builds(Paper, steps=steps, mask_rate=st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0])),
    st.builds(UniformCosine, steps=steps),
    st.builds(Absorbing, steps=steps),
)

# t, a_t, K b_t, c_t, A_t, C_t of the released constants at T = 100.
GOLDEN = [
    (0, 0.99999, 1.0e-6, 9.0e-6, 0.99999, 9.0e-6),
    (1, 0.9898990808, 1.01010101e-8, 0.0101009091, 0.9898891818, 0.0101098182),
    (49, 0.9803924994, 3.80616e-8, 0.0196074625, 0.5050499091, 0.4949490909),
    (97, 0.6667656392, 1.09933e-5, 0.3332233675, 0.0202106364, 0.9797883636),
    (98, 0.5002226550, 2.47272e-5, 0.4997526178, 0.0101098182, 0.9898891818),
    (99, 0.0008902237, 9.88159e-5, 0.9990109604, 9.0e-6, 0.99999),
]


@pytest.mark.parametrize(("t", "keep", "replace", "mask", "all_keep", "all_mask"), GOLDEN)
def test_released_rates_have_float64_precision(
    t: int, keep: float, replace: float, mask: float, all_keep: float, all_mask: float
) -> None:
    rates = rates_of(Released(), codes=2887)
    step, chain = rates.between(t, t - 1), rates.at(t)
    assert float(step.keep) == pytest.approx(keep, abs=1e-9)
    assert float(step.mask) == pytest.approx(mask, abs=1e-9)
    assert float(step.replace) == pytest.approx(replace, rel=1e-5)
    assert float(chain.keep) == pytest.approx(all_keep, abs=1e-9)
    assert float(chain.mask) == pytest.approx(all_mask, abs=1e-9)


@given(schedules)
def test_one_step_rates_multiply_to_cumulative_rates(schedule: Schedule) -> None:
    rates = rates_of(schedule, codes=5)
    times = torch.arange(rates.steps)
    step, chain = rates.between(times, times - 1), rates.at(times)
    torch.testing.assert_close(step.keep.cumprod(0), chain.keep, rtol=0, atol=1e-12)
    torch.testing.assert_close(1 - (1 - step.mask).cumprod(0), chain.mask, rtol=0, atol=1e-12)
    for chances in (step, chain):
        torch.testing.assert_close(
            chances.keep + chances.replace + chances.mask,
            torch.ones(rates.steps).double(),
            rtol=0,
            atol=1e-12,
        )
        for part in (chances.keep, chances.replace, chances.mask):
            assert float(part.min()) >= 0


@given(schedules, st.data())
def test_rates_between_compose(schedule: Schedule, data: st.DataObject) -> None:
    rates = rates_of(schedule, codes=5)
    s = data.draw(st.integers(-1, rates.steps - 2))
    t = data.draw(st.integers(s + 1, rates.steps - 1))
    first, second, total_rates = rates.at(s), rates.between(t, s), rates.at(t)
    assert float(first.keep * second.keep) == pytest.approx(float(total_rates.keep), abs=1e-12)
    visible = (1 - first.mask) * (1 - second.mask)
    assert float(visible) == pytest.approx(1 - float(total_rates.mask), abs=1e-12)


def test_released_and_paper_replacement_rates() -> None:
    released = rates_of(Released(), codes=2887)
    np.testing.assert_allclose(released.cumulative.replace[1:], 1e-6, rtol=1e-9)
    last = rates_of(Paper(), codes=2887).at(99)
    assert float(last.keep) == 0
    assert float(last.mask) == pytest.approx(0.9)
    assert float(last.replace) == pytest.approx(0.1)
    assert float(rates_of(Paper(), codes=2887).between(99, 98).keep) == 0


@pytest.mark.parametrize(("mask_rate", "masks", "replaces"), [(1.0, True, False), (0.0, False, True)])
def test_paper_ablation_is_one_key(mask_rate: float, masks: bool, replaces: bool) -> None:
    last = rates_of(Paper(mask_rate=mask_rate), codes=8).at(99)
    assert (float(last.mask) > 0, float(last.replace) > 0) == (masks, replaces)


def test_time_minus_one_is_the_clean_image() -> None:
    for schedule in (Released(), Paper(), UniformCosine(), Absorbing()):
        clean = rates_of(schedule, codes=4).at(-1)
        assert (float(clean.keep), float(clean.replace), float(clean.mask)) == (1, 0, 0)


@given(steps, st.integers(2, 3000))
def test_released_equals_diffusers_arrays(count: int, codes: int) -> None:
    scheduler = VQDiffusionScheduler(num_vec_classes=codes + 1, num_train_timesteps=count)
    rates = rates_of(Released(steps=count), codes)
    times = torch.arange(count)
    step, chain = rates.between(times, times - 1), rates.at(times)
    for actual_rates, expected_rates, tolerance in [
        (step.keep, scheduler.log_at, 1e-5),
        (step.mask, scheduler.log_ct, 1e-5),
        (step.replace / codes, scheduler.log_bt, 1e-5),
        (chain.keep, scheduler.log_cumprod_at[:-1], 1e-5),
        (chain.mask, scheduler.log_cumprod_ct[:-1], 1e-5),
        (chain.replace / codes, scheduler.log_cumprod_bt[:-1], 1e-5),
    ]:
        torch.testing.assert_close(actual_rates.log().float(), expected_rates, rtol=tolerance, atol=tolerance)


def test_uniform_cosine_equals_vq_ddm_formula() -> None:
    count, offset = 50, 0.008
    keep = 1.0
    rates = rates_of(UniformCosine(steps=count), codes=4)
    for t in range(count):
        before, after = (
            math.cos((place / count + offset) / (1 + offset) * math.pi / 2) ** 2 for place in (t, t + 1)
        )
        keep *= math.sqrt(min(max(after / before, 0.001), 1))
        assert float(rates.at(t).keep) == pytest.approx(keep, abs=1e-12)
        assert float(rates.at(t).mask) == 0


def test_kind_selects_schedule_and_wrong_constants_are_refused() -> None:
    chosen = TypeAdapter[Schedule](Schedule).validate_python({"kind": "paper", "mask_rate": 0.5})
    assert chosen == Paper(mask_rate=0.5)
    with pytest.raises(ValidationError, match="exceed 1"):
        Released(keep_first=0.9999999)

    class Holder(Config):
        schedule: Schedule

    with pytest.raises(UserError, match=r"schedule\.mask_rate: given 1\.5"):
        validated(Holder, {"schedule": {"kind": "paper", "mask_rate": 1.5}}, source="a test")


@given(schedules)
def test_schedule_is_identified_by_its_constants(schedule: Schedule) -> None:
    """A bundle's configuration determines its chain, so weights of another chain can be refused."""
    choice = TypeAdapter[Schedule](Schedule)
    stored = choice.dump_json(schedule)
    assert choice.validate_json(stored) == schedule
    for other_schedule in (Released(), Paper(), Paper(mask_rate=0.8), UniformCosine(), Absorbing()):
        same = torch.equal(other_schedule.cumulative().keep, schedule.cumulative().keep) and torch.equal(
            other_schedule.cumulative().mask, schedule.cumulative().mask
        )
        assert (choice.dump_json(other_schedule) == stored) <= same


def test_changed_constant_is_detected() -> None:
    released = Released()
    for name in ("keep_first", "keep_last", "mask_first", "mask_last"):
        changed = released.model_copy(update={name: getattr(released, name) * 0.999})
        assert changed.model_dump_json() != released.model_dump_json()
        assert not torch.equal(changed.cumulative().replace, released.cumulative().replace)


def test_prior_shares() -> None:
    shares = [schedule.prior_mask for schedule in (Released(), Paper(), UniformCosine(), Absorbing())]
    assert shares == [1.0, 0.9, 0.0, 1.0]
