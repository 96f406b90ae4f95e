"""DeepSpeed, behind the few calls that the loop needs. Nothing else in the package imports it."""

import contextlib
import io
import logging
import os
import warnings
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal, cast

import torch
from pydantic import NonNegativeInt, PositiveInt, model_validator
from torch import Tensor, nn

from vqd_scale.core.config import Config
from vqd_scale.core.errors import UserError
from vqd_scale.core.world import World, computes_bfloat16
from vqd_scale.nn.param_sharding import HERE, ParamSharding, Part
from vqd_scale.training.optim import OptimConfig, build_optimizer
from vqd_scale.training.partition import Partition

if not torch.cuda.is_available():
    # Said before the import, since DeepSpeed otherwise warns that it had to find out.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
from deepspeed.runtime.zero.linear import zero3_linear_wrap
from deepspeed.utils import logger as deepspeed_logger
from deepspeed.utils import set_z3_leaf_modules, zero_to_fp32

# Only inference's tensor parallelism uses it, yet every start on a CPU would compile it, or wait in line with
# the processes of other runs for whoever does.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

logger = logging.getLogger(__name__)

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class ZeroConfig(Config):
    """What is spread over the ranks; none of it changes the numbers but for the order of sums."""

    stage: Literal[1, 2, 3] = 3
    """1 spreads the optimizer's state, 2 the gradients as well, 3 the weights too."""
    offload_optimizer: bool = False
    """Keep the optimizer's state, and step, in the host's memory."""
    hpz_partition_size: PositiveInt = 1
    """Stage 3: ranks, usually those of a node, that hold a second copy of the weights among them, so that the
    backward pass gathers within the node (hpZ of ZeRO++, arXiv 2306.10209); 1 is none."""

    @model_validator(mode="after")
    def _second_copies_are_of_spread_weights(self) -> "ZeroConfig":
        if self.hpz_partition_size > 1 and self.stage < 3:
            raise ValueError(f"secondary_shards {self.hpz_partition_size} needs stage 3, not {self.stage}")
        return self


class EngineConfig(Config):
    """How the model is held and computed over the ranks."""

    zero: ZeroConfig = ZeroConfig()
    precision: Literal["fp32", "bf16"] = "bf16"
    """What the network computes in; weights and moments of the optimizer are float32 in any case. On a CPU
    with AVX2 only, a step takes nine times as long in bf16, and a warning says so."""
    gradient_accumulation_steps: PositiveInt = 1
    """Parts that a rank's share of a batch is computed in, one after the other, to save memory."""
    param_persistence_threshold: NonNegativeInt = 100_000
    """Parameters with fewer elements stay whole on every rank; their optimizer state is sharded anyway."""
    bucket_size: PositiveInt = 50_000_000
    """Elements that are gathered or reduced in one message."""
    compile: bool = False
    """Compile each block with torch.compile: minutes at the start, faster steps afterwards."""
    deterministic: bool = False
    """On GPUs, add in one order only, so that a run repeats on as many of the same cards; slower. A warning
    names an operation that cannot. On CPUs runs repeat in any case."""


@contextlib.contextmanager
def _quiet() -> Generator[None]:
    """Keep to warnings that mean something, and the standard output for a tool's result."""
    for chatty in (deepspeed_logger, logging.getLogger("torch.utils.cpp_extension")):
        chatty.setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="deepspeed")
    with contextlib.redirect_stdout(io.StringIO()):
        yield


@contextlib.contextmanager
def _linear_is(function: Callable[..., Tensor]) -> Generator[None]:
    """Have torch's `linear` be another inside, and what it was afterwards.

    Stage 3 has one of its own, which keeps no gathered weight for the backward pass. DeepSpeed puts it in
    torch's place when it first cuts a weight and leaves it there for the rest of the process: networks that
    are none of the engine's would run through it, too, and could not be traced.
    """
    before = nn.functional.linear
    nn.functional.linear = function
    try:
        yield
    finally:
        nn.functional.linear = before


def _say_where_half_precision_is_slow(config: EngineConfig, world: World) -> None:
    on_cpu = world.device.type == "cpu"
    if config.precision == "bf16" and on_cpu and world.is_first and not computes_bfloat16():
        logger.warning(
            "this processor has no instructions for bfloat16 and is slower in it; set engine.precision=fp32"
        )


