import argparse
import os
from collections.abc import Sequence

import torch

from vqd_scale.cli.base import add_config_arguments, config_from, run_tool, tool_parser
from vqd_scale.core.environment import place_among_ranks
from vqd_scale.core.errors import UserError
from vqd_scale.data.shards.parallel_writer import Worker
from vqd_scale.preparation.tokenize_shards import TokenizeConfig, tokenize_shards


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of ``tools/tokenize_shards.py``."""
    parser = tool_parser(
        "Turn image shards into token shards; finished shards are kept when it is started again. Several "
        "workers, each a job of a Slurm array, or this many started by hand, share the shards out, and their "
        "processes (torchrun, srun; one for each GPU) share a worker's; any number of them makes the same "
        "set, which is whole when the last is done.",
        "python tools/tokenize_shards.py configs/demo/tokenize.yaml",
    )
    add_config_arguments(parser, file_required=True)
    parser.add_argument("--worker", type=int, help="which worker this is, from 0 (that of the Slurm array)")
    parser.add_argument("--workers", type=int, help="how many there are (those of the Slurm array, or 1)")
    run_tool(parser, _tokenize, arguments)


def _tokenize(arguments: argparse.Namespace) -> None:
    config = config_from(TokenizeConfig, arguments)
    number, workers = _worker(arguments)
    rank, ranks, local_rank = place_among_ranks()
    worker = Worker(number * ranks + rank, workers * ranks)
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    shards = tokenize_shards(config, device, worker)
    if shards is None:
        print(f"worker {worker.number} of {worker.workers} is done, others are not: {config.output}")
    else:
        print(f"{shards.count:,} samples of tokens in {len(shards.shards)} shards: {config.output}")


def _worker(arguments: argparse.Namespace) -> tuple[int, int]:
    """Return worker index and worker count, from the arguments or from the Slurm array's variables.

    Raises:
        UserError: Only one of the two arguments is given, or the array has gaps.
    """
    if (arguments.worker is None) != (arguments.workers is None):
        raise UserError("--worker and --workers: give both or neither.")
    if arguments.worker is not None:
        return arguments.worker, arguments.workers
    if "SLURM_ARRAY_TASK_ID" not in os.environ:
        return 0, 1
    task, first, last, count = (
        int(os.environ[f"SLURM_ARRAY_TASK_{name}"]) for name in ("ID", "MIN", "MAX", "COUNT")
    )
    if last - first + 1 != count:
        raise UserError(
            f"the array has {count} jobs with numbers from {first} to {last}, so that it is not clear which "
            f"worker each is; submit an array without gaps: any number of workers makes the same set."
        )
    return task - first, count
