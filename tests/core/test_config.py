import importlib
import pkgutil
from pathlib import Path
from typing import Annotated, Literal, get_args, get_origin

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Discriminator, Field, PositiveInt, Tag, model_validator
from pydantic.fields import FieldInfo

import vqd_scale
from vqd_scale.core.config import Config, kind_or, load_config, to_yaml, validated
from vqd_scale.core.errors import UserError
from vqd_scale.core.renamed_keys import RENAMED


class Linear(Config):
    kind: Literal["linear"] = "linear"
    steps: int = 100


class Cosine(Config):
    kind: Literal["cosine"] = "cosine"
    offset: float = 0.008


Schedule = Annotated[Linear | Cosine, Field(discriminator="kind")]


class Optimizer(Config):
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.96)
    warmup: PositiveInt | Literal["auto"] = "auto"


class Run(Config):
    name: str = "run"
    folder: Path = Path("runs/x")
    shuffle: bool = True
    optim: Optimizer = Optimizer()
    schedule: Schedule = Linear()
    stages: tuple[Schedule, ...] = ()

    @model_validator(mode="after")
    def _named(self) -> "Run":
        if not self.name:
            raise ValueError("name must not be empty")
        return self


def load(tmp_path: Path, text: str, *overrides: str) -> Run:
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return load_config(Run, path, overrides)


def error_message(*overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_config(Run, None, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_overrides_take_precedence_over_file_and_defaults(tmp_path: Path) -> None:
    text = "optim: {lr: 0.5, warmup: 7}\nname: file\n"
    config = load(tmp_path, text, "optim.lr=0.1", "optim.lr=0.2", "name=last")
    assert config == Run(name="last", optim=Optimizer(lr=0.2, warmup=7))


def test_empty_file_gives_defaults(tmp_path: Path) -> None:
    assert load(tmp_path, "# nothing but a comment\n") == Run()


@pytest.mark.parametrize("text", ["2e-4", "2.0e-4", "2E-4", "0.0002", ".0002"])
def test_every_spelling_of_a_float(tmp_path: Path, text: str) -> None:
    # YAML 1.1 reads `2e-4` as a string.
    assert load(tmp_path, f"optim: {{lr: {text}}}").optim.lr == 2e-4
    assert load_config(Run, None, [f"optim.lr={text}"]).optim.lr == 2e-4


@pytest.mark.parametrize(
    ("override", "path", "allowed"),
    [
        ("shufle=true", "shufle", "did you mean 'shuffle'?"),
        ("optim.lrr=1", "optim.lrr", "did you mean 'lr'?"),
        ("schedule={kind: cosine, ofset: 1}", "schedule.ofset", "did you mean 'offset'?"),
        ("stages=[{kind: linear}, {kind: linear, step: 3}]", "stages.1.step", "did you mean 'steps'?"),
        ("optim.qqqqq=1", "optim.qqqqq", "allowed here: betas, lr, warmup."),
    ],
)
def test_unknown_key_names_path_and_nearest_key(override: str, path: str, allowed: str) -> None:
    message = error_message(override)
    assert f" {path}: unknown key" in message
    assert allowed in message


def test_union_suggestions_come_from_chosen_kind() -> None:
    assert "allowed here: kind, offset;" in error_message("schedule={kind: cosine, ofset: 1}")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.lr=fast", "optim.lr: given 'fast', allowed: a valid number"),
        ("optim.lr=.inf", "'.inf' is no plain decimal number"),
        ("optim.betas=[0.9]", "optim.betas.1: required, but not given"),
        ("optim.betas=[0.9, x]", "optim.betas.1: given 'x', allowed: a valid number"),
        ("optim.warmup=never", "optim.warmup: given 'never', allowed: a valid integer"),
        ("shuffle=perhaps", "shuffle: given 'perhaps', allowed: a valid boolean"),
        ("schedule={kind: linear, steps: 2.5}", "schedule.steps: given 2.5, allowed: a valid integer"),
        ("stages=[{kind: cosine, offset: x}]", "stages.0.offset: given 'x', allowed: a valid number"),
        ("schedule.kind=sine", "schedule.kind: given 'sine', allowed: 'linear', 'cosine'."),
        ("schedule.steps=50", "schedule.kind: required, but not given; allowed: 'linear', 'cosine'."),
        ("stages=[{kind: sine}]", "stages.0.kind: given 'sine', allowed: 'linear', 'cosine'."),
        ("schedule=cosine", "schedule: given 'cosine', allowed: a mapping with keys among kind, "),
        ("optim=3", "optim: given 3, allowed: a mapping with keys among lr, betas, warmup."),
        ("name=''", "the overrides: name must not be empty."),
    ],
)
def test_wrong_value_names_path_value_and_allowed_values(override: str, message: str) -> None:
    assert message in error_message(override)


