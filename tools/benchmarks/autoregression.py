"""Sampling beside VQ-AR of the same size: the comparison of which VQ-Diffusion's paper says "15 times"."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from benchmarks.measuring import extra_peak
from torch import Tensor

from vqd_scale.core.progress import progress_bar
from vqd_scale.diffusion.guidance import ConstantGuidance
from vqd_scale.diffusion.samplers import Strided
from vqd_scale.diffusion.schedule import Released
from vqd_scale.models.autoregressive_sampling import AutoregressiveTextToImage
from vqd_scale.models.bundle import (
    AutoregressiveBundleConfig,
    AutoregressiveModel,
    Bundle,
    BundleConfig,
    Model,
)
from vqd_scale.models.pipeline import TextToImage, image_slots
from vqd_scale.nn.autoregressive import AutoregressiveConfig
from vqd_scale.nn.denoiser import DenoiserConfig, TextCondition
from vqd_scale.text.clip import Tower
from vqd_scale.tokenizers.vqgan import VQGAN, VQGANConfig

_MOST_DIFFERING = 0.01
KEPT, AGAIN = "ar_kept", "ar_again"


@dataclass(frozen=True)
class AutoregressionProblem:
    """What is drawn, by networks of random weights: their speed is that of trained ones.

    Attributes:
        width: Of both networks.
        layers: Their blocks.
        heads: Their heads.
        codes: K.
        sides: Rows and columns of tokens, one after the other.
        steps: Of the diffusion sampler.
        batch: Pictures at once.
    """

    width: int = 96
    layers: int = 4
    heads: int = 4
    codes: int = 512
    sides: tuple[int, ...] = (16, 32)
    steps: tuple[int, ...] = (10, 25, 50, 100)
    batch: int = 1


def benchmark_autoregression(rounds: int, problem: AutoregressionProblem | None = None) -> dict[str, Any]:
    """Pictures per second on this machine, all ways in turn, from a prompt to pixels and without guidance.

    In every round, VQ-AR that keeps keys and values must draw what it draws when it reads everything again.
    ``ours`` and ``alternative`` are seconds per picture of 25 steps (or of the fewest that
    are measured) and of VQ-AR with keys and values kept, at the largest grid.

    Args:
        rounds: How often each is timed; the median counts.
        problem: The sizes.

    Raises:
        RuntimeError: The two ways of VQ-AR draw different pictures.
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
                pictures: dict[str, Tensor] = {}
                for name, draw in drawings.items():
                    started = time.perf_counter()
                    pictures[name] = draw()
                    seconds[name].append((time.perf_counter() - started) / problem.batch)
                    bar.update()
                _check_equal(pictures[KEPT], pictures[AGAIN])
        table[f"{side}x{side}"] = {name: median(values) for name, values in seconds.items()}
        memory = {name: extra_peak(drawings[name]) for name in (_steps_name(_shown(problem)), KEPT)}
    last = table[f"{problem.sides[-1]}x{problem.sides[-1]}"]
    ours = _steps_name(_shown(problem))
    return {
        "ours": last[ours],
        "alternative": last[KEPT],
        "ratio": last[KEPT] / last[ours],
        "memory_ratio": memory[ours] / max(memory[KEPT], 1),
        "images_per_second": {
            grid: {name: 1 / value for name, value in row.items()} for grid, row in table.items()
        },
        "times_faster_than_ar_kept": _times(table, KEPT),
        "times_faster_than_ar_again": _times(table, AGAIN),
        "parameters": parameters,
        "width": problem.width,
        "layers": problem.layers,
        "codes": problem.codes,
        "batch": problem.batch,
        "rounds": rounds,
    }


def _check_equal(kept: Tensor, again: Tensor) -> None:
    # Sums in another order may turn a token in thousands; what is wrong turns most of those that follow.
    differing = (kept.int() - again.int()).abs().gt(1).float().mean().item()
    if differing > _MOST_DIFFERING:
        raise RuntimeError(f"{differing:.1%} of VQ-AR's pixels depend on whether keys are kept")


def _times(table: dict[str, dict[str, float]], beside: str) -> dict[str, dict[str, float]]:
    return {
        grid: {name: row[beside] / value for name, value in row.items() if name not in (KEPT, AGAIN)}
        for grid, row in table.items()
    }


def _shown(problem: AutoregressionProblem) -> int:
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
    # Pictures of little to decode, the same on both sides: it is the drawing of tokens that is compared.
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
    drawings[KEPT] = lambda: ar.generate_batch(prompts, slots, guidance=alone)
    drawings[AGAIN] = lambda: ar.generate_batch(prompts, slots, guidance=alone, use_cache=False)
    counted = {
        "diffusion": sum(value.numel() for value in diffusion.bundle.model.parameters()),
        "ar": sum(value.numel() for value in ar.bundle.model.parameters()),
    }
    return drawings, counted
