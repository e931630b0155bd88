"""A model served by Ray Serve, as its users meet it: OpenAI's own client, requests at once, a client that goes away."""

import contextlib
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import openai
import pytest
import ray
from endpoints import ask
from ray.util.placement_group import placement_group, remove_placement_group
from runs import run_here

from on_ray.conftest import CPUS, ROOT
from raychat.config import Config
from raychat.errors import ConfigError, RaychatError
from raychat.export.source import Source, find_source

with warnings.catch_warnings():  # of Ray Serve's own imports
    warnings.simplefilter("ignore", DeprecationWarning)
    from ray import serve
    from ray.serve.context import _set_global_client as set_global_client

    from raychat.on_ray import serving

pytestmark = pytest.mark.ray

KEY = "a-key-of-the-tests"


@dataclass(frozen=True)
class Served:
    """A model named `tiny`, of a context of 2048 tokens, and the job that serves it."""

    port: int
    job: subprocess.Popen[str]
    said: list[str]
    key_file: Path

    @property
    def client(self) -> openai.OpenAI:
        """OpenAI's client of this server."""
        return openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key=KEY, max_retries=0, timeout=60)

    def ask(self, body, path="/v1/completions"):
        """Status and content of an answer."""
        return ask(self.port, path, body, {"Authorization": f"Bearer {KEY}"})[:2]

    def load(self):
        """What the replica does."""
        return ask(self.port, "/health")[1]


@pytest.fixture(scope="module")
def run_dir(tiny_flags, prepared_base, tmp_path_factory) -> Path:
    """A run of one step on rows of 2048 tokens."""
    longer = {"max_seq_len": 2048, "total_batch_size": 2048, "device_batch_size": 1, "eval_every": -1}
    storage = tmp_path_factory.mktemp("runs")
    where = {"base_dir": str(prepared_base), "storage_path": str(storage), "model_tag": "tiny"}
    return run_here(Config.from_flat(tiny_flags | longer | where | {"num_iterations": 1})).run_dir


@pytest.fixture(scope="module")
def source(run_dir, prepared_base) -> Source:
    """That run's model."""
    return find_source(path=str(run_dir), base_dir=str(prepared_base))


