"""Training goes on while a checkpoint is written, and what is written is what was there when the save began."""

import errno
import os
import shutil
import threading
import time

import pytest
import safetensors.torch
import torch
import torch.distributed as dist
from ranks import run_ranks
from saves import equal, meta, train, trained, values

from raychat import storage
from raychat.storage import Store
from raychat.training import checkpoint, snapshot
from raychat.training.fence import Fence
from raychat.training.saver import Saver
from raychat.training.world import World


def make_saver(root, *, keep=9, fence=lambda: False, world=None):
    return Saver(root, world or World(), keep=keep, fence=fence)


def saved(saver, step, val_bpb=None):
    """The outcome of one save of a trained model."""
    saver.begin(*trained(), meta(step, val_bpb))
    return saver.wait()


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


class Gate:
    """A fence that holds the thread until the test lets it pass."""

    def __init__(self):
        self.open = threading.Event()

    def __call__(self):
        assert self.open.wait(60)
        return False


def test_checkpoint_holds_what_was_there_when_the_save_began(tmp_path):
    """The thread has not written a byte when weights and moments change."""
    gate = Gate()
    saver = make_saver(tmp_path, fence=gate)
    model, optimizer = trained()
    before = values(model, optimizer)
    saver.begin(model, optimizer, meta(2))
    train(model, optimizer, 2, seed=1)
    assert not equal(before, values(model, optimizer))
    gate.open.set()
    saver.wait()
    other = trained(steps=1, seed=5)
    checkpoint.verify(tmp_path / "step_00000002").load(*other)
    assert equal(values(*other), before)
    assert other[1].step_count == 2


def test_files_are_the_same_whether_training_waits_or_goes_on(tmp_path):
    model, optimizer = trained()
    for name, steps in (("waits", 0), ("goes-on", 2)):
        saver = make_saver(tmp_path / name)
        saver.begin(model, optimizer, meta(2))
        train(model, optimizer, steps)
        assert saver.wait().error is None
    assert content(tmp_path / "waits" / "step_00000002") == content(tmp_path / "goes-on" / "step_00000002")


def test_files_are_those_of_the_safetensors_library(tmp_path):
    model, optimizer = trained()
    saver = make_saver(tmp_path)
    saver.begin(model, optimizer, meta(3))
    saver.wait()
    written = (tmp_path / "step_00000003" / "model.safetensors").read_bytes()
    theirs = safetensors.torch.load(written)
    assert {name: tensor.dtype for name, tensor in theirs.items()} == {
        name: tensor.dtype for name, tensor in model.state_dict().items()
    }
    assert len(written) == len(safetensors.torch.save({n: t.contiguous() for n, t in model.state_dict().items()}))


def test_memory_in_pieces_holds_the_same_file(monkeypatch):
    """Pieces far smaller than the tensors, of all element sizes, among them one of no and one of one element."""
    tensors = {
        "a": torch.arange(1000.0).view(10, 100).t(),
        "b": torch.randn(333, generator=torch.Generator().manual_seed(0)).bfloat16(),
        "c": torch.tensor(7, dtype=torch.int64),
        "d": torch.zeros(0, 4),
        "e": torch.arange(5, dtype=torch.uint8),
    }
    monkeypatch.setattr(snapshot, "LEAST_PIECE", 3)
    monkeypatch.setattr(snapshot, "LARGEST_PIECE", 64)
    asked, empty = [], torch.empty
    monkeypatch.setattr(
        torch, "empty", lambda size, dtype, pin_memory=False: asked.append(size) or empty(size, dtype=dtype)
    )
    file = snapshot.HostFile([(name, tensor.dtype, tensor.shape) for name, tensor in tensors.items()], pinned=True)
    monkeypatch.undo()
    assert len(asked) > 20
    assert sum(asked) == file.size
    file.fill(tensors)
    read = safetensors.torch.load(b"".join(file.blocks()))
    assert equal(read, tensors)


