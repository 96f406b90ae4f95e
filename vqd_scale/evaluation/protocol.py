"""All that moves the figures of an evaluation, as one configuration."""

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
    """How pictures are drawn.

    Attributes:
        sampler: The steps; a model that draws token by token knows none.
        guidance: Scale of classifier-free guidance, 1 is none.
        truncation: Which codes each prediction keeps; all if not given.
        seed: Of the pictures.
        batch_size: How many are drawn at once; also what a kill costs each rank.
        save_images: Whether the pictures are kept, beside their features.
    """

    sampler: Sampler = Strided(steps=100)
    guidance: GuidanceScale = ConstantGuidance(scale=3.0)
    truncation: Truncation | None = None
    seed: int = Field(default=0, ge=0, lt=1 << 31)
    batch_size: int = Field(default=32, ge=1)
    save_images: bool = False


class KernelConfig(Config):
    """KID's subsets.

    Attributes:
        subsets: How many.
        size: Pictures of each.
    """

    subsets: int = Field(default=100, ge=1)
    size: int = Field(default=1000, ge=2)


class EvaluationConfig(Config):
    """A protocol; the defaults are those of COCO's 30,000 captions.

    Attributes:
        name: What the results are filed under.
        data: The shards that captions, and real pictures if not said otherwise, come from.
        prompts: What is drawn.
        reference: Which real pictures stand on the other side.
        sampling: How it is drawn.
        extractor: Whose features are compared.
        clip: Which CLIP judges; none without weights.
        kid: The kernel distance's subsets.
        inception_splits: Parts of the Inception score.
        neighbors: k of precision, recall, density and coverage.
        report_images: How many best, worst and random pictures the report shows.
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
