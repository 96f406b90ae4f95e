import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from vqd_scale.core.errors import UserError
from vqd_scale.tokenizers.base import ImageTokenizer
from vqd_scale.tokenizers.config import FSQConfig
from vqd_scale.tokenizers.fsq import FSQ, Grid

LEVELS = st.lists(st.integers(2, 9), min_size=1, max_size=4).map(tuple)


@given(LEVELS)
def test_ids_and_grid_points_are_a_bijection(levels: tuple[int, ...]) -> None:
    grid = Grid(levels)
    ids = torch.arange(grid.codes)
    points = grid.lookup(ids)
    assert grid.codes == math.prod(levels)
    assert len(points.unique(dim=0)) == grid.codes
    assert points.abs().max() <= 1
    assert torch.equal(grid.nearest(points), ids)


@given(LEVELS, st.integers(0, 2**31))
def test_quantization_selects_the_nearest_grid_point(levels: tuple[int, ...], seed: int) -> None:
    grid = Grid(levels)
    raw = torch.randn(20, len(levels), generator=torch.Generator().manual_seed(seed)) * 3
    bound = grid.bound(raw)
    every = grid.lookup(torch.arange(grid.codes))
    distances = (bound[:, None] - every).square().sum(-1)
    chosen = distances.gather(1, grid.nearest(bound)[:, None])[:, 0]
    torch.testing.assert_close(chosen, distances.min(1).values)


def test_all_levels_of_a_channel_are_reached() -> None:
    grid = Grid((8, 5, 2))
    sweep = torch.linspace(-30, 30, 2001)[:, None].expand(-1, 3)
    points = grid.lookup(grid.nearest(grid.bound(sweep)))
    assert [len(points[:, channel].unique()) for channel in range(3)] == [8, 5, 2]
    assert (points.diff(dim=0) >= 0).all()
    assert grid.bound(torch.zeros(1, 3)).abs().max() < 0.07


def tokenizer_of(levels: tuple[int, ...] = (8, 5, 5, 5)) -> FSQ:
    torch.manual_seed(0)
    return FSQ(FSQConfig(levels=levels, channels=32, channel_multipliers=(1, 1), num_res_blocks=1))


def test_fsq_is_a_tokenizer_with_the_same_convolutions() -> None:
    tokenizer: ImageTokenizer = tokenizer_of()
    images = torch.rand(2, 3, 16, 8) * 2 - 1
    tokens = tokenizer.encode(images)
    assert (tokenizer.codes, tokenizer.factor, tokens.shape) == (1000, 2, (2, 8, 4))
    assert tokenizer.decode(tokens).shape == images.shape
    assert tokenizer.code_vectors().shape == (1000, 4)


def test_gradients_pass_the_rounding_straight_through() -> None:
    tokenizer = tokenizer_of()
    images = torch.rand(2, 3, 8, 8) * 2 - 1
    output = tokenizer(images)
    torch.testing.assert_close(output.images, tokenizer.decode(tokenizer.encode(images)))
    z = tokenizer.latents(images).detach().requires_grad_()
    rounded = tokenizer.quantize.lookup(tokenizer.encode(images)).permute(0, 3, 1, 2)
    leaf = rounded.clone().requires_grad_()
    probe = torch.randn_like(output.images)
    (tokenizer.reconstruct(z + (rounded - z).detach()) * probe).sum().backward()
    (tokenizer.reconstruct(leaf) * probe).sum().backward()
    torch.testing.assert_close(z.grad, leaf.grad, rtol=1e-4, atol=1e-4)
    (output.images * probe).sum().backward()
    assert all(parameter.grad is not None for parameter in tokenizer.parameters())
    first = tokenizer.encoder.conv_in.weight.grad
    assert first is not None
    assert first.abs().max() > 0


def test_codebook_has_no_parameters_and_saves_its_levels() -> None:
    tokenizer = tokenizer_of()
    assert not list(tokenizer.quantize.parameters())
    saved = {name: value for name, value in tokenizer.state_dict().items() if "quantize" in name}
    assert list(saved) == ["quantize.levels"]
    assert saved["quantize.levels"].tolist() == [8, 5, 5, 5]


def test_weights_of_other_levels_are_refused() -> None:
    tokenizer_of().load_state_dict(tokenizer_of().state_dict())
    with pytest.raises(UserError, match=r"trained with \[8, 5, 5, 5\], not with \[5, 8, 5, 5\]"):
        tokenizer_of((5, 8, 5, 5)).load_state_dict(tokenizer_of().state_dict())


def test_channel_has_at_least_two_levels() -> None:
    with pytest.raises(ValidationError, match="greater than or equal to 2"):
        FSQConfig(levels=(8, 1))
