"""A real S3 protocol server for tests: moto's, as a process of its own on a free port of the loopback interface."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.error import URLError
from urllib.request import Request, urlopen

START_S = 60.0
CUT = -1  # instead of a status: the connection breaks

Fault = Callable[[str, str], int | None]
"""Of a request's method and path: the status that it fails with, CUT, or None to pass it on. It may also wait."""


@dataclass(frozen=True)
class S3Server:
    """Where the server listens. It takes any credentials; these are in `uri`, so that tests need no environment."""

    port: int
    pid: int

    def make_bucket(self, name: str) -> None:
        """Buckets must exist before something is written to them, as on the real service."""
        urlopen(Request(f"http://127.0.0.1:{self.port}/{name}", method="PUT"), timeout=30).close()

    def uri(self, path: str, *, port: int | None = None) -> str:
        """URI of `path`, which begins with the bucket; through another port when a proxy stands before the server."""
        return f"s3://user:hidden@{path}?endpoint_override=http://127.0.0.1:{port or self.port}&region=us-east-1"

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """The server accepts connections and does not answer."""
        os.kill(self.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(self.pid, signal.SIGCONT)


def free_port() -> int:
    """A port of the loopback interface that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@contextmanager
def s3_server() -> Iterator[S3Server]:
    """A server with no buckets, which ends with the block."""
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait_until_up(process, port)
        yield S3Server(port, process.pid)
    finally:
        process.kill()
        process.wait()


def _wait_until_up(process: subprocess.Popen, port: int) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"the S3 server ended with code {process.returncode}: is moto installed?")
        try:
            urlopen(f"http://127.0.0.1:{port}/", timeout=5).close()
            return
        except (URLError, ConnectionError):
            time.sleep(0.05)
    raise TimeoutError(f"the S3 server did not answer within {START_S:.0f} s")


@contextmanager
def proxy(server: S3Server, fault: Fault) -> Iterator[int]:
    """A port that passes requests on to `server`, but for those that `fault` fails."""
    handler = type("Handler", (_Forward,), {"server_port": server.port, "fault": staticmethod(fault)})
    front = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    front.handle_error = lambda *_: None  # ty: ignore  a client that hung up is what some tests are about
    thread = threading.Thread(target=front.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield front.server_address[1]
    finally:
        front.shutdown()
        thread.join()
        front.server_close()


class _Forward(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_port: int
    fault: Fault

    def handle_one_request(self) -> None:
        self.raw_requestline = self.rfile.readline(65537)
        if not self.raw_requestline or not self.parse_request():
            self.close_connection = True
            return
        status = self.fault(self.command, self.path)
        if status == CUT:
            self.close_connection = True
            return
        body = self._body()
        if status is not None:
            self._answer(status, {}, b"")
            return
        back = HTTPConnection("127.0.0.1", self.server_port, timeout=60)
        try:
            skipped = ("transfer-encoding", "content-length", "connection")
            headers = {name: value for name, value in self.headers.items() if name.lower() not in skipped}
            back.request(self.command, self.path, body, headers | {"Content-Length": str(len(body))})
            answer = back.getresponse()
            self._answer(answer.status, dict(answer.getheaders()), answer.read())
        finally:
            back.close()

    def _body(self) -> bytes:
        if self.headers.get("Expect", "").lower() == "100-continue":
            self.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        return b"".join(parts)

    def _answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                self.send_header(name, value)
        length = headers.get("Content-Length", "0") if self.command == "HEAD" else str(len(body))
        self.send_header("Content-Length", length)
        self.end_headers()
        self.wfile.write(body)
