"""Import rules: one direction between folders, one owner per heavy library, and no cycles.

Every import counts: at the top of a file, inside a function, or for type checking only. There is one
exception: the configuration modules (``config.py``) are the registries, and their classes import what they
build inside `build`; for cycles only their imports at the top count. Each rule is a function from parsed
modules to errors. It is tried on planted sources before it is applied to the package.
"""

import ast
import sys
from collections.abc import Callable, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = "vqd_scale"

LAYERS = [
    {"core"},
    {"diffusion", "nn", "tokenizers", "text", "data", "launchers", "reports"},
    {"models"},
    {"preparation", "evaluation"},
    {"training"},
    {"cli"},
]
OWNERS = {
    "deepspeed": ("training.engine", "training.partition"),
    "submitit": ("launchers.slurm",),
    "triton": ("diffusion.kernels",),
    "webdataset": ("data",),
    "yaml": ("core.safe_yaml",),
    "matplotlib": ("reports.plots",),
    "jinja2": ("reports.html",),
    "s3fs": ("core.s3_client",),
    "botocore": ("core.s3_client",),
    "aiohttp": ("core.s3_client",),
}
HEAVY = {"torch", "torchvision", "open_clip", "deepspeed", "scipy", "sklearn", "matplotlib", "wandb"}
"""Libraries that take a second or more to import."""
PURE = {"torch", "pydantic", "jaxtyping", "numpy", "triton", "typing_extensions"}

Modules = Mapping[str, ast.Module]


def modules_of(sources: Mapping[str, str]) -> Modules:
    return {name: ast.parse(source) for name, source in sources.items()}


def the_package() -> Modules:
    paths = sorted((ROOT / PACKAGE).rglob("*.py"))
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in paths]
    return modules_of(
        {name.removesuffix(".__init__"): path.read_text() for name, path in zip(names, paths, strict=True)}
    )


def imported(module: str, tree: ast.Module, modules: Modules) -> set[str]:
    """Return the modules that a module imports: exact modules of this package, others as written."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")[: -node.level]
                base = ".".join([*parents, base] if base else parents)
            members = {f"{base}.{alias.name}" for alias in node.names}
            names.update({member if member in modules else base for member in members})
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            names.update(str(name.value) for name in node.args[:1] if isinstance(name, ast.Constant))
    return names


def imported_at_start(module: str, tree: ast.Module, modules: Modules) -> set[str]:
    """Return the parent packages that Python imports with a module."""
    top = [node for node in tree.body if not isinstance(node, ast.If)]
    bodies = [node for node in top if isinstance(node, ast.Import | ast.ImportFrom | ast.Try)]
    return imported(module, ast.Module(body=[*bodies], type_ignores=[]), modules)


def folder_of(module: str) -> str:
    return module.split(".")[1] if module.startswith(f"{PACKAGE}.") else ""


def layer_of(folder: str) -> int:
    return next(number for number, layer in enumerate(LAYERS) if folder in layer)


def against_the_order(modules: Modules) -> list[str]:
    return [
        f"{module} imports {import_name}"
        for module, tree in modules.items()
        for import_name in imported(module, tree, modules)
        if folder_of(module) and folder_of(import_name) and folder_of(module) != folder_of(import_name)
        if layer_of(folder_of(import_name)) >= layer_of(folder_of(module))
    ]


def not_the_owner(modules: Modules) -> list[str]:
    return [
        f"{module} imports {library}"
        for module, tree in modules.items()
        for import_name in imported(module, tree, modules)
        for library in OWNERS.keys() & {import_name.split(".")[0]}
        if not any(f"{module}.".startswith(f"{PACKAGE}.{owner}.") for owner in OWNERS[library])
    ]


def another_array_type(modules: Modules) -> list[str]:
    """Return uses of numpy's own array types, whose spelling changes; `core.arrays` has a stable one."""
    return [
        f"{module} names {import_name}"
        for module, tree in modules.items()
        for import_name in [
            *(name for name in imported(module, tree, modules) if name.startswith("numpy.typing")),
            *(
                ast.unparse(node)
                for node in ast.walk(tree)
                if isinstance(node, ast.Attribute) and ast.unparse(node) in ("np.typing", "np.ndarray")
                if module != f"{PACKAGE}.core.arrays"
            ),
        ]
    ]


def impure_mathematics(modules: Modules) -> list[str]:
    return [
        f"{module} imports {import_name}"
        for module, tree in modules.items()
        if folder_of(module) == "diffusion"
        for import_name in imported(module, tree, modules)
        if (library := import_name.split(".")[0]) != PACKAGE
        if library not in PURE and library not in sys.stdlib_module_names
    ]


def slow_start(modules: Modules) -> list[str]:
    """Return configurations and command lines that cannot be imported without torch or its like."""
    starts = {module: imported_at_start(module, tree, modules) for module, tree in modules.items()}

    def reached(module: str, visited: set[str]) -> set[str]:
        for import_name in starts.get(module, set()) - visited:
            visited.add(import_name)
            reached(import_name, visited)
        return visited

    return [
        f"{module} imports {import_name}"
        for module in modules
        if is_configuration(module) or folder_of(module) == "cli"
        for import_name in reached(module, set())
        if import_name.split(".")[0] in HEAVY
    ]


