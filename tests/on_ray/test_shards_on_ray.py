"""Token shards made by tasks on a cluster are those made in one process, and their mistakes are told the same way."""

import errno
import os

import pytest
from conftest import write_corpus

from raychat.config import Config
from raychat.data.prepare import make_in_process, prepare
from raychat.data.shards import ShardTask, make_shard
from raychat.errors import DataError
from raychat.on_ray import shards
from raychat.on_ray.shards import make_on_ray

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("cluster")]


@pytest.fixture
def prepare_with(tiny_flags, corpus_dir, tmp_path):
    """Prepares a corpus in a base directory of its own with a maker of shards; gives the files of the shards.

    Without the record of what was asked for, which names the base directory.
    """

    def run(maker, name, **changes):
        config = Config.from_flat(tiny_flags | {"base_dir": str(tmp_path / name)} | changes)
        folder = prepare(config, with_gpus=False, maker=maker, echo=lambda line: None).manifest.folder
        assert len(list(folder.glob("request-*.json"))) == 1
        return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if "request-" not in path.name}

    return run


def test_shards_made_on_ray_are_those_made_in_process(prepare_with):
    """Byte for byte, sidecars and manifest included, and nothing besides them is left."""
    on_ray, in_process = prepare_with(make_on_ray, "ray"), prepare_with(make_in_process, "process")
    assert sorted(on_ray) == [
        "manifest.json",
        *(f"{name}-00000{i}.{kind}" for name, n in (("train", 2), ("val", 1)) for i in range(n) for kind in ("arrow", "json")),
    ]  # fmt: skip
    assert on_ray == in_process


def test_a_task_that_is_killed_is_run_again(prepare_with, monkeypatch, tmp_path):
    killed = tmp_path / "killed"

    def dies_once(task: ShardTask):
        if task.name == "train-000001" and not killed.exists():
            killed.touch()
            os._exit(1)
        return make_shard(task)

    monkeypatch.setattr(shards, "make_shard", dies_once)
    on_ray = prepare_with(make_on_ray, "ray")
    assert killed.exists()
    assert on_ray == prepare_with(make_in_process, "process")


def test_a_mistake_in_the_corpus_arrives_as_it_was_raised(prepare_with, prepared_base, tmp_path):
    """Found by the task that reads the file, told in the same words as without Ray."""
    (tokenizer,) = (prepared_base / "tokenizers").iterdir()
    corpus = write_corpus(tmp_path / "corpus")
    with (corpus / "part-1.jsonl").open("a") as file:
        file.write('{"text": "cut\n')
    told = []
    for maker in (make_in_process, make_on_ray):
        with pytest.raises(DataError) as error:
            prepare_with(maker, maker.__name__, corpus=str(corpus), tokenizer=str(tokenizer))
        assert type(error.value) is DataError
        told.append(str(error.value))
    assert "part-1.jsonl, line 41: not a JSON object" in told[0]
    assert told[1] == told[0]


def test_no_task_is_no_work(cluster):
    assert list(make_on_ray([])) == []


def test_a_full_disk_arrives_as_the_machine_told_it(prepare_with, monkeypatch):
    """`cli.run_job` makes one line of it, and needs number and file for that."""

    def full(task: ShardTask):
        raise OSError(errno.ENOSPC, "No space left on device", "/full/shard")

    monkeypatch.setattr(shards, "make_shard", full)
    with pytest.raises(OSError, match="No space left") as error:
        prepare_with(make_on_ray, "ray")
    assert (error.value.errno, error.value.filename) == (errno.ENOSPC, "/full/shard")
