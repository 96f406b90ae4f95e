"""Measurements side by side with the alternative, in one run, written as JSON.

Every benchmark writes ``ours``, ``alternative`` (seconds), ``ratio`` (alternative / ours), ``memory_ratio``
(our extra peak memory / the alternative's), ``machine``, ``versions`` and ``commit``.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.autoregression import benchmark_autoregression
from benchmarks.checkpoint import benchmark_checkpoint
from benchmarks.construction import benchmark_construction
from benchmarks.loader import benchmark_loader
from benchmarks.loss import benchmark_loss
from benchmarks.plan import benchmark_plan
from benchmarks.s3 import benchmark_s3
from benchmarks.sample import benchmark_sample
from benchmarks.seeding import benchmark_seeding
from benchmarks.step import benchmark_layer, benchmark_step

from vqd_scale.cli.base import run_tool, tool_parser
from vqd_scale.core.atomic_io import publish_json
from vqd_scale.core.provenance import provenance

BENCHMARKS: dict[str, Callable[[int], dict[str, Any]]] = {
    "autoregression": benchmark_autoregression,
    "checkpoint": benchmark_checkpoint,
    "construction": benchmark_construction,
    "layer": benchmark_layer,
    "loader": benchmark_loader,
    "loss": benchmark_loss,
    "plan": benchmark_plan,
    "s3": benchmark_s3,
    "sample": benchmark_sample,
    "seeding": benchmark_seeding,
    "step": benchmark_step,
}
"""By name: rounds -> figures."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of ``tools/benchmark.py``."""
    parser = tool_parser(
        "Measure a part of the trainer beside its alternative, on this machine, in one run.",
        "python tools/benchmark.py loss --json runs/benchmarks/loss.json",
    )
    parser.add_argument("name", choices=sorted(BENCHMARKS), help="what to measure")
    parser.add_argument("--json", type=Path, help="write the result there")
    parser.add_argument("--rounds", type=int, default=5, help="how often each side is timed, in turn")
    run_tool(parser, _run, arguments)


def _run(arguments: argparse.Namespace) -> None:
    result = BENCHMARKS[arguments.name](arguments.rounds)
    result |= {"benchmark": arguments.name, **provenance()}
    if arguments.json is not None:
        publish_json(arguments.json, result)
    for key, value in result.items():
        print(f"{key:>24}  {value}")
