"""The protocol of `/v1/completions`, as OpenAI's clients speak it: what may be asked, refusals, and the answers.

Everything here is a function of its arguments: no model, no server, no clock. Fields that change nothing are accepted
(`user`), fields that would be ignored to the client's harm are refused.
"""

import hashlib
import hmac
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from raychat.checks import did_you_mean

FinishReason: TypeAlias = Literal["stop", "length"]
Prompt: TypeAlias = str | tuple[int, ...]

DEFAULT_MAX_TOKENS = 16  # as OpenAI's
MOST_STOPS = 4  # as OpenAI's
MOST_STOP_CHARS = 256  # text that may have to be held back from a stream
TEMPERATURES = (0.0, 2.0)
SEEDS = (-(2**63), 2**63 - 1)
# Fields that OpenAI knows and this server does not: the value that asks for nothing, besides null.
UNSUPPORTED: dict[str, Any] = {
    "logprobs": None,
    "suffix": None,
    "best_of": 1,
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "logit_bias": {},
}
FIELDS = frozenset(
    ("model", "prompt", "max_tokens", "temperature", "top_p", "top_k", "n", "stop", "seed", "stream", "stream_options")
    + ("echo", "user")
)


class RequestError(Exception):
    """A request that is not served: the HTTP status, and the error object that OpenAI's clients show."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers: dict[str, str] = {}

    def body(self) -> dict[str, Any]:
        """The JSON of the answer."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        kind = "rate_limit_error" if self.status == 429 else kind
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def too_busy(waiting: int, retry_after_s: int) -> RequestError:
    """All rows are taken and the queue is full."""
    refusal = RequestError(
        429,
        f"The server is busy: {waiting} completions wait already. Try again in {retry_after_s} s.",
        code="rate_limit_exceeded",
    )
    refusal.headers["Retry-After"] = str(retry_after_s)
    return refusal


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one request may ask for."""

    context: int
    """tokens of prompt and completion together"""
    max_tokens: int
    """tokens of one completion"""
    rows: int
    """completions: prompts times n"""
    vocab_size: int
    """ids of tokens are below it"""
    body_bytes: int = 2**20
    """size of the request"""


@dataclass(frozen=True, kw_only=True)
class CompletionRequest:
    """What a client asked for, checked but for the length of its prompts, which only a tokenizer knows."""

    prompts: tuple[Prompt, ...]
    max_tokens: int = DEFAULT_MAX_TOKENS
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None
    n: int = 1
    stop: tuple[str, ...] = ()
    seed: int | None = None
    stream: bool = False
    include_usage: bool = False
    echo: bool = False


def parse_completion(body: bytes, model: str, limits: Limits) -> CompletionRequest:
    """The request in `body`, for the one `model` there is.

    Raises:
        RequestError: 400 with the field in `param`, or 404 for another model.
    """
    values = _json_object(body)
    _check_model(values, model)
    _check_names(values)
    given = _Given(values)
    n = given.integer("n", 1, least=1, most=limits.rows)
    prompts = _prompts(values.get("prompt"), limits)
    if len(prompts) * n > limits.rows:
        raise RequestError(
            400,
            f"{len(prompts)} prompts x n={n} are {len(prompts) * n} completions: at most {limits.rows} go into one request.",
            param="prompt" if n == 1 else "n",
        )
    options = values.get("stream_options")
    return CompletionRequest(
        prompts=prompts,
        max_tokens=given.integer("max_tokens", min(DEFAULT_MAX_TOKENS, limits.max_tokens), 1, limits.max_tokens),
        temperature=given.number("temperature", 1.0, *TEMPERATURES),
        top_p=given.top_p(),
        top_k=given.integer("top_k", 0, least=1, most=2**31 - 1) or None,
        n=n,
        stop=_stops(values.get("stop")),
        seed=given.integer("seed", 0, *SEEDS) if values.get("seed") is not None else None,
        stream=given.boolean("stream"),
        include_usage=_Given(options, "stream_options.").boolean("include_usage") if options is not None else False,
        echo=given.boolean("echo"),
    )


def check_lengths(prompts: Sequence[Sequence[int]], max_tokens: int, limits: Limits) -> None:
    """Refuse prompts of token ids that leave no room for `max_tokens` more."""
    longest = max(map(len, prompts))
    if longest + max_tokens > limits.context:
        raise RequestError(
            400,
            f"This model's context is {limits.context:,} tokens, and {longest + max_tokens:,} were asked for: {longest:,} of "
            f"the prompt (its beginning counts as one) and max_tokens={max_tokens:,}. Shorten the prompt or lower max_tokens.",
            param="prompt" if longest >= limits.context else "max_tokens",
            code="context_length_exceeded",
        )


def authorize(header: str | None, key_sha256: str) -> None:
    """Refuse with 401 unless the Authorization `header` bears the key of this digest ("": no key is needed)."""
    if not key_sha256:
        return
    scheme, _, key = (header or "").partition(" ")
    digest = hashlib.sha256(key.strip().encode()).hexdigest()
    if scheme.lower() != "bearer" or not hmac.compare_digest(digest, key_sha256):
        refusal = RequestError(
            401,
            "This server wants an API key: send `Authorization: Bearer KEY`."
            if not header
            else "This is not the API key of this server.",
            code="invalid_api_key",
        )
        refusal.headers["WWW-Authenticate"] = "Bearer"
        raise refusal


@dataclass
class Usage:
    """Tokens of a request so far."""

    prompt_tokens: int
    completion_tokens: int = 0

    def body(self) -> dict[str, int]:
        """As in an answer."""
        total = self.prompt_tokens + self.completion_tokens
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": total,
        }


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What all parts of an answer have in common. `created`: seconds since 1970."""

    id: str
    model: str
    created: int
    streamed_usage: bool = field(default=False)

    def whole(self, texts: Sequence[str], reasons: Sequence[FinishReason], usage: Usage) -> dict[str, Any]:
        """The answer in one piece."""
        choices = [_choice(index, *choice) for index, choice in enumerate(zip(texts, reasons, strict=True))]
        return self._object(choices) | {"usage": usage.body()}

    def part(self, index: int, text: str, reason: FinishReason | None) -> dict[str, Any]:
        """A piece of one completion, or its end."""
        return self._object([_choice(index, text, reason)]) | ({"usage": None} if self.streamed_usage else {})

    def usage_part(self, usage: Usage) -> dict[str, Any]:
        """The last piece of a stream whose client asked for it."""
        return self._object([]) | {"usage": usage.body()}

    def _object(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }


