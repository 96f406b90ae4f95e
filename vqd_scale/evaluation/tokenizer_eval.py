"""Evaluation of tokenizers: reconstruction quality and codebook usage on validation images."""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from vqd_scale.core.arrays import NDArray
from vqd_scale.core.atomic_io import Location, publish_json
from vqd_scale.core.errors import UserError
from vqd_scale.core.progress import progress_bar
from vqd_scale.data.shards.decode import BadSample, decode_image, image_extension
from vqd_scale.data.shards.shard_index import ShardSet
from vqd_scale.data.shards.shard_io import read_shard
from vqd_scale.data.transforms import fitted
from vqd_scale.evaluation.extractors import FEATURES, Inception, build_extractor
from vqd_scale.evaluation.frechet import FeatureStatistics, frechet_distance
from vqd_scale.evaluation.reconstruction import psnr, ssim
from vqd_scale.models.bundle import load_tokenizer
from vqd_scale.reports.html import FiguresSection, ImageSection, Section, html_report
from vqd_scale.reports.plots import comparison_grid, publish_image
from vqd_scale.tokenizers.base import to_bytes, to_signal
from vqd_scale.tokenizers.codebook.usage import usage_of
from vqd_scale.tokenizers.perceptual import LPIPS, LPIPSConfig, build_perceptual
from vqd_scale.tokenizers.registry import Tokenizer

Images = UInt8[Tensor, "batch 3 height width"]

REPORT = "report.json"
_COLUMNS = 8
_SHOWN_SIDE = 128
_WITHOUT = "not given: no weights were named"
_SHOWN = 16
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


@dataclass(frozen=True)
class MetricNetworks:
    """Networks for metrics, each optional.

    Attributes:
        lpips: LPIPS network.
        inception: Inception configuration for rFID.
    """

    lpips: LPIPS | None = None
    inception: Inception | None = None

    @classmethod
    def of(
        cls, lpips: LPIPSConfig | None, inception: Inception | None, device: torch.device
    ) -> "MetricNetworks":
        """Load the networks whose weights are given.

        Raises:
            UserError: The weights cannot be read.
        """
        network = None if lpips is None else build_perceptual(lpips)
        return cls(network.to(device) if isinstance(network, LPIPS) else None, inception)


@torch.no_grad()
def evaluate_tokenizer(
    tokenizer: Tokenizer,
    pictures: Location,
    size: int,
    *,
    device: torch.device,
    batch: int = 32,
    most: int | None = None,
    lpips: LPIPS | None = None,
    inception: Inception | None = None,
) -> TokenizerEvaluation:
    """Evaluate a tokenizer by encoding and decoding all images of a dataset.

    Args:
        tokenizer: Tokenizer, on ``device``.
        pictures: Image shards.
        size: Side of the square, in pixels, to which images are resized.
        device: Compute device.
        batch: Batch size.
        most: Maximum number of images; ``None`` evaluates all.
        lpips: LPIPS network; ``None`` omits LPIPS.
        inception: Inception configuration; ``None`` omits rFID.

    Raises:
        UserError: There are no images, the size does not fit the tokenizer, or weights cannot be read.
    """
    if size % tokenizer.factor:
        raise UserError(f"size: {size} is not a multiple of the tokenizer's factor {tokenizer.factor}.")
    extractor = build_extractor(inception, tokenizer, device) if inception is not None else None
    statistics: list[FeatureStatistics | None] = [None, None]
    sums: dict[str, float] = {}
    counts = torch.zeros(tokenizer.codes, dtype=torch.int64)
    shown: list[tuple[Tensor, Tensor]] = []
    shards = ShardSet.open(pictures)
    total = shards.count if most is None else min(most, shards.count)
    stream = islice(_pictures(shards, size), total)
    done = 0
    with progress_bar("evaluate tokenizer", total, unit="img") as bar:
        while found := list(islice(stream, batch)):
            originals = torch.from_numpy(np.stack(found)).permute(0, 3, 1, 2).contiguous()
            signal = to_signal(originals.to(device))
            tokens = tokenizer.encode(signal)
            decoded = tokenizer.decode(tokens)
            made = to_bytes(decoded).cpu()
            counts += torch.bincount(tokens.flatten().cpu(), minlength=tokenizer.codes)
            for name, value in _figures(originals, made, signal, decoded, lpips).items():
                sums[name] = sums.get(name, 0.0) + float(value.double().sum())
            if extractor is not None:
                for side, images in enumerate((originals, made)):
                    features = extractor(images.to(device))[FEATURES]
                    before = statistics[side]
                    statistics[side] = (
                        FeatureStatistics.of(features) if before is None else before.update(features)
                    )
            if done < _SHOWN:
                shown.append((originals, made))
            done += len(found)
            bar.update(len(found))
    if not done:
        raise UserError(f"{pictures}: has no picture to judge a tokenizer by.")
    usage = asdict(usage_of(counts))
    figures: dict[str, Any] = {
        "pictures": done,
        "size": size,
        "factor": tokenizer.factor,
        **usage,
        **{name: value / done for name, value in sums.items()},
    }
    real, reconstructed = statistics
    if real is not None and reconstructed is not None and extractor is not None:
        figures["rfid"] = frechet_distance(real, reconstructed)
        figures["rfid_extractor"] = extractor.description
    originals, made = (torch.cat(side)[:_SHOWN] for side in zip(*shown, strict=True))
    return TokenizerEvaluation(figures, originals, made)


