"""Networks of a denoising model, and their common interface."""

from collections.abc import Sequence
from typing import ClassVar, Protocol, overload

from jaxtyping import Int
from torch import Tensor, nn

from vqd_scale.nn.denoiser import HeadFunction, Output, PreparedNetwork
from vqd_scale.nn.layers import Tokens


class Network(Protocol):
    """Network interface for schedules, objectives and samplers: noisy tokens -> logits of p(x0 | x_t).

    Attributes:
        units: Module classes gathered as one unit, see `vqd_scale.training.tasks.base.Task.units`.
    """

    units: ClassVar[tuple[type[nn.Module], ...]]

    @property
    def code_embeddings(self) -> Sequence[Tensor]:
        """Weights whose first rows belong to the codes, see `vqd_scale.nn.layers.init_from_codebook`."""
        ...

    def prepare(self, condition: Tensor | None) -> PreparedNetwork:
        """Return a function (tokens, timestep of the whole batch) -> logits under one condition."""
        ...

    @overload
    def __call__(self, tokens: Tokens, t: Int[Tensor, " batch"], condition: Tensor | None, /) -> Tensor: ...
    @overload
    def __call__(
        self,
        tokens: Tokens,
        t: Int[Tensor, " batch"],
        condition: Tensor | None,
        head_function: HeadFunction[Output],
        /,
    ) -> Output: ...
