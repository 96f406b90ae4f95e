import os
from typing import Annotated

import typer

from vqd_scale.cli.base import RunConfigOptions, Tool
from vqd_scale.cli.run import check_bundles, check_datasets
from vqd_scale.core.environment import place_among_ranks
from vqd_scale.core.errors import UserError
from vqd_scale.data.shards.parallel_writer import Worker
from vqd_scale.preparation.config import TokenizeConfig

main = Tool()
"""Entry point of ``tools/tokenize_shards.py``."""


@main.command("python tools/tokenize_shards.py configs/demo/tokenize.yaml")
def tokenize(
    options: RunConfigOptions,
    worker: Annotated[
        int | None,
        typer.Option(metavar="INDEX", help="index of this worker, from 0 (default: that of the Slurm array)"),
    ] = None,
    num_workers: Annotated[
        int | None,
        typer.Option(metavar="N", help="number of workers (default: the size of the Slurm array, or 1)"),
    ] = None,
) -> None:
    """Encode image shards as token shards; a restart keeps finished shards.

    Several workers divide the shards among them: the jobs of a Slurm array, or processes started by hand.
    The ranks of a worker (torchrun, srun; one for each GPU) divide its part. Any number of workers writes the
    same dataset, which is complete when the last one ends.
    """
    config = options.load(TokenizeConfig)
    index, count = _worker(worker, num_workers)
    rank, ranks, local_rank = place_among_ranks()
    place = Worker(index * ranks + rank, count * ranks)
    check_datasets(config.images)
    check_bundles(config.tokenizer)

    import torch

    from vqd_scale.preparation.tokenize_shards import tokenize_shards

    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    shards = tokenize_shards(config, device, place)
    if shards is None:
        print(f"worker {place.number} of {place.workers} is done, others are not: {config.output}")
    else:
        print(f"{shards.count:,} samples of tokens in {len(shards.shards)} shards: {config.output}")


def _worker(index: int | None, count: int | None) -> tuple[int, int]:
    """Return worker index and worker count, from the options or from the Slurm array's variables.

    Raises:
        UserError: Only one of the two options is given, or the array has gaps.
    """
    if index is not None and count is not None:
        return index, count
    if index is not None or count is not None:
        raise UserError("--worker and --num-workers: give both or neither.")
    if "SLURM_ARRAY_TASK_ID" not in os.environ:
        return 0, 1
    task, first, last, size = (
        int(os.environ[f"SLURM_ARRAY_TASK_{name}"]) for name in ("ID", "MIN", "MAX", "COUNT")
    )
    if last - first + 1 != size:
        raise UserError(
            f"the array has {size} jobs with numbers from {first} to {last}, so that it is not clear which "
            f"worker each is; submit an array without gaps: any number of workers makes the same set."
        )
    return task - first, size
