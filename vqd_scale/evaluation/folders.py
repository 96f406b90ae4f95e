"""Fréchet distance between the images of two folders, whatever program wrote them."""

from pathlib import Path
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor

from vqd_scale.core.errors import UserError
from vqd_scale.core.progress import progress
from vqd_scale.data.folder_walk import list_folder
from vqd_scale.data.shards.decode import BadSample, decode_image, image_extension_of
from vqd_scale.data.transforms import fitted
from vqd_scale.evaluation.config import FoldersConfig
from vqd_scale.evaluation.extractors import FEATURES, Extractor, images_extractor
from vqd_scale.evaluation.frechet import FeatureStatistics, frechet_distance
from vqd_scale.evaluation.metrics import metric_name
from vqd_scale.models.generate import is_grid


def compare_folders(first: Path, second: Path, config: FoldersConfig, device: torch.device) -> dict[str, Any]:
    """Compute the Fréchet distance between the images of two folders.

    The images of both folders go through the same steps, which the report names.

    Args:
        first: Folder of images, with its subfolders.
        second: Folder of images to compare with.
        config: Size of the images and feature extractor.
        device: Compute device.

    Returns:
        Report of the distance, the numbers of images, and everything that the distance depends on.

    Raises:
        UserError: A folder or an image cannot be read, the images differ in size and no size is given, or
            there are too few images.
    """
    extractor = images_extractor(config.extractor, device)
    paths = [_image_files(folder, extractor) for folder in (first, second)]
    size: list[int] = []
    statistics: list[FeatureStatistics] = []
    for files in paths:
        total = FeatureStatistics.empty(extractor.dimension)
        starts = range(0, len(files), config.batch_size)
        for start in progress(starts, "features", len(starts), unit="batch"):
            batch: list[UInt8[Tensor, "3 height width"]] = []
            for path in files[start : start + config.batch_size]:
                image = _read(path, config.image_size)
                size = size or list(image.shape[1:])
                if list(image.shape[1:]) != size:
                    raise UserError(
                        f"{path}: has {image.shape[2]}x{image.shape[1]} pixels, but {paths[0][0]} has "
                        f"{size[1]}x{size[0]}; give image_size=N to resize all images alike."
                    )
                batch.append(image)
            total = total.merge(FeatureStatistics.of(extractor(torch.stack(batch))[FEATURES]))
        statistics.append(total)
    resized = "the short side resized, the center square cut; bicubic, anti-aliased, 8 bits"
    return {
        metric_name(config.extractor, "fid"): frechet_distance(*statistics),
        "images": [len(files) for files in paths],
        "folders": [str(first), str(second)],
        "size": size,
        "resize": "none" if config.image_size is None else resized,
        "extractor": extractor.description,
    }


def _image_files(folder: Path, extractor: Extractor) -> list[Path]:
    listing = list_folder(folder)
    files = [path for path in listing.files if image_extension_of(path.name) and not is_grid(path)]
    listing.report(files)
    if len(files) <= extractor.dimension:
        raise UserError(
            f"{folder}: {len(files)} images are too few for the covariance of {extractor.dimension} "
            f"features; give at least {extractor.dimension + 1}."
        )
    return files


def _read(path: Path, size: int | None) -> UInt8[Tensor, "3 height width"]:
    try:
        pixels = decode_image(path.read_bytes())
    except (OSError, BadSample) as error:
        raise UserError(f"{path}: cannot be read as an image ({error}); remove or replace it.") from None
    # A copy, since the crop of an image is not contiguous.
    return torch.tensor(pixels if size is None else fitted(pixels, size)).permute(2, 0, 1)
