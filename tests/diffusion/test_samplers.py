from fractions import Fraction
from itertools import count, pairwise
from math import floor
from typing import cast

import pytest
import torch
from diffusers.schedulers.scheduling_vq_diffusion import VQDiffusionScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vqd_scale.core.errors import UserError
from vqd_scale.core.rng import Purpose, uniforms
from vqd_scale.diffusion.config import (
    Absorbing,
    Ancestral,
    Confidence,
    Halton,
    LegacyDiffusers,
    LegacyFast,
    Paper,
    Purity,
    Released,
    Remask,
    SamplerConfig,
    Schedule,
    Strided,
    UniformCosine,
)
from vqd_scale.diffusion.guidance import Predict
from vqd_scale.diffusion.samplers import KnownTokens, Start, sample
from vqd_scale.diffusion.sampling_plan import SamplerNoise
from vqd_scale.diffusion.transition import MaskAndReplace
from vqd_scale.diffusion.unmasking import halton_order

MASKING = [Released(), Paper(), Absorbing()]
SAMPLERS: list[SamplerConfig] = [
    Ancestral(),
    Strided(steps=7),
    Purity(steps=7),
    Confidence(steps=7),
    Halton(steps=7),
    Remask(steps=7),
    LegacyFast(speed=4),
    LegacyDiffusers(steps=25),
]


def oracle(tokens: Tensor, codes: int) -> Predict:
    """Return a network that predicts the image."""
    log_p = torch.nn.functional.one_hot(tokens, codes).double().log()
    return lambda noisy, t: log_p


def watched(predict: Predict, visited: list[tuple[Tensor, int]]) -> Predict:
    def remember(tokens: Tensor, t: int) -> Tensor:
        visited.append((tokens.clone(), t))
        return predict(tokens, t)

    return remember


def image(batch: int, length: int, codes: int) -> Tensor:
    return (torch.arange(batch * length).view(batch, length) * 7 + 3) % codes


def uncertain(codes: int) -> Predict:
    """Return a network whose rows depend on the position only."""

    def predict(tokens: Tensor, t: int) -> Tensor:
        places = torch.arange(tokens.shape[1] * codes, dtype=torch.float32).view(1, tokens.shape[1], codes)
        return (2 * torch.sin(3 * places)).expand(len(tokens), -1, -1).log_softmax(-1)

    return predict


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda sampler: sampler.kind)
@pytest.mark.parametrize("schedule", MASKING, ids=lambda schedule: schedule.kind)
def test_oracle_recovers_its_image(sampler: SamplerConfig, schedule: Schedule) -> None:
    if isinstance(schedule, Absorbing) and isinstance(sampler, LegacyDiffusers):
        schedule = Absorbing(steps=25)
    transition = MaskAndReplace(schedule, 11)
    tokens = image(3, 64, 11)
    sampled = sample(oracle(tokens, 11), sampler, transition, torch.arange(3), 64, seed=1)
    assert torch.equal(sampled, tokens)


@pytest.mark.parametrize("schedule", [UniformCosine(steps=40), Paper(mask_rate=0.0)])
def test_oracle_recovers_its_image_without_masks(schedule: Schedule) -> None:
    transition = MaskAndReplace(schedule, 11)
    tokens = image(3, 64, 11)
    for sampler in (Ancestral(), Strided(steps=5)):
        assert torch.equal(
            sample(oracle(tokens, 11), sampler, transition, torch.arange(3), 64, seed=1), tokens
        )
    with pytest.raises(UserError, match="the schedule has none"):
        sample(oracle(tokens, 11), Purity(), transition, torch.arange(3), 64, seed=1)


