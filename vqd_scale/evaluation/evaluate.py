"""Evaluation of a model: distributed, resumable, and with the same metrics at any number of ranks."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from vqd_scale.core.arrays import NDArray
from vqd_scale.core.errors import UserError
from vqd_scale.core.world import World
from vqd_scale.data.shards.shard_index import ShardSet
from vqd_scale.diffusion.guidance import ConstantGuidance
from vqd_scale.evaluation import clip as clips
from vqd_scale.evaluation.extractors import FEATURES, LOGITS, Extractor, build_extractor
from vqd_scale.evaluation.feature_metrics import (
    MeanAndDeviation,
    inception_score,
    kernel_distance,
    neighbourhoods,
)
from vqd_scale.evaluation.frechet import FeatureStatistics, frechet_distance
from vqd_scale.evaluation.prompts import Classes, EvaluationPrompt, PromptsConfig, choose_prompts, digest_of
from vqd_scale.evaluation.protocol import EvaluationConfig, SamplingConfig
from vqd_scale.evaluation.reference_stats import Reference, reference_of
from vqd_scale.evaluation.resumable_chunks import ResumableChunks
from vqd_scale.evaluation.scene_reader import alignment_score, attributes_right
from vqd_scale.models.autoregressive_sampling import AutoregressiveTextToImage
from vqd_scale.models.generate import Pipeline
from vqd_scale.models.pipeline import image_slots
from vqd_scale.nn.denoiser import ClassCondition
from vqd_scale.reports.plots import publish_image

_RIGHT = "right"

_POINTS = 200
"""Maximum number of points of a curve over all images."""

Images = UInt8[Tensor, "batch 3 height width"]


@dataclass(frozen=True)
class Shown:
    """Selected images for the report, generated again.

    Attributes:
        heading: Heading in the report.
        images: Images, uint8 [count, height, width, 3].
        captions: Prompt and score of each image.
    """

    heading: str
    images: UInt8[NDArray[np.uint8], "count height width 3"]
    captions: list[str]


@dataclass(frozen=True)
class Curve:
    """Curve for the report.

    Attributes:
        heading: Heading in the report.
        positions: Positions on the horizontal axis.
        values: Values on the vertical axis.
        x: Label of the horizontal axis.
        y: Label of the vertical axis.
        note: Explanation in the report.
    """

    heading: str
    positions: list[float]
    values: list[float]
    x: str
    y: str
    note: str


@dataclass(frozen=True)
class Result:
    """Result of an evaluation.

    Attributes:
        report: All metrics and settings, as JSON values.
        shown: Best, worst and random images.
        curves: Distance by number of images, and per-image score over all images.
    """

    report: dict[str, Any]
    shown: list[Shown]
    curves: list[Curve]


@dataclass(frozen=True)
class _Merits:
    """Per-image scores that rank the images for the report.

    Attributes:
        name: Name of the score.
        values: Score of each image, float [count].
        order: Sort key of each image, float [count]; higher is better.
    """

    name: str
    values: Float[Tensor, " count"]
    order: Float[Tensor, " count"]


def evaluate(
    config: EvaluationConfig,
    pipe: Pipeline,
    model: dict[str, Any],
    out: Path,
    world: World,
    stop: Callable[[], bool] = lambda: False,
) -> Result | None:
    """Generate images, extract features and compute all metrics.

    Args:
        config: Evaluation protocol.
        pipe: Model pipeline, on this rank's device.
        model: Name and identifying digests of the model.
        out: Folder of chunks and statistics, shared by all ranks.
        world: Ranks that share the work.
        stop: Callback that returns ``True`` after a stop signal on this rank.

    Returns:
        Result on the first rank, ``None`` on other ranks.

    Raises:
        EvaluationStopped: A rank received a stop signal; the same call resumes the evaluation.
        UserError: Data, weights or statistics are missing or differ from the configuration, or there are too
            few images.
    """
    shards = _opened(config, world)
    prompts = choose_prompts(config.prompts, shards)
    _check_prompts(config.prompts, pipe)
    extractor = build_extractor(config.extractor, pipe.bundle.tokenizer, world.device)
    _check_count(len(prompts), extractor)
    clip = None if config.clip is None else clips.load_clip(config.clip, world.device)
    height, width = (side * pipe.bundle.tokenizer.factor for side in pipe.bundle.config.grid)
    if height != width:
        raise UserError(f"pictures of {width}x{height} are not square, as an evaluation's are.")
    real = shards if config.reference.data is None else ShardSet.open(config.reference.data)
    if real is None:
        raise UserError("reference: real pictures need shards; give --data, or reference.data.")
    reference = reference_of(
        config.reference,
        real,
        prompts,
        height,
        extractor,
        config.reference.file or out / "reference.safetensors",
        world,
        stop,
    )
    description = {
        "model": model,
        "prompts": digest_of(prompts),
        "sampling": config.sampling.model_dump(mode="json", exclude={"save_images"}),
        "dtype": str(pipe.bundle.dtype).removeprefix("torch."),
        "extractor": extractor.description,
        "clip": clip and clip.description,
    }
    parts = ResumableChunks(out / "parts", len(prompts), config.sampling.batch_size)
    parts.begin(description, world)
    slots = image_slots(config.sampling.seed, len(prompts))

    def make(numbers: range) -> dict[str, Tensor]:
        own = [prompts[number] for number in numbers]
        images = draw(pipe, own, slots[numbers.start : numbers.stop], config.sampling)
        if config.sampling.save_images:
            for number, image in zip(numbers, images.permute(0, 2, 3, 1).numpy(), strict=True):
                publish_image(out / "images" / f"{number:06d}.png", Image.fromarray(image))
        columns = extractor(images)
        if clip is not None:
            columns |= clip.columns(images, [prompt.text for prompt in own])
        scenes = [prompt.scene for prompt in own if prompt.scene is not None]
        if len(scenes) == len(own):
            columns[_RIGHT] = torch.from_numpy(attributes_right(images, scenes))
        return columns

    parts.work(make, world, "draw", stop)
    statistics = statistics_of(parts, extractor.dimension, world)
    if not world.is_first:
        return None
    features = parts.column(FEATURES)
    figures, merits = _figures(config, parts, features, statistics, reference, prompts, world.device)
    by_count = _distances_by_count(features, reference, figures[_distance_name(config)])
    report = {
        "figures": figures,
        "count": statistics.count,
        "distance_by_count": by_count,
        **description,
        "reference": reference.provenance,
        "protocol": config.model_dump(mode="json"),
    }
    shown = _shown(config, pipe, prompts, slots, merits)
    return Result(report, shown, _curves(_distance_name(config), by_count, merits))


def draw(
    pipe: Pipeline, prompts: Sequence[EvaluationPrompt], slots: Tensor, config: SamplingConfig
) -> UInt8[Tensor, "batch 3 height width"]:
    """Generate one batch of images, returned on the CPU.

    Raises:
        UserError: The sampler does not fit the noise schedule, or the guidance does not fit the model.
    """
    texts = [prompt.text for prompt in prompts]
    if isinstance(pipe, AutoregressiveTextToImage):
        if not isinstance(config.guidance, ConstantGuidance):
            raise UserError(
                "sampling.guidance: a model that draws token by token takes kind 'constant' only."
            )
        return pipe.generate_batch(texts, slots, guidance=config.guidance, truncation=config.truncation)
    return pipe.generate_batch(texts, slots, config.sampler, guidance=config.guidance, truncation=config.truncation)


def statistics_of(parts: ResumableChunks, dimension: int, world: World) -> FeatureStatistics:
    """Compute the feature statistics of all images; each rank reads its own chunks. Collective."""
    statistics = FeatureStatistics.empty(dimension)
    for part in parts.numbers[world.rank :: world.size]:
        statistics = statistics.update(parts.read(part)[FEATURES])
    return statistics.over_ranks(world)


def _opened(config: EvaluationConfig, world: World) -> ShardSet | None:
    return None if config.data is None else ShardSet.open(config.data, look=world.is_first)


def _check_prompts(config: PromptsConfig, pipe: Pipeline) -> None:
    """Check that the model has the prompts' classes; a text model would accept a class index as a caption."""
    condition = pipe.bundle.model.condition
    if isinstance(config, Classes) and not (
        isinstance(condition, ClassCondition) and condition.classes == config.classes
    ):
        knows = f"{condition.classes} classes" if isinstance(condition, ClassCondition) else "no classes"
        raise UserError(
            f"prompts: pictures of {config.classes} classes are asked for, but this model knows {knows}; "
            "choose the protocol of the set that it was trained on."
        )


