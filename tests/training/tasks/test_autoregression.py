import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor
from torch.nn import functional

from vqd_scale.core.config import load_config, validated
from vqd_scale.core.errors import UserError
from vqd_scale.core.world import World
from vqd_scale.data.loading.batch import TokenBatch
from vqd_scale.models.autoregressive_sampling import AutoregressiveTextToImage
from vqd_scale.text.clip import CaptionTokenizer
from vqd_scale.training.logging.metrics import read_metrics
from vqd_scale.training.tasks import autoregression
from vqd_scale.training.tasks.autoregression import AutoregressionTask, token_losses
from vqd_scale.training.tasks.config import AutoregressionConfig, TrainConfig
from vqd_scale.training.tasks.denoising import DenoisingTask

ALONE = World(0, 1, torch.device("cpu"))


@pytest.mark.parametrize("elements", [7, 90, 10**6])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_chunked_losses_equal_cross_entropy(
    elements: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(autoregression, "_CHUNK_ELEMENTS", elements)
    generator = torch.Generator().manual_seed(0)
    shapes = ((50, 8), (7, 8), (7,))
    hidden, weight, bias = inputs = [
        torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes
    ]
    targets = torch.randint(0, 7, (50,), generator=generator)
    weights = torch.rand(50, generator=generator)

    losses, correct = token_losses(hidden, weight, bias, targets)
    logits = functional.linear(hidden, weight, bias).float()
    expected = functional.cross_entropy(logits, targets, reduction="none")
    torch.testing.assert_close(losses, expected)
    assert torch.equal(correct, logits.argmax(-1) == targets)
    gradients, expected_gradients = (
        torch.autograd.grad((each * weights).sum(), inputs) for each in (losses, expected)
    )
    tolerance = 1e-6 if dtype is torch.float64 else 5e-2
    torch.testing.assert_close(gradients, expected_gradients, atol=tolerance, rtol=tolerance)


def test_logits_are_not_saved_for_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autoregression, "_CHUNK_ELEMENTS", 70)
    hidden, weight, bias = torch.randn(500, 8, requires_grad=True), torch.randn(7, 8), torch.randn(7)
    targets = torch.zeros(500, dtype=torch.int64)
    saved_shapes: list[torch.Size] = []

    def remember(tensor: Tensor) -> Tensor:
        saved_shapes.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        token_losses(hidden, weight, bias, targets)
        assert torch.Size([10, 7]) not in saved_shapes
        functional.cross_entropy(functional.linear(hidden[:10], weight, bias), targets[:10])
        assert torch.Size([10, 7]) in saved_shapes


def config_of(token_world: Path, run: Path, **changes: object) -> dict[str, object]:
    """Return the configuration of `conftest` for the autoregressive network."""
    values = yaml.safe_load((token_world / "train.yaml").read_text())
    network = values.pop("denoiser")
    for key in ("diffusion", "objective", "timestep_sampler"):
        del values[key]
    return values | {"kind": "autoregression", "run": str(run), "network": network} | changes


def batch(number: int, tokens: Tensor, captions: list[str]) -> TokenBatch:
    return TokenBatch(
        tokens=tokens,
        text=torch.from_numpy(CaptionTokenizer(8, 300)(captions)),
        slots=torch.arange(4 * number, 4 * number + 4),
        valid=torch.ones(4, dtype=torch.bool),
        keys=captions,
    )