def test_page_locked_memory_is_asked_for_in_pieces_that_are_not_rounded_up():
    size = 9 * 10**9 + 12345
    sizes = snapshot.piece_sizes(size)
    assert sum(sizes) == size
    assert all(part.bit_count() == 1 and part <= 2**28 for part in sizes[:-1])
    assert sizes[-1] <= 2**20
    assert snapshot.piece_sizes(2**28) == [2**28]
    assert snapshot.piece_sizes(100) == [100]


def test_page_locked_memory_that_is_not_there_is_said_and_done_without(monkeypatch, caplog):
    empty = torch.empty

    def refused(size, dtype, pin_memory=False):
        if pin_memory:
            raise RuntimeError("CUDA error: out of memory")
        return empty(size, dtype=dtype)

    monkeypatch.setattr(torch, "empty", refused)
    file = snapshot.HostFile([("a", torch.float32, torch.Size([3]))], pinned=True)
    file.fill({"a": torch.ones(3)})
    assert safetensors.torch.load(b"".join(file.blocks()))["a"].tolist() == [1, 1, 1]
    assert "no page-locked memory" in caplog.text


def test_training_does_not_wait_for_the_writing(tmp_path):
    gate = Gate()
    saver = make_saver(tmp_path, fence=gate)
    saver.begin(*trained(), meta(2))
    assert saver.busy
    assert saver.finished() is None
    assert checkpoint.steps(tmp_path) == []
    gate.open.set()
    deadline = time.monotonic() + 60
    while (outcome := saver.finished()) is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert (outcome.step, outcome.error, outcome.uri) == (2, None, str(tmp_path / "step_00000002"))
    assert outcome.state == meta(2)["state"]
    assert 0 < outcome.stall_s <= outcome.total_s
    assert outcome.bytes == sum(path.stat().st_size for path in (tmp_path / "step_00000002").glob("*.safetensors"))
    assert saver.finished() is None  # handed out once
    assert saver.wait() is None


def test_one_save_is_in_flight_at_most_and_no_outcome_is_lost(tmp_path):
    gate = Gate()
    saver = make_saver(tmp_path, fence=gate)
    saver.begin(*trained(), meta(2))
    threading.Timer(0.2, gate.open.set).start()
    saver.begin(*trained(), meta(4))  # returns when the first is done
    assert 2 in checkpoint.steps(tmp_path)
    assert saver.wait().step == 4
    assert saver.finished().step == 2
    assert saver.finished() is None
    saver.close()


def test_the_copy_in_memory_is_used_again(tmp_path):
    saver = make_saver(tmp_path)
    saved(saver, 2)
    before = {name: file._pieces[0].data_ptr() for name, file in saver._snapshot.files.items()}
    saved(saver, 4)
    assert {name: file._pieces[0].data_ptr() for name, file in saver._snapshot.files.items()} == before


def test_checkpoint_is_never_written_over(tmp_path):
    saver = make_saver(tmp_path)
    saved(saver, 2)
    before = content(tmp_path / "step_00000002")
    saver.begin(*trained(seed=3), meta(2))
    assert saver.wait().uri == str(tmp_path / "step_00000002")
    assert content(tmp_path / "step_00000002") == before


def test_driver_that_lost_the_lease_changes_nothing(tmp_path):
    assert saved(make_saver(tmp_path), 2).error is None
    (tmp_path / ".step_00000004.other.tmp").mkdir()  # the new driver is at work
    outcome = saved(make_saver(tmp_path, fence=lambda: True), 4)
    assert outcome.fenced
    assert outcome.uri is None
    assert sorted(os.listdir(tmp_path)) == [".step_00000004.other.tmp", "step_00000002"]


def test_lease_that_is_lost_while_writing_prevents_the_commit(tmp_path):
    answers = iter([False, True])
    outcome = saved(make_saver(tmp_path, fence=lambda: next(answers)), 4)
    assert outcome.fenced
    assert checkpoint.steps(tmp_path) == []


def test_lease_that_cannot_be_asked_for_fails_the_save_only(tmp_path):
    def unknown():
        raise OSError("no route to host")

    outcome = saved(make_saver(tmp_path, fence=unknown), 4)
    assert not outcome.fenced
    assert "no route to host" in outcome.error


