"""Checkpoints are evaluated beside training: the same values, whatever becomes of those who do it."""

import contextlib
import os
import signal
import time
from types import SimpleNamespace

import pytest
from core_bundles import write_bundle
from ray.util.placement_group import placement_group, remove_placement_group

from on_ray.conftest import CPUS
from raychat.config import Config
from raychat.on_ray import cluster as clusters
from raychat.on_ray import driver, evaluators, supervisor
from raychat.on_ray.group import Group, GroupError
from raychat.on_ray.nodes import NodeWatch
from raychat.tracking.journal import read_events, read_journal
from raychat.training import evaluate_checkpoint as module
from raychat.training.elsewhere import Owed

pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("ignore::DeprecationWarning")]

STEPS = 6


@pytest.fixture(scope="module")
def run_on(cluster, tiny_flags, prepared_base, tmp_path_factory):
    """Makes a run of six steps, evaluated every second one, with a driver in this process: its folder and its lines."""

    @contextlib.contextmanager
    def connect(config, *, echo):
        yield cluster

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

    def run(**changes):
        config, lines = Config.from_flat(flags | changes), []
        return config.run_dir, driver.run(config, echo=lines.append), lines

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clusters, "connect", connect)
        yield run


@pytest.fixture(scope="module")
def in_line(run_on):
    """The run whose training waits for its evaluations."""
    return run_on(model_tag="in-line")


def values(folder):
    """Evaluations and losses by step."""
    names = ("val/bpb", "core_metric", "core/choosing", "train/loss")
    records = read_journal(folder / "metrics.jsonl")
    return {name: {r["step"]: r[name] for r in records if name in r} for name in names}


def told(folder, kind):
    return [event for event in read_events(folder / "metrics.jsonl") if event["event"] == kind]


def test_a_run_with_an_evaluation_worker_has_the_values_of_one_without(in_line, run_on, monkeypatch):
    """Its room is asked for when training has its own."""
    asked, ask, start = [], evaluators.Evaluators._ask_for_room, supervisor.Supervisor._start_crew

    def asks(self, workers):
        asked.append("evaluators")
        ask(self, workers)

    def starts(self, workers):
        asked.append("crew")
        return start(self, workers)

    monkeypatch.setattr(evaluators.Evaluators, "_ask_for_room", asks)
    monkeypatch.setattr(supervisor.Supervisor, "_start_crew", starts)
    folder, summary, lines = run_on(model_tag="beside", eval_workers=1)
    assert asked == ["crew", "evaluators"]
    assert values(folder) == values(in_line[0])
    assert [event["step"] for event in told(folder, "evaluated")] == [2, 4, 6]
    expected = in_line[1]
    assert (summary.status, summary.val_bpb, summary.min_val_bpb, summary.core_metric) == (
        "finished", expected.val_bpb, expected.min_val_bpb, expected.core_metric,
    )  # fmt: skip
    assert summary.evaluation_s > 0  # the wait at the end
    assert sum("validation bpb" in line for line in lines) == 4


def test_an_evaluation_worker_that_is_killed_is_replaced(in_line, run_on, monkeypatch, tmp_path):
    marker = tmp_path / "killed"

    def deadly(world, task):
        if not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return module.evaluate_checkpoint(world, task)

    monkeypatch.setattr(evaluators, "evaluate_checkpoint", deadly)
    folder, summary, lines = run_on(model_tag="killed", eval_workers=2)
    assert marker.exists()
    assert summary.status == "finished"
    assert summary.restarts == 0  # training has not noticed
    assert [event["step"] for event in told(folder, "evaluation_failed")] == [2]
    assert any("its process died" in line and "trying again" in line for line in lines)
    found, expected = values(folder), values(in_line[0])
    assert found["train/loss"] == expected["train/loss"]
    assert found["core_metric"] == expected["core_metric"]  # of two ranks and of one
    assert found["val/bpb"] == pytest.approx(expected["val/bpb"], rel=1e-6)


def test_an_evaluation_that_fails_again_and_again_is_left_out_with_a_warning(run_on, monkeypatch):
    def fails(world, task):
        raise RuntimeError("this machine is broken")

    monkeypatch.setattr(evaluators, "evaluate_checkpoint", fails)
    monkeypatch.setattr(evaluators, "AGAIN", 1)
    folder, summary, lines = run_on(model_tag="hopeless", eval_workers=1, eval_every=-1, core_metric_every=STEPS)
    assert (summary.status, summary.core_metric) == ("finished", None)
    assert [event["step"] for event in told(folder, "evaluation_given_up")] == [STEPS]
    warned = [line for line in lines if line.startswith("warning: the checkpoint of step 6 is not evaluated")]
    assert len(warned) == 1
    assert "this machine is broken" in warned[0]
    assert run_on(model_tag="hopeless", eval_workers=1, eval_every=-1, core_metric_every=STEPS)[1] is None  # done


def test_a_stop_leaves_evaluations_to_the_next_start(in_line, run_on, monkeypatch):
    """Others have the rest of the cluster while the first driver lives; it is stopped as it waits at its end."""
    others = placement_group([{"CPU": 1}] * (CPUS - 1))
    assert others.wait(60)
    with monkeypatch.context() as patch:
        patch.setattr(evaluators.Evaluators, "finish", lambda self, stopped: False)
        folder, summary, _ = run_on(model_tag="waits", eval_workers=1)
    remove_placement_group(others)
    assert (summary.status, summary.step, summary.core_metric) == ("stopped", STEPS, None)
    assert values(folder)["train/loss"] == values(in_line[0])["train/loss"]  # training has not waited
    folder, summary, _ = run_on(model_tag="waits", eval_workers=1)
    assert summary.status == "finished"
    assert values(folder) == values(in_line[0])


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


def test_a_group_works_together_and_an_error_of_one_ends_it(cluster):
    def told(world, number):
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