def as_json(value: Mapping[str, Any]) -> bytes:
    """`value` as UTF-8; half characters that a request smuggled in (lone surrogates) become question marks."""
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "replace")


def event(value: Mapping[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + as_json(value) + b"\n\n"


LAST_EVENT = b"data: [DONE]\n\n"


def model_object(name: str, created: int, limits: Limits) -> dict[str, Any]:
    """An entry of `/v1/models`; `max_model_len` and `max_tokens` are this server's own."""
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "raychat",
        "max_model_len": limits.context,
        "max_tokens": limits.max_tokens,
    }


def _choice(index: int, text: str, reason: FinishReason | None) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": None, "finish_reason": reason}


def _json_object(body: bytes) -> dict[str, Any]:
    try:
        values = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RequestError(400, f"The body of the request is not valid JSON: {error}.") from None
    if not isinstance(values, dict):
        raise RequestError(400, f"The body of the request must be a JSON object, not {_kind(values)}.")
    return values


def _check_model(values: dict[str, Any], model: str) -> None:
    asked = values.get("model")
    if not isinstance(asked, str) or not asked:
        raise RequestError(400, f"model is missing: this server has {model!r}.", param="model")
    if asked != model:
        raise RequestError(
            404, f"There is no model {asked!r} here: this server has {model!r}.", param="model", code="model_not_found"
        )


def _check_names(values: dict[str, Any]) -> None:
    for name in values.keys() - FIELDS:
        if name not in UNSUPPORTED:
            hint = did_you_mean(name, sorted(FIELDS)) or "."
            raise RequestError(400, f"There is no field {name!r}{hint}", param=name)
        if values[name] is not None and values[name] != UNSUPPORTED[name]:
            raise RequestError(400, f"{name} is not supported by this server: leave it out.", param=name)


def _prompts(value: Any, limits: Limits) -> tuple[Prompt, ...]:
    """The four forms of a prompt: text, texts, token ids, lists of token ids."""
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, list) or not value:
        raise RequestError(
            400, f"prompt must be a text, a list of texts or a list of token ids, not {_kind(value)}.", param="prompt"
        )
    if all(isinstance(item, str) for item in value):
        return tuple(value)
    if all(isinstance(item, list) for item in value):
        return tuple(_token_ids(item, limits) for item in value)
    return (_token_ids(value, limits),)


