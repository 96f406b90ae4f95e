"""Networks of a denoising model, and their common interface."""

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
    """Network interface for schedules, objectives and samplers: noisy tokens -> logits of p(x0 | x_t).

    Attributes:
        units: Module classes gathered as one unit, see `vqd_scale.training.tasks.base.Task.units`.
    """

    units: ClassVar[tuple[type[nn.Module], ...]]

    @property
    def code_tables(self) -> Sequence[Tensor]:
        """Weights whose first rows belong to the codes, see `vqd_scale.nn.layers.start_from_codebook`."""
        ...

    def prepared(
        self, condition: Tensor | None
    ) -> Callable[[Int[Tensor, "batch length"], int], Float[Tensor, "batch length codes"]]:
        """Return a function (tokens, timestep of the whole batch) -> logits under one condition."""
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
    """Build the configured network.

    Args:
        config: Kind and shape of the network.
        codes: K, the number of codes.
        grid: Rows and columns of tokens.
        steps: T, the number of timesteps.
        placement: Sharding of a transformer's weights during construction; a U-Net is small and not sharded.

    Raises:
        UserError: The grid does not fit the network.
    """
    if isinstance(config, UNetConfig):
        return UNet(config, codes, grid, steps)
    return Denoiser(config, codes, grid, steps, placement)
