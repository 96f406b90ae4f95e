# pyright: reportPrivateUsage=false
# torch has no public name for most of what a fake device needs.
"""A GPU without values: code of the package runs on CUDA tensors, on a machine without a GPU.

Tensors on the device ``cuda`` have shapes, dtypes, devices and storages only (torch's fake tensors). Tensors
on the CPU are real, so Python reads real numbers there. A number read from the device is 0, or True.
"""

import functools
import gc
import sys
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any
from unittest.mock import patch

# Before `_cpp_device_is_meta` replaces what it wraps.
import torch._dynamo  # pyright: ignore[reportUnusedImport]
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

from vqd_scale.core.world import World
from vqd_scale.nn import attention, memory
from vqd_scale.nn.memory import MemoryTracker, fused_attention
from vqd_scale.text.clip import CaptionTokenizer
from vqd_scale.training.config import EngineConfig, OptimConfig

aten = torch.ops.aten
DEVICE = torch.device("cuda", 0)

_PACKAGE = str(Path(__file__).parents[2] / "vqd_scale")
_PRODUCTS = {
    aten.mm,
    aten.addmm,
    aten.bmm,
    aten.baddbmm,
    aten.convolution,
    aten.convolution_backward,
    aten._scaled_dot_product_efficient_attention,
    aten._scaled_dot_product_flash_attention,
}
"""Operators that tensor cores compute."""
_WIDE = {torch.float32, torch.float64}
_VALUE_DEPENDENT = {
    aten.nonzero: 0,
    aten._unique2: 0,
    aten.masked_select: 0,
    aten.bincount: 0,
    aten.equal: 0,
}
"""Operators whose result has a shape or value on the host that depends on the device's values."""


@dataclass(frozen=True)
class Place:
    """Line of the package that called an operator.

    Attributes:
        file: File, relative to the package.
        line: Line number.
        operator: Name of the operator.
    """

    file: str
    line: int
    operator: str


