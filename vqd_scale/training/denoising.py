"""The task of VQ-Diffusion: undo noise on tokens under a caption, by the bound and the auxiliary loss."""

from collections.abc import Mapping
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field, NonNegativeFloat
from torch import Tensor, nn

from vqd_scale.core.rng import Purpose, uniforms
from vqd_scale.core.world import World
from vqd_scale.data.batch import TokenBatch
from vqd_scale.data.index import ShardSet
from vqd_scale.data.samples import TokenSamples
from vqd_scale.diffusion.objective import Objective, ObjectiveConfig
from vqd_scale.diffusion.schedule import Paper, Schedule
from vqd_scale.diffusion.times import Times, TimeSampler, Uniform
from vqd_scale.diffusion.transition import MaskAndReplace
from vqd_scale.inference.bundle import BundleConfig, Model, load_tokenizer, save_bundle
from vqd_scale.inference.tokenize import TokenSetMeta
from vqd_scale.nn.denoiser import Block, DenoiserConfig
from vqd_scale.nn.layers import start_from_codebook
from vqd_scale.text.clip import TextConfig, Tower
from vqd_scale.training.config import RunConfig
from vqd_scale.training.engine import placement
from vqd_scale.training.task import Forward, Losses

_TIME_BINS = 10


class TrainConfig(RunConfig):
    """Train a text-conditional denoiser on token shards."""

    tokenizer: Path
    """The tokenizer's bundle that made the token shards; it travels into the trained model's bundle."""
    denoiser: DenoiserConfig = DenoiserConfig()
    text: TextConfig = Tower()
    diffusion: Schedule = Paper()
    objective: ObjectiveConfig = ObjectiveConfig()
    times: Times = Uniform()
    codebook_start: NonNegativeFloat = 0.0
    """If not zero, token embeddings and head start from the tokenizer's codebook, with this deviation."""
    caption_dropout: float = Field(default=0.1, ge=0, lt=1)
    """Share of samples that see the null condition instead of their caption, for guidance."""


class DenoisingStep(nn.Module):
    """From tokens to losses in one forward; what the engine wraps.

    Args:
        model: Denoiser and text encoder.
        objective: The loss, called where the head's weight exists.
    """

    def __init__(self, model: Model, objective: Objective) -> None:
        super().__init__()
        self.model = model
        self.objective = objective

    def forward(
        self,
        tokens: Int[Tensor, "batch length"],
        noisy: Int[Tensor, "batch length"],
        t: Int[Tensor, " batch"],
        captions: Int[Tensor, "batch positions"],
        dropped: Bool[Tensor, " batch"],
        valid: Bool[Tensor, " batch"],
    ) -> tuple[Float[Tensor, " batch"], ...]:
        """Each sample's loss (differentiable), term of the bound and cross-entropy, and the accuracies."""
        text = self.model.text(captions, dropped)

        def consume(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
            output = self.objective(hidden, weight, bias, tokens, noisy, t)
            counted = (
                output.masked_correct,
                output.masked_count,
                output.visible_correct,
                output.visible_count,
            )
            accuracies = torch.stack([(value * valid).sum() for value in counted])
            return output.loss_per_image, output.vlb_per_image, output.cross_entropy_per_image, accuracies

        return self.model.denoiser(noisy, t, text, consume)


class DenoisingTask:
    """See `vqd_scale.training.task.Task`.

    Args:
        config: The run.
        world: This process's place among the ranks.

    Raises:
        UserError: The token shards were made by another tokenizer or for another caption vocabulary.
    """

    def __init__(self, config: TrainConfig, world: World) -> None:
        self.config = config
        self.world = world
        self.units = (Block,)
        meta = TokenSetMeta.of(ShardSet.open(config.data.path))
        self.bundle = BundleConfig(
            codes=meta.codes,
            grid=meta.grid,
            denoiser=config.denoiser,
            text=config.text,
            diffusion=config.diffusion,
        )
        torch.manual_seed(config.seed)
        where = placement(config.engine, world)
        model = Model(self.bundle, where)
        meta.check(config.tokenizer, model.text.tokenizer, config.data.path)
        if config.codebook_start:
            vectors = load_tokenizer(config.tokenizer, torch.device("cpu")).quantize.embedding
            start_from_codebook(model.denoiser.code_tables, vectors, config.codebook_start, where)
        self.text_length = model.text.tokenizer.context_length
        self.transition = MaskAndReplace(config.diffusion, meta.codes)
        self.module = DenoisingStep(model, Objective(self.transition, config.objective))
        self.times = TimeSampler(config.times, self.transition.steps, world.device)

    def samples(self) -> TokenSamples:
        """Tokens and caption ids."""
        rows, columns = self.bundle.grid
        return TokenSamples(rows * columns, self.bundle.codes, self.text_length)

    def losses(self, forward: Forward, batch: TokenBatch, images: int) -> Losses:
        """Draw each sample's timestep, noise and caption dropout by its slot, and denoise."""
        seed, device = self.config.seed, self.world.device
        slots, tokens, valid = (tensor.to(device) for tensor in (batch.slots, batch.tokens, batch.valid))
        t, probability = self.times.draw(uniforms(seed, Purpose.TIMESTEP, slots, 1)[:, 0])
        # float64: what is left of 24 bits after a rare replacement would reach only a few of the codes.
        noise = uniforms(seed, Purpose.CORRUPTION, slots, tokens.shape[1], dtype=torch.float64)
        noisy = self.transition.corrupt(tokens, t, noise)
        dropped = uniforms(seed, Purpose.CAPTION_DROPOUT, slots, 1)[:, 0] < self.config.caption_dropout
        loss, bound, cross_entropy, accuracies = forward(
            tokens, noisy, t, batch.text.to(device), dropped, valid
        )
        self.times.observe(t, bound * tokens.shape[1], valid.float())
        weight = valid.double()
        statistics = {
            "bound": _mean(bound / probability, weight),
            "cross_entropy": _mean(cross_entropy, weight),
            "accuracy_masked": accuracies[:2],
            "accuracy_visible": accuracies[2:],
        }
        for bin in range(_TIME_BINS):
            inside = weight * (t * _TIME_BINS // self.transition.steps == bin)
            statistics[f"cross_entropy_t{bin}"] = _mean(cross_entropy, inside)
        return Losses(loss / probability, statistics)

    def stepped(self, images: int) -> None:
        """Fold all ranks' losses into the distribution of timesteps."""
        self.times.synchronise(self.world.sum)

    def state(self) -> dict[str, Tensor]:
        """The distribution of timesteps."""
        return self.times.state_dict()

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take it back."""
        self.times.load_state_dict(dict(state))

    def export(self, parameters: Mapping[str, Tensor], folder: Path) -> None:
        """Write the bundle that `vqd_scale.inference.pipeline.TextToImage` loads."""
        prefix = "model."
        weights = {name.removeprefix(prefix): value for name, value in parameters.items()}
        save_bundle(folder, self.bundle, weights, self.config.tokenizer)


def _mean(values: Float[Tensor, " batch"], weight: Float[Tensor, " batch"]) -> Float[Tensor, " 2"]:
    """(sum, count) of values under weights 0 and 1."""
    return torch.stack([torch.where(weight > 0, values.detach().double(), 0.0).sum(), weight.sum()])
