"""Evaluation of tokenizers: reconstruction quality and codebook usage on validation images."""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from vqd_scale.core.arrays import NDArray
from vqd_scale.core.atomic_io import Location, publish_json
from vqd_scale.core.errors import UserError
from vqd_scale.core.outputs import reserve
from vqd_scale.core.progress import progress_bar
from vqd_scale.data.shards.decode import BadSample, decode_image, decode_json, image_extension
from vqd_scale.data.shards.shard_index import ShardSet
from vqd_scale.data.shards.shard_io import Sample, read_shard
from vqd_scale.data.sources.shapes import Scene
from vqd_scale.data.transforms import fitted
from vqd_scale.evaluation.config import Inception
from vqd_scale.evaluation.extractors import FEATURES, Images
from vqd_scale.evaluation.frechet import FeatureStatistics, frechet_distance
from vqd_scale.evaluation.reconstruction import psnr, ssim
from vqd_scale.evaluation.scene_reader import correct_attributes
from vqd_scale.models.bundle import load_tokenizer
from vqd_scale.reports.html import FiguresSection, ImageSection, Section, html_report
from vqd_scale.reports.plots import comparison_grid, publish_image
from vqd_scale.tokenizers.base import ImageTokenizer, to_pixels, to_signal
from vqd_scale.tokenizers.codebook.usage import usage_of
from vqd_scale.tokenizers.config import LPIPSConfig
from vqd_scale.tokenizers.perceptual import LPIPS

REPORT = "report.json"
READER_ON_ORIGINALS = "reader_on_originals"
READER_ON_RECONSTRUCTIONS = "reader_on_reconstructions"
READER = (READER_ON_ORIGINALS, READER_ON_RECONSTRUCTIONS)
"""Accuracies of the scene reader, reported if every image shows a scene of the embedded dataset."""
_BATCH = 32
_COLUMNS = 8
_EXAMPLE_SIDE = 128
_WITHOUT = "not computed: no weights given"
_EXAMPLES = 16
_SMALLEST_SSIM = 11
_LARGEST_PSNR = 100.0
"""Upper bound of a single image's PSNR in dB: a perfect reconstruction would make the mean infinite."""


@dataclass(frozen=True)
class TokenizerEvaluation:
    """Result of a tokenizer evaluation.

    Attributes:
        figures: Metrics as plain JSON values; metrics without network weights are omitted.
        originals: First images of the dataset.
        reconstructions: Reconstructions of ``originals``.
    """

    figures: dict[str, Any]
    originals: Images
    reconstructions: Images


@torch.no_grad()
def evaluate_tokenizer(
    tokenizer: ImageTokenizer,
    data: Location,
    size: int,
    *,
    device: torch.device,
    max_images: int | None = None,
    lpips: LPIPS | None = None,
    inception: Inception | None = None,
) -> TokenizerEvaluation:
    """Evaluate a tokenizer by encoding and decoding all images of a dataset.

    Args:
        tokenizer: ImageTokenizer, on ``device``.
        data: Image shards.
        size: Side of the square, in pixels, to which images are resized.
        device: Compute device.
        max_images: Maximum number of images; ``None`` evaluates all.
        lpips: LPIPS network; ``None`` omits LPIPS.
        inception: Inception configuration; ``None`` omits rFID.

    Raises:
        UserError: There are no images, the size does not fit the tokenizer, or weights cannot be read.
    """
    if size % tokenizer.factor:
        raise UserError(f"size: {size} is not a multiple of the tokenizer's factor {tokenizer.factor}.")
    extractor = inception.build(tokenizer, device) if inception is not None else None
    statistics = [FeatureStatistics.empty(extractor.dimension if extractor is not None else 0)] * 2
    sums: dict[str, float] = {}
    counts = torch.zeros(tokenizer.codes, dtype=torch.int64)
    examples: list[tuple[Tensor, Tensor]] = []
    shards = ShardSet.open(data)
    total = shards.count if max_images is None else min(max_images, shards.count)
    stream = islice(_images(shards, size), total)
    count = scene_count = 0
    with progress_bar("evaluate tokenizer", total, unit="img") as bar:
        while samples := list(islice(stream, _BATCH)):
            originals = torch.from_numpy(np.stack([pixels for pixels, _ in samples]))
            originals = originals.permute(0, 3, 1, 2).contiguous()
            signal = to_signal(originals.to(device))
            tokens = tokenizer.encode(signal)
            decoded = tokenizer.decode(tokens)
            reconstructions = to_pixels(decoded)
            counts += torch.bincount(tokens.flatten().cpu(), minlength=tokenizer.codes)
            figures_of_batch = _figures(originals, reconstructions, signal, decoded, lpips)
            scenes = [scene for _, scene in samples if scene is not None]
            scene_count += len(scenes)
            if len(scenes) == len(samples):
                for name, batch_images in zip(READER, (originals, reconstructions), strict=True):
                    figures_of_batch[name] = torch.from_numpy(
                        correct_attributes(batch_images, scenes).mean(axis=1)
                    )
            for name, value in figures_of_batch.items():
                sums[name] = sums.get(name, 0.0) + float(value.double().sum())
            if extractor is not None:
                for side, batch_images in enumerate((originals, reconstructions)):
                    features = extractor(batch_images.to(device))[FEATURES]
                    statistics[side] = statistics[side].merge(FeatureStatistics.of(features))
            if count < _EXAMPLES:
                examples.append((originals, reconstructions))
            count += len(samples)
            bar.update(len(samples))
    if not count:
        raise UserError(f"{data}: has no readable image.")
    figures: dict[str, Any] = {
        "images": count,
        "size": size,
        "factor": tokenizer.factor,
        **asdict(usage_of(counts)),
        **{name: total / count for name, total in sums.items() if name not in READER or scene_count == count},
    }
    if extractor is not None:
        figures["rfid"] = frechet_distance(*statistics)
        figures["rfid_extractor"] = extractor.description
    originals, reconstructions = (torch.cat(side)[:_EXAMPLES] for side in zip(*examples, strict=True))
    return TokenizerEvaluation(figures, originals, reconstructions)


