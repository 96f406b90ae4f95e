"""Outputs of all tools: whatever a user has at or beside the place of an output survives byte for byte."""

import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import yaml
from PIL import Image
from webdataset.writer import TarWriter

from tests.evaluation.test_sweep import SMALL
from tests.models.exchange.microsoft_files import HEADS, ITHQ_SLIM, VQ_SLIM, Kind, checkpoint_of, write
from tests.models.exchange.test_taming import write_published
from vqd_scale.cli import (
    convert_checkpoint,
    cost,
    demo,
    eval_ablation,
    eval_coco_fid,
    eval_sweep,
    evaluate_tokenizer,
    inpaint,
    launch,
    make_shards,
    plot_run,
    reduce_codebook,
    sample,
    tokenize_shards,
    train,
    train_tokenizer,
)
from vqd_scale.data.shards.shard_index import ShardSet, finish_set
from vqd_scale.data.shards.shard_table import publish_table, read_indexed, read_table

ROOT = Path(__file__).parents[2]
STEPS = ["--steps", "2"]


class Tool(NamedTuple):
    """A tool's entry point, its arguments for inputs and an output, and names of files that it writes."""

    main: Callable[[list[str]], None]
    arguments: Callable[[Path, str], list[str]]
    names: tuple[str, ...]


MODEL = ("config.json", "model.safetensors", "README.md")
IMPORTED = ("config.json", "model.safetensors")
RUN = ("config.yaml", "metrics.jsonl", "export", "environment.json", "checkpoints")
SHARDS = ("000000.tar", "quarantine.jsonl", "index.json")


def convert(*words: str) -> Callable[[Path, str], list[str]]:
    """Return arguments of convert_checkpoint; of these, ``IN/`` is the folder of inputs."""
    return lambda inputs, out: [word.replace("IN/", f"{inputs}/").replace("OUT", out) for word in words]


