"""Tokenizer training: gradients of the GAN losses, four kinds of codebook, ReFiT, exact resume."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.training import rank_processes
from tests.training.tokenizer_scenarios import COMPARED, KINDS, SIDE, VQGAN, config_of, write_images
from vqd_scale.cli.evaluate_tokenizer import main as evaluate_tokenizer
from vqd_scale.core.atomic_io import read_json, sha256_of
from vqd_scale.core.config import load_config, to_yaml
from vqd_scale.core.errors import UserError
from vqd_scale.core.world import World
from vqd_scale.data.loading.batch import ImageBatch
from vqd_scale.models.bundle import load_tokenizer, save_tokenizer
from vqd_scale.tokenizers.base import to_signal
from vqd_scale.tokenizers.config import DiscriminatorConfig, FSQConfig, TamingVQConfig
from vqd_scale.tokenizers.discriminator import Discriminator, adaptive_weight, hinge
from vqd_scale.tokenizers.fsq import FSQ
from vqd_scale.tokenizers.perceptual import Pyramid
from vqd_scale.tokenizers.taming import TamingVQ
from vqd_scale.training.logging.metrics import read_metrics
from vqd_scale.training.tasks.autoencoding import AutoencodingTask
from vqd_scale.training.tasks.config import (
    TOKENIZER_RUNS,
    GANLossesConfig,
    ReconstructionConfig,
    TemperatureConfig,
)
from vqd_scale.training.tasks.gan_losses import GANLosses
from vqd_scale.training.tasks.refitting import RefitTask

ROOT = Path(__file__).parents[3]
RECIPES = sorted((ROOT / "configs" / "tokenizer").glob("*.yaml"))


class SingleRankWorld(World):
    """World of one rank without a process group."""

    def __init__(self) -> None:
        super().__init__(0, 1, torch.device("cpu"))

    def sum(self, tensor: Tensor) -> Tensor:
        return tensor.clone()

    def concatenated(self, tensor: Tensor) -> Tensor:
        return tensor


ALONE = SingleRankWorld()


@pytest.fixture(scope="module")
def image_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures") / "shards"
    write_images(folder)
    return folder


def batch(height: int = SIDE, width: int = SIDE, count: int = 3) -> ImageBatch:
    generator = torch.Generator().manual_seed(4)
    images = torch.randint(0, 256, (count, 3, height, width), generator=generator, dtype=torch.uint8)
    valid = torch.ones(count, dtype=torch.bool)
    valid[-1] = False
    return ImageBatch(images, ["a"] * count, slots=torch.arange(count), valid=valid, keys=["k"] * count)


class StubDiscriminator:
    """A discriminator without an engine."""

    def __init__(self, weight: float) -> None:
        torch.manual_seed(3)
        self.network = Discriminator(DiscriminatorConfig(channels=32, layers=1))
        self.config = GANLossesConfig.model_validate(
            {"discriminator": {"start_images": 0, "weight": weight}}
        ).discriminator

    def generator_loss(self, images: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        input_images = images.detach().requires_grad_()
        value = -self.network(input_images).mean(dim=1)
        (gradient,) = torch.autograd.grad(torch.where(valid, value, 0.0).sum(), input_images)
        return value.detach(), gradient

    def step(self, real: Tensor, generated: Tensor, valid: Tensor, images: int) -> Tensor:
        return hinge(self.network(real), self.network(generated)).detach()


@pytest.mark.parametrize("weight", [0.0, 0.8])
@pytest.mark.parametrize("perceptual", [False, True])
def test_loss_gradients_equal_autograd(image_shards: Path, weight: float, perceptual: bool) -> None:
    """Compare with autograd: all losses in one graph, the adaptive weight by gradients at the image."""
    terms = {"l1": 0.3, "l2": 2.0}
    run = config_of(image_shards, Path("unused"), 48, losses={}, reconstruction=terms, **KINDS["averaged"])
    gan_losses = GANLosses(run, ALONE)
    gan_losses.perceptual = Pyramid(2) if perceptual else None
    discriminator = StubDiscriminator(weight)
    gan_losses.discriminator = discriminator if weight else None  # pyright: ignore[reportAttributeAccessIssue]
    generator = torch.Generator().manual_seed(0)
    signal, base = (torch.rand(3, 3, 16, 16, generator=generator) * 2 - 1 for _ in range(2))
    scale = torch.tensor(0.7, requires_grad=True)
    valid = torch.tensor([True, True, False])
    losses = ReconstructionConfig.model_validate(terms)

    reconstruction = base * scale
    pixels, _ = losses.pixels(reconstruction, signal)
    added, statistics = gan_losses(reconstruction, signal, valid, 0)
    total = pixels if added is None else pixels + added
    (gradient,) = torch.autograd.grad(total[valid].sum(), scale)

    reconstruction = base * scale
    other_terms = losses.pixels(reconstruction, signal)[0] + (
        Pyramid(2)(reconstruction, signal) if perceptual else 0.0
    )
    expected = other_terms
    if weight:
        value = -discriminator.network(reconstruction).mean(dim=1)
        norms = [
            torch.autograd.grad(term[valid].sum(), reconstruction, retain_graph=True)[0].norm()
            for term in (other_terms, value)
        ]
        expected = other_terms + weight * adaptive_weight(*norms) * value
        assert float(statistics["adversarial_weight"][0]) == pytest.approx(
            float(weight * norms[0] / norms[1]), rel=1e-4
        )
    torch.testing.assert_close(total[valid], expected[valid])
    torch.testing.assert_close(gradient, torch.autograd.grad(expected[valid].sum(), scale)[0])
    assert (added is None) == (not weight and not perceptual)
    assert all(parameter.grad is None for parameter in discriminator.network.parameters())


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize(("height", "width"), [(SIDE, SIDE), (16, 48)])
def test_every_codebook_trains_at_any_multiple_of_the_factor(
    image_shards: Path, kind: str, height: int, width: int
) -> None:
    config = config_of(image_shards, Path("unused"), 48, losses={}, **KINDS[kind])
    task = config.build(ALONE)
    assert isinstance(task, AutoencodingTask)
    if task.codebook is not None:
        task.codebook.embedding.normal_()
        task.codebook.cluster_size.fill_(1.0)
        task.codebook.embedding_avg.copy_(task.codebook.embedding)
    losses = task.losses(task.module, batch(height, width), 24)
    assert losses.per_sample.isfinite().all()
    losses.per_sample.sum().backward()
    trained = [name for name, parameter in task.module.named_parameters() if parameter.grad is None]
    assert trained == []
    assert task.forward_flops > 0


def test_run_shorter_than_codebook_warmup_is_refused(image_shards: Path) -> None:
    with pytest.raises(UserError, match="the run ends at 12, before the codebook's warmup ends at 12"):
        config_of(image_shards, Path("unused"), 12, losses={}, vqgan=VQGAN, codebook_warmup_images=12)


def test_temperature_follows_half_a_cosine() -> None:
    temperature = TemperatureConfig(first=1.0, last=0.0625, anneal_images=100)
    assert temperature.at(0) == 1.0
    assert temperature.at(50) == pytest.approx((1 + 0.0625) / 2)
    assert temperature.at(100) == temperature.at(500) == pytest.approx(0.0625)


class _StubPartition:
    """A partition without DeepSpeed."""

    def __init__(self) -> None:
        self.masters: list[Tensor] = []

    def masters_changed(self) -> None:
        """Ignore the network, which is absent."""


def collapsed(folder: Path, codes: int = 16) -> TamingVQ:
    """Write a tokenizer whose codes are too far away to be the nearest."""
    torch.manual_seed(0)
    config = TamingVQConfig(
        codebook_size=codes,
        code_dim=4,
        channels=32,
        channel_multipliers=(1, 2),
        num_res_blocks=1,
        attention=(),
        latent_channels=6,
    )
    tokenizer = TamingVQ(config).requires_grad_(False)
    tokenizer.quantize.embedding.weight[1:] += 50.0
    save_tokenizer(folder, config, tokenizer.state_dict())
    return tokenizer


def refit(image_shards: Path, folder: Path, **changed: Any) -> RefitTask:
    pool = {"size": 2000, "images": 24, "chain_length": 40}
    config = config_of(
        image_shards,
        folder / "run",
        48,
        **{
            "kind": "refit",
            "tokenizer": str(folder),
            "codebook_size": 16,
            "pool": pool,
            "losses": {},
            **changed,
        },
    )
    task = config.build(ALONE)
    assert isinstance(task, RefitTask)
    return task


def test_refit_fills_the_codebook_and_keeps_the_encoder(
    image_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = collapsed(tmp_path)
    (tmp_path / "run").mkdir()
    task = refit(image_shards, tmp_path)
    placed: dict[str, Tensor] = {}

    def place(partition: object, flats: object, placed_weights: dict[str, Tensor]) -> None:
        del partition, flats
        placed.update(placed_weights)

    monkeypatch.setattr("vqd_scale.training.tasks.refitting.fill", place)
    partition: Any = _StubPartition()
    task.init_weights(partition)
    (centers,) = placed.values()
    assert list(placed) == ["quantize.embedding.weight"]
    assert centers.shape == (16, 4)
    assert centers.isfinite().all()
    names = [name for name, _ in task.module.named_parameters()]
    assert names
    assert not any(name.startswith(("encoder", "quant_conv")) for name in names)
    parameters = {name: value.detach() for name, value in task.module.named_parameters()} | placed
    task.export(parameters, tmp_path / "new")
    new = load_tokenizer(tmp_path / "new", torch.device("cpu"))
    new_state, old_state = new.state_dict(), old.state_dict()
    for name in old_state:
        if name.startswith(("encoder.", "quant_conv.")):
            assert torch.equal(new_state[name], old_state[name]), name
    images = to_signal(batch().images)
    assert len(old.encode(images).unique()) <= 2
    evaluate = ["--data", str(image_shards), "--image-size", str(SIDE), "--output", str(tmp_path / "report")]
    evaluate_tokenizer([str(tmp_path), str(tmp_path / "new"), *evaluate])
    report = read_json(tmp_path / "report" / "report.json", "report")
    assert report[str(tmp_path)]["used"] <= 0.3
    assert report[str(tmp_path / "new")]["used"] >= 0.95
    assert {"psnr", "ssim", "used_often", "perplexity"} <= report[str(tmp_path / "new")].keys()
    assert {"lpips", "rfid"}.isdisjoint(report[str(tmp_path)])
    assert "no weights given" in (tmp_path / "report" / "report.html").read_text()
    assert (tmp_path / "report" / "reconstructions-1.png").exists()


def test_learned_codes_receive_decoder_gradient(image_shards: Path, tmp_path: Path) -> None:
    collapsed(tmp_path)
    task = refit(image_shards, tmp_path, reconstruction={"codebook": 0.0})
    losses = task.losses(task.module, batch(), 0)
    losses.per_sample.sum().backward()
    gradient = task.module.get_parameter("quantize.embedding.weight").grad
    assert gradient is not None
    assert gradient.abs().sum() > 0
    assert all(parameter.grad is None for parameter in task.frozen.parameters())


def test_unsupported_refit_is_refused(image_shards: Path, tmp_path: Path) -> None:
    collapsed(tmp_path)
    with pytest.raises(UserError, match="codebook_size 30 cannot be placed at a pool of 20 vectors"):
        refit(image_shards, tmp_path, codebook_size=30, pool={"size": 20})
    grid = FSQConfig(levels=(3, 3), channels=32, channel_multipliers=(1, 2), num_res_blocks=1)
    save_tokenizer(tmp_path / "grid", grid, FSQ(grid).state_dict())
    with pytest.raises(UserError, match="a FSQ has no codebook of vectors"):
        refit(image_shards, tmp_path / "grid")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_loads_as_a_run(path: Path) -> None:
    config = load_config(TOKENIZER_RUNS, path)
    assert config.total_images > config.optim.warmup_images
    assert config.validation is not None


def test_required_tokenizer_recipes_exist() -> None:
    names = " ".join(path.stem for path in RECIPES)
    assert all(name in names for name in ("f8-4096", "f8-8192-gumbel", "f16-512", "f16-16384", "refit-1024"))


Starter = Callable[..., "subprocess.Popen[bytes]"]


@pytest.mark.ranks
def test_killed_run_resumes_exactly(image_shards: Path, tmp_path: Path) -> None:
    """Kill before and after codebook and discriminator join; rows and files are equal."""
    images, calm, run = 48, tmp_path / "calm", tmp_path / "run"
    for each in (calm, run):
        config = config_of(image_shards, each, images, **KINDS["averaged"])
        (tmp_path / f"{each.name}.yaml").write_text(to_yaml(config))
    completed = rank_processes.run(
        rank_processes.TRAIN_TOKENIZER,
        str(tmp_path / "calm.yaml"),
        ranks=1,
        output_folder=tmp_path / "calm-says",
    )
    assert completed.returncode == 0, completed.stderr
    for kill, rows in enumerate((2, 5, 9)):
        started = rank_processes.Ranks(
            rank_processes.TRAIN_TOKENIZER, [str(tmp_path / "run.yaml")], 1, tmp_path / f"said-{kill}"
        )
        while len(read_metrics(run / "metrics.jsonl")) < rows and started.poll() is None:
            time.sleep(0.002)
        os.kill(started.pids[0], signal.SIGKILL)
        assert started.wait() == -signal.SIGKILL, started.output()
    completed = rank_processes.run(
        rank_processes.TRAIN_TOKENIZER,
        str(tmp_path / "run.yaml"),
        ranks=1,
        output_folder=tmp_path / "run-says",
    )
    assert completed.returncode == 0, completed.stderr
    assert "resumed from the checkpoint" in completed.stderr
    assert remains(run) == remains(calm)


def remains(run: Path) -> dict[str, Any]:
    """Return rows of metrics, and digests of all files of a run."""
    rows = [{key: row[key] for key in COMPARED if key in row} for row in read_metrics(run / "metrics.jsonl")]
    newest = max(path for path in (run / "checkpoints").iterdir() if path.name.isdigit())
    return {
        "rows": rows,
        "checkpoint": (newest.name, read_json(newest / "manifest.json", "manifest")["files"]),
        "export": sha256_of(run / "export" / "model.safetensors"),
    }


@pytest.mark.long
def test_interrupted_runs_resume_exactly_with_discriminator(image_shards: Path, tmp_path: Path) -> None:
    """Compare every kind of codebook and its ReFiT in one run and in three parts, bit for bit."""
    names = ["averaged:resumed", "refit:averaged", "learned:resumed", "refit:learned", "gumbel", "grid"]
    results = _results(image_shards, tmp_path, names, ranks=1)
    for name, run_digests in results.items():
        if "whole" in run_digests:
            assert run_digests["whole"] == run_digests["parts"], name
    for name in names:
        rows = (results[name].get("whole") or results[name])["rows"]
        assert rows[-1]["squared_error"] < rows[0]["squared_error"] * 1.3
        assert "discriminator" in rows[-1]
        assert "discriminator" not in rows[0]


@pytest.mark.long
@pytest.mark.ranks
def test_two_ranks_train_as_one_in_any_stage(image_shards: Path, tmp_path: Path) -> None:
    names = [f'learned:{{"zero": {{"stage": {stage}}}}}' for stage in (3, 1)] + [
        'gumbel, slowly:{"zero": {"stage": 3}}'
    ]
    results_by_ranks = [_results(image_shards, tmp_path / str(ranks), names, ranks) for ranks in (1, 2)]
    for name in names:
        alone, together = (results[name]["rows"] for results in results_by_ranks)
        # Up to the discriminator's first steps; later Adam amplifies the order of sums.
        for number, (row, two_rank_row) in enumerate(zip(alone[:5], together[:5], strict=True)):
            for figure in row.keys() - {"codes_used"}:
                close = 1e-6 if number < 2 or "slowly" in name else 1e-4
                expected = pytest.approx(two_rank_row[figure], rel=close)
                assert row[figure] == expected, (name, number, figure)


def _results(image_shards: Path, out: Path, names: list[str], ranks: int) -> dict[str, Any]:
    out.mkdir(parents=True, exist_ok=True)
    launch = "import sys; from pathlib import Path; from vqd_scale.launchers.local import run_locally"
    script = ROOT / "tests" / "training" / "tokenizer_scenarios.py"
    call = f"sys.exit(run_locally(Path({str(script)!r}), sys.argv[1:], {ranks}))"
    completed = subprocess.run(
        [sys.executable, "-c", f"{launch}; {call}", str(image_shards), str(out), *names],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert completed.returncode == 0, completed.stderr[-3000:]
    return json.loads((out / "results.json").read_text())
