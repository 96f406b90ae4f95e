"""What all tasks on token shards share: their data, what a network is told of it, and its first weights."""

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
"""What a task's module calls its model, which is all that a bundle holds of it."""


class TokenRunConfig(RunConfig):
    """A run on token shards, whatever learns from them."""

    tokenizer: Path
    """The tokenizer's bundle that made the token shards; it travels into the trained model's bundle."""
    text: TextConfig | None = Tower()
    """The encoder of captions; ``null`` for a network whose condition is no text."""
    init_from: StartConfig | None = None
    """If given, a trained model whose weights this run starts from."""
    embedding_init_std: NonNegativeFloat = 0.0
    """If not zero, token embeddings and head start from the tokenizer's codebook, with this deviation."""
    condition_dropout: float = Field(default=0.1, ge=0, lt=1)
    """Share of samples that see the null condition instead of their caption or class, for guidance."""


class TokenSource:
    """The token shards of a run, as one model sees them.

    Args:
        config: The run.
        world: This process's place among the ranks.

    Attributes:
        meta: What the shards say of themselves, the first of several sets.

    Raises:
        UserError: The shards hold no tokens.
    """

    def __init__(self, config: TokenRunConfig, world: World) -> None:
        self.config = config
        self.world = world
        # That the tars are there is seen when they are opened to be read.
        sets = [ShardSet.open(source.path, look=False) for source in config.data.mixed]
        self._metas = [(shards.folder, TokenSetMeta.of(shards)) for shards in sets]
        self.meta = self._metas[0][1]

    def samples(self, model: ConditionalModel) -> TokenSamples:
        """What is read for a model: its codes, and what it is told.

        Raises:
            UserError: The shards were made by another tokenizer, for another caption vocabulary, or sets that
            are mixed differ in their grids.
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
        """Let a network's codes start from the codebook, if that is asked for.

        Raises:
            UserError: All codes have the same number somewhere, as those of a tokenizer that never used them.
        """
        deviation = self.config.embedding_init_std
        if deviation:
            vectors = load_tokenizer(self.config.tokenizer, torch.device("cpu")).code_vectors()
            if not bool((vectors.std(dim=0) > 0).all()):
                raise UserError(
                    f"codebook_start: the codes of {self.config.tokenizer} do not differ, so that nothing "
                    f"can start from them; train that tokenizer until its codebook joins, or set this to 0."
                )
            start_from_codebook(code_tables, vectors, deviation, where)

    def init_weights(self, partition: Partition) -> None:
        """Take over a trained model's weights, if that is asked for.

        Raises:
            UserError: They cannot be read, or are those of another model or for another tokenizer's codes.
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
        """Return captions or classes, and a mask of the samples whose condition is dropped."""
        slots = batch.slots.to(self.world.device, non_blocking=True)
        drawn = uniforms(self.config.seed, Purpose.CAPTION_DROPOUT, slots, 1)[:, 0]
        given = batch.text if batch.labels is None else batch.labels
        return given.to(self.world.device, non_blocking=True), drawn < self.config.condition_dropout


def weights_of_model(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A task's parameters by the names that its model's bundle has for them."""
    return {name.removeprefix(_PREFIX): value for name, value in parameters.items()}
