"""DeepSpeed wrapper; the only module of the package that imports DeepSpeed."""

import contextlib
import io
import logging
import os
import warnings
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from vqd_scale.core.environment import computes_bfloat16
from vqd_scale.core.errors import UserError
from vqd_scale.core.world import World
from vqd_scale.nn.param_sharding import NO_SHARDING, ParamSharding, Part
from vqd_scale.training.config import OptimConfig
from vqd_scale.training.optim import build_optimizer
from vqd_scale.training.partition import Partition

if not torch.cuda.is_available():
    # Set before the import: otherwise DeepSpeed warns that it detected the accelerator.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
from deepspeed.runtime.zero.linear import zero3_linear_wrap
from deepspeed.utils import logger as deepspeed_logger
from deepspeed.utils import set_z3_leaf_modules, zero_to_fp32

from vqd_scale.training.config import EngineConfig

# Used by tensor-parallel inference only. Otherwise every start on a CPU compiles it or waits for the lock of
# another run's process that compiles it.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

logger = logging.getLogger(__name__)

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@contextlib.contextmanager
def _quiet() -> Generator[None]:
    """Silence DeepSpeed's logs and warnings, and keep its output off the standard output."""
    for verbose_logger in (deepspeed_logger, logging.getLogger("torch.utils.cpp_extension")):
        verbose_logger.setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="deepspeed")
    with contextlib.redirect_stdout(io.StringIO()):
        yield


@contextlib.contextmanager
def _linear_is(function: Callable[..., Tensor]) -> Generator[None]:
    """Replace `torch.nn.functional.linear` within the context.

    Stage 3 has its own `linear`, which does not save gathered weights for the backward pass. DeepSpeed
    patches it into torch when it first partitions a weight and leaves it for the rest of the process. Other
    networks would then use it too and could not be traced.
    """
    before = nn.functional.linear
    nn.functional.linear = function
    try:
        yield
    finally:
        nn.functional.linear = before


def _warn_if_half_precision_is_slow(config: EngineConfig, world: World) -> None:
    on_cpu = world.device.type == "cpu"
    if config.precision == "bf16" and on_cpu and world.is_first and not computes_bfloat16():
        logger.warning(
            "this processor has no bfloat16 instructions, so bf16 is slow; set engine.precision=fp32"
        )


def deepspeed_json(config: EngineConfig, optim: OptimConfig, batch: int, ranks: int) -> dict[str, Any]:
    """Return DeepSpeed's configuration, with every default that affects results set explicitly."""
    return {
        "train_batch_size": batch,
        "train_micro_batch_size_per_gpu": batch // ranks // config.gradient_accumulation_steps,
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
        # DeepSpeed's default clips at 1.0.
        "gradient_clipping": optim.gradient_clipping,
        "bf16": {"enabled": config.precision == "bf16", "check_grad_overflow": True},
        "fp16": {"enabled": False},
        "torch_autocast": {"enabled": False},
        # By default gradients are accumulated in the weights' dtype.
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "prescale_gradients": False,
        "gradient_predivide_factor": 1.0,
        "gradient_allreduce_op": "mean",
        # DeepSpeed's own optimizers need a compiler at startup.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": _zero_json(config),
        "steps_per_print": 1_000_000_000,
        "wall_clock_breakdown": False,
    }