@pytest.fixture(scope="module")
def served(cluster, environment, run_dir, prepared_base, tmp_path_factory):
    port = free_port()
    key_file = tmp_path_factory.mktemp("key") / "the key.txt"
    key_file.write_text(KEY + "\n")
    flags = [f"--path={run_dir}", f"--base-dir={prepared_base}", f"--address={cluster.address}"]
    flags += [f"--port={port}", f"--api-key-file={key_file}", "--max-batch=4", "--max-tokens=2000"]
    command = [sys.executable, "jobs/serve.py", *flags]
    job = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    said: list[str] = []
    try:
        for line in job.stdout:
            said.append(line.rstrip())
            if line.startswith("curl "):
                break
        else:
            pytest.fail("\n".join(said))
        yield Served(port, job, said, key_file)
    finally:
        job.send_signal(signal.SIGINT)
        job.communicate(timeout=60)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def until(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_openais_client_completes(served):
    (model,) = served.client.models.list().data
    assert (model.id, served.client.models.retrieve("tiny").id) == ("tiny", "tiny")
    wish = {"model": "tiny", "prompt": "ka lo", "max_tokens": 30, "seed": 1, "temperature": 0.8}
    answer = served.client.completions.create(**wish)
    assert answer.object == "text_completion"
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    stream = served.client.completions.create(**wish, stream=True, stream_options={"include_usage": True})
    *parts, last = list(stream)
    assert "".join(part.choices[0].text for part in parts) == answer.choices[0].text
    assert parts[-1].choices[0].finish_reason == answer.choices[0].finish_reason
    assert last.usage == answer.usage


def test_openais_client_understands_refusals(served):
    create = served.client.completions.create
    with pytest.raises(openai.BadRequestError, match="a whole number from 1 to 2,000, got 5000") as caught:
        create(model="tiny", prompt="a", max_tokens=5000)
    assert caught.value.param == "max_tokens"
    with pytest.raises(openai.NotFoundError, match="no model 'gpt-4'"):
        create(model="gpt-4", prompt="a")
    with pytest.raises(openai.BadRequestError, match="context is 2,048 tokens"):
        create(model="tiny", prompt=[1] * 2040, max_tokens=9)
    with pytest.raises(openai.APIStatusError, match="larger than") as caught:
        create(model="tiny", prompt="a" * 2**21)
    assert caught.value.status_code == 413
    stranger = served.client.with_options(api_key="guess")
    with pytest.raises(openai.AuthenticationError, match="not the API key"):
        stranger.models.list()
    with pytest.raises(openai.AuthenticationError):
        stranger.completions.create(model="tiny", prompt="a")


def test_requests_at_once_share_their_steps(served):
    """Four texts take about as many steps as the longest of them; and each is the text that it is alone."""
    bodies = [
        {"model": "tiny", "prompt": "te" * i, "max_tokens": 400, "seed": i, "temperature": 0.3 if i == 1 else 0}
        for i in range(1, 5)
    ]
    alone = served.ask(bodies[0])[1]["choices"][0]["text"]
    before = served.load()
    with ThreadPoolExecutor(4) as pool:
        answers = [answer for _, answer in pool.map(served.ask, bodies)]
    after = served.load()
    tokens = [answer["usage"]["completion_tokens"] for answer in answers]
    assert after["tokens"] - before["tokens"] == sum(tokens)
    assert after["steps"] - before["steps"] < 0.6 * sum(tokens), tokens
    assert after["most_active"] >= 2
    assert answers[0]["choices"][0]["text"] == alone


@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
def test_a_client_that_goes_away_frees_its_row(served, stream):
    body = {"model": "tiny", "prompt": "a", "max_tokens": 2000, "n": 4, "stream": stream, "temperature": 0}
    before = served.load()["tokens"]
    with contextlib.suppress(openai.APITimeoutError):
        answer = served.client.with_options(timeout=0.5).completions.create(**body)
        next(answer)
        answer.close()
    until(lambda: served.load()["active"] == 0)
    assert 0 < served.load()["tokens"] - before < 6000  # of 8000


def test_the_page_and_the_health_are_there_for_all(served):
    status, page, headers = ask(served.port, "/")
    assert (status, "<title>raychat</title>" in page) == (200, True)
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    assert served.load()["status"] == "ok"


def test_the_line_to_paste_works(served):
    line = served.said[-1]
    done = subprocess.run(["sh", "-c", line + " -sS"], capture_output=True, text=True, timeout=60)
    assert '"object": "text_completion"' in done.stdout, done
    assert KEY not in "\n".join(served.said)


def test_a_second_server_is_refused(served, source, cluster):
    """On a cluster that serves, and on a port that is taken."""
    with (
        pytest.raises(ConfigError, match="Ray Serve runs on this cluster already"),
        serving.served(source, serving.Settings(port=free_port()), cluster, echo=print),
    ):
        pytest.fail("it is served")
    set_global_client(None)  # of a Serve that the job will end
    with pytest.raises(ConfigError, match=f"Port {served.port} is in use: give another --port"):
        serving.check_port(serving.Settings(port=served.port), local=True)
    assert served.load()["status"] == "ok"


def test_a_stop_ends_what_was_started_and_nothing_else(served, cluster):
    served.job.send_signal(signal.SIGTERM)
    served.job.wait(60)
    rest = served.job.stdout.read()
    assert served.job.returncode == 0, rest
    assert rest == "stopped\n"
    assert not serve.status().applications
    assert ray.cluster_resources()["CPU"] > 0
    with pytest.raises(OSError, match="refused"):
        ask(served.port, "/health")


def test_a_start_says_what_it_waits_for_and_why_it_fails(cluster, source, monkeypatch):
    """It waits for a CPU until it has said so; then its model cannot be loaded, which the user hears without traceback."""
    monkeypatch.setattr(serving, "SLOW_AFTER_S", 0.1)
    monkeypatch.setattr(serving, "TELL_S", 0.5)
    all_cpus = placement_group([{"CPU": 1}] * CPUS)
    ray.get(all_cpus.ready())
    said = []

    def echo(line):
        said.append(line)
        pending = serving.actors(actor_state_name="PENDING_CREATION").values()
        if any(actor["Name"].startswith(serving.REPLICA_NAMES) for actor in pending):
            remove_placement_group(all_cpus)

    with (
        pytest.raises(
            RaychatError, match=r"step_00000001 cannot be served: --device-type mps: .* Use --device-type cpu"
        ),
        serving.served(source, serving.Settings(port=free_port(), device_type="mps"), cluster, echo=echo),
    ):
        pytest.fail("it is served")
    lines = [re.sub(r"since \d+s", "since", line) for line in said[1:]]
    waiting = "waiting for room for 1 of 1 replicas, since: each needs 1 CPU, and the cluster has 0 CPUs free"
    loading = "the model is being loaded, since"
    turn = lines.index(loading)
    assert turn > 0
    assert set(lines[:turn]) == {waiting}
    assert set(lines[turn:]) == {loading}


def replicas_at_work():
    """Names and processes of the replicas that are there."""
    found = serving.actors(actor_state_name="ALIVE").values()
    return {one["Name"]: one["Pid"] for one in found if one["Name"].startswith(serving.REPLICA_NAMES)}


def test_two_replicas_share_the_requests_and_one_that_dies_is_replaced(cluster, source):
    """What a replica has generated tells it from the other: no two parts of these requests are as long."""
    port = free_port()

    def complete(tokens):
        body = {"model": "tiny", "prompt": "ka", "max_tokens": tokens, "temperature": 0}
        status, answer, _ = ask(port, "/v1/completions", body)
        return answer["usage"]["completion_tokens"] if status == 200 else 0

    def generated():
        """Tokens of each of the replicas that answer, asked until two do."""
        found = set()
        until(lambda: len(found.update([ask(port, "/health")[1]["tokens"]]) or found) == 2)
        return found

    with serving.served(source, serving.Settings(port=port, num_replicas=2), cluster, echo=lambda line: None):
        first = replicas_at_work()
        assert len(first) == 2
        wishes = [2**i for i in range(8)]
        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(complete, wishes)) == wishes
        assert sum(generated()) == sum(wishes)
        assert 0 not in generated()
        died, pid = first.popitem()
        os.kill(pid, signal.SIGKILL)
        until(lambda: died not in replicas_at_work())
        assert [complete(3) for _ in range(5)] == [3] * 5
        until(lambda: len(replicas_at_work()) == 2)
        assert replicas_at_work().items() > first.items()
        assert 0 in generated()


