"""Start of the tools: help, and the refusal of wrong arguments, before torch is imported."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
TOOLS = sorted(path.stem for path in (ROOT / "tools").glob("*.py") if not path.stem.startswith("_"))
SUBCOMMANDS = {
    "convert_checkpoint": ["microsoft", "taming", "diffusers", "export", "consolidate", "deepspeed"],
    "launch": ["train", "tokenizer", "tokenize", "eval", "status", "cancel"],
    "make_shards": [
        *("shapes", "photographs", "coco", "cub200", "oxford102", "imagenet", "ffhq", "imagefolder"),
        *("img2dataset", "index"),
    ],
    "reduce_codebook": ["count", "reduce", "remap"],
}
HEAVY = ("torch", "torchvision", "open_clip", "deepspeed", "scipy", "sklearn", "matplotlib", "torch_fidelity")

# Runs tools in one process, in which an import of a heavy library raises an error that no tool handles.
RUNNER = f"""
import contextlib, io, json, runpy, sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {HEAVY!r}:
            raise RuntimeError(f"{{name}} is imported")

sys.meta_path.insert(0, Blocker())
sys.path.insert(0, "tools")
for line in sys.stdin:
    tool, *arguments = json.loads(line)
    sys.argv = [f"tools/{{tool}}.py", *arguments]
    code, output, errors = 0, io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as end:
            code = end.code or 0
        except RuntimeError as error:
            code = str(error)
    print(json.dumps([code, output.getvalue(), errors.getvalue()]), flush=True)
