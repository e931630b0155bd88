"""A model behind Ray Serve: replicas that each hold it, batch what comes in, and answer as endpoint.py says."""

import contextlib
import errno
import hashlib
import io
import ipaddress
import json
import logging
import shlex
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
import torch
from ray import serve
from ray._private.state import actors

from raychat.checks import positive, require
from raychat.config import Config
from raychat.errors import ConfigError, RaychatError
from raychat.export.source import Source
from raychat.model.generation import Generator, cast_matrices_
from raychat.on_ray.batcher import Batcher
from raychat.on_ray.cluster import Cluster, connect
from raychat.on_ray.completions import Limits
from raychat.on_ray.endpoint import Access, Endpoint
from raychat.on_ray.shift import TELL_S
from raychat.on_ray.sizing import Patience
from raychat.progress import format_duration
from raychat.training.device import DTYPES, resolve

APP = "raychat"
REPLICA_NAMES = f"SERVE_REPLICA::{APP}#"  # how those of the actors begin
QUEUED_PER_ROW = 4  # rows that may wait for each one that is generated for
LOOK_EVERY_S = 5.0
SLOW_AFTER_S = 10.0  # a start that has not said anything yet
TICK_S = 0.2
HEALTH_EVERY_S = 2.0  # how soon a replica that died is noticed and replaced; Ray Serve's own choice is 10
STOP_WITHIN_S = 5.0  # requests that run when the server is stopped


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a model is served. Raises ConfigError for what cannot be, or would be open to the network without a key."""

    host: str = "127.0.0.1"
    """address to listen on; 0.0.0.0 is all of them"""
    port: int = 8000
    api_key: str = field(default="", repr=False)
    """what a client must bear; "": nothing, which a loopback address allows"""
    max_batch: int = 16
    """completions that one replica generates at once"""
    max_tokens: int = 1024
    """tokens of one completion"""
    num_replicas: int = 1
    """processes that hold the model"""
    device_type: str = ""
    """cuda, cpu or mps; "": cuda where the cluster has GPUs, else cpu"""
    dtype: str = "auto"
    """precision: bfloat16, float32, float16, or auto: the run's, or what suits the device"""
    address: str = ""
    """Ray cluster, host:port; "": a new one on this machine"""

    def __post_init__(self) -> None:
        positive(self, "max_batch", "max_tokens", "num_replicas")
        require(0 < self.port < 2**16, f"--port must be from 1 to 65535, got {self.port}.")
        require(self.dtype in ("auto", *DTYPES), f"--dtype {self.dtype!r} is unknown: use auto, {', '.join(DTYPES)}.")
        require(
            self.device_type in ("", "cuda", "cpu", "mps"),
            f"--device-type {self.device_type!r} is unknown: use cuda, cpu or mps, or leave it out.",
        )
        require(
            self.api_key.isascii() and self.api_key.isprintable() and " " not in self.api_key,
            "The API key holds spaces, line ends or other characters that no HTTP header carries: use letters and digits.",
        )
        require(
            bool(self.api_key) or self.is_loopback,
            f"--host {self.host} is open to the network, and no API key is set. Set one with --api-key-file FILE or in "
            "RAYCHAT_API_KEY (python -c 'import secrets; print(secrets.token_urlsafe())' makes one), or leave --host out "
            "to serve this machine only.",
        )

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        try:
            return self.host == "localhost" or ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    @property
    def url(self) -> str:
        """Where a client finds the server."""
        host = socket.gethostname() if self.host in ("0.0.0.0", "::") else self.host
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}"

    def access(self) -> Access:
        """Who is served."""
        if self.api_key:  # its digest is enough, and all that Ray gets to see
            return Access(key_sha256=hashlib.sha256(self.api_key.encode()).hexdigest())
        return Access(hosts=frozenset({self.host, "localhost", "127.0.0.1", "::1"}))


@dataclass(frozen=True, kw_only=True)
class Part:
    """What a replica is told. It travels through Ray, so the key is not in it."""

    source: Source
    device_type: str
    dtype: str
    max_batch: int
    max_tokens: int
    replicas: int
    access: Access