def test_the_line_to_paste_holds_any_name(source):
    """A folder may be named with what a shell takes for its own."""
    line = serving.curl_line(replace(source, name="it's $HOME"), serving.Settings(), "")
    *_, body = shlex.split(line)
    assert json.loads(body)["model"] == "it's $HOME"


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--host=0.0.0.0"], "--host 0.0.0.0 is open to the network, and no API key is set"),
        (["--port=0"], "--port must be from 1 to 65535, got 0"),
        (["--max-batch=0"], "--max-batch must be above 0"),
        (["--api-key-file=missing.txt"], "missing.txt cannot be read"),
        (["--dtype=half"], "--dtype 'half' is unknown: use auto"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_cannot_be_served_is_refused(flags, says, monkeypatch):
    monkeypatch.delenv("RAYCHAT_API_KEY", raising=False)
    job = load_job()
    with pytest.raises(ConfigError, match=re.escape(says)):
        job.main(flags)


def test_the_key_is_not_in_the_environment_that_ray_inherits(monkeypatch):
    monkeypatch.setenv("RAYCHAT_API_KEY", KEY)
    job = load_job()
    with pytest.raises(ConfigError, match="--port must be") as caught:
        job.main(["--port=0"])
    assert "RAYCHAT_API_KEY" not in os.environ
    assert KEY not in str(caught.value)


def test_without_the_extra_the_message_names_it(monkeypatch):
    job = load_job()
    monkeypatch.setattr(job.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=re.escape("pip install 'raychat[serve]'")):
        job.main([])


def load_job():
    """jobs/serve.py as a module."""
    import importlib.util

    spec = importlib.util.spec_from_file_location("serve_job", ROOT / "jobs" / "serve.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
