from pathlib import Path
from typing import Annotated

import typer

from vqd_scale.cli.base import ConfigOptions, Tool
from vqd_scale.core.atomic_io import check_file, publish_json
from vqd_scale.core.errors import UserError
from vqd_scale.evaluation.config import FoldersConfig

main = Tool()
"""Entry point of ``tools/eval_folders.py``."""


@main.command("python tools/eval_folders.py samples data/photographs image_size=256")
def compare(
    first: Annotated[Path, typer.Argument(metavar="FOLDER", help="folder of images, such as generated ones")],
    second: Annotated[Path, typer.Argument(metavar="REAL", help="folder of images to compare with")],
    options: ConfigOptions,
    output: Annotated[Path | None, typer.Option(help="file for the report (JSON)")] = None,
) -> None:
    """Compute the FID between the images of two folders, with the same preprocessing for both."""
    config = options.load(FoldersConfig)
    for folder in (first, second):
        if not folder.is_dir():
            raise UserError(f"{folder}: there is no such folder.")
    if output is not None:
        check_file(output)

    import torch

    from vqd_scale.evaluation.folders import compare_folders

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    report = compare_folders(first, second, config, device)
    if output is not None:
        publish_json(output, report)
    name, distance = next(iter(report.items()))
    print(f"{name}: {distance:.4f} ({' and '.join(map(str, report['images']))} images)")
