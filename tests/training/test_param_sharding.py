"""Networks sharded during construction on real ranks: equal weights, never in memory at once."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn

from tests.background_programs import free_ports
from vqd_scale.core.world import World, join_world, leave_world
from vqd_scale.launchers.local import rank_environment
from vqd_scale.nn.config import Convolutional, DenoiserConfig, TextCondition
from vqd_scale.nn.denoiser import Block, Denoiser
from vqd_scale.nn.layers import init_from_codebook
from vqd_scale.nn.param_sharding import NO_SHARDING, ParamSharding, Part, sharded
from vqd_scale.training.checkpoint.init_from import load_initial_weights
from vqd_scale.training.config import AdamWConfig, EngineConfig, ZeroConfig
from vqd_scale.training.engine import Engine, build_param_sharding

RANKS = 2
CONFIG = DenoiserConfig(
    width=24,
    layers=1,
    heads=2,
    condition=TextCondition(width=10),
    feed_forward=Convolutional(),
    init_std=0.1,
)


class Step(nn.Module):
    """Module from tokens to per-sample losses, as the engine requires."""

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self.denoiser = denoiser

    def forward(self, tokens: Tensor, t: Tensor, text: Tensor) -> Tensor:
        return (
            self.denoiser(tokens, t, text.to(self.denoiser.norm.weight.dtype)).float().square().mean((1, 2))
        )


def build(sharding: ParamSharding, seed: int = 3, **changes: Any) -> Denoiser:
    torch.manual_seed(seed)
    config = DenoiserConfig.model_validate(CONFIG.model_dump() | changes)
    vectors = torch.randn(7, 4, generator=torch.Generator().manual_seed(1))
    with sharded(sharding):
        denoiser = Denoiser(config, 7, (3, 5), 9)
        init_from_codebook(denoiser.code_embeddings, vectors, 0.5)
    return denoiser


class Watched(ParamSharding):
    """Sharding that checks that at most one part is unsharded at a time."""

    def __init__(self, inner: ParamSharding) -> None:
        self.inner = inner
        self.cut: list[nn.Module] = []

    def shard(self, part: Part) -> Part:
        assert all(parameter.numel() == 0 for earlier in self.cut for parameter in earlier.parameters())
        assert all(parameter.numel() > 0 for parameter in part.parameters())
        self.cut.append(part)
        return self.inner.shard(part)

    def gather(self, weights: Any) -> Any:
        listed = list(weights)
        # A layer's, or the two tables of the codes.
        assert len(listed) <= 2
        return self.inner.gather(listed)


def check_weights(world: World, config: EngineConfig, dtype: torch.dtype, **changes: Any) -> None:
    sharding = Watched(build_param_sharding(config, world))
    torchs = nn.functional.linear
    cut, plain = build(sharding, **changes), build(NO_SHARDING, **changes)
    assert nn.functional.linear is torchs
    for (name, value), (_, expected) in zip(cut.named_parameters(), plain.named_parameters(), strict=True):
        assert value.numel() == 0, name
        piece: Tensor = value.ds_tensor  # pyright: ignore[reportAttributeAccessIssue]
        assert piece.numel() == -(-expected.numel() // RANKS)
    with sharding.inner.gather(cut.parameters()):
        for (name, value), (_, expected) in zip(
            cut.named_parameters(), plain.named_parameters(), strict=True
        ):
            assert value.dtype == dtype, name
            assert torch.equal(value, expected.to(dtype)), name


def losses(world: World, config: EngineConfig, denoiser: Denoiser, start: Path | None = None) -> Tensor:
    """Return all ranks' losses over a few steps."""
    units = (Block,)
    module = Step(denoiser)
    torchs, inside = nn.functional.linear, set[Any]()

    def look(*_: Any) -> None:
        inside.add(nn.functional.linear)

    module.register_forward_pre_hook(look)
    engine = Engine(module, config, AdamWConfig(lr=1e-2), batch=2 * RANKS, world=world, units=units)
    if start is not None:
        load_initial_weights(start, engine.partition, "denoiser.")
    generator = torch.Generator().manual_seed(world.rank)
    batch_losses: list[Tensor] = []
    for _ in range(3):
        tokens = torch.randint(0, 8, (2, 15), generator=generator)
        loss = engine(tokens, torch.tensor([1, 8]), torch.randn(2, 5, 10, generator=generator))
        batch_losses.append(world.concatenated(loss.detach()))
        engine.backward(loss.mean())
        engine.step(1e-2)
    # DeepSpeed's hooks, which would otherwise stay active for later tests.
    assert nn.functional.linear is torchs
    assert torchs not in inside
    return torch.cat(batch_losses)


def on_rank(rank: int, port: int, folder: Path) -> None:
    os.environ.update(rank_environment(rank, RANKS, port))
    torch.set_num_threads(1)
    world = join_world()
    exact = EngineConfig(precision="fp32", param_persistence_threshold=0)
    check_weights(world, exact, torch.float32, adaln_zero=True)
    check_weights(world, exact.model_copy(update={"precision": "bf16"}), torch.bfloat16)

    sharding = build_param_sharding(exact, world)
    expected = losses(world, exact, build(sharding))
    assert (expected[:4] - expected[-4:]).abs().min() > 1e-3
    stored = folder / f"{rank}.safetensors"
    save_file(build(NO_SHARDING).state_dict(), stored)
    checkpointed = build(sharding, seed=4, gradient_checkpointing=True)
    some_whole = exact.model_copy(update={"param_persistence_threshold": 200})
    assert torch.equal(losses(world, some_whole, checkpointed, start=stored), expected)
    # Last, because DeepSpeed creates the hpZ groups once per process.
    second = exact.model_copy(update={"zero": ZeroConfig(hpz_partition_size=RANKS)})
    assert torch.equal(losses(world, second, build(build_param_sharding(second, world))), expected)
    leave_world()


@pytest.mark.ranks
def test_sharded_construction_trains_as_full_network(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    spawn(on_rank, (port, tmp_path), nprocs=RANKS)


@pytest.mark.parametrize(("stage", "ranks"), [(3, 1), (2, 2), (1, 2)])
def test_without_zero_3_construction_is_not_sharded(stage: Any, ranks: int) -> None:
    config = EngineConfig.model_validate({"zero": {"stage": stage}})
    assert build_param_sharding(config, World(0, ranks, torch.device("cpu"))) is NO_SHARDING
