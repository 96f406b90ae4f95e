"""Command lines on typer: groups of options shared by several tools, help with an example, exit codes."""

import dataclasses
import inspect
import math
import os
import select
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn, ParamSpec, get_args, get_origin, get_type_hints

import typer
from typer.models import OptionInfo

from vqd_scale.core.atomic_io import Location, parse_location
from vqd_scale.core.config import ConfigType, load_config, to_yaml
from vqd_scale.core.environment import OWN_LOG, place_among_ranks
from vqd_scale.core.errors import USER_ERROR_EXIT_CODE, FirstRankError, UserError
from vqd_scale.core.s3 import S3Path
from vqd_scale.core.terminal import escaped_output, shortened

INTERRUPTED = 130
BROKEN_PIPE = 141
_LONGEST_SENTENCE = 2000
_LARGEST_NUMBER = 10**12
_STDOUT = 1

Parameters = ParamSpec("Parameters")


class Tool:
    """Command line of one tool: a single command, or several subcommands.

    Args:
        description: Help of a tool with subcommands.
        example: Complete command at the end of that help.
    """

    def __init__(self, description: str | None = None, example: str = "") -> None:
        self._app = typer.Typer(
            help=description,
            epilog=_epilog(example),
            rich_markup_mode=None,
            pretty_exceptions_enable=False,
            add_completion=False,
        )

    def command(
        self, example: str, name: str | None = None
    ) -> Callable[[Callable[Parameters, None]], Callable[Parameters, None]]:
        """Return a decorator that registers a function as a command; its docstring is the help.

        A parameter whose type is a dataclass stands for one parameter for each field.

        Args:
            example: Complete command at the end of the help.
            name: Name of the subcommand; the function's own if not given.
        """

        def register(function: Callable[Parameters, None]) -> Callable[Parameters, None]:
            self._app.command(name, epilog=_epilog(example))(_flattened(function))
            return function

        return register

    @escaped_output()
    def __call__(self, arguments: Sequence[str] | None = None) -> None:
        """Run the tool; a `UserError` becomes one sentence on stderr and exit code 2.

        Args:
            arguments: Arguments; those of the process if not given.

        Raises:
            SystemExit: With code 2 after a `UserError` or wrong usage; with 130 after Ctrl-C; with 141 if the
                reader of the output has left, as ``head`` does.
        """
        words = sys.argv[1:] if arguments is None else list(arguments)
        try:
            typer.main.get_command(self._app).main(words, prog_name=_program())
        except UserError as error:
            if not isinstance(error, FirstRankError) and _is_first_to_print(str(error)):
                sentence = shortened(str(error), _LONGEST_SENTENCE).replace("\n", "\\n")
                print(f"{_program()}: {sentence}", file=sys.stderr)
            raise SystemExit(USER_ERROR_EXIT_CODE) from None
        except SystemExit as end:
            if end.code:
                raise
        finally:
            try:
                sys.stdout.flush()
            except BrokenPipeError:
                _discard_output()


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConfigOptions:
    """Optional configuration file, ``a.b=value`` overrides and ``--print-config``."""

    config: Annotated[Path | None, typer.Option(help="YAML file with differences from the defaults")] = None
    overrides: Annotated[
        list[str],
        typer.Argument(metavar="a.b=value", help="configuration keys to set; the last one wins"),
    ] = dataclasses.field(default_factory=list)
    print_config: Annotated[
        bool, typer.Option("--print-config", help="print the resolved configuration and exit")
    ] = False

    def load(self, kind: type[ConfigType] | tuple[type[ConfigType], ...], *overrides: str) -> ConfigType:
        """Load the configuration; with ``--print-config``, print it and exit.

        Args:
            kind: As for `load_config`.
            *overrides: Further overrides, which other options stand for.

        Raises:
            UserError: A key or value is wrong.
            Exit: ``--print-config`` is set.
        """
        config = load_config(kind, self.config, [*self.overrides, *overrides])
        if self.print_config:
            print(to_yaml(config), end="")
            raise typer.Exit
        return config


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfigOptions(ConfigOptions):
    """Configuration file, ``a.b=value`` overrides and ``--print-config``."""

    config: Annotated[
        Path, typer.Argument(metavar="CONFIG", help="YAML file with differences from the defaults")
    ] = dataclasses.field()


