"""Sampling against diffusers' ``VQDiffusionPipeline``: the same weights, prompt, guidance and steps."""

import functools
import importlib
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from benchmarks.measuring import extra_peak, in_fresh_process
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from vqd_scale.core.errors import UserError
from vqd_scale.core.progress import progress
from vqd_scale.diffusion.config import ConstantGuidance, LegacyDiffusers, Released
from vqd_scale.diffusion.guidance import apply_guidance
from vqd_scale.diffusion.sampling_plan import SamplerContext, SamplerNoise
from vqd_scale.models.bundle import Bundle, Model
from vqd_scale.models.conditions import conditions_of
from vqd_scale.models.config import BundleConfig
from vqd_scale.models.exchange.diffusers import plan_diffusers
from vqd_scale.models.exchange.export import export_diffusers
from vqd_scale.models.pipeline import TextToImage, image_slots
from vqd_scale.nn.config import DenoiserConfig, TextCondition
from vqd_scale.text.config import Tower
from vqd_scale.tokenizers.config import TamingVQConfig
from vqd_scale.tokenizers.taming import TamingVQ

LEAST_EQUAL = 0.9999
"""Minimum fraction of equal tokens after one step from the same tokens and noise."""

Side = Callable[[Path, "SampleProblem"], Callable[[], object]]
"""Function from the folder and the sizes to a function that generates one image."""


