"""Strict, typed configuration: defaults < YAML file < ``a.b=value`` overrides.

A configuration is a tree of frozen pydantic models, each declared beside the component that it configures. A
choice between components is a tagged union with the tag ``kind``. Validation is strict: ``true`` is no
integer, and ``"5"`` no number.
"""

import difflib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, TypeVar, Union, cast, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from vqd_scale.core.errors import UserError
from vqd_scale.core.nested import set_at
from vqd_scale.core.renamed_keys import RENAMED
from vqd_scale.core.safe_json import read_bounded
from vqd_scale.core.safe_yaml import MAX_BYTES, format_yaml, parse_yaml

ConfigType = TypeVar("ConfigType", bound="Config")


class Config(BaseModel):
    """Base class of all configurations: immutable; unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def kind_or(default: str) -> Callable[[Any], Any]:
    """Return a function for `pydantic.Discriminator` that reads the tag ``kind``; ``default`` if missing."""

    def kind_of(value: Any) -> Any:  # noqa: ANN401 - before validation it may be anything
        if isinstance(value, Mapping):
            return cast(Mapping[str, Any], value).get("kind", default)
        return getattr(value, "kind", default)

    return kind_of


def kinds_of(union: Any) -> tuple[type[Any], ...]:  # noqa: ANN401 - a type form
    """Return the configuration classes of a tagged union, for `load_config` and `validated`."""
    members = get_args(get_args(union)[0])
    # A member with a tag is `Annotated[member, Tag(...)]`.
    return tuple(get_args(member)[0] if get_origin(member) is Annotated else member for member in members)


def load_config(
    kind: type[ConfigType] | tuple[type[ConfigType], ...],
    path: Path | None = None,
    overrides: Sequence[str] = (),
) -> ConfigType:
    """Load a configuration file, apply overrides and validate the result.

    Args:
        kind: Configuration class, or several classes distinguished by the tag ``kind``; without a tag, the
            first class is used.
        path: YAML file with differences from the defaults; ``None`` for the defaults alone.
        overrides: ``a.b=value`` strings with values in YAML syntax; the last one wins.

    Raises:
        UserError: The file is missing or invalid YAML, or a key or value is wrong; the message names the
            dotted path, the given value and the allowed values.
    """
    values = read_yaml(path) if path is not None else {}
    for override in overrides:
        _apply_override(values, override)
    return validated(kind, values, source=str(path) if path is not None else "the overrides")


def validated(
    kind: type[ConfigType] | tuple[type[ConfigType], ...], values: Mapping[str, Any], source: str
) -> ConfigType:
    """Build and validate a configuration from plain values.

    Args:
        kind: As for `load_config`.
        values: Nested keys and values.
        source: Origin of the values, named in error messages.

    Raises:
        UserError: A key or value is wrong.
    """
    if isinstance(kind, tuple):
        by_tag = {str(each.model_fields["kind"].default): each for each in kind}
        tag = values.get("kind", next(iter(by_tag)))
        if not isinstance(tag, str) or tag not in by_tag:
            raise UserError(f"{source}: kind: given {tag!r:.200}, allowed: {', '.join(map(repr, by_tag))}.")
        kind = by_tag[tag]
    try:
        return kind.model_validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        # A misspelled required key is an unknown key and a missing one; the sentence is about the former.
        first = min(error.errors(), key=lambda each: each["type"] != "extra_forbidden")
        suffix = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
        raise UserError(f"{source}: {_describe(kind, first)}{suffix}") from None


def to_yaml(config: Config) -> str:
    """Return the resolved configuration as YAML, with defaults; `load_config` reads back an equal one."""
    return format_yaml(config.model_dump(mode="json"))


def read_yaml(path: Path) -> dict[str, Any]:
    """Load the plain values of a YAML file.

    Raises:
        UserError: The file is missing, unreadable, no regular file, too large, invalid YAML, or no mapping.
    """
    try:
        text = read_bounded(path, MAX_BYTES).decode()
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: the configuration file cannot be read ({error}).") from None
    try:
        values = parse_yaml(text)
    except ValueError as error:
        raise UserError(f"{path}: not valid YAML: {error}.") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected a mapping of keys to values, found {type(values).__name__}.")
    return cast(dict[str, Any], values)


def _apply_override(values: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    if not equals:
        raise UserError(f"override {override!r:.200}: expected key.subkey=value.")
    try:
        value = parse_yaml(text)
    except ValueError as error:
        raise UserError(f"override {override!r:.200}: not a YAML value: {error}.") from None
    try:
        set_at(values, path, value)
    except ValueError as error:
        raise UserError(f"override {override!r:.200}: {error}.") from None


def _describe(kind: type[Config], error: ErrorDetails) -> str:
    """Format one pydantic error as a sentence: dotted path, given value, allowed values."""
    if error["type"] == "extra_forbidden":
        key = str(error["loc"][-1])
        parent, models = _trace(kind, error["loc"][:-1])
        path = f"{parent}.{key}" if parent else key
        allowed = [name for model in models for name in model.model_fields]
        successors = [name for name in RENAMED.get(key, ()) if name in allowed]
        if successors:
            return f"{path}: this key is called '{successors[0]}' now."
        near = difflib.get_close_matches(key, allowed, n=1)
        hint = f"; did you mean '{near[0]}'?" if near else "."
        return f"{path}: unknown key; allowed here: {', '.join(sorted(allowed))}{hint}"
    path, models = _trace(kind, error["loc"])
    if error["type"] == "missing":
        return f"{path}: required, but not given."
    if error["type"] in ("union_tag_not_found", "union_tag_invalid"):
        tags = ", ".join(repr(model.model_fields["kind"].default) for model in models)
        tag = error["input"].get("kind")
        invalid = error["type"] == "union_tag_invalid"
        problem = f"given {tag!r:.200}," if invalid else "required, but not given;"
        return f"{path}.kind: {problem} allowed: {tags}."
    if models and error["type"] in ("model_type", "dict_type"):
        keys = ", ".join(dict.fromkeys(name for model in models for name in model.model_fields))
        return f"{path}: given {error['input']!r:.200}, allowed: a mapping with keys among {keys}."
    message = error["msg"].removeprefix("Value error, ").removeprefix("Input should be ").rstrip(".")
    if error["type"] in ("value_error", "assertion_error"):
        return f"{path}: {message}." if path else f"{message}."
    return f"{path}: given {error['input']!r:.200}, allowed: {message}."


def _trace(kind: type[Config], location: tuple[int | str, ...]) -> tuple[str, list[type[BaseModel]]]:
    """Return the dotted path of a pydantic error location, and the configuration classes allowed there.

    Inside a union pydantic adds the tag, or the name of a type. It is no part of the path, even if the
    union's tag is omitted in the file or is also the name of a key.
    """
    parts: list[str] = []
    options: list[Any] = [kind]
    for key in location:
        if len(options) > 1:
            options = [model for model in _models(options) if _tag(model) == key]
        elif options or isinstance(key, int):
            parts.append(str(key))
            options = [option for parent in options for option in _options_at(parent, key)]
    return ".".join(parts), _models(options)


def _tag(model: type[BaseModel]) -> object:
    return model.model_fields["kind"].default if "kind" in model.model_fields else None


def _models(options: list[Any]) -> list[type[BaseModel]]:
    return [option for option in options if isinstance(option, type) and issubclass(option, BaseModel)]


def _options_at(parent: Any, key: int | str) -> list[Any]:  # noqa: ANN401 - an annotation may be any object
    """Return the types that a value may have at a key of a configuration, tuple or dictionary."""
    if models := _models([parent]):
        fields = models[0].model_fields
        return _options(fields[key].annotation) if isinstance(key, str) and key in fields else []
    arguments = get_args(parent)
    if get_origin(parent) is tuple and isinstance(key, int):
        return _options(arguments[0 if arguments[-1] is Ellipsis else key])
    return _options(arguments[1]) if get_origin(parent) is dict else []


def _options(annotation: Any) -> list[Any]:  # noqa: ANN401
    """Return the members of a union except None, without metadata; another annotation is its only option."""
    if get_origin(annotation) is Annotated:
        return _options(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return [option for member in get_args(annotation) for option in _options(member)]
    return [] if annotation is type(None) else [annotation]
