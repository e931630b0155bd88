"""What the tests of serving share: a small model that writes noise, and a server of it in this process, without Ray."""

import contextlib
import http.client
import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import torch
import uvicorn

from raychat.data.tokenizer import Tokenizer
from raychat.model import GPT, GPTConfig
from raychat.model.generation import Generator
from raychat.on_ray.batcher import Batcher
from raychat.on_ray.completions import Limits
from raychat.on_ray.endpoint import Access, Endpoint


def noisy_model(vocab_size: int, sequence_len: int = 256) -> GPT:
    """A model with random weights everywhere, so that every position has its say."""
    model = GPT(
        GPTConfig(
            sequence_len=sequence_len,
            vocab_size=vocab_size,
            n_layer=2,
            n_head=2,
            n_kv_head=1,
            n_embd=32,
            window_pattern="SL",
        )
    ).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for param in model.parameters():
            if not param.any() or param.numel() > 32:
                param.normal_(0, 0.3, generator=generator)
    return model


def batcher(tokenizer: Tokenizer, *, max_batch: int = 4, max_queue: int = 8) -> Batcher:
    """Generates with a small model, as a replica does. Close it."""
    special = set(tokenizer.special_tokens.values())
    return Batcher(
        Generator(noisy_model(tokenizer.vocab_size), never=special - {tokenizer.bos_id}),
        max_batch=max_batch,
        max_queue=max_queue,
        stop={tokenizer.bos_id},
    )


@contextlib.contextmanager
def serving(tokenizer: Tokenizer, access: Access | None = None, max_queue: int = 8) -> Iterator[int]:
    """A server on this machine for as long as the block runs; gives its port. The model is named `tiny`."""
    engine = batcher(tokenizer, max_queue=max_queue)
    limits = Limits(context=256, max_tokens=250, rows=4, vocab_size=tokenizer.vocab_size, body_bytes=10_000)
    endpoint = Endpoint(name="tiny", batcher=engine, tokenizer=tokenizer, limits=limits, access=access)
    server = uvicorn.Server(uvicorn.Config(endpoint.app(), port=0, log_level="critical", ws="none", lifespan="off"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()
        engine.close()


def ask(
    port: int, path: str = "/v1/completions", body: Any = None, headers: dict[str, str] | None = None
) -> tuple[int, Any, http.client.HTTPMessage]:
    """Status, content (parsed if it is JSON) and headers of an answer. A `body` that is no bytes is sent as JSON."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    with contextlib.closing(connection):
        raw = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        send = {"Content-Type": "application/json"} | (headers or {})
        connection.request("GET" if body is None else "POST", path, raw, send)
        answer = connection.getresponse()
        content = answer.read()
        kind = answer.headers.get_content_type()
        return answer.status, json.loads(content) if kind == "application/json" else content.decode(), answer.headers


def streamed(content: str) -> list[dict[str, Any]]:
    """The objects of an event stream that has come to its end."""
    *events, last, rest = content.split("\n\n")
    assert (last, rest) == ("data: [DONE]", "")
    return [json.loads(event.removeprefix("data: ")) for event in events]
