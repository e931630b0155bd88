"""What earlier versions wrote stays readable.

`fixtures/format-1` is a run of three steps as version 0.1 wrote it; `fixtures/format-2` holds its checkpoint in the next
format, with a marker.
"""

import shutil
from pathlib import Path

import pytest
import torch
from saves import equal, values

from raychat.config import Config
from raychat.data.batches import validation_rows
from raychat.data.corpus import Corpus
from raychat.data.prepare import TokenData
from raychat.data.shards import RowReader, read_manifest, verify_shard
from raychat.data.tokenizer import Tokenizer
from raychat.evaluation.bpb import evaluate_bpb
from raychat.model import GPT
from raychat.optim import build_optimizer
from raychat.tracking.journal import read_events, read_journal
from raychat.tracking.summary import Summary
from raychat.training import checkpoint
from raychat.training.build import gpt_config, train
from raychat.training.device import Resolved
from raychat.training.loop import LoopState
from raychat.training.reading import read_here
from raychat.training.session import Session
from raychat.training.state import Signal
from raychat.training.world import World

FIXTURES = Path(__file__).parent / "fixtures"
OLD = FIXTURES / "format-1"
LOSSES = [5.597165107727051, 5.596438407897949, 5.596736907958984]
VAL_BPB = 7.063119983421877


@pytest.fixture
def old(tmp_path):
    """The checkpoint, verified."""
    return checkpoint.verify(OLD / "checkpoint")


def test_old_checkpoint_gives_the_model_that_was_saved(old):
    """Evaluated on the rows of the time it has the bits per byte of the time, to float32 rounding on another CPU."""
    config = Config.from_flat(old.meta["config"])
    model = GPT(gpt_config(config))
    optimizer = build_optimizer(model)
    old.load(model, optimizer)
    assert optimizer.step_count == 3
    assert all(bool(tensor.any()) for key, (_, tensor) in optimizer.owned_state().items() if key.startswith("lm_head"))
    tokens = read_manifest(OLD / "tokens")
    rows = validation_rows(RowReader(tokens, "val"), rows=4, device_batch_size=2, rank=0, world_size=1)
    token_bytes = torch.as_tensor(Tokenizer.load(OLD / "tokenizer").token_bytes)
    batches = (torch.from_numpy(block.astype("int64")) for block in rows)
    assert evaluate_bpb(model, batches, token_bytes, torch.device("cpu")) == pytest.approx(VAL_BPB, rel=1e-5)


def test_checkpoints_of_all_formats_hold_the_same(old):
    """The one of format 2 was made by loading the one of format 1 and saving it."""
    new = checkpoint.verify(FIXTURES / "format-2" / "checkpoint")
    assert (old.meta["format"], new.meta["format"]) == (1, 2)
    assert old.meta | {"format": 2} == new.meta
    held = []
    for found in (old, new):
        model = GPT(gpt_config(Config.from_flat(found.meta["config"])))
        optimizer = build_optimizer(model)
        found.load(model, optimizer)
        held.append(values(model, optimizer))
    assert equal(*held)


@pytest.mark.parametrize("version", [1, 2])
def test_a_run_goes_on_from_an_old_checkpoint_and_journal(version, tmp_path):
    """With a longer horizon, to the end: the steps of the time stay in the journal, and those after them follow."""
    kept = checkpoint.read_meta(OLD / "checkpoint")["config"]
    new = {"storage_path": str(tmp_path), "model_tag": "old", "num_iterations": 5, "allow_config_change": True}
    config = Config.from_flat(kept | new)
    shutil.copytree(FIXTURES / f"format-{version}" / "checkpoint", config.run_dir / "checkpoints" / "step_00000003")
    shutil.copy(OLD / "metrics.jsonl", config.run_dir)
    manifest = read_manifest(OLD / "tokens")
    assert manifest
    corpus = Corpus(name="corpus", train=(), val=(), text_column="text")
    data = TokenData(corpus=corpus, tokenizer_dir=OLD / "tokenizer", manifest=manifest)
    session = Session(config, data, echo=print, eval_workers=True)
    job = session.begin_attempt(world_size=1)
    assert train(job, world=World(), batches=read_here, sink=session.receive, poll=lambda: Signal.NONE)
    summary = session.close("finished")
    assert (summary.step, summary.restarts) == (5, 1)
    losses = {r["step"]: r["train/loss"] for r in read_journal(session.journal.path) if "train/loss" in r}
    assert list(losses) == [0, 1, 2, 3, 4]
    assert list(losses.values())[:3] == LOSSES
    assert max(losses.values()) < 6
    assert summary.min_val_bpb <= VAL_BPB
    assert checkpoint.newest(config.run_dir / "checkpoints", echo=print).step == 5


def test_old_state_is_understood(old):
    state = LoopState(**old.meta["state"])
    assert (state.step, state.rows_consumed, state.val_bpb) == (3, 12, VAL_BPB)
    assert Resolved(**old.meta["resolved"]).dtype == "float32"


def test_old_shards_and_tokenizer_belong_together():
    tokens = read_manifest(OLD / "tokens")
    for shard in tokens.shards:
        verify_shard(OLD / "tokens", shard)
    tokenizer = Tokenizer.load(OLD / "tokenizer")
    assert tokens.spec.tokenizer_sha256 == tokenizer.sha256
    first = RowReader(tokens, "train").rows(torch.arange(1).numpy())[0]
    assert first[0] == tokenizer.bos_id


def test_old_journal_and_summary_are_understood():
    assert [r["train/loss"] for r in read_journal(OLD / "metrics.jsonl") if "train/loss" in r] == LOSSES
    assert [event["event"] for event in read_events(OLD / "metrics.jsonl")][0] == "start"
    summary = Summary.read(OLD / "summary.json")
    assert (summary.status, summary.step, summary.val_bpb) == ("finished", 3, VAL_BPB)
