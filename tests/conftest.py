"""What several test files share: a small corpus, the smallest settings that train on it, and their data, made once."""

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from s3_server import S3Server, s3_server

from raychat.config import Config
from raychat.training import device

SYLLABLES = ("ka", "lo", "mi", "ru", "te", "sha", "von", "pel", "qui", "ster", "and", "ing")


def write_corpus(folder: Path, *, files: int = 3, documents: int = 40, longest: int = 200) -> Path:
    """`files` jsonl files of invented words, the same on every machine; the last one validates."""
    folder.mkdir(parents=True)
    for number in range(files):
        rng = random.Random(number)
        lexicon = ["".join(rng.choices(SYLLABLES, k=rng.randint(1, 4))) for _ in range(300)]
        texts = (" ".join(rng.choices(lexicon, k=rng.randint(5, longest))) for _ in range(documents))
        lines = (json.dumps({"text": text}) + "\n" for text in texts)
        (folder / f"part-{number}.jsonl").write_text("".join(lines))
    return folder


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With `-n 2` one process runs all tests of Ray, on their one cluster, the other one the rest.

    Groups by marker (`--dist loadgroup`) do not work in pytest-xdist 3.8 with pytest 9.2.
    """
    from xdist.scheduler import LoadScopeScheduling

    class RayTogether(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "ray" if nodeid.startswith("tests/on_ray/") else nodeid

    return RayTogether(config, log)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Runs in this process resolve to one thread: models of these sizes only wait for a second one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device, "local_cores", lambda: 1)
        yield


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    """An S3 server with the buckets `bucket` and `runs`, of one module's own."""
    with s3_server() as running:
        for name in ("bucket", "runs"):
            running.make_bucket(name)
        yield running


@pytest.fixture(scope="session")
def corpus_dir(tmp_path_factory) -> Path:
    """A folder of three jsonl files, some 90 kB of text. Tests must not write into it."""
    return write_corpus(tmp_path_factory.mktemp("texts") / "corpus")


@pytest.fixture(scope="session")
def tiny_flags(corpus_dir) -> dict[str, Any]:
    """Settings of a model of 32 channels that trains four steps of 8 rows of 32 tokens on `corpus_dir`, untracked."""
    return {
        "corpus": str(corpus_dir),
        "run": "dummy",
        "depth": 2,
        "aspect_ratio": 16,
        "head_dim": 16,
        "max_seq_len": 32,
        "vocab_size": 300,
        "window_pattern": "L",
        "device_batch_size": 2,
        "total_batch_size": 256,
        "num_iterations": 4,
        "eval_every": 2,
        "eval_tokens": 256,
        "core_metric_every": -1,
        "sample_every": -1,
        "device_type": "cpu",
        "dtype": "float32",
        "packing": "keep",
        "num_workers": 1,
    }


@pytest.fixture
def tiny_config(tiny_flags, tmp_path) -> Callable[..., Config]:
    """Makes a configuration of `tiny_flags` with a base directory of its own and the changes given."""
    return lambda **changes: Config.from_flat(tiny_flags | {"base_dir": str(tmp_path / "base")} | changes)


@pytest.fixture
def own_config(tiny_flags, prepared_base, tmp_path) -> Callable[..., Config]:
    """Makes a configuration of `tiny_flags` whose data are there and whose runs are this test's own."""
    own = {"base_dir": str(prepared_base), "storage_path": str(tmp_path / "runs")}
    return lambda **changes: Config.from_flat(tiny_flags | own | changes)


@pytest.fixture(scope="session")
def prepared_base(tiny_flags, tmp_path_factory) -> Path:
    """A base directory that holds the tokenizer and the token shards of `tiny_flags`. Tests must not write into them."""
    from raychat.data.prepare import make_in_process, prepare

    base = tmp_path_factory.mktemp("prepared") / "base"
    config = Config.from_flat(tiny_flags | {"base_dir": str(base)})
    prepare(config, with_gpus=False, maker=make_in_process, echo=lambda line: None)
    return base
