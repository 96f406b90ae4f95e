"""Metrics of an evaluation.

A metric may store columns, one row per image, which are computed together with the images. Its values are
computed from the columns of all images at the end.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from vqd_scale.evaluation import clip as clips
from vqd_scale.evaluation.config import EvaluationConfig, ExtractorConfig
from vqd_scale.evaluation.extractors import FEATURES, LOGITS, Images
from vqd_scale.evaluation.feature_metrics import (
    NeighborMetrics,
    check_neighbors,
    check_splits,
    check_subsets,
    inception_score,
    kernel_distance,
    neighbor_metrics,
)
from vqd_scale.evaluation.frechet import FeatureStatistics, frechet_distance
from vqd_scale.evaluation.prompts import EvaluationPrompt
from vqd_scale.evaluation.reference_stats import Reference
from vqd_scale.evaluation.scene_reader import correct_attributes, shuffled_scenes

_GENERAL_NAMES = {"fid": "frechet_distance", "kid": "kernel_distance"}
"""Names without reference to Inception's features."""

Columns = dict[str, Tensor]
"""Tensors with one row per image."""


@dataclass(frozen=True)
class MetricInputs:
    """Everything that a metric can depend on, after all images are generated.

    Attributes:
        config: Evaluation protocol.
        statistics: Feature statistics of all images.
        reference: Statistics and stored features of real images.
        names: Names of the columns.
        column: Function that reads a column by name, [images, …].
        device: Compute device.
    """

    config: EvaluationConfig
    statistics: FeatureStatistics
    reference: Reference
    names: frozenset[str]
    column: Callable[[str], Tensor]
    device: torch.device

    @cached_property
    def features(self) -> Float[Tensor, "images features"]:
        """Features of all images, on the CPU."""
        return self.column(FEATURES)

    @cached_property
    def neighbors(self) -> NeighborMetrics:
        """Nearest-neighbor metrics, which several metrics share."""
        real = self.reference.features.to(self.device)
        return neighbor_metrics(self.features.to(self.device), real, self.config.neighbors)


@dataclass(frozen=True)
class ImageScores:
    """Score of each image, which ranks the images for the report.

    Attributes:
        name: Name of the score.
        values: Score of each image, float [count].
        order: Sort key of each image, float [count]; higher is better.
    """

    name: str
    values: Float[Tensor, " count"]
    order: Float[Tensor, " count"]


class Metric(ABC):
    """One or more related values of an evaluation.

    Args:
        config: Evaluation protocol.
        prompts: Prompt of each image.
        device: Compute device.

    Attributes:
        name: Name of the entry of `description` in results.
        definition: Sentence for the report: what the values mean, and which direction is better.
        description: Everything besides images and protocol that the values depend on, as JSON values.
    """

    name: ClassVar[str]
    definition: ClassVar[str]
    description: Any = None

    def __init__(
        self, config: EvaluationConfig, prompts: Sequence[EvaluationPrompt], device: torch.device
    ) -> None:
        self.config, self.prompts, self.device = config, prompts, device

    def columns(self, images: Images, numbers: range) -> Columns:
        """Compute columns for a batch; none by default.

        Args:
            images: Generated images.
            numbers: Numbers of the images, and of their prompts.
        """
        return {}

    def check(self, real: int) -> None:
        """Check that there are enough images, before the first one is generated.

        Args:
            real: Number of real images with stored features.

        Raises:
            UserError: There are too few images.
        """
        del real  # By default, any number is enough.

    @abstractmethod
    def values(self, inputs: MetricInputs) -> dict[str, Any]:
        """Compute the values by name, as JSON values; none if the evaluation lacks the metric's inputs.

        Raises:
            UserError: There are too few images.
        """

    def scores(self, inputs: MetricInputs) -> ImageScores | None:
        """Return a score of each image; ``None`` if the metric has none."""
        return None


def metric_name(extractor: ExtractorConfig, name: str) -> str:
    """Return a metric's name, which says the features unless they are those of published figures.

    Args:
        extractor: Feature extractor.
        name: Name with Inception's 2048 features, such as ``fid``.
    """
    label = extractor.label
    return f"{_GENERAL_NAMES.get(name, name)}_{label}" if label else name


class FrechetDistance(Metric):
    """Fréchet distance to the real images."""

    definition = "Fréchet distance (FID if the features are Inception's 2048): lower is better."

    def values(self, inputs: MetricInputs) -> dict[str, Any]:
        """Compute the distance."""
        distance = frechet_distance(inputs.statistics, inputs.reference.statistics)
        return {metric_name(self.config.extractor, "fid"): distance}


class KernelDistance(Metric):
    """Kernel inception distance."""

    definition = "KID, mean and deviation over subsets: lower is better."

    def check(self, real: int) -> None:
        """Check the size of the subsets."""
        check_subsets(min(len(self.prompts), real), self.config.kid.size)

    def values(self, inputs: MetricInputs) -> dict[str, Any]:
        """Compute mean and deviation."""
        kid, real = self.config.kid, inputs.reference.features
        distance = kernel_distance(inputs.features, real, subsets=kid.subsets, size=kid.size)
        return {metric_name(self.config.extractor, "kid"): distance}


