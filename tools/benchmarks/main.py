"""Measurements side by side with the alternative, in one run, written as JSON.

Every benchmark writes ``ours``, ``alternative`` (seconds), ``ratio`` (alternative / ours), ``memory_ratio``
(our extra peak memory / the alternative's), ``machine``, ``versions`` and ``commit``.
"""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from vqd_scale.cli.base import Tool
from vqd_scale.core.atomic_io import publish_json

Benchmark = Literal[
    "autoregression",
    "checkpoint",
    "construction",
    "layer",
    "loader",
    "loss",
    "plan",
    "s3",
    "sample",
    "seeding",
    "step",
]
_MODULES = {"layer": "step"}
"""Module of each benchmark that has no module of its own name."""

main = Tool()
"""Entry point of ``tools/benchmark.py``."""


@main.command("python tools/benchmark.py loss --output runs/benchmarks/loss.json")
def benchmark(
    name: Annotated[Benchmark, typer.Argument(metavar="NAME", help="component to measure")],
    output: Annotated[Path | None, typer.Option(help="JSON file for the result")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="number of times that each side is timed, in turn")] = 5,
) -> None:
    """Measure a component beside its alternative, on this machine, in one run."""
    from vqd_scale.core.provenance import provenance

    module = importlib.import_module(f"benchmarks.{_MODULES.get(name, name)}")
    measure: Callable[[int], dict[str, Any]] = getattr(module, f"benchmark_{name}")
    result = measure(rounds) | {"benchmark": name, **provenance()}
    if output is not None:
        publish_json(output, result)
    for key, value in result.items():
        print(f"{key:>24}  {value}")
