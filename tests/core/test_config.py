import importlib
import pkgutil
from pathlib import Path
from typing import Annotated, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Discriminator, Field, PositiveInt, Tag, model_validator

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


def complaint(*overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_config(Run, None, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_defaults_then_file_then_overrides(tmp_path: Path) -> None:
    text = "optim: {lr: 0.5, warmup: 7}\nname: file\n"
    config = load(tmp_path, text, "optim.lr=0.1", "optim.lr=0.2", "name=last")
    assert config == Run(name="last", optim=Optimizer(lr=0.2, warmup=7))


def test_an_empty_file_is_the_defaults(tmp_path: Path) -> None:
    assert load(tmp_path, "# nothing but a comment\n") == Run()


@pytest.mark.parametrize("text", ["2e-4", "2.0e-4", "2E-4", "0.0002", ".0002"])
def test_every_spelling_of_a_float(tmp_path: Path, text: str) -> None:
    # YAML 1.1 takes `2e-4` for a string.
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
def test_unknown_key_names_its_path_and_the_nearest(override: str, path: str, allowed: str) -> None:
    message = complaint(override)
    assert f" {path}: unknown key" in message
    assert allowed in message


def test_suggestions_in_a_union_come_from_the_chosen_kind() -> None:
    assert "allowed here: kind, offset;" in complaint("schedule={kind: cosine, ofset: 1}")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.lr=fast", "optim.lr: given 'fast', allowed: a valid number"),
        ("optim.lr=.inf", "optim.lr: given inf, allowed: a finite number"),
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
def test_wrong_value_says_where_what_and_what_is_allowed(override: str, message: str) -> None:
    assert message in complaint(override)


def test_further_mistakes_are_counted() -> None:
    assert complaint("optim.lr=x", "shuffle=x").endswith("(and 1 more)")


def test_a_config_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Run().name = "other"  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("text", ["name: a\nname: b\n", "optim:\n  lr: 1\n  warmup: 2\n  lr: 3\n"])
def test_a_key_given_twice(tmp_path: Path, text: str) -> None:
    with pytest.raises(UserError, match=r"run\.yaml: not valid YAML: the key '(name|lr)' is given twice"):
        load(tmp_path, text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: [", "not valid YAML"),
        ("- a\n- b\n", "expected a mapping of keys to values, found list"),
        ("!!python/object/apply:os.getcwd []", "not valid YAML"),
    ],
)
def test_files_that_are_no_configuration(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load(tmp_path, text)
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path / "absent.yaml", tmp_path, binary):
        with pytest.raises(UserError, match=f"{path}: the configuration file cannot be read"):
            load_config(Run, path)


@pytest.mark.parametrize("override", ["name", "=3", "optim.=3", ".lr=3", "optim..lr=3", "--lr"])
def test_overrides_that_are_none(override: str) -> None:
    assert complaint(override) == f"override '{override}': expected key.subkey=value."


def test_overrides_that_cannot_be_applied() -> None:
    assert "is not a YAML value; quote it" in complaint("name=[")
    assert "name holds the value 'a', not further keys" in complaint("name=a", "name.b=c")


def test_an_override_may_hold_an_equals_sign() -> None:
    assert load_config(Run, None, ["name=a=b"]).name == "a=b"


schedules = st.one_of(
    st.builds(Linear, steps=st.integers()),
    st.builds(Cosine, offset=st.floats(allow_nan=False, allow_infinity=False)),
)
names = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1)
runs = st.builds(
    Run,
    name=names,
    shuffle=st.booleans(),
    optim=st.builds(
        Optimizer,
        lr=st.floats(allow_nan=False, allow_infinity=False),
        warmup=st.one_of(st.just("auto"), st.integers(min_value=1)),
    ),
    schedule=schedules,
    stages=st.lists(schedules, max_size=3).map(tuple),
)


@given(runs)
def test_what_is_written_is_read_back_equal(tmp_path_factory: pytest.TempPathFactory, run: Run) -> None:
    path = tmp_path_factory.getbasetemp() / "round_trip.yaml"
    path.write_text(to_yaml(run), encoding="utf-8")
    assert load_config(Run, path) == run


@given(runs)
def test_an_override_says_the_same_as_the_field(run: Run) -> None:
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
def test_a_choice_may_have_one_that_need_not_be_named(overrides: list[str], expected: Config) -> None:
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
def test_a_mistake_in_such_a_choice_is_told_like_any_other(override: str, sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config(Tagged, None, [override])
    assert sentence in str(caught.value)


def test_a_whole_file_may_be_one_of_several_kinds() -> None:
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
def test_a_former_name_is_refused_with_the_present_one(override: str, sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config(Renamed, None, [override])
    assert str(caught.value) == sentence


def test_a_former_name_whose_successor_is_not_allowed_here_is_an_unknown_key() -> None:
    with pytest.raises(UserError, match=r"data\.images: unknown key; allowed here: global_batch_size, path"):
        load_config(Renamed, None, ["data.images=4"])


def configs_of(config: type[Config]) -> list[type[Config]]:
    return [each for own in config.__subclasses__() for each in (own, *configs_of(own))]


def test_every_successor_is_a_key_of_the_package() -> None:
    for module in pkgutil.walk_packages(vqd_scale.__path__, "vqd_scale."):
        importlib.import_module(module.name)
    keys = {
        name
        for config in configs_of(Config)
        if config.__module__.startswith("vqd_scale.")
        for name in config.model_fields
    }
    assert len(keys) > 100
    assert [name for names in RENAMED.values() for name in names if name not in keys] == []
