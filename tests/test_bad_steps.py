"""Steps without a number: no rank's weights see them, and a batch that is left out leaves no other trace."""

import dataclasses
import hashlib
import math

import numpy as np
import pytest
import runs
import torch.distributed as dist
from ranks import run_ranks
from runs import dying_at, open_session, run_here
from safetensors.torch import load_file

from raychat.config import Config
from raychat.data.batches import Batch, leave_out, left_out
from raychat.model import GPT
from raychat.training import checkpoint
from raychat.training.build import Job, train
from raychat.training.events import Line, Metrics, Note
from raychat.training.loop import DivergedError
from raychat.training.reading import read_here
from raychat.training.world import World

ROWS = 8  # of a global batch of the tiny run


@pytest.fixture
def config(own_config):
    """Makes a configuration of six steps; saves are waited for."""
    return lambda **changes: own_config(**{"num_iterations": 6, "save_mode": "sync"} | changes)


@dataclasses.dataclass
class Seen:
    """What one rank saw: weights as they were at every batch that was trained on, at the end, and what was told."""

    before: list[tuple[int, str]] = dataclasses.field(default_factory=list)
    after: str = ""
    error: str = ""
    events: list = dataclasses.field(default_factory=list)

    @property
    def losses(self) -> dict[int, float]:
        """Loss of every step, the last one where it was made twice."""
        return {
            e.step: e.values["train/loss"] for e in self.events if isinstance(e, Metrics) and "train/loss" in e.values
        }

    def notes(self, kind: str) -> list[dict]:
        return [event.fields for event in self.events if isinstance(event, Note) and event.kind == kind]


def digest(model: GPT) -> str:
    found = hashlib.sha256()
    for tensor in model.state_dict().values():
        found.update(tensor.numpy().tobytes())
    return found.hexdigest()[:12]


def poison(cursors, bad_rank: int, rank: int, seen: Seen, set_forward) -> object:
    """A reader of batches; the loss of those at `cursors` is no number on `bad_rank`."""
    at, forward = [-1], GPT.forward

    def poisoned(self, idx, targets=None, reduction="mean"):
        if reduction == "sum":
            if not seen.before or seen.before[-1][0] != at[0]:
                seen.before.append((at[0], digest(self)))
            model.append(self)
        loss = forward(self, idx, targets, reduction)
        return loss * math.nan if reduction == "sum" and rank == bad_rank and at[0] in cursors else loss

    model: list[GPT] = []
    set_forward(poisoned)

    def batches(plan):
        for batch in read_here(plan):
            at[0] = batch.rows_consumed - plan.rows_per_batch
            yield batch

    return batches, model


