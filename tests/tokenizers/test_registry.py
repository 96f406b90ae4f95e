from typing import Any

import pytest
import torch
from pydantic import TypeAdapter

from vqd_scale.tokenizers.base import ImageTokenizer
from vqd_scale.tokenizers.config import (
    FSQConfig,
    ReducedConfig,
    TamingGumbelConfig,
    TamingVQConfig,
    TokenizerConfig,
    VQGANConfig,
)

SHAPE: dict[str, Any] = {"channels": 32, "channel_multipliers": (1, 1), "num_res_blocks": 1}
SLIM: dict[str, Any] = {**SHAPE, "codebook_size": 8, "code_dim": 4}
GUMBEL = TamingGumbelConfig(**SLIM, latent_channels=4, attention=())
CONFIGS: list[TokenizerConfig] = [
    VQGANConfig(**SLIM),
    TamingVQConfig(**SLIM, latent_channels=6, attention=(1,)),
    GUMBEL,
    FSQConfig(**SHAPE, levels=(4, 3)),
    ReducedConfig(codebook_size=5, full=GUMBEL),
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.kind)
def test_every_kind_is_a_tokenizer_and_round_trips(config: TokenizerConfig) -> None:
    loaded_config: TokenizerConfig = TypeAdapter(TokenizerConfig).validate_json(config.model_dump_json())
    assert loaded_config == config
    torch.manual_seed(0)
    tokenizer = config.build().requires_grad_(False)
    loaded = loaded_config.build().requires_grad_(False)
    loaded.load_state_dict(tokenizer.state_dict())
    first: ImageTokenizer = tokenizer
    second: ImageTokenizer = loaded
    images = torch.rand(2, 3, 8, 12) * 2 - 1
    tokens = first.encode(images)
    assert tokens.shape == (2, 8 // first.factor, 12 // first.factor)
    assert torch.equal(second.encode(images), tokens)
    assert torch.equal(second.decode(tokens), first.decode(tokens))
    assert torch.equal(second.code_vectors(), first.code_vectors())
    assert len(first.code_vectors()) == first.codes


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.kind)
def test_weights_have_one_dtype(config: TokenizerConfig) -> None:
    assert {parameter.dtype for parameter in config.build().parameters()} == {torch.float32}
