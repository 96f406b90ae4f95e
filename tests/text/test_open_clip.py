"""Published text towers, on small models registered with open_clip, with transformers as the oracle."""

import json
from pathlib import Path
from typing import Any

import open_clip
import open_clip.pretrained
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPVisionConfig
from transformers.models.clip.configuration_clip import CLIPConfig

from vqd_scale.core.errors import UserError
from vqd_scale.text.clip import TextEncoder
from vqd_scale.text.config import Pretrained, Tower
from vqd_scale.text.weights import from_transformers, to_transformers

WIDTH, HEADS, LAYERS = 32, 2, 2
CAPTIONS = ["a red circle", "", "two Words " * 60]


@pytest.fixture(scope="module", autouse=True)
def small_models(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("models")
    text = {"context_length": 77, "vocab_size": 49408, "width": WIDTH, "heads": HEADS, "layers": LAYERS}
    shapes = {
        "small-quickgelu": ({"quick_gelu": True}, {}),
        "small": ({}, {}),
        "small-bidirectional": ({}, {"no_causal_mask": True}),
        "small-vocabulary": ({"quick_gelu": True}, {"vocab_size": 32000}),
    }
    vision = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16}
    for name, (model, text_settings) in shapes.items():
        described = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": {**text, **text_settings}, **model}
        (folder / f"{name}.json").write_text(json.dumps(described))
    open_clip.add_model_config(folder)


@pytest.fixture(scope="module")
def clip() -> nn.Module:
    """Build open_clip's full model with random weights, including norms."""
    torch.manual_seed(0)
    model = open_clip.create_model("small-quickgelu", pretrained=None)
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    return model.requires_grad_(False)


def oracle(tower: dict[str, Tensor], heads: int = HEADS) -> CLIPTextModel:
    layers = len({name.split(".")[2] for name in tower if name.startswith("transformer.resblocks.")})
    width = tower["token_embedding.weight"].shape[1]
    config = CLIPTextConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        hidden_act="quick_gelu",
        eos_token_id=49407,
    )
    model = CLIPTextModel(config).eval().requires_grad_(False)
    transformers_weights = to_transformers(tower)
    has_prefix = any(name.startswith("text_model.") for name in model.state_dict())
    model.load_state_dict(
        transformers_weights
        if has_prefix
        else {name.removeprefix("text_model."): value for name, value in transformers_weights.items()}
    )
    return model


def assert_equal_to_transformers(encoder: TextEncoder, tower: dict[str, Tensor], heads: int) -> None:
    ids = torch.from_numpy(encoder.tokenizer(CAPTIONS))
    assert ids.shape == (3, 77)
    assert ids[2, -1] == 49407
    expected = oracle(tower, heads)(input_ids=ids).last_hidden_state
    expected = expected / expected.norm(dim=-1, keepdim=True)
    # Without the learned null condition, an empty caption is a caption like any other.
    features = encoder(ids, torch.zeros(3, dtype=torch.bool))
    torch.testing.assert_close(features, expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(features.norm(dim=-1), torch.ones(3, 77), atol=1e-5, rtol=0)


def test_features_equal_transformers(clip: nn.Module, tmp_path: Path) -> None:
    save_file(clip.state_dict(), tmp_path / "clip.safetensors")
    config = Pretrained(
        model="small-quickgelu", pretrained=str(tmp_path / "clip.safetensors"), null_condition="empty"
    )
    encoder = TextEncoder(config)
    tower = {name: value for name, value in clip.state_dict().items() if name in tower_names()}
    assert_equal_to_transformers(encoder, tower, HEADS)


@pytest.mark.long
def test_features_equal_transformers_at_full_size() -> None:
    torch.manual_seed(0)
    encoder = TextEncoder(Tower(null_condition="empty")).requires_grad_(False)
    assert sum(parameter.numel() for parameter in encoder.tower.parameters()) == 63_165_952
    assert_equal_to_transformers(encoder, encoder.tower.state_dict(), 8)


def tower_names() -> set[str]:
    return set(
        TextEncoder(Pretrained(model="small-quickgelu", pretrained=None, train=True)).tower.state_dict()
    )


def test_transformers_name_round_trip_is_bit_equal() -> None:
    state = TextEncoder(Tower(width=16, heads=2, layers=3, bpe_merges=0)).tower.state_dict()
    back = from_transformers(to_transformers(state))
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], value) for name, value in state.items())