@given(st.integers(1, 120), st.data())
@settings(max_examples=100, deadline=None)
def test_sampling_plan_ends_at_clean_once_for_any_step_count(count: int, data: st.DataObject) -> None:
    transition = MaskAndReplace(Absorbing(steps=count), 4)
    chosen = data.draw(st.integers(1, count))
    first = data.draw(st.integers(0, count - 1))
    every = (Ancestral(), Strided(steps=chosen), Purity(steps=chosen), LegacyDiffusers(steps=chosen))
    for sampler in (*every, LegacyFast(speed=data.draw(st.integers(2, 20)))):
        is_legacy = isinstance(sampler, (LegacyDiffusers, LegacyFast))
        plan = sampler.build().plan(transition, transition.steps - 1 if is_legacy else first)
        ends = [step.s for step in plan]
        assert ends[-1] == -1 and ends.count(-1) == 1
        assert [step.network_time for step in plan] == sorted(
            {step.network_time for step in plan}, reverse=True
        )
        assert all(-1 <= step.s < step.t <= step.network_time for step in plan)
        if not is_legacy:
            assert plan[0].t == first
            assert [step.s for step in plan[:-1]] == [step.t for step in plan[1:]]
    assert len(Strided(steps=chosen).build().plan(transition, count - 1)) == chosen
    with pytest.raises(UserError, match=f"{count + 1} exceeds the {count} steps"):
        Strided(steps=count + 1).build().plan(transition, count - 1)


@pytest.mark.parametrize("count", [1, 2, 7, 100])
def test_all_samplers_end_at_clean_once_for_any_step_count(count: int) -> None:
    transition = MaskAndReplace(Absorbing(steps=count), 4)
    counted = (Strided, Purity, Confidence, Halton, Remask, LegacyDiffusers)
    every: list[SamplerConfig] = [kind(steps=steps) for kind in counted for steps in range(1, count + 1)]
    every += [Ancestral(), *(LegacyFast(speed=speed) for speed in range(2, count + 2))]
    assert {sampler.kind for sampler in every} == {sampler.kind for sampler in SAMPLERS}
    for sampler in every:
        plan = sampler.build().plan(transition, count - 1)
        ends = [step.s for step in plan]
        assert ends[-1] == -1 and ends.count(-1) == 1
        assert all(later < earlier for earlier, later in pairwise(ends))
        if isinstance(sampler, counted):
            assert len(plan) == sampler.steps


def masked_shares(
    sampler: SamplerConfig, schedule: Schedule, length: int, batch: int = 4
) -> tuple[list[float], list[int]]:
    transition = MaskAndReplace(schedule, 9)
    visited: list[tuple[Tensor, int]] = []
    tokens = image(batch, length, 9)
    sample(watched(oracle(tokens, 9), visited), sampler, transition, torch.arange(batch), length, seed=3)
    return [float((noisy == 9).double().mean()) for noisy, _ in visited], [t for _, t in visited]


@pytest.mark.parametrize("schedule", MASKING, ids=lambda schedule: schedule.kind)
@pytest.mark.parametrize(
    "sampler", [Strided(steps=25), Strided(steps=10), Ancestral(), Remask(steps=20, strength=0.5)]
)
def test_masked_fraction_follows_schedule(sampler: SamplerConfig, schedule: Schedule) -> None:
    length, batch = 4096, 4
    shares, times = masked_shares(sampler, schedule, length, batch)
    rates = MaskAndReplace(schedule, 9).rates
    assert times[0] == schedule.steps - 1
    for share, t in zip(shares, times, strict=True):
        expected = float(rates.at(t).mask)
        expected = (
            expected / float(rates.at(schedule.steps - 1).mask) if sampler.build().starts_masked else expected
        )
        # 5 standard deviations of a binomial share.
        assert abs(share - expected) <= 5 * (expected * (1 - expected) / (length * batch)) ** 0.5 + 2e-5


@pytest.mark.parametrize(
    ("speed", "before", "remaining_share"), [(2, -2, 0.080), (4, -1, 0.245), (10, -1, 0.66)]
)
def test_legacy_fast_masked_fraction_equals_released_code(
    speed: int, before: int, remaining_share: float
) -> None:
    shares, times = masked_shares(LegacyFast(speed=speed), Released(), 4096)
    assert len(times) == {2: 51, 4: 26, 10: 11}[speed]
    assert times[0] == 99 and times[-1] == 0
    # At speed 2 the step from t = 1 is exact and reveals all remaining masks.
    assert shares[before] == pytest.approx(remaining_share, abs=0.02)