def _token_ids(value: list[Any], limits: Limits) -> tuple[int, ...]:
    wrong = next((item for item in value if type(item) is not int or not 0 <= item < limits.vocab_size), None)
    if wrong is not None or not value:
        raise RequestError(
            400,
            f"prompt holds {json.dumps(wrong)[:40]} among its token ids, which are whole numbers from 0 to "
            f"{limits.vocab_size - 1}."
            if value
            else "prompt holds a list without token ids: at least one is needed.",
            param="prompt",
        )
    return tuple(value)


def _stops(value: Any) -> tuple[str, ...]:
    stops = [] if value is None else [value] if isinstance(value, str) else value
    fit = isinstance(stops, list) and all(isinstance(stop, str) and 0 < len(stop) <= MOST_STOP_CHARS for stop in stops)
    if not fit or len(stops) > MOST_STOPS:
        raise RequestError(
            400,
            f"stop must be a text, or a list of up to {MOST_STOPS} texts, of 1 to {MOST_STOP_CHARS} characters each.",
            param="stop",
        )
    return tuple(stops)


class _Given:
    """Fields of a JSON object, each checked as it is read; null and absence mean the default."""

    def __init__(self, values: Any, prefix: str = "") -> None:
        if not isinstance(values, dict):
            name = prefix.rstrip(".")
            raise RequestError(400, f"{name} must be an object, not {_kind(values)}.", param=name)
        self._values, self._prefix = values, prefix

    def integer(self, name: str, default: int, least: int, most: int) -> int:
        value = self._values.get(name)
        if value is None:
            return default
        if type(value) is not int or not least <= value <= most:
            self._refuse(name, f"must be a whole number from {least:,} to {most:,}", value)
        return value

    def number(self, name: str, default: float, least: float, most: float) -> float:
        value = self._values.get(name)
        if value is None:
            return default
        if type(value) not in (int, float) or not least <= value <= most:  # which nan is not
            self._refuse(name, f"must be a number from {least:g} to {most:g}", value)
        return float(value)

    def top_p(self) -> float:
        value = self.number("top_p", 1.0, 0.0, 1.0)
        if value == 0:
            self._refuse("top_p", "must be above 0 and at most 1", value)
        return value

    def boolean(self, name: str) -> bool:
        value = self._values.get(name)
        if value is not None and type(value) is not bool:
            self._refuse(name, "must be true or false", value)
        return bool(value)

    def _refuse(self, name: str, rule: str, value: Any) -> None:
        name = self._prefix + name
        raise RequestError(400, f"{name} {rule}, got {json.dumps(value)[:60]}.", param=name)


def _kind(value: Any) -> str:
    if isinstance(value, list):
        return "a list" if value else "an empty list"
    names = {dict: "an object", str: "a text", bool: "true or false", type(None): "nothing"}
    return names.get(type(value), "a number")
