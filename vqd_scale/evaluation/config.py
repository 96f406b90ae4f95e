"""Configuration of evaluations, and the registry of feature extractors; needs no torch."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator
from typing_extensions import Self

from vqd_scale.core.atomic_io import Location
from vqd_scale.core.config import Config, kind_or
from vqd_scale.diffusion.config import SamplerConfig, Strided
from vqd_scale.models.config import SamplingConfig

if TYPE_CHECKING:
    import torch

    from vqd_scale.evaluation.extractors import Extractor
    from vqd_scale.tokenizers.base import ImageTokenizer

SEED = "sampling.seed"
"""Key whose values are repetitions in a sweep."""

PUBLISHED_INCEPTION = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
"""SHA-256 of the original FID Inception weights in PyTorch format, as in torch-fidelity and pytorch-fid."""


class Inception(Config):
    """TensorFlow's Inception of 2015 in torch-fidelity's implementation, the network of published FIDs."""

    kind: Literal["inception"] = "inception"
    weights: Path = Path("data/weights/weights-inception-2015-12-05-6726825d.pth")
    """Weights file."""
    sha256: str = Field(default=PUBLISHED_INCEPTION, pattern="^[0-9a-f]{64}$")
    """SHA-256 of the weights file; change it only for custom weights, whose figures cannot be compared with
    published ones."""
    layer: Literal["64", "192", "768", "2048"] = "2048"
    """Feature layer; standard FID uses 2048."""
    input: Literal["torch-fidelity", "pytorch-fid"] = "torch-fidelity"
    """Implementation whose resize and scaling of the input is used: TensorFlow's, as in torch-fidelity, or
    pytorch-fid's, to compare with its figures."""

    @property
    def label(self) -> str:
        """Suffix of the metrics' names; empty for the features of published metrics."""
        return "" if self.layer == "2048" else f"inception_{self.layer}"

    def build(self, tokenizer: "ImageTokenizer", device: "torch.device") -> "Extractor":
        """Build the extractor.

        Args:
            tokenizer: Tokenizer of the model; unused.
            device: Compute device.

        Raises:
            UserError: The weights are missing or have another digest.
        """
        from vqd_scale.evaluation.extractors import inception

        return inception(self, device)


class TokenizerLatents(Config):
    """Spatial mean and standard deviation of each latent channel of the model's tokenizer, for small sets.

    The features are blind to the tokenizer's reconstruction error, so only models with the same tokenizer are
    comparable.
    """

    kind: Literal["tokenizer"] = "tokenizer"

    @property
    def label(self) -> str:
        """Suffix of the metrics' names."""
        return self.kind

    def build(self, tokenizer: "ImageTokenizer", device: "torch.device") -> "Extractor":
        """Build the extractor.

        Args:
            tokenizer: Tokenizer of the model.
            device: Compute device; unused, features are computed on the tokenizer's device.
        """
        from vqd_scale.evaluation.extractors import tokenizer_latents

        return tokenizer_latents(tokenizer)


class RandomNetwork(Config):
    """Three untrained convolutions, for testing the evaluation without downloaded weights."""

    kind: Literal["random"] = "random"
    features: int = Field(default=32, ge=1, le=1 << 16)
    """Number of features."""
    seed: int = Field(default=0, ge=0)
    """Seed of the random weights."""

    @property
    def label(self) -> str:
        """Suffix of the metrics' names."""
        return self.kind

    def build(self, tokenizer: "ImageTokenizer", device: "torch.device") -> "Extractor":
        """Build the extractor.

        Args:
            tokenizer: Tokenizer of the model; unused.
            device: Compute device.
        """
        from vqd_scale.evaluation.extractors import random_network

        return random_network(self, device)


ImageExtractorConfig = Annotated[
    Annotated[Inception, Tag("inception")] | Annotated[RandomNetwork, Tag("random")],
    Discriminator(kind_or("inception")),
]
"""Extractors that need no model."""

ExtractorConfig = Annotated[
    Annotated[Inception, Tag("inception")]
    | Annotated[TokenizerLatents, Tag("tokenizer")]
    | Annotated[RandomNetwork, Tag("random")],
    Discriminator(kind_or("inception")),
]


class FoldersConfig(Config):
    """Comparison of two folders of images."""

    image_size: int | None = Field(default=None, ge=1, le=1 << 14)
    """Side of the square to which all images are resized and cropped, in pixels. ``null``: the images are
    unchanged, and must have one size."""
    extractor: ImageExtractorConfig = Inception()
    """Feature extractor."""
    batch_size: int = Field(default=32, ge=1, le=1 << 20)
    """Images per batch."""


class ClipConfig(Config):
    """CLIP model for evaluation."""

    weights: Path
    """Weights file, with open_clip's or OpenAI's names."""
    model: str = "ViT-B-32-quickgelu"
    """Model name in open_clip. OpenAI's weights need a name ending in ``-quickgelu``."""
    pretrained: str | None = None
    """open_clip tag of the weights, which decides the activation and the normalization of images; needed
    where the model's tags differ in them. ``custom`` for weights of your own."""
    sha256: str | None = Field(default=None, pattern="^[0-9a-f]{64}$")
    """SHA-256 of the weights file. If not given, any file is accepted and its digest is recorded. Set it to
    require the same weights in every evaluation."""
    retrieval_candidates: int = Field(default=100, ge=2, le=1 << 20)
    """Number of candidate captions of R-precision, including the image's own. Lower it for datasets with
    fewer than 100 captions."""


