"""Configuration of an evaluation: every setting that affects its metrics."""

from pydantic import Field, model_validator
from typing_extensions import Self

from vqd_scale.core.atomic_io import Location
from vqd_scale.core.config import Config
from vqd_scale.diffusion.guidance import ConstantGuidance, GuidanceScale, Truncation
from vqd_scale.diffusion.samplers import Sampler, Strided
from vqd_scale.evaluation.clip import ClipConfig
from vqd_scale.evaluation.extractors import ExtractorConfig, Inception
from vqd_scale.evaluation.prompts import Captions, PromptsConfig
from vqd_scale.evaluation.reference_stats import ReferenceConfig


class SamplingConfig(Config):
    """Sampling options.

    Attributes:
        sampler: Diffusion sampler; ignored by autoregressive models.
        guidance: Scale of classifier-free guidance; 1 disables it.
        truncation: Truncation of the predicted code distribution; disabled if not given.
        seed: Seed of the samples.
        batch_size: Images per batch and per chunk. A kill loses at most one chunk per rank.
        save_images: Save the images in addition to their features.
    """

    sampler: Sampler = Strided(steps=100)
    guidance: GuidanceScale = ConstantGuidance(scale=3.0)
    truncation: Truncation | None = None
    seed: int = Field(default=0, ge=0, lt=1 << 31)
    batch_size: int = Field(default=32, ge=1)
    save_images: bool = False


class KernelConfig(Config):
    """Subsets of the kernel inception distance (KID).

    Attributes:
        subsets: Number of subsets.
        size: Images per subset.
    """

    subsets: int = Field(default=100, ge=1)
    size: int = Field(default=1000, ge=2)


class EvaluationConfig(Config):
    """Evaluation protocol; the defaults are for 30,000 captions of COCO.

    Attributes:
        name: Name of the protocol in results and reports.
        data: Shards of the captions and, unless ``reference.data`` is given, of the real images.
        prompts: Prompts of the generated images.
        reference: Real images for comparison.
        sampling: Sampling options.
        extractor: Feature extractor.
        clip: CLIP model for the CLIP metrics; disabled if not given.
        kid: Subsets of the kernel inception distance.
        inception_splits: Number of splits of the Inception score.
        neighbors: Number of neighbors k of precision, recall, density and coverage.
        report_images: Number of best, worst and random images in the report, each.
    """

    name: str = Field(default="coco30k", pattern="^[A-Za-z0-9._-]+$")
    data: Location | None = None
    prompts: PromptsConfig = Captions()
    reference: ReferenceConfig = ReferenceConfig()
    sampling: SamplingConfig = SamplingConfig()
    extractor: ExtractorConfig = Inception()
    clip: ClipConfig | None = None
    kid: KernelConfig = KernelConfig()
    inception_splits: int = Field(default=10, ge=1)
    neighbors: int = Field(default=5, ge=1)
    report_images: int = Field(default=8, ge=1)

    @model_validator(mode="after")
    def _reference_fits_prompts(self) -> Self:
        if self.reference.images == "prompted" and not isinstance(self.prompts, Captions):
            raise ValueError("without captions no picture is a prompt's own; set reference.images to all")
        return self
