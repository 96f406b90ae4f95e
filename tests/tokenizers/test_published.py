"""Published tokenizers against a plain implementation, and under the names of other libraries."""

import re

import pytest
import torch
from diffusers.models.autoencoders.vq_model import VQModel

from tests.tokenizers.plain_implementation import (
    VARIANTS,
    Published,
    State,
    build,
    codes_of,
    decoded,
    encoded,
    names,
    vectors_of,
)
from vqd_scale.core.errors import UserError
from vqd_scale.tokenizers.config import FFHQ_F16, IMAGENET_F16, ITHQ, OPENIMAGES_GUMBEL_F8
from vqd_scale.tokenizers.weights import from_diffusers, from_taming, to_diffusers


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_tokens_and_pixels_equal_plain_implementation(config: Published) -> None:
    tokenizer = build(config)
    state = tokenizer.state_dict()
    images = torch.rand(2, 3, 2 * config.factor, 3 * config.factor) * 2 - 1
    z = encoded(state, config, images)
    torch.testing.assert_close(tokenizer.latents(images), z, atol=1e-5, rtol=0)
    tokens = tokenizer.encode(images)
    assert torch.equal(tokens, codes_of(state, z))
    assert tokens.unique().numel() > 1
    pixels = decoded(state, config, vectors_of(state, tokens))
    torch.testing.assert_close(tokenizer.decode(tokens), pixels, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("config", "quantize"),
    [
        (
            OPENIMAGES_GUMBEL_F8,
            {"proj.weight": (8192, 256, 1, 1), "proj.bias": (8192,), "embed.weight": (8192, 256)},
        ),
        (IMAGENET_F16, {"embedding.weight": (16384, 256)}),
        (FFHQ_F16, {"embedding.weight": (1024, 256)}),
        (ITHQ, {"embedding": (4096, 128), "cluster_size": (4096,), "embedding_avg": (4096, 128)}),
    ],
    ids=["gumbel f8", "imagenet f16", "ffhq f16", "ithq"],
)
def test_state_dictionaries_have_published_names_and_shapes(
    config: Published, quantize: dict[str, tuple[int, ...]]
) -> None:
    with torch.device("meta"):
        state = config.build().state_dict()
    assert set(state) == {*names(config), *(f"quantize.{name}" for name in quantize)}
    assert {name: tuple(state[f"quantize.{name}"].shape) for name in quantize} == quantize
    coarsest = config.channels * config.channel_multipliers[-1]
    assert state["encoder.mid.attn_1.q.weight"].shape == (coarsest, coarsest, 1, 1)
    assert state["encoder.conv_in.weight"].shape == (config.channels, 3, 3, 3)
    assert state["decoder.conv_out.weight"].shape == (3, config.channels, 3, 3)
    assert state["quant_conv.weight"].shape == (config.code_dim, 256, 1, 1)


def test_loss_weights_and_prefixes_of_checkpoints_are_removed() -> None:
    state = build(VARIANTS["vq f16"]).state_dict()
    loss = {"loss.discriminator.main.0.weight": torch.zeros(1)}
    unwrapped = from_taming({**state, **loss})
    inner = {f"first_stage_model.{name}": value for name, value in {**state, **loss}.items()}
    wrapped = from_taming({**inner, "transformer.pos_emb": torch.zeros(1)})
    for loaded_state in (unwrapped, wrapped):
        assert loaded_state.keys() == state.keys()
        assert all(loaded_state[name] is value for name, value in state.items())


# diffusers' VQModel.


def vq_model(config: Published) -> VQModel:
    attends = [level in config.attention for level in range(len(config.channel_multipliers))]
    return VQModel(
        block_out_channels=tuple(config.channels * multiplier for multiplier in config.channel_multipliers),
        layers_per_block=config.num_res_blocks,
        latent_channels=config.latent_channels or 0,
        vq_embed_dim=config.code_dim,
        num_vq_embeddings=config.codebook_size,
        down_block_types=tuple("AttnDownEncoderBlock2D" if one else "DownEncoderBlock2D" for one in attends),
        up_block_types=tuple("AttnUpDecoderBlock2D" if one else "UpDecoderBlock2D" for one in attends[::-1]),
        norm_num_groups=32,
    )


