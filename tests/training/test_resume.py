"""Settings that may change when a run resumes, and the sentences that refuse another run."""

import json
import re
import shutil
from contextlib import closing
from pathlib import Path

import pytest
import yaml

from vqd_scale.core.config import load_config
from vqd_scale.core.errors import UserError
from vqd_scale.core.run_lock import RunLock
from vqd_scale.training import resume
from vqd_scale.training.resume import CHANGEABLE, claim
from vqd_scale.training.tasks.config import TrainConfig

PAGE = Path(__file__).parents[2] / "docs" / "training.md"
BASE = ["tokenizer=t", "data.path=d", "total_images=1000", "diffusion.kind=paper"]


def start(run: Path, *overrides: str) -> int:
    with closing(RunLock(run)) as lock:
        return claim(load_config(TrainConfig, None, [*BASE, f"run={run}", *overrides]), lock)


def begin(run: Path, *overrides: str) -> None:
    """Start a run that saves a checkpoint after its first step."""
    start(run, *overrides)
    (run / "checkpoints" / f"{128:012d}").mkdir(parents=True)


CHANGES = [
    "total_images=2000",
    "engine.zero.stage=1",
    "engine.zero.offload_optimizer=true",
    "engine.gradient_accumulation_steps=2",
    "engine.compile=true",
    "engine.precision=fp32",
    "denoiser.attention=sdpa",
    "denoiser.gradient_checkpointing=true",
    "data.num_workers=3",
    "data.global_batch_size=64",
    "data.ranged_reads.buffer_megabytes=9",
    "checkpoint.keep_last=9",
    "ema.half_life_images=9",
    "log.tensorboard=true",
    "health.skip_batches=[128]",
    "optim.lr=1e-3",
    "optim.warmup_images=9",
    "optim.schedule.kind=plateau",
    "optim.lr_scaling.reference_batch_size=8",
    "optim.gradient_clipping=9",
    "optim.weight_decay=0.5",
    "optim.betas=[0.9, 0.99]",
    "validation.path=h",
]


@pytest.mark.parametrize("change", CHANGES)
def test_resume_accepts_changed_settings(tmp_path: Path, change: str) -> None:
    begin(tmp_path)
    start(tmp_path, change)
    start(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        "denoiser.width=512",
        "denoiser.condition.kind=none",
        "diffusion.steps=50",
        "diffusion.kind=released",
        "tokenizer=u",
        "data.sources=[{path: d}, {path: e}]",
        "data.shuffle_window=9",
        "data.order_lanes=64",
        "optim.kind=lion",
        "seed=1",
    ],
)
def test_folder_of_another_run_is_refused_with_what_continues_it(tmp_path: Path, change: str) -> None:
    run = tmp_path / "run"
    begin(run)
    before = (run / "config.yaml").read_text()
    overrides = [change, "data.path=null"] if "sources" in change else [change]
    with pytest.raises(UserError, match="contains a run with another '") as refusal:
        start(run, *overrides)
    assert (run / "config.yaml").read_text() == before
    continued = re.search(r"continue it with (\S+=.*), or begin", str(refusal.value))
    other_run = re.search(r"another run with run=(\S+)\.$", str(refusal.value))
    assert continued is not None and other_run is not None
    if "sources" not in change:
        start(run, *overrides, continued[1])
    start(Path(other_run[1]), *overrides)
    assert (run / "config.yaml").read_text() == before


def test_start_without_a_saved_step_claims_nothing(tmp_path: Path) -> None:
    start(tmp_path)
    initial = tmp_path / "checkpoints" / f"{0:012d}"
    initial.mkdir(parents=True)
    start(tmp_path)
    assert initial.exists()
    assert start(tmp_path, "denoiser.width=512", "data.global_batch_size=64") == 64
    assert not initial.exists()
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["denoiser"]["width"] == 512


def test_damaged_checkpoints_still_claim_the_folder(tmp_path: Path) -> None:
    start(tmp_path)
    (tmp_path / "checkpoints" / f"{128:012d}.damaged").mkdir(parents=True)
    with pytest.raises(UserError, match="another 'seed'"):
        start(tmp_path, "seed=1")


def edit(run: Path, **keys: object) -> None:
    path = run / "config.yaml"
    values = yaml.safe_load(path.read_text())
    for key, value in keys.items():
        values.pop(key) if value is None else values.update({key: value})
    path.write_text(yaml.safe_dump(values))