class Replica:
    """One process that holds the model. Ray Serve makes it, asks for its application, and replaces it if it fails."""

    def __init__(self, part: Part) -> None:
        config = Config.from_flat({"device_type": part.device_type})
        torch.set_num_threads(resolve(config, local_world_size=part.replicas).threads)  # Ray's choice is one
        loaded = part.source.load(torch.device(part.device_type), DTYPES.get(part.dtype))
        cast_matrices_(loaded.model)
        shapes, tokenizer = loaded.model.config, loaded.tokenizer
        special = set(tokenizer.special_tokens.values())
        self._batcher = Batcher(
            Generator(loaded.model, never=special - {tokenizer.bos_id}),
            max_batch=part.max_batch,
            max_queue=QUEUED_PER_ROW * part.max_batch,
            stop={tokenizer.bos_id},  # the beginning of another document
        )
        limits = Limits(
            context=shapes.sequence_len,
            max_tokens=min(part.max_tokens, shapes.sequence_len - 1),
            rows=part.max_batch,
            vocab_size=min(shapes.vocab_size, tokenizer.vocab_size),
        )
        self._endpoint = Endpoint(
            name=part.source.name, batcher=self._batcher, tokenizer=tokenizer, limits=limits, access=part.access
        )

    def __serve_build_asgi_app__(self) -> Any:
        return self._endpoint.app()

    def check_health(self) -> None:
        """Raise when this replica can serve no more."""
        self._batcher.check()


def run(source: Source, settings: Settings, *, key_hint: str = "", echo: Callable[[str], None]) -> None:
    """Serve `source` until interrupted. `key_hint`: how a shell gets at the key.

    Raises:
        ConfigError: no such cluster, the port is taken, Serve runs there already, or too few GPUs.
        RaychatError: the model cannot be loaded.
    """
    cluster_config = Config.from_flat({"address": settings.address, "num_workers": settings.num_replicas})
    try:
        with contextlib.ExitStack() as stack:
            cluster = stack.enter_context(connect(cluster_config, echo=echo))
            signal.signal(signal.SIGTERM, signal.default_int_handler)  # Ray's own would leave everything behind
            stack.enter_context(served(source, settings, cluster, echo=echo))
            step = "" if source.step is None else f", step {source.step:,}"
            echo(f"serving {source.name}{step}: {settings.url}/ (Ctrl-C stops)")
            echo(curl_line(source, settings, key_hint))
            _watch(echo)
    except KeyboardInterrupt:
        echo("stopped")


@contextlib.contextmanager
def served(source: Source, settings: Settings, cluster: Cluster, *, echo: Callable[[str], None]) -> Iterator[None]:
    """Serve `source` on the cluster that this process is connected to, for as long as the block runs.

    Raises:
        ConfigError: the port is taken, Serve runs there already, or too few GPUs.
        RaychatError: the model cannot be loaded.
    """
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    device_type = settings.device_type or ("cuda" if cluster.gpus else "cpu")
    if device_type == "cuda":
        require(
            cluster.gpus >= settings.num_replicas,
            f"--num-replicas {settings.num_replicas} on cuda need a GPU each, and the cluster has {cluster.gpus}: lower "
            "it, or use --device-type cpu.",
        )
    status = serve.status()
    require(
        not (status.proxies or status.applications),
        "Ray Serve runs on this cluster already, and its address and port cannot be changed while it does: leave "
        "--address out to serve from a cluster of its own, or end it with `serve shutdown`.",
    )
    check_port(settings, local=cluster.started_here)
    part = Part(
        source=source,
        device_type=device_type,
        dtype=settings.dtype,
        max_batch=settings.max_batch,
        max_tokens=settings.max_tokens,
        replicas=settings.num_replicas,
        access=settings.access(),
    )
    echo(f"loading {source.place} on {settings.num_replicas} x {device_type}")
    try:
        with _telling(part, echo):
            _start(part, settings)
        yield
    finally:
        # Ray prints that the controller, which ends itself, cannot be asked again to do so.
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            serve.shutdown()


