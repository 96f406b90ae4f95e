import pytest
import torch

from vqd_scale.core.errors import UserError
from vqd_scale.tokenizers.base import check_signal, check_tokens, to_bytes, to_pixels, to_signal
from vqd_scale.tokenizers.config import VQGANConfig
from vqd_scale.tokenizers.vqgan import VQGAN


def test_bytes_and_signal_are_inverse() -> None:
    every = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    assert torch.equal(to_bytes(to_signal(every)), every)
    assert to_signal(every).min() == -1
    assert to_signal(every).max() == 1


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_nonfinite_images_are_refused(value: float) -> None:
    signal = torch.rand(2, 3, 4, 4)
    assert torch.equal(to_pixels(signal), to_bytes(signal))
    signal[1, 0, 2, 3] = value
    with pytest.raises(UserError, match="decoded images contain NaN or infinity"):
        to_pixels(signal)


def test_images_of_another_range_or_dtype_are_refused() -> None:
    gradient = torch.linspace(0, 255, 64).view(1, 1, 8, 8).expand(1, 3, 8, 8)
    with pytest.raises(ValueError, match=r"expected uint8 images, 0\.\.255, got torch.float32"):
        to_signal(gradient / 255)
    tokenizer = VQGAN(VQGANConfig(codebook_size=2, channels=4, channel_multipliers=(1, 1), norm="none"))
    with pytest.raises(ValueError, match=r"expected images in \[-1, 1\] .* found the value 255"):
        tokenizer.encode(gradient)
    with pytest.raises(ValueError, match=r"expected float images .* got torch\.uint8"):
        tokenizer.encode(gradient.byte())
    with pytest.raises(ValueError, match="found the value nan"):
        check_signal(torch.full((1, 3, 8, 8), torch.nan), 8)
    check_signal(to_signal(gradient.byte()), 8)
    check_signal(to_signal(gradient.byte()).bfloat16(), 8)


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 1, 8, 8), (1, 3, 8, 9), (1, 3, 4, 8), (0, 3, 8, 8)])
def test_image_sides_must_be_multiples_of_the_factor(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected float images|not multiples"):
        check_signal(torch.zeros(shape), 8)


def test_gradient_requires_the_signal_range() -> None:
    """Fit a tokenizer to signals; inputs in 0..1 are then decoded badly."""
    torch.manual_seed(0)
    across = torch.arange(0, 256, 8, dtype=torch.uint8).view(1, 1, 1, 32).expand(1, 3, 32, 32)
    image = torch.cat([across, across.mT, 255 - across])
    signal = to_signal(image)
    tokenizer = VQGAN(
        VQGANConfig(
            codebook_size=64,
            code_dim=8,
            channels=32,
            channel_multipliers=(1,),
            num_res_blocks=1,
            patch_size=4,
            norm="none",
        )
    )
    optimizer = torch.optim.Adam(tokenizer.parameters(), lr=3e-3)
    for step in range(150):
        output = tokenizer(signal, quantized=step >= 100)
        loss = (output.images - signal).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step == 99:
            tokenizer.quantize.initialize(output.latents.detach(), seed=0)
    given_back = to_bytes(tokenizer.decode(tokenizer.encode(signal)).detach())
    assert decibels(given_back, image) > 25
    wrong = to_bytes(tokenizer.decode(tokenizer.encode(image / 255)).detach())
    assert decibels(wrong, image) < 15


def decibels(first: torch.Tensor, second: torch.Tensor) -> float:
    return float(10 * torch.log10(255**2 / (first.double() - second.double()).square().mean()))


def test_invalid_tokens_are_refused() -> None:
    check_tokens(torch.tensor([[[0, 4]]]), 5)
    with pytest.raises(ValueError, match=r"expected codes 0\.\.4, found 0\.\.5"):
        check_tokens(torch.tensor([[[0, 5]]]), 5)
    with pytest.raises(ValueError, match=r"found -1\.\.0"):
        check_tokens(torch.tensor([[[0, -1]]]), 5)
    with pytest.raises(ValueError, match=r"expected tokens \[batch, rows, columns\]"):
        check_tokens(torch.zeros(1, 2, 2), 5)
    tokenizer = VQGAN(VQGANConfig(codebook_size=2, channels=4, channel_multipliers=(1, 1), norm="none"))
    with pytest.raises(ValueError, match="found 2"):
        tokenizer.decode(torch.full((1, 2, 2), 2))
