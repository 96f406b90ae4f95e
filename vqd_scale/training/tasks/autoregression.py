"""The task of VQ-AR: say each token from those before it, under a caption."""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from vqd_scale.core.world import World
from vqd_scale.data.loading.batch import TokenBatch
from vqd_scale.data.loading.sample_readers import TokenSamples
from vqd_scale.models.bundle import AutoregressiveBundleConfig, AutoregressiveModel, save_bundle
from vqd_scale.nn.autoregressive import Autoregressive, AutoregressiveConfig
from vqd_scale.nn.flops import forward_flops
from vqd_scale.training.engine import placement
from vqd_scale.training.partition import Partition
from vqd_scale.training.tasks.base import Forward, Losses, mean_of
from vqd_scale.training.tasks.token_task import TokenRunConfig, TokenSource, weights_of_model

_CHUNK_ELEMENTS = 2**24
"""Logits that exist at once."""


class AutoregressionConfig(TokenRunConfig):
    """Train an autoregressive transformer on token shards."""

    kind: Literal["autoregression"] = "autoregression"
    network: AutoregressiveConfig = AutoregressiveConfig()


class AutoregressionStep(nn.Module):
    """From tokens to losses in one forward; what the engine wraps.

    Args:
        model: The network and what it is told.
    """

    def __init__(self, model: AutoregressiveModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        tokens: Int[Tensor, "batch length"],
        given: Tensor,
        dropped: Bool[Tensor, " batch"],
        valid: Bool[Tensor, " batch"],
    ) -> tuple[Float[Tensor, " batch"], Float[Tensor, " 2"]]:
        """Each sample's cross-entropy, nats per token (differentiable), and the accuracy as (sum, count)."""

        def consume(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
            loss, correct = token_losses(hidden.flatten(0, 1), weight, bias, tokens.flatten())
            right = (correct.view_as(tokens).sum(-1) * valid).sum()
            counted = torch.stack([right, valid.sum() * tokens.shape[1]])
            return loss.view_as(tokens).mean(-1), counted

        return self.model.network(tokens, self.model.condition_inputs(given, dropped), consume)


class AutoregressionTask:
    """See `vqd_scale.training.tasks.base.Task`.

    Args:
        config: The run.
        world: This process's place among the ranks.

    Raises:
        UserError: The token shards were made by another tokenizer or for another caption vocabulary.
    """

    def __init__(self, config: AutoregressionConfig, world: World) -> None:
        self.config = config
        self.world = world
        self.source = TokenSource(config, world)
        meta = self.source.meta
        self.bundle = AutoregressiveBundleConfig(
            codebook_size=meta.codes, grid=meta.grid, network=config.network, text=config.text
        )
        torch.manual_seed(config.seed)
        where = placement(config.engine, world)
        model = AutoregressiveModel(self.bundle, where)
        self.read = self.source.samples(model)
        self.source.start(model.network.code_tables, where)
        self.units = model.network.units
        self.module = AutoregressionStep(model)

    @property
    def forward_flops(self) -> int:
        """Of the transformer alone, whatever its text comes from."""
        bundle = self.bundle
        rows, columns = bundle.grid
        return forward_flops(
            lambda: Autoregressive(bundle.network, bundle.codebook_size, bundle.grid),
            rows * columns,
            bundle.network.condition,
            self.read.text_length,
            timed=False,
        )

    def init_weights(self, partition: Partition) -> None:
        """Take over a trained model's weights, if that is asked for."""
        self.source.init_weights(partition)

    def samples(self) -> TokenSamples:
        """Tokens, and what the network is told of them."""
        return self.read

    def losses(self, forward: Forward, batch: TokenBatch, images: int) -> Losses:
        """Draw each sample's caption dropout by its slot, and predict all its tokens."""
        tokens, valid = (
            tensor.to(self.world.device, non_blocking=True) for tensor in (batch.tokens, batch.valid)
        )
        given, dropped = self.source.condition_inputs(batch)
        loss, accuracy = forward(tokens, given, dropped, valid)
        return Losses(loss, {"cross_entropy": mean_of(loss, valid.double()), "accuracy": accuracy})

    def validate(self, forward: Forward, batch: TokenBatch) -> dict[str, Tensor]:
        """Nats per token; the model's own likelihood, no bound."""
        tokens, valid = (
            tensor.to(self.world.device, non_blocking=True) for tensor in (batch.tokens, batch.valid)
        )
        given, _ = self.source.condition_inputs(batch)
        loss, accuracy = forward(tokens, given, torch.zeros_like(valid), valid)
        return {"cross_entropy": mean_of(loss, valid.double()), "accuracy": accuracy}

    def on_step_end(self, images: int) -> None:
        """Nothing follows from a step but the weights."""

    def state(self) -> dict[str, Tensor]:
        """Nothing."""
        return {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Nothing to take back."""

    def export(self, parameters: Mapping[str, Tensor], folder: Path) -> None:
        """Write the bundle that `AutoregressiveTextToImage` loads."""
        save_bundle(folder, self.bundle, weights_of_model(parameters), self.config.tokenizer)


def token_losses(
    hidden: Float[Tensor, "tokens width"],
    weight: Float[Tensor, "codes width"],
    bias: Float[Tensor, " codes"],
    targets: Int[Tensor, " tokens"],
) -> tuple[Float[Tensor, " tokens"], Bool[Tensor, " tokens"]]:
    """Cross-entropy of ``logits = hidden @ weight.T + bias``, and whether a target is the likeliest code.

    Logits exist for a chunk of tokens at a time, and are computed again in backward.

    Args:
        hidden: Any float dtype; what follows the logits runs in float32.
        weight: The head's weight.
        bias: The head's bias.
        targets: int64, 0 to K-1.
    """
    size = max(1, _CHUNK_ELEMENTS // len(weight))
    parts = [
        checkpoint(_token_losses, *rows, weight, bias, use_reentrant=False, preserve_rng_state=False)
        for rows in zip(hidden.split(size), targets.split(size), strict=True)
    ]
    losses, correct = zip(*parts, strict=True)
    return torch.cat(losses), torch.cat(correct)


def _token_losses(hidden: Tensor, targets: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    logits = functional.linear(hidden, weight, bias).float()
    return functional.cross_entropy(logits, targets, reduction="none"), logits.argmax(-1) == targets
