import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.nn import functional

from vqd_scale.nn.autoregressive import Autoregressive
from vqd_scale.nn.config import AutoregressiveConfig, NoCondition, TextCondition

CODES, GRID = 7, (3, 4)
LENGTH = GRID[0] * GRID[1]
SMALL = AutoregressiveConfig(width=24, layers=3, heads=2, init_std=0.3, condition=TextCondition(width=10))
UNCONDITIONAL = SMALL.model_copy(update={"condition": NoCondition()})


def build(config: AutoregressiveConfig = SMALL) -> Autoregressive:
    torch.manual_seed(0)
    return Autoregressive(config, CODES, GRID)


def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, CODES, (3, LENGTH), generator=generator)
    return tokens, torch.randn(3, 5, 10, generator=generator)


@pytest.mark.parametrize(
    ("config", "parameters"),
    [
        (AutoregressiveConfig(width=192, layers=18, mlp_ratio=18), 32_646_535),
        (AutoregressiveConfig(), 305_197_895),
    ],
    ids=["S", "B"],
)
def test_parameter_counts_of_the_sizes(config: AutoregressiveConfig, parameters: int) -> None:
    with torch.device("meta"):
        network = Autoregressive(config, codes=2887, grid=(32, 32))
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters


@pytest.mark.parametrize("place", range(LENGTH))
def test_logits_depend_on_earlier_positions_only(place: int) -> None:
    network = build()
    tokens, text = inputs()
    changed = tokens.clone()
    changed[:, place] = (changed[:, place] + 1) % CODES
    difference = (network(changed, text) - network(tokens, text)).abs().amax(dim=2)
    assert not difference[:, : place + 1].any()
    assert difference[:, place + 1 :].gt(0).all()


@pytest.mark.parametrize("config", [SMALL, UNCONDITIONAL], ids=["text", "none"])
def test_cached_decoding_equals_full_forward(config: AutoregressiveConfig) -> None:
    network = build(config)
    tokens, text = inputs()
    condition = text if config is SMALL else None
    full_logits = network(tokens, condition)
    caches = network.new_caches(condition, len(tokens))
    for place in range(LENGTH):
        cached = network.step(tokens, place, caches)
        torch.testing.assert_close(cached, full_logits[:, place], atol=1e-5, rtol=0)
        prefix = network(tokens[:, : place + 1], condition)[:, -1]
        torch.testing.assert_close(prefix, full_logits[:, place], atol=1e-5, rtol=0)


def test_each_sample_uses_its_own_caption() -> None:
    network = build()
    tokens, text = inputs()
    together = network(tokens, text)
    for row in range(3):
        alone = network(tokens[row : row + 1], text[row : row + 1])
        torch.testing.assert_close(together[row : row + 1], alone)
    assert (network(tokens, text.flip(0))[0] - together[0]).abs().amax(-1).gt(0).all()


def test_head_consumer_equals_logits() -> None:
    network = build()
    tokens, text = inputs()
    torch.testing.assert_close(network.forward(tokens, text, functional.linear), network(tokens, text))


def test_width_must_be_a_multiple_of_heads() -> None:
    with pytest.raises(ValidationError, match="not a multiple of heads"):
        AutoregressiveConfig(width=10, heads=4)
