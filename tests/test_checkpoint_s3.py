"""In an object store a checkpoint is whole or absent too, whatever happens to the writer, the network and the server."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from s3_server import CUT, proxy
from saves import equal, meta, train, trained, values

from raychat import storage
from raychat.storage import Store
from raychat.training import checkpoint, local_copy, saver
from raychat.training.saver import Saver
from raychat.training.world import World


@pytest.fixture
def uri(server, tmp_path):
    """Where the checkpoints of a test lie; `port` for the way through a proxy."""
    return lambda port=None: server.uri(f"bucket/{tmp_path.name}/checkpoints", port=port)


@pytest.fixture
def impatient(monkeypatch):
    """Failures are not tried again for long."""
    monkeypatch.setattr(storage, "SILENCE_S", 1.0)
    monkeypatch.setattr(storage, "ATTEMPTS", 1)
    storage._connect.cache_clear()
    yield
    storage._connect.cache_clear()


def save_here(address, step=2, val_bpb=None):
    saver.save(Store.of(address), *trained(), meta(step, val_bpb), World())


def outcome_of(address, step):
    one = Saver(Store.of(address), World(), keep=9, fence=lambda: False)
    one.begin(*trained(), meta(step))
    return one.wait()


def files(store):
    """The folder of the files of the checkpoint in `store`, but for its marker."""
    (folder,) = [name for name in store.names() if name != "COMMITTED.json"]
    return store.child(folder)


def place_of(uri, step, name):
    """Where the file `name` of the checkpoint of `step` lies."""
    store = Store.of(uri()).child(f"step_{step:08d}")
    return store if name == "COMMITTED.json" else files(store)


def newest_step(address, told=None):
    found = checkpoint.newest(Store.of(address), echo=(told if told is not None else []).append)
    return found and found.step


def test_saved_and_loaded_is_the_same_bit_for_bit(uri, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    model, optimizer = trained()
    saver.save(Store.of(uri()), model, optimizer, meta(2), World())
    other = trained(steps=1, seed=5)
    checkpoint.newest(Store.of(uri()), echo=print).load(*other)
    assert equal(values(*other), values(model, optimizer))
    assert list(tmp_path.glob("raychat-*")) == []  # what was downloaded is gone
    assert Store.of(uri()).names() == ["step_00000002"]


def _save_rank(address):
    world = World(dist.get_rank(), dist.get_world_size())
    model, optimizer = trained()
    saver.save(Store.of(address), model, optimizer, meta(2), world)
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}, optimizer.owned_state()


def _load_rank(address):
    """Ranks of one node: the first downloads for both."""
    rank = dist.get_rank()
    world = World(rank, dist.get_world_size(), local_rank=rank, local_world_size=dist.get_world_size())
    model, optimizer = trained(steps=1, seed=7)
    downloads, original = [], Store.download
    Store.download = lambda self, *args: downloads.append(args) or original(self, *args)
    checkpoint.trusted(address).load(model, optimizer, world)
    return len(downloads), optimizer.owned_state()


def test_another_number_of_ranks_goes_on(uri):
    (weights, own), (_, rest) = run_ranks(_save_rank, 2, uri())
    store = Store.of(uri()).child("step_00000002")
    assert len([name for name in files(store).names() if name.startswith("optim-")]) == 2
    model, optimizer = trained(steps=1, seed=5)
    checkpoint.verify(store).load(model, optimizer)
    assert equal(dict(model.state_dict()), weights)
    whole = {key: tensor for key, (_, tensor) in optimizer.owned_state().items()}
    (downloads, mine), (none, theirs) = run_ranks(_load_rank, 2, store.address)
    assert (downloads, none) == (4, 0)
    for owned in (own, rest, mine, theirs):
        assert all(torch.equal(part, whole[key][first : first + len(part)]) for key, (first, part) in owned.items())
    assert own.keys() | rest.keys() == mine.keys() | theirs.keys() == whole.keys()


@pytest.mark.parametrize("name", ["model.safetensors", "checkpoint.json", "MANIFEST.rank00000.json", "COMMITTED.json"])
def test_damage_is_named_and_the_one_before_is_found(uri, name):
    for step in (2, 4, 6, 8):
        save_here(uri(), step)
    data = bytearray(place_of(uri, 8, name).read_bytes(name))
    data[-3] ^= 16
    place_of(uri, 8, name).write_bytes(name, bytes(data))
    place_of(uri, 6, name).write_bytes(name, bytes(data)[:-1])
    if name != "COMMITTED.json":  # without which there is no checkpoint, and nothing to name
        place_of(uri, 4, name).delete(name)
    told = []
    assert newest_step(uri(), told) == (4 if name == "COMMITTED.json" else 2)
    assert all(name in line for line in told)
    assert len(told) == (2 if name == "COMMITTED.json" else 3)
    assert "hidden" not in "".join(told)


def test_manifest_of_another_run_is_named(uri):
    save_here(uri(), 2)
    save_here(uri(), 4)
    saver.save(Store.of(uri()).child("else"), *trained(), meta(4, tag="else"), World())
    name = "MANIFEST.rank00000.json"
    theirs = files(Store.of(uri()).child("else", "step_00000004"))
    place_of(uri, 4, name).write_bytes(name, theirs.read_bytes(name))
    told = []
    assert newest_step(uri(), told) == 2
    assert "belongs to step 4 of attempt 1 of else" in told[0]


def test_what_has_no_marker_does_not_exist(uri):
    save_here(uri(), 2)
    save_here(uri(), 4)
    store = Store.of(uri())
    store.delete("step_00000004/COMMITTED.json")
    store.write_bytes("step_00000004/of-a-rank-that-is-gone", b"x")
    assert checkpoint.steps(store) == [2]
    save_here(uri(), 4)  # is not mixed with what lies there
    assert not store.exists("step_00000004/of-a-rank-that-is-gone")
    assert newest_step(uri()) == 4
    store.delete("step_00000004/COMMITTED.json")
    assert checkpoint.prune_orphans(store) == ["step_00000004"]
    assert store.names() == ["step_00000002"]


def test_pruning_and_moving_aside(uri):
    store = Store.of(uri())
    for step, bpb in ((1, 2.0), (2, 1.0), (3, 1.5), (4, 1.4)):
        save_here(uri(), step, bpb)
    assert checkpoint.prune(store, keep_last=1) == [3, 1]
    assert checkpoint.set_aside_after(store, 2, "abandoned-1") == [4]
    assert store.names() == ["abandoned-1", "step_00000002"]
    assert checkpoint.verify(store.child("abandoned-1", "step_00000004")).step == 4


KILLED = """
import sys
sys.path.insert(0, sys.argv[2])
from saves import meta, trained
from raychat.storage import Store
from raychat.training import saver
from raychat.training.world import World
saver.save(Store.of(sys.argv[1]), *trained(), meta(4), World())
"""


@pytest.mark.parametrize("at", ["model.safetensors", "COMMITTED.json"])
def test_writer_killed_in_the_middle_of_an_upload_leaves_the_checkpoint_before(server, uri, at):
    save_here(uri(), 2)
    arrived, release = threading.Event(), threading.Event()

    def hold(method, path):
        if method in ("PUT", "POST") and "step_00000004/" in path and f"/{at}" in path:
            arrived.set()
            release.wait(60)
            return CUT
        return None

    with proxy(server, hold) as port:
        here = str(Path(__file__).parent)
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED, uri(port), here], env=environment, cwd=Path(here).parent
        )
        assert arrived.wait(120)
        process.send_signal(signal.SIGKILL)
        process.wait()
        release.set()
    assert Store.of(uri()).names() == ["step_00000002", "step_00000004"]
    assert newest_step(uri()) == 2
    save_here(uri(), 4)
    assert newest_step(uri()) == 4


@pytest.mark.parametrize("at", ["optim-00000", "model.safetensors", "MANIFEST", "COMMITTED"])
def test_server_that_refuses_any_of_the_files_leaves_the_checkpoint_before(server, uri, impatient, at):
    save_here(uri(), 2)
    with proxy(
        server, lambda method, path: 503 if method == "PUT" and "step_00000004" in path and f"/{at}" in path else None
    ) as port:
        outcome = outcome_of(uri(port), 4)
    assert "AWS Error" in outcome.error
    assert "hidden" not in outcome.error
    assert newest_step(uri()) == 2
    assert Store.of(uri()).names() == ["step_00000002"]  # and clears what was written
    assert outcome_of(uri(), 4).error is None
    assert newest_step(uri()) == 4


def test_server_that_is_frozen_fails_the_save_and_not_the_checkpoint_before(server, uri, impatient):
    save_here(uri(), 2)
    with server.frozen():
        assert "Timeout" in outcome_of(uri(), 4).error
        with pytest.raises(OSError, match="Timeout"):  # is no reason to go back to an older one
            newest_step(uri())
    assert newest_step(uri()) == 2
    assert outcome_of(uri(), 4).error is None


def test_slow_server_does_not_hold_up_training(server, uri):
    def slow(method, path):
        time.sleep(0.1)

    with proxy(server, slow) as port:
        one = Saver(Store.of(uri(port)), World(), keep=9, fence=lambda: False)
        model, optimizer = trained()
        one.begin(model, optimizer, meta(2))
        train(model, optimizer, 1)
        assert one.busy
        outcome = one.wait()
    assert outcome.error is None
    assert outcome.total_s > 0.5
    assert newest_step(uri()) == 2


def test_download_that_is_not_what_was_saved_is_refused(uri):
    save_here(uri(), 2)
    found = checkpoint.newest(Store.of(uri()), echo=print)
    held = files(found.store)
    data = bytearray(held.read_bytes("model.safetensors"))
    data[-3] ^= 1
    held.write_bytes("model.safetensors", bytes(data))
    with pytest.raises(OSError, match=r"model.safetensors.* is damaged"):
        found.load(*trained())


def test_a_rank_of_an_earlier_attempt_changes_nothing_of_a_checkpoint(uri):
    """Its machine is cut off from the cluster and not from storage: it writes, and clears up, the step it thinks it saves."""
    late = Saver(Store.of(uri()), World(), keep=9, fence=lambda: False)
    begun = []

    def saves_meanwhile(request, manifests, target):
        begun.append(target)
        saver.save(Store.of(uri()), *trained(seed=3), meta(4) | {"attempt": 2}, World())
        raise OSError("no route to rank 1")

    late._commit = saves_meanwhile
    late.begin(*trained(), meta(4))
    assert "no route" in late.wait().error
    assert len(begun) == 1
    found = checkpoint.newest(Store.of(uri()), echo=print)
    assert (found.step, found.meta["attempt"]) == (4, 2)
    other = trained(steps=1, seed=5)
    found.load(*other)
    assert equal(values(*other), values(*trained(seed=3)))


def test_a_marker_that_arrives_although_the_save_failed_is_taken_back_before_the_files(uri, monkeypatch):
    deleted, original, delete = [], Store.write_bytes, storage._Bucket.delete

    def answer_lost(store, name, data):
        original(store, name, data)
        if name.endswith("COMMITTED.json"):
            raise OSError("the answer was lost")

    monkeypatch.setattr(Store, "write_bytes", answer_lost)
    monkeypatch.setattr(storage._Bucket, "delete", lambda *args: deleted.append(args[1]) or delete(*args))
    assert "answer was lost" in outcome_of(uri(), 4).error
    assert deleted[0] == "COMMITTED.json"
    assert len(deleted) == 3  # the files, and what is left of the folder
    assert Store.of(uri()).names() == []


def test_what_a_killed_process_has_left_of_a_copy_is_cleared_by_the_next(uri, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    save_here(uri(), 2)
    save_here(uri(), 4)
    before, after = (checkpoint.trusted(Store.of(uri()).child(f"step_0000000{step}")) for step in (2, 4))
    here = [local_copy.at_hand(before.store, World(), before._contents) for _ in range(2)]
    left = here[0].__enter__()  # is never left
    (left / "of-before").touch()
    with here[1] as folder:
        assert folder == left
        assert not (folder / "of-before").exists()
    after.load(*trained(steps=1, seed=5))
    assert list(tmp_path.iterdir()) == []
    nodes = [World(rank, 4, rank % 2, 2) for rank in range(4)]
    folders = [local_copy._folder(after.store, world) for world in nodes]
    assert folders[0] == folders[1] != folders[2] == folders[3]
    assert (
        folders[0]
        == local_copy._folder(before.store, World())
        != local_copy._folder(Store.of("s3://b/c/step_00000002"), World())
    )


def test_a_copy_that_does_not_fit_is_said_with_numbers_before_anything_is_downloaded(uri, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    save_here(uri(), 2)
    found = checkpoint.newest(Store.of(uri()), echo=print)
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    monkeypatch.setattr(Store, "download", lambda *_: pytest.fail("downloaded"))
    with pytest.raises(OSError, match=r"has 0.00\d GB and .* only 0.000 GB free.*TMPDIR"):
        found.load(*trained())
