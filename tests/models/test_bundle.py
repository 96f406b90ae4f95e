import json
import resource
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.fuzz.harness import data_bytes
from tests.tiny_models import SHAPE, write_model
from vqd_scale.core.errors import UserError
from vqd_scale.core.nested import set_at
from vqd_scale.diffusion.config import Paper
from vqd_scale.models.bundle import Model, load_bundle, load_tokenizer, save_bundle, save_tokenizer
from vqd_scale.models.config import BundleConfig
from vqd_scale.nn.config import DenoiserConfig, TextCondition
from vqd_scale.text.clip import TextEncoder
from vqd_scale.text.config import Pretrained
from vqd_scale.tokenizers.vqgan import VQGAN


def published_tower(folder: Path) -> Pretrained:
    """A small open_clip model and a file of weights for it."""
    text = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    described = {"embed_dim": 8, "vision_cfg": {}, "text_cfg": text, "quick_gelu": True}
    (folder / "for-bundles-quickgelu.json").write_text(json.dumps(described))
    open_clip.add_model_config(folder / "for-bundles-quickgelu.json")
    shape = Pretrained(model="for-bundles-quickgelu", pretrained=None, train=True)
    save_file(TextEncoder(shape).tower.state_dict(), folder / "tower.safetensors")
    return shape.model_copy(update={"pretrained": str(folder / "tower.safetensors")})


SIZES: list[tuple[str, str, Any]] = [
    *(
        ("bundle/config.json", f"denoiser.{key}", size)
        for key in ("width", "layers", "heads", "feed_forward.mlp_ratio", "condition.width")
        for size in (100, 2**20, 10**9, 10**18)
    ),
    ("bundle/config.json", "denoiser.position_grid", [2**20, 2**20]),
    *(("bundle/config.json", "codebook_size", size) for size in (10**6, 10**9)),
    *(("bundle/config.json", "grid", [size, size]) for size in (0, 1000, 10**6)),
    *(("bundle/config.json", "diffusion.steps", size) for size in (50_000, 10**9)),
    *(
        ("bundle/config.json", f"text.{key}", size)
        for key in ("context_length", "width", "heads", "layers", "bpe_merges")
        for size in (100, 10**9)
    ),
    *(
        ("bundle/tokenizer/config.json", key, size)
        for key in (
            "channels",
            "num_res_blocks",
            "patch_size",
            "latent_channels",
            "codebook_size",
            "code_dim",
        )
        for size in (64, 1000, 2**20, 10**9)
    ),
    ("bundle/tokenizer/config.json", "channel_multipliers", [1, 10**9]),
    ("bundle/tokenizer/config.json", "channel_multipliers", [1024] * 16),
    ("bundle/tokenizer/config.json", "channel_multipliers", [1] * 10_000),
    ("bundle/tokenizer/config.json", "kind", "fsq"),
]


@pytest.mark.parametrize(("path", "key", "value"), SIZES, ids=lambda value: str(value)[:40])
def test_implausible_size_is_refused_before_memory_is_allocated(
    tmp_path: Path, path: str, key: str, value: object
) -> None:
    write_model(tmp_path)
    config = json.loads((tmp_path / path).read_text())
    set_at(config, key, value)
    (tmp_path / path).write_text(json.dumps(config))
    limits = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (data_bytes() + (1 << 28), limits[1]))
    try:
        with pytest.raises(UserError, match=r"config\.json"):
            load_bundle(tmp_path / "bundle")
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, limits)


@pytest.mark.parametrize("levels", [[8, 5, 5, 5], [1 << 10] * 16, [2] * 1000])
def test_implausible_levels_are_refused(tmp_path: Path, levels: list[int]) -> None:
    write_model(tmp_path)
    path = tmp_path / "tokenizer" / "config.json"
    path.write_text(json.dumps({"kind": "fsq", "channels": 8, "norm": "none", "levels": levels}))
    with pytest.raises(UserError, match=r"config\.json"):
        load_tokenizer(tmp_path / "tokenizer", torch.device("cpu"))


@pytest.mark.parametrize("part", ["bundle", "bundle/tokenizer"])
def test_weights_with_nan_or_of_integers_are_refused_on_loading(tmp_path: Path, part: str) -> None:
    write_model(tmp_path)
    path = tmp_path / part / "model.safetensors"
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    weights = load_file(path)
    name = next(name for name in weights if name.endswith("weight"))
    save_file({**weights, name: weights[name].char()}, path, metadata)
    with pytest.raises(UserError, match=f"do not fit their config.json .*'{name}' for one"):
        load_bundle(tmp_path / "bundle")
    weights[name].view(-1)[-1] = torch.nan
    save_file(weights, path, metadata)
    with pytest.raises(UserError, match=f"the weight '{name}' has NaN or infinite values"):
        load_bundle(tmp_path / "bundle")


@pytest.mark.parametrize("path", ["bundle/config.json", "bundle/tokenizer/config.json"])
@pytest.mark.parametrize("content", ["[]", "null", "5", '"text"', "[" * 5000, "{"])
def test_configuration_of_another_shape_is_refused(tmp_path: Path, path: str, content: str) -> None:
    write_model(tmp_path)
    (tmp_path / path).write_text(content)
    with pytest.raises(UserError, match=r"config\.json"):
        load_bundle(tmp_path / "bundle")


@pytest.mark.parametrize("model", ["hf-hub:owner/name", "local-dir:/etc", "hf-hub:timm/ViT-B-16-SigLIP"])
def test_text_model_of_a_bundle_is_a_name_not_an_address(
    tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def opened(*arguments: object, **keywords: object) -> None:
        raise AssertionError("open_clip was asked for an address")

    monkeypatch.setattr(open_clip, "get_model_config", opened)
    write_model(tmp_path)
    path = tmp_path / "bundle" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "text": {"kind": "open_clip", "model": model}}))
    with pytest.raises(UserError, match=f"open_clip knows no model '{model}'"):
        load_bundle(tmp_path / "bundle")


@pytest.mark.parametrize("train", [True, False])
def test_bundle_stores_trained_tower_and_names_frozen_tower(tmp_path: Path, train: bool) -> None:
    torch.manual_seed(0)
    config = BundleConfig(
        codebook_size=9,
        grid=(2, 2),
        denoiser=DenoiserConfig(width=16, layers=1, heads=2, condition=TextCondition(width=16)),
        text=published_tower(tmp_path).model_copy(update={"train": train}),
        diffusion=Paper(steps=10),
    )
    model = Model(config)
    save_tokenizer(tmp_path / "tokenizer", SHAPE, VQGAN(SHAPE).state_dict())
    save_bundle(tmp_path / "bundle", config, model.state_dict(), tmp_path / "tokenizer")
    ids, is_dropped = torch.from_numpy(model.text.tokenizer(["a red circle"])), torch.tensor([False])
    expected = model.text(ids, is_dropped)
    assert torch.equal(load_bundle(tmp_path / "bundle").model.text(ids, is_dropped), expected)
    (tmp_path / "tower.safetensors").unlink()
    if train:
        assert torch.equal(load_bundle(tmp_path / "bundle").model.text(ids, is_dropped), expected)
    else:
        with pytest.raises(UserError, match="no such file"):
            load_bundle(tmp_path / "bundle")
