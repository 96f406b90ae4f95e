"""Evaluation of a model: distributed, resumable, and with the same metrics at any number of ranks."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from pydantic import ConfigDict, TypeAdapter, with_config
from torch import Tensor
from typing_extensions import TypedDict

from vqd_scale.core.atomic_io import publish_json
from vqd_scale.core.errors import UserError
from vqd_scale.core.fingerprint import first_difference
from vqd_scale.core.nested import leaves
from vqd_scale.core.outputs import reserve
from vqd_scale.core.world import World
from vqd_scale.data.shards.shard_index import ShardSet
from vqd_scale.evaluation.config import Classes, EvaluationConfig, PromptsConfig
from vqd_scale.evaluation.extractors import Extractor
from vqd_scale.evaluation.frechet import FeatureStatistics, frechet_distance
from vqd_scale.evaluation.metrics import ImageScores, MetricInputs, metric_name
from vqd_scale.evaluation.prompts import EvaluationPrompt, choose_prompts, prompts_digest
from vqd_scale.evaluation.reference_stats import Reference, ReferenceImages, reference_of
from vqd_scale.evaluation.registry import METRICS
from vqd_scale.evaluation.resumable_chunks import ResumableChunks, statistics_of
from vqd_scale.models.generate import Pipeline, check_sampling, generate_batch
from vqd_scale.models.pipeline import image_slots
from vqd_scale.nn.config import ClassCondition
from vqd_scale.reports.html import FiguresSection, ImageSection, TextSection, html_report
from vqd_scale.reports.plots import Series, image_grid, plot_curves, publish_image

_POINTS = 200
"""Maximum number of points of a curve over all images."""
_COLUMNS = 8
_FILES = (
    *("config.yaml", "report.json", "report.html", "reference.safetensors", "curve-0.png", "curve-1.png"),
    *("samples-0.png", "samples-1.png", "samples-2.png"),
)
_NOTE = "Metrics are comparable only if all of these values are equal."
_SEEDS = (
    "Captions, their order and the random numbers are functions of the seeds above: the same command "
    "generates the same samples on any number of ranks."
)


@with_config(ConfigDict(extra="allow"))
class Report(TypedDict):
    """Report of an evaluation, as far as it is read back; other keys are kept."""

    figures: dict[str, Any]
    model: dict[str, Any]


REPORT = TypeAdapter(Report)
"""Shape of ``report.json``."""


@dataclass(frozen=True)
class Result:
    """Result of an evaluation.

    Attributes:
        report: All metrics and settings, as JSON values.
        sections: Sections of the page: best, worst and random images; distance by number of images; per-image
            score over all images. Their files lie in the folder of the evaluation.
    """

    report: dict[str, Any]
    sections: list[ImageSection]


def evaluate(
    config: EvaluationConfig,
    pipe: Pipeline,
    model: dict[str, Any],
    out: Path,
    world: World,
    stop: Callable[[], bool] = lambda: False,
    finished: Report | None = None,
) -> Result | None:
    """Generate images, extract features, compute all metrics and plot them.

    Args:
        config: Evaluation protocol.
        pipe: Model pipeline, on this rank's device.
        model: Identity of the model; see `model_identity`.
        out: Folder of chunks, statistics and plots, shared by all ranks.
        world: Ranks that share the work.
        stop: Callback that returns ``True`` after a stop signal on this rank.
        finished: Report of an earlier call, which is compared with the inputs instead of computed again.

    Returns:
        Result on the first rank; ``None`` on other ranks, and for a finished evaluation.

    Raises:
        EvaluationStopped: A rank received a stop signal; the same call resumes the evaluation.
        UserError: Data, weights or statistics are missing or differ from the configuration, there are too
            few images, or the folder contains something else.
    """
    shards = None if config.data is None else ShardSet.open(config.data, look=world.is_first)
    prompts = choose_prompts(config.prompts, shards)
    _check_prompts(config.prompts, pipe)
    check_sampling(pipe, [prompt.text for prompt in prompts], config.sampling)
    extractor = config.extractor.build(pipe.bundle.tokenizer, world.device)
    _check_count(len(prompts), extractor)
    metrics = [kind(config, prompts, world.device) for kind in METRICS]
    height, width = (side * pipe.bundle.tokenizer.factor for side in pipe.bundle.config.grid)
    if height != width:
        raise UserError(f"images of {width}x{height} are not square; an evaluation needs square images.")
    real = shards if config.reference.data is None else ShardSet.open(config.reference.data)
    if real is None:
        raise UserError("reference: real images need shards; give --data, or reference.data.")
    description = {
        "model": {key: value for key, value in model.items() if key != "name"},
        "prompts": prompts_digest(prompts),
        "sampling": config.sampling.model_dump(mode="json"),
        "dtype": str(pipe.bundle.dtype).removeprefix("torch."),
        "extractor": extractor.description,
        **{metric.name: metric.description for metric in metrics if metric.description is not None},
    }
    protocol = {"protocol": config.model_dump(mode="json")}
    reference_images = ReferenceImages(config.reference, real, prompts, height, extractor)
    if finished is not None:
        inputs = {**description, "reference": reference_images.provenance, **protocol}
        stored = {name: finished.get(name) for name in inputs}
        stored["model"] = {key: value for key, value in finished["model"].items() if key != "name"}
        difference = first_difference(stored, inputs)
        if difference is not None:
            raise UserError(f"{out}: its report has other inputs ({difference}); give another --output.")
        return None
    for metric in metrics:
        metric.check(reference_images.provenance["stored_features"])
    images = [f"images/{number:06d}.png" for number in range(len(prompts) * config.sampling.save_images)]
    world.on_first_rank(lambda: reserve(out, "eval_coco_fid.py", [*_FILES, *images]))
    reference = reference_of(
        reference_images, config.reference.file or out / "reference.safetensors", world, stop
    )
    parts = ResumableChunks(out / "parts", len(prompts), config.sampling.batch_size)
    parts.begin(description, world)
    slots = image_slots(config.sampling.seed, len(prompts))

    def make(numbers: range) -> dict[str, Tensor]:
        texts = [prompts[number].text for number in numbers]
        images = generate_batch(pipe, texts, slots[numbers.start : numbers.stop], config.sampling)
        if config.sampling.save_images:
            for number, image in zip(numbers, images.permute(0, 2, 3, 1).numpy(), strict=True):
                publish_image(out / "images" / f"{number:06d}.png", Image.fromarray(image))
        columns = extractor(images)
        for metric in metrics:
            columns |= metric.columns(images, numbers)
        return columns

    parts.work(make, world, "sample", stop)
    statistics = statistics_of(parts, extractor.dimension, world)
    if not world.is_first:
        return None
    names = frozenset(parts.read(0))
    inputs = MetricInputs(config, statistics, reference, names, parts.column, world.device)
    figures = {name: value for metric in metrics for name, value in metric.values(inputs).items()}
    *_, scores = filter(None, (metric.scores(inputs) for metric in metrics))
    distance = metric_name(config.extractor, "fid")
    by_count = _distances_by_count(inputs.features, reference, figures[distance])
    report = {
        "figures": figures,
        "count": statistics.count,
        "distance_by_count": by_count,
        **description,
        "model": model,
        "reference": reference.provenance,
        **protocol,
    }
    samples = _sample_sections(config, pipe, prompts, slots, scores, out)
    return Result(report, [*samples, *_curve_sections(distance, by_count, scores, out)])


def publish_result(result: Result, out: Path) -> None:
    """Write ``report.json`` and the self-contained page ``report.html``; errors as for `published`."""
    report = result.report
    reference = report["reference"] | {"prompts (SHA-256)": report["prompts"]}
    definitions = " ".join(kind.definition for kind in METRICS)
    sections = [
        FiguresSection("Metrics", _rows(report["figures"]), f"Over {report['count']} samples."),
        *result.sections,
        FiguresSection("Sampling", _rows(report["sampling"] | {"dtype": report["dtype"]})),
        FiguresSection("Reference", _rows(reference), _NOTE),
        FiguresSection("Model", _rows(report["model"])),
        TextSection("Metric definitions", f"{definitions}\n\n{_SEEDS}"),
    ]
    html_report(out / "report.html", f"{report['protocol']['name']}: {report['model']['name']}", sections)
    # Written last: its existence marks a complete report.
    publish_json(out / "report.json", report)


def _rows(values: dict[str, Any]) -> dict[str, float | str]:
    """Flatten nested plain values to dotted names; ``None`` values are omitted."""
    return {
        name: value if isinstance(value, float) else str(value)
        for name, value in leaves(values)
        if value is not None
    }


def _check_prompts(config: PromptsConfig, pipe: Pipeline) -> None:
    """Check that the model has the prompts' classes; a text model would accept a class index as a caption."""
    condition = pipe.bundle.model.condition
    if isinstance(config, Classes) and not (
        isinstance(condition, ClassCondition) and condition.classes == config.classes
    ):
        actual = f"{condition.classes} classes" if isinstance(condition, ClassCondition) else "no classes"
        raise UserError(
            f"prompts: these are {config.classes} classes, but the model has {actual}; "
            "choose the protocol of the dataset it was trained on."
        )