def location_from(text: str) -> Location:
    """Parse a path or an S3 address given as an argument.

    Raises:
        UserError: The text is neither.
    """
    try:
        return parse_location(text)
    except ValueError as error:
        raise UserError(f"{error}.") from None


def _flattened(function: Callable[..., None]) -> Callable[..., None]:
    """Return a function that has the fields of dataclass parameters as parameters of its own."""
    groups: dict[str, Any] = {}
    parameters: list[inspect.Parameter] = []

    def add(name: str, annotation: Any, default: object) -> None:  # noqa: ANN401 - an annotation
        annotation = _bounded(_without_location(annotation))
        kind = inspect.Parameter.KEYWORD_ONLY
        parameters.append(inspect.Parameter(name, kind, default=default, annotation=annotation))

    for parameter in inspect.signature(function).parameters.values():
        if not dataclasses.is_dataclass(parameter.annotation):
            add(parameter.name, parameter.annotation, parameter.default)
            continue
        groups[parameter.name] = group = parameter.annotation
        annotations = get_type_hints(group, include_extras=True)
        for field in dataclasses.fields(group):
            default = inspect.Parameter.empty if field.default is dataclasses.MISSING else field.default
            if field.default_factory is not dataclasses.MISSING:
                default = field.default_factory()
            add(field.name, annotations[field.name], default)

    def command(**values: Any) -> None:  # noqa: ANN401 - typer passes each parameter in its own type
        for name, value in values.items():
            if isinstance(value, float) and not math.isfinite(value):
                option = f"--{name.replace('_', '-')}"
                raise UserError(f"{option}: given {value}, allowed: a finite number.")
        for name, group in groups.items():
            names = [field.name for field in dataclasses.fields(group)]
            values[name] = group(**{field: values.pop(field) for field in names})
        try:
            function(**values)
        except KeyboardInterrupt:
            sentence = "interrupted; the same command resumes."
            if _is_first_to_print(sentence):
                print(f"{_program()}: {sentence}", file=sys.stderr)
            raise SystemExit(INTERRUPTED) from None
        except BrokenPipeError as error:
            if _reader_has_left():
                _discard_output()
            # Of a connection: typer would hide the type.
            raise ConnectionError(str(error)) from error

    command.__name__, command.__doc__ = function.__name__, function.__doc__
    command.__signature__ = inspect.Signature(parameters)  # pyright: ignore[reportFunctionMemberAccess]
    return command


def _bounded(annotation: Any) -> Any:  # noqa: ANN401 - annotations
    """Set the upper bound of numbers without one: no number of a user may be too large for an int64."""
    for option in get_args(annotation)[1:]:
        if isinstance(option, OptionInfo) and option.max is None:
            option.max = _LARGEST_NUMBER
    return annotation


def _without_location(annotation: Any) -> Any:  # noqa: ANN401 - annotations
    """Replace `Location` by `Path`: typer refuses unions, but its parsers may return any type."""
    if get_origin(annotation) is not Annotated:
        return annotation
    union, *metadata = get_args(annotation)
    if S3Path not in get_args(union):
        return annotation
    return Annotated[(Path | None if type(None) in get_args(union) else Path, *metadata)]


def _epilog(example: str) -> str:
    # The mark keeps the lines of the paragraph as they are.
    return f"\b\nexample:\n  {example}"


def _program() -> str:
    return Path(sys.argv[0]).name


def _is_first_to_print(sentence: str) -> bool:
    """Return whether this rank prints a sentence, which each rank that shares the terminal may have."""
    if OWN_LOG in os.environ:
        return True
    distributed = sys.modules.get("torch.distributed")
    if distributed and distributed.is_initialized():
        from vqd_scale.core.world import is_first_to

        return is_first_to(sentence)
    rank, _, local_rank = place_among_ranks()
    # torchrun has a terminal on each node.
    return (local_rank if "LOCAL_RANK" in os.environ else rank) == 0


def _reader_has_left() -> bool:
    poll = select.poll()
    poll.register(_STDOUT, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _discard_output() -> NoReturn:
    # Python flushes once more at its end.
    os.dup2(os.open(os.devnull, os.O_WRONLY), _STDOUT)
    raise SystemExit(BROKEN_PIPE)
