"""Conversion of checkpoints in taming-transformers' layout."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

from tests.models.exchange.microsoft_files import GUMBEL_SLIM, VQ_SLIM, codec_state
from tests.tokenizers.plain_implementation import Published, decoded, vectors_of
from vqd_scale.core.errors import UserError
from vqd_scale.models.bundle import load_tokenizer
from vqd_scale.models.exchange.autoencoders import plan_taming

TARGETS = {"taming_vq": "taming.models.vqgan.VQModel", "taming_gumbel": "taming.models.vqgan.GumbelVQ"}


def description_of(codec: Published) -> dict[str, Any]:
    """Return the contents of a published checkpoint's YAML file."""
    return {
        "model": {
            "base_learning_rate": 4.5e-6,
            "target": TARGETS[codec.kind],
            "params": {
                "embed_dim": codec.code_dim,
                "n_embed": codec.codebook_size,
                "ddconfig": {
                    "double_z": False,
                    "z_channels": codec.latent_channels,
                    "resolution": 64,
                    "in_channels": 3,
                    "out_ch": 3,
                    "ch": codec.channels,
                    "ch_mult": list(codec.channel_multipliers),
                    "num_res_blocks": codec.num_res_blocks,
                    "attn_resolutions": [64 // 2**level for level in codec.attention],
                    "dropout": 0.0,
                },
                "lossconfig": {"target": "taming.modules.losses.vqperceptual.DummyLoss"},
            },
        }
    }


def wrapped(description: dict[str, Any]) -> dict[str, Any]:
    """Return the description of a transformer with this first stage."""
    first = description["model"]
    target = "taming.models.cond_transformer.Net2NetTransformer"
    return {"model": {"target": target, "params": {"first_stage_config": first, "cond_stage_config": "none"}}}


def write_published(folder: Path, codec: Published, *, net2net: bool = False) -> tuple[Path, Path]:
    loss = {"loss.discriminator.main.0.weight": torch.zeros(2), "loss.logvar": torch.zeros(())}
    state: dict[str, Any] = codec_state(codec) | loss
    description = description_of(codec)
    if net2net:
        state = {f"first_stage_model.{name}": value for name, value in state.items()}
        state |= {"transformer.tok_emb.weight": torch.zeros(3, 2), "cond_stage_model.w": torch.zeros(1)}
        description = wrapped(description)
    torch.save({"epoch": 3, "global_step": 7, "state_dict": state}, folder / "last.ckpt")
    (folder / "model.yaml").write_text(yaml.safe_dump(description))
    return folder / "last.ckpt", folder / "model.yaml"


@pytest.mark.parametrize("net2net", [False, True])
@pytest.mark.parametrize("codec", [VQ_SLIM, GUMBEL_SLIM], ids=["vq", "gumbel"])
def test_tokens_decode_to_pixels_of_plain_implementation(
    tmp_path: Path, codec: Published, net2net: bool
) -> None:
    plan_taming(*write_published(tmp_path, codec, net2net=net2net)).save(tmp_path / "tokenizer")
    tokenizer = load_tokenizer(tmp_path / "tokenizer", torch.device("cpu"))
    assert tokenizer.config == codec
    state = codec_state(codec)
    assert tokenizer.state_dict().keys() == state.keys()
    tokens = torch.arange(32).remainder(codec.codebook_size).view(2, 4, 4)
    pixels = decoded(state, codec, vectors_of(state, tokens))
    torch.testing.assert_close(tokenizer.decode(tokens), pixels, atol=1e-5, rtol=0)


def test_mapping_lists_dropped_weights(tmp_path: Path) -> None:
    lines = plan_taming(*write_published(tmp_path, VQ_SLIM, net2net=True)).exchange.lines()
    assert "first_stage_model.quant_conv.bias -> quant_conv.bias [4]" in lines
    assert "first_stage_model.loss.logvar is dropped" in lines
    assert "transformer.tok_emb.weight is dropped" in lines
    assert not [line for line in lines if "unknown" in line or "nothing found" in line]


def test_weights_that_contradict_the_yaml_are_listed(tmp_path: Path) -> None:
    checkpoint, _ = write_published(tmp_path, VQ_SLIM)
    other_config = VQ_SLIM.model_copy(update={"codebook_size": 7, "num_res_blocks": 1})
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(description_of(other_config)))
    with pytest.raises(
        UserError, match=r"weights do not fit: .*unknown encoder\.down\.0\.block\.1"
    ) as raised:
        plan_taming(checkpoint, tmp_path / "other.yaml").save(tmp_path / "tokenizer")
    assert "last.ckpt" in str(raised.value)
    assert not (tmp_path / "tokenizer").exists()


def test_foreign_checkpoint_raises_user_error(tmp_path: Path) -> None:
    _, description = write_published(tmp_path, VQ_SLIM)
    torch.save({"model": {}}, tmp_path / "other.ckpt")
    with pytest.raises(UserError, match="holds no tensors"):
        plan_taming(tmp_path / "other.ckpt", description)


@pytest.mark.parametrize("form", ["bare", "module", "ema", "safetensors"])
def test_other_forms_of_a_state_dictionary_are_accepted(tmp_path: Path, form: str) -> None:
    path, description = write_published(tmp_path, VQ_SLIM)
    weights = torch.load(path, weights_only=False)["state_dict"]
    if form == "bare":
        torch.save(weights, path)
    elif form == "module":
        torch.save({"state_dict": {f"module.{name}": value for name, value in weights.items()}}, path)
    elif form == "ema":
        averages = {f"model_ema.{name.replace('.', '')}": value for name, value in weights.items()}
        torch.save({"state_dict": {name: value + 1 for name, value in weights.items()} | averages}, path)
    else:
        save_file(weights, path)
    plan = plan_taming(path, description)
    assert all(torch.equal(value, weights[name]) for name, value in plan.exchange.weights().items())


def test_weights_that_are_not_finite_are_not_converted(tmp_path: Path) -> None:
    path, description = write_published(tmp_path, VQ_SLIM)
    weights = torch.load(path, weights_only=False)["state_dict"]
    weights["quantize.embedding.weight"][0, 0] = torch.nan
    torch.save({"state_dict": weights}, path)
    with pytest.raises(UserError, match=r"'quantize\.embedding\.weight' has NaN or infinite values"):
        plan_taming(path, description).save(tmp_path / "tokenizer")
    assert not (tmp_path / "tokenizer").exists()