def test_unknown_and_missing_names_are_listed() -> None:
    state = TextEncoder(Tower(width=16, heads=2, layers=3, bpe_merges=0)).tower.state_dict()
    transformers_weights = to_transformers(state)
    del state["transformer.resblocks.1.mlp.c_fc.bias"]
    with pytest.raises(
        UserError, match=r"unknown more; missing transformer\.resblocks\.1\.mlp\.c_fc\.bias\."
    ):
        to_transformers(state | {"more": torch.zeros(1)})
    del transformers_weights["text_model.encoder.layers.2.self_attn.k_proj.bias"]
    with pytest.raises(
        UserError, match=r"unknown none; missing encoder\.layers\.2\.self_attn\.k_proj\.bias\."
    ):
        from_transformers(transformers_weights)
    with pytest.raises(UserError, match=r"missing .*final_layer_norm\.bias"):
        from_transformers({})


def loaded(pretrained: Path | str, model: str = "small-quickgelu", *, train: bool = True) -> TextEncoder:
    return TextEncoder(Pretrained(model=model, pretrained=str(pretrained), train=train))


def transformers_clip(tower: dict[str, Tensor], folder: Path) -> None:
    """Return the state of a full CLIPModel with this text tower, as transformers saves it."""
    torch.manual_seed(0)
    text = oracle(tower)
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=32
    )
    config = CLIPConfig(text_config=text.config.to_dict(), vision_config=vision.to_dict(), projection_dim=16)
    model = CLIPModel(config)
    model.text_model.load_state_dict(
        {name.removeprefix("text_model."): value for name, value in text.state_dict().items()}
    )
    model.save_pretrained(folder)


def test_weights_load_from_every_file_format(clip: nn.Module, tmp_path: Path) -> None:
    clip_weights = clip.state_dict()
    tower = {name: value for name, value in clip_weights.items() if name in tower_names()}
    save_file(clip_weights, tmp_path / "whole.safetensors")
    save_file(tower, tmp_path / "tower.safetensors")
    torch.save(tower, tmp_path / "openai.bin")
    torch.save(
        {"state_dict": {f"module.{name}": v for name, v in clip_weights.items()}}, tmp_path / "trained.pt"
    )
    custom = {f"text.{name}": value for name, value in tower.items()}
    torch.save(custom | {"visual.conv1.weight": torch.zeros(1)}, tmp_path / "custom.pt")
    save_file(to_transformers(tower), tmp_path / "text.safetensors")
    oracle(tower).save_pretrained(tmp_path / "text")
    transformers_clip(tower, tmp_path / "clip")
    files = [
        *("whole.safetensors", "tower.safetensors", "openai.bin", "trained.pt", "custom.pt"),
        *("text.safetensors", "text/model.safetensors", "clip/model.safetensors"),
    ]
    for file in files:
        tower_weights = loaded(tmp_path / file).tower.state_dict()
        assert all(torch.equal(tower_weights[name], value) for name, value in tower.items()), file


