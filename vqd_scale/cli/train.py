from typing import Annotated

import typer

from vqd_scale.cli.base import RunConfigOptions, Tool
from vqd_scale.cli.run import check_bundles, run_task
from vqd_scale.training.tasks.config import TOKEN_RUNS

main = Tool()
"""Entry point of ``tools/train.py``."""


@main.command("torchrun --nproc-per-node 2 tools/train.py configs/demo/train.yaml optim.lr=2e-3")
def train(
    options: RunConfigOptions,
    # DeepSpeed's launcher passes it. LOCAL_RANK, which all launchers set, is used.
    local_rank: Annotated[int | None, typer.Option("--local_rank", hidden=True)] = None,
) -> None:
    """Train a denoiser on token shards, or VQ-AR (kind: autoregression).

    Runs in one process, or in those that torchrun or srun starts. The same command resumes an interrupted
    run from its newest valid checkpoint.
    """
    config = options.load(TOKEN_RUNS)
    check_bundles(config.tokenizer)
    run_task(config)
