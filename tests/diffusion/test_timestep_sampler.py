import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from vqd_scale.core.errors import UserError
from vqd_scale.core.rng import Purpose, uniforms
from vqd_scale.diffusion.config import Importance, Uniform
from vqd_scale.diffusion.timestep_sampler import FLOOR, TimeSampler

STEPS = 8
LOSSES = torch.tensor([3.0, 0.1, 0.2, 0.4, 0.8, 1.6, 0.05, 0.0])


def single_rank(tensor: Tensor) -> Tensor:
    return tensor


def warm(times: TimeSampler, rounds: int = 12) -> TimeSampler:
    for _ in range(rounds):
        times.observe(torch.arange(STEPS), LOSSES)
        times.synchronize(single_rank)
    return times


def draws(count: int) -> Tensor:
    return uniforms(5, Purpose.TIMESTEP, torch.arange(count), 1, dtype=torch.float64)[:, 0]


@pytest.mark.parametrize("rounds", [0, 12])
def test_importance_weighted_loss_is_unbiased(rounds: int) -> None:
    times = warm(TimeSampler(Importance(), STEPS), rounds)
    t, probability = times.sample(draws(400_000))
    assert float((LOSSES[t] / probability).mean()) == pytest.approx(float(LOSSES.sum()), rel=0.01)


@pytest.mark.parametrize("times", [TimeSampler(Uniform(), STEPS), warm(TimeSampler(Importance(), STEPS))])
def test_timestep_frequencies_equal_probabilities(times: TimeSampler) -> None:
    t, probability = times.sample(draws(100_000))
    assert torch.equal(probability, times.distribution()[t].float())
    share = torch.bincount(t, minlength=STEPS) / 100_000
    expected = times.distribution()
    assert ((share - expected).abs() <= 5 * (expected * (1 - expected) / 100_000).sqrt()).all()


def test_importance_follows_losses_and_first_timestep_uses_neighbor() -> None:
    times = warm(TimeSampler(Importance(), STEPS), 200)
    expected = LOSSES.double() + FLOOR
    expected[0] = expected[1]
    torch.testing.assert_close(times.distribution(), expected / expected.sum(), rtol=1e-6, atol=1e-9)


def test_distribution_is_uniform_during_warmup() -> None:
    times = TimeSampler(Importance(warmup=2), STEPS)
    for rounds in range(4):
        is_uniform = torch.allclose(times.distribution(), torch.full((STEPS,), 1 / STEPS).double())
        assert is_uniform == (rounds <= 2)
        times = warm(times, 1)


def test_history_is_running_mean_of_squared_losses() -> None:
    times, history = TimeSampler(Importance(), 1), 0.0
    for loss in (1.0, 3.0, 2.0):
        times.observe(torch.tensor([0]), torch.tensor([loss]))
        times.synchronize(single_rank)
        history = 0.9 * history + 0.1 * loss**2
        assert float(times.history) == pytest.approx(history)


def test_batched_losses_at_one_timestep_count_separately() -> None:
    times = TimeSampler(Importance(), 1)
    times.observe(torch.zeros(3, dtype=torch.long), torch.tensor([1.0, 3.0, 2.0]))
    times.synchronize(single_rank)
    assert float(times.history) == pytest.approx((1 - 0.9**3) * (1 + 9 + 4) / 3)


def test_unobserved_timestep_keeps_distribution_uniform() -> None:
    times = TimeSampler(Importance(), STEPS)
    for _ in range(20):
        times.observe(torch.arange(STEPS - 1), LOSSES[:-1])
        times.synchronize(single_rank)
    torch.testing.assert_close(times.distribution(), torch.full((STEPS,), 1 / STEPS).double())


def test_history_does_not_depend_on_order_accumulation_or_ranks() -> None:
    t, loss = torch.tensor([1, 1, 2, 5, 1, 7]), torch.tensor([0.3, 0.4, 0.1, 0.9, 0.2, 0.7])
    one_update_sampler, many_update_sampler = (
        TimeSampler(Importance(), STEPS),
        TimeSampler(Importance(), STEPS),
    )
    one_update_sampler.observe(t, loss)
    for image in reversed(range(6)):
        many_update_sampler.observe(t[image : image + 1], loss[image : image + 1])
    one_update_sampler.synchronize(single_rank)
    many_update_sampler.synchronize(single_rank)
    torch.testing.assert_close(one_update_sampler.history, many_update_sampler.history, rtol=1e-14, atol=0)
    ranks = [TimeSampler(Importance(), STEPS) for _ in range(2)]
    ranks[0].observe(t[:2], loss[:2])
    ranks[1].observe(t[2:], loss[2:])
    sums: list[Tensor] = []
    for rank in ranks:
        rank.synchronize(lambda tensor: (sums.append(tensor), tensor)[1])
    joined = TimeSampler(Importance(), STEPS)
    joined.synchronize(lambda _: sums[0] + sums[1])
    torch.testing.assert_close(joined.history, one_update_sampler.history, rtol=1e-14, atol=0)


def test_losses_of_bad_samples_and_nonfinite_losses_are_ignored() -> None:
    times = TimeSampler(Importance(), STEPS)
    times.observe(
        torch.tensor([1, 2, 3]), torch.tensor([0.5, 9.0, float("nan")]), torch.tensor([1.0, 0.0, 1.0])
    )
    times.synchronize(single_rank)
    assert times.count.tolist() == [0, 1, 0, 0, 0, 0, 0, 0]
    assert times.history.nonzero().flatten().tolist() == [1]


def test_distribution_survives_resume_exactly() -> None:
    times = warm(TimeSampler(Importance(), STEPS))
    resumed = TimeSampler(Importance(), STEPS)
    resumed.load_state_dict(times.state_dict())
    assert torch.equal(resumed.distribution(), times.distribution())
    for sampler in (times, resumed):
        warm(sampler, 1)
    assert torch.equal(resumed.distribution(), times.distribution())
    with pytest.raises(UserError, match="has 8 times, this schedule 9"):
        TimeSampler(Importance(), 9).load_state_dict(times.state_dict())


def _rank(rank: int, folder: Path, t: Tensor, loss: Tensor) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    times = TimeSampler(Importance(warmup=0), STEPS)
    half = len(t) // 2
    mine = slice(rank * half, (rank + 1) * half)

    def all_reduce(tensor: Tensor) -> Tensor:
        dist.all_reduce(tensor)
        return tensor

    for _ in range(3):
        times.observe(t[mine], loss[mine])
        times.synchronize(all_reduce)
    torch.save(times.state_dict(), folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.ranks
def test_two_ranks_have_the_distribution_of_one(tmp_path: Path) -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    t, loss = torch.arange(2 * STEPS) % STEPS, torch.linspace(0.1, 2, 2 * STEPS)
    mp.spawn(_rank, args=(tmp_path, t, loss), nprocs=2)  # pyright: ignore[reportPrivateImportUsage]
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    single = TimeSampler(Importance(warmup=0), STEPS)
    for _ in range(3):
        single.observe(t, loss)
        single.synchronize(single_rank)
    assert torch.equal(first["history"], second["history"])
    torch.testing.assert_close(first["history"], single.history, rtol=1e-14, atol=0)
