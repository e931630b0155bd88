"""A run on Ray, to its end and through what interrupts it: the same losses as a plain process, bit for bit."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from ray._private import state as ray_state

from on_ray.heads import as_arguments
from on_ray.held_pretrain import held_worker
from raychat.config import Config
from raychat.errors import RaychatError
from raychat.on_ray import cluster as clusters
from raychat.on_ray import crew, driver
from raychat.tracking import mlflow_delivery
from raychat.tracking.journal import read_events, read_journal
from raychat.tracking.summary import Summary
from raychat.training import checkpoint

pytestmark = [
    pytest.mark.ray,
    # MLflow 3.17 calls deprecated parts of SQLAlchemy and leaves database connections to the garbage collector.
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:unclosed database:ResourceWarning"),
]

HERE = Path(__file__).resolve().parent
STEPS, ROWS, T = 12, 8, 32


@dataclass(frozen=True)
class Run:
    """A run that was made: what it said and what it left."""

    config: Config
    summary: Summary | None
    lines: list[str]

    @property
    def folder(self) -> Path:
        return self.config.run_dir

    def curve(self, metric: str = "train/loss") -> list[tuple[int, float]]:
        """Points of `metric` in the order of the journal."""
        return [(r["step"], r[metric]) for r in read_journal(self.folder / "metrics.jsonl") if metric in r]

    def starts(self) -> list[dict]:
        """The attempts, as the journal tells them."""
        return [event for event in read_events(self.folder / "metrics.jsonl") if event["event"] == "start"]


@pytest.fixture(scope="module")
def flags(tiny_flags, prepared_base, tmp_path_factory):
    """Settings of runs of `STEPS` steps that share prepared data; each needs a model tag of its own."""
    return tiny_flags | {
        "base_dir": str(prepared_base),
        "storage_path": str(tmp_path_factory.mktemp("driver") / "runs"),
        "num_iterations": STEPS,
        "eval_every": 4,
        "save_every": 2,
        "save_mode": "sync",  # what is on storage when a process is killed is then known
    }


@pytest.fixture(scope="module")
def run_here(connected, flags):
    """Makes a run with a driver in this process."""

    def run(**changes) -> Run:
        config, lines = Config.from_flat(flags | changes), []
        return Run(config, driver.run(config, echo=lines.append), lines)

    return run


def wait_until(condition, what, seconds=240.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {seconds:g}s"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def plain(flags, environment):
    """The run without Ray, in a process of its own."""
    changes = {"model_tag": "plain"}
    command = [sys.executable, "-m", "raychat.training", *as_arguments(flags | changes)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    config = Config.from_flat(flags | changes)
    return Run(config, Summary.read(config.run_dir / "summary.json"), done.stdout.splitlines())


@pytest.fixture(scope="module")
def whole(run_here, tmp_path_factory):
    """The undisturbed run of one worker, with MLflow."""
    store = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    return run_here(model_tag="whole", run="", tracking_uri=f"sqlite:///{store}", price_per_hour=3600.0)


@pytest.fixture(scope="module")
def pair(run_here):
    """The undisturbed run of two workers."""
    return run_here(model_tag="pair", num_workers=2)


def test_a_run_on_ray_is_the_run_of_a_plain_process(whole, plain):
    """Bit for bit: the same rows, threads and order of sums, wherever batches come from."""
    assert [step for step, _ in whole.curve()] == list(range(STEPS))
    for metric in ("train/loss", "train/grad_norm", "train/lrm", "val/bpb"):
        assert whole.curve(metric) == plain.curve(metric)
    assert whole.curve()[-1][1] < whole.curve()[0][1]


def test_the_summary_says_all_that_the_contract_names(whole):
    summary = json.loads((whole.folder / "summary.json").read_text())
    assert Summary(**summary) == whole.summary
    recipe = json.loads((whole.folder / "config.json").read_text())["recipe"]
    validated = [value for _, value in whole.curve("val/bpb")]
    assert summary == summary | {
        "status": "finished",
        "step": STEPS,
        "num_iterations": STEPS,
        "rows_consumed": STEPS * ROWS,
        "tokens": STEPS * ROWS * T,
        "val_bpb": validated[-1],
        "min_val_bpb": min(validated),
        "core_metric": None,
        "train_loss": whole.curve()[-1][1],
        "restarts": 0,
        "preemptions": 0,
        "replayed_steps": 0,
        "mfu": None,
        "flops": float(recipe["flops_per_token"]) * STEPS * ROWS * T,
        "cost_usd": pytest.approx(summary["wall_time_s"]),  # a dollar a second
        "checkpoint": str(whole.folder / "checkpoints" / f"step_{STEPS:08d}"),
    }
    assert set(summary) == set(Summary.__dataclass_fields__)
    timed = [dt for step, dt in whole.curve("train/dt") if step >= 10]
    assert summary["total_training_time_s"] == pytest.approx(sum(timed), rel=0.5)
    assert summary["wall_time_s"] > sum(dt for _, dt in whole.curve("train/dt"))
    assert 0 < summary["goodput"] < 1
    assert summary["tok_per_sec"] > 0
    assert summary["peak_memory_bytes"] > 2**26


def test_the_run_directory_holds_what_a_reader_expects(whole):
    assert {path.name for path in whole.folder.iterdir()} == {
        "attempt.json", "checkpoints", "config.json", "loss_curve.png", "metrics.jsonl", "mlflow.json", "plan.json", "ray",
        "summary.json", "tokenizer",
    }  # fmt: skip
    config = json.loads((whole.folder / "config.json").read_text())
    assert config["config"] == whole.config.flat()
    assert config["recipe"]["num_iterations"] == STEPS
    assert json.loads((whole.folder / "plan.json").read_text())
    assert (whole.folder / "loss_curve.png").read_bytes().startswith(b"\x89PNG")
    kept = checkpoint.steps(whole.folder / "checkpoints")
    assert kept[0] == STEPS
    for step in kept:
        meta = checkpoint.verify(whole.folder / "checkpoints" / checkpoint.folder_name(step)).meta
        assert (meta["step"], meta["state"]["rows_consumed"], meta["world_size"]) == (step, step * ROWS, 1)
    assert [path.name for path in (whole.folder / "ray").iterdir()] == ["attempt-1"]


def test_the_console_tells_every_step_and_the_end(whole):
    steps = [line for line in whole.lines if line.startswith("step ") and "loss:" in line]
    assert [line.split()[1] for line in steps] == [f"{step:05d}/{STEPS:05d}" for step in range(STEPS)]
    assert any(line.startswith("device: 1 x cpu") for line in whole.lines)
    end = next(i for i, line in enumerate(whole.lines) if line.startswith("finished: step 12 of 12"))
    told = [line.split()[0] for line in whole.lines[end + 1 :] if not line.startswith("    ")]
    assert told == ["time:", "forecast", "summary", "loss", "checkpoint"]


@pytest.mark.usefixtures("whole")
def test_no_process_looks_for_the_cluster_to_free_its_room():
    """Ray Train's own finds another one where a machine has several, and holds up the end of the run."""
    made = {actor["ActorClassName"] for actor in ray_state.actors().values()}
    assert "TrainController" in made
    assert "PlacementGroupCleaner" not in made


