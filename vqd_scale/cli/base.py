"""Functions shared by all command-line tools: argument parsing and exit codes."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from vqd_scale.core.atomic_io import Location, parse_location
from vqd_scale.core.config import ConfigType, load_config, to_yaml
from vqd_scale.core.errors import USER_ERROR_EXIT_CODE, FirstRankError, UserError


def tool_parser(description: str, example: str) -> argparse.ArgumentParser:
    """Return an argument parser whose ``--help`` ends with a complete example command."""
    return argparse.ArgumentParser(
        description=description,
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_config_arguments(parser: argparse.ArgumentParser, *, file_required: bool) -> None:
    """Add arguments for the configuration file, ``a.b=value`` overrides and ``--print-config``."""
    parser.add_argument(
        "config",
        type=Path,
        nargs=None if file_required else "?",
        help="YAML file: differences from the defaults",
    )
    add_override_arguments(parser)


def add_override_arguments(parser: argparse.ArgumentParser) -> None:
    """Add arguments for ``a.b=value`` overrides and ``--print-config``, without a configuration file."""
    parser.add_argument(
        "overrides", nargs="*", metavar="a.b=value", help="configuration keys to set, last wins"
    )
    parser.add_argument("--print-config", action="store_true", help="print the whole configuration and leave")


def config_from(
    kind: type[ConfigType] | tuple[type[ConfigType], ...], arguments: argparse.Namespace
) -> ConfigType:
    """Load the configuration from parsed arguments; with ``--print-config``, print it and exit.

    Args:
        kind: As for `load_config`.
        arguments: Parsed arguments of `add_config_arguments` or `add_override_arguments`.

    Raises:
        UserError: A key or value is wrong.
        SystemExit: ``--print-config`` was given.
    """
    path: Path | None = getattr(arguments, "config", None)
    config = load_config(kind, path, arguments.overrides)
    if arguments.print_config:
        sys.stdout.write(to_yaml(config))
        raise SystemExit(0)
    return config


def location_from(text: str) -> Location:
    """Parse a path or an S3 address given as an argument.

    Raises:
        UserError: The text is neither.
    """
    try:
        return parse_location(text)
    except ValueError as error:
        raise UserError(f"{error}.") from None


def run_tool(
    parser: argparse.ArgumentParser,
    command: Callable[[argparse.Namespace], None],
    arguments: Sequence[str] | None,
) -> None:
    """Parse arguments and run a command; a `UserError` becomes one sentence on stderr and exit code 2.

    Raises:
        SystemExit: With code 2 after a `UserError`; with 130 after Ctrl-C.
    """
    try:
        command(parser.parse_intermixed_args(arguments))
    except UserError as error:
        if not (isinstance(error, FirstRankError) or _is_an_echo()):
            print(f"{parser.prog}: {error}", file=sys.stderr)
        raise SystemExit(USER_ERROR_EXIT_CODE) from None
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted; the same command goes on from here.", file=sys.stderr)
        raise SystemExit(130) from None


def _is_an_echo() -> bool:
    """Return whether this rank repeats rank 0's error, raised before the process group was initialized."""
    distributed = sys.modules.get("torch.distributed")
    return int(os.environ.get("RANK", "0")) > 0 and not (distributed and distributed.is_initialized())
