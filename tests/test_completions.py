"""Completions over HTTP: what may be asked, how text is cut, how requests share the model. Without Ray."""

import hashlib
import json
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from endpoints import ask, noisy_model, serving, streamed

from raychat.data.tokenizer import Tokenizer
from raychat.model.generation import Sampling, continuations, generate
from raychat.on_ray.batcher import Batcher, QueueFullError, Row
from raychat.on_ray.completions import Limits, RequestError, authorize, check_lengths, parse_completion
from raychat.on_ray.endpoint import Access
from raychat.on_ray.text_stream import TextStream

LIMITS = Limits(context=32, max_tokens=20, rows=4, vocab_size=300)

# Fields beside the model and a prompt, the field that is at fault, and what the message must say.
REFUSED = [
    ({"prompt": None}, "prompt", "a text, a list of texts or a list of token ids, not nothing"),
    ({"prompt": []}, "prompt", "not an empty list"),
    ({"prompt": {"a": 1}}, "prompt", "not an object"),
    ({"prompt": ["a", 1]}, "prompt", '"a" among its token ids'),
    ({"prompt": [1, 300]}, "prompt", "300 among its token ids, which are whole numbers from 0 to 299"),
    ({"prompt": [1, -1]}, "prompt", "-1 among its token ids"),
    ({"prompt": [1, True]}, "prompt", "true among its token ids"),
    ({"prompt": [[1], []]}, "prompt", "without token ids"),
    ({"prompt": ["a"] * 5}, "prompt", "at most 4"),
    ({"prompt": ["a", "b"], "n": 3}, "n", "2 prompts x n=3 are 6 completions: at most 4"),
    ({"n": 0}, "n", "a whole number from 1 to 4, got 0"),
    ({"max_tokens": 21}, "max_tokens", "a whole number from 1 to 20, got 21"),
    ({"max_tokens": 0}, "max_tokens", "from 1 to 20, got 0"),
    ({"max_tokens": "10"}, "max_tokens", 'got "10"'),
    ({"max_tokens": 2.0}, "max_tokens", "got 2.0"),
    ({"max_tokens": True}, "max_tokens", "got true"),
    ({"temperature": -0.1}, "temperature", "from 0 to 2, got -0.1"),
    ({"temperature": 2.5}, "temperature", "from 0 to 2, got 2.5"),
    ({"temperature": float("nan")}, "temperature", "got NaN"),
    ({"temperature": "hot"}, "temperature", 'got "hot"'),
    ({"temperature": 10**400}, "temperature", "from 0 to 2, got 1000"),
    ({"top_p": 0}, "top_p", "above 0 and at most 1"),
    ({"top_p": 1.01}, "top_p", "from 0 to 1, got 1.01"),
    ({"top_k": 0}, "top_k", "from 1 to"),
    ({"seed": 1.5}, "seed", "a whole number"),
    ({"seed": 2**63}, "seed", "a whole number"),
    ({"stop": ""}, "stop", "1 to 256 characters"),
    ({"stop": ["a"] * 5}, "stop", "up to 4 texts"),
    ({"stop": [1]}, "stop", "up to 4 texts"),
    ({"stop": {"a": 1}}, "stop", "must be a text"),
    ({"stream": "yes"}, "stream", "true or false"),
    ({"stream": True, "stream_options": True}, "stream_options", "must be an object"),
    ({"stream": True, "stream_options": [1]}, "stream_options", "must be an object, not a list"),
    ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage", "true or false"),
    ({"logprobs": 0}, "logprobs", "logprobs is not supported"),
    ({"suffix": "end"}, "suffix", "suffix is not supported"),
    ({"best_of": 2}, "best_of", "best_of is not supported"),
    ({"presence_penalty": 0.5}, "presence_penalty", "is not supported"),
    ({"logit_bias": {"50256": -100}}, "logit_bias", "is not supported"),
    ({"max_token": 5}, "max_token", "did you mean max_tokens"),
    ({"messages": []}, "messages", "There is no field 'messages'"),
]


@pytest.fixture(scope="module")
def tokenizer(prepared_base):
    (folder,) = (prepared_base / "tokenizers").iterdir()
    return Tokenizer.load(folder)


@pytest.fixture(scope="module")
def server(tokenizer):
    with serving(tokenizer) as port:
        yield port


def parse(**fields):
    return parse_completion(json.dumps({"model": "m", "prompt": "Hi"} | fields).encode(), "m", LIMITS)


