"""Strict, typed configuration: defaults < YAML file < ``a.b=value`` overrides.

A configuration is a tree of frozen pydantic models, each declared beside the component that it configures. A
choice between components is a tagged union with the tag ``kind``. No other module of the package reads YAML.
"""

import difflib
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from vqd_scale.core.errors import UserError
from vqd_scale.core.nested import set_at
from vqd_scale.core.renamed_keys import RENAMED

ConfigType = TypeVar("ConfigType", bound="Config")


class Config(BaseModel):
    """Base class of all configurations: immutable; unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML loader that rejects duplicate keys instead of keeping the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [cast(str, self.construct_object(key, deep=True)) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key '{key}' is given twice", node.start_mark
                )
        return super().construct_mapping(node, deep)


def kind_or(default: str) -> Callable[[Any], Any]:
    """Return a function for `pydantic.Discriminator` that reads the tag ``kind``; ``default`` if missing."""

    def kind_of(value: Any) -> Any:  # noqa: ANN401 - before validation it may be anything
        if isinstance(value, Mapping):
            return cast(Mapping[str, Any], value).get("kind", default)
        return getattr(value, "kind", default)

    return kind_of


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
        kind = _named(kind, values, source)
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        remaining = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
        raise UserError(f"{source}: {_describe(kind, values, first)}{remaining}") from None


def _named(kinds: tuple[type[ConfigType], ...], values: Mapping[str, Any], source: str) -> type[ConfigType]:
    by_tag = {str(kind.model_fields["kind"].default): kind for kind in kinds}
    tag = values.get("kind", next(iter(by_tag)))
    if tag not in by_tag:
        raise UserError(f"{source}: kind: given {tag!r}, allowed: {', '.join(map(repr, by_tag))}.")
    return by_tag[tag]


def to_yaml(config: Config) -> str:
    """Return the resolved configuration as YAML, with defaults; `load_config` reads back an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, width=100)


def read_yaml(path: Path) -> dict[str, Any]:
    """Load the plain values of a YAML file.

    Raises:
        UserError: The file is missing or invalid YAML, is not a mapping, or has a duplicate key.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: the configuration file cannot be read ({error}).") from None
    try:
        # _UniqueKeyLoader is a SafeLoader: tags in the file construct only plain values.
        values = yaml.load(text, Loader=_UniqueKeyLoader)  # noqa: S506
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}.") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected a mapping of keys to values, found {type(values).__name__}.")
    return cast(dict[str, Any], values)


def _apply_override(values: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    if not equals or not all(path.split(".")):
        raise UserError(f"override '{override}': expected key.subkey=value.")
    try:
        value: Any = yaml.safe_load(text)
    except yaml.YAMLError:
        raise UserError(f"override '{override}': '{text}' is not a YAML value; quote it.") from None
    try:
        set_at(values, path, value)
    except ValueError as error:
        raise UserError(f"override '{override}': {error}.") from None


def _describe(kind: type[Config], values: Mapping[str, Any], error: ErrorDetails) -> str:
    """Format one pydantic error as a sentence: dotted path, given value, allowed values."""
    path = _dotted(values, error["loc"])
    if error["type"] == "extra_forbidden":
        allowed = _fields_at(kind, error["loc"][:-1])
        successors = [name for name in RENAMED.get(str(error["loc"][-1]), ()) if name in allowed]
        if successors:
            return f"{path}: this key is called '{successors[0]}' now."
        suggestions = difflib.get_close_matches(str(error["loc"][-1]), allowed, n=1)
        hint = f"; did you mean '{suggestions[0]}'?" if suggestions else "."
        return f"{path}: unknown key; allowed here: {', '.join(sorted(allowed))}{hint}"
    if error["type"] == "missing":
        return f"{path}: required, but not given."
    if error["type"] == "union_tag_not_found":
        return f"{path}.kind: required, but not given; allowed: {_tags_at(kind, error['loc'])}."
    if error["type"] == "union_tag_invalid":
        return f"{path}.kind: given {error['input'].get('kind')!r}, allowed: {_tags_at(kind, error['loc'])}."
    if error["type"] in ("model_type", "model_attributes_type"):
        keys = ", ".join(dict.fromkeys(_fields_at(kind, error["loc"])))
        return f"{path}: given {error['input']!r}, allowed: a mapping with keys among {keys}."
    message = error["msg"].removeprefix("Value error, ").removeprefix("Input should be ").rstrip(".")
    if error["type"] in ("value_error", "assertion_error"):
        return f"{path}: {message}." if path else f"{message}."
    return f"{path}: given {error['input']!r}, allowed: {message}."


def _dotted(values: Mapping[str, Any], location: tuple[int | str, ...]) -> str:
    """Return the dotted path of an error, without the union tags and types that pydantic adds."""
    parts: list[str] = []
    node: Any = values
    for position, key in enumerate(location):
        is_last = position == len(location) - 1
        if isinstance(node, Mapping):
            mapping = cast(Mapping[Any, Any], node)
            if key in mapping:
                node = mapping[key]
            elif not is_last or mapping.get("kind") == key:
                continue
        elif isinstance(key, int) and isinstance(node, Sequence):
            sequence = cast(Sequence[Any], node)
            node = sequence[key] if key < len(sequence) else None
        elif node is not None:
            continue
        parts.append(str(key))
    return ".".join(parts)


def _fields_at(kind: type[Config], location: tuple[int | str, ...]) -> list[str]:
    return [name for model in _models_at(kind, location) for name in model.model_fields]


def _tags_at(kind: type[Config], location: tuple[int | str, ...]) -> str:
    return ", ".join(repr(model.model_fields["kind"].default) for model in _models_at(kind, location))


def _models_at(kind: type[Config], location: tuple[int | str, ...]) -> list[type[BaseModel]]:
    """Return the model classes allowed at a pydantic error location (which includes union tags)."""
    candidates: list[type[BaseModel]] = [kind]
    for key in location:
        following: list[type[BaseModel]] = []
        for model in candidates:
            if key in model.model_fields:
                following.extend(_models_in(model.model_fields[str(key)].annotation))
            elif isinstance(key, int) or (
                "kind" in model.model_fields and model.model_fields["kind"].default == key
            ):
                following.append(model)
        candidates = following
    return candidates


def _models_in(annotation: Any) -> list[type[BaseModel]]:  # noqa: ANN401 - an annotation may be any object
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in _models_in(argument)]
