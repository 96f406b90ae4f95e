"""Base of the tasks on token shards: data, conditioning, initial weights and export."""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from jaxtyping import Bool
from torch import Tensor

from vqd_scale.core.errors import UserError
from vqd_scale.core.outputs import EXPORT
from vqd_scale.core.rng import Purpose
from vqd_scale.core.tensors import without_prefix
from vqd_scale.core.world import World
from vqd_scale.data.loading.batch import TokenBatch
from vqd_scale.data.loading.sample_readers import TokenSamples
from vqd_scale.data.shards.shard_index import ShardSet
from vqd_scale.diffusion.noise import uniforms
from vqd_scale.models.bundle import (
    AnyModel,
    AutoregressiveModel,
    Model,
    load_tokenizer,
    save_bundle,
    tokenizer_fingerprint,
    tokenizer_folder,
    weights_file,
)
from vqd_scale.models.config import AutoregressiveBundleConfig, BundleConfig
from vqd_scale.nn.config import ClassCondition, TextCondition
from vqd_scale.nn.layers import init_from_codebook
from vqd_scale.nn.param_sharding import sharded
from vqd_scale.preparation.tokenize_shards import TokenSetMeta
from vqd_scale.training.checkpoint.init_from import load_initial_weights
from vqd_scale.training.engine import build_param_sharding
from vqd_scale.training.partition import Partition
from vqd_scale.training.tasks.base import Task
from vqd_scale.training.tasks.config import TokenRunConfig

_PREFIX = "model."
"""Prefix of the model's parameters in a task's module; a bundle contains the model only."""


class TokenTask(Task[TokenBatch]):
    """Base of the tasks on token shards; a subclass builds its model by `use`.

    Args:
        config: Run configuration.
        world: This process's rank and device.

    Attributes:
        meta: Metadata of the first dataset.
        bundle: Configuration of the model's bundle.
        model: Network with its conditioning.

    Raises:
        UserError: The shards contain no tokens.
    """

    bundle: BundleConfig | AutoregressiveBundleConfig
    model: Model | AutoregressiveModel

    def __init__(self, config: TokenRunConfig, world: World) -> None:
        self.config = config
        self.world = world
        # Missing tars are detected when they are opened for reading.
        datasets = [ShardSet.open(source.path, look=False) for source in config.data.mixed]
        self._metas = [(shards.folder, TokenSetMeta.of(shards)) for shards in datasets]
        self.meta = self._metas[0][1]

    def use(self, build: Callable[[], AnyModel]) -> AnyModel:
        """Build the trained model, sharded if the engine shards it; check that the shards fit it.

        Raises:
            UserError: The shards were produced by another tokenizer or for another caption vocabulary, or
                mixed datasets differ in their grids; or see ``embedding_init_std``.
        """
        torch.manual_seed(self.config.seed)
        with sharded(build_param_sharding(self.config.engine, self.world)):
            model = build()
            self._samples = self._sample_kind(model)
            self._init_code_embeddings(model)
        self.model = model
        self.units = model.network.units
        return model

    def samples(self) -> TokenSamples:
        """Return tokens with captions or classes as the kind of samples."""
        return self._samples

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
                f"{start.bundle}: this model was trained on the codes of another tokenizer than that of the "
                f"shards in {self._metas[0][0]}; make the shards with the tokenizer in its bundle."
            )
        load_initial_weights(weights_file(start.bundle), partition, _PREFIX, start.init_missing)

    def condition_inputs(self, batch: TokenBatch) -> tuple[Tensor, Bool[Tensor, " batch"]]:
        """Return captions or classes, and a mask of the samples with condition dropout."""
        uniform = uniforms(self.config.seed, Purpose.CAPTION_DROPOUT, batch.slots, 1)[:, 0]
        condition = batch.text if batch.labels is None else batch.labels
        return condition, uniform < self.config.condition_dropout

    def export(self, parameters: Mapping[str, Tensor], folder: Path, purpose: str = EXPORT) -> None:
        """Write a bundle for the pipelines of `vqd_scale.models`."""
        weights = without_prefix(parameters, _PREFIX)
        save_bundle(folder, self.bundle, weights, self.config.tokenizer, purpose)

    def _sample_kind(self, model: Model | AutoregressiveModel) -> TokenSamples:
        condition = model.condition
        captions = model.text.tokenizer if isinstance(condition, TextCondition) else None
        for folder, meta in self._metas:
            meta.check(self.config.tokenizer, captions, folder)
            if meta.grid != self.meta.grid:
                raise UserError(
                    f"{folder}: contains grids of {meta.grid}, and {self._metas[0][0]} of {self.meta.grid}; "
                    "only datasets with equal grids can be mixed."
                )
        rows, columns = self.meta.grid
        return TokenSamples(
            length=rows * columns,
            codes=self.meta.codes,
            text_length=captions.context_length if captions is not None else 0,
            classes=condition.classes if isinstance(condition, ClassCondition) else 0,
        )

    def _init_code_embeddings(self, model: Model | AutoregressiveModel) -> None:
        deviation = self.config.embedding_init_std
        if not deviation:
            return
        vectors = load_tokenizer(self.config.tokenizer, torch.device("cpu")).code_vectors()
        if not bool((vectors.std(dim=0) > 0).all()):
            raise UserError(
                f"embedding_init_std: all codes of {self.config.tokenizer} are equal in some dimension, so "
                "embeddings cannot be initialized from them; train that tokenizer until it uses its "
                "codebook, or set this to 0."
            )
        init_from_codebook(model.network.code_embeddings, vectors, deviation)