@pytest.mark.parametrize(("fields", "param", "says"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_cannot_be_is_refused_by_name(fields, param, says):
    with pytest.raises(RequestError) as caught:
        parse(**fields)
    error = caught.value.body()["error"]
    assert (caught.value.status, error["param"], error["type"]) == (400, param, "invalid_request_error")
    assert says in error["message"]


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b"\xff{}", b'{"model": "m"', b"[" * 100_000], ids=range(6))
def test_a_body_that_is_no_object_is_refused(body):
    with pytest.raises(RequestError, match="The body of the request") as caught:
        parse_completion(body, "m", LIMITS)
    assert caught.value.status == 400


def test_another_model_is_not_found_and_none_is_a_bad_request():
    with pytest.raises(RequestError, match="no model 'gpt-4' here: this server has 'm'") as caught:
        parse(model="gpt-4")
    assert (caught.value.status, caught.value.code) == (404, "model_not_found")
    with pytest.raises(RequestError, match="model is missing: this server has 'm'"):
        parse(model=None)


def test_null_means_the_default_and_fields_that_ask_for_nothing_pass():
    names = ("max_tokens", "temperature", "top_p", "top_k", "n", "stop", "seed", "stream", "echo", "logprobs", "user")
    plain = parse()
    assert parse(**dict.fromkeys(names)) == plain
    assert parse(best_of=1, presence_penalty=0.0, frequency_penalty=0, logit_bias={}, user="me") == plain
    assert plain.max_tokens == 16


@pytest.mark.parametrize(
    ("prompt", "parsed"),
    [("a", ("a",)), (["a", "b"], ("a", "b")), ([1, 2], ((1, 2),)), ([[1], [2, 3]], ((1,), (2, 3)))],
    ids=["text", "texts", "ids", "lists of ids"],
)
def test_a_prompt_comes_in_four_forms(prompt, parsed):
    assert parse(prompt=prompt).prompts == parsed


def test_prompt_and_completion_share_the_context():
    check_lengths([[1] * 12], 20, LIMITS)
    with pytest.raises(RequestError, match="context is 32 tokens, and 33 were asked for: 13 of the prompt") as caught:
        check_lengths([[1], [1] * 13], 20, LIMITS)
    assert (caught.value.param, caught.value.code) == ("max_tokens", "context_length_exceeded")


def test_only_the_key_opens():
    digest = hashlib.sha256(b"right").hexdigest()
    for header in ("Bearer right", "bearer right"):
        authorize(header, digest)
    for header in (None, "", "Bearer", "Bearer wrong", "Basic right", "right", f"Bearer {digest}"):
        with pytest.raises(RequestError) as caught:
            authorize(header, digest)
        assert caught.value.status == 401
        authorize(header, "")  # no key is asked for


STOPS = [(), ("b",), ("ab",), ("aab", "b\n"), ("é", "a"), ("ba", "aba", "€a")]


@pytest.mark.parametrize("stop", STOPS, ids=repr)
def test_text_does_not_depend_on_how_it_was_cut(stop):
    """Byte by byte, in random pieces and in one piece: what is said is the text before the stop that ends first."""
    rng = random.Random(str(stop))
    for _ in range(200):
        text = "".join(rng.choices("ab\né€😀", k=rng.randint(0, 12)))
        data = text.encode() + rng.choice([b"", b"\xe2\x82", b"\xff"])
        text = data.decode(errors="replace")
        ends = [(at + len(s), at) for s in stop if (at := text.find(s)) >= 0]
        expected = text[: min(ends)[1]] if ends else text
        for sizes in ([1] * len(data), [rng.randint(1, 4) for _ in data], [len(data)]):
            stream, said, at = TextStream(stop), "", 0
            for size in sizes:
                said += stream.push(data[at : at + size])
                assert expected.startswith(said)  # nothing is ever taken back
                at += size
            assert said + stream.finish() == expected
            assert stream.stopped == bool(ends)


class Counting:
    """A generator that counts: a row's tokens are 0, 1, 2... It waits for `go` before each step, and notes its rows."""

    def __init__(self):
        self.rows, self.seen, self.go, self.added = {}, [], threading.Semaphore(0), 0

    def add(self, prompt, max_tokens, sampling, stop):
        self.rows[self.added] = [max_tokens, iter(range(max_tokens))]
        self.added += 1
        return self.added - 1

    def remove(self, number):
        del self.rows[number]

    def step(self):
        self.go.acquire()
        self.seen.append(set(self.rows))
        drawn = {number: next(tokens) for number, (_, tokens) in self.rows.items()}
        self.rows = {number: row for number, row in self.rows.items() if drawn[number] + 1 < row[0]}
        return drawn


