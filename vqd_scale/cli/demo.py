"""``demo``: the full pipeline on two CPU cores, each stage through its own command-line tool."""

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import Field, TypeAdapter
from typing_extensions import TypedDict

from vqd_scale.cli.base import Tool
from vqd_scale.core.atomic_io import publish_json, read_json
from vqd_scale.core.environment import computes_bfloat16
from vqd_scale.core.errors import UserError
from vqd_scale.core.outputs import reserve

_STAGES_FILE = "stages.json"
_GRID_IMAGES = 40


class _Figures(TypedDict):
    frechet_distance_tokenizer: float
    alignment: dict[str, Any]


class _Evaluation(TypedDict):
    count: int
    figures: _Figures


class _Reconstruction(TypedDict):
    psnr: float
    ssim: float
    reader_on_originals: float
    reader_on_reconstructions: float


_SECONDS = TypeAdapter(dict[str, float])
_EVALUATION = TypeAdapter(_Evaluation)
_TOKENIZERS = TypeAdapter(Annotated[dict[str, _Reconstruction], Field(min_length=1, max_length=1)])

main = Tool()
"""Entry point of ``tools/demo.py``."""


@dataclass(frozen=True)
class Stage:
    """One stage of the pipeline, run by one tool.

    Attributes:
        name: Name of the stage in the report.
        tool: File name in ``tools/``.
        arguments: Command-line arguments of the tool.
        ranks: Number of ranks.
    """

    name: str
    tool: str
    arguments: list[str]
    ranks: int = 1


def stages(configs: Path, output: Path, prompts: int, shards: list[str], precision: str) -> list[Stage]:
    """Return the stages in order.

    Args:
        configs: Folder of the stages' configurations.
        output: Output folder of all stages.
        prompts: Number of held-out prompts of the evaluation.
        shards: Configuration overrides of the dataset.
        precision: Training precision of the denoiser.
    """
    train, tokenizer = output / "shards" / "train", output / "tokenizer" / "export"
    data = ["--data", str(output / "shards" / "held_out")]
    sampling = ["--steps", "16", "--guidance-scale", "1.5", "--top-p", "0.9"]

    def configured(name: str, *overrides: str, ranks: int = 1) -> Stage:
        config = {"train_tokenizer": "tokenizer", "tokenize_shards": "tokenize"}.get(name, name)
        return Stage(name, f"{name}.py", [str(configs / f"{config}.yaml"), *overrides], ranks)

    def reported(name: str, tool: str, subject: Path, folder: str, *options: str) -> Stage:
        return Stage(name, tool, [str(subject), *data, "--output", str(output / folder), *options])

    count = ["--image-size", "64", "--num-samples", str(prompts)]
    protocol = ["--config", str(configs / "evaluation.yaml")]
    model = output / "model"
    images = ["--num-samples", str(_GRID_IMAGES), *sampling]
    return [
        Stage("make_shards", "make_shards.py", ["shapes", str(output / "shards"), *shards]),
        configured("train_tokenizer", f"run={output / 'tokenizer'}", f"data.path={train}"),
        reported("evaluate_tokenizer", "evaluate_tokenizer.py", tokenizer, "tokenizer-report", *count),
        configured(
            "tokenize_shards",
            f"images={train}",
            f"output={output / 'tokens'}",
            f"tokenizer={tokenizer}",
        ),
        configured(
            "train",
            f"run={model}",
            f"data.path={output / 'tokens'}",
            f"tokenizer={tokenizer}",
            f"engine.precision={precision}",
            ranks=2,
        ),
        reported("sample", "sample.py", model, "samples", *images),
        reported("evaluate", "eval_coco_fid.py", model, "evaluation", *protocol),
    ]


@main.command("python tools/demo.py --fast")
def demo(
    fast: Annotated[
        bool, typer.Option("--fast", help="the short form, about two minutes, with worse images")
    ] = False,
    output: Annotated[
        Path | None, typer.Option(help="output folder (default: runs/demo, or runs/demo-fast)")
    ] = None,
) -> None:
    """Run the full pipeline on two cores: shards, tokenizer, tokens, training on two ranks, samples, metrics.

    The same command resumes an interrupted demo.
    """
    tools = Path("tools")
    if not (tools / "train.py").is_file():
        raise UserError(
            "the demo runs the project's own tools and configs: start it in the project's top folder."
        )
    if fast:
        folder, bar = output or Path("runs/demo-fast"), (0.3, 0.0)
        shards = ["train_samples=2048", "held_out_samples=128"]
        plan = stages(Path("configs/demo-fast"), folder, 96, shards, "fp32")
    else:
        folder, bar = output or Path("runs/demo"), (0.95, 0.8)
        # On CPUs without bfloat16 instructions bf16 is slower than fp32; the demo is slower with either.
        precision = "bf16" if computes_bfloat16() else "fp32"
        plan = stages(Path("configs/demo"), folder, 256, ["train_samples=8192"], precision)
    reserve(folder, "demo.py", [_STAGES_FILE, "report.json", "report.html", "loss.png"])
    seconds = _run(plan, tools, folder)
    report = _metrics(folder) | {"seconds": seconds}
    publish_json(folder / "report.json", report)
    _write_page(folder, report)
    _print_summary(folder, report)
    accuracy = report["attribute_accuracy"]
    if accuracy["mean"] < bar[0] or accuracy["all"] < bar[1]:
        print(
            f"below the bar of {bar[0]:.0%} mean and {bar[1]:.0%} with all attributes correct",
            file=sys.stderr,
        )
        raise SystemExit(1)


