"""The shipped configurations by kind, and small inputs with random weights for them."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import numpy as np
import open_clip
import torch
from safetensors.torch import save_file
from torchvision.models import vgg

from vqd_scale.cli.eval_ablation import AblationConfig
from vqd_scale.core.config import Config, load_config
from vqd_scale.core.errors import UserError
from vqd_scale.data.loading.batch import ImageBatch, TokenBatch
from vqd_scale.data.shards.shard_io import KEY, Sample, ShardRecipe, write_shard_set
from vqd_scale.data.sources.img2dataset import Img2datasetConfig
from vqd_scale.evaluation.config import EvaluationConfig, SweepConfig
from vqd_scale.models.bundle import save_tokenizer, tokenizer_fingerprint
from vqd_scale.nn.config import ClassCondition, UNetConfig
from vqd_scale.preparation.config import TokenizeConfig
from vqd_scale.preparation.tokenize_shards import TokenSetMeta
from vqd_scale.text.clip import CaptionTokenizer, TextEncoder
from vqd_scale.text.config import Pretrained, TextConfig
from vqd_scale.text.open_clip import published_shape
from vqd_scale.tokenizers.config import LPIPSConfig, VQGANConfig
from vqd_scale.tokenizers.vqgan import VQGAN
from vqd_scale.training.tasks.autoregression import AutoregressionTask
from vqd_scale.training.tasks.config import (
    TOKEN_RUNS,
    TOKENIZER_RUNS,
    AutoregressionConfig,
    RefitConfig,
    TokenizerRun,
    TokenizerTrainConfig,
    TokenRun,
)
from vqd_scale.training.tasks.denoising import DenoisingTask

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
KINDS: dict[str, type[Config] | tuple[type[Config], ...]] = {
    "token run": TOKEN_RUNS,
    "tokenizer run": TOKENIZER_RUNS,
    "tokenization": TokenizeConfig,
    "image shards": Img2datasetConfig,
    "evaluation": EvaluationConfig,
    "sweep": SweepConfig,
    "ablation": AblationConfig,
}
"""Every kind of configuration file, with the classes that its tool reads."""

LAYERS = 2
"""Number of layers of reduced networks."""
BATCH = 2
CAPTIONS = ("a small bird with a red head", "")


def kinds_of(path: Path) -> list[str]:
    """Names of the kinds whose tool reads this file."""
    names: list[str] = []
    for name, classes in KINDS.items():
        try:
            load_config(classes, path)
        except UserError:
            continue
        names.append(name)
    return names


KIND_OF = {path: kinds_of(path) for path in CONFIGS}


def configs_of(kind: str) -> list[Path]:
    return [path for path, kinds in KIND_OF.items() if kinds == [kind]]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT / "configs"))


def layer_overrides(shipped: TokenRun) -> list[str]:
    """The network at its own width, with two layers or levels."""
    if isinstance(shipped, AutoregressionConfig):
        return [f"network.layers={LAYERS}"]
    if isinstance(shipped.denoiser, UNetConfig):
        return [f"denoiser.channel_multipliers={list(shipped.denoiser.channel_multipliers[:LAYERS])}"]
    return [f"denoiser.layers={LAYERS}"]


class Inputs:
    """Files that configurations name, small and with random weights.

    Args:
        folder: Where they are written.
        codes: Number of codes of the tokenizer of all token shards.
        grid: Height and width of their images in tokens.
    """

    def __init__(self, folder: Path, codes: int = 64, grid: tuple[int, int] = (4, 4)) -> None:
        self.folder = folder
        self.codes = codes
        self.grid = grid
        shape = VQGANConfig(
            codebook_size=codes, code_dim=4, channels=8, channel_multipliers=(1, 2), norm="none"
        )
        torch.manual_seed(0)
        vqgan = VQGAN(shape)
        vqgan.quantize.embedding.copy_(torch.randn(codes, 4))
        save_tokenizer(self.tokenizer, shape, vqgan.state_dict())

    @property
    def tokenizer(self) -> Path:
        """Bundle of the tokenizer of all token shards."""
        return self.folder / "tokenizer"

    def token_shards(self, text: TextConfig | None) -> Path:
        """Token shards for a caption vocabulary, of one sample: tasks read the description only."""
        captions = ""
        if isinstance(text, Pretrained):
            captions = CaptionTokenizer(published_shape(text.model).context_length).fingerprint
        elif text is not None:
            captions = CaptionTokenizer(text.context_length, text.bpe_merges).fingerprint
        meta = TokenSetMeta(
            codes=self.codes,
            grid=self.grid,
            tokenizer=tokenizer_fingerprint(self.tokenizer),
            captions=captions,
            source={},
        )
        folder = self.folder / f"tokens-{captions}"
        if not folder.exists():
            sample: Sample = {KEY: "0", "tokens.npy": np.zeros(self.grid, np.uint16)}
            recipes = [ShardRecipe("000000.tar", 1, lambda: [sample])]
            write_shard_set(folder, {"kind": "tokens", **asdict(meta)}, recipes, "tokens")
        return folder

    def text_overrides(self, text: TextConfig | None) -> list[str]:
        """The published text tower at its own width, with two layers and random weights from a file."""
        if not isinstance(text, Pretrained):
            return []
        name = f"first-losses-{text.model}"
        file = self.folder / f"{name}.safetensors"
        if not file.exists():
            described = cast(dict[str, Any], open_clip.get_model_config(text.model))
            described["text_cfg"]["layers"] = LAYERS
            (self.folder / f"{name}.json").write_text(json.dumps(described))
            open_clip.add_model_config(self.folder / f"{name}.json")
            torch.manual_seed(0)
            random = TextEncoder(Pretrained(model=name, pretrained=None, train=True))
            save_file(random.tower.state_dict(), file)
        return [f"text.model={name}", f"text.pretrained={file}"]

    def lpips_overrides(self, config: TokenizerRun) -> list[str]:
        """LPIPS with random weights."""
        if not isinstance(config.losses.perceptual, LPIPSConfig):
            return []
        features, linear = self.folder / "vgg.safetensors", self.folder / "linear.safetensors"
        if not linear.exists():
            torch.manual_seed(0)
            layers = vgg.make_layers(vgg.cfgs["D"])
            save_file({f"features.{name}": value for name, value in layers.state_dict().items()}, features)
            widths = enumerate((64, 128, 256, 512, 512))
            save_file({f"lin{n}.model.1.weight": torch.rand(1, width, 1, 1) for n, width in widths}, linear)
        return [f"losses.perceptual.vgg={features}", f"losses.perceptual.linear={linear}"]

    def refitted_tokenizer(self, config: RefitConfig) -> Path:
        """Bundle with random weights of the tokenizer that a refit starts from, as its own run trains it."""
        runs = [load_config(TOKENIZER_RUNS, path) for path in configs_of("tokenizer run")]
        (run,) = [run for run in runs if run.run / "export" == config.tokenizer]
        assert isinstance(run, TokenizerTrainConfig)
        shape = run.vqgan.model_copy(update={"num_res_blocks": 1})
        torch.manual_seed(0)
        folder = self.folder / config.tokenizer
        save_tokenizer(folder, shape, shape.build().state_dict())
        return folder


def token_batch(task: DenoisingTask | AutoregressionTask) -> TokenBatch:
    """Two samples as the stream would hand them over."""
    samples = task.samples()
    generator = torch.Generator().manual_seed(0)
    text = torch.zeros(BATCH, 0, dtype=torch.int64)
    if samples.text_length:
        text = torch.from_numpy(task.model.text.tokenizer(CAPTIONS))
    condition = task.model.condition
    labels = torch.tensor([0, 1]) if isinstance(condition, ClassCondition) else None
    tokens = torch.randint(task.meta.codes, (BATCH, samples.length), generator=generator)
    valid = torch.ones(BATCH, dtype=torch.bool)
    return TokenBatch(tokens, text, labels, slots=torch.arange(BATCH), valid=valid, keys=["0", "1"])


def image_batch(size: int) -> ImageBatch:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (BATCH, 3, size, size), generator=generator, dtype=torch.uint8)
    valid = torch.ones(BATCH, dtype=torch.bool)
    return ImageBatch(images, ["", ""], slots=torch.arange(BATCH), valid=valid, keys=["0", "1"])
