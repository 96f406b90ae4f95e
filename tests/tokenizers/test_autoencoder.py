"""Properties that the tokenizers share: any size, bfloat16 batches, and a float32 search."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vqd_scale.tokenizers.base import to_bytes
from vqd_scale.tokenizers.config import TamingGumbelConfig, TamingVQConfig
from vqd_scale.tokenizers.taming import TamingGumbel, TamingVQ

SLIM: dict[str, Any] = {
    "codebook_size": 8,
    "channels": 32,
    "num_res_blocks": 1,
    "latent_channels": 6,
    "code_dim": 4,
}


def tokenizer_of(config: TamingVQConfig) -> TamingVQ:
    torch.manual_seed(0)
    tokenizer = TamingVQ(config).requires_grad_(False)
    images = torch.rand(8, 3, tokenizer.factor, tokenizer.factor) * 2 - 1
    tokenizer.quantize.embedding.weight.copy_(tokenizer.latents(images).flatten(1))
    return tokenizer


def random_images(height: int, width: int, count: int = 2) -> Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize(("height", "width"), [(8, 8), (24, 56), (96, 64)])
def test_attention_is_at_its_level_at_any_size(height: int, width: int) -> None:
    tokenizer = tokenizer_of(TamingVQConfig(**SLIM, attention=(3,)))
    images = random_images(height, width)
    tokens = tokenizer.encode(images)
    assert tokens.shape == (2, height // 8, width // 8)
    assert tokenizer.decode(tokens).shape == images.shape


def test_image_of_384_pixels_is_a_grid_of_48() -> None:
    config = TamingVQConfig(**SLIM, channel_multipliers=(1, 1, 1, 1), attention=(3,))
    tokenizer = tokenizer_of(config)
    assert tokenizer.encode(random_images(384, 384, count=1)).shape == (1, 48, 48)


def test_bfloat16_batches_are_channels_last_and_close() -> None:
    exact = tokenizer_of(TamingVQConfig(**SLIM))
    quick = tokenizer_of(TamingVQConfig(**SLIM))
    quick.compute_in(torch.bfloat16)
    images = random_images(64, 64, count=4)
    activations: list[Tensor] = []

    def watch(_: nn.Module, __: object, output: Tensor) -> None:
        activations.append(output)

    quick.encoder.conv_out.register_forward_hook(watch)
    quick.decoder.conv_in.register_forward_hook(watch)
    tokens = quick.encode(images)
    pixels = quick.decode(tokens)
    assert [activation.dtype for activation in activations] == [torch.bfloat16] * 2
    assert all(activation.is_contiguous(memory_format=torch.channels_last) for activation in activations)
    assert (tokens == exact.encode(images)).float().mean() > 0.9
    assert pixels.dtype == torch.float32
    error = (to_bytes(pixels).float() - to_bytes(exact.decode(tokens)).float()).square().mean()
    assert 10 * torch.log10(255**2 / error) > 35


@pytest.mark.parametrize("kind", ["vq", "gumbel"])
def test_code_selection_is_float32(kind: str) -> None:
    tokenizer = TamingVQ(TamingVQConfig(**SLIM)) if kind == "vq" else TamingGumbel(TamingGumbelConfig(**SLIM))
    tokenizer.compute_in(torch.bfloat16)
    dtypes = {name: value.dtype for name, value in tokenizer.state_dict().items()}
    for name, dtype in dtypes.items():
        lowered = name.startswith(("encoder.", "decoder."))
        assert dtype == (torch.bfloat16 if lowered else torch.float32), name
    vector_dtypes: list[torch.dtype] = []
    search = tokenizer.quantize.nearest

    def watched(vectors: Tensor) -> Tensor:
        vector_dtypes.append(vectors.dtype)
        return search(vectors)

    tokenizer.quantize.nearest = watched
    tokenizer.encode(random_images(16, 16))
    assert vector_dtypes == [torch.float32]


def test_codes_of_an_image_do_not_depend_on_batch() -> None:
    tokenizer = tokenizer_of(TamingVQConfig(**SLIM))
    images = random_images(32, 32, count=4)
    assert torch.equal(tokenizer.encode(images)[2:3], tokenizer.encode(images[2:3]))