def report_tokenizers(
    tokenizers: Mapping[str, Path],
    images: Location,
    size: int,
    out: Path,
    device: torch.device,
    *,
    lpips: LPIPSConfig | None,
    inception: Inception | None,
    extra: Mapping[str, Any] | None = None,
    max_images: int | None = None,
    purpose: str = "evaluate_tokenizer.py",
) -> dict[str, dict[str, Any]]:
    """Evaluate tokenizers and write report.json, report.html and an image grid of reconstructions for each.

    Args:
        tokenizers: Bundles by their names in the report.
        images: Image shards.
        size: Side of the square images in pixels.
        out: Output folder.
        device: Compute device.
        lpips: LPIPS configuration; ``None`` omits LPIPS.
        inception: Inception configuration; ``None`` omits rFID.
        extra: Additional content of report.json.
        max_images: Maximum number of images; ``None`` evaluates all.
        purpose: Name of the writing tool.

    Returns:
        Metrics of each tokenizer.
    """
    grids = ["reconstructions.png"]
    grids += [f"reconstructions-{number}.png" for number in range(1, len(tokenizers))]
    reserve(out, purpose, [REPORT, "report.html", *grids])
    network = None if lpips is None else lpips.build().to(device)
    metrics: dict[str, dict[str, Any]] = {}
    sections: list[Section] = []
    for grid, (name, folder) in zip(grids, tokenizers.items(), strict=True):
        tokenizer = load_tokenizer(folder, device)
        evaluation = evaluate_tokenizer(
            tokenizer, images, size, device=device, max_images=max_images, lpips=network, inception=inception
        )
        metrics[name] = figures = evaluation.figures
        path = out / grid
        examples = (evaluation.originals, evaluation.reconstructions)
        originals, reconstructions = (images.permute(0, 2, 3, 1).numpy() for images in examples)
        scale = max(1, _EXAMPLE_SIDE // originals.shape[1])
        publish_image(path, comparison_grid(originals, reconstructions, columns=_COLUMNS, scale=scale))
        rows = {key: value for key, value in figures.items() if isinstance(value, int | float | str)}
        missing = {key: _WITHOUT for key in ("lpips", "rfid") if key not in rows}
        sections += [
            FiguresSection(name, rows | missing),
            ImageSection(f"{name}: reconstructions", path, "Top: originals. Bottom: reconstructions."),
        ]
    publish_json(out / REPORT, {**metrics, **(extra or {})})
    html_report(out / "report.html", "Tokenizers", sections)
    return metrics


def summary_line(figures: Mapping[str, Any]) -> str:
    """Format the main metrics as one line."""
    parts = [
        f"{figures['psnr']:.2f} dB",
        *(f"{name} {figures[name]:.3f}" for name in ("ssim", "lpips", "rfid") if name in figures),
        f"{figures['used']:.1%} of {figures['codes']:,} codes used ({figures['used_often']:.1%} ten times)",
        f"perplexity {figures['perplexity']:.0f}",
    ]
    return ", ".join(parts)


def _images(shards: ShardSet, size: int) -> Iterator[tuple[NDArray[np.uint8], Scene | None]]:
    """Yield the readable images, and the scenes that images of the embedded shapes dataset show."""
    for shard in shards.shards:
        for sample in read_shard(shard):
            with suppress(BadSample):
                yield fitted(decode_image(sample[image_extension(sample)]), size), _scene_of(sample)


def _scene_of(sample: Sample) -> Scene | None:
    try:
        description = decode_json(sample.get("json", b"null"))
    except BadSample:
        return None
    is_scene = isinstance(description, dict) and "figures" in description
    return Scene.from_json(cast(dict[str, Any], description)) if is_scene else None


def _figures(
    originals: Images, reconstructions: Images, signal: Tensor, decoded: Tensor, lpips: LPIPS | None
) -> dict[str, Tensor]:
    """Compute the metrics of each image."""
    metrics = {"psnr": psnr(originals, reconstructions).clamp(max=_LARGEST_PSNR)}
    if min(originals.shape[-2:]) >= _SMALLEST_SSIM:
        metrics["ssim"] = ssim(originals, reconstructions)
    if lpips is not None:
        metrics["lpips"] = lpips(decoded.clamp(-1, 1), signal)
    return metrics
