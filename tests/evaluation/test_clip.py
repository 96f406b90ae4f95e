import json
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.evaluation.test_evaluate import protocol, scored
from vqd_scale.core.atomic_io import sha256_of
from vqd_scale.core.errors import UserError
from vqd_scale.data.shards.shard_index import ShardSet
from vqd_scale.evaluation.clip import CAPTION, IMAGE, load_clip, r_precision, scores
from vqd_scale.evaluation.config import ClipConfig
from vqd_scale.evaluation.prompts import choose_prompts
from vqd_scale.evaluation.resumable_chunks import ResumableChunks

CPU = torch.device("cpu")
NAME = "vqd-scale-test-clip"
SHAPE = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1},
}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ClipConfig:
    folder = tmp_path_factory.mktemp("clip")
    (folder / f"{NAME}.json").write_text(json.dumps(SHAPE))
    open_clip.add_model_config(folder / f"{NAME}.json")
    torch.manual_seed(0)
    network = open_clip.create_model(NAME, pretrained=None)
    torch.save(network.state_dict(), folder / "clip.pt")
    return ClipConfig(weights=folder / "clip.pt", model=NAME, retrieval_candidates=3)


def test_features_equal_open_clip(config: ClipConfig) -> None:
    clip = load_clip(config, CPU)
    images = torch.randint(0, 256, (3, 3, 48, 48), generator=torch.Generator().manual_seed(1)).byte()
    captions = ["a red circle", "a bus", "nothing"]
    columns = clip.columns(images, captions)
    transform: Any = open_clip.image_transform(
        32, False, mean=clip.network.visual.image_mean, std=clip.network.visual.image_std
    )
    transformed = torch.stack(
        [transform(Image.fromarray(image.permute(1, 2, 0).numpy())) for image in images]
    )
    with torch.no_grad():
        open_clip_features = clip.network.encode_image(transformed, normalize=True)
        words = clip.network.encode_text(open_clip.get_tokenizer(NAME)(captions), normalize=True)
    torch.testing.assert_close(columns[IMAGE], open_clip_features, rtol=0, atol=5e-3)
    torch.testing.assert_close(columns[CAPTION], words)
    assert scores(columns[IMAGE], columns[CAPTION]).numpy() == pytest.approx(
        (open_clip_features * words).sum(dim=1).numpy(), abs=5e-3
    )
    assert clip.description["weights_sha256"] == sha256_of(config.weights)


def test_evaluation_reports_clip_score(config: ClipConfig, model: Path, shards: Path, tmp_path: Path) -> None:
    result = scored(protocol(shards, clip=config), model, tmp_path)
    parts = ResumableChunks(tmp_path / "parts", 23, 4)
    image_features, captions = parts.column(IMAGE), parts.column(CAPTION)
    figures = result.report["figures"]
    assert figures["clip_score"] == pytest.approx(float(scores(image_features, captions).mean()))
    assert figures["clip_r_precision"] == r_precision(image_features, captions, config.retrieval_candidates)
    assert result.report["clip"]["weights_sha256"] == sha256_of(config.weights)
    # Every image's caption is that of its prompt.
    chosen = [prompt.text for prompt in choose_prompts(protocol(shards).prompts, ShardSet.open(shards))]
    network, tokenize = load_clip(config, CPU).network, open_clip.get_tokenizer(NAME)
    with torch.no_grad():
        torch.testing.assert_close(captions, network.encode_text(tokenize(chosen), normalize=True))


def test_weights_of_another_model_are_refused(config: ClipConfig, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"weights of CLIP are missing; give clip.weights=FILE"):
        load_clip(config.model_copy(update={"weights": tmp_path / "none.pt"}), CPU)
    with pytest.raises(UserError, match="their SHA-256 is"):
        load_clip(config.model_copy(update={"sha256": "0" * 64}), CPU)
    with pytest.raises(UserError, match="open_clip has no model 'unknown-model'"):
        load_clip(config.model_copy(update={"model": "unknown-model"}), CPU)
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(UserError, match="these are not the weights of open_clip's"):
        load_clip(config.model_copy(update={"weights": tmp_path / "other.pt"}), CPU)


def test_weights_of_another_activation_are_refused(config: ClipConfig) -> None:
    # The check needs names only, so the weights are never read.
    def refusal(model: str, tag: str | None) -> str:
        named = config.model_copy(update={"model": model, "pretrained": tag})
        with pytest.raises(UserError) as error:
            load_clip(named, CPU)
        return str(error.value)

    assert refusal("ViT-B-32", "openai") == (
        "clip.model: the weights 'openai' were trained with QuickGELU, but 'ViT-B-32' has GELU; take "
        "'ViT-B-32-quickgelu'."
    )
    assert "differ in activation or normalization; name the tag of yours" in refusal("ViT-B-32", None)
    assert "clip.pretrained: given 'nothing', allowed: custom, openai" in refusal("ViT-B-32", "nothing")


def test_weights_of_another_size_and_checkpoints_are_one_sentence(config: ClipConfig, tmp_path: Path) -> None:
    state = torch.load(config.weights, weights_only=True)
    name = "visual.conv1.weight"
    torch.save({**state, name: state[name][:, :, :8, :8]}, tmp_path / "size.pt")
    torch.save({f"optimizer.{number}": torch.zeros(1) for number in range(2000)}, tmp_path / "training.pt")
    for file in ("size.pt", "training.pt"):
        with pytest.raises(UserError, match=f"not the weights of open_clip's {NAME}") as error:
            load_clip(config.model_copy(update={"weights": tmp_path / file}), CPU)
        assert len(str(error.value)) < 500


def directions(seed: int, count: int, width: int) -> Tensor:
    values = torch.randn(count, width, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(values, dim=1)


def test_r_precision_of_own_and_shuffled_captions() -> None:
    captions = directions(0, 400, 32)
    assert r_precision(captions, captions, 100) == 1
    assert r_precision(directions(1, 400, 32), captions, 10) == pytest.approx(0.1, abs=0.05)
    # Equal captions are no retrieval error.
    assert r_precision(captions, captions[:1].expand(400, -1), 10) == 1
    assert np.isclose(r_precision(-captions, captions, 10), 0)
    with pytest.raises(UserError, match=r"400 captions are fewer than clip.retrieval_candidates=401"):
        r_precision(captions, captions, 401)