def test_keys_of_other_versions_are_no_differences(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A key that the run's version lacked has its default; one that this version lacks is ignored."""
    begin(tmp_path)
    edit(tmp_path, condition_dropout=None, objective=None, key_of_a_newer_version=3)
    start(tmp_path)
    assert "key_of_a_newer_version is ignored" in caplog.text
    edit(tmp_path, condition_dropout=None)
    with pytest.raises(UserError, match=r"continue it with condition_dropout=0\.1,"):
        start(tmp_path, "condition_dropout=0.2")


def test_former_names_of_keys_are_no_differences(tmp_path: Path) -> None:
    begin(tmp_path, "condition_dropout=0.2")
    edit(tmp_path, condition_dropout=None, caption_dropout=0.2)
    start(tmp_path, "condition_dropout=0.2")


def test_batch_size_changes_and_the_order_stays(tmp_path: Path) -> None:
    begin(tmp_path)
    for batch, explicit in ((64, 128), (256, 128), (128, None)):
        assert start(tmp_path, f"data.global_batch_size={batch}") == 128
        stored = yaml.safe_load((tmp_path / "config.yaml").read_text())["data"]
        assert (stored["global_batch_size"], stored["order_lanes"]) == (batch, explicit)


def test_inputs_are_compared_by_content_wherever_they_lie(token_world: Path, tmp_path: Path) -> None:
    """A run, its data and its tokenizer are moved; other data at the same path are refused."""

    def start_in(folder: Path, run: Path, *overrides: str) -> None:
        inputs = [f"tokenizer={folder / 'tokenizer'}", f"data.path={folder / 'shards'}", f"run={run}"]
        with closing(RunLock(run)) as lock:
            claim(load_config(TrainConfig, token_world / "train.yaml", [*inputs, *overrides]), lock)

    old, new = tmp_path / "old", tmp_path / "new"
    shutil.copytree(token_world, old)
    start_in(old, tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / f"{8:012d}").mkdir(parents=True)
    old.rename(new)
    (tmp_path / "run").rename(tmp_path / "moved")
    start_in(new, tmp_path / "moved")
    # Without a record of an older version, the former paths are read if they exist.
    (tmp_path / "moved" / "inputs.json").unlink()
    shutil.copytree(new, old)
    start_in(old, tmp_path / "moved")
    shutil.rmtree(new / "shards")
    (new / "poisoned").rename(new / "shards")
    with pytest.raises(UserError, match=rf"another 'data.path' .* continue it with data.path=\"{old}"):
        start_in(new, tmp_path / "moved")


def test_second_process_in_a_run_folder_writes_nothing(tmp_path: Path) -> None:
    begin(tmp_path)
    before = (tmp_path / "config.yaml").read_text()
    with closing(RunLock(tmp_path)) as lock:
        lock.acquire()
        with pytest.raises(UserError, match="trains here"):
            start(tmp_path, "total_images=9")
    assert (tmp_path / "config.yaml").read_text() == before


def test_link_in_place_of_the_export_is_refused_at_the_start(tmp_path: Path) -> None:
    start(tmp_path / "run")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run" / "export").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="export: is in the way"):
        start(tmp_path / "run")


def test_table_of_changeable_keys_is_the_page(tmp_path: Path) -> None:
    rows = [f"| `{key}` | {reason} |" for key, reason in CHANGEABLE.items()]
    assert "\n".join(rows) in PAGE.read_text()
    config = load_config(TrainConfig, None, [*BASE, f"run={tmp_path}"])
    for key in CHANGEABLE:
        parent = config
        for name in key.split("."):
            if key != "network.attention":
                parent = getattr(parent, name)


def test_fingerprint_samples_a_large_file(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(bytes(20_000_000))
    before = resume.fingerprint(path)
    with path.open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"x")
    assert resume.fingerprint(path) != before
    assert resume.fingerprint(tmp_path / "absent") is None


def test_environment_is_recorded(tmp_path: Path) -> None:
    start(tmp_path)
    environment = json.loads((tmp_path / "environment.json").read_text())
    assert {"machine", "versions", "commit", "modified_files"} <= environment.keys()
    assert {"torch", "deepspeed", "python"} <= environment["versions"].keys()
