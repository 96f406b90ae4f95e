"""The page of formulas names things that exist, and its equations are numbered one by one."""

import re
from importlib import import_module
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[2] / "docs" / "maths.md").read_text(encoding="utf-8")
MODULES = (
    "schedule",
    "transition",
    "timestep_sampler",
    "objective",
    "guidance",
    "samplers",
    "unmasking",
    "sampling_plan",
)


def resolves(name: str) -> bool:
    """Whether a dotted name is found in the folder of the mathematics."""
    first, *rest = name.split(".")
    if rest and (Path(__file__).parents[2] / "vqd_scale" / "diffusion" / f"{first}.py").exists():
        places = [import_module(f"vqd_scale.diffusion.{first}")]
    else:
        places, rest = [import_module(f"vqd_scale.diffusion.{module}") for module in MODULES], [first, *rest]
    for place in places:
        found: object = place
        for part in rest:
            fields = getattr(found, "model_fields", {}) | getattr(found, "__dataclass_fields__", {})
            found = fields[part] if part in fields else getattr(found, part, None)
        if found is not None:
            return True
    return False


@pytest.mark.parametrize(
    "name", ["MaskAndReplace.posterior", "timestep_sampler.Importance", "objective._Case.divergence"]
)
def test_names_are_found(name: str) -> None:
    assert resolves(name)
    assert not resolves(name + "s")


def test_every_function_that_the_page_names_exists() -> None:
    code = {
        name
        for name in re.findall(r"`([A-Za-z_][\w.]*)(?:\([a-z]*\))?`", PAGE)
        if ("." in name or name[0].isupper()) and not name.startswith(("kernels.", "rng."))
    }
    assert len(code) > 30
    assert [
        name for name in sorted(code - {"MaskAndReplace.codes", "MaskAndReplace.mask"}) if not resolves(name)
    ] == []


def test_equations_are_numbered_one_by_one() -> None:
    numbers = [int(number) for number in re.findall(r"^ {4}\S.* \((\d+)\)$", PAGE, flags=re.MULTILINE)]
    assert numbers == list(range(1, len(numbers) + 1))
    assert len(numbers) >= 13
