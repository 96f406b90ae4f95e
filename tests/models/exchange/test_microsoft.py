"""Conversion of checkpoints in Microsoft's layout."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.models.exchange import microsoft_files as files
from tests.models.exchange.microsoft_files import GUMBEL_SLIM, HEADS, ITHQ_SLIM, VQ_SLIM, Kind
from tests.tokenizers.plain_implementation import decoded, vectors_of
from vqd_scale.core.errors import UserError
from vqd_scale.models.bundle import load_bundle
from vqd_scale.models.exchange.conversion import ModelPlan, TokenizerPlan
from vqd_scale.models.exchange.microsoft import MicrosoftOptions, plan_microsoft
from vqd_scale.models.pipeline import TextToImage
from vqd_scale.tokenizers.codebook.reduction import Reduced
from vqd_scale.tokenizers.config import ReducedConfig

OPTIONS = MicrosoftOptions(heads=HEADS)


def converted(path: Path, out: Path, options: MicrosoftOptions = OPTIONS) -> TextToImage:
    plan_microsoft(path, options).save(out)
    return TextToImage.load(out, device="cpu")


def test_every_ema_weight_is_imported_bit_equal(tmp_path: Path) -> None:
    checkpoint = files.checkpoint_of(Kind(), ITHQ_SLIM)
    plan_microsoft(files.write(tmp_path, checkpoint), OPTIONS).save(tmp_path / "bundle")
    model = load_bundle(tmp_path / "bundle").model.state_dict()
    average = checkpoint["ema"]
    pairs = {
        "denoiser.content_emb.emb.weight": "transformer.content_emb.emb.weight",
        "denoiser.content_emb.width_emb.weight": "transformer.content_emb.width_emb.weight",
        "denoiser.blocks.1.ln1.emb.weight": "transformer.blocks.1.ln1.emb.weight",
        "denoiser.blocks.0.ln1_1.linear.bias": "transformer.blocks.0.ln1_1.linear.bias",
        "denoiser.blocks.0.attn2.value.weight": "transformer.blocks.0.attn2.value.weight",
        "denoiser.blocks.1.mlp.2.bias": "transformer.blocks.1.mlp.2.bias",
        "denoiser.norm.weight": "transformer.to_logits.0.weight",
        "denoiser.head.weight": "transformer.to_logits.1.weight",
        "text.tower.transformer.resblocks.1.attn.in_proj_weight": (
            "condition_emb.transformer.resblocks.1.attn.in_proj_weight"
        ),
        "text.tower.positional_embedding": "condition_emb.positional_embedding",
    }
    for package_name, original_name in pairs.items():
        assert torch.equal(model[package_name], average[original_name]), package_name
        assert not torch.equal(model[package_name], checkpoint["model"][f"transformer.{original_name}"]), (
            package_name
        )
    assert model["text.null"].dtype == torch.float32
    assert torch.equal(model["text.null"], average["empty_text_embed"].float())
    # Complete: as many numbers as the checkpoint, minus the dropped names.
    dropped = ("mask", "log_", "Lt_", "text_projection")
    original_name = sum(
        value.numel() for name, value in average.items() if not any(part in name for part in dropped)
    )
    assert sum(value.numel() for value in model.values()) == original_name


@pytest.mark.parametrize("codec", [ITHQ_SLIM, VQ_SLIM], ids=["ithq", "vq"])
def test_tokens_decode_to_pixels_of_plain_implementation(tmp_path: Path, codec: files.Published) -> None:
    checkpoint = files.checkpoint_of(Kind(), codec)
    pipe = converted(files.write(tmp_path, checkpoint), tmp_path / "bundle")
    tokens = torch.arange(16).remainder(9).view(1, 4, 4)
    state = files.codec_state(codec)
    pixels = decoded(state, codec, vectors_of(state, tokens))
    torch.testing.assert_close(pipe.bundle.tokenizer.decode(tokens), pixels, atol=1e-5, rtol=0)
    assert pipe("a red circle", steps=3, progress=False)[0].size == (8, 8)


def test_reduced_codebook_requires_its_map(tmp_path: Path) -> None:
    path = files.write(tmp_path, files.checkpoint_of(Kind(codes=5), GUMBEL_SLIM))
    with pytest.raises(UserError, match=r"5 codes, but the tokenizer 13; give the map .* --reduction"):
        plan_microsoft(path, OPTIONS)
    torch.save(torch.tensor([0, 1, 0, 0, 2, 0, 3, 0, 0, 0, 0, 0, 0]), tmp_path / "other.pt")
    with pytest.raises(UserError, match=r"leads to the ids 0\.\.3, but the model has 5 codes"):
        plan_microsoft(path, MicrosoftOptions(heads=HEADS, reduction=tmp_path / "other.pt"))
    map = torch.tensor([0, 1, 0, 0, 2, 0, 3, 0, 0, 0, 0, 4, 0])
    torch.save(map, tmp_path / "map.pt")
    pipe = converted(path, tmp_path / "bundle", MicrosoftOptions(heads=HEADS, reduction=tmp_path / "map.pt"))
    tokens = torch.tensor([[[0, 1], [2, 3]], [[4, 4], [0, 2]]])
    full = torch.tensor([0, 1, 4, 6, 11])[tokens]
    state = files.codec_state(GUMBEL_SLIM)
    assert isinstance(pipe.bundle.tokenizer, Reduced)
    pixels = decoded(state, GUMBEL_SLIM, vectors_of(state, full))
    torch.testing.assert_close(pipe.bundle.tokenizer.decode(tokens), pixels, atol=1e-5, rtol=0)


@pytest.mark.parametrize("condition", ["class", "none"])
def test_class_and_unconditional_models_are_detected_from_weights(tmp_path: Path, condition: Any) -> None:
    kind = Kind(condition=condition, feed_forward="conv", side=2, positions=4)
    path = files.write(tmp_path, files.checkpoint_of(kind, VQ_SLIM))
    options = MicrosoftOptions(heads=HEADS, grid=(2, 2))
    pipe = converted(path, tmp_path / "bundle", options)
    config = pipe.bundle.config
    assert config.text is None
    assert config.denoiser.condition.kind == condition
    # The published models place 16x16 tokens in position tables of 32x32.
    assert config.denoiser.kind == "transformer"
    assert config.denoiser.position_grid == (4, 4)
    prompts = [0, 4, 5] if condition == "class" else ["", "", ""]
    images = pipe(prompts, steps=3, progress=False)
    assert images.tensor.shape == (3, 3, 4, 4)


def test_grid_defaults_to_256_pixels_without_attention_mask(tmp_path: Path) -> None:
    kind = Kind(condition="none", feed_forward="conv", positions=128)
    plan = plan_microsoft(files.write(tmp_path, files.checkpoint_of(kind, VQ_SLIM)), OPTIONS)
    assert isinstance(plan, ModelPlan)
    assert plan.config.grid == (128, 128)


def test_null_condition_is_selectable(tmp_path: Path) -> None:
    path = files.write(tmp_path, files.checkpoint_of(Kind(), ITHQ_SLIM))
    empty = converted(path, tmp_path / "a", MicrosoftOptions(heads=HEADS, null_condition="empty"))
    assert empty.bundle.model.text.null is None
    older = files.write(tmp_path, files.checkpoint_of(Kind(), ITHQ_SLIM, learned=False), "ithq.pth")
    assert converted(older, tmp_path / "b").bundle.model.text.null is None


def test_weights_without_ema_are_used(tmp_path: Path) -> None:
    checkpoint = files.checkpoint_of(Kind(), ITHQ_SLIM)
    del checkpoint["ema"]
    model = converted(files.write(tmp_path, checkpoint), tmp_path / "bundle").bundle.model.state_dict()
    last = checkpoint["model"]["transformer.transformer.to_logits.1.weight"]
    assert torch.equal(model["denoiser.head.weight"], last)


def test_checkpoint_without_tokenizer_takes_a_bundle(tmp_path: Path) -> None:
    checkpoint = files.checkpoint_of(Kind(), ITHQ_SLIM)
    average = {"ema": checkpoint["ema"]}
    path = files.write(tmp_path, average, "average.pth")
    with pytest.raises(UserError, match="contains no tokenizer; give a tokenizer bundle with --tokenizer"):
        plan_microsoft(path, OPTIONS)
    alone = files.write(tmp_path, {"model": files.codec_state(ITHQ_SLIM)}, "ithq_vqvae.pth")
    plan = plan_microsoft(alone, OPTIONS)
    assert isinstance(plan, TokenizerPlan)
    plan.save(tmp_path / "tokenizer")
    with pytest.raises(UserError, match="not both"):
        plan_microsoft(
            path, MicrosoftOptions(tokenizer=tmp_path / "tokenizer", reduction=tmp_path / "map.pt")
        )
    pipe = converted(path, tmp_path / "a", MicrosoftOptions(heads=HEADS, tokenizer=tmp_path / "tokenizer"))
    with_tokenizer = converted(files.write(tmp_path, checkpoint), tmp_path / "b")
    assert torch.equal(
        pipe(["x"], steps=2, progress=False).tensor, with_tokenizer(["x"], steps=2, progress=False).tensor
    )


def test_other_noise_schedule_is_refused(tmp_path: Path) -> None:
    checkpoint = files.checkpoint_of(Kind(), ITHQ_SLIM)
    checkpoint["ema"]["log_cumprod_ct"][:100] = torch.linspace(0.009, 0.9, 100).log()
    with pytest.raises(UserError, match=r"another schedule than the released one .log_cumprod_ct differs"):
        plan_microsoft(files.write(tmp_path, checkpoint), OPTIONS)


def test_missing_unknown_and_misshapen_weights_are_listed(tmp_path: Path) -> None:
    checkpoint = files.checkpoint_of(Kind(), ITHQ_SLIM)
    average = checkpoint["ema"]
    del average["transformer.blocks.1.attn1.key.bias"]
    average["transformer.blocks.0.surprise"] = torch.zeros(3)
    average["adapter.weight"] = torch.zeros(3)
    average["transformer.to_logits.1.bias"] = torch.zeros(10)
    plan = plan_microsoft(files.write(tmp_path, checkpoint), OPTIONS)
    expected = [
        "nothing found for model.denoiser.blocks.1.attn1.key.bias",
        "unknown transformer.blocks.0.surprise",
        "unknown adapter.weight",
        r"transformer.to_logits.1.bias has the shape \[10\], not \[9\]",
    ]
    with pytest.raises(UserError, match="4 weights do not fit: " + ".*".join(expected)):
        plan.save(tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()
    assert "unknown adapter.weight" in plan.exchange.lines()


def test_mapping_is_available_before_writing(tmp_path: Path) -> None:
    plan = plan_microsoft(files.write(tmp_path, files.checkpoint_of(Kind(), ITHQ_SLIM)), OPTIONS)
    lines = plan.exchange.lines()
    assert "transformer.to_logits.1.bias -> model.denoiser.head.bias [9]" in lines
    assert (
        "content_codec.dec.decoder.conv_in.weight -> tokenizer.decoder.conv_in.weight [64, 6, 3, 3]" in lines
    )
    assert "transformer.blocks.0.attn2.mask is dropped" in lines
    assert "Lt_history is dropped" in lines


def test_foreign_checkpoint_raises_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="contains neither 'ema' nor 'model'"):
        plan_microsoft(files.write(tmp_path, {"state_dict": {"w": torch.zeros(1)}}), OPTIONS)
    with pytest.raises(UserError, match=r"has no weight 'transformer.content_emb.emb.weight'"):
        plan_microsoft(files.write(tmp_path, {"ema": {"w": torch.zeros(1)}}), OPTIONS)


def test_reduced_tokenizer_is_recorded_in_bundle(tmp_path: Path) -> None:
    path = files.write(tmp_path, files.checkpoint_of(Kind(codes=3), GUMBEL_SLIM))
    torch.save(torch.tensor([0, 1, 2] + [0] * 10), tmp_path / "map.pt")
    plan = plan_microsoft(path, MicrosoftOptions(heads=HEADS, reduction=tmp_path / "map.pt"))
    assert isinstance(plan, ModelPlan)
    assert plan.tokenizer == ReducedConfig(codebook_size=3, full=GUMBEL_SLIM)
    assert "reduction map -> tokenizer.map [13]" in plan.exchange.lines()


def test_bare_state_dictionaries_and_safetensors_are_accepted(tmp_path: Path) -> None:
    checkpoint = files.checkpoint_of(Kind(), ITHQ_SLIM)
    last = checkpoint["model"]
    expected = plan_microsoft(files.write(tmp_path, {"model": last}), OPTIONS).exchange.weights()
    wrapped = {f"module.{name}": value for name, value in last.items()}
    save_file({name: value.clone() for name, value in last.items()}, tmp_path / "model.safetensors")
    for path in (
        files.write(tmp_path, last, "bare.pth"),
        files.write(tmp_path, {"model": wrapped}, "module.pth"),
        tmp_path / "model.safetensors",
    ):
        weights = plan_microsoft(path, OPTIONS).exchange.weights()
        assert weights.keys() == expected.keys()
        assert all(torch.equal(value, expected[name]) for name, value in weights.items())


def test_grid_that_is_not_square_is_inferred_or_asked_for(tmp_path: Path) -> None:
    checkpoint = files.checkpoint_of(Kind(), ITHQ_SLIM)
    average, side = checkpoint["ema"], Kind().side
    table = "transformer.content_emb.width_emb.weight"
    average[table] = average[table][:1].repeat(2 * side, 1)
    for name in list(average):
        if name.endswith("attn2.mask"):
            average[name] = torch.zeros(1, 1, 2 * side**2, 2 * side**2)
    plan = plan_microsoft(files.write(tmp_path, checkpoint), OPTIONS)
    assert isinstance(plan, ModelPlan)
    assert plan.config.grid == (side, 2 * side)
    average[table] = average[table][:1].repeat(4 * side, 1)
    path = files.write(tmp_path, checkpoint)
    with pytest.raises(
        UserError, match=rf"grid of its {2 * side**2} tokens is unclear.*Give --grid ROWS COLUMNS"
    ):
        plan_microsoft(path, OPTIONS)
    for name in list(average):
        if name.endswith("attn2.mask"):
            del average[name]
    path = files.write(tmp_path, checkpoint)
    with pytest.raises(UserError, match="grid of its unknown number of tokens is unclear"):
        plan_microsoft(path, OPTIONS)
    plan = plan_microsoft(path, MicrosoftOptions(heads=HEADS, grid=(side, 2 * side)))
    assert isinstance(plan, ModelPlan)
    assert plan.config.grid == (side, 2 * side)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"heads": 0}, "heads: given 0"),
        ({"heads": 7}, "not a multiple of heads 7"),
        ({"grid": (0, 0)}, "grid.0: given 0"),
    ],
)
def test_options_out_of_range_are_refused(tmp_path: Path, options: dict[str, Any], sentence: str) -> None:
    path = files.write(tmp_path, files.checkpoint_of(Kind(), ITHQ_SLIM))
    with pytest.raises(UserError, match=sentence):
        plan_microsoft(path, replace(MicrosoftOptions(heads=HEADS), **options))


@pytest.mark.parametrize("shape", [(), (0,), (0, 0), (3, 0), (1, 1, 1)])
@pytest.mark.parametrize(
    "name",
    [
        "transformer.content_emb.emb.weight",
        "transformer.content_emb.height_emb.weight",
        "transformer.blocks.0.attn2.key.weight",
        "transformer.blocks.0.mlp.0.weight",
        "condition_emb.token_embedding.weight",
        "condition_emb.positional_embedding",
        "log_at",
        "log_cumprod_at",
    ],
)
def test_weight_of_another_shape_is_refused(tmp_path: Path, name: str, shape: tuple[int, ...]) -> None:
    checkpoint = files.checkpoint_of(Kind(), ITHQ_SLIM)
    assert name in checkpoint["ema"]
    checkpoint["ema"][name] = torch.zeros(shape)
    with pytest.raises(UserError):
        plan_microsoft(files.write(tmp_path, checkpoint), OPTIONS).exchange.check()
