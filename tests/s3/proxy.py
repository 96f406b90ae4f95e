"""An HTTP proxy on 127.0.0.1 that injects faults of networks and stores by a plan."""

import http.client
import socket
import struct
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Literal
from urllib.parse import urlsplit

from vqd_scale.core.s3 import S3Path
from vqd_scale.core.s3_endpoint import S3Endpoint

STALL_SECONDS = 60
SLOW_DOWN = (
    b'<?xml version="1.0" encoding="UTF-8"?><Error><Code>SlowDown</Code>'
    b"<Message>Please reduce your request rate.</Message></Error>"
)


FaultKind = Literal["reset", "close", "truncate", "stall", "500", "503", "corrupt"]


@dataclass(frozen=True)
class Fault:
    """Fault of one request.

    Attributes:
        kind: ``reset`` and ``close`` end the connection, with and without an error; ``stall`` sends no more;
            ``truncate`` sends a part as if it were all; ``500`` and ``503`` respond with SlowDown;
            ``corrupt`` changes the first byte of the request's body.
        after: How many bytes of the body are sent before; at 0, not even a status, but for ``truncate``.
    """

    kind: FaultKind
    after: int = 0


Plan = Callable[[str, str, int], Fault | None]
"""From a method, a path and how many such requests came before, to what goes wrong with this one."""


def never(method: str, path: str, turn: int) -> Fault | None:
    """Return no fault."""
    del method, path, turn


def in_turn(faults: Sequence[Fault | None], ending: str = "") -> Plan:
    """Return a plan for the first GETs of every object with this name ending, one fault each."""

    def plan(method: str, path: str, turn: int) -> Fault | None:
        return faults[turn] if method == "GET" and path.endswith(ending) and turn < len(faults) else None

    return plan


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, request: object, client_address: object) -> None:
        """Ignore disconnected clients, which the tests provoke."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]


class FaultProxy:
    """Fault-injecting proxy for the duration of a context; a new `plan` restarts the counts.

    Args:
        upstream: URL of the real server.
    """

    def __init__(self, upstream: str) -> None:
        self.upstream = urlsplit(upstream).netloc
        self.faults = Counter[str]()
        self.requests = Counter[tuple[str, str]]()
        self.released = threading.Event()
        self._plan: Plan = never
        self._lock = threading.Lock()
        self._server = _Server(("127.0.0.1", 0), self._handler())
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    @property
    def url(self) -> str:
        """Address for clients."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> "FaultProxy":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.released.set()
        self._server.shutdown()
        self._server.server_close()

    def to(self, path: S3Path) -> S3Path:
        """Return the same object through the proxy."""
        return replace(path, endpoint=S3Endpoint(endpoint_url=self.url))

    def follow(self, plan: Plan) -> None:
        """Use this plan from now on."""
        with self._lock:
            self._plan = plan
            self.requests.clear()
            self.faults.clear()

    def next_fault(self, method: str, path: str) -> Fault | None:
        """Return the planned fault of a new request."""
        with self._lock:
            fault = self._plan(method, path, self.requests[method, path])
            self.requests[method, path] += 1
            if fault is not None:
                self.faults[fault.kind] += 1
            return fault

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def forward(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                fault = proxy.next_fault(self.command, urlsplit(self.path).path)
                if fault is not None and fault.kind in ("500", "503"):
                    self._answer(int(fault.kind), {"Content-Length": str(len(SLOW_DOWN))}, [SLOW_DOWN])
                    return
                if fault is not None and fault.kind == "corrupt":
                    fault, body = None, bytes([body[0] ^ 1]) + body[1:]
                upstream = http.client.HTTPConnection(proxy.upstream)
                headers = {name: value for name, value in self.headers.items() if name.lower() != "expect"}
                upstream.request(self.command, self.path, body or None, headers)
                response = upstream.getresponse()
                if fault is not None and fault.after == 0 and fault.kind != "truncate":
                    self._break_off(fault)
                else:
                    self._relay(response, fault)
                upstream.close()

            do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = forward

            def _relay(self, response: http.client.HTTPResponse, fault: Fault | None) -> None:
                headers = {
                    name: value
                    for name, value in response.getheaders()
                    if name.lower() not in ("connection", "transfer-encoding")
                }
                if response.chunked:
                    body = response.read()
                    headers["Content-Length"] = str(len(body))
                    blocks = [body]
                elif fault is None:
                    blocks = iter(lambda: response.read(1 << 16), b"")
                else:
                    blocks = [response.read(fault.after)]
                if fault is not None and fault.kind == "truncate":
                    headers["Content-Length"] = str(min(fault.after, int(headers["Content-Length"])))
                self._answer(response.status, headers, blocks)
                if fault is not None and fault.kind != "truncate":
                    self._break_off(fault)

            def _answer(self, status: int, headers: dict[str, str], blocks: Iterable[bytes]) -> None:
                self.send_response_only(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command != "HEAD":
                    for block in blocks:
                        self.wfile.write(block)
                self.wfile.flush()

            def _break_off(self, fault: Fault) -> None:
                self.close_connection = True
                if fault.kind == "stall":
                    proxy.released.wait(STALL_SECONDS)
                if fault.kind == "reset":
                    # A close with zero linger time sends a reset instead of an end.
                    linger = struct.pack("ii", 1, 0)
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                    self.connection.close()

            def log_message(self, format: str, *args: object) -> None:
                del format, args

        return Handler
