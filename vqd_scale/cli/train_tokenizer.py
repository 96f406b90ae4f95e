import argparse
import time
from collections.abc import Sequence

import torch

from vqd_scale.cli.base import add_config_arguments, config_from, run_tool, tool_parser
from vqd_scale.cli.run import TOKENIZER_RUNS, run_task, tokenizer_task
from vqd_scale.evaluation.tokenizer_eval import (
    REPORT,
    MetricNetworks,
    evaluate_tokenizer,
    in_a_line,
    report_tokenizers,
)
from vqd_scale.models.bundle import load_tokenizer
from vqd_scale.tokenizers.perceptual import LPIPSConfig
from vqd_scale.training.tasks.autoencoding import AutoencodingConfig
from vqd_scale.training.tasks.refitting import RefitConfig

_COUNTED = 1024
"""Number of training images for the codebook usage statistics."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of ``tools/train_tokenizer.py``."""
    parser = tool_parser(
        "Train a VQ tokenizer on image shards, or rebuild a trained one's codebook (kind: refit), on one "
        "process or as many as torchrun or srun start; the same command resumes. With validation.path the "
        "run ends with report.json and report.html on these images.",
        "python tools/train_tokenizer.py configs/demo/tokenizer.yaml optim.lr=1e-3",
    )
    add_config_arguments(parser, file_required=True)
    run_tool(parser, _train, arguments)


def _train(arguments: argparse.Namespace) -> None:
    config = config_from(TOKENIZER_RUNS, arguments)
    title = "refit tokenizer" if isinstance(config, RefitConfig) else "train tokenizer"
    began = time.monotonic()
    if run_task(lambda world: tokenizer_task(config, world), config, title):
        _report(config, time.monotonic() - began)


def _report(config: AutoencodingConfig, seconds: float) -> None:
    """Report the reconstructions of the validation images; after a refit, also those of the old tokenizer."""
    if config.validation is None:
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizers = {"before": config.tokenizer} if isinstance(config, RefitConfig) else {}
    tokenizers |= {"after" if tokenizers else "tokenizer": config.run / "export"}
    perceptual = config.losses.perceptual
    lpips = perceptual if isinstance(perceptual, LPIPSConfig) else None
    found = report_tokenizers(
        tokenizers,
        config.validation.path,
        config.transform.size,
        config.run,
        MetricNetworks.of(lpips, config.validation.inception, device),
        device,
        more={
            "seconds_of_last_start": round(seconds, 1),
            "images": config.total_images,
            "usage_in_training": _usage(config, device),
        },
    )
    for name, figures in found.items():
        print(f"{name}: {in_a_line(figures)}")
    print(f"report: {config.run / REPORT}")


def _usage(config: AutoencodingConfig, device: torch.device) -> dict[str, float]:
    """Measure codebook usage on training images: a few validation images may use only part of the codes."""
    pictures = config.data.mixed[0].path
    size = config.transform.size
    tokenizer = load_tokenizer(config.run / "export", device)
    figures = evaluate_tokenizer(tokenizer, pictures, size, device=device, most=_COUNTED).figures
    return {name: figures[name] for name in ("tokens", "used", "used_often", "perplexity")}