@pytest.mark.mlflow
def test_mlflow_has_the_run(whole):
    client = mlflow_delivery.open_client(whole.config.run.tracking_uri)
    run = client.get_run(whole.summary.mlflow_run_id)
    assert (run.info.status, run.info.run_name) == ("FINISHED", "whole")
    for metric in ("train/loss", "train/grad_norm", "val/bpb", "cost/usd"):
        history = client.get_metric_history(run.info.run_id, metric)
        assert [(point.step, point.value) for point in history] == whole.curve(metric)
    assert {name: run.data.params[name] for name in ("depth", "matrix_lr", "seed", "num_iterations")} == {
        "depth": "2", "matrix_lr": "0.02", "seed": "42", "num_iterations": "12",
    }  # fmt: skip
    assert run.data.params["flops_per_token"]  # what the scaling laws decided is there as well
    assert run.data.tags["raychat.world_size"] == "1"
    assert run.data.tags["raychat.device"] == "cpu"
    assert run.data.tags["raychat.run_dir"] == str(whole.folder)
    assert run.data.tags["raychat.git_commit"]
    (used,) = run.inputs.dataset_inputs
    assert used.dataset.digest == json.loads((whole.folder / "config.json").read_text())["data_fingerprint"]
    assert {artifact.path for artifact in client.list_artifacts(run.info.run_id)} == {
        "config.json", "loss_curve.png", "plan.json", "summary.json",
    }  # fmt: skip