class ReferenceConfig(Config):
    """Real images that generated ones are compared with."""

    data: Location | None = None
    """Shards of the real images; the evaluation's own if not given. Training and validation images give
    different figures."""
    images: Literal["prompted", "all"] = "prompted"
    """``prompted`` takes the images whose captions were chosen, once per caption; ``all`` the set."""
    repeat_to: int | None = Field(default=None, ge=1, le=1 << 24)
    """Repeat the images in order up to this count, as the authors of VQ-Diffusion did for small sets. The
    repetition adds no information."""
    stored_features: int = Field(default=50_000, ge=2, le=1 << 24)
    """Number of features stored for distances that need more than mean and covariance."""
    file: Path | None = None
    """File for the statistics, to be shared by several evaluations."""


class EvaluationSamplingConfig(SamplingConfig):
    """Sampling options of an evaluation; a batch is a chunk, of which a kill loses at most one per rank."""

    sampler: SamplerConfig = Strided(steps=100)
    """Diffusion sampler; ignored by autoregressive models."""
    save_images: bool = False
    """Save the images in addition to their features."""


class KernelConfig(Config):
    """Subsets of the kernel inception distance (KID)."""

    subsets: int = Field(default=100, ge=1, le=1 << 20)
    """Number of subsets."""
    size: int = Field(default=1000, ge=2, le=1 << 20)
    """Images per subset."""


class Captions(Config):
    """Captions of a dataset."""

    kind: Literal["captions"] = "captions"
    count: int = Field(default=30_000, ge=1, le=1 << 24)
    """Number of prompts."""
    caption: Literal["first", "random", "each"] = "random"
    """Caption of an image that has several: the ``first``, a ``random`` one, or ``each`` of them."""
    shuffled: bool = True
    """Take items in a random order instead of the order of the shards."""
    seed: int = Field(default=0, ge=0, lt=1 << 32)
    """Seed of the order and of the random caption."""


class Classes(Config):
    """Every class equally often, in order of the classes."""

    kind: Literal["classes"] = "classes"
    count: int = Field(default=50_000, ge=1, le=1 << 24)
    """Number of images."""
    classes: int = Field(default=1000, ge=1, le=1 << 20)
    """Number of classes."""


class Nothing(Config):
    """Empty prompts, for an unconditional model."""

    kind: Literal["nothing"] = "nothing"
    count: int = Field(default=50_000, ge=1, le=1 << 24)
    """Number of images."""


PromptsConfig = Annotated[Captions | Classes | Nothing, Field(discriminator="kind")]


class EvaluationConfig(Config):
    """Evaluation protocol; the defaults are for 30,000 captions of COCO."""

    name: str = Field(default="coco30k", pattern="^[A-Za-z0-9._-]+$")
    """Name of the protocol in results and reports."""
    data: Location | None = None
    """Shards of the captions and, unless ``reference.data`` is given, of the real images."""
    prompts: PromptsConfig = Captions()
    """Prompts of the generated images."""
    reference: ReferenceConfig = ReferenceConfig()
    """Real images for comparison."""
    sampling: EvaluationSamplingConfig = EvaluationSamplingConfig()
    """Sampling options."""
    extractor: ExtractorConfig = Inception()
    """Feature extractor."""
    clip: ClipConfig | None = None
    """CLIP model for the CLIP metrics; disabled if not given. Set it to report CLIP score and R-precision of
    captioned images."""
    kid: KernelConfig = KernelConfig()
    """Subsets of the kernel inception distance."""
    inception_splits: int = Field(default=10, ge=1, le=1 << 20)
    """Number of splits of the Inception score; published scores use 10. Lower it for small sets."""
    neighbors: int = Field(default=5, ge=1, le=1 << 10)
    """Number of neighbors k of precision, recall, density and coverage. Needed to reproduce precision and
    recall with k = 3 (Kynkäänniemi et al., 2019)."""
    report_images: int = Field(default=8, ge=1, le=1 << 10)
    """Number of best, worst and random images in the report, each. Raise it for closer inspection."""

    @model_validator(mode="after")
    def _reference_fits_prompts(self) -> Self:
        if self.reference.images == "prompted" and not isinstance(self.prompts, Captions):
            raise ValueError("without captions, prompts have no images; set reference.images to all")
        return self


class SweepConfig(Config):
    """Configuration of a sweep."""

    evaluation: EvaluationConfig = EvaluationConfig()
    """Protocol common to all evaluations."""
    axes: dict[str, tuple[Any, ...]] = Field(
        default={
            "sampling.sampler.steps": (10, 25, 50, 100),
            "sampling.guidance.scale": (1.0, 2.0, 3.0, 5.0),
            SEED: (0, 1, 2),
        },
        min_length=1,
    )
    """Values of each dotted key of the protocol, scalars or groups of keys such as ``{kind: ancestral}``. All
    combinations are evaluated. Values of ``sampling.seed`` are repetitions; the report shows their range."""
    metrics: tuple[str, ...] = Field(default=("fid", "clip_score"), min_length=1)
    """Dotted names of the metrics in the table and the plots."""
    x_axis: str = "sampling.sampler.steps"
    """Dotted key of the plots' horizontal axis; its values must be numbers."""
