from typing import Any

import pytest
import torch
from pydantic import TypeAdapter

from vqd_scale.tokenizers.base import ImageTokenizer
from vqd_scale.tokenizers.fsq import FSQConfig
from vqd_scale.tokenizers.registry import ReducedConfig, TokenizerConfig, build_tokenizer
from vqd_scale.tokenizers.taming import TamingGumbelConfig, TamingVQConfig
from vqd_scale.tokenizers.vqgan import VQGANConfig

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
def test_every_kind_is_a_tokenizer_and_survives_its_json_and_state(config: TokenizerConfig) -> None:
    read: TokenizerConfig = TypeAdapter(TokenizerConfig).validate_json(config.model_dump_json())
    assert read == config
    torch.manual_seed(0)
    made = build_tokenizer(config).requires_grad_(False)
    loaded = build_tokenizer(read).requires_grad_(False)
    loaded.load_state_dict(made.state_dict())
    first: ImageTokenizer = made
    second: ImageTokenizer = loaded
    images = torch.rand(2, 3, 8, 12) * 2 - 1
    tokens = first.encode(images)
    assert tokens.shape == (2, 8 // first.factor, 12 // first.factor)
    assert torch.equal(second.encode(images), tokens)
    assert torch.equal(second.decode(tokens), first.decode(tokens))
    assert torch.equal(second.code_vectors(), first.code_vectors())
    assert len(first.code_vectors()) == first.codes


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.kind)
def test_trap_29_all_weights_have_one_dtype(config: TokenizerConfig) -> None:
    assert {parameter.dtype for parameter in build_tokenizer(config).parameters()} == {torch.float32}
