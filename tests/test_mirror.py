"""A run in an object store: what its driver wrote gets there whole, through outages and crashes, and comes back."""

import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from s3_server import CUT, proxy

from raychat.storage import Store
from raychat.tracking.journal import Journal, read_journal
from raychat.tracking.segments import join_segments, segment_name, segment_names
from raychat.training import mirror as module
from raychat.training.lease import Lease, LeaseError
from raychat.training.mirror import Mirror


@pytest.fixture(params=["folder", "s3"])
def store(request, tmp_path):
    """Where the run is kept."""
    if request.param == "folder":
        return Store.of(tmp_path / "store")
    return Store.of(request.getfixturevalue("server").uri(f"runs/{tmp_path.name}"))


class Machine:
    """A driver's machine: its copy of the run, the mirror, and what the mirror said."""

    def __init__(self, folder: Path, store: Store, **options) -> None:
        self.run_dir, self.lines = folder / "d4", []
        self.mirror = Mirror(self.run_dir, store, echo=self.lines.append, period_s=0.05, **options)

    @property
    def journal(self) -> Path:
        return self.run_dir / "metrics.jsonl"

    def train(self, first: int, end: int, loss: float = 1.0) -> None:
        """Journal the steps from `first` to before `end`, as a driver does between pull and close; `loss` tells them apart."""
        journal = Journal(self.journal)
        for step in range(first, end):
            journal.log(step, {"train/loss": loss / (step + 1)})
        journal.close()

    def write(self, **files: str) -> None:
        for name, text in files.items():
            (self.run_dir / f"{name}.json").write_text(text)

    def steps(self) -> list[int]:
        return [record["step"] for record in read_journal(self.journal)]


def begin(folder: Path, store: Store, **options) -> Machine:
    """A machine whose copy is pulled and whose mirror runs."""
    machine = Machine(folder, store, **options)
    machine.mirror.pull()
    machine.mirror.start()
    return machine


def run_once(folder: Path, store: Store, first: int, end: int) -> Machine:
    """A driver that trains these steps and ends as it should."""
    machine = begin(folder, store)
    machine.train(first, end)
    assert machine.mirror.close()
    return machine


def crash(machine: Machine) -> None:
    """The driver dies: nothing more is sent."""
    machine.mirror._closed.set()
    machine.mirror.push_soon()
    machine.mirror._thread.join()


def journal_in(store: Store, tmp_path: Path) -> bytes:
    """The journal that the store holds."""
    target = tmp_path / "joined"
    join_segments(store, target)
    return target.read_bytes()


