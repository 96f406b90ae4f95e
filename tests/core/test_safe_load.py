"""Foreign checkpoints are read, never executed."""

import argparse
import builtins
import os
import shutil
import subprocess
import sys
import zipfile
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from types import ModuleType
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vqd_scale.core.errors import UserError
from vqd_scale.core.safe_load import read_saved, tensors_in


class Executes:
    """Return an object whose unpickling calls ``function``."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.function = function
        self.arguments = arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.function, self.arguments


def mapping_in(path: Path) -> dict[str, Any]:
    loaded = read_saved(path)
    assert isinstance(loaded, dict)
    return cast(dict[str, Any], loaded)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        (subprocess.getoutput, ("touch {victim}",)),
        (builtins.eval, ("__import__('pathlib').Path('{victim}').touch()",)),
        (Path.touch, (Path("{victim}"),)),
        (shutil.copy, (__file__, "{victim}")),
        (os.mkdir, ("{victim}",)),
    ],
)
def test_planted_call_is_not_executed(
    tmp_path: Path, zipped: bool, function: Callable[..., object], arguments: tuple[object, ...]
) -> None:
    victim = tmp_path / "victim"
    placed = [cast(type[Any], type(argument))(str(argument).format(victim=victim)) for argument in arguments]
    checkpoint = {"model": {"w": torch.ones(2)}, "optimizer": Executes(function, *placed)}
    path = tmp_path / "model.pth"
    torch.save(checkpoint, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match="nothing in it was executed") as raised:
        read_saved(path)
    assert not victim.exists()
    assert "trust" not in str(raised.value)
    # An ordinary reader executes the planted call.
    torch.load(path, weights_only=False)
    assert victim.exists()


def _foreign(name: str, *bases: type) -> type:
    """Return a class that pickles as ``module.Class`` of a library that is not installed."""
    module, _, short = name.rpartition(".")
    parts = module.split(".")
    for depth in range(1, len(parts) + 1):
        sys.modules.setdefault(".".join(parts[:depth]), ModuleType(".".join(parts[:depth])))
    foreign_class = type(short, bases, {"__module__": module})
    setattr(sys.modules[module], short, foreign_class)
    return foreign_class


@pytest.fixture(params=[True, False], ids=["zip", "legacy"])
def lightning_checkpoint(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """Return a checkpoint with the settings that taming's published files hold beside the weights."""
    before = set(sys.modules)
    settings_kind = _foreign("omegaconf.dictconfig.DictConfig")
    hyper_parameters = _foreign("pytorch_lightning.utilities.parsing.AttributeDict", dict)
    callback = _foreign("pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint")
    foreign_settings: Any = settings_kind()
    foreign_settings.__dict__.update(
        _content={"n_embed": 8}, _parent=None, _resolvers=defaultdict(dict, {"x": 1})
    )
    path = tmp_path / "last.ckpt"
    torch.save(
        {
            "epoch": 3,
            "state_dict": OrderedDict({"encoder.conv_in.weight": torch.arange(6.0).view(2, 3)}),
            "callbacks": {callback: {"best": torch.tensor(1.0), "where": PurePosixPath("logs/last.ckpt")}},
            "hyper_parameters": hyper_parameters(config=foreign_settings, rate=np.float64(4.5e-6)),
            "arguments": argparse.Namespace(seed=23, any=Any, kinds=np.ones(3), choices=[dict, slice]),
        },
        path,
        _use_new_zipfile_serialization=request.param,
    )
    for name in set(sys.modules) - before:
        if name.startswith(("omegaconf", "pytorch_lightning")):
            del sys.modules[name]
    return path


