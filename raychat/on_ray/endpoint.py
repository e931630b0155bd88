"""The web application of one model: requests come in, rows go to the batcher, answers go out. It knows nothing of Ray.

GET  /                  a page to try the model
GET  /health            what the server does
GET  /v1/models         the one model there is
POST /v1/completions    completions.py says what may be asked
"""

import asyncio
import contextlib
import dataclasses
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any, TypeAlias

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from raychat.data.tokenizer import Tokenizer
from raychat.model.generation import Sampling
from raychat.on_ray import completions
from raychat.on_ray.batcher import Batcher, End, QueueFullError, Row
from raychat.on_ray.completions import Answer, CompletionRequest, FinishReason, Limits, RequestError, Usage
from raychat.on_ray.text_stream import TextStream

Handler: TypeAlias = Callable[[Request], Coroutine[Any, Any, Response]]

RETRY_AFTER_S = 1
PAGE = Path(__file__).with_name("serving_page.html")
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Access:
    """Who is served. The page and `/health` are open to whoever reaches the server."""

    key_sha256: str = ""
    """digest of the API key; "": none is needed"""
    hosts: frozenset[str] = frozenset()
    """names that a request may call the server by; empty: any. Keeps web sites that point a name of theirs at this
    machine from using a server without a key through a visitor's browser"""

    def check(self, request: Request) -> None:
        """Refuse who is not served."""
        if self.hosts and (request.url.hostname or "") not in self.hosts:
            raise RequestError(403, f"This server does not go by the name {request.url.hostname!r}.", code="wrong_host")
        completions.authorize(request.headers.get("authorization"), self.key_sha256)


class Endpoint:
    """Answers requests to the model `name` with what `batcher` generates."""

    def __init__(
        self, *, name: str, batcher: Batcher, tokenizer: Tokenizer, limits: Limits, access: Access | None = None
    ) -> None:
        self._name, self._batcher, self._tokenizer, self._limits = name, batcher, tokenizer, limits
        self._access = access or Access()
        self._since = int(time.time())

    def app(self) -> Starlette:
        """The application."""
        routes = [
            Route("/", self._page),
            Route("/health", self._health),
            Route("/v1/models", self._guarded(self._models)),
            Route("/v1/models/{name:path}", self._guarded(self._model)),
            Route("/v1/completions", self._guarded(self._completions), methods=["POST"]),
        ]
        handlers: dict[Any, Any] = {RequestError: _refused, HTTPException: _not_there, Exception: _failed}
        return Starlette(routes=routes, exception_handlers=handlers)

    def _guarded(self, handler: Handler) -> Handler:
        async def guarded(request: Request) -> Response:
            self._access.check(request)
            return await handler(request)

        return guarded

    async def _page(self, request: Request) -> Response:
        return HTMLResponse(PAGE.read_text(encoding="utf-8"), headers=PAGE_HEADERS)

    async def _health(self, request: Request) -> Response:
        try:
            self._batcher.check()
        except RuntimeError:
            return _json({"status": "failed"}, 503)
        return _json({"status": "ok", "model": self._name} | dataclasses.asdict(self._batcher.load()))

    async def _models(self, request: Request) -> Response:
        return _json(
            {"object": "list", "data": [completions.model_object(self._name, self._since, self._limits)]},
        )

    async def _model(self, request: Request) -> Response:
        asked = request.path_params["name"]
        if asked != self._name:
            raise RequestError(404, f"There is no model {asked!r} here: this server has {self._name!r}.", param="model")
        return _json(completions.model_object(self._name, self._since, self._limits))

    async def _completions(self, request: Request) -> Response:
        asked = completions.parse_completion(await _body(request, self._limits.body_bytes), self._name, self._limits)
        prompts = await asyncio.to_thread(self._token_ids, asked)
        completions.check_lengths(prompts, asked.max_tokens, self._limits)
        run = _Run(asked, prompts, self._tokenizer, self._batcher)
        answer = Answer(
            id=f"cmpl-{secrets.token_hex(12)}",
            model=self._name,
            created=int(time.time()),
            streamed_usage=asked.include_usage,
        )
        if asked.stream:
            return _EventStream(run, answer)
        try:
            return _json(await run.whole(answer))
        finally:
            run.close()

    def _token_ids(self, asked: CompletionRequest) -> list[list[int]]:
        bos, encode = self._tokenizer.bos_id, self._tokenizer.encode
        return [[bos, *encode(prompt)] if isinstance(prompt, str) else list(prompt) for prompt in asked.prompts]


