"""Common part of all tasks on token shards: data, conditioning and weight initialization."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from jaxtyping import Bool
from pydantic import Field, NonNegativeFloat
from torch import Tensor

from vqd_scale.core.errors import UserError
from vqd_scale.core.rng import Purpose, uniforms
from vqd_scale.core.world import World
from vqd_scale.data.loading.batch import TokenBatch
from vqd_scale.data.loading.sample_readers import TokenSamples
from vqd_scale.data.shards.shard_index import ShardSet
from vqd_scale.models.bundle import (
    ConditionalModel,
    load_tokenizer,
    tokenizer_fingerprint,
    tokenizer_folder,
    weights_file,
)
from vqd_scale.nn.denoiser import ClassCondition, TextCondition
from vqd_scale.nn.layers import start_from_codebook
from vqd_scale.nn.param_sharding import ParamSharding
from vqd_scale.preparation.tokenize_shards import TokenSetMeta
from vqd_scale.text.clip import TextConfig, Tower
from vqd_scale.training.checkpoint.init_from import StartConfig, start_from
from vqd_scale.training.config import RunConfig
from vqd_scale.training.partition import Partition

_PREFIX = "model."
"""Prefix of the model's parameters in a task's module; a bundle contains the model only."""


class TokenRunConfig(RunConfig):
    """Configuration of a run on token shards."""

    tokenizer: Path
    """Bundle of the tokenizer that produced the token shards; copied into the trained model's bundle."""
    text: TextConfig | None = Tower()
    """Caption encoder; ``null`` for a network without text condition."""
    init_from: StartConfig | None = None
    """Trained model that initializes the weights."""
    embedding_init_std: NonNegativeFloat = 0.0
    """If not zero, token embeddings and head are initialized from the tokenizer's codebook, scaled to this
    standard deviation."""
    condition_dropout: float = Field(default=0.1, ge=0, lt=1)
    """Fraction of samples trained with the null condition, for classifier-free guidance."""


class TokenSource:
    """Token shards of a run.

    Args:
        config: Run configuration.
        world: This process's rank and device.

    Attributes:
        meta: Metadata of the first dataset.

    Raises:
        UserError: The shards contain no tokens.
    """

    def __init__(self, config: TokenRunConfig, world: World) -> None:
        self.config = config
        self.world = world
        # Missing tars are detected when they are opened for reading.
        sets = [ShardSet.open(source.path, look=False) for source in config.data.mixed]
        self._metas = [(shards.folder, TokenSetMeta.of(shards)) for shards in sets]
        self.meta = self._metas[0][1]

    def samples(self, model: ConditionalModel) -> TokenSamples:
        """Return the kind of samples for a model: tokens with captions or classes.

        Raises:
            UserError: The shards were produced by another tokenizer or for another caption vocabulary, or
                mixed datasets differ in their grids.
        """
        config, condition = self.config, model.condition
        captions = model.text.tokenizer if isinstance(condition, TextCondition) else None
        for folder, meta in self._metas:
            meta.check(config.tokenizer, captions, folder)
            if meta.grid != self.meta.grid:
                raise UserError(
                    f"{folder}: holds grids of {meta.grid}, and {self._metas[0][0]} of {self.meta.grid}; "
                    "only sets with equal grids can be mixed."
                )
        rows, columns = self.meta.grid
        return TokenSamples(
            length=rows * columns,
            codes=self.meta.codes,
            text_length=captions.context_length if captions is not None else 0,
            classes=condition.classes if isinstance(condition, ClassCondition) else 0,
        )

    def start(self, code_tables: Sequence[Tensor], where: ParamSharding) -> None:
        """Initialize a network's code tables from the codebook if ``embedding_init_std`` is not zero.

        Raises:
            UserError: All codes are equal in some dimension, as in a tokenizer that never used its codebook.
        """
        deviation = self.config.embedding_init_std
        if deviation:
            vectors = load_tokenizer(self.config.tokenizer, torch.device("cpu")).code_vectors()
            if not bool((vectors.std(dim=0) > 0).all()):
                raise UserError(
                    f"embedding_init_std: the codes of {self.config.tokenizer} do not differ, so nothing can "
                    f"start from them; train that tokenizer until its codebook joins, or set this to 0."
                )
            start_from_codebook(code_tables, vectors, deviation, where)

    def init_weights(self, partition: Partition) -> None:
        """Load a trained model's weights if ``init_from`` is set.

        Raises:
            UserError: The weights cannot be read, belong to another model, or to another tokenizer's codes.
        """
        start = self.config.init_from
        if start is None:
            return
        if tokenizer_fingerprint(tokenizer_folder(start.bundle)) != self.meta.tokenizer:
            raise UserError(
                f"{start.bundle}: this model knows the codes of another tokenizer than the shards in "
                f"{self._metas[0][0]}; make the shards with the tokenizer in its bundle."
            )
        start_from(weights_file(start.bundle), partition, _PREFIX, start.init_missing)

    def condition_inputs(self, batch: TokenBatch) -> tuple[Tensor, Bool[Tensor, " batch"]]:
        """Return captions or classes, and a mask of the samples with condition dropout."""
        uniform = uniforms(self.config.seed, Purpose.CAPTION_DROPOUT, batch.slots, 1)[:, 0]
        condition = batch.text if batch.labels is None else batch.labels
        return condition, uniform < self.config.condition_dropout


def weights_of_model(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a task's parameters by their names in the model's bundle."""
    return {name.removeprefix(_PREFIX): value for name, value in parameters.items()}