def test_settings_of_absent_libraries_are_ignored(lightning_checkpoint: Path) -> None:
    checkpoint = mapping_in(lightning_checkpoint)
    weights = tensors_in(checkpoint["state_dict"])
    assert list(weights) == ["encoder.conv_in.weight"]
    assert torch.equal(weights["encoder.conv_in.weight"], torch.arange(6.0).view(2, 3))
    assert "omegaconf" not in sys.modules
    with pytest.raises(ModuleNotFoundError):
        torch.load(lightning_checkpoint, weights_only=False)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_damaged_file_raises_user_error(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "model.pth"
    torch.save({"model": {"w": torch.arange(300.0)}, "name": "model"}, path)
    file_bytes = path.read_bytes()
    if data.draw(st.booleans(), label="truncated"):
        path.write_bytes(file_bytes[: data.draw(st.integers(0, len(file_bytes) - 1), label="length")])
        damaged = True
    else:
        place = data.draw(st.integers(0, len(file_bytes) - 1), label="place")
        changed = bytearray(file_bytes)
        changed[place] ^= data.draw(st.integers(1, 255), label="bits")
        path.write_bytes(changed)
        # Padding and time stamps have no checksum: only a change of the weights must be detected.
        damaged = False
    try:
        weights = tensors_in(mapping_in(path).get("model"))
    except UserError as error:
        assert str(error).startswith(f"{path}: ")
        assert "\n" not in str(error)
    else:
        assert not damaged
        assert not weights or torch.equal(weights["w"], torch.arange(300.0))


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("function", [bytearray, torch.FloatTensor, torch.UntypedStorage])
def test_call_that_allocates_is_refused(tmp_path: Path, zipped: bool, function: Any) -> None:
    path = tmp_path / "model.pth"
    torch.save({"w": Executes(function, 3 << 30)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match=r"would call .*(bytearray|FloatTensor|UntypedStorage) on loading"):
        read_saved(path)


def test_compressed_archive_is_refused_before_it_is_inflated(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(1 << 20)}, tmp_path / "model.pth")
    with (
        zipfile.ZipFile(tmp_path / "model.pth") as archive,
        zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as compressed,
    ):
        for name in archive.namelist():
            compressed.writestr(name, archive.read(name))
    with pytest.raises(UserError, match=r"claims .* bytes of content, more than the file can contain"):
        read_saved(tmp_path / "bomb.pth")


@pytest.mark.parametrize("zipped", [True, False])
def test_tensor_larger_than_its_file_is_refused(tmp_path: Path, zipped: bool) -> None:
    path = tmp_path / "model.pth"
    tensors = [torch.zeros(1).expand(1 << 20, 1 << 10)]
    torch.save({"optimizer": {"state": tensors}}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match="claims 4,294,967,296 bytes of tensors"):
        read_saved(path)


@pytest.mark.parametrize("name", ["w.pth", "w.ckpt", "w.bin", "w.safetensors"])
@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
            "pointer of git-lfs.*'git lfs pull'",
        ),
        (b"\xef\xbb\xbf\n<!DOCTYPE html><html lang='de'>\xc3\xbc</html>", "is a web page"),
        (b"<?xml version='1.0'?><Error><Code>NoSuchKey</Code></Error>", "is a web page"),
        (b"Entry not found", "its content is the text 'Entry not found'; download it again"),
        (b'{"error": "Access to model is restricted"}', "its content is the text"),
    ],
)
def test_failed_download_is_named(tmp_path: Path, name: str, content: bytes, sentence: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=sentence):
        read_saved(tmp_path / name)


def test_prefixes_of_wrapped_modules_are_removed() -> None:
    weights = {"a.weight": torch.ones(2), "b": torch.zeros(1)}
    for prefix in ("module.", "_orig_mod.", "module._orig_mod."):
        assert list(tensors_in({prefix + name: value for name, value in weights.items()})) == list(weights)
    mixed = {"module.a": weights["b"], "b": weights["b"]}
    assert list(tensors_in(mixed)) == list(mixed)


@pytest.mark.parametrize("dots", [True, False])
def test_averaged_weights_replace_the_others(dots: bool) -> None:
    last = {"encoder.conv.weight": torch.ones(2), "quantize.codes": torch.ones(1)}
    averaged = "encoder.conv.weight" if dots else "encoderconvweight"
    counters = {"model_ema.decay": torch.ones(()), "model_ema.num_updates": torch.ones(())}
    state = tensors_in({**last, f"model_ema.{averaged}": torch.zeros(2), **counters})
    assert {name: float(value.sum()) for name, value in state.items()} == {
        "encoder.conv.weight": 0.0,
        "quantize.codes": 1.0,
    }
    assert list(tensors_in({"model_ema.a.b": last["quantize.codes"], **counters})) == ["a.b"]


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no such file"):
        read_saved(tmp_path / "nothing.pth")