class _Run:
    """One request, as it is served. It must be closed, however it ends."""

    def __init__(
        self, asked: CompletionRequest, prompts: list[list[int]], tokenizer: Tokenizer, batcher: Batcher
    ) -> None:
        self.asked = asked
        self.usage = Usage(sum(map(len, prompts)))
        self._tokenizer, self._batcher = tokenizer, batcher
        self._heard: asyncio.Queue[tuple[int, int | None, End | None]] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self._prompts = [prompt for prompt in prompts for _ in range(asked.n)]  # of every completion
        self._streams = [TextStream(asked.stop) for _ in self._prompts]
        seed = secrets.randbits(62) if asked.seed is None else asked.seed
        self._rows = [
            Row(
                prompt=prompt,
                max_tokens=asked.max_tokens,
                # Not of the place in the list of prompts: a prompt gets the answer it would get alone.
                sampling=Sampling(
                    temperature=asked.temperature, top_k=asked.top_k, top_p=asked.top_p, seed=seed + index % asked.n
                ),
                deliver=self._hear(index),
            )
            for index, prompt in enumerate(self._prompts)
        ]
        try:
            batcher.submit(self._rows)
        except QueueFullError:
            raise completions.too_busy(batcher.load().waiting, RETRY_AFTER_S) from None

    def close(self) -> None:
        """Free the rows that are still generated for."""
        self._batcher.leave(self._rows)

    async def pieces(self) -> AsyncIterator[tuple[int, str, FinishReason | None]]:
        """Index of a completion, the text it goes on with, and the reason if it ends there."""
        if self.asked.echo:
            for index, prompt in enumerate(self._prompts):
                yield index, self._text(prompt), None
        going = set(range(len(self._rows)))
        while going:
            index, token, end = await self._heard.get()
            if index not in going:
                continue
            if isinstance(end, Exception):
                log.error("a completion failed", exc_info=end)
                raise RequestError(500, "The server failed while it generated. Try again.")
            text, reason = self._advance(index, token, end)
            if reason:
                going.remove(index)
            if text or reason:
                yield index, text, reason

    async def whole(self, answer: Answer) -> dict[str, Any]:
        """The answer in one piece."""
        texts = [""] * len(self._rows)
        reasons: list[FinishReason] = ["length"] * len(self._rows)
        async for index, text, reason in self.pieces():
            texts[index] += text
            reasons[index] = reason or reasons[index]
        return answer.whole(texts, reasons, self.usage)

    async def events(self, answer: Answer) -> AsyncIterator[bytes]:
        """The answer as server-sent events."""
        try:
            async for index, text, reason in self.pieces():
                yield completions.event(answer.part(index, text, reason))
        except RequestError as refusal:  # too late for a status
            yield completions.event(refusal.body())
            return
        if answer.streamed_usage:
            yield completions.event(answer.usage_part(self.usage))
        yield completions.LAST_EVENT

    def _advance(self, index: int, token: int | None, end: FinishReason | None) -> tuple[str, FinishReason | None]:
        stream, text = self._streams[index], ""
        if token is not None:
            self.usage.completion_tokens += 1
            text = stream.push(self._tokenizer.decode_bytes([token]))
        if end:
            text += stream.finish()
        if stream.stopped:
            if not end:
                self._batcher.leave([self._rows[index]])
            end = "stop"
        return text, end

    def _text(self, prompt: list[int]) -> str:
        return self._tokenizer.decode(prompt[1:] if prompt[0] == self._tokenizer.bos_id else prompt)

    def _hear(self, index: int) -> Callable[[int | None, End | None], None]:
        def deliver(token: int | None, end: End | None) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: the server stops, and nobody listens
                self._loop.call_soon_threadsafe(self._heard.put_nowait, (index, token, end))

        return deliver


class _EventStream(StreamingResponse):
    """The events of a run. When the client goes away, its rows become free, even before the first event."""

    def __init__(self, run: _Run, answer: Answer) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(run.events(answer), media_type="text/event-stream", headers=headers)
        self._run = run

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._run.close()


async def _body(request: Request, most: int) -> bytes:
    """The body of a request in JSON, read no further than `most` bytes."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # which no web site can send here from a visitor's browser
        raise RequestError(415, f"The request must be of Content-Type application/json, not {kind or 'without one'!r}.")
    announced = request.headers.get("content-length", "")
    body = bytearray()
    if not announced.isdecimal() or int(announced) <= most:
        async for chunk in request.stream():
            body += chunk
            if len(body) > most:
                break
        else:
            return bytes(body)
    raise RequestError(413, f"The request is larger than {most:,} bytes.")


def _json(value: dict[str, Any], status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(completions.as_json(value), status, headers, "application/json")


async def _refused(request: Request, refusal: RequestError) -> Response:
    return _json(refusal.body(), refusal.status, refusal.headers)


async def _not_there(request: Request, error: HTTPException) -> Response:
    refusal = RequestError(error.status_code, f"{request.method} {request.url.path}: {error.detail}.")
    return _json(refusal.body(), error.status_code, dict(error.headers or {}))


async def _failed(request: Request, error: Exception) -> Response:
    return _json(RequestError(500, "The server failed. Its log says why.").body(), 500)
