"""``cost``: parameters, FLOPs and sampling time of an untrained denoiser."""

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from vqd_scale.cli.base import add_override_arguments, run_tool, tool_parser
from vqd_scale.core.atomic_io import publish_json
from vqd_scale.core.config import load_config
from vqd_scale.core.provenance import provenance
from vqd_scale.nn.denoiser import ClassCondition, TextCondition
from vqd_scale.nn.flops import forward_flops
from vqd_scale.nn.network import build_network
from vqd_scale.training.tasks.denoising import TrainConfig

_PICTURES = 50_000
"""Number of images for which hours are reported: the sample count of a published FID."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of ``tools/cost.py``."""
    parser = tool_parser(
        "Count a denoiser's parameters, and its multiply-adds and operations (two each) for one evaluation "
        "and for a picture at several numbers of sampling steps.",
        "python tools/cost.py configs/vq-ddm/celeba.yaml --codes 1024 --grid 16 16 --steps 25 100 4000",
    )
    parser.add_argument("config", type=Path, help="the configuration of a run that trains a denoiser")
    add_override_arguments(parser)
    parser.add_argument("--codes", type=int, default=1024, help="K of the tokenizer (1024)")
    parser.add_argument(
        "--grid", type=int, nargs=2, default=[16, 16], metavar=("ROWS", "COLUMNS"), help="tokens (16 16)"
    )
    parser.add_argument("--steps", type=int, nargs="+", default=[100], help="evaluations of a picture (100)")
    parser.add_argument("--positions", type=int, default=77, help="of a caption, where there is one (77)")
    parser.add_argument(
        "--measure",
        type=int,
        metavar="BATCH",
        help="batch size of a forward pass to time on this machine, for hours",
    )
    parser.add_argument("--json", type=Path, help="write the result there")
    run_tool(parser, _count, arguments)


def _count(arguments: argparse.Namespace) -> None:
    config = load_config(TrainConfig, arguments.config, arguments.overrides)
    grid = (arguments.grid[0], arguments.grid[1])

    def build() -> nn.Module:
        return cast(nn.Module, build_network(config.denoiser, arguments.codes, grid, config.diffusion.steps))

    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in build().parameters())
    flops = forward_flops(
        build, grid[0] * grid[1], config.denoiser.condition, arguments.positions, timed=True
    )
    seconds = None if arguments.measure is None else _seconds(build(), config, grid, arguments)
    rows = [_row(steps, flops, seconds) for steps in arguments.steps]
    result = {
        "parameters": parameters,
        "multiply_adds_per_evaluation": flops // 2,
        "flops_per_evaluation": flops,
        "pictures": rows,
        **({} if seconds is None else {"seconds_per_evaluation": seconds, "batch": arguments.measure}),
        **provenance(),
    }
    if arguments.json is not None:
        publish_json(arguments.json, result)
    print(f"{parameters / 1e6:.1f}M parameters, {flops / 2e9:.3f} G multiply-adds an evaluation")
    for row in rows:
        hours = f", {row['hours_per_50k']:.2f} hours for 50,000" if "hours_per_50k" in row else ""
        print(f"{row['steps']:>6} steps: {row['flops'] / 1e12:.3f} TFLOP a picture{hours}")


def _row(steps: int, flops: int, seconds: float | None) -> dict[str, Any]:
    row: dict[str, Any] = {"steps": steps, "multiply_adds": steps * flops // 2, "flops": steps * flops}
    return row if seconds is None else {**row, "hours_per_50k": steps * seconds * _PICTURES / 3600}


@torch.no_grad()
def _seconds(
    network: nn.Module, config: TrainConfig, grid: tuple[int, int], arguments: argparse.Namespace
) -> float:
    """Measure the seconds per image of one forward pass with untrained weights; median of five batches."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batch, condition = arguments.measure, config.denoiser.condition
    network = network.to(device).eval()
    told = None
    if isinstance(condition, TextCondition):
        told = torch.zeros(batch, arguments.positions, condition.width, device=device)
    if isinstance(condition, ClassCondition):
        told = torch.zeros(batch, dtype=torch.int64, device=device)
    tokens = torch.zeros(batch, grid[0] * grid[1], dtype=torch.int64, device=device)
    times = torch.zeros(batch, dtype=torch.int64, device=device)
    taken: list[float] = []
    for _ in range(6):
        began = time.perf_counter()
        network(tokens, times, told)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - began)
    return statistics.median(taken[1:]) / batch
