"""Generator of ``docs/configuration.md``, the reference of all configuration keys."""

import ast
import inspect
import json
import textwrap
from itertools import pairwise
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from vqd_scale.cli.eval_ablation import AblationConfig
from vqd_scale.core.config import Config
from vqd_scale.core.s3 import S3Path
from vqd_scale.data.sources.img2dataset import Img2datasetConfig, IndexConfig
from vqd_scale.data.sources.photographs import PhotographsConfig
from vqd_scale.data.sources.registry import IMAGE_SOURCES
from vqd_scale.data.sources.shapes import ShapesConfig
from vqd_scale.evaluation.config import EvaluationConfig, SweepConfig
from vqd_scale.preparation.config import TokenizeConfig
from vqd_scale.training.tasks.config import TOKEN_RUNS, TOKENIZER_RUNS

PAGE = Path(__file__).parents[1] / "docs" / "configuration.md"
TOOLS: dict[str, tuple[str, tuple[type[Config], ...]]] = {
    "make_shards": (
        "Converts a source of images and captions to shards; each source has its own configuration",
        (ShapesConfig, PhotographsConfig, *IMAGE_SOURCES, Img2datasetConfig, IndexConfig),
    ),
    "train_tokenizer": (
        "Trains a tokenizer, or rebuilds the codebook of a trained one (ReFiT)",
        TOKENIZER_RUNS,
    ),
    "tokenize_shards": ("Encodes image shards as token shards", (TokenizeConfig,)),
    "train": ("Trains a denoiser or an autoregressive model on token shards", TOKEN_RUNS),
    "eval_coco_fid": ("Evaluates a model under a protocol", (EvaluationConfig,)),
    "eval_sweep": ("Evaluates a model at every combination of sampling options", (SweepConfig,)),
    "eval_ablation": ("Trains and evaluates the paper's ablation", (AblationConfig,)),
}
INTRODUCTION = """A tool reads a YAML file with differences from the defaults, then overrides such as
`optim.lr=1e-4`; the dots name nested keys. An unknown key or a wrong value is refused with its path and the
values allowed. `--print-config` prints the resolved configuration.

A key whose type is a link contains the keys of that class. If several classes are linked, `kind` selects one;
if the key has a default, its kind is given. [glossary.md](glossary.md) explains the terms. `make docs`
generates this page."""
SCALARS = {int: "integer", float: "number", str: "text", Path: "path", S3Path: "`s3://…`", Any: "any value"}
BOUNDS = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤", "multiple_of": "multiple of"}


def page() -> str:
    """Return the page: a section for each tool, a table for each class at its first occurrence."""
    lines = ["# Configuration", "", *_wrapped(INTRODUCTION)]
    described: set[type[Config]] = set()
    for tool, (purpose, configs) in TOOLS.items():
        lines += [f"## {tool}", "", *_wrapped(f"{purpose}: {', '.join(map(_type, configs))}.")]
        for config in configs:
            lines += _sections(config, described)
    return "\n".join(lines)


def _wrapped(text: str) -> list[str]:
    paragraphs = [textwrap.wrap(paragraph, 120, break_long_words=False) for paragraph in text.split("\n\n")]
    return [line for paragraph in paragraphs for line in [*paragraph, ""]]


def _sections(config: type[Config], described: set[type[Config]]) -> list[str]:
    if config in described:
        return []
    described.add(config)
    fields = {name: field for name, field in config.model_fields.items() if name != "kind"}
    kind = f"`kind: {config.model_fields['kind'].default}`. " if "kind" in config.model_fields else ""
    lines = [f"### {config.__name__}", "", *_wrapped(kind + _markdown(inspect.getdoc(config) or ""))]
    if fields:
        texts = descriptions(config)
        lines += ["| key | type or values | default | description |", "|---|---|---|---|"]
        for name, field in fields.items():
            default = "required" if field.is_required() else _default(field.get_default())
            text = " ".join(_markdown(texts[name]).split())
            lines.append(f"| `{name}` | {_type(field.annotation, *field.metadata)} | {default} | {text} |")
        lines.append("")
    for field in fields.values():
        for nested in _configs(field.annotation):
            lines += _sections(nested, described)
    return lines


def descriptions(config: type[Config]) -> dict[str, str]:
    """Return the docstring below each key; pydantic would need 0.4 s for them at the start of every tool."""
    texts: dict[str, str] = {}
    for base in reversed(config.__mro__):
        body = ast.parse(textwrap.dedent(inspect.getsource(base))).body if issubclass(base, Config) else []
        for statement, following in pairwise(
            body[0].body if body and isinstance(body[0], ast.ClassDef) else []
        ):
            if isinstance(statement, ast.AnnAssign) and isinstance(following, ast.Expr):
                texts[ast.unparse(statement.target)] = str(ast.literal_eval(following.value))
    return texts


def _markdown(text: str) -> str:
    return text.replace("``", "`").replace("|", "\\|")


def _default(value: Any) -> str:  # noqa: ANN401 - defaults and annotations are any objects
    if isinstance(value, Config):
        keys = _differences(value)
        value = f"kind: {keys['kind']}" if keys.keys() == {"kind"} else keys or ""
    text = str(value) if isinstance(value, str | Path) else json.dumps(value, default=str)
    return f"`{text}`" if text else ""


def _differences(config: Config) -> dict[str, Any]:
    """Return the kind and the keys that differ from the defaults."""
    return {
        name: _differences(value) if isinstance(value := getattr(config, name), Config) else value
        for name, field in sorted(type(config).model_fields.items(), key=lambda item: item[0] != "kind")
        if name == "kind" or getattr(config, name) != field.get_default()
    }


def _type(annotation: Any, *metadata: Any) -> str:  # noqa: ANN401
    """Return the type or the allowed values of a key."""
    arguments = get_args(annotation)
    if get_origin(annotation) is Annotated:
        constraints = [
            item for extra in arguments[1:] for item in (getattr(extra, "metadata", None) or [extra])
        ]
        return _type(arguments[0], *constraints, *metadata)
    if get_origin(annotation) in (Union, UnionType):
        return " or ".join(_type(member, *metadata) for member in arguments)
    if get_origin(annotation) is Literal:
        return " or ".join(f"`{value}`" for value in arguments)
    if get_origin(annotation) is dict:
        return f"mapping of text to {_type(arguments[1])}"
    if get_origin(annotation) is tuple:
        if arguments[-1] is Ellipsis:
            return f"list of {_type(arguments[0])}"
        return f"list of {len(arguments)}: {', '.join(map(_type, arguments))}"
    if annotation in (bool, NoneType):
        return "`true` or `false`" if annotation is bool else "`null`"
    if annotation not in SCALARS:
        return f"[{annotation.__name__}](#{annotation.__name__.lower()})"
    bounds = [
        f"{sign} {getattr(item, name)}"
        for name, sign in BOUNDS.items()
        for item in metadata
        if hasattr(item, name)
    ]
    return " ".join([SCALARS[annotation], ", ".join(bounds)]).strip()


def _configs(annotation: Any) -> list[type[Config]]:  # noqa: ANN401
    if isinstance(annotation, type) and issubclass(annotation, Config):
        return [annotation]
    return [config for argument in get_args(annotation) for config in _configs(argument)]


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
