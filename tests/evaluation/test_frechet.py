import math

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vqd_scale.core.errors import UserError
from vqd_scale.evaluation.frechet import FeatureStatistics, frechet_distance

DIMENSION = 6


def features(seed: int, count: int = 64, dimension: int = DIMENSION) -> Tensor:
    """Return correlated features far from the origin, where a naive sum of squares loses digits."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dimension, dimension, generator=generator, dtype=torch.float64)
    noise = torch.randn(count, dimension, generator=generator, dtype=torch.float64)
    return 1000 + noise @ mixing + torch.randn(dimension, generator=generator, dtype=torch.float64)


def gaussian(mean: Tensor, covariance: Tensor) -> FeatureStatistics:
    return FeatureStatistics(1000, mean, covariance * 999)


def textbook_distance(first: FeatureStatistics, second: FeatureStatistics) -> float:
    """Compute the formula of Heusel et al. literally, with a matrix square root of an unsymmetric product."""
    c1, c2 = first.covariance.numpy(), second.covariance.numpy()
    root = np.real(scipy.linalg.sqrtm(c1 @ c2))
    return float(((first.mean - second.mean) ** 2).sum() + np.trace(c1 + c2 - 2 * root))


def test_statistics_equal_numpy() -> None:
    values = features(0)
    statistics = FeatureStatistics.of(values)
    assert statistics.count == 64
    np.testing.assert_allclose(statistics.mean, values.numpy().mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(statistics.covariance, np.cov(values.numpy(), rowvar=False), rtol=1e-9)


@given(cuts=st.lists(st.integers(1, 63), max_size=5, unique=True))
def test_streamed_and_merged_statistics_equal_one_pass(cuts: list[int]) -> None:
    values = features(1)
    one_pass_statistics = FeatureStatistics.of(values)
    parts = torch.tensor_split(values, sorted(cuts))
    streamed, merged = FeatureStatistics.empty(DIMENSION), FeatureStatistics.empty(DIMENSION)
    for part in parts:
        streamed = streamed.merge(FeatureStatistics.of(part))
        merged = FeatureStatistics.of(part).merge(merged)
    for statistics in (streamed, merged):
        assert statistics.count == one_pass_statistics.count
        torch.testing.assert_close(statistics.mean, one_pass_statistics.mean, rtol=1e-12, atol=0)
        torch.testing.assert_close(statistics.scatter, one_pass_statistics.scatter, rtol=1e-9, atol=1e-8)


def test_low_precision_features_are_summed_in_float64() -> None:
    values = features(2).to(torch.bfloat16)
    torch.testing.assert_close(FeatureStatistics.of(values).mean, values.double().mean(dim=0))
    assert FeatureStatistics.of(values).scatter.dtype is torch.float64


@given(
    shift=st.floats(-5, 5),
    first=st.lists(st.floats(0.1, 10), min_size=3, max_size=3),
    second=st.lists(st.floats(0.1, 10), min_size=3, max_size=3),
)
def test_closed_form_of_gaussians_with_common_axes(
    shift: float, first: list[float], second: list[float]
) -> None:
    rotation = torch.linalg.qr(features(3, 3, 3)).Q
    deviations = torch.tensor([first, second], dtype=torch.float64)
    one, two = (
        gaussian(torch.full((3,), mean, dtype=torch.float64), (rotation * row**2) @ rotation.T)
        for mean, row in zip((0.0, shift), deviations, strict=True)
    )
    expected = 3 * shift**2 + float((deviations[0] - deviations[1]).square().sum())
    assert math.isclose(frechet_distance(one, two), expected, rel_tol=1e-9, abs_tol=1e-9)


@settings(max_examples=20)
@given(seed=st.integers(0, 1000))
def test_distance_equals_textbook_formula_and_is_symmetric(seed: int) -> None:
    one, two = FeatureStatistics.of(features(seed)), FeatureStatistics.of(features(seed + 1, count=80))
    distance = frechet_distance(one, two)
    assert math.isclose(distance, textbook_distance(one, two), rel_tol=1e-6)
    assert math.isclose(distance, frechet_distance(two, one), rel_tol=1e-9)
    assert distance > 0


def test_equal_sets_have_distance_zero_with_dependent_features() -> None:
    values = features(4, count=200, dimension=64)
    # Rounding then gives eigenvalues on both sides of zero.
    values[:, 7] = 3.0
    values[:, 20:30] = values[:, 10:20] * 0.3
    statistics = FeatureStatistics.of(values)
    scale = float(statistics.covariance.trace())
    assert 0 <= frechet_distance(statistics, statistics) < 1e-12 * scale


def test_incompatible_statistics_raise_user_error() -> None:
    enough = FeatureStatistics.of(features(5, count=DIMENSION + 1))
    assert frechet_distance(enough, enough) < 1e-6
    with pytest.raises(
        UserError, match="6 samples are too few for features of 6 dimensions; give at least 7"
    ):
        frechet_distance(enough, FeatureStatistics.of(features(5, count=DIMENSION)))
    with pytest.raises(UserError, match="features of 7 and of 6 dimensions"):
        frechet_distance(enough, FeatureStatistics.of(features(5, dimension=7)))
    with pytest.raises(UserError, match="not finite"):
        frechet_distance(enough, FeatureStatistics.of(features(5) * float("inf")))
