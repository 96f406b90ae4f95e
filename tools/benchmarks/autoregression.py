"""Sampling speed against VQ-AR of the same size: the "15 times" of VQ-Diffusion's paper."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from benchmarks.measuring import extra_peak
from torch import Tensor

from vqd_scale.core.progress import progress_bar
from vqd_scale.diffusion.config import ConstantGuidance, Released, Strided
from vqd_scale.models.autoregressive_sampling import AutoregressiveTextToImage
from vqd_scale.models.bundle import AutoregressiveModel, Bundle, Model
from vqd_scale.models.config import AutoregressiveBundleConfig, BundleConfig
from vqd_scale.models.pipeline import TextToImage, image_slots
from vqd_scale.nn.config import AutoregressiveConfig, DenoiserConfig, TextCondition
from vqd_scale.text.config import Tower
from vqd_scale.tokenizers.config import VQGANConfig
from vqd_scale.tokenizers.vqgan import VQGAN

_MOST_DIFFERING = 0.01
WITH_CACHE, WITHOUT_CACHE = "ar_kept", "ar_again"


@dataclass(frozen=True)
class AutoregressionProblem:
    """Sizes of two networks with random weights, which are as fast as trained ones.

    Attributes:
        width: Width of both networks.
        layers: Number of blocks.
        heads: Number of attention heads.
        codes: Codebook size K.
        sides: Rows and columns of the token grids, measured in turn.
        steps: Numbers of diffusion steps.
        batch: Images per batch.
    """

    width: int = 96
    layers: int = 4
    heads: int = 4
    codes: int = 512
    sides: tuple[int, ...] = (16, 32)
    steps: tuple[int, ...] = (10, 25, 50, 100)
    batch: int = 1


def benchmark_autoregression(rounds: int, problem: AutoregressionProblem | None = None) -> dict[str, Any]:
    """Measure images per second from a prompt to pixels without guidance, all methods in turn.

    In every round, VQ-AR must sample the same images with and without its KV cache.
    ``ours`` and ``alternative`` are seconds per image of 25 steps (or of the fewest that
    are measured) and of VQ-AR with keys and values kept, at the largest grid.

    Args:
        rounds: Number of timings per method; the median is reported.
        problem: Sizes of the benchmark.

    Raises:
        RuntimeError: VQ-AR samples different images without its KV cache.
    """
    problem = AutoregressionProblem() if problem is None else problem
    table: dict[str, dict[str, float]] = {}
    parameters: dict[str, dict[str, int]] = {}
    memory: dict[str, int] = {}
    for side in problem.sides:
        drawings, parameters[f"{side}x{side}"] = _drawings(side, problem)
        seconds: dict[str, list[float]] = {name: [] for name in drawings}
        with progress_bar(f"{side}x{side}", rounds * len(drawings)) as bar:
            for _ in range(rounds):
                images: dict[str, Tensor] = {}
                for name, draw in drawings.items():
                    started = time.perf_counter()
                    images[name] = draw()
                    seconds[name].append((time.perf_counter() - started) / problem.batch)
                    bar.update()
                _check_equal(images[WITH_CACHE], images[WITHOUT_CACHE])
        table[f"{side}x{side}"] = {name: median(values) for name, values in seconds.items()}
        memory = {
            name: extra_peak(drawings[name]) for name in (_steps_name(compared_steps(problem)), WITH_CACHE)
        }
    last = table[f"{problem.sides[-1]}x{problem.sides[-1]}"]
    diffusion_name = _steps_name(compared_steps(problem))
    return {
        "ours": last[diffusion_name],
        "alternative": last[WITH_CACHE],
        "ratio": last[WITH_CACHE] / last[diffusion_name],
        "memory_ratio": memory[diffusion_name] / max(memory[WITH_CACHE], 1),
        "images_per_second": {
            grid: {name: 1 / value for name, value in row.items()} for grid, row in table.items()
        },
        "times_faster_than_ar_kept": _times(table, WITH_CACHE),
        "times_faster_than_ar_again": _times(table, WITHOUT_CACHE),
        "parameters": parameters,
        "width": problem.width,
        "layers": problem.layers,
        "codes": problem.codes,
        "batch": problem.batch,
        "rounds": rounds,
    }


def _check_equal(cached: Tensor, again: Tensor) -> None:
    # Another summation order may change one token in thousands; an error changes most of the later ones.
    differing = (cached.int() - again.int()).abs().gt(1).float().mean().item()
    if differing > _MOST_DIFFERING:
        raise RuntimeError(f"{differing:.1%} of VQ-AR's pixels depend on whether keys are kept")


def _times(table: dict[str, dict[str, float]], baseline: str) -> dict[str, dict[str, float]]:
    return {
        grid: {
            name: row[baseline] / value
            for name, value in row.items()
            if name not in (WITH_CACHE, WITHOUT_CACHE)
        }
        for grid, row in table.items()
    }


def compared_steps(problem: AutoregressionProblem) -> int:
    return 25 if 25 in problem.steps else min(problem.steps)


def _steps_name(steps: int) -> str:
    return f"diffusion_{steps}"


def _drawings(
    side: int, problem: AutoregressionProblem
) -> tuple[dict[str, Callable[[], Tensor]], dict[str, int]]:
    torch.manual_seed(0)
    text = Tower(context_length=16, width=64, heads=2, layers=1, bpe_merges=300)
    condition = TextCondition(width=text.width)
    width, layers, heads = problem.width, problem.layers, problem.heads
    # A small decoder, equal on both sides: the benchmark compares the sampling of tokens.
    tokenizer = VQGAN(
        VQGANConfig(
            codebook_size=problem.codes, code_dim=4, channels=8, channel_multipliers=(1, 1), norm="none"
        )
    ).eval()
    tokenizer.quantize.embedding.copy_(torch.randn(problem.codes, 4))
    denoising = BundleConfig(
        codebook_size=problem.codes,
        grid=(side, side),
        denoiser=DenoiserConfig(width=width, layers=layers, heads=heads, condition=condition),
        text=text,
        diffusion=Released(),
    )
    in_order = AutoregressiveBundleConfig(
        codebook_size=problem.codes,
        grid=(side, side),
        network=AutoregressiveConfig(width=width, layers=layers, heads=heads, condition=condition),
        text=text,
    )
    diffusion = TextToImage(Bundle(denoising, Model(denoising).eval(), tokenizer))
    ar = AutoregressiveTextToImage(Bundle(in_order, AutoregressiveModel(in_order).eval(), tokenizer))
    prompts, slots = ["a red bus in the rain"] * problem.batch, image_slots(0, problem.batch)
    alone = ConstantGuidance(scale=1.0)

    def steps(count: int) -> Callable[[], Tensor]:
        return lambda: diffusion.generate_batch(prompts, slots, Strided(steps=count), guidance=alone)

    drawings: dict[str, Callable[[], Tensor]] = {_steps_name(count): steps(count) for count in problem.steps}
    drawings[WITH_CACHE] = lambda: ar.generate_batch(prompts, slots, guidance=alone)
    drawings[WITHOUT_CACHE] = lambda: ar.generate_batch(prompts, slots, guidance=alone, use_cache=False)
    counted = {
        "diffusion": sum(value.numel() for value in diffusion.bundle.model.parameters()),
        "ar": sum(value.numel() for value in ar.bundle.model.parameters()),
    }
    return drawings, counted
