"""First forward and backward of every shipped training configuration, at its own precision and width.

One rank of the real engine, random weights, two samples, two layers. ``pytest -s`` prints a table of all
first losses at the end.
"""

import functools
import json
from collections.abc import Generator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models import vgg

from vqd_scale.cli.eval_ablation import AblationConfig
from vqd_scale.core.config import Config, load_config
from vqd_scale.core.errors import UserError
from vqd_scale.core.world import join_world, leave_world
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
from vqd_scale.training.engine import Engine
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

LAYERS, BATCH, CODES, GRID, IMAGE_SIZE = 2, 2, 64, (4, 4), 32
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


@dataclass(frozen=True)
class Result:
    """First step of a configuration.

    Attributes:
        kind: Of the run.
        precision: That the engine computed in.
        parameters: Number of trained parameters of the reduced model.
        loss: First loss, mean of the batch.
        last_loss: Loss at the end of the run's schedule, for a run whose losses change while it trains.
    """

    kind: str
    precision: str
    parameters: int
    loss: float
    last_loss: float | None = None


@pytest.fixture(scope="module")
def results() -> Generator[dict[Path, Result]]:
    """Results by configuration; printed when all tests are done."""
    rows: dict[Path, Result] = {}
    yield rows
    print(
        f"\n{'configuration':<40} {'kind':<15} {'precision':<9} {'parameters':>11} {'first loss':>10}  last"
    )
    for path, row in sorted(rows.items()):
        last = "" if row.last_loss is None else f"{row.last_loss:.4f}"
        columns = f"{row.kind:<15} {row.precision:<9} {row.parameters:>11,} {row.loss:>10.4f}"
        print(f"{name_of(path):<40} {columns}  {last}".rstrip())


class Inputs:
    """Files that configurations name, small and with random weights.

    Args:
        folder: Where they are written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        shape = VQGANConfig(
            codebook_size=CODES, code_dim=4, channels=8, channel_multipliers=(1, 2), norm="none"
        )
        torch.manual_seed(0)
        vqgan = VQGAN(shape)
        vqgan.quantize.embedding.copy_(torch.randn(CODES, 4))
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
            codes=CODES,
            grid=GRID,
            tokenizer=tokenizer_fingerprint(self.tokenizer),
            captions=captions,
            source={},
        )
        folder = self.folder / f"tokens-{captions}"
        if not folder.exists():
            sample: Sample = {KEY: "0", "tokens.npy": np.zeros(GRID, np.uint16)}
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


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return Inputs(tmp_path_factory.mktemp("inputs"))


class FirstStep:
    """An engine around a task's module, and whether each gradient of it is finite.

    Args:
        task: The task.
        config: The run.
    """

    def __init__(self, task: Any, config: TokenRun | TokenizerRun) -> None:
        self.task = task
        self.config = config
        self.finite: dict[str, bool] = {}
        self.trained = {name: value.numel() for name, value in _trained(task.module)}
        for name, value in _trained(task.module):
            value.register_hook(functools.partial(self._note, name))
        self.engine = Engine(task.module, config.engine, config.optim, BATCH, task.world, task.units)

    def loss(self, batch: TokenBatch | ImageBatch, images: int = 0) -> float:
        """Forward and backward, with a check that the loss and every gradient are finite."""
        self.finite.clear()
        losses = self.task.losses(self.engine, batch, images)
        assert losses.per_sample.shape == (BATCH,)
        assert losses.per_sample.isfinite().all(), losses.per_sample
        self.engine.backward(losses.per_sample.mean())
        assert self.finite.keys() == self.trained.keys()
        assert [name for name, is_finite in self.finite.items() if not is_finite] == []
        return float(losses.per_sample.detach().mean())

    def result(self, kind: str, loss: float, last_loss: float | None = None) -> Result:
        return Result(kind, self.config.engine.precision, sum(self.trained.values()), loss, last_loss)

    def _note(self, name: str, gradient: Tensor) -> None:
        self.finite[name] = bool(gradient.isfinite().all())


def _trained(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, value) for name, value in module.named_parameters() if value.requires_grad]


@pytest.fixture(autouse=True)
def world() -> Generator[None]:
    """A world of one rank, left after each test: DeepSpeed keeps what belongs to it."""
    yield
    leave_world()


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


@pytest.mark.parametrize("path", CONFIGS, ids=name_of)
def test_every_configuration_has_one_kind(path: Path) -> None:
    assert len(KIND_OF[path]) == 1, KIND_OF[path]


@pytest.mark.parametrize("path", configs_of("token run"), ids=name_of)
def test_first_step_of_a_token_run_is_finite(
    path: Path, inputs: Inputs, results: dict[Path, Result], tmp_path: Path
) -> None:
    shipped = load_config(TOKEN_RUNS, path)
    if isinstance(shipped, AutoregressionConfig):
        layers = [f"network.layers={LAYERS}"]
    elif isinstance(shipped.denoiser, UNetConfig):
        layers = [f"denoiser.channel_multipliers={list(shipped.denoiser.channel_multipliers[:LAYERS])}"]
    else:
        layers = [f"denoiser.layers={LAYERS}"]
    overrides = [
        f"run={tmp_path}",
        f"tokenizer={inputs.tokenizer}",
        "init_from=null",
        f"data.global_batch_size={BATCH}",
    ]
    overrides += [f"data.path={inputs.token_shards(shipped.text)}"]
    config = load_config(TOKEN_RUNS, path, [*overrides, *layers, *inputs.text_overrides(shipped.text)])

    task = config.build(join_world())
    step = FirstStep(task, config)
    results[path] = step.result(config.kind, step.loss(token_batch(task)))


@pytest.mark.parametrize("path", configs_of("tokenizer run"), ids=name_of)
def test_first_step_of_a_tokenizer_run_is_finite(
    path: Path, inputs: Inputs, results: dict[Path, Result], tmp_path: Path
) -> None:
    """At the run's start, and at its end, when the codebook and the discriminator have joined."""
    shipped = load_config(TOKENIZER_RUNS, path)
    size = min(IMAGE_SIZE, shipped.transform.size)
    overrides = [f"run={tmp_path}", f"data.global_batch_size={BATCH}", f"transform.size={size}"]
    overrides += inputs.lpips_overrides(shipped)
    if isinstance(shipped, RefitConfig):
        overrides.append(f"tokenizer={inputs.refitted_tokenizer(shipped)}")
    else:
        overrides.append("vqgan.num_res_blocks=1")
    config = load_config(TOKENIZER_RUNS, path, overrides)

    step = FirstStep(config.build(join_world()), config)
    first = step.loss(image_batch(size))
    assert step.engine.step(1e-6)
    results[path] = step.result(config.kind, first, step.loss(image_batch(size), config.total_images - 1))
