"""Reads survive transient faults with bounded attempts; permanent faults raise UserError."""

from collections.abc import Sequence

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.s3.proxy import Fault, FaultKind, FaultProxy, in_turn
from vqd_scale.core import s3 as s3_module
from vqd_scale.core.atomic_io import published, read_in_order
from vqd_scale.core.errors import UserError
from vqd_scale.core.s3 import S3Object, S3Path
from vqd_scale.core.s3_client import RetryPolicy

pytestmark = pytest.mark.s3

SIZE = 300_000
CONTENT = bytes(range(251)) * (SIZE // 251 + 1)
QUICK: Sequence[FaultKind] = ("reset", "close", "truncate", "500", "503")

faults = st.builds(Fault, st.sampled_from(QUICK), st.integers(0, SIZE))


def write_object(path: S3Path, data: bytes) -> None:
    with published(path) as partial:
        partial.write_bytes(data)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(plan=st.lists(faults, max_size=3), begin=st.integers(0, SIZE), length=st.integers(0, SIZE))
def test_range_read_survives_faults(
    folder: S3Path, proxy: FaultProxy, short_retries: RetryPolicy, plan: list[Fault], begin: int, length: int
) -> None:
    if not (folder / "object").exists():
        write_object(folder / "object", CONTENT[:SIZE])
    end = min(begin + length, SIZE)
    proxy.follow(in_turn(plan))
    assert S3Object(proxy.to(folder / "object"), SIZE).read(begin, end) == CONTENT[begin:end]
    # One request per fault and no more: received bytes are never requested again.
    assert sum(proxy.requests.values()) <= 1 + len(plan)


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(plan=st.lists(st.none() | faults, max_size=3))
def test_sequential_read_survives_faults(
    folder: S3Path,
    proxy: FaultProxy,
    short_retries: RetryPolicy,
    plan: list[Fault | None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(s3_module, "PIECE_BYTES", 70_001)
    if not (folder / "object").exists():
        write_object(folder / "object", CONTENT[:SIZE])
    proxy.follow(in_turn(plan))
    assert b"".join(read_in_order(proxy.to(folder / "object"))) == CONTENT[:SIZE]


@pytest.mark.parametrize("after", [0, 1000])
def test_stalled_connection_is_retried(
    folder: S3Path, proxy: FaultProxy, short_retries: RetryPolicy, after: int
) -> None:
    write_object(folder / "object", CONTENT[:SIZE])
    proxy.follow(in_turn([Fault("stall", after)]))
    assert S3Object(proxy.to(folder / "object"), SIZE).read(10, SIZE) == CONTENT[10:SIZE]
    assert proxy.faults["stall"] == 1


def test_read_resumes_where_it_broke_off(
    folder: S3Path, proxy: FaultProxy, short_retries: RetryPolicy
) -> None:
    """Allow more failures than attempts if each request makes progress."""
    size = 14 * short_retries.progress_bytes
    write_object(folder / "object", CONTENT * (size // SIZE + 1))
    content = (folder / "object").read_bytes()
    proxy.follow(in_turn([Fault("close", short_retries.progress_bytes)] * 12))
    assert S3Object(proxy.to(folder / "object"), len(content)).read(0, len(content)) == content
    assert proxy.faults["close"] == 12


@pytest.mark.parametrize(
    "fault", [*(Fault(kind) for kind in QUICK), Fault("close", 99), Fault("truncate", 7)]
)
def test_unresponsive_store_raises_user_error(
    folder: S3Path, proxy: FaultProxy, short_retries: RetryPolicy, fault: Fault
) -> None:
    write_object(folder / "object", CONTENT[:SIZE])
    proxy.follow(in_turn([fault] * 1000))
    with pytest.raises(UserError, match=r"folder/object\?.*: could not be read in 5 attempts, the last one"):
        S3Object(proxy.to(folder / "object"), SIZE).read(0, SIZE)
    # The client itself retries once when a reused connection is closed without a response.
    assert short_retries.max_attempts <= sum(proxy.faults.values()) <= 2 * short_retries.max_attempts


def test_refused_connection_raises_user_error(folder: S3Path, short_retries: RetryPolicy) -> None:
    nowhere = S3Path.parse(f"s3://{folder.bucket}/object?endpoint_url=http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"could not be found in 5 attempts.*Could not connect"):
        nowhere.exists()


def test_missing_object_is_not_retried(folder: S3Path, proxy: FaultProxy, short_retries: RetryPolicy) -> None:
    with pytest.raises(FileNotFoundError, match="folder/nothing"):
        S3Object(proxy.to(folder / "nothing"), 10).read(0, 10)
    assert sum(proxy.requests.values()) == 1


def test_backoff_is_random_growing_and_bounded() -> None:
    policy = RetryPolicy()
    waits = [[policy.wait(failures) for _ in range(100)] for failures in range(1, policy.max_attempts)]
    assert len({wait for each in waits for wait in each}) == 100 * len(waits)
    for failures, each in enumerate(waits, start=1):
        longest = min(0.1 * 2 ** (failures - 1), 30.0)
        assert longest / 2 <= min(each) < max(each) <= longest
    assert sum(min(each) for each in waits) > 45
    assert sum(max(each) for each in waits) < 180