def deepspeed_json(config: EngineConfig, optim: OptimConfig, batch: int, ranks: int) -> dict[str, Any]:
    """DeepSpeed's configuration, with every default of its own that would change the numbers."""
    return {
        "train_batch_size": batch,
        "train_micro_batch_size_per_gpu": batch // ranks // config.gradient_accumulation_steps,
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
        # Left out, DeepSpeed clips at 1.0.
        "gradient_clipping": optim.gradient_clipping,
        "bf16": {"enabled": config.precision == "bf16", "check_grad_overflow": True},
        "fp16": {"enabled": False},
        "torch_autocast": {"enabled": False},
        # Left out, parts of a batch are summed in the weights' precision.
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "prescale_gradients": False,
        "gradient_predivide_factor": 1.0,
        "gradient_allreduce_op": "mean",
        # torch's AdamW: needs no compiler at the start and is the optimizer that the tests compare with.
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


def _add_in_one_order() -> None:
    # Read when the first matrix product of the process is computed.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(mode=True, warn_only=True)
    torch.backends.cudnn.benchmark = False


def imported_weights(folder: Path) -> dict[str, Tensor]:
    """Whole float32 parameters of a folder that DeepSpeed itself wrote, of any stage and number of ranks.

    Such files are pickles, and reading them runs whatever code is in them.

    Args:
        folder: The one that holds ``latest``, or one of its tags.

    Raises:
        UserError: It is no such folder.
    """
    is_tag = any(folder.glob("*_optim_states.pt"))
    top, tag = (folder.parent, folder.name) if is_tag else (folder, None)
    try:
        with _quiet():
            found = zero_to_fp32.get_fp32_state_dict_from_zero_checkpoint(str(top), tag)
    except (FileNotFoundError, ValueError) as error:
        raise UserError(f"{folder}: holds no checkpoint of DeepSpeed's ({error}).") from None
    return cast(dict[str, Tensor], found)


def placement(config: EngineConfig, world: World) -> ParamSharding:
    """Where a network's weights are to be while it is built: cut among the ranks, if they are held so."""
    return _AmongRanks(config) if config.zero.stage == 3 and world.size > 1 else HERE


class _AmongRanks(ParamSharding):
    """Each part is cut as soon as it is made, so that no rank ever holds the whole network."""

    def __init__(self, config: EngineConfig) -> None:
        self._dtype = _DTYPES[config.precision]
        self._json = {
            "train_micro_batch_size_per_gpu": 1,
            "bf16": {"enabled": config.precision == "bf16"},
            "zero_optimization": _zero_json(config),
        }
        self._cut: Callable[[list[nn.Parameter]], None] | None = None

    def placed(self, part: Part) -> Part:
        weights: list[Any] = list(part.to(self._dtype).parameters())
        with _quiet(), _linear_is(nn.functional.linear):
            if self._cut is None:
                deepspeed.zero.Init(module=part, config_dict_or_path=self._json, dtype=self._dtype)
                # A second one would make its groups of ranks anew; a weight that is cut can cut others.
                self._cut = weights[0].convert_to_zero_parameters
            else:
                self._cut(weights)
        return part

    def whole(self, weights: Iterable[Tensor]) -> AbstractContextManager[object]:
        # What rank 0 makes of them is kept; all ranks draw the same.
        return deepspeed.zero.GatheredParameters(list(weights), modifier_rank=0)


class Engine:
    """A module whose parameters, gradients and optimizer state are spread over the ranks.

    Args:
        module: Its forward goes from a batch to per-sample losses; parameters as every rank initialised them
            alike (rank 0's are broadcast).
        config: How it is held.
        optim: The optimizer.
        batch: Images in a global batch.
        world: This process's place among the ranks.
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
        _say_where_half_precision_is_slow(config, world)
        if config.deterministic:
            _add_in_one_order()
        if config.zero.stage == 3 and units:
            set_z3_leaf_modules(module, list(units))
        if config.compile:
            for child in module.modules():
                if isinstance(child, tuple(units)):
                    child.compile()
        # DeepSpeed does this to a module that is whole, not to one of which some parts are cut already.
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
        self.partition = Partition(engine.optimizer, module, world.rank)

    def __call__(self, *inputs: Tensor) -> Any:  # noqa: ANN401 - what the module's forward returns
        """The module's forward, parameters gathered as they are needed."""
        with _linear_is(self._linear):
            return self._engine(*inputs)

    def backward(self, loss: Tensor, *, spoiled: bool = False) -> None:
        """Accumulate a loss's gradient; its mean over ranks and parts of a batch is what is stepped on.

        Args:
            loss: A scalar.
            spoiled: Make the gradient of the whole batch one that the next step drops, on all ranks alike.
        """
        # DeepSpeed drops, and forgets, what is not finite: its only way out of a batch that has begun.
        # What was not kept is computed once more in here, by the same `linear`.
        with _linear_is(self._linear):
            self._engine.backward(loss * float("nan") if spoiled else loss)

    def step(self, learning_rate: float) -> bool:
        """Clip and apply the gradient, after the last part of a batch; before that, only count the part.

        Returns:
            Whether the gradient was finite. One that is not is dropped on all ranks, and weights and moments
            stay what they were.
        """
        for group in self._engine.optimizer.optimizer.param_groups:
            group["lr"] = learning_rate
        self._engine.step()
        return not self._engine.optimizer.overflow

    @property
    def gradient_norm(self) -> float:
        """Global norm of the last applied gradient, before clipping."""
        return float(self._engine.get_global_grad_norm() or 0.0)