@pytest.mark.parametrize("call", range(6))
def test_save_that_fails_at_any_point_leaves_nothing_and_does_not_raise(tmp_path, monkeypatch, call):
    """Four files, the marker and the rename end with a sync each; the disk fails at one of them."""
    saver = make_saver(tmp_path)
    saved(saver, 2)
    where, number = ("fsync", call) if call < 5 else ("rename", 0)
    original, count = getattr(os, where), iter(range(10**6))

    def fails(*args, **keywords):
        if next(count) == 2 * number:  # a file and its folder are synced in turn
            raise OSError(errno.EIO, "Input/output error")
        return original(*args, **keywords)

    monkeypatch.setattr(os, where, fails)
    outcome = saved(saver, 4)
    assert "Input/output error" in outcome.error
    assert os.listdir(tmp_path) == ["step_00000002"]
    monkeypatch.undo()
    assert saved(saver, 6).error is None
    assert checkpoint.newest(tmp_path, echo=print).step == 6


def test_what_cannot_be_said_in_json_fails_the_save_and_not_training(tmp_path):
    outcome = saved(make_saver(tmp_path), 2, val_bpb=float("nan"))
    assert "not JSON compliant" in outcome.error
    assert os.listdir(tmp_path) == []


def with_free_space(monkeypatch, free):
    """`free()` is what the disk says."""
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=free()))


def test_disk_that_is_too_small_is_told_with_numbers_before_anything_is_written(tmp_path, monkeypatch):
    with_free_space(monkeypatch, lambda: 50_000)
    outcome = saved(make_saver(tmp_path), 2)
    assert "has 0.000 GB free and a checkpoint needs 0.00" in outcome.error
    assert os.listdir(tmp_path) == []


def test_old_checkpoint_makes_room_for_the_new_one(tmp_path, monkeypatch):
    """The oldest that is neither the newest nor the best, and no more than one."""
    saver = make_saver(tmp_path)
    for step, bpb in ((1, 1.0), (2, 2.0), (3, 2.0), (4, 2.0)):
        saved(saver, step, bpb)
    with_free_space(monkeypatch, lambda: 10**9 if len(checkpoint.steps(tmp_path)) < 4 else 1000)
    assert saved(saver, 5, 2.0).error is None
    assert checkpoint.steps(tmp_path) == [5, 4, 3, 1]
    with_free_space(monkeypatch, lambda: 1000)
    assert "GB free" in saved(saver, 6, 2.0).error
    assert checkpoint.steps(tmp_path) == [5, 4, 1]


def test_disk_that_fills_up_while_writing_is_given_a_second_try(tmp_path, monkeypatch):
    saver = make_saver(tmp_path)
    for step in (1, 2, 3):
        saved(saver, step)
    original = storage.os.fsync

    def full(descriptor):
        if checkpoint.steps(tmp_path) == [3, 2, 1]:
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    assert saved(saver, 4).error is None
    assert checkpoint.steps(tmp_path) == [4, 3, 2]
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")))
    assert "No space left on device: " in (error := saved(saver, 5).error)
    assert "GB free and a checkpoint needs" in error


def test_old_checkpoints_go_after_a_success(tmp_path):
    saver = make_saver(tmp_path, keep=2)
    for step, bpb in ((1, 2.0), (2, 1.0), (3, 1.5), (4, 1.4), (5, 1.3)):
        saved(saver, step, bpb)
    assert checkpoint.steps(tmp_path) == [5, 4, 2]


def test_leftovers_of_a_killed_save_are_cleared_by_the_next(tmp_path):
    (tmp_path / ".step_00000002.0123.tmp").mkdir()
    (tmp_path / ".step_00000002.0123.tmp" / "model.safetensors").write_bytes(b"half")
    assert saved(make_saver(tmp_path), 2).error is None
    assert os.listdir(tmp_path) == ["step_00000002"]


def of_attempt(number, step=2, tag="tag"):
    return meta(step, tag=tag) | {"attempt": number}


