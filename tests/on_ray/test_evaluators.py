"""Checkpoints are evaluated beside training: the same values, whatever becomes of those who do it."""

import contextlib
import os
import signal
import time
from types import SimpleNamespace

import pytest
import runs
from core_bundles import write_bundle
from ray.util.placement_group import placement_group, remove_placement_group

from on_ray.conftest import CPUS
from raychat.config import Config
from raychat.errors import ConfigError
from raychat.on_ray import cluster as clusters
from raychat.on_ray import driver, evaluation_job, evaluators, silence, supervisor
from raychat.on_ray import group as group_module
from raychat.on_ray.group import Group, GroupError
from raychat.on_ray.nodes import NodeWatch
from raychat.tracking.journal import read_events, read_journal
from raychat.training import device
from raychat.training import evaluate_checkpoint as module
from raychat.training.elsewhere import Owed
from raychat.training.world import World

pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("ignore::DeprecationWarning")]

STEPS = 6


@pytest.fixture(scope="module")
def config(tiny_flags, prepared_base, tmp_path_factory):
    """Makes a configuration of six steps, evaluated every second one."""
    folder = tmp_path_factory.mktemp("evaluators")
    flags = tiny_flags | {
        "base_dir": str(prepared_base),
        "storage_path": str(folder / "runs"),
        "core_bundle": str(write_bundle(folder / "bundle")),
        "core_metric_max_per_task": 4,
        "core_metric_every": 2,
        "num_iterations": STEPS,
        "save_every": -1,
        "keep_checkpoints": 1,
    }
    return lambda **changes: Config.from_flat(flags | changes)


@pytest.fixture(scope="module")
def run_on(cluster, config):
    """Makes a run with a driver in this process: its folder and its lines."""

    @contextlib.contextmanager
    def connect(config, *, echo):
        yield cluster

    def run(**changes):
        made, lines = config(**changes), []
        return made.run_dir, driver.run(made, echo=lines.append), lines

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clusters, "connect", connect)
        yield run