def curl_line(source: Source, settings: Settings, key_hint: str) -> str:
    """A request that works when it is pasted into a shell."""
    bearer = f' -H "Authorization: Bearer {key_hint}"' if settings.api_key else ""
    tokens = min(32, settings.max_tokens, source.gpt_config.sequence_len // 2)
    body = shlex.quote(json.dumps({"model": source.name, "prompt": "The", "max_tokens": tokens}))
    return f"curl {settings.url}/v1/completions -H 'Content-Type: application/json'{bearer} -d {body}"


def read_key(file: Path) -> str:
    """The API key in `file`."""
    try:
        key = file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--api-key-file {file} cannot be read: {error}. Give a file with the key in it.") from None
    require(bool(key), f"--api-key-file {file} is empty: write the key into it.")
    return key


def _start(part: Part, settings: Settings) -> None:
    as_deployment = serve.deployment(
        name=APP,
        num_replicas=part.replicas,
        ray_actor_options={"num_cpus": 1, "num_gpus": int(part.device_type == "cuda")},
        # The replica says itself when it is full (429): what Serve held back would wait without an answer.
        max_ongoing_requests=2 * (1 + QUEUED_PER_ROW) * part.max_batch + 100,
        health_check_period_s=HEALTH_EVERY_S,
        graceful_shutdown_timeout_s=STOP_WITHIN_S,
        graceful_shutdown_wait_loop_s=0.1,  # it waits that long also when no request runs
        max_constructor_retry_count=1,
    )
    replicas = as_deployment(serve.ingress()(Replica))
    logs = {"log_level": "WARNING", "enable_access_log": False}
    try:
        serve.start(
            proxy_location="HeadOnly",
            http_options={"host": settings.host, "port": settings.port},
            logging_config=logs,
        )
        serve.run(replicas.bind(part), name=APP, route_prefix="/", logging_config=logs)
    except RuntimeError as error:
        raise _explained(error, part, settings) from error


@contextlib.contextmanager
def _telling(part: Part, echo: Callable[[str], None]) -> Iterator[None]:
    """Say now and then what the start in this block waits for: Ray Serve itself waits in silence."""
    over, patience = threading.Event(), Patience(TELL_S, first_s=SLOW_AFTER_S)

    def tell() -> None:
        # Whatever is wrong here, with the terminal or the cluster, the start itself runs into and says it better.
        with contextlib.suppress(Exception):
            while not over.wait(TICK_S):
                if patience.due():
                    echo(_waiting_line(part, patience.waited_s))

    thread = threading.Thread(target=tell, name="telling")
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _waiting_line(part: Part, waited_s: float) -> str:
    begun: dict[str, Any] = actors(actor_state_name="ALIVE")
    missing = part.replicas - sum(actor["Name"].startswith(REPLICA_NAMES) for actor in begun.values())
    since = format_duration(waited_s)
    kinds = ("CPU", "GPU") if part.device_type == "cuda" else ("CPU",)
    free = ray.available_resources()
    if missing <= 0 or all(free.get(kind, 0) >= 1 for kind in kinds):
        return f"the model is being loaded, since {since}"
    return (
        f"waiting for room for {missing} of {part.replicas} replicas, since {since}: each needs "
        f"{' and '.join(f'1 {kind}' for kind in kinds)}, and the cluster has "
        f"{' and '.join(f'{free.get(kind, 0):g} {kind}s' for kind in kinds)} free"
    )


def _explained(error: RuntimeError, part: Part, settings: Settings) -> Exception:
    """The user's mistake in an error of Ray Serve, or that error."""
    app = serve.status().applications.get(APP)
    told = [str(error)] + ([deployment.message for deployment in app.deployments.values()] if app else [])
    lines = "\n".join(told).splitlines()
    if any("Failed to bind" in line for line in lines):
        return ConfigError(
            f"Port {settings.port} cannot be had at {settings.host} on the head node: give another --port."
        )
    names = [kind.__name__ for kind in (RaychatError, *RaychatError.__subclasses__())]
    mistakes = [line for line in lines if any(f"{name}: " in line for name in names)]
    if mistakes:
        return RaychatError(f"{part.source.place} cannot be served: {mistakes[-1].partition('Error: ')[2]}")
    return RuntimeError("\n".join(lines))


def check_port(settings: Settings, *, local: bool) -> None:
    """Refuse a port that is taken on this machine, if the server is to run here: two could share it, unnoticed."""
    head = ray.get_runtime_context().gcs_address.rpartition(":")[0]
    if not local and head not in (ray.util.get_node_ip_address(), "127.0.0.1"):
        return
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections of the last server may linger
        try:
            probe.bind((settings.host, settings.port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise ConfigError(
                    f"Port {settings.port} is in use: give another --port, for example {settings.port + 1}."
                ) from None
            raise ConfigError(
                f"--host {settings.host} --port {settings.port}: this machine cannot listen there ({error.strerror}). "
                "Use 127.0.0.1, or an address of this machine and a port above 1023."
            ) from None


def _watch(echo: Callable[[str], None]) -> None:
    """Say when the state of the application changes, without end."""
    last = "RUNNING"
    while True:
        time.sleep(LOOK_EVERY_S)
        app = serve.status().applications.get(APP)
        state = app.status if app else "gone"
        if state != last:
            echo(f"the server is {state}" + (f": {app.message}" if app and app.message else ""))
        last = state