def test_legacy_diffusers_timesteps_count_down_from_step_count() -> None:
    shares, times = masked_shares(LegacyDiffusers(steps=25), Released(), 64)
    scheduler = VQDiffusionScheduler(num_vec_classes=10)
    scheduler.set_timesteps(25)
    assert times == scheduler.timesteps.tolist() == list(range(24, -1, -1))
    assert shares[0] == 1.0


@pytest.mark.parametrize("steps", [1, 12, 100])
def test_legacy_diffusers_equals_diffusers_step_for_step(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    codes, length, slots = 13, 30, torch.tensor([5, 9])
    network = uncertain(codes)
    package_states: list[tuple[Tensor, int]] = []
    final = sample(
        watched(network, package_states),
        LegacyDiffusers(steps=steps),
        MaskAndReplace(Released(), codes),
        slots,
        length,
        seed=4,
    )
    scheduler = VQDiffusionScheduler(num_vec_classes=codes + 1)
    scheduler.set_timesteps(steps)
    tokens = torch.full((2, length), codes)
    for number, t in enumerate(scheduler.timesteps.tolist()):
        assert torch.equal(package_states[number][0], tokens)
        states = codes if t == 0 else codes + 1
        uniform_numbers = uniforms(4, Purpose.GUMBEL, slots, length * (codes + 1), draw=number).view(
            2, length, codes + 1
        )
        noise = uniform_numbers[..., :states].transpose(1, 2)

        def prepared(*_: object, noise: Tensor = noise, **__: object) -> Tensor:
            return noise

        monkeypatch.setattr("torch.rand", prepared)
        result = scheduler.step(
            network(tokens, t).transpose(1, 2), t, cast(torch.LongTensor, tokens), return_dict=False
        )
        monkeypatch.undo()
        tokens = cast(tuple[Tensor], result)[0]
    assert torch.equal(final, tokens)


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda sampler: sampler.kind)
def test_image_does_not_depend_on_batch(sampler: SamplerConfig) -> None:
    transition = MaskAndReplace(Paper(), 17)
    slots = torch.tensor([3, 8, 2**40, 1])
    together = sample(uncertain(17), sampler, transition, slots, 36, seed=2)
    alone = sample(uncertain(17), sampler, transition, slots[2:3], 36, seed=2)
    assert torch.equal(together[2:3], alone)
    assert not torch.equal(together[0], together[1])
    assert not torch.equal(together, sample(uncertain(17), sampler, transition, slots, 36, seed=3))


@pytest.mark.parametrize(
    "sampler", [Ancestral(), Strided(steps=4), Halton(steps=5), Remask(steps=15), LegacyFast()]
)
def test_sampled_codes_follow_prediction(sampler: SamplerConfig) -> None:
    codes, length, batch = 5, 4, 20_000
    transition = MaskAndReplace(Absorbing(steps=20), codes)
    sampled = sample(uncertain(codes), sampler, transition, torch.arange(batch), length, seed=6)
    expected = uncertain(codes)(sampled[:1], 0)[0].exp()
    for position in range(length):
        share = torch.bincount(sampled[:, position], minlength=codes) / batch
        spread = (expected[position] * (1 - expected[position]) / batch).sqrt()
        assert ((share - expected[position]).abs() <= 5 * spread).all()