"""


class Answer(NamedTuple):
    """Exit code (or the name of a heavy library that was imported), standard output and standard error."""

    code: int | str
    output: str
    errors: str


Start = Callable[..., Answer]


@pytest.fixture(scope="module")
def start() -> Iterator[Start]:
    command = [sys.executable, "-c", RUNNER]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        requests, answers = process.stdin, process.stdout

        def ask(*words: str) -> Answer:
            print(json.dumps(words), file=requests, flush=True)
            return Answer(*json.loads(answers.readline()))

        yield ask
        requests.close()


def test_import_of_heavy_library_fails(start: Start) -> None:
    assert start("benchmark", "plan", "--rounds", "1").code == "torch is imported"


@pytest.mark.parametrize(
    "words",
    [*([tool] for tool in TOOLS), *([tool, name] for tool in SUBCOMMANDS for name in SUBCOMMANDS[tool])],
    ids=" ".join,
)
def test_help_ends_with_example_and_imports_no_heavy_library(start: Start, words: list[str]) -> None:
    tool, *subcommand = words
    answer = start(*words, "--help")
    assert (answer.code, answer.errors) == (0, "")
    example = answer.output.split("example:\n")[1].strip()
    assert f"tools/{tool}.py" in example
    assert "\n" not in example
    for name in [] if subcommand else SUBCOMMANDS.get(tool, []):
        assert f"  {name} " in answer.output


TRAIN = "configs/demo/train.yaml"
MODEL = "runs/no-model"
SHARDS = ["--data", "/nowhere"]
NO_SHARDS = "no set of shards is here"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["train", TRAIN, "optim.lrr=1"], "optim.lrr: unknown key"),
        (["train", TRAIN, "optim.lr=fast"], "optim.lr: given 'fast'"),
        (["train", "/nowhere.yaml"], "/nowhere.yaml: the configuration file cannot be read"),
        (["train", TRAIN, "data.path=/nowhere"], "tokenizer bundle"),
        (["train", TRAIN, "tokenizer=/nowhere"], "/nowhere: there is no tokenizer bundle here"),
        (["train_tokenizer", "configs/demo/tokenizer.yaml", "data.path=/nowhere"], NO_SHARDS),
        (["train_tokenizer", "configs/demo/tokenizer.yaml", "vqgan.code=1"], "vqgan.code: unknown key"),
        (["tokenize_shards", "configs/demo/tokenize.yaml", "images=/nowhere"], NO_SHARDS),
        (["tokenize_shards", "configs/demo/tokenize.yaml", "--worker", "1"], "give both or neither"),
        (["launch", TRAIN, "data.path=/nowhere"], NO_SHARDS),
        (["launch", "train", TRAIN, "optim.lrr=1"], "optim.lrr: unknown key"),
        (["launch", "eval", "/nowhere"], "/nowhere: there is no such folder"),
        (["make_shards", "shapes", "/tmp/out", "sede=1"], "did you mean 'seed'?"),
        (["make_shards", "index", "pipe:rm"], "commands are never run"),
        (["sample", MODEL, "a star"], f"{MODEL}: there is no model bundle here"),
        (["sample", MODEL, *SHARDS], NO_SHARDS),
        (["sample", MODEL], "give either prompts, or shards"),
        (["sample", MODEL, "a star", "--sampler", "magic"], "allowed: 'ancestral', 'strided', 'purity'"),
        (["sample", MODEL, "a star", "--sampler-option", "weight=1"], "sampler.weight: unknown key"),
        (["sample", MODEL, "a star", "--top-p", "2"], "truncation.p: given 2.0"),
        (["inpaint", MODEL, "image.png", "mask.png", "a star"], f"{MODEL}: there is no model bundle here"),
        (["eval_coco_fid", MODEL], f"{MODEL}: there is no model bundle here"),
        (["eval_coco_fid", MODEL, "--config", "/nowhere.yaml"], "the configuration file cannot be read"),
        (["eval_coco_fid", MODEL, "kid.sizes=1"], "did you mean 'size'?"),
        (["eval_sweep", MODEL, "axis=1"], "did you mean 'x_axis'?"),
        (["eval_ablation", "configs/evaluation/paper_ablation.yaml", "seed=1"], "did you mean 'seeds'?"),
        (["evaluate_tokenizer", "/nowhere", *SHARDS, "--output", "out"], NO_SHARDS),
        (["cost", TRAIN, "denoiser.wide=1"], "denoiser.wide: unknown key"),
        (["plot_run", "/nowhere"], "/nowhere: there is no metrics.jsonl"),
        (["reduce_codebook", "count", "/nowhere", "counts.json"], NO_SHARDS),
        (["reduce_codebook", "reduce", "/nowhere", "out", "--counts", "c.json"], "no tokenizer bundle here"),
        (["convert_checkpoint", "microsoft", "/nowhere.pth", "out"], "there is no such file"),
        (["convert_checkpoint", "taming", "/nowhere.ckpt", "/nowhere.yaml", "out"], "there is no such file"),
        (["convert_checkpoint", "diffusers", "/nowhere", "out"], "there is no diffusers pipeline"),
        (["convert_checkpoint", "export", "/nowhere", "out"], "there is no model bundle here"),
        (["convert_checkpoint", "consolidate", "/nowhere", "out"], "the configuration file cannot be read"),
        (["convert_checkpoint", "deepspeed", "/nowhere", TRAIN, "out"], "give --trust-pickle"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_user_error_is_one_sentence_without_torch(start: Start, words: list[str], sentence: str) -> None:
    answer = start(*words)
    assert answer.code == 2, answer
    assert answer.errors.startswith(f"{words[0]}.py: ")
    assert sentence in answer.errors
    assert (answer.output, answer.errors.count("\n")) == ("", 1)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["train"], "Missing argument"),
        (["train", TRAIN, "--fast"], "--fast"),
        (["make_shards", "laion"], "No such command 'laion'"),
        (["sample", MODEL, "a star", "--steps", "many"], "--steps"),
        (["launch", "train", TRAIN, "--nodes", "4-2"], "a minimum and maximum: 4-8"),
        (["benchmark", "speed"], "'loss'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_usage_exits_with_code_2(start: Start, words: list[str], sentence: str) -> None:
    answer = start(*words)
    assert (answer.code, answer.output) == (2, "")
    assert answer.errors.startswith(f"Usage: {words[0]}.py")
    assert sentence in answer.errors


def test_overrides_and_options_may_be_interspersed(start: Start) -> None:
    answer = start("launch", TRAIN, "seed=3", "--hours", "2", "optim.lr=0.5", "--print-config", "seed=4")
    assert (answer.code, answer.errors) == (0, "")
    assert "\nseed: 4\n" in answer.output
    assert "\n  lr: 0.5\n" in answer.output
