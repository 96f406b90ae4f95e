"""``demo``: the full pipeline on two CPU cores, each stage through its own command-line tool."""

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vqd_scale.cli.base import run_tool, tool_parser
from vqd_scale.core.atomic_io import publish_json, read_json
from vqd_scale.core.environment import computes_bfloat16
from vqd_scale.core.errors import UserError
from vqd_scale.launchers.local import run_locally
from vqd_scale.reports.html import FiguresSection, ImageSection, TextSection, html_report
from vqd_scale.reports.plots import Series, plot_curves
from vqd_scale.training.logging.metrics import read_metrics

_STAGES_FILE = "stages.json"


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


@dataclass(frozen=True)
class DemoPlan:
    """Settings of the demo.

    Attributes:
        configs: Folder of the stages' configurations.
        out: Output folder of all stages.
        prompts: Number of held-out prompts to sample and score.
        shards: Configuration overrides of the dataset.
        precision: Training precision of the denoiser.
        bar: Minimum attribute accuracy, and minimum fraction of images with all attributes right.
    """

    configs: Path
    out: Path
    prompts: int
    shards: list[str]
    precision: Literal["fp32", "bf16"]
    bar: tuple[float, float]

    def stages(self) -> list[Stage]:
        """Return the stages in order."""
        out, configs = self.out, self.configs
        held_out, tokenizer = out / "shards" / "held_out", out / "tokenizer" / "export"
        images = f"data.path={out / 'shards' / 'train'}"
        return [
            Stage("make_shards", "make_shards.py", ["shapes", str(out / "shards"), *self.shards]),
            Stage(
                "train_tokenizer",
                "train_tokenizer.py",
                [str(configs / "tokenizer.yaml"), f"run={out / 'tokenizer'}", images],
            ),
            Stage(
                "tokenize_shards",
                "tokenize_shards.py",
                [
                    str(configs / "tokenize.yaml"),
                    f"images={out / 'shards' / 'train'}",
                    f"output={out / 'tokens'}",
                    f"tokenizer={tokenizer}",
                ],
            ),
            Stage(
                "train",
                "train.py",
                [
                    str(configs / "train.yaml"),
                    f"run={out / 'model'}",
                    f"data.path={out / 'tokens'}",
                    f"tokenizer={tokenizer}",
                    f"engine.precision={self.precision}",
                ],
                ranks=2,
            ),
            Stage(
                "sample",
                "sample.py",
                [
                    str(out / "model"),
                    *("--data", str(held_out)),
                    *("--count", str(self.prompts)),
                    *("--out", str(out / "samples")),
                    *("--steps", "16", "--guidance", "1.5", "--top-p", "0.9", "--batch", "32"),
                ],
            ),
            Stage(
                "evaluate",
                "evaluate.py",
                [
                    str(out / "samples"),
                    *("--data", str(held_out)),
                    *("--tokenizer", str(tokenizer)),
                    *("--out", str(out / "evaluation")),
                ],
            ),
        ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of ``tools/demo.py``."""
    parser = tool_parser(
        "Run the whole road on two cores: shards, tokenizer, tokens, ZeRO-3 training on two ranks, pictures, "
        "score. Killed at any moment, the same command goes on from there.",
        "python tools/demo.py --fast",
    )
    parser.add_argument(
        "--fast", action="store_true", help="the short form, under two minutes, with worse pictures"
    )
    parser.add_argument("--out", type=Path, help="folder for everything (runs/demo, or runs/demo-fast)")
    run_tool(parser, _demo, arguments)


def _demo(arguments: argparse.Namespace) -> None:
    tools = Path("tools")
    if not (tools / "train.py").is_file():
        raise UserError(
            "the demo runs the project's own tools and configs: start it in the project's top folder."
        )
    if arguments.fast:
        out = arguments.out or Path("runs/demo-fast")
        shards = ["train_samples=2048", "held_out_samples=128"]
        plan = DemoPlan(Path("configs/demo-fast"), out, 96, shards, "fp32", bar=(0.3, 0.0))
    else:
        plan = DemoPlan(
            Path("configs/demo"),
            arguments.out or Path("runs/demo"),
            256,
            ["train_samples=8192"],
            # On CPUs without bfloat16 instructions bf16 is slower than fp32; the demo is slower with either.
            "bf16" if computes_bfloat16() else "fp32",
            bar=(0.95, 0.8),
        )
    seconds = _run(plan.stages(), tools, plan.out)
    report = read_json(plan.out / "evaluation" / "evaluation.json", "evaluation")
    report["seconds"] = seconds
    publish_json(plan.out / "report.json", report)
    _write_page(plan.out, report)
    _say(plan.out, report)
    accuracy = report["attribute_accuracy"]
    if accuracy["mean"] < plan.bar[0] or accuracy["all"] < plan.bar[1]:
        print(
            f"below the bar of {plan.bar[0]:.0%} mean and {plan.bar[1]:.0%} with all right", file=sys.stderr
        )
        raise SystemExit(1)


def _run(stages: list[Stage], tools: Path, out: Path) -> dict[str, float]:
    """Run the unfinished stages; returns the seconds of each (of the last start for a resumed stage)."""
    record = out / _STAGES_FILE
    seconds: dict[str, float] = read_json(record, "list of stages") if record.exists() else {}
    for number, stage in enumerate(stages, start=1):
        print(f"[{number}/{len(stages)}] {stage.name}", end="", flush=True)
        if stage.name in seconds:
            print(": done before")
            continue
        print(f": {stage.tool} {' '.join(stage.arguments)}", flush=True)
        began = time.monotonic()
        status = run_locally(tools / stage.tool, stage.arguments, stage.ranks)
        if status != 0:
            raise UserError(f"{stage.name} ended with exit code {status}; mend what it says and start again.")
        seconds[stage.name] = round(time.monotonic() - began, 1)
        publish_json(record, seconds)
    return seconds


def _write_page(out: Path, report: dict[str, Any]) -> None:
    rows = read_metrics(out / "model" / "metrics.jsonl")
    images = [row["images"] for row in rows]
    curves = [Series(name, images, [row[name] for row in rows]) for name in ("loss", "bound")]
    plot_curves(out / "loss.png", curves, title="Denoiser", x_label="images seen", y_label="nats per token")
    html_report(
        out / "report.html",
        "Text to image by discrete diffusion: the demo",
        [
            FiguresSection("Score", _score(report)),
            ImageSection(
                "Samples",
                out / "samples" / "grid.png",
                "Prompts of attribute combinations that no training picture shows.",
            ),
            ImageSection(
                "Tokenizer",
                out / "evaluation" / "reconstructions.png",
                "Held-out pictures above, what the tokenizer makes of them below.",
            ),
            ImageSection("Training", out / "loss.png"),
            FiguresSection("Seconds", report["seconds"]),
            TextSection(
                "How to read this",
                "Attribute accuracy is decided by an exact reader of the pixels: shape, colour, size, "
                "position and background. The tokenizer's ceiling is the reader's score on reconstructions "
                "of real pictures. The Fréchet distance is on the tokenizer's own features and is no FID.",
            ),
        ],
    )


def _score(report: dict[str, Any]) -> dict[str, float | str]:
    accuracy = report["attribute_accuracy"]
    return {
        "prompts": report["count"],
        "attribute accuracy, mean": accuracy["mean"],
        "all attributes right": accuracy["all"],
        "chance level (shuffled captions)": accuracy["shuffled"],
        "reader on real pictures": report["reader_on_truth"],
        "reader on reconstructions (ceiling)": report["tokenizer_ceiling"],
        "tokenizer PSNR, dB": report["tokenizer_psnr"],
        "Fréchet distance (tokenizer features)": report["frechet_distance_of_tokenizer_features"],
    }


def _say(out: Path, report: dict[str, Any]) -> None:
    accuracy = report["attribute_accuracy"]
    lines = [
        "",
        f"attribute accuracy  {accuracy['mean']:.1%} mean, {accuracy['all']:.1%} with all attributes right",
        f"chance level        {accuracy['shuffled']:.1%} (the same pictures against shuffled captions)",
        f"tokenizer ceiling   {report['tokenizer_ceiling']:.1%}; reader {report['reader_on_truth']:.1%}",
        f"time                {sum(report['seconds'].values()):.0f} s over {len(report['seconds'])} stages",
        f"pictures            {out / 'samples' / 'grid.png'}",
        f"report              {out / 'report.html'}, figures in {out / 'report.json'}",
        "",
        "next, a prompt of your own:",
        f"  {sys.executable} tools/sample.py {out / 'model'} 'a large red star on white' --out mine",
    ]
    print("\n".join(lines))