def test_tail_codes_have_expected_frequency() -> None:
    codes, length = 500, 1000
    p = torch.full((codes,), 1e-4)
    p[0] = 1 - 1e-4 * (codes - 1)
    transition = MaskAndReplace(Absorbing(), codes)
    log_p = p.log().expand(1, length, codes)
    counts = torch.zeros(codes, dtype=torch.float64)
    for slot in range(200):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            sampled = sample(
                lambda tokens, t: log_p, Strided(steps=1), transition, torch.tensor([slot]), length, seed=7
            )
        counts += torch.bincount(sampled[0], minlength=codes)
    expected = 200 * length * p.double()
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    assert abs(chi_square - (codes - 1)) < 5 * (2 * (codes - 1)) ** 0.5


def test_zero_probability_code_is_never_sampled() -> None:
    transition = MaskAndReplace(Absorbing(), 4)
    log_p = torch.tensor([-torch.inf, 0.0, -torch.inf, -torch.inf]).expand(2000, 50, 4)
    sampled = sample(lambda tokens, t: log_p, Strided(steps=2), transition, torch.arange(2000), 50, seed=8)
    assert (sampled == 1).all()


REVEALING = (Purity, Confidence, Halton)


@pytest.mark.parametrize("kind", REVEALING, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("steps", [10, 25, 50, 100, 7])
@pytest.mark.parametrize("length", [256, 1024])
def test_positions_are_revealed_once_in_scheduled_counts(
    kind: type[Purity | Confidence | Halton], steps: int, length: int
) -> None:
    transition, visited = MaskAndReplace(Released(), 5), list[tuple[Tensor, int]]()
    final = sample(
        watched(uncertain(5), visited), kind(steps=steps), transition, torch.arange(2), length, seed=9
    )
    states = [tokens for tokens, _ in visited] + [final]
    rates = transition.rates
    for before, after, (_, t) in zip(states, states[1:], [*visited[1:], (final, -1)], strict=False):
        visible = before != 5
        assert torch.equal(after[visible], before[visible])
        masked_count = length * float(rates.at(t).mask / rates.at(99).mask)
        assert ((after == 5).sum(-1).double() - masked_count).abs().max() <= 0.5
    assert len(visited) == steps
    assert not (final == 5).any()


def test_purity_reveals_confident_positions_first_and_sharpens() -> None:
    codes, length, batch = 3, 40, 200
    log_p = torch.tensor([0.4, 0.3, 0.3]).log().repeat(length, 1)
    log_p[::2] = torch.tensor([0.98, 0.01, 0.01]).log()
    transition, visited = MaskAndReplace(Absorbing(), codes), list[tuple[Tensor, int]]()
    network = watched(lambda tokens, t: log_p.expand(batch, length, codes), visited)
    final = sample(network, Purity(steps=10, weight=2.0), transition, torch.arange(batch), length, seed=1)
    revealed = visited[5][0] != codes
    sure, unsure = float(revealed[:, ::2].double().mean()), float(revealed[:, 1::2].double().mean())
    # Rates 0.98 and 0.4 of sampling without replacement: after half of the positions about 0.66 and 0.34.
    assert 0.6 < sure < 0.75 and 0.25 < unsure < 0.4
    plain = sample(network, Purity(steps=10, weight=0.0), transition, torch.arange(batch), length, seed=1)
    assert (final == 0)[:, 1::2].double().mean() > (plain == 0)[:, 1::2].double().mean() + 0.03
    assert float((plain == 0)[:, 1::2].double().mean()) == pytest.approx(0.4, abs=0.03)


def test_confidence_at_zero_temperature_reveals_most_probable_first() -> None:
    transition, visited = MaskAndReplace(Absorbing(), 3), list[tuple[Tensor, int]]()
    log_p = torch.tensor([0.4, 0.3, 0.3]).log().repeat(40, 1)
    log_p[::2] = torch.tensor([0.98, 0.01, 0.01]).log()
    network = watched(lambda tokens, t: log_p.expand(50, 40, 3), visited)
    for temperature, sure in ((0.0, 0.99), (1000.0, 0.5)):
        visited.clear()
        sampler = Confidence(steps=10, temperature=temperature)
        sample(network, sampler, transition, torch.arange(50), 40, seed=1)
        visible = visited[5][0] != 3
        assert float(visible[:, ::2].sum() / visible.sum()) == pytest.approx(sure, abs=0.04)


def test_remasking_changes_visible_tokens_only_with_strength() -> None:
    transition = MaskAndReplace(Released(), 5)

    def changes(strength: float) -> int:
        visited: list[tuple[Tensor, int]] = []
        sample(
            watched(uncertain(5), visited),
            Remask(steps=20, strength=strength),
            transition,
            torch.arange(4),
            256,
            seed=2,
        )
        states = [tokens for tokens, _ in visited]
        return sum(int(((before != 5) & (after != before)).sum()) for before, after in pairwise(states))

    assert changes(0.0) == 0
    assert changes(0.5) > 500


def test_halton_order_visits_every_position_once_and_spreads() -> None:
    order = halton_order(1024)
    assert sorted(order) == list(range(1024))
    quarters = [
        sum((place // 32 // 16, place % 32 // 16) == quarter for place in order[:64])
        for quarter in ((0, 0), (0, 1), (1, 0), (1, 1))
    ]
    assert max(quarters) - min(quarters) <= 4
    with pytest.raises(UserError, match="60 is not a square"):
        halton_order(60)


@pytest.mark.parametrize("side", range(1, 65))
def test_halton_order_equals_fractions(side: int) -> None:
    def mirrored(index: int, base: int) -> Fraction:
        return (index % base + mirrored(index // base, base)) / base if index else Fraction(0)

    positions = ((floor(mirrored(n, 2) * side), floor(mirrored(n, 3) * side)) for n in count(1))
    expected: dict[int, None] = {}
    while len(expected) < side * side:
        row, column = next(positions)
        expected[row * side + column] = None
    assert halton_order(side * side) == list(expected)


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda sampler: sampler.kind)
def test_known_tokens_are_fixed_and_noised_at_each_step(sampler: SamplerConfig) -> None:
    codes, length, batch = 9, 1024, 4
    transition = MaskAndReplace(Released(), codes)
    tokens = image(batch, length, codes)
    mask = (torch.arange(length) % 3 == 0).expand(batch, length)
    visited: list[tuple[Tensor, int]] = []
    sampled = sample(
        watched(uncertain(codes), visited),
        sampler,
        transition,
        torch.arange(batch),
        length,
        seed=1,
        known_tokens=KnownTokens(tokens, mask),
    )
    assert torch.equal(sampled[mask], tokens[mask])
    assert not torch.equal(sampled, tokens)
    previous = torch.zeros_like(mask)
    for noisy, _ in visited:
        visible = (noisy != codes) & mask
        assert (noisy == tokens)[visible].double().mean() > 0.99 or not visible.any()
        assert not (previous & ~visible).any()
        previous = visible
    if isinstance(sampler, REVEALING):
        for noisy, t in visited:
            masked_count = int((~mask[0]).sum()) * float(
                transition.rates.at(t).mask / transition.rates.at(99).mask
            )
            assert (((noisy == codes) & ~mask).sum(-1).double() - masked_count).abs().max() <= 0.5
    if isinstance(sampler, Strided):
        for noisy, t in visited:
            share, expected = (
                float((noisy == codes)[mask].double().mean()),
                float(transition.rates.at(t).mask),
            )
            assert abs(share - expected) <= 5 * (expected * (1 - expected) / int(mask.sum())) ** 0.5 + 1e-3


def test_fully_known_is_returned_and_none_known_changes_nothing() -> None:
    transition, tokens = MaskAndReplace(Paper(), 9), image(2, 16, 9)
    for sampler in SAMPLERS:
        fully_known = KnownTokens(tokens, torch.ones_like(tokens, dtype=torch.bool))
        assert torch.equal(
            sample(uncertain(9), sampler, transition, torch.arange(2), 16, seed=1, known_tokens=fully_known),
            tokens,
        )
        nothing = KnownTokens(tokens, torch.zeros_like(tokens, dtype=torch.bool))
        assert torch.equal(
            sample(uncertain(9), sampler, transition, torch.arange(2), 16, seed=1, known_tokens=nothing),
            sample(uncertain(9), sampler, transition, torch.arange(2), 16, seed=1),
        )


@pytest.mark.parametrize("sampler", [Ancestral(), Strided(steps=20), Purity(steps=20)])
def test_image_to_image_starts_at_its_strength(sampler: SamplerConfig) -> None:
    transition, tokens = MaskAndReplace(Released(), 9), image(4, 1024, 9)
    visited: list[tuple[Tensor, int]] = []
    network = watched(uncertain(9), visited)
    sampled = sample(
        network, sampler, transition, torch.arange(4), 1024, seed=1, start=Start(tokens, strength=0.3)
    )
    noisy, t = visited[0]
    assert t == 29
    assert float((noisy == 9).double().mean()) == pytest.approx(float(transition.rates.at(29).mask), abs=0.03)
    assert (noisy == tokens)[noisy != 9].all()
    assert not (sampled == 9).any()
    assert len(visited) == {"ancestral": 30, "strided": 6, "purity": 6}[sampler.kind]


def test_progress_is_reported() -> None:
    reported_steps: list[tuple[int, int]] = []
    sample(
        uncertain(4),
        Strided(steps=3),
        MaskAndReplace(Paper(), 4),
        torch.arange(1),
        4,
        seed=0,
        on_step=lambda number, total: reported_steps.append((number, total)),
    )
    assert reported_steps == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda sampler: sampler.kind)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nonfinite_logits_stop_every_sampler(sampler: SamplerConfig, value: float) -> None:
    """Tokens remain valid indices: on a GPU an invalid one is a device-side assertion."""
    table = torch.zeros(5, 4)
    table[4, 1] = value

    def network(tokens: Tensor, t: int) -> Tensor:
        return torch.nn.functional.embedding(tokens, table).log_softmax(-1)

    with pytest.raises(UserError, match="prediction contains NaN or infinity"):
        sample(network, sampler, MaskAndReplace(Released(), 4), torch.arange(3), 4, seed=0)


def test_invalid_input_is_refused() -> None:
    transition, tokens = MaskAndReplace(Released(), 4), image(1, 4, 4)

    def run(
        network: Predict | None = None, sampler: SamplerConfig | None = None, start: Start | None = None
    ) -> None:
        predict = network or uncertain(4)
        sample(predict, sampler or Strided(), transition, torch.arange(1), 4, seed=0, start=start)

    with pytest.raises(UserError, match="prediction contains NaN"):
        run(lambda tokens, t: torch.full((*tokens.shape, 4), torch.nan))
    with pytest.raises(UserError, match="has 5 classes"):
        run(uncertain(5))
    with pytest.raises(UserError, match="101 exceeds the 100 steps"):
        run(sampler=Strided(steps=101))
    with pytest.raises(UserError, match=r"strength 1\.5"):
        run(start=Start(tokens, 1.5))
    with pytest.raises(UserError, match="token 4 is not between 0 and 3"):
        run(start=Start(tokens + 4 - tokens, 0.5))
    with pytest.raises(UserError, match="cannot start from an image"):
        run(sampler=LegacyFast(), start=Start(tokens, 0.5))


def test_noise_is_full_precision_under_autocast() -> None:
    noise = SamplerNoise(0, torch.arange(2), 8, 0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = noise.uniforms(Purpose.SAMPLING), noise.gumbel(3)
    assert [noise.dtype for noise in low] == [torch.float64, torch.float32]
    assert torch.equal(low[0], noise.uniforms(Purpose.SAMPLING)) and torch.equal(low[1], noise.gumbel(3))


def test_noise_differs_between_steps() -> None:
    first, second = (SamplerNoise(0, torch.arange(2), 8, draw).uniforms(Purpose.SAMPLING) for draw in (0, 1))
    assert not torch.equal(first, second)