def _check_count(count: int, extractor: Extractor) -> None:
    """Check the number of images before hours of sampling."""
    if count <= extractor.dimension:
        raise UserError(
            f"prompts.count: {count} pictures are too few for the covariance of {extractor.dimension} "
            f"features; draw at least {extractor.dimension + 1}."
        )


def _figures(
    config: EvaluationConfig,
    parts: ResumableChunks,
    features: Tensor,
    statistics: FeatureStatistics,
    reference: Reference,
    prompts: Sequence[EvaluationPrompt],
    device: torch.device,
) -> tuple[dict[str, Any], _Merits]:
    """Compute all metrics, and the per-image scores."""
    distance = frechet_distance(statistics, reference.statistics)
    kid = kernel_distance(features, reference.kept, subsets=config.kid.subsets, size=config.kid.size)
    near = neighbourhoods(features.to(device), reference.kept.to(device), config.neighbors)
    figures: dict[str, Any] = {
        _distance_name(config): distance,
        "kid": _spread(kid),
        "precision": near.precision,
        "recall": near.recall,
        "density": near.density,
        "coverage": near.coverage,
    }
    merits = _Merits("distance to the nearest real picture", near.nearest, -near.nearest)
    names = parts.read(0).keys()
    if LOGITS in names:
        figures["inception_score"] = _spread(inception_score(parts.column(LOGITS), config.inception_splits))
    if config.clip is not None:
        pictures, captions = parts.column(clips.PICTURE), parts.column(clips.CAPTION)
        scores = clips.scores(pictures, captions)
        merits = _Merits("CLIP score", scores, scores)
        figures["clip_score"] = float(scores.mean())
        figures["clip_r_precision"] = clips.r_precision(pictures, captions, config.clip.retrieval_candidates)
    scene = prompts[0].scene
    if scene is not None and _RIGHT in names:
        right = parts.column(_RIGHT).numpy()
        score = alignment_score(right, scene)
        figures["alignment"] = {"mean": score.mean, "all": score.all, "per_attribute": score.per_attribute}
        # Ties in the number of correct attributes are broken by the distance to real images.
        count = torch.from_numpy(right.sum(axis=1)).float()
        nearness = near.nearest.argsort(descending=True).argsort() / len(near.nearest)
        merits = _Merits("attributes that are right", count, count + nearness)
    return figures, merits