def on_rank(job: dict, cursors: list[int], without: list[int]) -> Seen:
    """Train on this of two ranks with bad batches on rank 1; `without` are never offered by the reader."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    seen = Seen()
    batches, model = poison(cursors, 1, rank, seen, lambda forward: setattr(GPT, "forward", forward))

    def offered(plan):
        return (batch for batch in batches(plan) if batch.rows_consumed - ROWS not in without)

    try:
        train(Job(**job), world=World(rank, world_size, rank, world_size), batches=offered, sink=seen.events.append)
    except DivergedError as error:
        seen.error = str(error)
    seen.after = digest(model[-1])
    return seen


def train_on_two_ranks(config: Config, bad=(), without=()) -> list[Seen]:
    session = open_session(config)
    job = dataclasses.asdict(session.begin_attempt(world_size=2))
    try:
        return run_ranks(on_rank, 2, job, list(bad), list(without))
    finally:
        session.abort()


@pytest.mark.parametrize("save_every", [-1, 2])
def test_after_going_back_the_run_is_the_one_that_never_saw_the_batch(config, save_every):
    """From the seeded start without a checkpoint, from the checkpoint of step 2 with one."""
    bad = 3 * ROWS
    ranks = train_on_two_ranks(config(save_every=save_every), bad=[bad])
    undisturbed = train_on_two_ranks(config(model_tag="without"), without=[bad])
    assert [seen.error for seen in ranks] == ["", ""]
    assert [seen.after for seen in ranks] == [seen.after for seen in undisturbed]
    assert ranks[0].losses == undisturbed[0].losses
    back = max(0, save_every)
    cursors = [cursor for cursor, _ in ranks[0].before]
    assert cursors == [0, 8, 16, 24, *range(back * ROWS, bad, ROWS), 32, 40, 48]
    told = [(n["from_step"], n["bad_step"], n["cursor"]) for n in ranks[0].notes("rollback")]
    assert told == [(back, 3, bad)]
    assert ranks[1].events == []
    state = checkpoint.newest(config().run_dir / "checkpoints", echo=print).meta["state"]
    assert (state["step"], state["skipped"], state["rows_consumed"]) == (6, [bad], 7 * ROWS)


def test_an_update_that_is_left_out_leaves_the_weights_of_all_ranks_alone(config):
    ranks = train_on_two_ranks(config(on_bad_step="skip"), bad=[3 * ROWS])
    for seen in ranks:
        weights = [found for _, found in seen.before] + [seen.after]
        assert [cursor for cursor, _ in seen.before] == [0, 8, 16, 24, 32, 40]
        assert [a == b for a, b in zip(weights, weights[1:], strict=False)] == [False, False, False, True, False, False]
    assert ranks[0].after == ranks[1].after
    assert math.isnan(ranks[0].losses[3])
    assert all(math.isfinite(loss) for step, loss in ranks[0].losses.items() if step != 3)
    assert [note["action"] for note in ranks[0].notes("bad_step")] == ["skip"]


def test_stop_ends_all_ranks_with_the_weights_of_before(config):
    for seen in train_on_two_ranks(config(on_bad_step="stop"), bad=[3 * ROWS]):
        assert "step 3: the loss is nan" in seen.error
        assert seen.after == seen.before[-1][1]


def test_a_fourth_bad_batch_stops_the_run_on_all_ranks(config):
    for seen in train_on_two_ranks(config(), bad=[8, 16, 24, 32, 40]):
        assert "rows 8, 16, 24" in seen.error
        assert seen.after == seen.before[-1][1]


@pytest.mark.parametrize("mode", ["rollback", "skip"])
def test_a_run_that_is_interrupted_after_a_bad_step_ends_as_the_one_that_is_not(config, monkeypatch, mode):
    def ran(tag, *polls):
        for poll in polls:
            seen = Seen()
            once = [2 * ROWS] if poll is polls[0] else []  # the fault is gone when the run goes on
            batches, _ = poison(once, 0, 0, seen, lambda forward: monkeypatch.setattr(GPT, "forward", forward))
            monkeypatch.setattr(runs, "read_here", batches)
            try:
                run_here(config(model_tag=tag, on_bad_step=mode, save_every=2, num_iterations=8), *poll)
            except KeyboardInterrupt:
                assert poll
            monkeypatch.undo()
        found = checkpoint.newest(config(model_tag=tag).run_dir / "checkpoints", echo=print)
        return found.meta["state"], load_file(found.store.path / "model.safetensors")

    whole_state, whole = ran("whole", ())
    again_state, again = ran("again", (dying_at(7),), ())
    assert whole_state["skipped"] == again_state["skipped"] == ([2 * ROWS] if mode == "rollback" else [])
    assert whole_state["rows_consumed"] == again_state["rows_consumed"]
    assert whole_state["smooth_loss"] == again_state["smooth_loss"]
    for name, tensor in whole.items():
        assert tensor.equal(again[name])


def test_going_back_is_said_in_words_a_person_understands(config, monkeypatch):
    seen = Seen()
    batches, _ = poison([2 * ROWS], 0, 0, seen, lambda forward: monkeypatch.setattr(GPT, "forward", forward))
    monkeypatch.setattr(runs, "read_here", batches)
    ran = run_here(config(save_every=-1))
    lines = [event.text for event in ran.events if isinstance(event, Line) and "left out" in event.text]
    assert len(lines) == 1
    assert "Going back to step 0; the batch at row 16 is left out from now on (rollback 1 of at most 3)" in lines[0]
    assert ran.summary.status == "finished"
    assert len(ran.losses) == 6


def numbered(cursor: int, rows: int):
    while True:
        cursor += rows
        yield Batch(np.full((1, 1), cursor - rows), cursor, 0)


@pytest.mark.parametrize(("skipped", "rows"), [((), 8), ((16,), 8), ((8, 16, 40), 8), ((0, 24), 16), ((8,), 2)])
def test_batches_that_are_left_out_are_counted_and_the_others_keep_their_order(skipped, rows):
    count = left_out(skipped, cursor=0, rows_per_batch=rows)
    every = [rows * i for i in range(100)]
    kept = [first for first in every if not any(first <= row < first + rows for row in skipped)]
    stream = leave_out(numbered(0, rows), skipped, rows_per_batch=rows)
    assert [next(stream).rows.item() for _ in range(100 - count)] == kept
    assert left_out(skipped, cursor=1000, rows_per_batch=rows) == 0


def test_batches_are_closed_with_those_that_they_come_from():
    inner = numbered(0, 8)
    outer = leave_out(inner, (), rows_per_batch=8)
    next(outer)
    outer.close()
    assert next(inner, None) is None