def test_one_batch_can_be_overfitted(token_world: Path, tmp_path: Path) -> None:
    values = config_of(token_world, tmp_path, condition_dropout=0.0)
    task = AutoregressionTask(validated(AutoregressionConfig, values, "a test"), ALONE)
    captions = [f"a {word} picture" for word in ("red", "green", "blue", "white")]
    tokens = torch.randint(0, 12, (4, 9), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(task.module.parameters(), lr=5e-3)
    accuracy, count = 0.0, 1.0
    for number in range(100):
        losses = task.losses(task.module, batch(number, tokens, captions), 4 * number)
        optimizer.zero_grad()
        losses.per_sample.mean().backward()
        optimizer.step()
        accuracy, count = losses.statistics["accuracy"].tolist()
    assert count == 36
    assert accuracy / count > 0.95


def test_dropped_captions_are_hidden_and_bad_samples_not_counted(token_world: Path, tmp_path: Path) -> None:
    values = config_of(token_world, tmp_path, condition_dropout=0.5)
    task = AutoregressionTask(validated(AutoregressionConfig, values, "a test"), ALONE)
    tokens = torch.randint(0, 12, (4, 9), generator=torch.Generator().manual_seed(0))
    drop_flags = [set[float](), set[float]()]
    for number in range(8):
        first, second = (
            task.losses(task.module, batch(number, tokens, [caption] * 4), 0).per_sample
            for caption in ("a red picture", "a blue picture")
        )
        _, dropped = task.condition_inputs(batch(number, tokens, [""] * 4))
        assert torch.equal(first != second, ~dropped)
        drop_flags[0].update(dropped.tolist())
    assert drop_flags[0] == {True, False}
    invalid_batch = batch(0, tokens, ["a red picture"] * 4)
    invalid_batch.valid[1] = False
    assert task.losses(task.module, invalid_batch, 0).statistics["accuracy"][1] == 27


def test_unconditional_denoiser_trains_on_the_same_shards(token_world: Path, tmp_path: Path) -> None:
    overrides = [
        f"run={tmp_path}",
        "text=null",
        "denoiser={kind: unet, width: 8, channel_multipliers: [1, 1]}",
    ]
    with pytest.raises(UserError, match="grid of 3x3 tokens cannot be halved 1 times"):
        DenoisingTask(load_config(TrainConfig, token_world / "train.yaml", overrides), ALONE)
    overrides[-1] = "denoiser={kind: unet, width: 8, channel_multipliers: [1]}"
    task = DenoisingTask(load_config(TrainConfig, token_world / "train.yaml", overrides), ALONE)
    samples = task.samples()
    assert (samples.text_length, samples.classes) == (0, 0)
    tokens = torch.randint(0, 12, (4, 9), generator=torch.Generator().manual_seed(0))
    losses = task.losses(task.module, batch(0, tokens, [""] * 4), 0)
    losses.per_sample.sum().backward()
    assert all(parameter.grad is not None for parameter in task.module.parameters())


def test_class_denoiser_uses_null_class_for_dropped_samples(token_world: Path, tmp_path: Path) -> None:
    network = "denoiser={width: 16, layers: 1, heads: 2, condition: {kind: class, classes: 5}}"
    overrides = [f"run={tmp_path}", "text=null", network, "condition_dropout=0.5"]
    task = DenoisingTask(load_config(TrainConfig, token_world / "train.yaml", overrides), ALONE)
    assert task.samples().classes == 5
    labels, dropped = torch.arange(4), torch.tensor([True, False, True, False])
    condition_ids = task.model.condition_inputs(labels, dropped)
    assert condition_ids is not None
    assert condition_ids.tolist() == [5, 1, 5, 3]


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["text=null"], "denoiser.condition: must be another kind than 'text'"),
        (["denoiser.condition={kind: none}"], "denoiser.condition: must be kind 'text' of width 16"),
    ],
)
def test_text_encoder_and_condition_must_agree(
    token_world: Path, tmp_path: Path, overrides: list[str], sentence: str
) -> None:
    config = load_config(TrainConfig, token_world / "train.yaml", [f"run={tmp_path}", *overrides])
    with pytest.raises(UserError) as caught:
        DenoisingTask(config, ALONE)
    assert sentence in str(caught.value)


RunTool = Callable[..., "subprocess.CompletedProcess[str]"]


def losses_of(run: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(run / "metrics.jsonl")]


@pytest.mark.ranks
def test_trained_model_generates_images(token_world: Path, tmp_path: Path, run_tool: RunTool) -> None:
    path = tmp_path / "train.yaml"
    sample_settings = {"prompts": ["a red picture", "a blue picture"], "every_images": 80}
    path.write_text(yaml.safe_dump(config_of(token_world, tmp_path / "run", sample_images=sample_settings)))
    completed = run_tool("train.py", str(path))
    assert completed.returncode == 0, completed.stderr
    assert len(list((tmp_path / "run" / "sample_images").glob("*.png"))) == 2
    losses = losses_of(tmp_path / "run")
    assert len(losses) == 20
    assert losses[-1] < losses[0]
    pipe = AutoregressiveTextToImage.load(tmp_path / "run", device="cpu")
    assert pipe("a red picture", guidance=2.0).tensor.shape == (1, 3, 6, 6)


@pytest.mark.long
@pytest.mark.ranks
@pytest.mark.parametrize("network", ["autoregression", "unet"])
def test_two_ranks_have_the_losses_of_one(
    token_world: Path, tmp_path: Path, run_tool: RunTool, network: str
) -> None:
    values = config_of(token_world, tmp_path)
    if network == "unet":
        values = yaml.safe_load((token_world / "train.yaml").read_text())
        values |= {"text": None, "denoiser": {"kind": "unet", "width": 8, "channel_multipliers": [1]}}
    path = tmp_path / "train.yaml"
    path.write_text(yaml.safe_dump(values))
    for ranks in (1, 2):
        completed = run_tool("train.py", str(path), f"run={tmp_path / str(ranks)}", ranks=ranks)
        assert completed.returncode == 0, completed.stderr
    one, two = losses_of(tmp_path / "1"), losses_of(tmp_path / "2")
    assert len(one) == 20
    assert two == pytest.approx(one, rel=1e-5)