def _zero_json(config: EngineConfig) -> dict[str, Any]:
    values: dict[str, Any] = {
        "stage": config.zero.stage,
        "reduce_bucket_size": config.bucket_size,
        "allgather_bucket_size": config.bucket_size,
        "contiguous_gradients": True,
        "overlap_comm": torch.cuda.is_available(),
        "reduce_scatter": True,
        "compute_grad_norm": True,
        "round_robin_gradients": False,
        "zero_quantized_weights": False,
        "zero_quantized_gradients": False,
    }
    if config.zero.offload_optimizer:
        values["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if config.zero.stage == 3:
        values |= {
            "stage3_param_persistence_threshold": config.param_persistence_threshold,
            "stage3_prefetch_bucket_size": config.bucket_size,
            "stage3_max_live_parameters": 1_000_000_000,
            "stage3_max_reuse_distance": 1_000_000_000,
            "sub_group_size": 1_000_000_000,
            "zero_hpz_partition_size": config.zero.hpz_partition_size,
        }
    return values


def _set_deterministic() -> None:
    # Read at the first matrix product of the process.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(mode=True, warn_only=True)
    torch.backends.cudnn.benchmark = False


def imported_weights(folder: Path) -> dict[str, Tensor]:
    """Load full float32 parameters from a native DeepSpeed checkpoint of any stage and number of ranks.

    The files are pickles: loading them can execute arbitrary code.

    Args:
        folder: Folder that contains ``latest``, or the folder of one tag.

    Raises:
        UserError: The folder contains no DeepSpeed checkpoint.
    """
    is_tag = any(folder.glob("*_optim_states.pt"))
    top, tag = (folder.parent, folder.name) if is_tag else (folder, None)
    try:
        with _quiet():
            weights = zero_to_fp32.get_fp32_state_dict_from_zero_checkpoint(str(top), tag)
    except (FileNotFoundError, ValueError) as error:
        raise UserError(f"{folder}: holds no checkpoint of DeepSpeed's ({error}).") from None
    return cast(dict[str, Tensor], weights)


def build_param_sharding(config: EngineConfig, world: World) -> ParamSharding:
    """Return the parameter sharding for building a network: over the ranks under ZeRO-3, else none."""
    return _Zero3Sharding(config) if config.zero.stage == 3 and world.size > 1 else NO_SHARDING


class _Zero3Sharding(ParamSharding):
    """Sharding of each submodule directly after construction, so no rank ever holds the full network."""

    def __init__(self, config: EngineConfig) -> None:
        self._dtype = _DTYPES[config.precision]
        self._json = {
            "train_micro_batch_size_per_gpu": 1,
            "bf16": {"enabled": config.precision == "bf16"},
            "zero_optimization": _zero_json(config),
        }
        self._shard: Callable[[list[nn.Parameter]], None] | None = None

    def shard(self, part: Part) -> Part:
        weights: list[Any] = list(part.to(self._dtype).parameters())
        with _quiet(), _linear_is(nn.functional.linear):
            if self._shard is None:
                deepspeed.zero.Init(module=part, config_dict_or_path=self._json, dtype=self._dtype)
                # A second `zero.Init` would create new process groups; a partitioned weight can partition
                # others.
                self._shard = weights[0].convert_to_zero_parameters
            else:
                self._shard(weights)
        return part

    def gather(self, weights: Iterable[Tensor]) -> AbstractContextManager[object]:
        # Rank 0's modification is kept; all ranks generate the same values.
        return deepspeed.zero.GatheredParameters(list(weights), modifier_rank=0)


class Engine:
    """A module with parameters, gradients and optimizer state sharded over the ranks.

    Args:
        module: Module whose forward maps a batch to per-sample losses. All ranks initialize its parameters
            identically (rank 0's are broadcast).
        config: Sharding, precision and execution.
        optim: Optimizer configuration.
        batch: Global batch size.
        world: This process's rank and device.
        units: See `vqd_scale.training.tasks.base.Task.units`.
    """

    def __init__(
        self,
        module: nn.Module,
        config: EngineConfig,
        optim: OptimConfig,
        batch: int,
        world: World,
        units: Sequence[type[nn.Module]],
    ) -> None:
        _warn_if_half_precision_is_slow(config, world)
        if config.deterministic:
            _set_deterministic()
        if config.zero.stage == 3 and units:
            set_z3_leaf_modules(module, list(units))
        if config.compile:
            for child in module.modules():
                if isinstance(child, tuple(units)):
                    child.compile()
        # DeepSpeed does this for an unpartitioned module, but not for a partly partitioned one.
        for parameter in module.parameters():
            parameter.data = parameter.data.to(world.device, _DTYPES[config.precision])
        for buffer in module.buffers():
            buffer.data = buffer.data.to(world.device)
        optimizer = build_optimizer(module, optim)
        with _quiet(), _linear_is(nn.functional.linear):
            engine, *_ = deepspeed.initialize(
                model=module,
                optimizer=optimizer,
                config=deepspeed_json(config, optim, batch, world.size),
            )
        self._linear = zero3_linear_wrap if config.zero.stage == 3 else nn.functional.linear
        self._engine: Any = engine
        self.module = module
        self.partition = Partition(engine.optimizer, module, world.rank, optim.moments)

    def __call__(self, *inputs: Tensor) -> Any:  # noqa: ANN401 - what the module's forward returns
        """Run the module's forward, gathering parameters on demand."""
        with _linear_is(self._linear):
            return self._engine(*inputs)

    def backward(self, loss: Tensor, *, discard: bool = False) -> None:
        """Accumulate the gradient of a loss; the step uses its mean over ranks and micro-batches.

        Args:
            loss: Scalar loss.
            discard: Make the gradient NaN, so the next step discards the whole batch on all ranks.
        """
        # DeepSpeed discards nonfinite gradients; it has no other way to abandon a started batch.
        # Gradient checkpointing recomputes activations here, with the same `linear`.
        with _linear_is(self._linear):
            self._engine.backward(loss * float("nan") if discard else loss)

    def step(self, learning_rate: float) -> bool:
        """Clip and apply the gradient after the last micro-batch; before that, only count the micro-batch.

        Returns:
            ``True`` if the gradient was finite. A nonfinite gradient is discarded on all ranks; weights and
            moments are unchanged.
        """
        for group in self._engine.optimizer.optimizer.param_groups:
            group["lr"] = learning_rate
        self._engine.step()
        return not self._engine.optimizer.overflow

    @property
    def gradient_norm(self) -> Tensor:
        """Global norm of the last applied gradient before clipping, on the device where DeepSpeed has it."""
        norm = self._engine.get_global_grad_norm()
        return torch.as_tensor(0.0 if norm is None else norm)