FOLDER_TOOLS = {
    "microsoft": Tool(
        convert_checkpoint.main,
        convert("microsoft", "IN/ithq_learnable.pth", "OUT", "--heads", str(HEADS)),
        MODEL,
    ),
    "taming": Tool(
        convert_checkpoint.main, convert("taming", "IN/last.ckpt", "IN/model.yaml", "OUT"), IMPORTED
    ),
    "diffusers": Tool(convert_checkpoint.main, convert("diffusers", "IN/diffusers", "OUT"), MODEL),
    "export": Tool(
        convert_checkpoint.main, convert("export", "IN/bundle", "OUT"), ("model_index.json", "vqvae")
    ),
    "consolidate": Tool(convert_checkpoint.main, convert("consolidate", "IN/run", "OUT"), MODEL),
    "deepspeed": Tool(
        convert_checkpoint.main,
        convert("deepspeed", "IN/ds", "IN/train.yaml", "OUT", "--trust-pickle"),
        MODEL,
    ),
    "reduce": Tool(
        reduce_codebook.main,
        convert("reduce", "IN/bundle/tokenizer", "OUT", "--counts", "IN/counts.json", "--min-count", "30"),
        IMPORTED,
    ),
    "remap": Tool(
        reduce_codebook.main,
        convert("remap", "IN/tokens", "OUT", "--tokenizer", "IN/bundle/tokenizer", "--reduced", "IN/reduced"),
        SHARDS,
    ),
    "sample": Tool(
        sample.main,
        convert("IN/bundle", "a star", "a bus", *STEPS, "--output", "OUT"),
        ("000000.png", "grid.png", "samples.json"),
    ),
    "inpaint": Tool(
        inpaint.main,
        convert("IN/bundle", "IN/images/0.png", "IN/images/1.png", "a star", *STEPS, "--output", "OUT"),
        ("000000.png",),
    ),
    "eval_coco_fid": Tool(
        eval_coco_fid.main,
        convert("IN/bundle", "--config", "IN/eval.yaml", "--data", "IN/shards/held_out", "--output", "OUT"),
        ("report.html", "config.yaml", "samples-0.png", "parts", "images", "reference.safetensors.parts"),
    ),
    "eval_sweep": Tool(
        eval_sweep.main,
        convert("IN/bundle", "--config", "IN/sweep.yaml", "--data", "IN/shards/held_out", "--output", "OUT"),
        ("report.html", "sweep.json", "plot-0.png", "points"),
    ),
    "eval_ablation": Tool(
        eval_ablation.main, convert("IN/ablation.yaml", "output=OUT"), ("report.html", "shared.json")
    ),
    "evaluate_tokenizer": Tool(
        evaluate_tokenizer.main,
        convert(
            *("IN/bundle/tokenizer", "--data", "IN/shards/held_out", "--image-size", "16", "--output", "OUT")
        ),
        ("report.html", "report.json", "reconstructions.png"),
    ),
    "imagefolder": Tool(
        make_shards.main, convert("imagefolder", "IN/images", "OUT", "image_size=16"), SHARDS
    ),
    "img2dataset": Tool(make_shards.main, convert("img2dataset", "IN/tars", "--output", "OUT"), SHARDS),
    "index": Tool(make_shards.main, convert("index", "IN/tars", "--output", "OUT"), SHARDS),
    "tokenize_shards": Tool(
        tokenize_shards.main, convert("IN/tokenize.yaml", "output=OUT"), (*SHARDS, "statistics.json")
    ),
    "train": Tool(train.main, convert("IN/train.yaml", "run=OUT"), RUN),
    "train_tokenizer": Tool(train_tokenizer.main, convert("IN/tokenizer.yaml", "run=OUT"), RUN),
    "launch": Tool(launch.main, convert("train", "IN/train.yaml", "run=OUT", "--cluster", "local"), RUN),
    "demo": Tool(demo.main, convert("--fast", "--output", "OUT"), ("report.html", "stages.json", "shards")),
}
SPLIT_TOOLS = {
    "shapes": Tool(
        make_shards.main, convert("shapes", "OUT", "train_samples=4", "held_out_samples=2"), SHARDS
    ),
    "photographs": Tool(make_shards.main, convert("photographs", "OUT", "train_samples=4"), SHARDS),
}
FILE_TOOLS = {
    "plot_run": Tool(plot_run.main, convert("IN/run", "--output", "OUT"), ()),
    "cost": Tool(cost.main, convert("IN/train.yaml", "--output", "OUT"), ()),
    "count": Tool(reduce_codebook.main, convert("count", "IN/tokens", "OUT"), ()),
}
# Their runs take longer; other tests run them.
SLOW = {"deepspeed", "eval_ablation", "demo", "launch"}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the inputs of all tools: weights of several kinds, images, shards, tokens and a run."""
    folder = tmp_path_factory.mktemp("inputs")
    write(folder, checkpoint_of(Kind(), ITHQ_SLIM))
    write_published(folder, VQ_SLIM)
    for number, name in enumerate(("microsoft", "export")):
        tool, out = FOLDER_TOOLS[name], ("bundle", "diffusers")[number]
        tool.main(tool.arguments(folder, str(folder / out)))
    (folder / "images").mkdir()
    (folder / "tars").mkdir()
    for number in range(2):
        pixels = np.random.default_rng(number).integers(0, 256, (16, 16, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{number}.png")
        (folder / "images" / f"{number}.txt").write_text("noise")
    with TarWriter(str(folder / "tars" / "00000.tar")) as writer:
        writer.write({"__key__": "a", "txt": "words"})
    make_shards.main(
        ["shapes", str(folder / "shards"), "image_size=16", "train_samples=16", "held_out_samples=12"]
    )
    captions = {"context_length": 8, "bpe_merges": 300}
    tokens = {"images": str(folder / "shards" / "train"), "output": str(folder / "tokens"), "size": 16}
    run = {
        "run": str(folder / "run"),
        "total_images": 16,
        "tokenizer": str(folder / "bundle" / "tokenizer"),
        "data": {"path": str(folder / "tokens"), "global_batch_size": 8, "shuffle_window": 4},
        "engine": {"precision": "fp32", "zero": {"stage": 1}},
        "denoiser": {"width": 16, "layers": 1, "heads": 2, "condition": {"kind": "text", "width": 16}},
        "text": {"kind": "tower", "width": 16, "heads": 2, "layers": 1, **captions},
        "diffusion": {"kind": "paper", "steps": 10},
        "log": {"every_images": 8},
    }
    tokenizer = {
        "run": str(folder / "tokenizer-run"),
        "total_images": 16,
        "transform": {"size": 16},
        "data": {"path": str(folder / "shards" / "train"), "global_batch_size": 8, "shuffle_window": 4},
        "engine": {"precision": "fp32", "zero": {"stage": 1}},
        "vqgan": {
            "codebook_size": 9,
            "code_dim": 4,
            "channels": 8,
            "channel_multipliers": [1, 2],
            "num_res_blocks": 1,
            "norm": "none",
        },
        "codebook_warmup_images": 8,
        "validation": {"path": str(folder / "shards" / "held_out")},
        "log": {"every_images": 8},
    }
    evaluation = {**SMALL, "sampling": {**SMALL["sampling"], "save_images": True}}
    axes = {"axes": {"sampling.sampler.steps": [1]}, "x_axis": "sampling.sampler.steps"}
    sweep = {"evaluation": SMALL, "metrics": ["alignment.mean"], **axes}
    ablation = {"output": "out", "train": str(folder / "train.yaml"), "evaluation": SMALL}
    configs = {
        "tokenize": {**tokens, "tokenizer": run["tokenizer"], "captions": captions},
        "train": run,
        "tokenizer": tokenizer,
        "eval": evaluation,
        "sweep": sweep,
        "ablation": ablation,
    }
    for name, config in configs.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(config))
    tokenize_shards.main([str(folder / "tokenize.yaml")])
    reduce_codebook.main(["count", str(folder / "tokens"), str(folder / "counts.json")])
    FOLDER_TOOLS["reduce"].main(FOLDER_TOOLS["reduce"].arguments(folder, str(folder / "reduced")))
    train.main([str(folder / "train.yaml")])
    return folder


@pytest.fixture(autouse=True)
def _without_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


def without_locks(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if not re.fullmatch(r"\.lock-\d+\.json", path.name))


def contents(*folders: Path) -> dict[str, str]:
    """Return the state of everything below some folders: a file that is written again has another.

    Without the locks of runs, of which each start has its own.
    """
    states: dict[str, str] = {}
    for folder in folders:
        for path in without_locks(folder):
            state = path.lstat()
            is_folder = path.is_dir() and not path.is_symlink()
            states[str(path)] = (
                f"{state.st_ino}" if is_folder else f"{state.st_ino} {state.st_mtime_ns} {state.st_size}"
            )
    return states


def refused(tool: Tool, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Return the sentence with which a tool refuses its arguments."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        tool.main(arguments)
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error.strip().rpartition("\n")[2]


def place_file(out: Path, name: str) -> str:
    del name
    out.write_text("mine")
    return str(out)


def place_note(out: Path, name: str) -> str:
    del name
    (out / "mine").mkdir(parents=True)
    (out / "mine" / "notes.txt").write_text("mine")
    return str(out / "mine")


def place_name(out: Path, name: str) -> str:
    out.mkdir()
    (out / name).write_text("mine")
    return str(out / name)


def place_full_link(out: Path, name: str) -> str:
    place_note(out.with_name("elsewhere"), name)
    out.symlink_to("elsewhere")
    return str(out)


def place_empty_link(out: Path, name: str) -> str:
    del name
    out.with_name("elsewhere").mkdir()
    out.symlink_to("elsewhere")
    return str(out)


def place_dangling_link(out: Path, name: str) -> str:
    del name
    out.symlink_to("nowhere")
    return str(out)


OBSTACLES = [place_file, place_note, place_name, place_full_link, place_empty_link, place_dangling_link]


@pytest.mark.parametrize("place", OBSTACLES, ids=lambda place: place.__name__)
@pytest.mark.parametrize("name", [*FOLDER_TOOLS, *SPLIT_TOOLS])
def test_what_is_in_the_way_is_named_and_survives(
    inputs: Path,
    tmp_path: Path,
    name: str,
    place: Callable[[Path, str], str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(ROOT)
    tool = FOLDER_TOOLS.get(name) or SPLIT_TOOLS[name]
    out = tmp_path / ("out" if name in FOLDER_TOOLS else "train")
    for number, own_name in enumerate(tool.names if place is place_name else tool.names[:1]):
        if number:
            shutil.rmtree(out)
        obstacle = place(out, own_name)
        before = contents(tmp_path, inputs)
        arguments = tool.arguments(inputs, str(out if name in FOLDER_TOOLS else tmp_path))
        error = refused(tool, arguments, capsys)
        assert obstacle in error or (place is place_full_link and str(out) in error)
        assert contents(tmp_path, inputs) == before


@pytest.mark.parametrize("output", ["", ".", "..", "below/.."])
@pytest.mark.parametrize("name", [*FOLDER_TOOLS, *FILE_TOOLS])
def test_current_and_parent_folders_are_refused(
    inputs: Path,
    tmp_path: Path,
    name: str,
    output: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "here" / "below").mkdir(parents=True)
    (tmp_path / "notes.txt").write_text("mine")
    monkeypatch.chdir(tmp_path / "here")
    if name == "demo":
        Path("tools").mkdir()
        Path("tools", "train.py").touch()
    before = contents(tmp_path, inputs)
    tool = FOLDER_TOOLS.get(name) or FILE_TOOLS[name]
    error = refused(tool, tool.arguments(inputs, output), capsys)
    assert "output" in error or "empty" in error or output in error
    assert contents(tmp_path, inputs) == before


PLACES = ("run", ".", "run/checkpoints", "run/export", "bundle", "bundle/tokenizer")
# The same commands wrote these.
REWRITTEN = {("microsoft", "bundle"), ("train", "run"), ("launch", "run")}


@pytest.mark.parametrize(
    ("name", "place"),
    [(name, place) for name in FOLDER_TOOLS for place in PLACES if (name, place) not in REWRITTEN],
)
def test_runs_and_inputs_are_refused_as_outputs(
    inputs: Path,
    name: str,
    place: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(ROOT)
    tool = FOLDER_TOOLS[name]
    before = contents(inputs)
    assert str(inputs / place) in refused(tool, tool.arguments(inputs, str(inputs / place)), capsys)
    assert contents(inputs) == before


def run_twice(tool: Tool, inputs: Path, out: Path) -> None:
    """Run a command twice; between the runs, the user adds files to the output."""
    neighbors = out.parent / f"{out.name}.partial", out.parent / f".{out.name}.partial"
    for neighbor in neighbors:
        neighbor.mkdir()
        (neighbor / "notes.txt").write_text("mine")
    arguments = tool.arguments(inputs, str(out))
    before = contents(inputs, *neighbors)
    tool.main(arguments)
    names = sorted(str(path.relative_to(out)) for path in without_locks(out))
    user_files = [out / "notes.txt", out / "mine" / "grid.png"]
    for file in user_files:
        file.parent.mkdir(exist_ok=True)
        file.write_text("mine")
    tool.main(arguments)
    assert [file.read_text() for file in user_files] == ["mine", "mine"]
    after = {str(path.relative_to(out)) for path in without_locks(out)} - {
        "mine",
        "notes.txt",
        "mine/grid.png",
    }
    assert sorted(after) == names
    assert contents(inputs, *neighbors) == before
    assert not list(out.rglob("*.partial"))


@pytest.mark.parametrize("name", sorted(FOLDER_TOOLS.keys() - SLOW))
def test_same_command_again_keeps_what_a_user_added(inputs: Path, tmp_path: Path, name: str) -> None:
    run_twice(FOLDER_TOOLS[name], inputs, tmp_path / "out")


@pytest.mark.parametrize("name", SPLIT_TOOLS)
def test_same_command_again_keeps_what_a_user_added_beside_splits(
    inputs: Path, tmp_path: Path, name: str
) -> None:
    run_twice(SPLIT_TOOLS[name], inputs, tmp_path / "out")


@pytest.mark.parametrize("name", FILE_TOOLS)
def test_named_file_is_replaced_and_nothing_else(
    inputs: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    tool, out = FILE_TOOLS[name], tmp_path / "out.png"
    (tmp_path / "out.png.partial").write_text("mine")
    before = contents(inputs)
    for _ in range(2):
        tool.main(tool.arguments(inputs, str(out)))
        assert out.stat().st_size > 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.png", "out.png.partial"]
    assert (tmp_path / "out.png.partial").read_text() == "mine"
    (tmp_path / "target").write_text("mine")
    (tmp_path / "link").symlink_to("target")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for obstacle in (tmp_path / "link", tmp_path / "folder", tmp_path / "pipe"):
        assert str(obstacle) in refused(tool, tool.arguments(inputs, str(obstacle)), capsys)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_text() == "mine"
    assert (tmp_path / "pipe").is_fifo()
    assert contents(inputs) == before


def test_curves_in_a_run_folder_replace_only_those_of_the_tool(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tool = FILE_TOOLS["plot_run"]
    for run in ("mine", "ours"):
        (tmp_path / run).mkdir()
        shutil.copy(inputs / "run" / "metrics.jsonl", tmp_path / run)
    (tmp_path / "mine" / "curves.png").write_text("mine")
    assert str(tmp_path / "mine" / "curves.png") in refused(tool, [str(tmp_path / "mine")], capsys)
    assert (tmp_path / "mine" / "curves.png").read_text() == "mine"
    for _ in range(2):
        tool.main([str(tmp_path / "ours")])


@pytest.mark.parametrize("name", ["index.json", "00000.npz", "quarantine.jsonl", "near_duplicates.jsonl"])
def test_index_beside_tars_replaces_no_file_of_theirs(
    inputs: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(inputs / "tars", tmp_path / "tars")
    (tmp_path / "tars" / name).write_text("{}")
    before = contents(tmp_path)
    for command in ("index", "img2dataset"):
        error = refused(FOLDER_TOOLS[command], [command, str(tmp_path / "tars")], capsys)
        assert str(tmp_path / "tars" / name) in error
    assert contents(tmp_path) == before


def test_keys_of_a_dataset_are_no_paths(inputs: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    keys = [
        "../../outside",
        str(tmp_path / "absolute"),
        "nul",
        "Cat",
        "cat",
        "grid",
        "x" * 300,
        "\u00e4/\u00f6",
    ]
    with TarWriter(str(data / "0.tar")) as writer:
        for number in range(len(keys)):
            writer.write({"__key__": str(number), "txt": "a star"})
    make_shards.main(["index", str(data)])
    # An index may come from someone else as well.
    shards = ShardSet.open(data)
    table = replace(read_table(shards.shards[0]), keys=np.array([key.encode() for key in keys]))
    indexed = publish_table(data / "0.npz", table, read_indexed("0.tar", data / "0.npz"))
    finish_set(data, shards.meta, [indexed])
    before, out = set(tmp_path.rglob("*")), data / "samples"
    options = ["--data", str(data), *STEPS, "--num-samples", str(len(keys)), "--output", str(out)]
    for _ in range(2):
        sample.main([str(inputs / "bundle"), *options])
    new_paths = set(tmp_path.rglob("*")) - before
    assert all(path == out or path.parent == out for path in new_paths)
    images = {path.name.lower() for path in new_paths if path.suffix == ".png"} - {"grid.png"}
    assert len(images) == len(keys)


def test_damaged_image_of_an_earlier_start_is_named(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tool, out = FOLDER_TOOLS["sample"], tmp_path / "out"
    tool.main(tool.arguments(inputs, str(out)))
    (out / "000000.png").write_text("no image")
    error = refused(tool, tool.arguments(inputs, str(out)), capsys)
    assert str(out / "000000.png") in error


def test_launch_into_an_existing_folder_deletes_nothing(inputs: Path, tmp_path: Path) -> None:
    from vqd_scale.core.errors import UserError
    from vqd_scale.launchers.slurm import Resources
    from vqd_scale.launchers.slurm import launch as submit

    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / "notes.txt").write_text("mine")
    before = contents(tmp_path)
    with pytest.raises(UserError, match="in the way"):
        submit("plot", [["plot_run.py", "run"]], Resources(cluster="debug"), tmp_path / "jobs", tmp_path)
    assert contents(tmp_path) == before