class Neighbors(Metric):
    """Precision, recall, density and coverage."""

    definition = (
        "Precision and density measure how many samples lie among the real images; recall and coverage "
        "measure how much of the real images the samples cover."
    )

    def check(self, real: int) -> None:
        """Check the number of neighbors."""
        check_neighbors(min(len(self.prompts), real), self.config.neighbors)

    def values(self, inputs: MetricInputs) -> dict[str, Any]:
        """Compute the four values."""
        names = ("precision", "recall", "density", "coverage")
        return {metric_name(self.config.extractor, name): getattr(inputs.neighbors, name) for name in names}

    def scores(self, inputs: MetricInputs) -> ImageScores:
        """Return the distance of each image to the nearest real image."""
        nearest = inputs.neighbors.nearest
        return ImageScores("distance to the nearest real image", nearest, -nearest)


class InceptionScore(Metric):
    """Inception score; for features with logits."""

    definition = "Inception score, mean and deviation over splits: higher is better."

    def check(self, real: int) -> None:
        """Check the number of splits."""
        if self.config.extractor.label in ("", "random"):
            check_splits(len(self.prompts), self.config.inception_splits)

    def values(self, inputs: MetricInputs) -> dict[str, Any]:
        """Compute mean and deviation."""
        if LOGITS not in inputs.names:
            return {}
        score = inception_score(inputs.column(LOGITS), self.config.inception_splits)
        return {metric_name(self.config.extractor, "inception_score"): score}


class ClipMetrics(Metric):
    """CLIP score and R-precision, if a CLIP model is configured."""

    name = "clip"
    definition = (
        "CLIP score is the mean cosine similarity of a sample and its caption; R-precision is the fraction "
        "of samples that are closest to their own caption."
    )

    def __init__(
        self, config: EvaluationConfig, prompts: Sequence[EvaluationPrompt], device: torch.device
    ) -> None:
        super().__init__(config, prompts, device)
        self._clip = None if config.clip is None else clips.load_clip(config.clip, device)
        self.description = self._clip and self._clip.description

    def check(self, real: int) -> None:
        """Check the number of candidates."""
        if self.config.clip is not None:
            clips.check_candidates(len(self.prompts), self.config.clip.retrieval_candidates)

    def columns(self, images: Images, numbers: range) -> Columns:
        """Embed images and captions."""
        captions = [self.prompts[number].text for number in numbers]
        return {} if self._clip is None else self._clip.columns(images, captions)

    def values(self, inputs: MetricInputs) -> dict[str, Any]:
        """Compute mean score and R-precision."""
        if self.config.clip is None:
            return {}
        images, captions = inputs.column(clips.IMAGE), inputs.column(clips.CAPTION)
        return {
            "clip_score": float(clips.scores(images, captions).mean()),
            "clip_r_precision": clips.r_precision(images, captions, self.config.clip.retrieval_candidates),
        }

    def scores(self, inputs: MetricInputs) -> ImageScores | None:
        """Return the CLIP score of each image."""
        if self.config.clip is None:
            return None
        values = clips.scores(inputs.column(clips.IMAGE), inputs.column(clips.CAPTION))
        return ImageScores("CLIP score", values, values)


class Alignment(Metric):
    """Fraction of attributes that the scene reader finds correct; for prompts with scenes only."""

    definition = (
        "Alignment is the fraction of attributes that an exact pixel reader finds correct; embedded dataset "
        "only."
    )

    def __init__(
        self, config: EvaluationConfig, prompts: Sequence[EvaluationPrompt], device: torch.device
    ) -> None:
        super().__init__(config, prompts, device)
        scenes = [prompt.scene for prompt in prompts if prompt.scene is not None]
        has_scenes = len(prompts) == len(scenes) > 1
        self._scenes = {"correct": scenes, "shuffled": shuffled_scenes(scenes)} if has_scenes else {}

    def columns(self, images: Images, numbers: range) -> Columns:
        """Compare the images with their own scenes, and with scenes of other prompts."""
        return {
            name: torch.from_numpy(correct_attributes(images, scenes[numbers.start : numbers.stop]))
            for name, scenes in self._scenes.items()
        }

    def values(self, inputs: MetricInputs) -> dict[str, Any]:
        """Compute the fractions of correct attributes."""
        if not self._scenes:
            return {}
        correct, names = inputs.column("correct").numpy(), self._scenes["correct"][0].attributes()
        score = {
            "mean": float(correct.mean()),
            "all": float(correct.all(axis=1).mean()),
            "per_attribute": dict(zip(names, correct.mean(axis=0).tolist(), strict=True)),
            "shuffled": float(inputs.column("shuffled").numpy().mean()),
        }
        return {"alignment": score}

    def scores(self, inputs: MetricInputs) -> ImageScores | None:
        """Return the number of correct attributes; ties are broken by the distance to real images."""
        if not self._scenes:
            return None
        count = inputs.column("correct").sum(dim=1).float()
        nearest = inputs.neighbors.nearest
        closeness = nearest.argsort(descending=True).argsort() / len(nearest)
        return ImageScores("number of correct attributes", count, count + closeness)
