"""The networks that a denoising model can have, and what is asked of each of them."""

from collections.abc import Callable, Sequence
from typing import Annotated, ClassVar, Protocol, TypeAlias, overload

from jaxtyping import Float, Int
from pydantic import Discriminator, Tag
from torch import Tensor, nn

from vqd_scale.core.config import kind_or
from vqd_scale.nn.denoiser import Consume, Denoiser, DenoiserConfig, Output
from vqd_scale.nn.param_sharding import HERE, ParamSharding
from vqd_scale.nn.unet import UNet, UNetConfig

NetworkConfig: TypeAlias = Annotated[
    Annotated[DenoiserConfig, Tag("transformer")] | Annotated[UNetConfig, Tag("unet")],
    Discriminator(kind_or("transformer")),
]


class Network(Protocol):
    """Noisy tokens -> logits of p(x0 | x_t): all that schedules, objectives and samplers need to know.

    Attributes:
        units: See `vqd_scale.training.tasks.base.Task.units`.
    """

    units: ClassVar[tuple[type[nn.Module], ...]]

    @property
    def code_tables(self) -> Sequence[Tensor]:
        """Weights whose first rows are the codes', see `vqd_scale.nn.layers.start_from_codebook`."""
        ...

    def prepared(
        self, condition: Tensor | None
    ) -> Callable[[Int[Tensor, "batch length"], int], Float[Tensor, "batch length codes"]]:
        """The network under one condition: logits of tokens at one timestep of the whole batch."""
        ...

    @overload
    def __call__(
        self, tokens: Int[Tensor, "batch length"], t: Int[Tensor, " batch"], condition: Tensor | None, /
    ) -> Tensor: ...
    @overload
    def __call__(
        self,
        tokens: Int[Tensor, "batch length"],
        t: Int[Tensor, " batch"],
        condition: Tensor | None,
        consume: Consume[Output],
        /,
    ) -> Output: ...


def build_network(
    config: NetworkConfig, codes: int, grid: tuple[int, int], steps: int, placement: ParamSharding = HERE
) -> Network:
    """The network that a configuration describes.

    Args:
        config: Its kind and shape.
        codes: K, the number of codes.
        grid: Rows and columns of tokens.
        steps: T, the number of timesteps.
        placement: Where a transformer's weights are while it is built; a U-Net is small enough to be whole.

    Raises:
        UserError: The network cannot take this grid.
    """
    if isinstance(config, UNetConfig):
        return UNet(config, codes, grid, steps)
    return Denoiser(config, codes, grid, steps, placement)