def test_a_checkpoint_of_another_attempt_stays_when_it_verifies(tmp_path):
    assert saved(make_saver(tmp_path), 2).error is None
    before = content(tmp_path / "step_00000002")
    saver = make_saver(tmp_path)
    saver.begin(*trained(seed=3), of_attempt(2))
    assert saver.wait().error is None
    assert content(tmp_path / "step_00000002") == before


@pytest.mark.parametrize("harm", ["flip", "remove", "of another run"])
def test_a_checkpoint_of_another_attempt_that_is_no_good_makes_way(tmp_path, harm):
    first = make_saver(tmp_path)
    first.begin(*trained(), of_attempt(1, tag="else" if harm == "of another run" else "tag"))
    assert first.wait().error is None
    model = tmp_path / "step_00000002" / "model.safetensors"
    if harm == "flip":
        data = bytearray(model.read_bytes())
        data[-3] ^= 1
        model.write_bytes(data)
    elif harm == "remove":
        model.with_name("checkpoint.json").unlink()
    saver = make_saver(tmp_path)
    saver.begin(*trained(seed=3), of_attempt(2))
    assert saver.wait().error is None
    assert checkpoint.verify(tmp_path / "step_00000002").meta["attempt"] == 2
    assert os.listdir(tmp_path / "damaged-2") == ["step_00000002"]


def test_an_attempt_that_a_later_one_has_overtaken_saves_and_deletes_nothing(tmp_path):
    """Only the attempts of one driver have an order: between drivers the lease decides."""
    store = Store.of(tmp_path / "run")
    early, late, other = (Fence(store, holder, number) for holder, number in (("a", 1), ("a", 2), ("b", 1)))
    early.begin()
    saver = make_saver(tmp_path / "checkpoints", keep=1, fence=early)
    for step in (1, 2):
        assert saved(saver, step).error is None
    late.begin()
    early.begin()  # one that was held up and begins only now
    assert (early(), late()) == (True, False)
    outcome = saved(saver, 3)
    assert outcome.fenced
    assert "later attempt" in outcome.error
    assert checkpoint.steps(tmp_path / "checkpoints") == [2]
    other.begin()
    assert (late(), other()) == (False, False)


def test_old_checkpoints_stay_when_another_attempt_begins_during_the_save(tmp_path):
    asked = []
    saver = make_saver(tmp_path, keep=1, fence=lambda: asked.append(None) or len(asked) == 6)
    for step in (1, 2):
        assert saved(saver, step).error is None
    assert len(asked) == 6  # before it clears the way, before the commit and before it deletes
    assert checkpoint.steps(tmp_path) == [2, 1]


def _outcomes(root):
    """What a rank is told of a save, of one that fails on rank 1, and of one after that."""
    world = World(dist.get_rank(), dist.get_world_size())
    saver = make_saver(root, world=world)
    model, optimizer = trained()
    told = []
    for step in (2, 4, 6):
        original = os.fsync
        if step == 4 and world.rank == 1:
            os.fsync = lambda _: (_ for _ in ()).throw(OSError(errno.EIO, "broken disk"))
        saver.begin(model, optimizer, meta(step, tag="tag" if world.rank == 0 else "ignored"))
        train(model, optimizer, 1)  # collectives of training and of the thread at the same time
        told.append(saver.wait())
        os.fsync = original
    saver.begin(model, optimizer, meta(8))
    if world.rank == 0:
        while not saver.finished():
            time.sleep(0.01)
    told.append(saver.wait())  # rank 0 has had it: no rank gets it again
    saver.close()
    return told


def test_all_ranks_are_told_the_same_and_fail_together(tmp_path):
    first, second = run_ranks(_outcomes, 2, tmp_path)
    assert first == second
    assert [outcome and outcome.uri is not None for outcome in first] == [True, False, True, None]
    assert "broken disk" in first[1].error
    assert checkpoint.steps(tmp_path) == [8, 6, 2]
    assert len(os.listdir(tmp_path)) == 3
    assert checkpoint.verify(tmp_path / "step_00000006").meta["config"] == {"model_tag": "tag"}
    assert torch.is_tensor(checkpoint._SliceReader(tmp_path / "step_00000006").read("lm_head.weight/exp_avg", 0, 70))
