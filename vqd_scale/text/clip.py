"""Caption features: CLIP's byte-pair tokenizer and text tower, by open_clip.

As VQ-Diffusion's published weights require: captions are lower-cased and padded with id 0; the last token of
a truncated caption is the end token; features are the outputs of all positions after the final LayerNorm,
without the projection, normalized to unit length. There is no padding mask: all positions condition.
"""

import functools
import gzip
import hashlib
import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from vqd_scale.core.arrays import NDArray
from vqd_scale.core.errors import UserError
from vqd_scale.core.tensors import check_finite, check_names
from vqd_scale.text.config import ALL_MERGES, Pretrained, TextConfig, Tower
from vqd_scale.text.open_clip import Shape, open_clip_module, published_shape, published_weights

if TYPE_CHECKING:
    from open_clip.tokenizer import SimpleTokenizer
    from open_clip.transformer import TextTransformer

_BYTES = 256


@dataclass(frozen=True)
class CaptionTokenizer:
    """Tokenizer from captions to token ids; small and picklable for data workers.

    Attributes:
        context_length: Positions per caption.
        merges: Number of CLIP's byte-pair merges in use.
    """

    context_length: int = 77
    merges: int = ALL_MERGES

    @property
    def vocabulary(self) -> int:
        """Number of token ids: bytes, word-final bytes, merges, start and end."""
        return 2 * _BYTES + self.merges + 2

    @property
    def fingerprint(self) -> str:
        """Hex SHA-256 of the settings that determine the ids; stored in token shards."""
        settings = json.dumps({**asdict(self), "bpe": "open_clip"}, sort_keys=True)
        return hashlib.sha256(settings.encode()).hexdigest()

    def __call__(self, captions: Sequence[str]) -> NDArray[np.int64]:
        """Tokenize captions.

        Returns:
            int64 [captions, context_length]: start, tokens, end, zero padding.
        """
        tokenizer = _byte_pair_tokenizer(self.merges)
        # On the CPU also while a module is planned on the meta device.
        with torch.device("cpu"):
            return tokenizer(list(captions), context_length=self.context_length).numpy()


@functools.lru_cache(maxsize=2)
def _byte_pair_tokenizer(merges: int) -> "SimpleTokenizer":
    tokenizer = open_clip_module("tokenizer")
    lines = gzip.decompress(Path(tokenizer.default_bpe()).read_bytes()).decode("utf-8").split("\n")
    # The file's first line is a header; a prefix of the merge list is itself a valid byte-pair encoding.
    merge_lines = "\n".join(lines[: merges + 1])
    with tempfile.NamedTemporaryFile(suffix=".txt.gz") as file:
        file.write(gzip.compress(merge_lines.encode("utf-8")))
        file.flush()
        return tokenizer.SimpleTokenizer(bpe_path=file.name)


class TextEncoder(nn.Module):
    """Text encoder: caption ids -> features of every position; a null condition for "no caption".

    >>> import torch
    >>> from vqd_scale import TextEncoder
    >>> from vqd_scale.text.config import Tower
    >>> encoder = TextEncoder(Tower(context_length=8, width=32, heads=2, layers=1, bpe_merges=300))
    >>> ids = torch.from_numpy(encoder.tokenizer(["a red circle", ""]))
    >>> encoder(ids, torch.tensor([False, False])).shape
    torch.Size([2, 8, 32])

    A trained tower is a regular submodule. A frozen tower is not registered as a submodule, because frozen
    weights must not be sharded, averaged or saved; the tower follows the device of its input.

    An empty caption counts as "no caption".

    Args:
        config: Tower to train, or open_clip model to load.

    Raises:
        UserError: The open_clip model or its weights are unavailable or do not fit.
    """

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        shape = tower_shape(config)
        if isinstance(config, Tower):
            self.tokenizer = CaptionTokenizer(config.context_length, config.bpe_merges)
            self.tower = build_tower(shape)
            self.normalize = config.normalize
        else:
            self.tokenizer = CaptionTokenizer(shape.context_length)
            tower = _published_tower(config, shape, self.tokenizer)
            if config.train:
                self.tower = tower
            else:
                self._frozen = (tower,)
            self.normalize = True
        self.width = shape.width
        self.null: nn.Parameter | None = None
        if config.null_condition == "learned":
            self.null = nn.Parameter(torch.randn(self.tokenizer.context_length, self.width))
        empty = torch.from_numpy(self.tokenizer([""]))[0]
        self.register_buffer("empty_caption", empty, persistent=False)
        self.empty_caption: Tensor

    def forward(
        self, captions: Int[Tensor, "batch positions"], dropped: Bool[Tensor, " batch"]
    ) -> Float[Tensor, "batch positions width"]:
        """Encode captions; dropped and empty captions are replaced by the null condition.

        Args:
            captions: Token ids from `CaptionTokenizer`.
            dropped: True for samples without a caption (condition dropout).
        """
        mask = (dropped | (captions == self.empty_caption).all(dim=1))[:, None]
        features = self._encode(torch.where(mask, self.empty_caption, captions))
        if self.normalize:
            features = functional.normalize(features, dim=-1)
        if self.null is None:
            return features
        return torch.where(mask[..., None], self.null, features.to(self.null.dtype))

    @property
    def network(self) -> "TextTransformer":
        """Text tower, trained or frozen."""
        return self.tower if hasattr(self, "tower") else self._frozen[0]

    def _encode(self, captions: Int[Tensor, "batch positions"]) -> Float[Tensor, "batch positions width"]:
        if hasattr(self, "tower"):
            return self.tower(captions)
        with torch.no_grad():
            return self.network.to(captions.device)(captions)


def tower_shape(config: TextConfig) -> Shape:
    """Return the shape of a text tower.

    Raises:
        UserError: See `published_shape`.
    """
    if not isinstance(config, Tower):
        return published_shape(config.model)
    vocabulary = CaptionTokenizer(config.context_length, config.bpe_merges).vocabulary
    return Shape(
        config.context_length, vocabulary, config.width, config.heads, config.layers, quick_gelu=True
    )


def build_tower(shape: Shape) -> "TextTransformer":
    """Build a text tower with random weights."""
    transformer = open_clip_module("transformer")
    return transformer.TextTransformer(
        context_length=shape.context_length,
        vocab_size=shape.vocabulary,
        width=shape.width,
        heads=shape.heads,
        layers=shape.layers,
        pool_type="none",
        proj_type="none",
        act_layer=transformer.QuickGELU if shape.quick_gelu else nn.GELU,
    )


def _published_tower(config: Pretrained, shape: Shape, tokenizer: CaptionTokenizer) -> "TextTransformer":
    if shape.vocabulary != tokenizer.vocabulary:
        raise UserError(
            f"text.model: '{config.model}' has {shape.vocabulary} token ids, not CLIP's "
            f"{tokenizer.vocabulary}; take another model."
        )
    tower = build_tower(shape)
    if config.pretrained is None:
        return tower
    weights = published_weights(config.model, config.pretrained)
    expected = tower.state_dict()
    tower_weights = {name: value for name, value in weights.items() if name in expected}
    check_names(tower_weights, expected, f"the text tower of '{config.model}'")
    misshapen = [name for name, value in tower_weights.items() if value.shape != expected[name].shape]
    if misshapen:
        raise UserError(
            f"text.pretrained: '{config.pretrained}' contains a text tower of another size than "
            f"'{config.model}' has: {', '.join(misshapen)}."
        )
    check_finite(tower_weights, f"text.pretrained: '{config.pretrained}'")
    tower.load_state_dict(tower_weights)
    return tower