@dataclass(frozen=True)
class SampleProblem:
    """Sizes of one image of 256 x 256 pixels with a codebook of the released size.

    Attributes:
        width: Width of the network.
        layers: Number of blocks.
        side: Rows and columns of tokens.
        codes: Codebook size K.
        channels: Channels of the tokenizer at its finest level.
        steps: Network evaluations.
        guidance: Scale of classifier-free guidance.
        prompt: The caption.
    """

    width: int = 256
    layers: int = 6
    side: int = 32
    codes: int = 2887
    channels: int = 32
    steps: int = 10
    guidance: float = 5.0
    prompt: str = "a red bus in the rain"

    def write(self, folder: Path) -> None:
        """Write a model with random weights as a folder that both sides load."""
        torch.manual_seed(0)
        config = BundleConfig(
            codebook_size=self.codes,
            grid=(self.side, self.side),
            denoiser=DenoiserConfig(
                width=self.width,
                layers=self.layers,
                heads=max(1, self.width // 64),
                condition=TextCondition(width=128),
                # Predictions of random weights should differ between positions, as a trained network's do.
                init_std=0.1,
            ),
            text=Tower(width=128, heads=2, layers=2),
            diffusion=Released(),
        )
        tokenizer = TamingVQ(TamingVQConfig(codebook_size=self.codes, channels=self.channels))
        export_diffusers(Bundle(config, Model(config), tokenizer), folder)


def package_pipeline(
    folder: Path, problem: SampleProblem, dtype: torch.dtype = torch.float32
) -> Callable[[], object]:
    """Return the package's pipeline from a prompt to pixels, with its exact strided posterior."""
    pipe = TextToImage(plan_diffusers(folder).bundle()).to(dtype)
    return lambda: pipe(problem.prompt, steps=problem.steps, guidance=problem.guidance, progress=False)


def diffusers_pipeline(folder: Path, problem: SampleProblem) -> Callable[[], object]:
    """Return diffusers' pipeline from a prompt to pixels, with its own steps."""
    pipe = load_diffusers_pipeline(folder)
    return lambda: pipe(
        problem.prompt, num_inference_steps=problem.steps, guidance_scale=problem.guidance, output_type="np"
    )


package_pipeline_in_bfloat16 = functools.partial(package_pipeline, dtype=torch.bfloat16)


def benchmark_sample(rounds: int, problem: SampleProblem | None = None) -> dict[str, Any]:
    """Measure one image at a time on the CPU, from a prompt to pixels.

    The package must first reproduce every step of diffusers from the same tokens and noise. ``ratio_bf16``
    compares diffusers in float32 with the package in bfloat16, which diffusers' pipeline does not support.

    Args:
        rounds: Number of timings per side, in turn; the median is reported.
        problem: Sizes of the benchmark.

    Raises:
        UserError: diffusers is not installed.
        RuntimeError: The two sides sample different tokens.
    """
    problem = SampleProblem() if problem is None else problem
    sides: dict[str, Side] = {
        "ours": package_pipeline,
        "ours_bf16": package_pipeline_in_bfloat16,
        "alternative": diffusers_pipeline,
    }
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        problem.write(folder / "pipeline")
        equal = equal_tokens(folder / "pipeline", problem)
        if equal < LEAST_EQUAL:
            raise RuntimeError(f"only {equal:.2%} of the sampled tokens are equal")
        memory = {
            name: in_fresh_process(functools.partial(_extra_peak, side, folder / "pipeline", problem))
            for name, side in sides.items()
        }
        drawings = {name: side(folder / "pipeline", problem) for name, side in sides.items()}
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        for _ in progress(range(rounds), "sample", rounds):
            for name, draw in drawings.items():
                started = time.perf_counter()
                draw()
                seconds[name].append(time.perf_counter() - started)
    return _figures({name: median(values) for name, values in seconds.items()}, memory, equal, problem)


def _figures(
    medians: Mapping[str, float], memory: Mapping[str, int], equal: float, problem: SampleProblem
) -> dict[str, Any]:
    return {
        **medians,
        "ratio": medians["alternative"] / medians["ours"],
        "ratio_bf16": medians["alternative"] / medians["ours_bf16"],
        "memory_ratio": memory["ours"] / memory["alternative"],
        "extra_peak_megabytes": {name: round(value / 1e6, 1) for name, value in memory.items()},
        "equal_tokens": equal,
        "width": problem.width,
        "layers": problem.layers,
        "tokens": problem.side**2,
        "codes": problem.codes,
        "steps": problem.steps,
        "guidance": problem.guidance,
    }


def load_diffusers_pipeline(folder: Path) -> Any:  # noqa: ANN401 - of a library that need not be there
    """Return diffusers' pipeline, without its progress bar.

    Raises:
        UserError: diffusers is not installed.
    """
    try:
        # diffusers warns of its own deprecated functions.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pipe = importlib.import_module("diffusers").VQDiffusionPipeline.from_pretrained(folder)
    except ImportError:
        raise UserError(
            "diffusers and transformers are not installed; install the package's extra 'test'."
        ) from None
    pipe.set_progress_bar_config(disable=True)
    return pipe


def equal_tokens(folder: Path, problem: SampleProblem) -> float:
    """Return the fraction of equal tokens over all steps of diffusers and of `LegacyDiffusers`.

    Each step starts from the tokens of diffusers and uses its random numbers.

    Raises:
        UserError: diffusers is not installed.
    """
    diffusers_pipe, pipe = load_diffusers_pipeline(folder), TextToImage(plan_diffusers(folder).bundle())
    length, states = problem.side**2, problem.codes + 1
    visited = [torch.full((1, length), problem.codes)]

    def visit(step: int, t: int, tokens: Tensor) -> None:
        del step, t
        visited.append(tokens.clone())

    diffusers_pipe(
        problem.prompt,
        num_inference_steps=problem.steps,
        guidance_scale=problem.guidance,
        generator=torch.Generator().manual_seed(0),
        callback=visit,
        output_type="np",
    )
    conditions = conditions_of(pipe.bundle, [problem.prompt], None)
    predict = apply_guidance(*pipe.predictions(conditions), ConstantGuidance(scale=problem.guidance))
    sampler, generator = LegacyDiffusers(steps=problem.steps), torch.Generator().manual_seed(0)
    plan = sampler.build().plan(pipe.transition, pipe.transition.steps - 1)
    equal = 0
    for number, step in enumerate(plan):
        # diffusers' last step has no row for the mask.
        uniform_numbers = torch.rand(1, states - (step.s < 0), length, generator=generator)
        noise = _SameNoise(0, image_slots(0, 1), length, number, uniform_numbers)
        free = torch.ones(1, length, dtype=torch.bool)
        context = SamplerContext(pipe.transition, step, noise, free, free.sum(-1), pipe.transition.steps - 1)
        tokens = sampler.build().advance(
            visited[number], predict(visited[number], step.network_time), context
        )
        equal += int((tokens == visited[number + 1]).sum())
    return equal / (length * len(plan))


@dataclass(frozen=True)
class _SameNoise(SamplerNoise):
    """The random numbers of diffusers for one step."""

    numbers: Float[Tensor, "batch states length"]

    def gumbel(self, states: int) -> Float[Tensor, "batch length states"]:
        gumbel = -torch.log(-torch.log(self.numbers + 1e-30) + 1e-30).transpose(1, 2)
        # The package's last step has a row for the mask as well, which has probability 0.
        return functional.pad(gumbel, (0, states - gumbel.shape[-1]))


def _extra_peak(side: Side, folder: Path, problem: SampleProblem) -> int:
    """Return the increase of resident memory over a loaded pipeline for the first image."""
    return extra_peak(side(folder, problem))
