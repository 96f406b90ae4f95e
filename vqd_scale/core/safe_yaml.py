"""Safe parsing of YAML: plain values, bounded in size, depth and aliases, with decimal numbers.

PyYAML's loader follows YAML 1.1: ``0100`` is 64 and ``1:30`` is 90, but ``1e-4`` is text. Its nesting and its
aliases are unbounded, and a tag such as ``!!int`` on other text raises any exception. Here the events of its
parser become values directly.
"""

import math
import re
from typing import Any, cast

import yaml

MAX_BYTES = 1 << 20
"""Maximum size of a YAML file, and of its text and values with all aliases expanded."""
MAX_DEPTH = 50
"""Maximum nesting of mappings and lists."""

_TAG = "tag:yaml.org,2002:"
_NUMBER = re.compile(r"[-+]?([0-9][0-9_]*(\.[0-9_]*)?|\.[0-9][0-9_]*)([eE][-+]?[0-9]+)?")
_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]{0,18})")
_FLOAT = re.compile(r"[-+]?[0-9]*(\.[0-9]*([eE][-+]?[0-9]+)?|[eE][-+]?[0-9]+)")


class _Dumper(yaml.SafeDumper):
    """Writer that also quotes text that only `parse_yaml` reads as a number."""


_Dumper.add_implicit_resolver(f"{_TAG}float", re.compile(f"({_NUMBER.pattern})$"), list("-+.0123456789"))


def parse_yaml(text: str) -> Any:  # noqa: ANN401 - any plain value
    """Parse one YAML document into mappings with text keys, lists, text, numbers, booleans and None.

    Raises:
        ValueError: Invalid YAML, nesting or aliases above the bounds, a tag, a duplicate key, or a number
            that is not decimal; the message names line and column.
    """
    try:
        # Only the loader's parser and resolver are used, which construct nothing.
        loader = yaml.SafeLoader(text)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None
    try:
        return _Parser(loader).document()
    except (yaml.MarkedYAMLError, ValueError) as error:
        mark = getattr(error, "problem_mark", None) or loader.get_mark()
        problem = getattr(error, "problem", None) or error
        # The problems that PyYAML finds are mostly those of text without quotes.
        advice = "" if type(error) is yaml.MarkedYAMLError else "; quote it if it is text"
        raise ValueError(f"line {mark.line + 1}, column {mark.column + 1}: {problem}{advice}") from None


def format_yaml(values: Any) -> str:  # noqa: ANN401 - any plain value
    """Return plain values as YAML; `parse_yaml` reads back equal ones."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, width=100)


class _Parser:
    def __init__(self, loader: yaml.SafeLoader) -> None:
        self._loader = loader
        self._anchors: dict[str, Any] = {}
        self._size = 0

    def document(self) -> Any:  # noqa: ANN401
        self._loader.get_event()
        if self._loader.check_event(yaml.StreamEndEvent):
            return None
        self._loader.get_event()
        value = self._value(0)
        self._loader.get_event()
        if not self._loader.check_event(yaml.StreamEndEvent):
            raise _error("a second document", self._loader.get_event())
        return value

    def _value(self, depth: int) -> Any:  # noqa: ANN401
        event = self._loader.get_event()
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in self._anchors:
                raise _error(f"the alias '{event.anchor}' has no complete anchor before it", event)
            return self._copy(self._anchors[event.anchor], depth, event)
        self._check_bounds(event.value if isinstance(event, yaml.ScalarEvent) else "", depth, event)
        if event.tag is not None:
            raise _error(f"the tag '{event.tag}' is not allowed; a plain value needs none", event)
        value = self._scalar(event) if isinstance(event, yaml.ScalarEvent) else self._collection(event, depth)
        if event.anchor is not None:
            self._anchors[event.anchor] = value
        return value

    def _copy(self, value: Any, depth: int, event: yaml.AliasEvent) -> Any:  # noqa: ANN401
        self._check_bounds(value, depth, event)
        if isinstance(value, dict):
            entries = cast(dict[str, Any], value)
            return {
                self._copy(key, depth, event): self._copy(item, depth + 1, event)
                for key, item in entries.items()
            }
        if isinstance(value, list):
            return [self._copy(item, depth + 1, event) for item in cast(list[Any], value)]
        return value

    def _check_bounds(self, value: object, depth: int, event: yaml.Event) -> None:
        self._size += 1 + (len(value) if isinstance(value, str) else 0)
        if self._size > MAX_BYTES:
            raise _error(f"larger than {MAX_BYTES:,} bytes with all aliases expanded", event)
        if depth > MAX_DEPTH:
            raise _error(f"nested deeper than {MAX_DEPTH} levels", event)

    def _collection(self, event: yaml.CollectionStartEvent, depth: int) -> list[Any] | dict[str, Any]:
        items: list[Any] = []
        entries: dict[str, Any] = {}
        is_list = isinstance(event, yaml.SequenceStartEvent)
        while not self._loader.check_event(yaml.SequenceEndEvent, yaml.MappingEndEvent):
            if is_list:
                items.append(self._value(depth + 1))
                continue
            start = self._loader.peek_event()
            key = self._value(depth + 1)
            if not isinstance(key, str):
                raise _error(f"the key {key!r} is not text; quote it", start)
            if key in entries:
                raise _error(f"the key '{key}' is given twice", start)
            entries[key] = self._value(depth + 1)
        self._loader.get_event()
        return items if is_list else entries

    def _scalar(self, event: yaml.ScalarEvent) -> str | int | float | bool | None:
        text = event.value
        if "\0" in text or any("\ud800" <= character <= "\udfff" for character in text):
            raise _error("text with a NUL or a surrogate", event)
        if not event.implicit[0]:
            return text
        tag = self._loader.resolve(yaml.ScalarNode, text, event.implicit).removeprefix(_TAG)
        if tag == "null":
            return None
        if tag == "bool":
            return yaml.SafeLoader.bool_values[text.lower()]
        if tag not in ("int", "float") and not _NUMBER.fullmatch(text):
            return text
        digits = text.replace("_", "")
        if _INTEGER.fullmatch(digits) and abs(number := int(digits)) < 1 << 63:
            return number
        if _FLOAT.fullmatch(digits) and math.isfinite(number := float(digits)):
            return number
        raise _error(
            f"{text[:40]!r} is no plain decimal number of at most 64 bits (leading zeros, colons and 0x "
            "change a number's meaning in YAML); write it plainly, or quote it if it is text",
            event,
        )


def _error(problem: str, event: yaml.Event) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)