def test_further_errors_are_counted() -> None:
    assert error_message("optim.lr=x", "shuffle=x").endswith("(and 1 more)")


def test_config_is_immutable() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Run().name = "other"  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("text", ["name: a\nname: b\n", "optim:\n  lr: 1\n  warmup: 2\n  lr: 3\n"])
def test_duplicate_key_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(UserError, match=r"run\.yaml: .* line \d, column \d: the key '(name|lr)' is given"):
        load(tmp_path, text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: [", "not valid YAML"),
        ("- a\n- b\n", "expected a mapping of keys to values, found list"),
        ("!!python/object/apply:os.getcwd []", "not valid YAML"),
    ],
)
def test_invalid_configuration_files(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load(tmp_path, text)
    assert "\n" not in str(caught.value)


def test_unreadable_configuration_files(tmp_path: Path) -> None:
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path / "absent.yaml", tmp_path, binary):
        with pytest.raises(UserError, match=f"{path}: the configuration file cannot be read"):
            load_config(Run, path)


@pytest.mark.parametrize("override", ["name", "=3", "optim.=3", ".lr=3", "optim..lr=3", "--lr"])
def test_invalid_overrides(override: str) -> None:
    assert f"override '{override}': expected key.subkey=value" in error_message(override)


def test_inapplicable_overrides() -> None:
    assert "'name=[': not a YAML value: line 1, column 2: expected" in error_message("name=[")
    assert "name holds the value 'a', not further keys" in error_message("name=a", "name.b=c")


def test_override_value_may_contain_equals_sign() -> None:
    assert load_config(Run, None, ["name=a=b"]).name == "a=b"


schedules = st.one_of(
    st.builds(Linear, steps=st.integers(-(2**63) + 1, 2**63 - 1)),
    st.builds(Cosine, offset=st.floats(allow_nan=False, allow_infinity=False)),
)
names = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1)
runs = st.builds(
    Run,
    name=names,
    shuffle=st.booleans(),
    optim=st.builds(
        Optimizer,
        lr=st.floats(allow_nan=False, allow_infinity=False),
        warmup=st.one_of(st.just("auto"), st.integers(1, 2**63 - 1)),
    ),
    schedule=schedules,
    stages=st.lists(schedules, max_size=3).map(tuple),
)


@given(runs)
def test_yaml_round_trip(tmp_path_factory: pytest.TempPathFactory, run: Run) -> None:
    path = tmp_path_factory.getbasetemp() / "round_trip.yaml"
    path.write_text(to_yaml(run), encoding="utf-8")
    assert load_config(Run, path) == run


@given(runs)
def test_override_equals_field_assignment(run: Run) -> None:
    overrides = [
        f"optim.lr={run.optim.lr}",
        f"optim.warmup={run.optim.warmup}",
        f"shuffle={run.shuffle}",
    ]
    loaded = load_config(Run, None, overrides)
    assert (loaded.optim, loaded.shuffle) == (run.optim, run.shuffle)