class Listener:
    """Rows for a batcher, and what they heard."""

    def __init__(self):
        self.heard = []

    def row(self, max_tokens):
        heard = []
        self.heard.append(heard)
        return Row(prompt=[0], max_tokens=max_tokens, sampling=Sampling(), deliver=lambda *told: heard.append(told))


def until(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_rows_join_and_leave_between_steps():
    steps, rows = Counting(), Listener()
    batcher = Batcher(steps, max_batch=2, max_queue=1)
    first, second, third = rows.row(3), rows.row(9), rows.row(1)
    batcher.submit([first])
    steps.go.release()
    until(lambda: batcher.load().steps == 1)
    batcher.submit([second, third])  # one joins, one waits for a place
    with pytest.raises(QueueFullError):
        batcher.submit([rows.row(1)])
    steps.go.release()
    steps.go.release()
    until(lambda: batcher.load().steps == 3)
    batcher.leave([second])
    steps.go.release(10)
    until(lambda: batcher.load().active == 0)
    batcher.close()
    assert rows.heard[0] == [(0, None), (1, None), (2, "length")]
    assert rows.heard[2] == [(0, "length")]
    assert (None, "stop") not in rows.heard[1]
    assert max(map(len, steps.seen)) == 2
    assert steps.seen[0] == {0}
    assert not steps.rows  # nobody is generated for in vain
    assert batcher.load().most_active == 2


def test_all_hear_of_a_failure_and_none_join_afterwards():
    steps, rows = Counting(), Listener()
    steps.step = lambda: 1 / 0
    batcher = Batcher(steps, max_batch=1, max_queue=4)
    batcher.submit([rows.row(1), rows.row(1)])
    until(lambda: all(rows.heard))
    assert [type(end) for ((_, end),) in rows.heard] == [ZeroDivisionError] * 2
    with pytest.raises(RuntimeError, match="has ended"):
        batcher.check()
    with pytest.raises(RuntimeError, match="has ended"):
        batcher.submit([rows.row(1)])


def test_what_is_served_is_what_the_model_generates(server, tokenizer):
    prompt = tokenizer.encode("shalomi")
    model = noisy_model(tokenizer.vocab_size)
    special = set(tokenizer.special_tokens.values()) - {tokenizer.bos_id}
    (tokens,) = continuations(
        generate(
            model,
            [[tokenizer.bos_id, *prompt]],
            24,
            Sampling(temperature=0.7, seed=5),
            stop={tokenizer.bos_id},
            never=special,
        ),
        1,
    )
    status, answer, _ = ask(
        server, body={"model": "tiny", "prompt": "shalomi", "max_tokens": 24, "temperature": 0.7, "seed": 5}
    )
    assert status == 200
    assert answer["choices"][0]["text"] == tokenizer.decode(tokens)
    assert answer["choices"][0]["finish_reason"] == ("length" if len(tokens) == 24 else "stop")
    assert answer["usage"]["completion_tokens"] == len(tokens)
    assert answer["usage"]["prompt_tokens"] == 1 + len(prompt)


def test_seeds_repeat_whatever_else_runs(server):
    """Alone, among others, as one of several prompts, streamed: the same text, and every choice its own."""
    body = {"model": "tiny", "prompt": "te", "max_tokens": 40, "seed": 11, "n": 2}
    texts = [choice["text"] for choice in ask(server, body=body)[1]["choices"]]
    assert texts[0] != texts[1]
    with ThreadPoolExecutor(5) as pool:
        others = [pool.submit(ask, server, body=body | {"prompt": "qui" * i, "n": 1, "seed": i}) for i in range(4)]
        again = pool.submit(ask, server, body=body | {"n": 1}).result()[1]
        assert again["choices"][0]["text"] == texts[0]
        assert {other.result()[0] for other in others} == {200}
    several = ask(server, body=body | {"prompt": ["ka", "te"]})[1]
    assert [choice["text"] for choice in several["choices"][2:]] == texts
    parts = streamed(ask(server, body=body | {"stream": True})[1])
    for index in range(2):
        choices = [choice for part in parts for choice in part["choices"] if choice["index"] == index]
        assert "".join(choice["text"] for choice in choices) == texts[index]
        assert [choice["finish_reason"] for choice in choices if choice["finish_reason"]] == ["length"]


def test_a_stop_string_ends_the_text_also_across_tokens(server):
    body = {"model": "tiny", "prompt": "ka", "max_tokens": 60, "temperature": 0.9, "seed": 3}
    whole = ask(server, body=body)[1]["choices"][0]["text"]
    stop = whole[20:28]
    _, answer, _ = ask(server, body=body | {"stop": [stop, "never said"]})
    assert answer["choices"][0] == {
        "index": 0,
        "text": whole[: whole.index(stop)],
        "logprobs": None,
        "finish_reason": "stop",
    }
    assert answer["usage"]["completion_tokens"] < 60
    parts = streamed(ask(server, body=body | {"stop": stop, "stream": True})[1])
    assert "".join(part["choices"][0]["text"] for part in parts) == whole[: whole.index(stop)]


def test_echo_repeats_the_prompt_and_usage_comes_last_in_a_stream(server, tokenizer):
    ids = tokenizer.encode("lomi ")
    body = {"model": "tiny", "prompt": ids, "max_tokens": 3, "echo": True, "temperature": 0}
    assert ask(server, body=body)[1]["choices"][0]["text"].startswith("lomi ")
    *parts, last = streamed(ask(server, body=body | {"stream": True, "stream_options": {"include_usage": True}})[1])
    assert parts[0]["choices"][0]["text"] == "lomi "
    assert all(part["usage"] is None for part in parts)
    assert last["choices"] == []
    assert last["usage"] == {"prompt_tokens": len(ids), "completion_tokens": 3, "total_tokens": len(ids) + 3}


def test_half_characters_in_a_request_do_no_harm(server):
    """JSON can carry half of a surrogate pair, which no text can."""
    raw = rb'{"model": "tiny", "prompt": "a\ud83d", "max_tokens": 2, "echo": true}'
    status, answer, _ = ask(server, body=raw)
    assert status == 200
    assert answer["choices"][0]["text"].startswith("a�")
    status, answer, _ = ask(server, body=rb'{"model": "tiny", "prompt": "a", "\ud83d": 2}')
    assert (status, answer["error"]["param"]) == (400, "?")


def test_answers_to_what_is_no_completion(server):
    assert ask(server, "/v1/models/tiny")[1]["max_model_len"] == 256
    assert ask(server, "/v1/models/other")[0] == 404
    assert ask(server, "/v2")[1]["error"]["message"] == "GET /v2: Not Found."
    assert ask(server, "/v1/completions")[0] == 405
    status, answer, _ = ask(server, body=b"a=1", headers={"Content-Type": "application/x-www-form-urlencoded"})
    assert (status, "application/json" in answer["error"]["message"]) == (415, True)
    status, answer, _ = ask(server, body={"model": "tiny", "prompt": "a" * 20_000})
    assert (status, answer["error"]["message"]) == (413, "The request is larger than 10,000 bytes.")
    status, answer, _ = ask(server, body={"model": "tiny", "prompt": "a" * 2_000, "max_tokens": 9})
    assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")


def test_a_full_queue_says_when_to_come_back(tokenizer):
    with serving(tokenizer, max_queue=0) as port:
        body = {"model": "tiny", "prompt": "a", "max_tokens": 250, "n": 4, "stop": "never said"}
        with ThreadPoolExecutor(3) as pool:
            answers = [job.result() for job in [pool.submit(ask, port, body=body) for _ in range(3)]]
    assert sorted(status for status, _, _ in answers) == [200, 429, 429]
    for status, answer, headers in answers:
        if status == 429:
            assert int(headers["Retry-After"]) >= 1
            assert answer["error"]["code"] == "rate_limit_exceeded"


def test_a_server_without_a_key_answers_to_its_own_names_only(tokenizer):
    """A web site may point a name of its own at 127.0.0.1, and its pages may then read what that name answers."""
    with serving(tokenizer, Access(hosts=frozenset({"127.0.0.1"}))) as port:
        assert ask(port, "/v1/models")[0] == 200
        status, answer, _ = ask(port, "/v1/models", headers={"Host": f"evil.example:{port}"})
        assert (status, answer["error"]["code"]) == (403, "wrong_host")
