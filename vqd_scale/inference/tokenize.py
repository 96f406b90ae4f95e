"""Image shards to token shards: what the denoiser trains on."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import accumulate, islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, NonNegativeInt, PositiveInt

from vqd_scale.core.config import Config
from vqd_scale.core.errors import UserError
from vqd_scale.core.store import Location
from vqd_scale.data.decode import BadSample, decode_image, decode_text
from vqd_scale.data.index import Shard, ShardSet
from vqd_scale.data.quarantine import Quarantine
from vqd_scale.data.samples import IMAGE_EXTENSIONS
from vqd_scale.data.shards import KEY, Sample, ShardRecipe, read_shard, write_shard_set
from vqd_scale.data.transforms import fitted
from vqd_scale.inference.bundle import load_tokenizer, tokenizer_fingerprint
from vqd_scale.text.clip import CaptionTokenizer
from vqd_scale.tokenizers.base import Draws, to_signal
from vqd_scale.tokenizers.choice import Tokenizer

_UINT16_CODES = 1 << 16


class CaptionsConfig(Config):
    """The caption vocabulary; must be that of the text tower to be trained."""

    context_length: PositiveInt = 77
    merges: NonNegativeInt = CaptionTokenizer().merges


class EncodingConfig(Config):
    """How a tokenizer is used; it decides the codes, so that token shards say it."""

    precision: Literal["fp32", "bf16"] = "fp32"
    """Of the convolutions; bf16 is faster on GPUs, and a few codes differ."""
    sampled: int | None = Field(default=None, ge=0, lt=2**32)
    """A seed by which codes are drawn from a Gumbel tokenizer's probabilities, as its published code does;
    none: the best codes."""

    def __str__(self) -> str:
        """In a few words, as token shards say it."""
        codes = "best codes" if self.sampled is None else f"codes drawn with seed {self.sampled}"
        return f"{codes}, {self.precision}"


class TokenizeConfig(Config):
    """From which pictures to which tokens."""

    images: Location
    """Folder of image shards, here or in S3."""
    out: Location
    """Folder for the token shards, here or in S3; shards that are done are not done again."""
    tokenizer: Path
    """The tokenizer's bundle."""
    size: PositiveInt = 256
    """Pictures are fitted to a square of so many pixels."""
    captions: CaptionsConfig = CaptionsConfig()
    encoding: EncodingConfig = EncodingConfig()
    batch: PositiveInt = 64


@dataclass(frozen=True)
class TokenSetMeta:
    """What a set of token shards says of itself.

    Attributes:
        codes: K, the number of codes.
        grid: Rows and columns of tokens.
        tokenizer: Fingerprint of the tokenizer's weights.
        captions: Fingerprint of the caption vocabulary.
        source: Digests of the image shards' tars.
        encoding: How the tokenizer was used.
    """

    codes: int
    grid: tuple[int, int]
    tokenizer: str
    captions: str
    source: dict[str, str]
    encoding: str = str(EncodingConfig())

    @classmethod
    def of(cls, shards: ShardSet) -> "TokenSetMeta":
        """Read it from a set.

        Raises:
            UserError: The set does not hold tokens.
        """
        meta = shards.meta
        if meta.get("kind") != "tokens":
            raise UserError(f"{shards.folder}: these shards hold no tokens; tokenize_shards.py makes them.")
        rows, columns = meta["grid"]
        return cls(
            meta["codes"],
            (rows, columns),
            meta["tokenizer"],
            meta["captions"],
            meta["source"],
            meta.get("encoding", str(EncodingConfig())),
        )

    def check(self, tokenizer: Path, captions: CaptionTokenizer | None, folder: Location) -> None:
        """See that the tokens are this tokenizer's and the caption ids, if they are read, this vocabulary's.

        Raises:
            UserError: They are not.
        """
        if tokenizer_fingerprint(tokenizer) != self.tokenizer:
            raise UserError(
                f"{folder}: these tokens were made by another tokenizer than {tokenizer}; tokenize the "
                f"pictures again, or name the tokenizer they were made with."
            )
        if captions is not None and captions.fingerprint != self.captions:
            raise UserError(
                f"{folder}: the captions were tokenized otherwise than text.context_length="
                f"{captions.context_length} and text.merges={captions.merges}; make both alike."
            )


