"""Configuration of the tokenization of a dataset; needs no torch."""

from pathlib import Path
from typing import Literal

from pydantic import Field, NonNegativeInt

from vqd_scale.core.atomic_io import Location
from vqd_scale.core.config import Config
from vqd_scale.core.safe_json import Count, Size
from vqd_scale.text.config import ALL_MERGES


class CaptionsConfig(Config):
    """Caption vocabulary; must match the text tower to be trained."""

    context_length: Size = 77
    """Length of a caption in ids; a longer caption is cut."""
    bpe_merges: NonNegativeInt = ALL_MERGES
    """Number of CLIP's byte-pair merges."""
    member: str = Field(default="txt", pattern=r"^(json\..+|[^.]+)$")
    """Member of the image shards with the captions: ``txt``, another extension such as ``caption``, or
    ``json.FIELD`` for text, or a list of texts, in a field of ``json``."""


class EncodingConfig(Config):
    """Encoding options of the tokenizer; stored in token shards, because they determine the codes."""

    precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of the convolutions; bf16 is faster on GPUs and changes a few codes."""
    sample_codes: int | None = Field(default=None, ge=0, lt=2**32)
    """Seed to sample codes from a Gumbel tokenizer's probabilities, as its published code does. ``null``:
    the most probable codes."""

    def __str__(self) -> str:
        """Return the short description stored in token shards."""
        codes = "best codes" if self.sample_codes is None else f"codes sampled with seed {self.sample_codes}"
        return f"{codes}, {self.precision}"


class ViewsConfig(Config):
    """Random crops of each image instead of its center crop; each crop is a sample."""

    count: Count
    """Number of crops per image; multiplies the length of an epoch."""
    crop: Literal["near_center", "random_resized"] = "near_center"
    """Crop: near the center, as in the released code, or of random area and aspect ratio."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Seed of the crops."""

    def __str__(self) -> str:
        """Return the short description stored in token shards."""
        return f"{self.count} {self.crop} crops by seed {self.seed}"


class TokenizeConfig(Config):
    """Tokenization job: input images, tokenizer and output tokens."""

    images: Location
    """Folder of image shards, local or in S3."""
    output: Location
    """Output folder for token shards, local or in S3; finished shards are skipped."""
    tokenizer: Path
    """Tokenizer bundle."""
    size: int = Field(default=256, ge=1, le=1 << 14)
    """Side of the square that images are cropped and resized to, in pixels."""
    augmented_views: ViewsConfig | None = None
    """Random crops to encode. ``null``: the center crop only."""
    captions: CaptionsConfig | None = CaptionsConfig()
    """Vocabulary of the caption ids; a sample without a caption is then invalid. ``null`` for datasets
    without captions."""
    encoding: EncodingConfig = EncodingConfig()
    """Encoding options of the tokenizer."""
    max_bad_fraction: float = Field(default=0.01, ge=0, le=1)
    """Maximum fraction of unusable samples before the job aborts."""
    batch_size: Size = 64
    """Images per batch and worker. Raise it on a GPU."""