def test_a_run_that_is_done_says_so_and_starts_nothing(whole, monkeypatch):
    def too_much(config, *, echo):
        raise AssertionError("Ray was asked for")

    monkeypatch.setattr(clusters, "connect", too_much)
    before = {path: path.stat().st_mtime_ns for path in whole.folder.rglob("*")}
    lines = []
    assert driver.run(whole.config, echo=lines.append) is None
    assert lines[-1].startswith(f"done: {whole.folder} reached its horizon of 12 steps before (val bpb ")
    changed = [path for path in whole.folder.rglob("*") if before.get(path) != path.stat().st_mtime_ns]
    assert changed in ([], [whole.folder])  # the lease came and went


def test_the_number_of_workers_changes_losses_by_rounding_alone(whole, pair):
    """The same rows in every global step; sums of another order differ in their last bits, which training amplifies.

    Numbers that share the rows unevenly are in test_training.py and test_stream.py.
    """
    assert pair.starts()[0]["world_size"] == 2
    assert pair.summary.rows_consumed == whole.summary.rows_consumed
    for (step, loss), (same_step, expected) in zip(pair.curve(), whole.curve(), strict=True):
        assert step == same_step
        assert math.isclose(loss, expected, rel_tol=1e-3), (step, loss, expected)
    assert math.isclose(pair.summary.val_bpb, whole.summary.val_bpb, rel_tol=1e-3)


def test_a_worker_that_is_killed_costs_the_steps_since_the_last_save(pair, run_here, monkeypatch, tmp_path):
    """Rank 1 dies by SIGKILL before step 7. All start again from the checkpoint of step 6, and end where the run ends
    that nothing disturbed, bit for bit."""
    killed = tmp_path / "killed"

    def dies_once(spec):
        from raychat.on_ray import stream, worker

        batches = stream.RankStream.batches

        def deadly(self, plan):
            for batch in batches(self, plan):
                if self.rank == 1 and batch.rows_consumed == 8 * ROWS and not killed.exists():
                    killed.touch()
                    os.kill(os.getpid(), signal.SIGKILL)
                yield batch

        stream.RankStream.batches = deadly
        worker.train_worker(spec)

    monkeypatch.setattr(crew, "train_worker", dies_once)
    run = run_here(model_tag="killed", num_workers=2)
    assert killed.exists()
    for metric in ("train/loss", "val/bpb"):
        assert run.curve(metric) == pair.curve(metric)
    assert [step for step, _ in run.curve()] == list(range(STEPS))
    assert [start["resume_step"] for start in run.starts()] == [0, 6]
    assert (run.summary.status, run.summary.restarts, run.summary.replayed_steps) == ("finished", 1, 1)
    assert any(
        re.fullmatch("a worker failed: rank 1: its process died; going on from the newest checkpoint", line)
        for line in run.lines
    )


@dataclass(frozen=True)
class Held:
    """A driver in a process of its own, whose run waits before a step while `file` exists."""

    process: subprocess.Popen
    file: Path
    output: Path

    def worker_is_alive(self) -> bool:
        try:
            os.kill(int(self.file.with_name(f"{self.file.name}.pid").read_text()), 0)
        except ProcessLookupError:
            return False
        return True


@pytest.fixture
def held(cluster, flags, environment, tmp_path):
    """Starts a run on the cluster of the tests that holds before `step`, and waits until it does."""
    drivers = []

    def start(step: int, **changes) -> Held:
        config = Config.from_flat(flags | changes)
        file, output = tmp_path / f"hold-{step}", tmp_path / f"output-{step}"
        file.touch()
        arguments = as_arguments(flags | changes | {"address": cluster.address})
        command = [sys.executable, str(HERE / "held_pretrain.py"), str(step), str(file), *arguments]
        with output.open("w") as log:
            process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
        drivers.append(process)
        journal = config.run_dir / "metrics.jsonl"

        def reached() -> bool:
            assert process.poll() is None, output.read_text()
            return any(r["step"] == step - 1 and "train/loss" in r for r in read_journal(journal))

        wait_until(reached, f"step {step - 1} in {journal}")
        return Held(process, file, output)

    yield start
    for process in drivers:
        process.kill()
        process.wait()


