"""A run on Ray whose data and checkpoints are in an object store, and nothing on any disk: begun here, ended elsewhere."""

import shutil

import pytest
from runs import run_here
from s3_server import s3_server

from raychat.config import Config
from raychat.on_ray import driver
from raychat.storage import Store
from raychat.tracking.journal import read_journal

pytestmark = pytest.mark.ray


def test_a_run_goes_on_from_the_store_on_a_machine_without_anything(connected, tiny_flags, prepared_base, tmp_path):
    """Shards, tokenizer, checkpoint and journal come from the store: the losses are those of a run on a disk.

    Neither the base directory nor the corpus is there.
    """
    corpus = shutil.copytree(tiny_flags["corpus"], tmp_path / "corpus")
    plain = run_here(
        Config.from_flat(tiny_flags | {"base_dir": str(prepared_base), "storage_path": str(tmp_path / "runs")})
    )
    lines: list[str] = []
    with s3_server() as server:
        server.make_bucket("bucket")
        storage = {"storage_path": server.uri("bucket/runs"), "corpus": str(corpus)}
        first = Config.from_flat(tiny_flags | storage | {"base_dir": str(tmp_path / "first"), "stop_at": 2})
        assert driver.run(first, echo=lines.append).status == "stopped"
        made = len(lines)
        shutil.rmtree(corpus)
        second = Config.from_flat(tiny_flags | storage | {"base_dir": str(tmp_path / "second")})
        summary = driver.run(second, echo=lines.append)
        assert Store.of(storage["storage_path"]).names() == ["d2", "tokenizers", "tokens"]
    assert (summary.status, summary.restarts, summary.replayed_steps) == ("finished", 1, 0)
    records = read_journal(second.run_dir / "metrics.jsonl")
    for metric in ("train/loss", "val/bpb"):
        assert [record[metric] for record in records if metric in record] == plain.metric(metric)
    assert any("training a tokenizer" in line for line in lines[:made])
    assert not any("training a tokenizer" in line or "tokenizing" in line for line in lines[made:])
    assert not any((tmp_path / base / "tokens").exists() for base in ("first", "second"))
    assert "hidden" not in "\n".join(lines)
