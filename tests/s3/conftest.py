import os
import uuid
from collections.abc import Callable, Generator

import pytest

from tests.s3.ceph import s3_server
from tests.s3.proxy import FaultProxy, never
from vqd_scale.core import s3_client
from vqd_scale.core.s3 import S3Path
from vqd_scale.core.s3_client import RetryPolicy, client_of
from vqd_scale.core.s3_endpoint import S3Endpoint


@pytest.fixture(scope="session")
def server() -> Generator[str]:
    """URL of a real server, whose credentials are set for this process and its children."""
    with s3_server() as variables, pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        yield os.environ["AWS_ENDPOINT_URL"]


@pytest.fixture(scope="session")
def one_proxy(server: str) -> Generator[FaultProxy]:
    with FaultProxy(server) as running:
        yield running


@pytest.fixture
def proxy(one_proxy: FaultProxy) -> Generator[FaultProxy]:
    """The same server behind a proxy that makes requests fail by a plan."""
    yield one_proxy
    one_proxy.follow(never)


@pytest.fixture(scope="session")
def new_folder(server: str) -> Callable[[], S3Path]:
    """Function that creates an empty folder in a new bucket."""
    del server

    def make() -> S3Path:
        bucket = f"tests-{uuid.uuid4()}"
        client_of(S3Endpoint()).call_s3("create_bucket", Bucket=bucket)
        return S3Path(bucket, "some/folder")

    return make


@pytest.fixture
def folder(new_folder: Callable[[], S3Path]) -> S3Path:
    """Empty folder in a new bucket."""
    return new_folder()


@pytest.fixture
def short_retries(monkeypatch: pytest.MonkeyPatch) -> Generator[RetryPolicy]:
    """Retry policy with few and short waits."""
    policy = RetryPolicy(max_attempts=5, first_wait=0.001, max_wait=0.004, timeout=1.0)
    monkeypatch.setattr(s3_client, "RETRY_POLICY", policy)
    s3_client.cached_client.cache_clear()
    yield policy
    s3_client.cached_client.cache_clear()
