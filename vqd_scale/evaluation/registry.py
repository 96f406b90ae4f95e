"""Registry of the metrics of an evaluation."""

from vqd_scale.evaluation.metrics import (
    Alignment,
    ClipMetrics,
    FrechetDistance,
    InceptionScore,
    KernelDistance,
    Metric,
    Neighbors,
)

METRICS: tuple[type[Metric], ...] = (
    FrechetDistance,
    KernelDistance,
    Neighbors,
    InceptionScore,
    ClipMetrics,
    Alignment,
)
"""Metrics in the order of the report; the last one with scores ranks its images."""
