import json
from pathlib import Path

import pytest
from benchmarks import main as benchmark
from benchmarks.s3 import S3Problem, benchmark_s3

from vqd_scale.core.errors import UserError
from vqd_scale.core.s3_client import S3Endpoint

pytestmark = pytest.mark.s3

SMALL = S3Problem(shards=2, samples=24, picture_bytes=50_000, lanes=4, shuffle_window=4)


def test_all_sides_read_the_same_and_nothing_is_left(server: str) -> None:
    del server
    before = S3Endpoint().waited(S3Endpoint().call("list_buckets"))["Buckets"]
    figures = benchmark_s3(1, SMALL)
    assert figures["megabytes_in_members"] == pytest.approx(2.4, abs=0.1)
    assert {"ours", "samples_in_lanes", "alternative", "library", "ratio", "memory_ratio"} <= figures.keys()
    assert json.loads(json.dumps(figures)) == figures
    assert S3Endpoint().waited(S3Endpoint().call("list_buckets"))["Buckets"] == before


def test_without_a_store(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    with pytest.raises(UserError, match="set AWS_ENDPOINT_URL"):
        benchmark_s3(1, SMALL)
    with pytest.raises(SystemExit):
        benchmark.main(["s3", "--json", str(tmp_path / "s3.json")])
    assert "set AWS_ENDPOINT_URL" in capsys.readouterr().err
