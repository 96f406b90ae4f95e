"""DeepSpeed's configuration, as written and as parsed."""

import logging
from typing import Any

import pytest
import torch
from deepspeed.runtime.config import DeepSpeedConfig
from pydantic import ValidationError
from torch import Tensor, nn

from vqd_scale.core.world import join_world, leave_world
from vqd_scale.training.config import AdamWConfig, EngineConfig, ZeroConfig
from vqd_scale.training.engine import Engine, deepspeed_json


def read_back(config: EngineConfig, monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, Any], Any]:
    """Return the JSON, and DeepSpeed's parsed configuration for one rank."""
    monkeypatch.setenv("WORLD_SIZE", "1")
    emitted = deepspeed_json(config, AdamWConfig(gradient_clipping=0.5), batch=8, ranks=1)
    return emitted, DeepSpeedConfig(emitted)


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_deepspeed_parses_intended_settings(
    stage: Any, precision: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = EngineConfig(zero=ZeroConfig(stage=stage), precision=precision, gradient_accumulation_steps=2)
    emitted, parsed_config = read_back(config, monkeypatch)
    assert parsed_config.gradient_clipping == 0.5
    assert (parsed_config.train_batch_size, parsed_config.train_micro_batch_size_per_gpu) == (8, 4)
    assert parsed_config.gradient_accumulation_steps == 2
    assert parsed_config.bfloat16_config.enabled is (precision == "bf16")
    assert parsed_config.bfloat16_config.check_grad_overflow
    assert not parsed_config.float16_config.enabled
    assert not parsed_config.torch_autocast_enabled
    assert parsed_config.grad_accum_dtype == "fp32"
    assert str(parsed_config.communication_data_type) == "torch.float32"
    assert not parsed_config.prescale_gradients
    assert parsed_config.gradient_predivide_factor == 1.0
    zero = parsed_config.zero_config
    assert zero.stage == stage
    assert not zero.round_robin_gradients
    assert zero.compute_grad_norm
    assert not zero.zero_quantized_weights
    assert not zero.zero_quantized_gradients
    assert zero.offload_optimizer is None
    assert zero.zero_hpz_partition_size == 1
    if stage == 3:
        assert zero.param_persistence_threshold == config.param_persistence_threshold
    # DeepSpeed must define every key, because it ignores unknown ones silently.
    assert set(emitted["zero_optimization"]) <= {
        name
        for field, info in type(zero).model_fields.items()
        for name in (field, info.alias)
        if name is not None
    }


def test_deepspeed_clips_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """The JSON sets gradient clipping because DeepSpeed's default is 1."""
    emitted, _ = read_back(EngineConfig(), monkeypatch)
    del emitted["gradient_clipping"]
    assert DeepSpeedConfig(emitted).gradient_clipping == 1.0


def test_offload_and_hpz_settings_reach_deepspeed(monkeypatch: pytest.MonkeyPatch) -> None:
    config = EngineConfig(zero=ZeroConfig(offload_optimizer=True, hpz_partition_size=8))
    _, parsed_config = read_back(config, monkeypatch)
    assert parsed_config.zero_config.offload_optimizer.device == "cpu"
    assert parsed_config.zero_config.zero_hpz_partition_size == 8


def test_hpz_requires_stage_3() -> None:
    with pytest.raises(ValidationError, match="needs stage 3"):
        ZeroConfig(stage=2, hpz_partition_size=8)


class _Sums(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).sum(dim=1)


@pytest.mark.parametrize("stage", [1, 3])
def test_process_can_leave_a_world_and_join_another(stage: Any) -> None:
    config = EngineConfig(zero=ZeroConfig(stage=stage), precision="fp32")
    for _ in range(2):
        try:
            engine = Engine(_Sums(), config, AdamWConfig(), batch=2, world=join_world(), units=())
            engine.backward(engine(torch.ones(2, 3)).mean())
            assert engine.step(1e-3)
        finally:
            leave_world()


@pytest.mark.parametrize(
    ("precision", "served", "warning_count"), [("bf16", False, 1), ("bf16", True, 0), ("fp32", False, 0)]
)
def test_missing_half_precision_support_warns(
    precision: Any,
    served: bool,
    warning_count: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("vqd_scale.training.engine.computes_bfloat16", lambda: served)
    config = EngineConfig(zero=ZeroConfig(stage=1), precision=precision)
    try:
        with caplog.at_level(logging.WARNING, "vqd_scale"):
            Engine(_Sums(), config, AdamWConfig(), batch=2, world=join_world(), units=())
    finally:
        leave_world()
    assert len([text for text in caplog.messages if "engine.precision=fp32" in text]) == warning_count
