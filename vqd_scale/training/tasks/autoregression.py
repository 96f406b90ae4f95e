"""Training task of VQ-AR: next-token prediction, conditioned on captions or classes."""

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
"""Maximum number of logits in memory at once."""


class AutoregressionConfig(TokenRunConfig):
    """Configuration for training an autoregressive transformer on token shards."""

    kind: Literal["autoregression"] = "autoregression"
    network: AutoregressiveConfig = AutoregressiveConfig()


class AutoregressionStep(nn.Module):
    """Module wrapped by the engine: tokens to losses in one forward.

    Args:
        model: Network with its conditioning.
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
        """Return each sample's cross-entropy in nats per token (differentiable), and the accuracy pair."""

        def consume(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
            loss, correct = token_losses(hidden.flatten(0, 1), weight, bias, tokens.flatten())
            right = (correct.view_as(tokens).sum(-1) * valid).sum()
            counted = torch.stack([right, valid.sum() * tokens.shape[1]])
            return loss.view_as(tokens).mean(-1), counted

        return self.model.network(tokens, self.model.condition_inputs(given, dropped), consume)


class AutoregressionTask:
    """Implementation of `vqd_scale.training.tasks.base.Task` for an autoregressive transformer.

    Args:
        config: Run configuration.
        world: This process's rank and device.

    Raises:
        UserError: The token shards were produced by another tokenizer or for another caption vocabulary.
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
        """FLOPs of the transformer's forward pass, without the text encoder."""
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
        """Load a trained model's weights if ``init_from`` is set."""
        self.source.init_weights(partition)

    def samples(self) -> TokenSamples:
        """Return tokens with captions or classes as the kind of samples."""
        return self.read

    def losses(self, forward: Forward, batch: TokenBatch, images: int) -> Losses:
        """Compute the cross-entropy of all tokens, with condition dropout keyed by each sample's slot."""
        given, dropped = self.source.condition_inputs(batch)
        loss, accuracy = forward(batch.tokens, given, dropped, batch.valid)
        return Losses(loss, {"cross_entropy": mean_of(loss, batch.valid.double()), "accuracy": accuracy})

    def validate(self, forward: Forward, batch: TokenBatch) -> dict[str, Tensor]:
        """Compute the exact negative log-likelihood in nats per token, and the accuracy."""
        given, _ = self.source.condition_inputs(batch)
        loss, accuracy = forward(batch.tokens, given, torch.zeros_like(batch.valid), batch.valid)
        return {"cross_entropy": mean_of(loss, batch.valid.double()), "accuracy": accuracy}

    def on_step_end(self, images: int) -> None:
        """Do nothing: the task has no state."""

    def state(self) -> dict[str, Tensor]:
        """Return an empty state."""
        return {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Do nothing: the task has no state."""

    def export(self, parameters: Mapping[str, Tensor], folder: Path) -> None:
        """Write a bundle for `AutoregressiveTextToImage`."""
        save_bundle(folder, self.bundle, weights_of_model(parameters), self.config.tokenizer)


def token_losses(
    hidden: Float[Tensor, "tokens width"],
    weight: Float[Tensor, "codes width"],
    bias: Float[Tensor, " codes"],
    targets: Int[Tensor, " tokens"],
) -> tuple[Float[Tensor, " tokens"], Bool[Tensor, " tokens"]]:
    """Compute the cross-entropy of ``logits = hidden @ weight.T + bias``, and a mask of correct predictions.

    Logits are computed for one chunk of tokens at a time and recomputed in the backward pass.

    Args:
        hidden: Hidden states of any float dtype; the loss is computed in float32.
        weight: Weight of the head.
        bias: Bias of the head.
        targets: Target codes, int64, 0 to K-1.
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
