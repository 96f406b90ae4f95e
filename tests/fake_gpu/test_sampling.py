# pyright: reportPrivateUsage=false
"""Sampling, tokenization and evaluation on a GPU without values: devices, dtypes and host waits."""

from collections.abc import Callable, Generator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from tests.evaluation.inception import write_random_inception
from tests.fake_gpu.twin import DEVICE, FakeGPU, fake_gpu
from vqd_scale.core.atomic_io import sha256_of
from vqd_scale.diffusion.config import (
    Ancestral,
    Confidence,
    ConstantGuidance,
    Halton,
    LegacyDiffusers,
    LegacyFast,
    Paper,
    Purity,
    Remask,
    SamplerConfig,
    Strided,
    TopK,
    TopP,
    Truncation,
)
from vqd_scale.diffusion.guidance import apply_guidance, truncate
from vqd_scale.diffusion.samplers import sample
from vqd_scale.diffusion.transition import MaskAndReplace
from vqd_scale.evaluation.config import Inception
from vqd_scale.evaluation.extractors import FEATURES, inception
from vqd_scale.models.autoregressive_sampling import build_predict, sample_in_order
from vqd_scale.nn.autoregressive import Autoregressive
from vqd_scale.nn.config import AutoregressiveConfig, DenoiserConfig
from vqd_scale.nn.denoiser import Denoiser
from vqd_scale.tokenizers.base import ImageTokenizer
from vqd_scale.tokenizers.config import TamingGumbelConfig, VQGANConfig

CODES, GRID, STEPS, BATCH = 2887, (32, 32), 10, 2
LENGTH = GRID[0] * GRID[1]
SAMPLERS: Mapping[str, SamplerConfig] = {
    "ancestral": Ancestral(),
    "strided": Strided(steps=5),
    "legacy_fast": LegacyFast(speed=2),
    "legacy_diffusers": LegacyDiffusers(steps=5),
    "purity": Purity(steps=5),
    "confidence": Confidence(steps=5),
    "halton": Halton(steps=5),
    "remask": Remask(steps=5),
}
RATE_COPIES = 3
"""Copies of the schedule to the device, once per process."""
CALL_WAITS = 1
"""Host waits of a whole sampling: its last one asks if all predictions were finite."""


TOKENIZERS = (VQGANConfig(codebook_size=CODES), TamingGumbelConfig(codebook_size=CODES))


@pytest.fixture(name="gpu")
def _gpu() -> Generator[FakeGPU]:
    with fake_gpu() as gpu, torch.no_grad():
        yield gpu


def condition(dtype: torch.dtype) -> Tensor:
    return torch.zeros(BATCH, 77, 512, dtype=dtype, device=DEVICE)


def waits_of_steps(
    gpu: FakeGPU, run: Callable[[Callable[[int, int], None]], object]
) -> tuple[list[int], int]:
    """Host waits of each step but the first, which may prepare, and of the whole sampling."""
    counts: list[int] = []
    gpu.reset()

    def on_step(*_: int) -> None:
        counts.append(sum(gpu.waits.values()))

    run(on_step)
    return [after - before for before, after in pairwise(counts)], sum(gpu.waits.values())


@pytest.mark.parametrize(
    ("name", "truncation"), [*((name, None) for name in SAMPLERS), ("strided", TopP()), ("strided", TopK())]
)
def test_sampler_step_waits_for_nothing(name: str, truncation: Truncation | None, gpu: FakeGPU) -> None:
    transition = MaskAndReplace(Paper(steps=STEPS), CODES)
    with torch.device(DEVICE):
        network = Denoiser(DenoiserConfig(layers=1), CODES, GRID, STEPS).to(torch.bfloat16)
    features = condition(torch.bfloat16)
    prepared = network.prepare(features)
    both = network.prepare(torch.cat([features, features]))

    def pair(tokens: Tensor, t: int) -> tuple[Tensor, Tensor]:
        log_p = both(torch.cat([tokens, tokens]), t).float().log_softmax(-1)
        prompt, null = log_p.chunk(2)
        return prompt, null

    def conditional(tokens: Tensor, t: int) -> Tensor:
        return prepared(tokens, t).float().log_softmax(-1)

    predict = apply_guidance(conditional, pair, ConstantGuidance(scale=3.0))
    predict = predict if truncation is None else truncate(predict, truncation)
    slots = torch.zeros(BATCH, dtype=torch.int64, device=DEVICE)
    steps, total = waits_of_steps(
        gpu,
        lambda on_step: sample(predict, SAMPLERS[name], transition, slots, LENGTH, 0, on_step=on_step),
    )
    assert steps == [0] * len(steps), gpu.waits
    assert total <= CALL_WAITS + RATE_COPIES, gpu.waits
    assert not gpu.wide_products


@pytest.mark.parametrize("use_cache", [True, False])
def test_autoregressive_token_waits_for_nothing(use_cache: bool, gpu: FakeGPU) -> None:
    with torch.device(DEVICE):
        network = Autoregressive(AutoregressiveConfig(layers=1), CODES, (2, 4)).to(torch.bfloat16)
    features = condition(torch.bfloat16)
    guidance = ConstantGuidance(scale=3.0)
    predict = build_predict(network, (features, features), guidance, BATCH, use_cache=use_cache)
    slots = torch.zeros(BATCH, dtype=torch.int64, device=DEVICE)
    steps, total = waits_of_steps(gpu, lambda on_step: sample_in_order(predict, slots, 8, 0, on_step=on_step))
    assert steps == [0] * len(steps), gpu.waits
    assert total == CALL_WAITS
    assert not gpu.wide_products


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", TOKENIZERS, ids=lambda shape: shape.kind)
def test_tokenizer_encodes_and_decodes(
    shape: VQGANConfig | TamingGumbelConfig, dtype: torch.dtype, gpu: FakeGPU
) -> None:
    with torch.device(DEVICE):
        tokenizer: ImageTokenizer = shape.build()
    tokenizer.compute_in(dtype)
    gpu.reset()
    tokens = tokenizer.encode(torch.zeros(BATCH, 3, 64, 64, device=DEVICE))
    images = tokenizer.decode(tokens)
    assert images.shape == (BATCH, 3, 64, 64)
    assert (tokens.device, images.device, images.dtype) == (DEVICE, DEVICE, torch.float32)
    # The range of the images, and the lowest and highest token, are checked once per batch.
    assert sum(gpu.waits.values()) == 3, gpu.waits


@pytest.mark.parametrize("input", ["torch-fidelity", "pytorch-fid"])
def test_inception_computes_features(
    input: Literal["torch-fidelity", "pytorch-fid"],
    gpu: FakeGPU,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    load = torch.load

    def load_really(*args: Any, **kwargs: Any) -> Any:
        with _disable_current_modes():
            return load(*args, **kwargs)

    # torch loads fake tensors in the presence of others.
    monkeypatch.setattr(torch, "load", load_really)
    weights = tmp_path / "inception.pth"
    with _disable_current_modes():
        write_random_inception(weights)
    extractor = inception(Inception(weights=weights, sha256=sha256_of(weights), input=input), DEVICE)
    gpu.reset()
    columns = extractor(torch.zeros(BATCH, 3, 64, 64, dtype=torch.uint8))
    assert columns[FEATURES].shape == (BATCH, 2048)
    # The images to the device, features and logits to the host.
    assert sum(gpu.waits.values()) == 3, gpu.waits
