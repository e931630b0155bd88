"""`--init-from`: a new run begins with exported weights, and is a run like any other from there on."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from exports import make_source
from ranks import run_ranks
from runs import after, open_session, run_here

from raychat.config import Config
from raychat.data.order import lanes_for
from raychat.errors import CheckpointError, ConfigError
from raychat.export.source import find_source
from raychat.export.write import export
from raychat.model import GPT
from raychat.training.build import train
from raychat.training.events import Metrics
from raychat.training.job import BatchPlan, Job
from raychat.training.loop import Signal
from raychat.training.reading import read_here
from raychat.training.world import World

F32 = torch.float32


@pytest.fixture(scope="module")
def weights(tiny_flags, prepared_base, tmp_path_factory) -> Path:
    """Exported weights of a run of four steps. Not to be written to."""
    folder = tmp_path_factory.mktemp("weights")
    own = {"base_dir": str(prepared_base), "storage_path": str(folder / "runs"), "eval_every": -1}
    run_here(Config.from_flat(tiny_flags | own | {"num_iterations": 4, "model_tag": "before"}))
    source = find_source(path=str(folder / "runs" / "before"))
    export(source, folder / "lineage", ["lineage"], dtype=F32, echo=lambda line: None)
    return folder / "lineage"


@pytest.fixture
def config(own_config, weights):
    """Settings of a run that begins with `weights`, with another seed than they had."""
    return lambda **changes: own_config(
        **{"init_from": str(weights), "seed": 7, "eval_every": -1, "model_tag": "new"} | changes
    )


@torch.no_grad()
def first_loss(config, weights):
    """Loss of the exported model on the first batch of a run."""
    model = find_source(path=str(weights)).load(torch.device("cpu"), F32).model
    session = open_session(config)
    tokens_dir = str(session.data.manifest.folder)
    session.abort()
    plan = BatchPlan(
        tokens_dir=tokens_dir,
        seed=config.run.seed,
        lanes=lanes_for(8),
        cursor=0,
        num_batches=1,
        rows_per_batch=8,
        rank=0,
        world_size=1,
    )
    rows = torch.from_numpy(next(read_here(plan)).rows.astype("int64"))
    return model(rows[:, :-1], rows[:, 1:]).item()


def test_first_loss_is_that_of_the_exported_weights(config, own_config, weights):
    ran = run_here(config())
    assert ran.losses[0] == pytest.approx(first_loss(config(), weights), rel=1e-6)
    random = run_here(own_config(seed=7, eval_every=-1, num_iterations=1))
    assert ran.losses[0] != pytest.approx(random.losses[0], rel=1e-4)
    assert json.loads((ran.run_dir / "config.json").read_text())["config"]["init_from"] == str(weights)


def test_ranks_begin_with_the_same_weights(config):
    """Rank 0 reads them; the losses of two ranks are those of one."""
    one = run_here(config(model_tag="one", num_iterations=2))
    session = open_session(config(num_iterations=2))
    job = dataclasses.asdict(session.begin_attempt(world_size=2))
    losses, none = run_ranks(_losses, 2, job)
    session.abort()
    assert none == []
    assert losses == pytest.approx(one.losses, rel=1e-5)


def _losses(job: dict) -> list[float]:
    rank, events = dist.get_rank(), []
    train(Job(**job), world=World(rank, 2, rank, 2), batches=read_here, sink=events.append)
    return [
        event.values["train/loss"] for event in events if isinstance(event, Metrics) and "train/loss" in event.values
    ]


def test_resumed_run_does_not_need_the_directory_any_more(config, weights, tmp_path):
    copy = str(shutil.copytree(weights, tmp_path / "copy"))
    whole = run_here(config(init_from=copy, model_tag="whole"))
    stopped = run_here(config(init_from=copy), poll=after(2, Signal.STOP))
    shutil.rmtree(copy)
    resumed = run_here(config(init_from=copy))
    assert len(stopped.losses) == 2
    assert resumed.losses == whole.losses


def test_going_back_to_the_beginning_is_going_back_to_these_weights(config, weights, monkeypatch):
    """A loss that is no number before the first checkpoint: the run begins anew with the weights that it was given."""
    forward, calls = GPT.forward, []

    def once_no_number(self, idx, targets=None, reduction="mean"):
        calls.append(idx)
        return forward(self, idx, targets, reduction) * (float("nan") if len(calls) == 6 else 1.0)

    monkeypatch.setattr(GPT, "forward", once_no_number)
    ran = run_here(config(save_every=-1))
    monkeypatch.undo()
    steps = [event for event in ran.events if isinstance(event, Metrics) and "train/loss" in event.values]
    assert [event.step for event in steps] == [0, 0, 1, 2, 3]
    expected = first_loss(config(model_tag="other"), weights)
    assert [event.values["train/loss"] for event in steps[:2]] == pytest.approx([expected] * 2, rel=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"aspect_ratio": 24}, r"n_embd 32 instead of 48.*Give --depth 2 --aspect-ratio 16 --head-dim 16"),
        ({"depth": 3}, r"n_layer 2 instead of 3"),
        ({"num_kv_heads": 1}, r"n_kv_head 2 instead of 1"),
    ],
)
def test_other_shapes_are_refused_with_the_flags_that_fit(config, changes, message):
    with pytest.raises(ConfigError, match=message):
        run_here(config(**changes))


def test_flags_of_the_refusal_make_a_model_that_fits(config):
    values = {"depth": 2, "aspect_ratio": 16, "head_dim": 16, "vocab_size": 300}
    with pytest.raises(ConfigError) as refused:
        run_here(config(depth=1, head_dim=8, aspect_ratio=40))
    said = str(refused.value).partition("Give ")[2].partition(", or")[0].split()
    given = {
        flag.removeprefix("--").replace("-", "_"): int(value) for flag, value in zip(said[::2], said[1::2], strict=True)
    }
    assert given == values
    assert len(run_here(config(**given, num_iterations=1)).losses) == 1


def test_another_tokenizer_is_refused(config, tmp_path):
    other = make_source(tmp_path, aspect_ratio=16, head_dim=16, num_kv_heads=-1, max_seq_len=32)
    export(other, tmp_path / "other", ["huggingface"], dtype=F32, echo=lambda line: None)
    with pytest.raises(ConfigError, match=rf"reads another tokenizer.*--tokenizer {tmp_path / 'other' / 'tokenizer'}"):
        run_here(config(init_from=str(tmp_path / "other")))


def test_directory_that_is_not_there_or_no_export_or_damaged_is_named(config, weights, tmp_path):
    for place in (tmp_path / "nothing", tmp_path):
        with pytest.raises(ConfigError, match=rf"--init-from {place}: there is no exported directory"):
            run_here(config(init_from=str(place)))
    copy = Path(shutil.copytree(weights, tmp_path / "copy"))
    file = copy / "model_000004.safetensors"
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(CheckpointError, match=r"model_000004.safetensors is missing or damaged"):
        run_here(config(init_from=str(copy)))
    assert not (config().run_dir / "checkpoints").exists()


def test_another_context_length_is_allowed_and_said(tiny_config, weights):
    """The weights fit any length; a longer one is what training on is for."""
    lines = []
    session = open_session(tiny_config(init_from=str(weights), max_seq_len=64), echo=lines.append)
    session.abort()
    assert "note: --max-seq-len is 64, and these weights were trained with 32" in lines