def tokenize_shards(config: TokenizeConfig, device: torch.device) -> ShardSet:
    """Write a token shard for every image shard, in order; resumable shard by shard.

    Raises:
        UserError: The pictures or the tokenizer are missing, sizes do not fit, the disk is full, or the
            folder holds tokens of other pictures, another tokenizer or another vocabulary.
    """
    source = ShardSet.open(config.images)
    tokenizer = load_tokenizer(config.tokenizer, device)
    if config.encoding.precision == "bf16":
        tokenizer.compute_in(torch.bfloat16)
    if config.size % tokenizer.factor:
        raise UserError(
            f"size: {config.size} is not a multiple of the tokenizer's factor {tokenizer.factor}."
        )
    captions = CaptionTokenizer(config.captions.context_length, config.captions.merges)
    side = config.size // tokenizer.factor
    meta = TokenSetMeta(
        codes=tokenizer.codes,
        grid=(side, side),
        tokenizer=tokenizer_fingerprint(config.tokenizer),
        captions=captions.fingerprint,
        source={shard.path.name: shard.sha256 for shard in source.shards},
        encoding=str(config.encoding),
    )
    quarantine = Quarantine(config.out / "quarantine.jsonl")
    encode = _ShardEncoder(config, tokenizer, captions, quarantine, device)
    first_slots = accumulate((shard.count for shard in source.shards), initial=0)
    recipes = [
        ShardRecipe(shard.path.name, shard.count, lambda shard=shard, slot=slot: encode(shard, slot))
        for shard, slot in zip(source.shards, first_slots, strict=False)
    ]
    return write_shard_set(config.out, {"kind": "tokens", **asdict(meta)}, recipes, "tokenize")


@dataclass(frozen=True)
class _Picture:
    slot: int
    key: str
    pixels: NDArray[np.uint8]
    caption: str
    rest: dict[str, bytes]


class _ShardEncoder:
    """All samples of an image shard as samples of a token shard; batches never cross a shard."""

    def __init__(
        self,
        config: TokenizeConfig,
        tokenizer: Tokenizer,
        captions: CaptionTokenizer,
        quarantine: Quarantine,
        device: torch.device,
    ) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.captions = captions
        self.quarantine = quarantine
        self.device = device

    def __call__(self, shard: Shard, first_slot: int) -> Iterator[Sample]:
        pictures = self._pictures(shard, first_slot)
        while batch := list(islice(pictures, self.config.batch)):
            tokens = self._encode(batch)
            text = self.captions([picture.caption for picture in batch])
            for picture, codes, ids in zip(batch, tokens, text, strict=True):
                yield {
                    KEY: picture.key,
                    "tokens.npy": codes,
                    "text.npy": ids.astype(np.int32),
                    "txt": picture.caption,
                    **picture.rest,
                }

    def _pictures(self, shard: Shard, first_slot: int) -> Iterator[_Picture]:
        for slot, sample in enumerate(read_shard(shard), first_slot):
            try:
                yield self._picture(sample, slot)
            except BadSample as error:
                self.quarantine.add(shard.path.name, sample[KEY], str(error))

    def _picture(self, sample: dict[str, Any], slot: int) -> _Picture:
        extension = next((name for name in IMAGE_EXTENSIONS if name in sample), None)
        if extension is None or "txt" not in sample:
            raise BadSample("has no picture" if extension is None else "has no 'txt'")
        pixels = fitted(decode_image(sample[extension]), self.config.size)
        rest = {name: sample[name] for name in ("json", "cls") if name in sample}
        return _Picture(slot, sample[KEY], pixels, decode_text(sample["txt"]), rest)

    @torch.no_grad()
    def _encode(self, pictures: list[_Picture]) -> NDArray[np.unsignedinteger[Any]]:
        # Always a whole batch, the last one padded: a picture's codes do not depend on its neighbours then.
        padded = pictures + [pictures[-1]] * (self.config.batch - len(pictures))
        pixels = np.stack([picture.pixels for picture in padded])
        signal = to_signal(torch.from_numpy(pixels).permute(0, 3, 1, 2).to(self.device))
        slots = torch.tensor([picture.slot for picture in padded], device=self.device)
        seed = self.config.encoding.sampled
        draws = None if seed is None else Draws(seed, slots)
        codes = self.tokenizer.encode(signal, draws).flatten(1)[: len(pictures)].cpu().numpy()
        return codes.astype(np.uint16 if self.tokenizer.codes <= _UINT16_CODES else np.uint32)
