"""What MLflow shows is what the journal holds, once, whatever happened to the server or to us in between."""

import fcntl
import json
import os
import socket
import subprocess
import sys
import threading
import time

import pytest
from test_runs import job
from test_search_table import open_search

from raychat.errors import ConfigError, RaychatError
from raychat.on_ray.search_tracking import SearchTracking
from raychat.tracking import mlflow_delivery, mlflow_shipper, mlflow_ui
from raychat.tracking.journal import Journal
from raychat.tracking.mlflow_shipper import MLflowShipper, default_tracking_uri, reconcile, store_error, sync
from raychat.tracking.shipping_state import ShippingState

pytestmark = [
    pytest.mark.mlflow,
    # MLflow 3.17 calls deprecated parts of SQLAlchemy and leaves database connections to the garbage collector.
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:unclosed database:ResourceWarning"),
]


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory):
    """One database for all tests here: making one takes seconds."""
    return tmp_path_factory.mktemp("base")


@pytest.fixture
def run_dir(base_dir, request):
    return base_dir / "runs" / request.node.name


@pytest.fixture
def client(base_dir):
    return mlflow_delivery.open_client(default_tracking_uri(base_dir))


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    monkeypatch.setattr(mlflow_shipper, "PERIOD_S", 0.05)


def shipper_for(run_dir, uri=None, **changes):
    settings = {"params": {"depth": 2}, "tags": {"raychat.hardware": "cpu"}, "echo": lambda text: None, **changes}
    uri = uri or default_tracking_uri(run_dir.parents[1])
    return MLflowShipper(run_dir, tracking_uri=uri, experiment="raychat", run_name="d2", **settings)


def log_steps(run_dir, steps, *, branch_from=None, loss=lambda step: 10.0 - step):
    journal = Journal(run_dir / "metrics.jsonl")
    if branch_from is not None:
        journal.event("branch", from_step=branch_from)
    for step in steps:
        journal.log(step, {"train/loss": loss(step), "train/mfu": None}, time_s=1_700_000_000.0 + step)
    journal.close()


def curve(client, run_id):
    return [(point.step, point.value) for point in client.get_metric_history(run_id, "train/loss")]