class _FakeTensors(FakeTensorMode):
    """Fake tensors that take the device meta for the GPU, see `fake_gpu`."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        args, kwargs = _without_meta(args, kwargs or {})
        return super().__torch_dispatch__(func, types, args, kwargs)


def _without_meta(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Sequence[Any], dict[str, Any]]:
    """Put on the GPU what C++ creates for a tensor of the GPU, such as an assigned number."""

    def on_gpu(tensor: Tensor) -> Tensor:
        if isinstance(tensor, FakeTensor) or tensor.device.type != "meta":
            return tensor
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=DEVICE)

    args, keywords = tree_map_only(Tensor, on_gpu, (args, dict(kwargs)))
    if keywords.get("device") is not None and torch.device(keywords["device"]).type == "meta":
        keywords["device"] = DEVICE
    return args, keywords


class FakeGPU(MemoryTracker):
    """Record of what the device was asked to do.

    Attributes:
        waits: Host waits by place: reads of values, and copies that are not asynchronous.
        operators: Number of operators dispatched to the device, by name; views and reads are not counted.
        wide_products: Products in float32 and float64, by place.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[Place] = Counter()
        self.operators: Counter[str] = Counter()
        self.wide_products: Counter[Place] = Counter()
        self._fake = _FakeTensors(allow_non_fake_inputs=True)

    def reset(self) -> None:
        """Start counting anew; live storages stay."""
        gc.collect()
        for counter in (self.waits, self.operators, self.wide_products):
            counter.clear()
        self.peak = self.bytes

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        args, kwargs = _without_meta(args, kwargs or {})
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        device = kwargs.get("device")
        to_gpu = device is not None and torch.device(device).type == "cuda"
        if not to_gpu and not any(isinstance(tensor, FakeTensor) for tensor in tensors):
            with _disable_current_modes():
                return func(*args, **kwargs)
        packet = func.overloadpacket
        if packet in (aten._to_copy, aten.copy_, aten._local_scalar_dense) or packet in _VALUE_DEPENDENT:
            result = self._read(func, packet, args, kwargs)
            if result is not NotImplemented:
                return result
        if packet in (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_):
            args = self._without_masks(func, args)
        if packet in _PRODUCTS:
            self._check_dtypes(func, [tensor for tensor in tensors if tensor is not kwargs.get("out")])
        result = func(*args, **kwargs)
        if not _is_view(func):
            self.operators[func.name().split(".")[0].removeprefix("aten::")] += 1
        self.track(result)
        return result

    def _read(self, func: Any, packet: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Count a wait and return a value for it; ``NotImplemented`` for an operator of the device."""
        first = args[0]
        if packet is aten._local_scalar_dense:
            self.waits[_place(func)] += 1
            return True if first.dtype == torch.bool else first.dtype.is_floating_point * 0.0 or 0
        if packet is aten._to_copy:
            target = kwargs.get("device")
            is_fake = isinstance(first, FakeTensor)
            if is_fake and (target is None or torch.device(target).type == "cuda"):
                is_same = kwargs.get("dtype") in (None, first.dtype) and not kwargs.get("memory_format")
                return aten.alias(first) if target is not None and is_same else NotImplemented
            if not kwargs.get("non_blocking"):
                self.waits[_place(func)] += 1
            return _on_host(first.shape, kwargs.get("dtype") or first.dtype) if is_fake else NotImplemented
        if packet is aten.copy_:
            source = args[1]
            on_gpu = [isinstance(tensor, FakeTensor) for tensor in (first, source)]
            is_asynchronous = kwargs.get("non_blocking") or (len(args) > 2 and args[2])
            if on_gpu[0] != on_gpu[1] and source.ndim and not is_asynchronous:
                self.waits[_place(func)] += 1
            return NotImplemented if on_gpu[0] else first
        self.waits[_place(func)] += 1
        if packet is aten.equal:
            return True
        if packet is aten.nonzero:
            return torch.empty(first.numel(), first.ndim, dtype=torch.int64, device=DEVICE)
        if packet is aten.masked_select:
            return first.flatten().clone()
        count = first.numel() if packet is aten._unique2 else args[2] if len(args) > 2 else 1
        sizes = torch.empty(count, dtype=torch.int64, device=DEVICE)
        return sizes if packet is aten.bincount else (first.new_empty(count), sizes, sizes)

    def _check_dtypes(self, func: Any, tensors: Sequence[Tensor]) -> None:
        dtypes = {tensor.dtype for tensor in tensors}
        if len(dtypes) > 1:
            # A GPU refuses this; the shape functions of fake tensors do not.
            raise TypeError(f"{func} of {', '.join(map(str, dtypes))} in {_place(func)}")
        if dtypes & _WIDE:
            self.wide_products[_place(func)] += 1

    def _without_masks(self, func: Any, args: Sequence[Any]) -> Sequence[Any]:
        """Replace boolean masks among the indices; a GPU counts their elements for the host."""
        if len(args) > 2 and args[2].numel() == 1:
            # A fill by a mask.
            return args
        indices: list[Any] = []
        for index in args[1]:
            if index is None or index.dtype not in (torch.bool, torch.uint8):
                indices.append(index)
                continue
            self.waits[_place(func)] += 1
            count = prod(index.shape)
            indices += [torch.empty(count, dtype=torch.int64, device=DEVICE) for _ in range(index.ndim)]
        return [args[0], indices, *args[2:]]


def _on_host(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    with _disable_current_modes():
        return torch.ones(shape, dtype=dtype) if dtype == torch.bool else torch.zeros(shape, dtype=dtype)


def _is_view(func: Any) -> bool:
    returns = func._schema.returns
    return func.overloadpacket is aten._unsafe_view or (
        bool(returns)
        and all(value.alias_info is not None and not value.alias_info.is_write for value in returns)
    )


def _place(func: Any) -> Place:
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(_PACKAGE) and name != memory.__file__:
            return Place(name[len(_PACKAGE) + 1 :], frame.f_lineno, str(func))
        frame = frame.f_back
    return Place("", 0, str(func))


@contextmanager
def fake_gpu() -> Generator[FakeGPU]:
    """Run the body on a GPU that computes nothing; CUDA tensors exist inside only."""
    gpu = FakeGPU()
    make_subclass = Tensor._make_subclass

    def without_device(cls: Any, data: Tensor, requires_grad: bool = False, **kwargs: Any) -> Any:
        # C++ then takes the device to be meta: for CUDA, autograd's engine asks a driver for streams.
        kwargs.pop("dispatch_device", None)
        return make_subclass(cls, data, requires_grad, **kwargs)

    with (
        patch.object(Tensor, "_make_subclass", staticmethod(without_device)),
        patch.object(FakeTensor, "is_cuda", property(lambda self: self.device.type == "cuda"), create=True),
        patch.object(nn.Module, "_apply", _apply),
        patch.object(attention, "_is_xformers_usable", _return_false),
        patch.object(CaptionTokenizer, "__call__", _on_cpu(CaptionTokenizer.__call__)),
        fused_attention(),
        gpu._fake,
        gpu,
    ):
        yield gpu


def _return_false(*_: object) -> bool:
    return False


def _on_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with torch.device("cpu"):
            return function(*args, **kwargs)

    return wrapped


def _apply(module: nn.Module, function: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """Replace parameters by new ones: real and fake tensors cannot exchange their ``data``, as torch does."""
    for child in module.modules() if recurse else [module]:
        for name, parameter in child._parameters.items():
            if parameter is not None:
                with torch.no_grad():
                    value = function(parameter)
                child._parameters[name] = nn.Parameter(value, parameter.requires_grad)
        for name, buffer in child._buffers.items():
            if buffer is not None:
                child._buffers[name] = function(buffer)
    return module


class OneRank(World):
    """World of one rank on the fake GPU, without a process group."""

    def sum(self, tensor: Tensor) -> Tensor:
        """Return a copy."""
        return tensor.clone()

    def any(self, flag: bool) -> bool:
        """Return the flag."""
        return flag

    def concatenated(self, tensor: Tensor) -> Tensor:
        """Return the tensor."""
        return tensor

    def gathered(self, value: dict[str, Any]) -> list[dict[str, Any]]:
        """Return the only value."""
        return [value]

    def on_first_rank(self, action: Callable[[], object]) -> None:
        """Call the action."""
        action()


WORLD = OneRank(0, 1, DEVICE)


class Flats:
    """Float32 masters of an engine, as `training.partition.Partition` gives them.

    Args:
        parameters: Trained parameters.
    """

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.parameters = parameters
        count = sum(parameter.numel() for parameter in parameters)
        self.masters = [torch.zeros(count, device=DEVICE)]

    steps = 0

    def tensors(self) -> dict[str, list[Tensor]]:
        """Return nothing to save."""
        return {}

    def masters_changed(self) -> None:
        """Copy the masters into the weights."""
        sizes = [parameter.numel() for parameter in self.parameters]
        sources = [
            part.view_as(parameter)
            for part, parameter in zip(self.masters[0].detach().split(sizes), self.parameters, strict=True)
        ]
        targets = [parameter.detach() for parameter in self.parameters]
        torch._foreach_copy_(targets, sources)  # pyright: ignore[reportPrivateImportUsage]


def to_gpu(module: nn.Module, config: EngineConfig) -> None:
    """Put a module on the GPU, its parameters in the engine's dtype, as `training.engine.Engine` does."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[config.precision]
    for child in module.modules():
        for name, parameter in child._parameters.items():
            if parameter is not None and (parameter.device, parameter.dtype) != (DEVICE, dtype):
                value = parameter.detach().to(DEVICE, dtype)
                child._parameters[name] = nn.Parameter(value, parameter.requires_grad)
        for name, buffer in child._buffers.items():
            if buffer is not None:
                child._buffers[name] = buffer.to(DEVICE)


class PlainEngine:
    """Arithmetic of `training.engine.Engine` on one rank, in torch: DeepSpeed needs a real device.

    Gradients are accumulated in float32 as soon as they exist, masters and moments are flat and float32.

    Args:
        module: See `training.engine.Engine`, as all arguments.
        config: Precision.
        optim: Optimizer.
        batch: Unused.
        world: Unused.
        units: Unused.
    """

    def __init__(
        self,
        module: nn.Module,
        config: EngineConfig,
        optim: OptimConfig,
        batch: int,
        world: World,
        units: Any,
    ) -> None:
        to_gpu(module, config)
        self.module = module
        self.optim = optim
        parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self.partition = Flats(parameters)
        master = self.partition.masters[0]
        self.bucket = torch.empty(config.bucket_size, dtype=parameters[0].dtype, device=DEVICE)
        self.gradient = torch.zeros_like(master)
        self.optimizer = optim.build([{"params": [nn.Parameter(master)]}])
        # Moments exist before the first step, as in DeepSpeed.
        self.step(0.0)
        first = 0
        for parameter in parameters:
            into = self.gradient[first : first + parameter.numel()]
            first += parameter.numel()
            parameter.register_post_accumulate_grad_hook(functools.partial(self._accumulate, into))

    def __call__(self, *inputs: Tensor) -> Any:
        """Call the module."""
        return self.module(*inputs)

    def backward(self, loss: Tensor, *, discard: bool = False) -> None:
        """Accumulate gradients."""
        loss.backward()

    def step(self, learning_rate: float) -> bool:
        """Clip and apply the gradient."""
        self.gradient_norm = torch.linalg.vector_norm(self.gradient)
        self.gradient.mul_((self.optim.gradient_clipping / self.gradient_norm).clamp(max=1))
        (group,) = self.optimizer.param_groups
        group["params"][0].grad = self.gradient
        group["lr"] = learning_rate
        self.optimizer.step()
        self.gradient.zero_()
        self.partition.masters_changed()
        return True

    @staticmethod
    def _accumulate(into: Tensor, parameter: Tensor) -> None:
        assert parameter.grad is not None
        into.add_(parameter.grad.flatten())
        parameter.grad = None
