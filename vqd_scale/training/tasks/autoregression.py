"""Training task of VQ-AR: next-token prediction, conditioned on captions or classes."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from vqd_scale.core.world import World
from vqd_scale.data.loading.batch import TokenBatch
from vqd_scale.models.bundle import AutoregressiveModel
from vqd_scale.models.config import AutoregressiveBundleConfig
from vqd_scale.nn.autoregressive import Autoregressive
from vqd_scale.nn.flops import forward_flops
from vqd_scale.training.tasks.base import Forward, Losses, mean_of
from vqd_scale.training.tasks.config import AutoregressionConfig
from vqd_scale.training.tasks.token_task import TokenTask

_CHUNK_ELEMENTS = 2**24
"""Maximum number of logits in memory at once."""


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
        condition_ids: Tensor,
        dropped: Bool[Tensor, " batch"],
        valid: Bool[Tensor, " batch"],
    ) -> tuple[Float[Tensor, " batch"], Float[Tensor, " 2"]]:
        """Return each sample's cross-entropy in nats per token (differentiable), and the accuracy pair."""

        def head_function(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
            loss, correct = token_losses(hidden.flatten(0, 1), weight, bias, tokens.flatten())
            correct_count = (correct.view_as(tokens).sum(-1) * valid).sum()
            accuracy = torch.stack([correct_count, valid.sum() * tokens.shape[1]])
            return loss.view_as(tokens).mean(-1), accuracy

        return self.model.network(tokens, self.model.condition_inputs(condition_ids, dropped), head_function)


class AutoregressionTask(TokenTask):
    """Training task of an autoregressive transformer.

    Args:
        config: Run configuration.
        world: This process's rank and device.

    Raises:
        UserError: See `TokenTask`.
    """

    def __init__(self, config: AutoregressionConfig, world: World) -> None:
        super().__init__(config, world)
        self.config = config
        self.bundle = bundle = AutoregressiveBundleConfig(
            codebook_size=self.meta.codes, grid=self.meta.grid, network=config.network, text=config.text
        )
        self.module = AutoregressionStep(self.use(lambda: AutoregressiveModel(bundle)))

    @property
    def forward_flops(self) -> int:
        """FLOPs of the transformer's forward pass, without the text encoder."""
        config, meta, samples = self.config, self.meta, self.samples()
        return forward_flops(
            lambda: Autoregressive(config.network, meta.codes, meta.grid),
            samples.length,
            config.network.condition,
            samples.text_length,
            timed=False,
        )

    def losses(self, forward: Forward, batch: TokenBatch, images: int) -> Losses:
        """Compute the cross-entropy of all tokens, with condition dropout keyed by each sample's slot."""
        condition, dropped = self.condition_inputs(batch)
        loss, accuracy = forward(batch.tokens, condition, dropped, batch.valid)
        return Losses(loss, {"cross_entropy": mean_of(loss, batch.valid.double()), "accuracy": accuracy})

    def validate(self, forward: Forward, batch: TokenBatch) -> dict[str, Tensor]:
        """Compute the exact negative log-likelihood in nats per token, and the accuracy."""
        condition, _ = self.condition_inputs(batch)
        loss, accuracy = forward(batch.tokens, condition, torch.zeros_like(batch.valid), batch.valid)
        return {"cross_entropy": mean_of(loss, batch.valid.double()), "accuracy": accuracy}


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
