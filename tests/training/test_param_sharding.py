"""Networks that real ranks cut while they are built: the same weights, and never the whole of them."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn

from tests.daemons import free_ports
from vqd_scale.core.world import World, join_world, leave_world
from vqd_scale.launchers.local import rank_environment
from vqd_scale.nn.denoiser import Block, Denoiser, DenoiserConfig, TextCondition
from vqd_scale.nn.layers import Convolutional, start_from_codebook
from vqd_scale.nn.param_sharding import HERE, ParamSharding, Part
from vqd_scale.training.checkpoint.init_from import start_from
from vqd_scale.training.engine import Engine, EngineConfig, ZeroConfig, placement
from vqd_scale.training.optim import OptimConfig

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
    """From tokens to each sample's loss, as the engine wants it."""

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self.denoiser = denoiser

    def forward(self, tokens: Tensor, t: Tensor, text: Tensor) -> Tensor:
        return (
            self.denoiser(tokens, t, text.to(self.denoiser.norm.weight.dtype)).float().square().mean((1, 2))
        )


def build(where: ParamSharding, seed: int = 3, **changes: Any) -> Denoiser:
    torch.manual_seed(seed)
    denoiser = Denoiser(CONFIG.model_copy(update=changes), 7, (3, 5), 9, where)
    vectors = torch.randn(7, 4, generator=torch.Generator().manual_seed(1))
    start_from_codebook(denoiser.code_tables, vectors, 0.5, where)
    return denoiser


class Watched(ParamSharding):
    """Another placement, of which it is seen how much is whole at a time."""

    def __init__(self, inner: ParamSharding) -> None:
        self.inner = inner
        self.cut: list[nn.Module] = []

    def placed(self, part: Part) -> Part:
        assert all(parameter.numel() == 0 for earlier in self.cut for parameter in earlier.parameters())
        assert all(parameter.numel() > 0 for parameter in part.parameters())
        self.cut.append(part)
        return self.inner.placed(part)

    def whole(self, weights: Any) -> Any:
        listed = list(weights)
        # A layer's, or the two tables of the codes.
        assert len(listed) <= 2
        return self.inner.whole(listed)


def check_weights(world: World, config: EngineConfig, dtype: torch.dtype, **changes: Any) -> None:
    where = Watched(placement(config, world))
    torchs = nn.functional.linear
    cut, plain = build(where, **changes), build(HERE, **changes)
    assert nn.functional.linear is torchs
    for (name, ours), (_, theirs) in zip(cut.named_parameters(), plain.named_parameters(), strict=True):
        assert ours.numel() == 0, name
        piece: Tensor = ours.ds_tensor  # pyright: ignore[reportAttributeAccessIssue]
        assert piece.numel() == -(-theirs.numel() // RANKS)
    with where.inner.whole(cut.parameters()):
        for (name, ours), (_, theirs) in zip(cut.named_parameters(), plain.named_parameters(), strict=True):
            assert ours.dtype == dtype, name
            assert torch.equal(ours, theirs.to(dtype)), name


def losses(world: World, config: EngineConfig, denoiser: Denoiser, start: Path | None = None) -> Tensor:
    """All ranks' losses over a few steps."""
    units = (Block,)
    module = Step(denoiser)
    torchs, inside = nn.functional.linear, set[Any]()

    def look(*_: Any) -> None:
        inside.add(nn.functional.linear)

    module.register_forward_pre_hook(look)
    engine = Engine(module, config, OptimConfig(lr=1e-2), batch=2 * RANKS, world=world, units=units)
    if start is not None:
        start_from(start, engine.partition, "denoiser.")
    generator = torch.Generator().manual_seed(world.rank)
    found: list[Tensor] = []
    for _ in range(3):
        tokens = torch.randint(0, 8, (2, 15), generator=generator)
        loss = engine(tokens, torch.tensor([1, 8]), torch.randn(2, 5, 10, generator=generator))
        found.append(world.concatenated(loss.detach()))
        engine.backward(loss.mean())
        engine.step(1e-2)
    # DeepSpeed's own, which it would leave there for whatever else the process computes.
    assert nn.functional.linear is torchs
    assert torchs not in inside
    return torch.cat(found)


def on_rank(rank: int, port: int, folder: Path) -> None:
    os.environ.update(rank_environment(rank, RANKS, port))
    torch.set_num_threads(1)
    world = join_world()
    exact = EngineConfig(precision="fp32", param_persistence_threshold=0)
    check_weights(world, exact, torch.float32, zero_modulation=True)
    check_weights(world, exact.model_copy(update={"precision": "bf16"}), torch.bfloat16)

    where = placement(exact, world)
    expected = losses(world, exact, build(where))
    assert (expected[:4] - expected[-4:]).abs().min() > 1e-3
    stored = folder / f"{rank}.safetensors"
    save_file(build(HERE).state_dict(), stored)
    other = build(where, seed=4, checkpoint_blocks=True)
    some_whole = exact.model_copy(update={"param_persistence_threshold": 200})
    assert torch.equal(losses(world, some_whole, other, start=stored), expected)
    # Last: DeepSpeed makes the groups of ranks that hold second copies once in a process.
    second = exact.model_copy(update={"zero": ZeroConfig(hpz_partition_size=RANKS)})
    assert torch.equal(losses(world, second, build(placement(second, world))), expected)
    leave_world()


@pytest.mark.ranks
def test_a_network_cut_while_it_is_built_starts_and_trains_as_a_whole_one(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    spawn(on_rank, (port, tmp_path), nprocs=RANKS)


@pytest.mark.parametrize(("stage", "ranks"), [(3, 1), (2, 2), (1, 2)])
def test_what_is_not_cut_is_built_here(stage: Any, ranks: int) -> None:
    config = EngineConfig.model_validate({"zero": {"stage": stage}})
    assert placement(config, World(0, ranks, torch.device("cpu"))) is HERE
