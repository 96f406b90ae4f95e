"""Numbers of users: every numeric option of every tool refuses what it cannot use, without torch."""

import importlib
import inspect
from typing import Any, get_args

import pytest
from typer.models import ArgumentInfo, OptionInfo

from tests.tools.test_start import TOOLS, Start, start

__all__ = ["start"]

ZEROS = {"guidance_scale", "seed", "index", "gpus_per_node", "max_requeues", "images", "top_p", "worker"}
"""Options for which 0 has a meaning."""
OWN_CHECKS = {"num_workers", "worker"}
"""Options of a worker, which are checked together."""


def numeric_options() -> list[tuple[list[str], str, int]]:
    """Return each option: words of the command with its required arguments, name, number of values."""
    cases: list[tuple[list[str], str, int]] = []
    for tool in TOOLS:
        if tool == "benchmark":
            continue
        module = importlib.import_module(f"vqd_scale.cli.{tool}")
        commands = getattr(module, "_tool", module.main)._app.registered_commands
        for command in commands:
            name = command.name or command.callback.__name__
            words = [tool] if len(commands) == 1 else [tool, name]
            parameters = inspect.signature(command.callback).parameters
            options: list[tuple[str, int]] = []
            for key, parameter in parameters.items():
                kind, *metadata = get_args(parameter.annotation) or (None,)
                info: Any = next(
                    (each for each in metadata if isinstance(each, ArgumentInfo | OptionInfo)), None
                )
                flag = f"--{key.replace('_', '-')}"
                if parameter.default is inspect.Parameter.empty:
                    words += ["/nowhere"] if isinstance(info, ArgumentInfo) else [flag, "/nowhere"]
                elif isinstance(info, OptionInfo) and not info.hidden and {int, float} & {kind, *flat(kind)}:
                    options.append((key, 2 if flat(kind) == [int, int] else 1))
            cases += [(words, key, count) for key, count in options]
    return cases


def flat(kind: object) -> list[object]:
    return [inner for each in get_args(kind) for inner in (get_args(each) or [each])]


@pytest.mark.parametrize("value", ["0", "-1", "nan", "1e38", str(10**30)])
@pytest.mark.parametrize(
    ("words", "key", "count"),
    numeric_options(),
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_number_that_no_tool_can_use_is_refused(
    start: Start, words: list[str], key: str, count: int, value: str
) -> None:
    option = f"--{key.replace('_', '-')}"
    answer = start(*words, option, *[value] * count)
    assert answer.code == 2, answer
    assert "Traceback" not in answer.errors
    if key in OWN_CHECKS or (value == "0" and key in ZEROS):
        return
    assert option in answer.errors or {"top_p": "truncation.p"}.get(key, option) in answer.errors