class Tagged(Config):
    schedule: Annotated[
        Annotated[Linear, Tag("linear")] | Annotated[Cosine, Tag("cosine")], Discriminator(kind_or("linear"))
    ] = Linear()


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], Linear()),
        (["schedule.steps=3"], Linear(steps=3)),
        (["schedule.kind=linear"], Linear()),
        (["schedule.kind=cosine", "schedule.offset=0.5"], Cosine(offset=0.5)),
    ],
)
def test_union_default_kind_may_be_omitted(overrides: list[str], expected: Config) -> None:
    config = load_config(Tagged, None, overrides)
    assert config.schedule == expected
    assert validated(Tagged, config.model_dump(mode="json"), "itself") == config


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("schedule.kind=square", "schedule.kind: given 'square', allowed: 'linear', 'cosine'."),
        ("schedule.offset=1", "schedule.offset: unknown key; allowed here: kind, steps."),
        ("schedule.steps=x", "schedule.steps: given 'x'"),
        ("schedule=7", "schedule: given 7, allowed: a mapping with keys among kind, steps."),
    ],
)
def test_error_in_default_kind_names_key(override: str, sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config(Tagged, None, [override])
    assert sentence in str(caught.value)


class Leaf(Config):
    """Configuration with a key that is also its tag."""

    kind: Literal["leaf"] = "leaf"
    leaf: PositiveInt = 1
    total_images: int = 1


class Branch(Config):
    kind: Literal["branch"] = "branch"
    width: PositiveInt
    leaf: Annotated[Leaf | Cosine, Field(discriminator="kind")] = Leaf()
    leaves: tuple[Annotated[Leaf | Cosine, Field(discriminator="kind")], ...] = ()
    named: dict[str, Leaf] = Field(default={})
    optional: Leaf | None = None

    @model_validator(mode="after")
    def _width_is_odd(self) -> "Branch":
        if self.width % 2 == 0:
            raise ValueError("width must be odd")
        return self


class Tree(Config):
    branch: Annotated[
        Annotated[Branch, Tag("branch")] | Annotated[Linear, Tag("linear")], Discriminator(kind_or("branch"))
    ] = Branch(width=1)
    branches: tuple[Branch, ...] = ()


LEAVES = {
    "branch.leaf": "branch: {width: 1, leaf: {kind: leaf, %s}}",
    "branch.leaves.1": "branch: {width: 1, leaves: [{kind: cosine}, {kind: leaf, %s}]}",
    "branch.named.leaf": "branch: {width: 1, named: {leaf: {%s}}}",
    "branch.optional": "branch: {width: 1, kind: branch, optional: {%s}}",
    "branches.0.leaf": "branches: [{width: 1, leaf: {kind: leaf, %s}}]",
    "branches.1.optional": "branches: [{width: 1}, {width: 3, optional: {%s}}]",
}
"""Dotted path of each leaf, and a file that sets one of the leaf's keys."""


@pytest.mark.parametrize("path", LEAVES)
@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("lief: 2", "lief: unknown key; allowed here: kind, leaf, total_images; did you mean 'leaf'?"),
        ("leaf: 0", "leaf: given 0, allowed: greater than 0."),
        ("leaf: {leaf: 2}", "leaf: given {'leaf': 2}, allowed: a valid integer."),
        ("images: 2", "images: this key is called 'total_images' now."),
    ],
)
def test_error_names_full_path_at_any_depth(tmp_path: Path, path: str, setting: str, sentence: str) -> None:
    file = tmp_path / "tree.yaml"
    file.write_text(LEAVES[path] % setting)
    with pytest.raises(UserError) as caught:
        load_config(Tree, file)
    assert str(caught.value) == f"{file}: {path}.{sentence}"


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("branch.width=2", "branch: width must be odd."),
        ("branch=null", "branch: given None, allowed: a mapping with keys among kind, width, leaf"),
        ("branch={branch: {branch: 1}, width: 1}", "branch.branch: unknown key"),
        (
            "branch.witdh=1",
            "branch.witdh: unknown key; allowed here: kind, leaf, leaves, named, optional, width",
        ),
        (
            "branch={width: 1, leaf: {leaf: 2}}",
            "branch.leaf.kind: required, but not given; allowed: 'leaf', ",
        ),
    ],
)
def test_error_at_union_itself_names_no_tag(override: str, sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config(Tree, None, [override])
    assert f"the overrides: {sentence}" in str(caught.value)


def test_file_may_be_a_union_of_kinds() -> None:
    assert load_config((Linear, Cosine), None, ["steps=3"]) == Linear(steps=3)
    assert load_config((Linear, Cosine), None, ["kind=cosine"]) == Cosine()
    with pytest.raises(UserError, match="kind: given 'square', allowed: 'linear', 'cosine'"):
        load_config((Linear, Cosine), None, ["kind=square"])
    with pytest.raises(UserError, match="steps: unknown key; allowed here: kind, offset"):
        load_config((Linear, Cosine), None, ["kind=cosine", "steps=3"])


class Data(Config):
    path: Path = Path("x")
    global_batch_size: int = 1


class Renamed(Config):
    data: Data = Data()
    total_images: int = 1


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("data.lanes=4", "the overrides: data.lanes: this key is called 'global_batch_size' now."),
        ("images=4", "the overrides: images: this key is called 'total_images' now."),
    ],
)
def test_former_key_is_refused_with_present_key(override: str, sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config(Renamed, None, [override])
    assert str(caught.value) == sentence


def test_former_key_without_valid_successor_is_unknown() -> None:
    with pytest.raises(UserError, match=r"data\.images: unknown key; allowed here: global_batch_size, path"):
        load_config(Renamed, None, ["data.images=4"])


def configs_of(config: type[Config]) -> list[type[Config]]:
    return [each for subclass in config.__subclasses__() for each in (subclass, *configs_of(subclass))]


@pytest.fixture(scope="module")
def package_fields() -> list[tuple[str, FieldInfo]]:
    """Names and annotations of all configuration keys of the package."""
    for module in pkgutil.walk_packages(vqd_scale.__path__, "vqd_scale."):
        importlib.import_module(module.name)
    configs = [config for config in configs_of(Config) if config.__module__.startswith("vqd_scale.")]
    return [item for config in configs for item in config.model_fields.items()]


def test_no_boolean_equals_one_of_several_numbers(package_fields: list[tuple[str, FieldInfo]]) -> None:
    # pydantic accepts `true` for `Literal[1]`.
    literals = {
        name: field.annotation for name, field in package_fields if get_origin(field.annotation) is Literal
    }
    assert len(literals) > 20
    choices = [(name, choice) for name, literal in literals.items() for choice in get_args(literal)]
    assert [name for name, choice in choices if type(choice) is int and choice in (0, 1)] == []


def test_every_successor_key_exists(package_fields: list[tuple[str, FieldInfo]]) -> None:
    keys = {name for name, _ in package_fields}
    assert len(keys) > 100
    assert [name for names in RENAMED.values() for name in names if name not in keys] == []


@pytest.mark.parametrize(
    "override",
    [
        "data.num_workers=1000000000",
        "data.prefetch_batches=1000000000000",
        "data.global_batch_size=1000000000000000",
        "data.shuffle_window=1000000000000",
        "data.ranged_reads.buffer_megabytes=1000000000000",
        "engine.gradient_accumulation_steps=1000000000000",
        "optim.betas=[1, 0.9]",
        "validation={path: a, batch_size: 1000000000}",
        "denoiser.width=1000000000",
        "denoiser.layers=1000000",
        "total_images=1" + "0" * 30,
    ],
)
def test_implausible_size_is_refused_before_anything_is_built(override: str) -> None:
    from vqd_scale.training.tasks.config import TrainConfig

    required = ["run=a", "total_images=1", "data.path=a", "tokenizer=a"]
    with pytest.raises(UserError, match=override.partition("=")[0]):
        load_config(TrainConfig, None, [*required, override])