def _run(plan: list[Stage], tools: Path, output: Path) -> dict[str, float]:
    """Run the unfinished stages; returns the seconds of each (of the last start for a resumed stage)."""
    from vqd_scale.launchers.local import run_locally

    record = output / _STAGES_FILE
    seconds = read_json(record, "list of stages", _SECONDS) if record.exists() else {}
    for number, stage in enumerate(plan, start=1):
        print(f"[{number}/{len(plan)}] {stage.name}", end="", flush=True)
        if stage.name in seconds:
            print(": done before")
            continue
        print(f": {stage.tool} {' '.join(stage.arguments)}", flush=True)
        began = time.monotonic()
        status = run_locally(tools / stage.tool, stage.arguments, stage.ranks)
        if status != 0:
            raise UserError(
                f"{stage.name} ended with exit code {status}; fix the error above and start again."
            )
        seconds[stage.name] = round(time.monotonic() - began, 1)
        publish_json(record, seconds)
    return seconds


def _metrics(output: Path) -> dict[str, Any]:
    """Collect the metrics of the model and of its tokenizer."""
    evaluation = read_json(output / "evaluation" / "report.json", "report of an evaluation", _EVALUATION)
    reports = read_json(output / "tokenizer-report" / "report.json", "report of a tokenizer", _TOKENIZERS)
    (tokenizer,) = reports.values()
    return {
        "count": evaluation["count"],
        "tokenizer_psnr": tokenizer["psnr"],
        "tokenizer_ssim": tokenizer["ssim"],
        "frechet_distance_of_tokenizer_features": evaluation["figures"]["frechet_distance_tokenizer"],
        "attribute_accuracy": evaluation["figures"]["alignment"],
        "reader_on_truth": tokenizer["reader_on_originals"],
        "tokenizer_ceiling": tokenizer["reader_on_reconstructions"],
    }


def _write_page(output: Path, report: dict[str, Any]) -> None:
    from vqd_scale.reports.html import FiguresSection, ImageSection, TextSection, html_report
    from vqd_scale.reports.plots import Series, plot_curves
    from vqd_scale.training.logging.metrics import read_metrics

    rows = read_metrics(output / "model" / "metrics.jsonl")
    images = [row["images"] for row in rows]
    curves = [Series(name, images, [row[name] for row in rows]) for name in ("loss", "bound")]
    plot = output / "loss.png"
    plot_curves(plot, curves, title="Denoiser", x_label="images seen", y_label="nats per token")
    accuracy = report["attribute_accuracy"]
    html_report(
        output / "report.html",
        "Text to image by discrete diffusion: the demo",
        [
            FiguresSection(
                "Metrics",
                {
                    "prompts": report["count"],
                    "attribute accuracy, mean": accuracy["mean"],
                    "all attributes correct": accuracy["all"],
                    "chance level (shuffled captions)": accuracy["shuffled"],
                    "reader on real images": report["reader_on_truth"],
                    "reader on reconstructions (ceiling)": report["tokenizer_ceiling"],
                    "tokenizer PSNR, dB": report["tokenizer_psnr"],
                    "Fréchet distance (tokenizer features)": report["frechet_distance_of_tokenizer_features"],
                },
            ),
            ImageSection(
                "Samples",
                output / "samples" / "grid.png",
                "Prompts with attribute combinations that no training image shows.",
            ),
            ImageSection(
                "Tokenizer",
                output / "tokenizer-report" / "reconstructions.png",
                "Held-out images above, their reconstructions below.",
            ),
            ImageSection("Training", plot),
            FiguresSection("Seconds", report["seconds"]),
            TextSection(
                "How to read this",
                "An exact reader of the pixels determines the attribute accuracy: shape, color, size, "
                "position and background. The ceiling of the tokenizer is the reader's score on "
                "reconstructions of real images. The Fréchet distance uses the tokenizer's own features and "
                "is no FID.",
            ),
        ],
    )


def _print_summary(output: Path, report: dict[str, Any]) -> None:
    accuracy = report["attribute_accuracy"]
    lines = [
        "",
        f"attribute accuracy  {accuracy['mean']:.1%} mean, {accuracy['all']:.1%} with all attributes correct",
        f"chance level        {accuracy['shuffled']:.1%} (the same images against shuffled captions)",
        f"tokenizer ceiling   {report['tokenizer_ceiling']:.1%}; reader {report['reader_on_truth']:.1%}",
        f"time                {sum(report['seconds'].values()):.0f} s over {len(report['seconds'])} stages",
        f"samples             {output / 'samples' / 'grid.png'}",
        f"report              {output / 'report.html'}, metrics in {output / 'report.json'}",
        "",
        "next, a prompt of your own:",
        f"  {sys.executable} tools/sample.py {output / 'model'} 'a large red star on white' --output mine",
    ]
    print("\n".join(lines))