@pytest.fixture(scope="module")
def in_line(config):
    """The run whose training waits for its evaluations, here, with as many threads as a worker of the cluster has."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device, "local_cores", lambda: len(os.sched_getaffinity(0)))
        return runs.run_here(config(model_tag="in-line"))


def values(folder):
    """Evaluations and losses by step."""
    names = ("val/bpb", "core_metric", "core/choosing", "train/loss")
    records = read_journal(folder / "metrics.jsonl")
    return {name: {r["step"]: r[name] for r in records if name in r} for name in names}


def told(folder, kind):
    return [event for event in read_events(folder / "metrics.jsonl") if event["event"] == kind]


class Fake:
    """A group in words: it has room for `CPUS`, and answers with `found`, or fails with it."""

    def __init__(self, workers, *, use_gpu, avoid, found):
        self.workers, self.is_room, self.started, self._found = workers, workers <= CPUS, False, found

    def start(self):
        self.started = True

    def begin(self, function, task):
        self._task = task

    def answers(self):
        if isinstance(self._found, Exception):
            raise self._found
        return [self._found(World(), self._task)]

    def end(self):
        self.started = False


@pytest.fixture
def fake(monkeypatch):
    """Puts a group in the place of the real ones: those that were asked for."""
    made = []

    def install(found):
        def make(workers, **how):
            made.append(Fake(workers, **how, found=found))
            return made[-1]

        monkeypatch.setattr(evaluators, "Group", make)
        return made

    monkeypatch.setattr(evaluators, "TICK_S", 0.0)
    return install


WATCH = SimpleNamespace(look=lambda: None, slots=lambda: CPUS, avoid=lambda: ())


def test_a_run_has_the_values_of_one_without_evaluation_workers_though_one_is_killed(
    in_line, run_on, monkeypatch, tmp_path
):
    """Bit for bit, and training does not notice; room is asked for when training has its own."""
    marker = tmp_path / "killed"

    def deadly(world, task, *, beat):
        if not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return module.evaluate_checkpoint(world, task, beat=beat)

    asked, ask, start = [], evaluators.Evaluators._ask_for_room, supervisor.Supervisor._start_crew

    def asks(self, workers):
        asked.append("evaluators")
        ask(self, workers)

    def starts(self, workers):
        asked.append("crew")
        return start(self, workers)

    monkeypatch.setattr(evaluators, "evaluate_checkpoint", deadly)
    monkeypatch.setattr(evaluators.Evaluators, "_ask_for_room", asks)
    monkeypatch.setattr(supervisor.Supervisor, "_start_crew", starts)
    folder, summary, lines = run_on(model_tag="beside", eval_workers=1)
    assert marker.exists()
    assert asked.pop(0) == "crew"
    # Once, again for the killed one, and once more where training ended before it and took the room along.
    assert len(asked) in (2, 3)
    assert set(asked) == {"evaluators"}
    assert [event["step"] for event in told(folder, "evaluation_failed")] == [2]
    assert any("its process died" in line and "trying again" in line for line in lines)
    assert values(folder) == values(in_line.run_dir)
    assert [event["step"] for event in told(folder, "evaluated")] == [2, 4, 6]
    expected = in_line.summary
    assert (summary.status, summary.restarts, summary.val_bpb, summary.min_val_bpb, summary.core_metric) == (
        "finished", 0, expected.val_bpb, expected.min_val_bpb, expected.core_metric,
    )  # fmt: skip
    assert summary.evaluation_s > 0  # the wait at the end
    assert sum("validation bpb" in line for line in lines) == 4


def test_two_workers_evaluate_what_an_earlier_driver_left(in_line, config, run_on):
    """To its values, in sums of another order; what was kept for its evaluation alone is deleted."""
    first, finished, _ = runs.train_for_others(config(model_tag="left", eval_workers=2))
    assert finished
    assert len(list(first.run_dir.glob("checkpoints/step_*"))) == 3
    first.close("stopped")
    folder, summary, _ = run_on(model_tag="left", eval_workers=2)
    assert (summary.status, summary.step) == ("finished", STEPS)
    found, expected = values(folder), values(in_line.run_dir)
    assert found["core_metric"] == expected["core_metric"]
    assert found["val/bpb"] == pytest.approx(expected["val/bpb"], rel=1e-4)
    assert len(list(folder.glob("checkpoints/step_*"))) <= 2


def test_an_evaluation_that_fails_again_and_again_is_left_out_with_a_warning(config, fake):
    """The error is written down without the credentials that it may hold."""
    tracked = "http://me:hunter22@nowhere"
    flags = config(model_tag="hopeless", eval_workers=1, eval_every=-1, core_metric_every=STEPS, tracking_uri=tracked)
    session, _, lines = runs.train_for_others(flags)
    asked = fake(GroupError(f"RuntimeError: this machine is broken: {tracked}"))
    assert evaluators.Evaluators(session, WATCH, use_gpu=False).finish(lambda: False)
    assert len(asked) == 1 + evaluators.AGAIN
    summary = session.close("finished")
    assert summary.core_metric is None
    assert [event["step"] for event in told(session.run_dir, "evaluation_given_up")] == [STEPS]
    [warned] = [line for line in lines if line.startswith("warning: the checkpoint of step 6 is not evaluated")]
    assert "this machine is broken" in warned
    assert "hunter22" not in warned + session.journal.path.read_text()
    again = runs.open_session(flags, eval_workers=True)
    assert again.done
    again.abort()


def test_a_group_too_large_for_the_cluster_is_made_smaller_at_the_end(config, fake):
    flags = config(model_tag="large", eval_workers=CPUS + 1, eval_every=-1, core_metric_every=STEPS)
    session, _, _ = runs.train_for_others(flags)
    asked = fake(module.evaluate_checkpoint)
    workers = evaluators.Evaluators(session, WATCH, use_gpu=False)
    for _ in range(3):  # beside training
        workers.tick(may_start=True)
    assert [group.workers for group in asked] == [CPUS + 1]
    ticks = iter(range(9))
    assert workers.finish(lambda: next(ticks) == 8)
    assert [group.workers for group in asked[1:]] == [CPUS]
    assert session.close("finished").core_metric is not None


def test_more_workers_than_this_machine_has_gpus_are_refused(monkeypatch):
    """They would be waited for for ever."""
    here = SimpleNamespace(gpus=1, cpus=9, started_here=True)
    monkeypatch.setattr(clusters, "connect", lambda config, *, echo: contextlib.nullcontext(here))
    monkeypatch.setattr(evaluation_job, "Group", None)
    with pytest.raises(ConfigError, match="--num-workers 2: this machine has 1 GPUs"):
        evaluation_job.evaluate_on_ray(SimpleNamespace(device_type=""), workers=2, address="", echo=print)


def test_a_cluster_on_this_machine_has_cpus_for_the_evaluation_workers_too(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    cpus = {
        (n, k): clusters.local_cpus(Config.from_flat({"num_workers": n, "eval_workers": k}))
        for n in (1, 3)
        for k in (0, 2)
    }
    assert cpus == {(1, 0): 2, (1, 2): 3, (3, 0): 4, (3, 2): 5}


def eventually(condition, seconds=60.0):
    deadline = time.monotonic() + seconds
    while not (answer := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return answer


def test_waiting_for_room_is_said_once_and_room_is_given_back(cluster, monkeypatch):
    """Nothing of the session but its voice and what is owed matters here."""
    monkeypatch.setattr(evaluators, "ROOM_S", 0.0)
    lines = []
    owed = Owed(2, ("bpb",))
    elsewhere = SimpleNamespace(pending={2: owed}, wants=lambda one: one is owed)
    settings = SimpleNamespace(eval=SimpleNamespace(eval_workers=CPUS + 1))
    session = SimpleNamespace(elsewhere=elsewhere, config=settings, echo=lines.append)
    workers = evaluators.Evaluators(session, NodeWatch(use_gpu=False), use_gpu=False)
    workers.tick(may_start=False)
    assert workers._group is None
    for _ in range(5):
        workers.tick(may_start=True)
    assert [line.split(":")[0] for line in lines] == [f"evaluation waits for {CPUS + 1} free CPUs"]
    workers.make_way()
    whole = placement_group([{"CPU": 1}] * CPUS)
    assert whole.wait(60)
    remove_placement_group(whole)


def test_workers_that_hang_are_ended_and_what_they_did_is_done_again(cluster, monkeypatch, tmp_path):
    """A process that is stopped after its first pass, and hears nothing. Long silence without a report is no hang."""
    monkeypatch.setattr(silence, "LEAST_S", 1.0)
    monkeypatch.setattr(group_module, "LISTEN_S", 0.1)
    marker = tmp_path / "hung"

    def hanging(world, task, *, beat):
        if not marker.exists():
            time.sleep(2.0)
            beat()
            time.sleep(0.5)
            marker.write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGSTOP)
        return task

    monkeypatch.setattr(evaluators, "evaluate_checkpoint", hanging)
    taken, lines, events, owed = [], [], [], Owed(2, ("bpb",))
    elsewhere = SimpleNamespace(
        pending={2: owed}, wants=lambda one: one is owed, assignment=lambda one: "the task",
        take=lambda one, found: taken.append(found),
    )  # fmt: skip
    journal = SimpleNamespace(event=lambda kind, **fields: events.append((kind, fields["step"])))
    session = SimpleNamespace(
        elsewhere=elsewhere, journal=journal, echo=lines.append, hide=str,
        config=SimpleNamespace(eval=SimpleNamespace(eval_workers=1)),
    )  # fmt: skip
    workers = evaluators.Evaluators(session, NodeWatch(use_gpu=False), use_gpu=False)

    def evaluated():
        workers.tick(may_start=True)
        return taken

    try:
        assert eventually(evaluated) == ["the task"]
        assert events == [("evaluation_failed", 2)]
        assert len(lines) == 1
        assert "the workers have not got on for 1s: they hang): trying again" in lines[0]
        eventually(lambda: not is_there(int(marker.read_text())))
    finally:
        workers.make_way()


def is_there(pid):
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, 0)
        return True
    return False


def test_a_group_works_together_and_an_error_of_one_ends_it(cluster):
    def told(world, number, *, beat):
        return world.rank, sum(world.gather(number))

    group = Group(2, use_gpu=False)
    try:
        eventually(lambda: group.is_room)
        group.start()
        group.begin(told, 5)
        assert eventually(group.answers) == [(0, 10), (1, 10)]
        group.begin(divmod, 0)
        with pytest.raises(GroupError, match="TypeError|unsupported operand"):
            eventually(group.answers)
    finally:
        group.end()