def stopped_before(step: int, config: Config, hold: Path, monkeypatch) -> Run:
    """A run with a driver in this process that is told to stop while it holds before `step`: SIGTERM, to it alone."""
    hold.touch()
    lines: list[str] = []

    def stop() -> None:
        journal = config.run_dir / "metrics.jsonl"
        wait_until(lambda: any(r["step"] == step - 1 for r in read_journal(journal)), f"step {step - 1}")
        os.kill(os.getpid(), signal.SIGTERM)
        wait_until(lambda: any(line.startswith("SIGTERM: saving and stopping") for line in lines), "an answer")
        hold.unlink()

    with monkeypatch.context() as patch:
        patch.setattr(crew, "train_worker", held_worker(step, hold))
        thread = threading.Thread(target=stop)
        thread.start()
        summary = driver.run(config, echo=lines.append)
        thread.join()
    return Run(config, summary, lines)


def test_a_run_outlives_its_driver_and_an_order_to_stop_and_has_one_driver_at_a_time(
    whole, run_here, held, flags, tmp_path, monkeypatch
):
    """The driver is killed before step 5, the next one is told to stop before step 7, and a third one goes on.

    While the first one lives, any other is refused.
    """
    tag = {"model_tag": "lives"}
    first = held(5, **tag)
    assert first.worker_is_alive()
    with pytest.raises(RaychatError, match=f"Another driver is training in .*/lives: process {first.process.pid} on"):
        run_here(**tag)
    first.process.kill()
    first.process.wait()
    wait_until(lambda: not first.worker_is_alive(), "end of a worker without a driver")
    folder = whole.folder.with_name("lives")
    assert not (folder / "summary.json").exists()

    second = stopped_before(7, Config.from_flat(flags | tag), tmp_path / "hold", monkeypatch)
    stopped = second.summary
    assert stopped == Summary.read(folder / "summary.json")
    assert (stopped.status, stopped.restarts, stopped.replayed_steps) == ("stopped", 1, 1)
    assert 7 < stopped.step < STEPS
    assert stopped.checkpoint == str(folder / "checkpoints" / checkpoint.folder_name(stopped.step))
    assert any(line.startswith(f"stopped: step {stopped.step} of 12") for line in second.lines)

    third = run_here(**tag)
    assert (third.summary.status, third.summary.restarts, third.summary.replayed_steps) == ("finished", 2, 1)
    assert [start["resume_step"] for start in third.starts()] == [0, 4, stopped.step]
    for metric in ("train/loss", "val/bpb"):
        assert third.curve(metric) == whole.curve(metric)


def test_what_a_worker_finds_wrong_ends_the_run_at_once(run_here, flags, prepared_base, tmp_path):
    """Nothing gets better by trying again: the message comes as it was raised, and there is one attempt."""
    base = tmp_path / "base"
    shutil.copytree(prepared_base, base)
    for shard in base.glob("tokens/*/train-*.arrow"):
        shard.write_bytes(bytes(shard.stat().st_size))
    changes = {"base_dir": str(base), "model_tag": "damaged"}
    with pytest.raises(RaychatError) as error:
        run_here(**changes)
    assert str(error.value).startswith(
        f"Token shard {next(base.glob('tokens/*/train-000000.arrow')).parent}/train-00000"
    )
    assert str(error.value).endswith("and it is made again.")
    assert error.value.exit_code == 2
    folder = Config.from_flat(flags | changes).run_dir
    assert Summary.read(folder / "summary.json").status == "failed"
    assert [event["event"] for event in read_events(folder / "metrics.jsonl")].count("start") == 1


def test_a_run_that_fails_again_and_again_is_given_up(run_here, monkeypatch):
    def fails(spec):
        raise RuntimeError("this machine is broken")

    monkeypatch.setattr(crew, "train_worker", fails)
    with pytest.raises(
        driver.RunFailedError, match="Training failed 2 times at the same step, 0 .*this machine is broken"
    ):
        run_here(model_tag="hopeless", max_failures=2)
    assert driver.RunFailedError.exit_code == 1
