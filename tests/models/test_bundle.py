import json
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import save_file

from tests.tiny_models import SHAPE
from vqd_scale.core.errors import UserError
from vqd_scale.diffusion.config import Paper
from vqd_scale.models.bundle import Model, load_bundle, save_bundle, save_tokenizer
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
