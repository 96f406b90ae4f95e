import time
from typing import TYPE_CHECKING

from vqd_scale.cli.base import RunConfigOptions, Tool
from vqd_scale.cli.run import check_bundles, run_task
from vqd_scale.core.outputs import TRAINING
from vqd_scale.tokenizers.config import LPIPSConfig
from vqd_scale.training.tasks.config import TOKENIZER_RUNS, AutoencodingConfig, RefitConfig

if TYPE_CHECKING:
    import torch

_USAGE_IMAGES = 1024
"""Number of training images for the codebook usage statistics."""

main = Tool()
"""Entry point of ``tools/train_tokenizer.py``."""


@main.command("python tools/train_tokenizer.py configs/demo/tokenizer.yaml optim.lr=1e-3")
def train_tokenizer(options: RunConfigOptions) -> None:
    """Train a tokenizer on image shards, or rebuild a trained one's codebook (kind: refit).

    Runs in one process, or in those that torchrun or srun starts. The same command resumes an interrupted
    run. With validation.path the run ends with report.json and report.html on these images.
    """
    config = options.load(TOKENIZER_RUNS)
    if isinstance(config, RefitConfig):
        check_bundles(config.tokenizer)
    began = time.monotonic()
    if run_task(config):
        _report(config, time.monotonic() - began)


def _report(config: AutoencodingConfig, seconds: float) -> None:
    """Report the reconstructions of the validation images; after a refit, also those of the old tokenizer."""
    if config.validation is None:
        return

    import torch

    from vqd_scale.evaluation.tokenizer_eval import REPORT, report_tokenizers, summary_line

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizers = {"before": config.tokenizer} if isinstance(config, RefitConfig) else {}
    tokenizers |= {"after" if tokenizers else "tokenizer": config.run / "export"}
    perceptual = config.losses.perceptual
    metrics = report_tokenizers(
        tokenizers,
        config.validation.path,
        config.transform.size,
        config.run,
        device,
        lpips=perceptual if isinstance(perceptual, LPIPSConfig) else None,
        inception=config.validation.inception,
        extra={
            "seconds_of_last_start": round(seconds, 1),
            "images": config.total_images,
            "usage_in_training": _usage(config, device),
        },
        purpose=TRAINING,
    )
    for name, figures in metrics.items():
        print(f"{name}: {summary_line(figures)}")
    print(f"report: {config.run / REPORT}")


def _usage(config: AutoencodingConfig, device: "torch.device") -> dict[str, float]:
    """Measure codebook usage on training images: a few validation images may use only part of the codes."""
    from vqd_scale.evaluation.tokenizer_eval import evaluate_tokenizer
    from vqd_scale.models.bundle import load_tokenizer

    images = config.data.mixed[0].path
    tokenizer = load_tokenizer(config.run / "export", device)
    figures = evaluate_tokenizer(
        tokenizer, images, config.transform.size, device=device, max_images=_USAGE_IMAGES
    ).figures
    return {name: figures[name] for name in ("tokens", "used", "used_often", "perplexity")}