def wait_until(condition, seconds=30.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "not reached in time"
        time.sleep(0.02)


def ship(run_dir, status="FINISHED", **changes):
    """One attempt: begin, ship what there is, end."""
    shipper = shipper_for(run_dir, **changes)
    shipper.start()
    return shipper.finish(status, grace_s=60)


def test_every_point_arrives_once_in_order_and_at_its_own_time(run_dir, client, monkeypatch):
    monkeypatch.setattr(mlflow_delivery, "BATCH_METRICS", 7)  # many batches
    log_steps(run_dir, range(50))
    run_id = ship(run_dir)
    assert curve(client, run_id) == [(step, 10.0 - step) for step in range(50)]
    points = client.get_metric_history(run_id, "train/loss")
    assert [point.timestamp for point in points] == [1_700_000_000_000 + 1000 * step for step in range(50)]
    assert client.get_metric_history(run_id, "train/mfu") == []  # null is no point


def test_points_arrive_while_the_run_goes_on(run_dir, client):
    journal = Journal(run_dir / "metrics.jsonl")
    shipper = shipper_for(run_dir)
    shipper.start()
    for step in range(3):
        journal.log(step, {"train/loss": float(step)})
        wait_until(lambda: ShippingState.load(run_dir).offset == journal.offset)
        assert curve(client, shipper.run_id)[-1] == (step, float(step))
    wait_until(lambda: "raychat.heartbeat" in client.get_run(shipper.run_id).data.tags)
    run = client.get_run(shipper.run_id)
    assert run.info.status == "RUNNING"
    assert abs(float(run.data.tags["raychat.heartbeat"]) - time.time()) < 60
    journal.close()
    shipper.finish("FINISHED", grace_s=60)


@pytest.mark.parametrize("status", ["FINISHED", "FAILED", "KILLED"])
def test_the_end_is_told_with_the_files_that_exist(run_dir, client, status):
    log_steps(run_dir, [0])
    (run_dir / "config.json").write_text("{}")
    shipper = shipper_for(run_dir, dataset={"name": "embedded", "source": "/data/embedded", "digest": "f" * 64})
    shipper.start()
    run_id = shipper.finish(status, [run_dir / "config.json", run_dir / "absent.json"], grace_s=60)
    run = client.get_run(run_id)
    assert run.info.status == status
    assert abs(run.info.end_time / 1000 - time.time()) < 60
    assert [file.path for file in client.list_artifacts(run_id)] == ["config.json"]
    assert (run_dir.parents[1] / "mlartifacts" / "raychat" / run_id / "artifacts" / "config.json").exists()
    assert (run.data.params, run.data.tags["raychat.hardware"]) == ({"depth": "2"}, "cpu")
    [dataset] = [used.dataset for used in run.inputs.dataset_inputs]
    assert (dataset.name, dataset.digest) == ("embedded", "f" * 36)


def test_an_attempt_that_was_killed_is_continued_in_the_same_run_without_duplicates(run_dir, client):
    log_steps(run_dir, range(10))
    first = shipper_for(run_dir)
    first.start()
    wait_until(lambda: ShippingState.load(run_dir).offset == (run_dir / "metrics.jsonl").stat().st_size)
    first._file.close()  # as dead as after SIGKILL: it does not remember anything from now on
    first._give_up.set()
    # The last batch was taken, but its acknowledgement died with the process.
    state = json.loads((run_dir / "mlflow.json").read_text())
    (run_dir / "mlflow.json").write_text(json.dumps({**state, "offset": 0}))

    log_steps(run_dir, range(6, 15), loss=lambda step: -1.0)
    run_id = ship(run_dir, params={"depth": 2, "matrix_lr": 0.02}, tags={"raychat.hardware": "gpu"})
    assert run_id == first.run_id
    assert curve(client, run_id) == [(step, 10.0 - step) for step in range(10)] + [(s, -1.0) for s in range(10, 15)]
    run = client.get_run(run_id)
    assert run.data.params == {"depth": "2", "matrix_lr": "0.02"}
    assert (run.data.tags["raychat.hardware"], run.data.tags["raychat.attempt"]) == ("gpu", "2")
    assert run.info.status == "FINISHED"


def test_a_run_that_ended_is_running_again_when_it_is_resumed(run_dir, client):
    log_steps(run_dir, range(2))
    run_id = ship(run_dir, status="FAILED")
    shipper = shipper_for(run_dir)
    shipper.start()
    wait_until(lambda: client.get_run(run_id).info.status == "RUNNING")
    assert shipper.finish("FINISHED", grace_s=60) == run_id
    assert client.get_run(run_id).info.status == "FINISHED"


def test_a_param_that_changed_is_a_tag_and_not_an_error(run_dir, client):
    log_steps(run_dir, [0])
    ship(run_dir, params={"matrix_lr": 0.02})
    run = client.get_run(ship(run_dir, params={"matrix_lr": 0.01}))
    assert (run.data.params["matrix_lr"], run.data.tags["raychat.changed_params"]) == ("0.02", "matrix_lr=0.01")
    assert run.info.status == "FINISHED"


def test_a_creation_whose_answer_was_lost_is_not_repeated(run_dir, client):
    log_steps(run_dir, range(3))
    run_id = ship(run_dir)
    state = json.loads((run_dir / "mlflow.json").read_text())
    (run_dir / "mlflow.json").write_text(json.dumps({**state, "run_id": None, "offset": 0}))
    assert ship(run_dir) == run_id
    assert [step for step, _ in curve(client, run_id)] == [0, 1, 2]


def test_a_run_that_was_deleted_in_mlflow_is_shipped_again_whole(run_dir, client):
    log_steps(run_dir, range(3))
    deleted = ship(run_dir)
    client.delete_run(deleted)
    log_steps(run_dir, range(3, 5))
    run_id = ship(run_dir)
    assert run_id != deleted
    assert [step for step, _ in curve(client, run_id)] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("interrupted", [False, True], ids=["at once", "creation repeated"])
def test_a_branch_is_a_new_run_and_no_curve_goes_back(run_dir, client, interrupted):
    log_steps(run_dir, range(8))
    old = ship(run_dir, status="KILLED")
    before = (run_dir / "mlflow.json").read_text()
    log_steps(run_dir, range(4, 6), branch_from=4, loss=lambda step: -1.0)
    new = ship(run_dir)
    if interrupted:
        (run_dir / "mlflow.json").write_text(before)
        assert ship(run_dir) == new
    assert new != old
    assert [step for step, _ in curve(client, old)] == list(range(8))
    assert curve(client, new) == [(4, -1.0), (5, -1.0)]
    run = client.get_run(new)
    assert (run.data.tags["raychat.branched_from"], run.data.tags["raychat.branch_step"]) == (old, "4")
    assert (run.data.params, run.info.status) == ({"depth": "2"}, "FINISHED")
    assert client.get_run(old).info.status == "KILLED"


def test_a_branch_in_the_middle_of_a_batch_splits_it(run_dir, client):
    log_steps(run_dir, range(4))
    log_steps(run_dir, range(2, 5), branch_from=2, loss=lambda step: -1.0)
    new = ship(run_dir)
    old = client.get_run(new).data.tags["raychat.branched_from"]
    assert [curve(client, run_id) for run_id in (old, new)] == [
        [(0, 10.0), (1, 9.0), (2, 8.0), (3, 7.0)],
        [(2, -1.0), (3, -1.0), (4, -1.0)],
    ]
    assert client.get_run(old).info.status == "KILLED"


@pytest.fixture
def refusing():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{probe.getsockname()[1]}"  # bound and not listening


@pytest.fixture
def silent():
    """A server that takes every connection and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=16) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.parametrize("kind", ["refusing", "silent"])
def test_a_dead_server_costs_neither_time_nor_points(run_dir, client, request, kind):
    uri, said = request.getfixturevalue(kind), []
    journal = Journal(run_dir / "metrics.jsonl")
    shipper = shipper_for(run_dir, uri, echo=said.append)
    shipper.start()
    slowest = 0.0
    for step in range(200):
        begin = time.perf_counter()
        journal.log(step, {"train/loss": 10.0 - step})
        slowest = max(slowest, time.perf_counter() - begin)
    journal.close()
    begin = time.monotonic()
    assert shipper.finish("FINISHED", grace_s=1.0) is None
    assert time.monotonic() - begin < 5.0
    assert slowest < 0.5  # one HTTP time-out is 5 s
    assert "jobs/runs.py --sync" in said[-1]

    run_id = sync(run_dir, tracking_uri=default_tracking_uri(run_dir.parents[1]), echo=lambda text: None)
    assert curve(client, run_id) == [(step, 10.0 - step) for step in range(200)]
    assert client.get_run(run_id).info.status == "FINISHED"
    assert shipper.run_id is None  # the thread that may still hang has let go


def test_an_outage_is_announced_once_and_so_is_its_end(run_dir, client, monkeypatch):
    monkeypatch.setattr(mlflow_shipper, "MAX_BACKOFF_S", 0.05)
    said, down, real = [], threading.Event(), mlflow_delivery.Delivery.deliver

    def deliver(self):
        if down.is_set():
            raise ConnectionError("gone")
        real(self)

    monkeypatch.setattr(mlflow_delivery.Delivery, "deliver", deliver)
    log_steps(run_dir, range(3))
    shipper = shipper_for(run_dir, echo=said.append)
    down.set()
    shipper.start()
    wait_until(lambda: said)
    time.sleep(0.3)  # several more failures
    down.clear()
    wait_until(lambda: "is back" in said[-1])
    run_id = shipper.finish("FINISHED", grace_s=60)
    assert [("gone" in text, "is back" in text) for text in said] == [(True, False), (False, False), (False, True)]
    assert [step for step, _ in curve(client, run_id)] == [0, 1, 2]


def test_sync_ends_a_run_whose_driver_died_and_does_nothing_twice(run_dir, client):
    log_steps(run_dir, range(4))
    shipper = shipper_for(run_dir)
    shipper._remember()  # the driver died right after the start
    run_id = sync(run_dir, echo=lambda text: None)
    assert [step for step, _ in curve(client, run_id)] == [0, 1, 2, 3]
    assert client.get_run(run_id).info.status == "KILLED"
    said = []
    assert sync(run_dir, echo=said.append) == run_id
    assert said == []


def test_sync_leaves_an_untracked_run_alone(run_dir):
    log_steps(run_dir, [0])
    assert sync(run_dir, echo=lambda text: None) is None


def test_sync_to_a_dead_server_is_an_error_with_a_remedy(run_dir, refusing):
    log_steps(run_dir, [0])
    shipper_for(run_dir, refusing)._remember()
    with pytest.raises(RaychatError, match=r"Start that server"):
        sync(run_dir, echo=lambda text: None)


def test_runs_without_a_heartbeat_are_marked_as_killed_and_no_others(run_dir, client, base_dir):
    experiment = client.get_experiment_by_name("raychat") or client.get_experiment(client.create_experiment("raychat"))

    def run(heartbeat_age):
        tags = {} if heartbeat_age is None else {"raychat.heartbeat": f"{time.time() - heartbeat_age:.0f}"}
        return client.create_run(experiment.experiment_id, tags=tags).info.run_id

    dead, live, foreign, ended = run(1000), run(10), run(None), run(1000)
    client.set_terminated(ended, "FINISHED")
    said = []
    assert reconcile(default_tracking_uri(base_dir), "raychat", said.append) == 1
    assert said[0] == f"marked as KILLED: {dead}"
    assert reconcile(default_tracking_uri(base_dir), "no such experiment", said.append) == 0
    statuses = [client.get_run(run_id).info.status for run_id in (dead, live, foreign, ended)]
    assert statuses == ["KILLED", "RUNNING", "RUNNING", "FINISHED"]
    for run_id in (live, foreign):
        client.set_terminated(run_id)


def test_the_next_run_of_the_experiment_marks_those_that_died_without_a_word(run_dir, client):
    log_steps(run_dir, [0])
    first = ship(run_dir)  # makes the experiment
    experiment_id = client.get_run(first).info.experiment_id
    other_id = client.get_experiment("0").experiment_id
    stale = {"raychat.heartbeat": f"{time.time() - 1000:.0f}"}
    dead = client.create_run(experiment_id, tags=stale).info.run_id
    elsewhere = client.create_run(other_id, tags=stale).info.run_id
    client.set_tag(first, "raychat.heartbeat", stale["raychat.heartbeat"])  # this run's own
    shipper = shipper_for(run_dir)
    shipper.start()
    wait_until(lambda: client.get_run(dead).info.status == "KILLED")
    assert client.get_run(first).info.status == "RUNNING"
    assert client.get_run(elsewhere).info.status == "RUNNING"
    shipper.finish("FINISHED", grace_s=60)
    client.set_terminated(elsewhere)


def test_what_fails_at_other_runs_does_not_concern_this_one(run_dir, client, monkeypatch):
    def refuse(*args, **kwargs):
        raise ConnectionError("no such run")

    monkeypatch.setattr(mlflow_delivery, "end_dead_runs", refuse)
    log_steps(run_dir, range(3))
    said = []
    shipper = shipper_for(run_dir, echo=said.append)
    shipper.start()
    wait_until(lambda: shipper._delivery._buried)
    run_id = shipper.finish("FINISHED", grace_s=60)
    assert [step for step, _ in curve(client, run_id)] == [0, 1, 2]
    assert not any("no such run" in line for line in said)


def test_rollback_while_the_run_is_shipped_goes_on_in_a_new_run_that_is_described(run_dir, client):
    """Points that MLflow has cannot be taken back: the curve of the run that went back ends, another one begins."""
    journal, said = Journal(run_dir / "metrics.jsonl"), []
    shipper = shipper_for(run_dir, echo=said.append)
    shipper.start()
    for step in range(4):
        journal.log(step, {"train/loss": float(step)})
    wait_until(lambda: ShippingState.load(run_dir).offset == journal.offset)
    old = shipper.run_id
    journal.event("rollback", from_step=2, bad_step=4, cursor=32, reason="nan")
    journal.event("branch", from_step=2)
    for step in range(2, 6):
        journal.log(step, {"train/loss": -1.0})
    wait_until(lambda: ShippingState.load(run_dir).offset == journal.offset)
    assert client.get_run(old).info.status == "KILLED"
    journal.close()
    new = shipper.finish("FINISHED", grace_s=60)
    assert new != old
    assert curve(client, old) == [(step, float(step)) for step in range(4)]
    assert curve(client, new) == [(step, -1.0) for step in range(2, 6)]
    run = client.get_run(new)
    assert (run.data.params, run.data.tags["raychat.branched_from"]) == ({"depth": "2"}, old)
    assert run.info.status == "FINISHED"
    assert any("went back to step 2" in line for line in said)


def test_a_damaged_state_means_a_new_run_and_does_not_reach_the_caller(run_dir, client, caplog):
    log_steps(run_dir, range(2))
    (run_dir / "mlflow.json").write_text("{")
    run_id = ship(run_dir)
    assert [step for step, _ in curve(client, run_id)] == [0, 1]
    assert "damaged" in caplog.text


def test_a_run_that_ends_before_it_was_begun_is_ended_in_mlflow_at_once(run_dir, client):
    """As one is that was stopped while it waited for machines: what an earlier driver shipped is ended, too."""
    log_steps(run_dir, [0])
    run_id = ship(run_dir, "FAILED")
    client.update_run(run_id, status="RUNNING")
    said = []
    log_steps(run_dir, [1])
    assert shipper_for(run_dir, echo=said.append).finish("KILLED", grace_s=60) == run_id
    assert client.get_run(run_id).info.status == "KILLED"
    assert curve(client, run_id) == [(0, 10.0), (1, 9.0)]
    assert not [line for line in said if "has not got everything" in line]


def test_a_password_in_the_address_of_a_dead_server_is_not_in_the_error(run_dir, refusing):
    log_steps(run_dir, [0])
    shipper_for(run_dir)._remember()
    with pytest.raises(RaychatError, match="me@") as refused:
        sync(run_dir, tracking_uri=refusing.replace("//", "//me:s3cret@"), echo=lambda text: None)
    assert "s3cret" not in str(refused.value)


def test_a_password_is_neither_written_nor_said(run_dir):
    uri = "postgresql://me:s3cret@127.0.0.1:1/db"
    shipper = shipper_for(run_dir, uri)
    shipper._remember()
    assert "s3cret" not in (run_dir / "mlflow.json").read_text()
    assert ShippingState.load(run_dir).uri == "postgresql://me@127.0.0.1:1/db"


@pytest.mark.parametrize(
    "uri", ["file:///tmp/mlruns", "mlruns", "/tmp/mlruns", "sqlite://", "s3://bucket/x", "http://"]
)
def test_a_store_that_mlflow_does_not_take_is_refused_with_a_remedy(uri):
    error = store_error(uri)
    assert isinstance(error, ConfigError)
    assert uri in str(error)
    assert "sqlite:////" in str(error)


@pytest.mark.parametrize(
    "uri", ["sqlite:////a/mlflow.db", "http://127.0.0.1:5000", "https://x.org", "postgresql+psycopg2://u@h/d"]
)
def test_a_store_that_mlflow_takes_is_accepted(uri):
    assert store_error(uri) is None


def test_the_tracking_files_do_not_import_mlflow_until_it_is_needed():
    code = (
        "import sys, raychat.tracking.mlflow_shipper, raychat.tracking.mlflow_ui, raychat.tracking.run_table;"
        "sys.exit(any(name in sys.modules for name in ('mlflow', 'ray', 'torch')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_pages_need_runs(tmp_path):
    with pytest.raises(RaychatError, match="no runs yet"):
        mlflow_ui.main(["--base-dir", str(tmp_path)])


def test_a_taken_port_is_named_together_with_a_free_one(tmp_path):
    (tmp_path / "mlflow.db").touch()
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"--port {port} .* is taken") as caught:
            mlflow_ui.main(["--base-dir", str(tmp_path), "--port", str(port)])
    free = int(str(caught.value).rsplit(" ", 1)[1])
    with socket.create_server(("127.0.0.1", free)):
        assert free > port


def test_the_pages_open_on_the_experiment_with_the_light_server(tmp_path, monkeypatch):
    (tmp_path / "mlflow.db").touch()
    log_steps(tmp_path / "runs" / "d2", [0])
    uri = default_tracking_uri(tmp_path)
    ShippingState(uri=uri, experiment="raychat", run_name="d2", experiment_id="7").save(tmp_path / "runs" / "d2")
    started, said = [], []
    monkeypatch.setattr(os, "execve", lambda *call: started.append(call))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mlflow_ui.main(["--base-dir", str(tmp_path), "--port", str(port)], echo=said.append)
    [(_, command, environment)] = started
    assert (
        f"http://127.0.0.1:{port}/#/experiments/7/runs?workflowType=machine_learning&compareRunsMode=CHART" in said[0]
    )
    assert command[-2:] == ["--workers", "1"]
    assert uri in command
    assert environment["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] == "false"


def test_a_search_that_died_is_ended_with_its_report_and_has_its_runs_below_it(
    base_dir, run_dir, client, monkeypatch, capsys
):
    monkeypatch.setattr(sys, "path", list(sys.path))
    uri = default_tracking_uri(base_dir)
    runs, trial = run_dir.parent / "own", run_dir.parent / "own" / "s-000"
    with open_search(run_dir.parent) as book:  # the run began when the name of its search was not known
        tracking = SearchTracking(book.folder, book.spec, tracking_uri=uri, echo=lambda line: None)
        parent = tracking.run_id()
        log_steps(trial, range(3))
        run_id = ship(trial, uri=uri)
        for event in (tracking._shipper._give_up, tracking._shipper._stop):  # as dead as after SIGKILL
            event.set()
        tracking._shipper._thread.join()
    jobs = ["--base-dir", str(run_dir.parent), "--storage-path", str(runs)]
    assert job().main([*jobs, "--reconcile"]) == 0
    assert f"marked as KILLED: {parent}" in capsys.readouterr().out
    client.update_run(parent, status="RUNNING")
    for _ in range(2):
        assert job().main([*jobs, "--sync"]) == 0
        assert f"search s: MLflow has everything (run {parent})" in capsys.readouterr().out
    assert client.get_run(parent).info.status == "KILLED"
    assert {file.path for file in client.list_artifacts(parent)} == {"report.html", "report.md", "trials.csv"}
    assert client.get_run(run_id).data.tags["mlflow.parentRunId"] == parent


def test_the_tables_of_a_new_store_are_made_by_one_process_at_a_time(base_dir):
    uri = default_tracking_uri(base_dir)
    opened = threading.Thread(target=lambda: mlflow_delivery.open_client(uri))
    with (base_dir / "mlflow.db.lock").open("ab") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        opened.start()
        opened.join(0.5)
        assert opened.is_alive()
    opened.join(60)
    assert not opened.is_alive()


def test_two_runs_that_make_one_experiment_at_the_same_time_share_it(base_dir, client, monkeypatch):
    uri = default_tracking_uri(base_dir)
    first = mlflow_delivery._experiment_id(client, uri, "both")
    found = [None, client.get_experiment_by_name("both")]  # not there yet when it was looked up
    monkeypatch.setattr(client, "get_experiment_by_name", lambda name: found.pop(0))
    assert mlflow_delivery._experiment_id(client, uri, "both") == first
    assert not found
