"""``cost``: parameters, FLOPs and sampling time of an untrained denoiser."""

import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from vqd_scale.cli.base import RunConfigOptions, Tool
from vqd_scale.core.atomic_io import check_file, publish_json
from vqd_scale.nn.config import ClassCondition, TextCondition
from vqd_scale.training.tasks.config import TrainConfig

if TYPE_CHECKING:
    from torch import nn

_IMAGES = 50_000
"""Number of images for which hours are reported: the sample count of a published FID."""

main = Tool()
"""Entry point of ``tools/cost.py``."""


@main.command(
    "python tools/cost.py configs/vq-ddm/celeba.yaml --codebook-size 1024 --grid 16 16 --steps 25 --steps 100"
)
def cost(
    options: RunConfigOptions,
    codebook_size: Annotated[
        int, typer.Option(min=1, max=1 << 20, help="number of codes of the tokenizer")
    ] = 1024,
    grid: Annotated[
        tuple[int, int], typer.Option(min=1, max=1024, metavar="ROWS COLUMNS", help="token grid")
    ] = (16, 16),
    steps: Annotated[
        list[int] | None,
        typer.Option(min=1, metavar="N", help="sampling steps of an image; repeatable (default: 100)"),
    ] = None,
    context_length: Annotated[
        int, typer.Option(min=1, max=1 << 16, help="positions of a caption, if any")
    ] = 77,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="time a forward pass of this batch size here; adds hours")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="JSON file for the result")] = None,
) -> None:
    """Compute parameters and operations of a denoiser, per forward pass and per image.

    An operation is a multiplication or an addition; a multiply-add is two.
    """
    config = options.load(TrainConfig)
    if output is not None:
        check_file(output)

    import torch
    from torch import nn

    from vqd_scale.core.provenance import provenance
    from vqd_scale.nn.flops import forward_flops

    def build() -> nn.Module:
        return cast(nn.Module, config.denoiser.build(codebook_size, grid, config.diffusion.steps))

    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in build().parameters())
    length = grid[0] * grid[1]
    flops = forward_flops(build, length, config.denoiser.condition, context_length, timed=True)
    seconds = None if batch_size is None else _seconds(build(), config, length, context_length, batch_size)
    rows = [_row(number, flops, seconds) for number in steps or [100]]
    result = {
        "parameters": parameters,
        "multiply_adds_per_evaluation": flops // 2,
        "flops_per_evaluation": flops,
        "images": rows,
        **({} if seconds is None else {"seconds_per_evaluation": seconds, "batch_size": batch_size}),
        **provenance(),
    }
    if output is not None:
        publish_json(output, result)
    print(f"{parameters / 1e6:.1f}M parameters, {flops / 2e9:.3f} G multiply-adds per forward pass")
    for row in rows:
        hours = f", {row['hours_per_50k']:.2f} hours for 50,000" if "hours_per_50k" in row else ""
        print(f"{row['steps']:>6} steps: {row['flops'] / 1e12:.3f} TFLOP per image{hours}")


def _row(steps: int, flops: int, seconds: float | None) -> dict[str, Any]:
    row: dict[str, Any] = {"steps": steps, "multiply_adds": steps * flops // 2, "flops": steps * flops}
    return row if seconds is None else {**row, "hours_per_50k": steps * seconds * _IMAGES / 3600}


def _seconds(
    network: "nn.Module", config: TrainConfig, length: int, context_length: int, batch_size: int
) -> float:
    """Measure the seconds per image of one forward pass with untrained weights; median of five batches."""
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    condition = config.denoiser.condition
    network = network.to(device).eval()
    features = None
    if isinstance(condition, TextCondition):
        features = torch.zeros(batch_size, context_length, condition.width, device=device)
    if isinstance(condition, ClassCondition):
        features = torch.zeros(batch_size, dtype=torch.int64, device=device)
    tokens = torch.zeros(batch_size, length, dtype=torch.int64, device=device)
    times = torch.zeros(batch_size, dtype=torch.int64, device=device)
    durations: list[float] = []
    with torch.no_grad():
        for _ in range(6):
            began = time.perf_counter()
            network(tokens, times, features)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            durations.append(time.perf_counter() - began)
    return statistics.median(durations[1:]) / batch_size