DIFFUSERS = {name: config for name, config in VARIANTS.items() if name != "gumbel f8"}


@pytest.mark.parametrize("config", DIFFUSERS.values(), ids=DIFFUSERS)
def test_forward_equals_diffusers_through_the_name_map(config: Published) -> None:
    tokenizer = build(config)
    diffusers_model = vq_model(config)
    diffusers_model.load_state_dict(to_diffusers(tokenizer.state_dict()))
    diffusers_model.requires_grad_(False)
    images = torch.rand(2, 3, 2 * config.factor, 3 * config.factor) * 2 - 1
    latents = diffusers_model.encode(images).latents
    torch.testing.assert_close(tokenizer.latents(images), latents, atol=1e-5, rtol=0)
    tokens = diffusers_model.quantize(latents)[2][2].view(2, 2, 3)
    assert torch.equal(tokenizer.encode(images), tokens)
    quantized = diffusers_model.quantize.get_codebook_entry(tokens.flatten(), (2, 2, 3, config.code_dim))
    pixels, _ = diffusers_model.decode(quantized, force_not_quantize=True, return_dict=False)
    torch.testing.assert_close(tokenizer.decode(tokens), pixels, atol=1e-5, rtol=0)


@pytest.mark.parametrize("config", DIFFUSERS.values(), ids=DIFFUSERS)
def test_diffusers_round_trip_is_bit_equal(config: Published) -> None:
    state = build(config).state_dict()
    back = from_diffusers(to_diffusers(state))
    statistics = ("quantize.cluster_size", "quantize.embedding_avg")
    expected_state = {name: value for name, value in state.items() if name not in statistics}
    if "quantize.embedding" in expected_state:
        expected_state["quantize.embedding.weight"] = expected_state.pop("quantize.embedding")
    assert back.keys() == expected_state.keys()
    assert all(torch.equal(back[name], value) for name, value in expected_state.items())


def test_coarsest_level_comes_first_in_diffusers() -> None:
    state = build(VARIANTS["ithq"]).state_dict()
    diffusers_state = to_diffusers(state)
    up = "decoder.up_blocks.0.resnets.0.conv1.weight"
    assert torch.equal(diffusers_state[up], state["decoder.up.3.block.0.conv1.weight"])
    assert diffusers_state["encoder.mid_block.attentions.0.to_q.weight"].ndim == 2


def test_former_attention_names_are_accepted() -> None:
    diffusers_state = to_diffusers(build(VARIANTS["ithq"]).state_dict())
    earlier = {"to_q.": "query.", "to_k.": "key.", "to_v.": "value.", "to_out.0.": "proj_attn."}
    renamed: State = {}
    for name, value in diffusers_state.items():
        new = next((name.replace(new, old) for new, old in earlier.items() if new in name), name)
        renamed[new] = value
    assert renamed.keys() != diffusers_state.keys()
    package_state = from_diffusers(diffusers_state)
    assert all(torch.equal(value, package_state[name]) for name, value in from_diffusers(renamed).items())


@pytest.mark.parametrize(
    "missing_name",
    [
        "decoder.up.3.attn.1.q.bias",
        "encoder.mid.block_2.conv1.weight",
        "encoder.down.1.block.0.nin_shortcut.weight",
        "quantize.embedding",
        "quant_conv.bias",
    ],
)
def test_unknown_and_missing_names_are_listed(missing_name: str) -> None:
    state = build(VARIANTS["ithq"]).state_dict()
    del state[missing_name]
    state["surprise"] = torch.zeros(1)
    with pytest.raises(UserError, match=f"unknown surprise; missing {re.escape(missing_name)}"):
        to_diffusers(state)


def test_unknown_and_missing_diffusers_names_are_listed() -> None:
    diffusers_state = to_diffusers(build(VARIANTS["ithq"]).state_dict())
    del diffusers_state["decoder.up_blocks.1.upsamplers.0.conv.bias"]
    with pytest.raises(UserError, match=r"missing decoder.up_blocks.1.upsamplers.0.conv.bias\."):
        from_diffusers(diffusers_state)
    with pytest.raises(
        UserError, match=r"missing decoder\.conv_in\.bias, decoder\.conv_in\.weight, .*, and 66 more"
    ):
        from_diffusers({})