def test_tag_is_downloaded_by_open_clip(
    clip: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file(clip.state_dict(), tmp_path / "downloaded.safetensors")
    tags = {"openai": {"url": "", "quick_gelu": True}, "laion": {"url": ""}}
    monkeypatch.setattr(
        open_clip.pretrained,
        "_PRETRAINED",
        {"small-quickgelu": tags, "small": tags, "small-vocabulary": tags},
    )

    def downloaded(_: object) -> str:
        return str(tmp_path / "downloaded.safetensors")

    monkeypatch.setattr(open_clip.pretrained, "download_pretrained", downloaded)
    tower_weights = loaded("openai").tower.state_dict()
    assert torch.equal(tower_weights["ln_final.weight"], clip.state_dict()["ln_final.weight"])
    with pytest.raises(
        UserError, match="were trained with QuickGELU, but 'small' has GELU; take 'small-quick"
    ):
        loaded("openai", "small")
    with pytest.raises(
        UserError, match="were trained with GELU, but 'small-quickgelu' has QuickGELU; take 'sm"
    ):
        loaded("laion")
    with pytest.raises(UserError, match=r"has no weights 'laion2b'; give one of its tags \(openai, laion\)"):
        loaded("laion2b")
    with pytest.raises(UserError, match="has 32000 token ids, not CLIP's 49408"):
        loaded("openai", "small-vocabulary")

    def offline(_: object) -> str:
        raise FileNotFoundError("Failed to download file.\nCheck your connection.")

    monkeypatch.setattr(open_clip.pretrained, "download_pretrained", offline)
    with pytest.raises(
        UserError, match=r"cannot be loaded \(Failed to download file. Check your connection.\)"
    ):
        loaded("openai")


def test_openai_weights_require_quick_gelu() -> None:
    with pytest.raises(UserError, match="QuickGELU, but 'ViT-B-32' has GELU; take 'ViT-B-32-quickgelu'"):
        TextEncoder(Pretrained(model="ViT-B-32", pretrained="openai"))


def test_recorded_activation_must_match(clip: nn.Module, tmp_path: Path) -> None:
    tower = {name: value for name, value in clip.state_dict().items() if name in tower_names()}
    extra_entries = {name: torch.tensor(1) for name in ("input_resolution", "context_length", "vocab_size")}
    save_file(tower | extra_entries, tmp_path / "converted.safetensors")
    loaded(tmp_path / "converted.safetensors")
    with pytest.raises(UserError, match=r"OpenAI's weights in .* were trained with QuickGELU"):
        loaded(tmp_path / "converted.safetensors", "small")
    oracle(tower).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"model\.safetensors were trained with QuickGELU"):
        loaded(tmp_path / "model.safetensors", "small")
    described = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(described | {"hidden_act": "gelu"}))
    with pytest.raises(UserError, match=r"model\.safetensors were trained with GELU"):
        loaded(tmp_path / "model.safetensors")


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace")
def test_mismatched_files_raise_user_error(clip: nn.Module, tmp_path: Path) -> None:
    tower = {name: value for name, value in clip.state_dict().items() if name in tower_names()}
    wider = TextEncoder(Tower(width=64, heads=2, layers=LAYERS)).tower.state_dict()
    save_file(wider, tmp_path / "wider.safetensors")
    with pytest.raises(
        UserError, match=r"contains a text tower of another size than .* token_embedding.weight"
    ):
        loaded(tmp_path / "wider.safetensors")
    del tower["ln_final.bias"]
    save_file(tower, tmp_path / "less.safetensors")
    with pytest.raises(UserError, match=r"unknown none; missing ln_final\.bias\."):
        loaded(tmp_path / "less.safetensors")
    with pytest.raises(UserError, match="no such file"):
        loaded("/nowhere/weights.pt")
    program: Any = torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2))
    program.save(str(tmp_path / "ViT-B-32.pt"))
    with pytest.raises(UserError, match="is a TorchScript program"):
        loaded(tmp_path / "ViT-B-32.pt")


def test_unknown_models_raise_user_error() -> None:
    with pytest.raises(UserError, match="knows no model"):
        TextEncoder(Pretrained(model="ViT-Z-99"))
    with pytest.raises(UserError, match=r"is not CLIP's \(it differs in no_causal_mask\)"):
        TextEncoder(Pretrained(model="small-bidirectional"))
    with pytest.raises(ValidationError, match="a frozen tower needs weights"):
        Pretrained(pretrained=None)


def test_frozen_tower_is_outside_and_trained_tower_inside(clip: nn.Module, tmp_path: Path) -> None:
    save_file(clip.state_dict(), tmp_path / "clip.safetensors")
    frozen = loaded(tmp_path / "clip.safetensors", train=False)
    trained = loaded(tmp_path / "clip.safetensors", train=True)
    ids = torch.from_numpy(frozen.tokenizer(CAPTIONS))
    dropped = torch.tensor([False, False, True])
    frozen.null = trained.null
    torch.testing.assert_close(frozen(ids, dropped), trained(ids, dropped))
    assert list(TextEncoder.state_dict(frozen)) == ["null"]
    assert [name for name, _ in frozen.named_parameters()] == ["null"]
    assert not [name for name, parameter in trained.named_parameters() if not parameter.requires_grad]
    assert {name.removeprefix("tower.") for name in trained.state_dict()} - {"null"} == tower_names()
    trained(ids, dropped).square().sum().backward()
    assert trained.tower.ln_final.weight.grad is not None
    frozen(ids, dropped).sum().backward()
    frozen.null = None
    assert not frozen(ids, dropped).requires_grad


def test_bundle_of_a_trained_tower_needs_no_download() -> None:
    config = Pretrained(model="small-quickgelu", pretrained="openai", train=True)
    assert config.without_weights() == config.model_copy(update={"pretrained": None})
    frozen = config.model_copy(update={"train": False})
    assert frozen.without_weights() == frozen
    TextEncoder(config.without_weights())


def test_saved_clip_has_expected_names(clip: nn.Module, tmp_path: Path) -> None:
    """Compare the names that transformers saves with those of `to_transformers`."""
    tower = {name: value for name, value in clip.state_dict().items() if name in tower_names()}
    oracle(tower).save_pretrained(tmp_path)
    saved_weights = load_file(tmp_path / "model.safetensors")
    expected_weights = to_transformers(tower)
    assert saved_weights.keys() in (
        expected_weights.keys(),
        {name.removeprefix("text_model.") for name in expected_weights},
    )
