"""The network against diffusers' independent implementation, under the published weight names."""

import importlib
import re

import pytest
import torch
from torch import Tensor, nn

from vqd_scale.nn.config import DenoiserConfig, TextCondition
from vqd_scale.nn.denoiser import Denoiser

CODES, SIDE, STEPS, TEXT = 23, 4, 10, 12
CONFIG = DenoiserConfig(width=24, layers=3, heads=2, condition=TextCondition(width=TEXT), init_std=0.2)

# Package names to diffusers' names; everything after a stem is unchanged.
STEMS = {
    "content_emb.emb": "latent_image_embedding.emb",
    "content_emb.height_emb": "latent_image_embedding.height_emb",
    "content_emb.width_emb": "latent_image_embedding.width_emb",
    "blocks.N.ln1": "transformer_blocks.N.norm1",
    "blocks.N.ln1_1": "transformer_blocks.N.norm2",
    "blocks.N.ln2": "transformer_blocks.N.norm3",
    "blocks.N.mlp.0": "transformer_blocks.N.ff.net.0.proj",
    "blocks.N.mlp.2": "transformer_blocks.N.ff.net.2",
    "norm": "norm_out",
    "head": "out",
} | {
    f"blocks.N.{package_layer}.{part}": f"transformer_blocks.N.{package_layer}.{diffusers_part}"
    for package_layer in ("attn1", "attn2")
    for part, diffusers_part in {"query": "to_q", "key": "to_k", "value": "to_v", "proj": "to_out.0"}.items()
}


def diffusers_name(package_name: str) -> str:
    block = re.search(r"blocks\.(\d+)\.", package_name)
    number = block.group(1) if block else ""
    stem, suffix = package_name.replace(f"blocks.{number}.", "blocks.N."), []
    while stem not in STEMS:
        stem, _, last = stem.rpartition(".")
        suffix.insert(0, last)
    return ".".join([STEMS[stem].replace(".N.", f".{number}."), *suffix])


@pytest.fixture(scope="module")
def network_pair() -> tuple[Denoiser, nn.Module]:
    """Return both networks with equal random weights."""
    # The import takes seconds, and only these tests need it.
    transformers = importlib.import_module("diffusers.models.transformers.transformer_2d")
    torch.manual_seed(0)
    package_denoiser = Denoiser(CONFIG, CODES, (SIDE, SIDE), STEPS)
    with torch.no_grad():
        for parameter in package_denoiser.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    diffusers_transformer = transformers.Transformer2DModel(
        num_attention_heads=CONFIG.heads,
        attention_head_dim=CONFIG.width // CONFIG.heads,
        num_layers=CONFIG.layers,
        cross_attention_dim=TEXT,
        attention_bias=True,
        sample_size=SIDE,
        num_vector_embeds=CODES + 1,
        num_embeds_ada_norm=STEPS,
        activation_fn="geglu-approximate",
        norm_type="ada_norm",
    )
    diffusers_transformer.load_state_dict(
        {diffusers_name(name): value for name, value in package_denoiser.state_dict().items()}
    )
    return package_denoiser, diffusers_transformer


def test_forward_equals_diffusers(network_pair: tuple[Denoiser, nn.Module]) -> None:
    package_denoiser, diffusers_transformer = network_pair
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, CODES + 1, (2, SIDE * SIDE), generator=generator)
    text = torch.randn(2, 5, TEXT, generator=generator)
    worst = 0.0
    for t in (0, 4, STEPS - 1):
        with torch.no_grad():
            logits = package_denoiser(tokens, torch.full((2,), t), text)
            log_p: Tensor = diffusers_transformer(
                tokens, encoder_hidden_states=text, timestep=torch.tensor(t)
            ).sample
        package_log_p = logits.double().log_softmax(dim=-1).transpose(1, 2)
        worst = max(worst, float((package_log_p - log_p).abs().max()))
    assert worst <= 1e-5


def test_names_and_shapes_equal_published_weights() -> None:
    with torch.device("meta"):
        denoiser = Denoiser(DenoiserConfig(size="L", layers=1), 4096, (32, 32), steps=100)
    head = {"norm": "to_logits.0", "head": "to_logits.1"}
    package_shapes = {
        ".".join([head.get(stem := name.split(".")[0], stem), *name.split(".")[1:]]): tuple(value.shape)
        for name, value in denoiser.state_dict().items()
    }
    d, text = 1408, 512
    linear = {"weight": (d, d), "bias": (d,)}
    by_time = {"emb.weight": (100, d), "linear.weight": (2 * d, d), "linear.bias": (2 * d,)}
    expected = {
        "content_emb.emb.weight": (4097, d),
        "content_emb.height_emb.weight": (32, d),
        "content_emb.width_emb.weight": (32, d),
        **{f"blocks.0.ln1.{name}": shape for name, shape in by_time.items()},
        **{f"blocks.0.ln1_1.{name}": shape for name, shape in by_time.items()},
        **{
            f"blocks.0.{attention}.{part}.{name}": shape
            for attention in ("attn1", "attn2")
            for part in ("query", "key", "value", "proj")
            for name, shape in linear.items()
        },
        "blocks.0.attn2.key.weight": (d, text),
        "blocks.0.attn2.value.weight": (d, text),
        "blocks.0.ln2.weight": (d,),
        "blocks.0.ln2.bias": (d,),
        "blocks.0.mlp.0.weight": (4 * d, d),
        "blocks.0.mlp.0.bias": (4 * d,),
        "blocks.0.mlp.2.weight": (d, 4 * d),
        "blocks.0.mlp.2.bias": (d,),
        "to_logits.0.weight": (d,),
        "to_logits.0.bias": (d,),
        "to_logits.1.weight": (4096, d),
        "to_logits.1.bias": (4096,),
    }
    assert package_shapes == expected