def _distance_name(config: EvaluationConfig) -> str:
    """Return the metric name of the Fréchet distance: ``fid`` for Inception features only."""
    return "fid" if config.extractor.kind == "inception" else "frechet_distance"


def _distances_by_count(features: Tensor, reference: Reference, whole: float) -> dict[str, float]:
    """Compute the Fréchet distance for evenly spaced subsets of the images, to show its sample-size bias."""
    total = len(features)
    found: dict[str, float] = {}
    for count in (total // 8, total // 4, total // 2):
        if count > features.shape[1]:
            some = features[torch.arange(count) * total // count]
            found[str(count)] = frechet_distance(FeatureStatistics.of(some), reference.statistics)
    return found | {str(total): whole}


def _curves(distance: str, by_count: dict[str, float], merits: _Merits) -> list[Curve]:
    count = len(merits.values)
    places = torch.linspace(0, count - 1, min(count, _POINTS)).long()
    sort = merits.values.sort().values[places]
    return [
        Curve(
            "Distance by the number of pictures",
            [float(count) for count in by_count],
            list(by_count.values()),
            "pictures",
            distance,
            "Drawn pictures, evenly taken, beside all real ones. Fewer give more, which is why distances of "
            "different numbers are not compared.",
        ),
        Curve(
            f"All pictures by {merits.name}",
            (places / max(count - 1, 1)).tolist(),
            sort.tolist(),
            "share of the pictures that have less",
            merits.name,
            "From the lowest to the highest.",
        ),
    ]


def _spread(spread: MeanAndDeviation) -> dict[str, float]:
    return {"mean": spread.mean, "deviation": spread.deviation}


def _shown(
    config: EvaluationConfig,
    pipe: Pipeline,
    prompts: Sequence[EvaluationPrompt],
    slots: Tensor,
    merits: _Merits,
) -> list[Shown]:
    """Generate the best, worst and first images again; the first are random if prompts are shuffled."""
    order = merits.order.argsort(descending=True, stable=True).tolist()
    count = min(config.report_images, len(order))
    chosen = {"Best": order[:count], "Worst": order[::-1][:count], "Not chosen": list(range(count))}
    shown: list[Shown] = []
    for name, numbers in chosen.items():
        images = draw(pipe, [prompts[number] for number in numbers], slots[numbers], config.sampling)
        captions = [f"{prompts[number].text} ({float(merits.values[number]):.3g})" for number in numbers]
        heading = f"{name} by {merits.name}" if name != "Not chosen" else "The first ones, not chosen"
        shown.append(Shown(heading, images.permute(0, 2, 3, 1).numpy(), captions))
    return shown
