"""Sampling beside diffusers' ``VQDiffusionPipeline``: the same weights, prompt, guidance and steps."""

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
from vqd_scale.diffusion.guidance import ConstantGuidance, apply_guidance
from vqd_scale.diffusion.samplers import LegacyDiffusers
from vqd_scale.diffusion.sampling_plan import SamplerContext, SamplerNoise
from vqd_scale.diffusion.schedule import Released
from vqd_scale.models.bundle import Bundle, BundleConfig, Model
from vqd_scale.models.conditions import conditions_of
from vqd_scale.models.exchange.diffusers import read_diffusers
from vqd_scale.models.exchange.export import export_diffusers
from vqd_scale.models.pipeline import TextToImage, image_slots
from vqd_scale.nn.denoiser import DenoiserConfig, TextCondition
from vqd_scale.text.clip import Tower
from vqd_scale.tokenizers.taming import TamingVQ, TamingVQConfig

LEAST_EQUAL = 0.9999
"""The share of tokens that one step from the same tokens, with the same noise, must draw alike."""

Side = Callable[[Path, "SampleProblem"], Callable[[], object]]
"""From the folder and the sizes to the drawing of one picture."""


@dataclass(frozen=True)
class SampleProblem:
    """What is drawn: one picture of 256 x 256 pixels from a codebook of the released size.

    Attributes:
        width: Of the network.
        layers: Its blocks.
        side: Rows and columns of tokens.
        codes: K.
        channels: Of the tokenizer at its finest level.
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
        """A model of random weights as a folder that both sides load."""
        torch.manual_seed(0)
        config = BundleConfig(
            codebook_size=self.codes,
            grid=(self.side, self.side),
            denoiser=DenoiserConfig(
                width=self.width,
                layers=self.layers,
                heads=max(1, self.width // 64),
                condition=TextCondition(width=128),
                # Predictions of random weights should differ from place to place, as a trained network's do.
                init_std=0.1,
            ),
            text=Tower(width=128, heads=2, layers=2),
            diffusion=Released(),
        )
        tokenizer = TamingVQ(TamingVQConfig(codebook_size=self.codes, channels=self.channels))
        export_diffusers(Bundle(config, Model(config), tokenizer), folder)


def ours(folder: Path, problem: SampleProblem, dtype: torch.dtype = torch.float32) -> Callable[[], object]:
    """Our pipeline, from a prompt to pixels, by its exact strided posterior."""
    pipe = TextToImage(read_diffusers(folder)).to(dtype)
    return lambda: pipe(problem.prompt, steps=problem.steps, guidance=problem.guidance, progress=False)


def alternative(folder: Path, problem: SampleProblem) -> Callable[[], object]:
    """The pipeline of diffusers, from a prompt to pixels, by its own steps."""
    pipe = their_pipeline(folder)
    return lambda: pipe(
        problem.prompt, num_inference_steps=problem.steps, guidance_scale=problem.guidance, output_type="np"
    )


ours_in_bfloat16 = functools.partial(ours, dtype=torch.bfloat16)


def benchmark_sample(rounds: int, problem: SampleProblem | None = None) -> dict[str, Any]:
    """One picture at a time on the CPU, from a prompt to pixels.

    Before anything is measured, every step of diffusers must be ours, too: from the same tokens, with the
    same noise. ``ratio_bf16`` is diffusers in float32 to ours in bfloat16, in which its pipeline cannot give
    pictures.

    Args:
        rounds: How often each side is timed, in turn; the median counts.
        problem: The sizes.

    Raises:
        UserError: diffusers is not installed.
        RuntimeError: The two sides draw different tokens.
    """
    problem = SampleProblem() if problem is None else problem
    sides: dict[str, Side] = {"ours": ours, "ours_bf16": ours_in_bfloat16, "alternative": alternative}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        problem.write(folder / "pipeline")
        equal = equal_tokens(folder / "pipeline", problem)
        if equal < LEAST_EQUAL:
            raise RuntimeError(f"only {equal:.2%} of the tokens are drawn alike")
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


def their_pipeline(folder: Path) -> Any:  # noqa: ANN401 - of a library that need not be there
    """The pipeline of diffusers, without its bar.

    Raises:
        UserError: diffusers is not installed.
    """
    try:
        # It warns of its own deprecated ways.
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
    """The share of tokens alike when every step of diffusers is drawn by our pipeline and `LegacyDiffusers`.

    Each step is given the tokens that diffusers had reached, and the numbers that it drew.

    Raises:
        UserError: diffusers is not installed.
    """
    theirs, pipe = their_pipeline(folder), TextToImage(read_diffusers(folder))
    length, states = problem.side**2, problem.codes + 1
    visited = [torch.full((1, length), problem.codes)]

    def visit(step: int, t: int, tokens: Tensor) -> None:
        del step, t
        visited.append(tokens.clone())

    theirs(
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
    plan = sampler.plan(pipe.transition, pipe.transition.steps - 1)
    equal = 0
    for number, step in enumerate(plan):
        # Its last step has no row for the mask.
        drawn = torch.rand(1, states - (step.s < 0), length, generator=generator)
        noise = _SameNoise(0, image_slots(0, 1), length, number, drawn)
        free = torch.ones(1, length, dtype=torch.bool)
        moment = SamplerContext(pipe.transition, step, noise, free, free.sum(-1), pipe.transition.steps - 1)
        tokens = sampler.advance(visited[number], predict(visited[number], step.network_time), moment)
        equal += int((tokens == visited[number + 1]).sum())
    return equal / (length * len(plan))


@dataclass(frozen=True)
class _SameNoise(SamplerNoise):
    """The numbers that diffusers drew for one step."""

    drawn: Float[Tensor, "batch states length"]

    def gumbel(self, states: int) -> Float[Tensor, "batch length states"]:
        numbers = -torch.log(-torch.log(self.drawn + 1e-30) + 1e-30).transpose(1, 2)
        # Ours has a row for the mask in the last step, too, which cannot be drawn.
        return functional.pad(numbers, (0, states - numbers.shape[-1]))


def _extra_peak(side: Side, folder: Path, problem: SampleProblem) -> int:
    """How far resident memory rises above a loaded pipeline in the first drawing."""
    return extra_peak(side(folder, problem))