def _check_count(count: int, extractor: Extractor) -> None:
    """Check the number of images before hours of sampling."""
    if count <= extractor.dimension:
        raise UserError(
            f"prompts.count: {count} images are too few for the covariance of {extractor.dimension} "
            f"features; sample at least {extractor.dimension + 1}."
        )


def _distances_by_count(features: Tensor, reference: Reference, full_distance: float) -> dict[str, float]:
    """Compute the Fréchet distance for evenly spaced subsets of the images, to show its sample-size bias."""
    total = len(features)
    distances: dict[str, float] = {}
    for count in (total // 8, total // 4, total // 2):
        if count > features.shape[1]:
            subset = features[torch.arange(count) * total // count]
            distances[str(count)] = frechet_distance(FeatureStatistics.of(subset), reference.statistics)
    return distances | {str(total): full_distance}


def _curve_sections(
    distance: str, by_count: dict[str, float], scores: ImageScores, out: Path
) -> list[ImageSection]:
    """Plot the distance by number of images, and the sorted scores."""
    count = len(scores.values)
    positions = torch.linspace(0, count - 1, min(count, _POINTS)).long()
    sorted_values = scores.values.sort().values[positions].tolist()
    fractions = (positions / max(count - 1, 1)).tolist()
    paths = [out / "curve-0.png", out / "curve-1.png"]
    by_size = Series(distance, [float(count) for count in by_count], list(by_count.values()))
    plot_curves(paths[0], [by_size], title="", x_label="samples", y_label=distance)
    by_rank, x_label = Series(scores.name, fractions, sorted_values), "fraction of samples with a lower value"
    plot_curves(paths[1], [by_rank], title="", x_label=x_label, y_label=scores.name)
    note = (
        "Evenly spaced samples, compared with all real images. Fewer samples give a larger distance, so "
        "distances of different sample sizes are not comparable."
    )
    return [
        ImageSection("Distance by number of samples", paths[0], note),
        ImageSection(f"All samples by {scores.name}", paths[1], "Sorted from lowest to highest."),
    ]


def _sample_sections(
    config: EvaluationConfig,
    pipe: Pipeline,
    prompts: Sequence[EvaluationPrompt],
    slots: Tensor,
    scores: ImageScores,
    out: Path,
) -> Iterator[ImageSection]:
    """Generate the best, worst and first images again; the first are random if prompts are shuffled."""
    order = scores.order.argsort(descending=True, stable=True).tolist()
    count = min(config.report_images, len(order))
    selections = {
        f"Best by {scores.name}": order[:count],
        f"Worst by {scores.name}": order[::-1][:count],
        "First samples, not selected": list(range(count)),
    }
    for index, (heading, numbers) in enumerate(selections.items()):
        texts = [prompts[number].text for number in numbers]
        images = generate_batch(pipe, texts, slots[numbers], config.sampling).permute(0, 2, 3, 1).numpy()
        captions = [f"{prompts[number].text} ({float(scores.values[number]):.3g})" for number in numbers]
        path, scale = out / f"samples-{index}.png", max(1, 128 // images.shape[1])
        publish_image(path, image_grid(images, captions, columns=_COLUMNS, scale=scale))
        yield ImageSection(heading, path)
