import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vqd_scale.core.errors import UserError
from vqd_scale.evaluation.reconstruction import psnr, ssim


def random_images(seed: int, count: int = 2, height: int = 14, width: int = 17) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, height, width), generator=generator, dtype=torch.uint8)


def noisy(images: Tensor, amplitude: int) -> Tensor:
    noise = torch.randint(-amplitude, amplitude + 1, images.shape, generator=torch.Generator().manual_seed(0))
    return (images.int() + noise).clamp(0, 255).to(torch.uint8)


def slow_ssim(x: Tensor, y: Tensor) -> float:
    """Compute equation 13 of Wang et al. by a loop over channels and windows with weighted sums."""
    steps = np.arange(-5, 6)
    weights = np.exp(-(steps[:, None] ** 2 + steps[None, :] ** 2) / (2 * 1.5**2))
    weights /= weights.sum()
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    values: list[float] = []
    for a, b in zip(x.double().numpy(), y.double().numpy(), strict=True):
        for row in range(a.shape[0] - 10):
            for column in range(a.shape[1] - 10):
                p, q = (image[row : row + 11, column : column + 11] for image in (a, b))
                mean_p, mean_q = (weights * p).sum(), (weights * q).sum()
                variance_p, variance_q = (
                    (weights * (p - mean_p) ** 2).sum(),
                    (weights * (q - mean_q) ** 2).sum(),
                )
                covariance = (weights * (p - mean_p) * (q - mean_q)).sum()
                above = (2 * mean_p * mean_q + c1) * (2 * covariance + c2)
                values.append(above / ((mean_p**2 + mean_q**2 + c1) * (variance_p + variance_q + c2)))
    return float(np.mean(values))


@settings(max_examples=15)
@given(seed=st.integers(0, 1000), amplitude=st.integers(0, 255))
def test_ssim_equals_slow_reference(seed: int, amplitude: int) -> None:
    originals = random_images(seed)
    reconstructions = noisy(originals, amplitude)
    expected = [slow_ssim(x, y) for x, y in zip(originals, reconstructions, strict=True)]
    np.testing.assert_allclose(ssim(originals, reconstructions), expected, rtol=1e-9)


def test_ssim_of_flat_images_is_luminance_term() -> None:
    black, gray = (
        torch.zeros(1, 3, 16, 16, dtype=torch.uint8),
        torch.full((1, 3, 16, 16), 100).to(torch.uint8),
    )
    constant = (0.01 * 255) ** 2
    assert math.isclose(ssim(black, gray).item(), constant / (100**2 + constant), rel_tol=1e-9)
    assert ssim(gray, gray).item() == pytest.approx(1.0, abs=1e-12)


@given(difference=st.integers(1, 255))
def test_psnr_of_a_constant_difference(difference: int) -> None:
    black = torch.zeros(1, 3, 4, 4, dtype=torch.uint8)
    expected = 20 * math.log10(255 / difference)
    assert math.isclose(psnr(black, black + difference).item(), expected, rel_tol=1e-12, abs_tol=1e-12)
    assert math.isclose(psnr(black + difference, black).item(), expected, rel_tol=1e-12, abs_tol=1e-12)


def test_psnr_is_computed_per_image() -> None:
    originals = random_images(0, count=3)
    reconstructions = noisy(originals, 20)
    reconstructions[1] = originals[1]
    errors = (originals.numpy().astype(float) - reconstructions.numpy()) ** 2
    expected = [10 * np.log10(255**2 / error.mean()) if error.any() else np.inf for error in errors]
    np.testing.assert_allclose(psnr(originals, reconstructions), expected, rtol=1e-12)


@pytest.mark.parametrize("measure", [psnr, ssim])
def test_psnr_and_ssim_decrease_with_noise(measure: Callable[[Tensor, Tensor], Tensor]) -> None:
    originals = random_images(1, height=32, width=32)
    values = [measure(originals, noisy(originals, amplitude)).mean().item() for amplitude in (2, 20, 120)]
    assert values == sorted(values, reverse=True)


def test_incompatible_images_are_refused() -> None:
    images = random_images(0)
    for measure in (psnr, ssim):
        with pytest.raises(ValueError, match="expected uint8"):
            measure(images, images.float())
        with pytest.raises(ValueError, match="expected two batches"):
            measure(images, images[:1])
        with pytest.raises(ValueError, match="expected two batches"):
            measure(images[:, :1], images[:, :1])
    with pytest.raises(UserError, match="17x10 pixels are smaller than its window of 11"):
        ssim(images[:, :, :10], images[:, :, :10])