def wait_for(condition, seconds=30.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_new_machine_gets_the_same_run(store, tmp_path):
    first = begin(tmp_path / "one", store)
    first.train(0, 5)
    first.write(config='{"a": 1}', plan="{}", mlflow='{"offset": 0}', summary="{}", other="{}")
    (first.run_dir / "loss_curve.png").write_bytes(b"\x89PNG")
    assert first.mirror.close()
    second = begin(tmp_path / "two", store)
    names = ("metrics.jsonl", "config.json", "plan.json", "mlflow.json", "summary.json", "loss_curve.png")
    for name in names:
        assert (second.run_dir / name).read_bytes() == (first.run_dir / name).read_bytes()
    assert not (second.run_dir / "other.json").exists()
    assert second.mirror.close()
    assert first.lines == second.lines == []


def test_an_interrupted_run_goes_on_on_a_new_machine_with_the_same_journal(store, tmp_path):
    first = begin(tmp_path / "one", store)
    first.train(0, 5)
    first.mirror.push_soon()
    wait_for(lambda: segment_names(store) and journal_in(store, tmp_path) == first.journal.read_bytes())
    crash(first)
    second = begin(tmp_path / "two", store)
    assert second.journal.read_bytes() == first.journal.read_bytes()
    second.train(5, 8)
    assert second.mirror.close()
    back = begin(tmp_path / "one", store)
    assert back.steps() == list(range(8))
    assert back.lines == []
    assert back.mirror.close()


def test_segments_are_whole_lines_that_never_change(store, tmp_path):
    machine = begin(tmp_path, store)
    seen: dict[str, bytes] = {}
    for step in range(6):
        machine.train(step, step + 1)
        with machine.journal.open("ab") as file:  # a line that is being written
            file.write(b'{"step": 99')
        machine.mirror.push_soon()
        wait_for(lambda: machine.mirror._sent == module.whole_lines(machine.journal))
        now = {name: store.child("journal").read_bytes(name) for name in segment_names(store)}
        assert seen.items() <= now.items()
        assert all(content.endswith(b"\n") for content in now.values())
        seen = now
    assert machine.mirror.close()
    assert [segment_name(sum(map(len, list(seen.values())[:k]))) for k in range(len(seen))] == list(seen)
    assert len(seen) == 6


def test_a_journal_larger_than_a_segment_is_sent_in_several(store, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "LARGEST_SEGMENT", 100)
    machine = run_once(tmp_path, store, 0, 8)
    assert len(segment_names(store)) > 3
    assert journal_in(store, tmp_path) == machine.journal.read_bytes()


def test_what_did_not_reach_the_store_before_a_crash_is_kept_and_sent_by_the_next_driver(store, tmp_path):
    run_once(tmp_path, store, 0, 3)
    crashed = Machine(tmp_path, store)
    crashed.mirror.pull()
    crashed.train(3, 6)
    crashed.write(summary='{"status": "failed"}')
    again = begin(tmp_path, store)
    assert again.steps() == list(range(6))
    assert "had not reached" in again.lines[0]
    assert again.mirror.close()
    assert journal_in(store, tmp_path) == again.journal.read_bytes()
    assert store.read_bytes("summary.json") == b'{"status": "failed"}'


def test_a_copy_that_never_reached_the_store_is_sent(store, tmp_path):
    crashed = Machine(tmp_path, store)
    crashed.mirror.pull()
    crashed.train(0, 3)
    again = run_once(tmp_path, store, 3, 4)
    assert again.steps() == list(range(4))
    assert journal_in(store, tmp_path) == again.journal.read_bytes()


def other_run(first: Machine, store: Store, elsewhere: Path) -> None:
    """The run is moved away and begun anew on another machine."""
    store.delete("journal")
    run_once(elsewhere, store, 0, 7)


def emptied(first: Machine, store: Store, elsewhere: Path) -> None:
    """The run is moved away."""
    store.delete("journal")


def fork(first: Machine, store: Store, elsewhere: Path) -> None:
    """The run goes on elsewhere from what the store had, and this machine had more."""
    run_once(elsewhere, store, 3, 4)
    first.train(3, 9, loss=2.0)  # both may journal step 3 in the same millisecond


@pytest.mark.parametrize("elsewhere", [other_run, emptied, fork])
def test_a_copy_of_another_history_is_set_aside_whole(store, tmp_path, elsewhere):
    first = run_once(tmp_path / "one", store, 0, 3)
    elsewhere(first, store, tmp_path / "two")
    mine, theirs = first.journal.read_bytes(), journal_in(store, tmp_path)
    again = begin(tmp_path / "one", store)
    assert (tmp_path / "one" / "d4.other-1" / "metrics.jsonl").read_bytes() == mine
    assert "d4.other-1" in again.lines[0]
    assert (again.journal.read_bytes() if again.journal.exists() else b"") == theirs
    assert again.mirror.close()
    assert journal_in(store, tmp_path) == theirs


def test_a_run_that_begins_anew_takes_nothing_over_from_a_copy_that_was_never_sent(store, tmp_path):
    crashed = Machine(tmp_path, store)
    crashed.mirror.pull()
    crashed.train(0, 3)
    anew = Machine(tmp_path, store)
    anew.mirror.pull(fresh=True)
    assert list(anew.run_dir.iterdir()) == []
    assert (tmp_path / "d4.other-1" / "metrics.jsonl").exists()


def test_what_mlflow_has_is_never_said_to_be_more_than_the_store_has(store, tmp_path, monkeypatch):
    """mlflow.json is read before the journal: its offset must point into what a new machine gets."""
    machine = Machine(tmp_path, store)
    machine.mirror.pull()
    machine.train(0, 2)
    machine.write(mlflow=json.dumps({"offset": machine.journal.stat().st_size}))
    push_journal = Mirror._push_journal

    def grow_after(self):
        push_journal(self)
        machine.train(2, 4)
        machine.write(mlflow=json.dumps({"offset": machine.journal.stat().st_size}))

    monkeypatch.setattr(Mirror, "_push_journal", grow_after)
    machine.mirror._push()
    assert json.loads(store.read_bytes("mlflow.json"))["offset"] == len(journal_in(store, tmp_path))


def test_nothing_is_sent_without_the_lease(store, tmp_path):
    machine = begin(tmp_path, store, allowed=lambda: False)
    machine.train(0, 3)
    assert not machine.mirror.close()
    assert store.names() == []
    assert machine.lines == []


def test_a_run_in_a_folder_has_no_copy(tmp_path):
    machine = Machine(tmp_path, Store.of(tmp_path / "d4"))
    machine.mirror.pull()
    machine.mirror.start()
    machine.mirror.push_soon()
    assert machine.mirror.close()
    assert list(tmp_path.iterdir()) == []


def test_the_late_segment_of_a_driver_that_was_replaced_is_moved_out_of_the_way(store, tmp_path):
    machine = begin(tmp_path, store)
    machine.train(0, 2)
    machine.mirror.push_soon()
    wait_for(lambda: machine.mirror._sent == machine.journal.stat().st_size)
    late = segment_name(machine.mirror._sent)
    store.child("journal").write_bytes(late, b'{"step": 2, "train/loss": 9.0}\n')
    machine.train(2, 4)
    machine.mirror.push_soon()
    wait_for(lambda: machine.lines)
    assert "another driver has written journal/" + late in machine.lines[0]
    assert machine.mirror.close()
    assert journal_in(store, tmp_path) == machine.journal.read_bytes()
    assert [name.startswith(late) for name in store.child("journal-replaced").names()] == [True]


def test_leftovers_and_gaps_do_not_enter_the_journal(tmp_path, caplog):
    store = Store.of(tmp_path / "store")
    for first, content in ((0, b"{}\n"), (3, b"{}\n"), (4, b"x\n"), (9, b"x\n")):
        store.child("journal").write_bytes(segment_name(first), content)
    store.child("journal").write_bytes("notes.txt", b"x\n")
    assert journal_in(store, tmp_path) == b"{}\n{}\n"
    assert "left out" in caplog.text
    assert "gap from byte 6 to 9" in caplog.text


class Fault:
    """Fails the writes through a proxy while `status` is set, and counts them."""

    def __init__(self) -> None:
        self.status, self.failed = None, 0

    def __call__(self, method: str, path: str) -> int | None:
        if self.status is not None and method == "PUT":
            self.failed += 1
            return self.status
        return None


@pytest.mark.parametrize("status", [CUT, 503], ids=["connection cut", "503"])
def test_an_outage_is_told_once_and_loses_nothing(server, tmp_path, status):
    fault = Fault()
    with proxy(server, fault) as port:
        store = Store.of(server.uri(f"runs/{tmp_path.name}", port=port))
        machine = begin(tmp_path, store)
        machine.train(0, 2)
        machine.mirror.push_soon()
        wait_for(lambda: machine.mirror._sent == machine.journal.stat().st_size)
        fault.status = status
        machine.train(2, 4)
        machine.mirror.push_soon()
        wait_for(lambda: machine.lines)
        machine.train(4, 6)
        machine.mirror.push_soon()
        before = fault.failed
        wait_for(lambda: fault.failed > before)
        fault.status = None
        machine.train(6, 7)
        machine.mirror.push_soon()
        assert machine.mirror.close()
        assert journal_in(store, tmp_path) == machine.journal.read_bytes()
    assert ["does not take the journal" in line for line in machine.lines] == [True, False]
    assert "has the journal again" in machine.lines[1]
    assert "hidden" not in "".join(machine.lines)


def test_a_write_that_arrived_without_an_answer_is_not_sent_twice(server, tmp_path):
    """The segment stays as it arrived, and what was journaled since goes into the next one."""
    store = Store.of(server.uri(f"runs/{tmp_path.name}"))
    machine = Machine(tmp_path, store)
    machine.mirror.pull()
    machine.train(0, 2)
    arrived = machine.journal.read_bytes()
    store.child("journal").write_bytes(segment_name(0), arrived)
    machine.mirror._sure = False
    machine.train(2, 4)
    machine.mirror._push()
    assert store.child("journal").read_bytes(segment_name(0)) == arrived
    assert journal_in(store, tmp_path) == machine.journal.read_bytes()


def test_a_store_that_is_out_until_the_end_leaves_everything_here_and_says_so(server, tmp_path):
    fault = Fault()
    with proxy(server, fault) as port:
        machine = begin(tmp_path, Store.of(server.uri(f"runs/{tmp_path.name}", port=port)))
        fault.status = CUT
        machine.train(0, 3)
        machine.write(summary="{}")
        start = time.monotonic()
        assert not machine.mirror.close(grace_s=0.5)
        assert time.monotonic() - start < 5
        machine.mirror._thread.join()
    assert "metrics.jsonl and summary.json did not reach s3://" in machine.lines[-1]
    assert str(machine.run_dir) in machine.lines[-1]
    assert "same command" in machine.lines[-1]
    store = Store.of(server.uri(f"runs/{tmp_path.name}"))
    assert store.names() == []
    run_once(tmp_path, store, 3, 4)
    assert journal_in(store, tmp_path) == machine.journal.read_bytes()
    assert store.read_bytes("summary.json") == b"{}"


def test_a_store_that_hangs_does_not_hold_up_the_driver(server, tmp_path):
    machine = begin(tmp_path, Store.of(server.uri(f"runs/{tmp_path.name}")))
    with server.frozen():
        start = time.monotonic()
        machine.train(0, 3)
        machine.mirror.push_soon()
        assert not machine.mirror.close(grace_s=0.2)
        assert time.monotonic() - start < 2
        assert "did not reach" in machine.lines[-1]
    machine.mirror._thread.join()


def test_a_pull_from_a_store_that_is_out_changes_nothing(server, tmp_path):
    run_once(tmp_path, Store.of(server.uri(f"runs/{tmp_path.name}")), 0, 3)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with proxy(server, lambda method, path: CUT) as port:
        away = Machine(tmp_path, Store.of(server.uri(f"runs/{tmp_path.name}", port=port)))
        with pytest.raises(OSError, match=tmp_path.name):
            away.mirror.pull()
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


DRIVER = """
import sys
from pathlib import Path
from raychat.storage import Store
from raychat.tracking.journal import Journal
from raychat.training.lease import Lease
from raychat.training.mirror import Mirror
run_dir, store = Path(sys.argv[1]), Store.of(sys.argv[2])
lease = Lease(store)
lease.acquire()
mirror = Mirror(run_dir, store, echo=print, allowed=lambda: not lease.lost, period_s=0.01)
mirror.pull()
journal = Journal(run_dir / "metrics.jsonl")
mirror.start()
for step in range(1_000_000):
    journal.log(step, {"train/loss": 1.0})
    if step % 1000 == 999:
        print(step, flush=True)
"""


def test_after_a_driver_was_killed_a_new_machine_has_whole_lines_and_the_old_one_everything(server, tmp_path):
    store, one = Store.of(server.uri(f"runs/{tmp_path.name}")), tmp_path / "one"
    command = [sys.executable, "-c", DRIVER, str(one / "d4"), store.address]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as driver:
        driver.stdout.readline()
        wait_for(lambda: len(segment_names(store)) >= 3)
        with pytest.raises(LeaseError, match=f"process {driver.pid} on"):
            Lease(store).acquire()
        driver.kill()
    Lease(store).refuse_if_held()
    new = Machine(tmp_path / "two", store)
    new.mirror.pull()
    assert new.steps() == list(range(len(new.steps())))
    assert (one / "d4" / "metrics.jsonl").read_bytes().startswith(new.journal.read_bytes())
    old = begin(one, store)
    assert old.mirror.close()
    assert journal_in(store, tmp_path) == old.journal.read_bytes()[: module.whole_lines(old.journal)]


def test_threads_end_with_their_mirrors(store, tmp_path):
    run_once(tmp_path, store, 0, 1)
    assert not [thread for thread in threading.enumerate() if thread.name == "mirror"]