def is_configuration(module: str) -> bool:
    return module.split(".")[-1] == "config"


def cycles(modules: Modules) -> list[str]:
    graph = {
        module: (imported_at_start if is_configuration(module) else imported)(module, tree, modules)
        & modules.keys()
        for module, tree in modules.items()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return [" imports ".join(reversed(error.args[1]))]
    return []


RULES = [against_the_order, not_the_owner, another_array_type, impure_mathematics, slow_start, cycles]

BROKEN = [
    (against_the_order, {"vqd_scale.core.a": "from vqd_scale.data.b import c", "vqd_scale.data.b": ""}),
    (against_the_order, {"vqd_scale.data.a": "def f():\n    import vqd_scale.nn.b", "vqd_scale.nn.b": ""}),
    (against_the_order, {"vqd_scale.nn.a": "from ..diffusion import b", "vqd_scale.diffusion.b": ""}),
    (against_the_order, {"vqd_scale.text.a": "if TYPE_CHECKING:\n    from vqd_scale.models import b"}),
    (against_the_order, {"vqd_scale.training.a": "import_module('vqd_scale.cli.train')"}),
    (not_the_owner, {"vqd_scale.training.loop": "def f():\n    import deepspeed.comm"}),
    (not_the_owner, {"vqd_scale.training.engineering": "import deepspeed"}),
    (not_the_owner, {"vqd_scale.cli.train": "from submitit import AutoExecutor"}),
    (not_the_owner, {"vqd_scale.preparation.tokenize_shards": "import webdataset as wds"}),
    (not_the_owner, {"vqd_scale.diffusion.logit_statistics": "import triton.language as tl"}),
    (another_array_type, {"vqd_scale.data.a": "from numpy.typing import NDArray"}),
    (another_array_type, {"vqd_scale.data.a": "def f(x: np.ndarray) -> None: ..."}),
    (impure_mathematics, {"vqd_scale.diffusion.a": "import scipy.special"}),
    (slow_start, {"vqd_scale.nn.config": "import torch"}),
    (
        slow_start,
        {"vqd_scale.cli.train": "from vqd_scale.nn.a import b", "vqd_scale.nn.a": "from torch import nn"},
    ),
    (
        cycles,
        {"vqd_scale.nn.config": "import vqd_scale.nn.a", "vqd_scale.nn.a": "import vqd_scale.nn.config"},
    ),
    (cycles, {"vqd_scale.core.a": "from vqd_scale.core.b import x", "vqd_scale.core.b": "from . import a"}),
    (
        cycles,
        {
            "vqd_scale": "def __getattr__(name):\n    from vqd_scale.core import a\n    return a",
            "vqd_scale.core.a": "from vqd_scale import TextToImage",
        },
    ),
]

SOUND = {
    "vqd_scale": "",
    "vqd_scale.core.a": "import torch",
    "vqd_scale.core.safe_yaml": "import yaml",
    "vqd_scale.nn.config": "def build():\n    import vqd_scale.nn.network",
    "vqd_scale.nn.network": "import torch\nimport vqd_scale.nn.config",
    "vqd_scale.cli.train": "import vqd_scale.nn.config\ndef run():\n    import vqd_scale.nn.network",
    "vqd_scale.diffusion.a": "import math\nfrom torch import nn\nfrom . import b\nimport vqd_scale.core.a",
    "vqd_scale.diffusion.b": "from vqd_scale.core import a",
    "vqd_scale.data.shards.shard_io": "from webdataset import ShardWriter",
    "vqd_scale.training.engine": "import deepspeed\nfrom vqd_scale.evaluation.a import b",
    "vqd_scale.evaluation.a": "def f():\n    from vqd_scale.diffusion.a import b",
}


@pytest.mark.parametrize(("rule", "sources"), BROKEN)
def test_each_rule_finds_planted_offenses(
    rule: Callable[[Modules], list[str]], sources: Mapping[str, str]
) -> None:
    assert rule(modules_of(sources))


@pytest.mark.parametrize("rule", RULES)
def test_each_rule_passes_valid_sources(rule: Callable[[Modules], list[str]]) -> None:
    assert rule(modules_of(SOUND)) == []


@pytest.mark.parametrize("rule", RULES)
def test_package_satisfies_rule(rule: Callable[[Modules], list[str]]) -> None:
    assert rule(the_package()) == []


def test_every_folder_has_a_layer() -> None:
    folders = {path.parent.name for path in (ROOT / PACKAGE).glob("*/__init__.py")}
    assert folders <= set.union(*LAYERS)
    assert "core" in folders


def test_tools_only_run_their_command() -> None:
    # Without the guard every data worker, which imports the tool again, would start it.
    tools = [tool for tool in sorted((ROOT / "tools").glob("*.py")) if not tool.name.startswith("_")]
    assert tools
    start = 'from _environment import run\n\nif __name__ == "__main__":\n    run("{}")\n'
    modules = {tool: f"{PACKAGE}.cli.{tool.stem}" for tool in tools}
    modules[ROOT / "tools" / "benchmark.py"] = "benchmarks.main"
    assert [tool.name for tool in tools if tool.read_text() != start.format(modules[tool])] == []