def report_tokenizers(
    tokenizers: Mapping[str, Path],
    pictures: Location,
    size: int,
    out: Path,
    judges: MetricNetworks,
    device: torch.device,
    *,
    more: Mapping[str, Any] | None = None,
    most: int | None = None,
) -> dict[str, dict[str, Any]]:
    """Evaluate tokenizers and write report.json, report.html and an image grid of reconstructions for each.

    Args:
        tokenizers: Bundles by their names in the report.
        pictures: Image shards.
        size: Side of the square images in pixels.
        out: Output folder.
        judges: Networks for metrics.
        device: Compute device.
        more: Additional content of report.json.
        most: Maximum number of images; ``None`` evaluates all.

    Returns:
        Metrics of each tokenizer.
    """
    found: dict[str, dict[str, Any]] = {}
    sections: list[Section] = []
    for number, (name, folder) in enumerate(tokenizers.items()):
        evaluation = evaluate_tokenizer(
            load_tokenizer(folder, device),
            pictures,
            size,
            device=device,
            most=most,
            lpips=judges.lpips,
            inception=judges.inception,
        )
        found[name] = evaluation.figures
        path = out / ("reconstructions.png" if number == 0 else f"reconstructions-{number}.png")
        _draw(evaluation, path)
        rows = {
            key: value for key, value in evaluation.figures.items() if isinstance(value, int | float | str)
        }
        missing = {key: _WITHOUT for key in ("lpips", "rfid") if key not in rows}
        sections += [
            FiguresSection(name, rows | missing),
            ImageSection(
                f"{name}: reconstructions", path, "Pictures above, what the tokenizer makes of them below."
            ),
        ]
    publish_json(out / REPORT, {**found, **(more or {})})
    html_report(out / "report.html", "Tokenizers", sections)
    return found


def in_a_line(figures: Mapping[str, Any]) -> str:
    """Format the main metrics as one line."""
    parts = [
        f"{figures['psnr']:.2f} dB",
        *(f"{name} {figures[name]:.3f}" for name in ("ssim", "lpips", "rfid") if name in figures),
        f"{figures['used']:.1%} of {figures['codes']:,} codes used ({figures['used_often']:.1%} ten times)",
        f"perplexity {figures['perplexity']:.0f}",
    ]
    return ", ".join(parts)


def _pictures(shards: ShardSet, size: int) -> Iterator[NDArray[np.uint8]]:
    for shard in shards.shards:
        for sample in read_shard(shard):
            with suppress(BadSample):
                yield fitted(decode_image(sample[image_extension(sample)]), size)


def _figures(
    originals: Images, made: Images, signal: Tensor, decoded: Tensor, lpips: LPIPS | None
) -> dict[str, Tensor]:
    """Compute the metrics of each image."""
    found = {"psnr": psnr(originals, made).clamp(max=_LARGEST_PSNR)}
    if min(originals.shape[-2:]) >= _SMALLEST_SSIM:
        found["ssim"] = ssim(originals, made)
    if lpips is not None:
        found["lpips"] = lpips(decoded.clamp(-1, 1), signal)
    return found


def _draw(evaluation: TokenizerEvaluation, path: Path) -> None:
    originals, made = (
        images.permute(0, 2, 3, 1).numpy() for images in (evaluation.originals, evaluation.reconstructions)
    )
    scale = max(1, _SHOWN_SIDE // originals.shape[1])
    publish_image(path, comparison_grid(originals, made, columns=_COLUMNS, scale=scale))
