"""Searches on Ray Tune: full runs as trials, through the death of the search, and with nothing left behind."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import ray
from ray.util import placement_group, remove_placement_group

from on_ray.conftest import CPUS, ROOT
from raychat.config import Config
from raychat.on_ray import search
from raychat.on_ray.cluster import Cluster
from raychat.on_ray.forking import fork
from raychat.on_ray.search_data import SharedData
from raychat.search.book import read_book, search_dir
from raychat.search.spec import SearchSpec
from raychat.search.spec_file import to_toml
from raychat.tracking.journal import read_journal
from raychat.training import checkpoint

pytestmark = [
    pytest.mark.ray,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning"),
]
HERE = Path(__file__).resolve().parent
STEPS = 10


@pytest.fixture(scope="module")
def base_dir(prepared_base, tmp_path_factory) -> Path:
    """A base directory of the searches here, with the data that are there already."""
    base = tmp_path_factory.mktemp("searches") / "base"
    base.mkdir()
    for folder in prepared_base.iterdir():
        (base / folder.name).symlink_to(folder)
    return base


@pytest.fixture(scope="module")
def spec(tiny_flags, base_dir, cluster):
    """Makes a search of two configurations that can be and two that cannot."""

    def make(name: str, **changes) -> SearchSpec:
        base = tiny_flags | {
            "base_dir": str(base_dir),
            "num_iterations": STEPS,
            "eval_every": 5,
            "save_every": 2,
            "address": cluster.address,
            "price_per_hour": 1.0,
        }
        space = {"matrix_lr": [0.02, 0.04], "device_batch_size": [2, 3]}
        settings = {"scheduler": "none", "noise_repeats": 0, "confirm_seeds": 0, "concurrency": 2}
        return SearchSpec(name=name, base=base, **(settings | {"space": space} | changes))

    return make


@pytest.fixture(scope="module")
def whole(connected, spec, base_dir):
    """An undisturbed search of two runs at a time on two free CPUs: its lines, and its book."""
    lines: list[str] = []
    taken = placement_group([{"CPU": CPUS - 2}])
    ray.get(taken.ready())
    try:
        assert search.run(spec("whole"), script=ROOT / "jobs" / "pretrain.py", echo=lines.append)
    finally:
        remove_placement_group(taken)
    return lines, read_book(search_dir(base_dir, "whole"))[1]


def results(book) -> dict:
    """Arm -> what must not depend on how often a search was killed."""
    return {
        trial.arm: (outcome.status, outcome.reason, outcome.val_bpb, outcome.tokens, outcome.facts.get("step"))
        for trial, outcome in book.runs()
    }


def wait_until(condition, what, seconds=120.0):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, f"{what}: not within {seconds:g}s"
        time.sleep(0.1)


def drivers(folder: Path) -> list[int]:
    """Processes whose command names `folder`, those of the search itself apart."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and f"{folder}".encode() in (command := (entry / "cmdline").read_bytes()):
                found += [int(entry.name)] if b"pretrain.py" in command else []
    return found


def free_cpus() -> int:
    return int(ray.available_resources().get("CPU", 0))


def test_a_search_makes_full_runs_and_enters_what_came_out(whole, base_dir):
    lines, book = whole
    found = results(book)
    assert {arm: status for arm, (status, *_) in found.items()} == {
        "base": "finished",
        "matrix_lr=0.04": "finished",
        "device_batch_size=3": "infeasible",
        "device_batch_size=3,matrix_lr=0.04": "infeasible",
    }
    assert found["base"][2] != found["matrix_lr=0.04"][2]
    assert all(outcome.cost_usd for outcome in book.done.values() if outcome.status == "finished")
    for trial, outcome in book.runs():
        run_dir = base_dir / "runs" / trial.tag
        assert (run_dir / "summary.json").exists() == (outcome.status == "finished")
    assert lines[-1].startswith("finished: 4 done")
    folder = search_dir(base_dir, "whole")
    assert {"report.html", "report.md", "trials.csv", "logs"} <= {path.name for path in folder.iterdir()}


def test_a_search_leaves_no_process_and_no_cpu_taken(whole, base_dir):
    wait_until(lambda: free_cpus() == CPUS, "CPUs are still taken")
    assert drivers(base_dir) == []


def test_a_search_that_is_over_makes_nothing_again(whole, spec, connected):
    lines, _ = whole
    again: list[str] = []
    assert search.run(spec("whole"), script=Path("not needed"), echo=again.append)
    assert not [line for line in again if "started" in line]
    assert again[-1] == lines[-1]


def test_a_search_that_is_killed_or_stopped_ends_its_trials_and_comes_to_the_same_results(
    whole, spec, base_dir, environment, tmp_path
):
    file = tmp_path / "killed.toml"
    killed = spec("killed", space={"device_batch_size": [2, 3]})
    file.write_text(to_toml(killed))
    command = [sys.executable, str(HERE / "slow_search.py"), str(file)]
    runs = base_dir / "runs"

    def steps(tag: str) -> int:
        return len(read_journal(runs / tag / "metrics.jsonl"))

    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT) as first:
        wait_until(lambda: checkpoint.steps(runs / "killed-000" / "checkpoints"), "no checkpoint")
        assert len(drivers(base_dir)) >= 1
        first.kill()
        wait_until(lambda: not drivers(base_dir), "trials outlive their search", 15.0)
    wait_until(lambda: free_cpus() == CPUS, "workers outlive their search", 30.0)
    before, said = steps("killed-000"), []

    def stop() -> None:
        wait_until(lambda: steps("killed-000") > before, "the run does not go on")
        os.kill(os.getpid(), signal.SIGTERM)

    stopping = threading.Thread(target=stop)
    stopping.start()
    assert search.run(killed, script=HERE / "slow_pretrain.py", echo=said.append)
    stopping.join()
    assert "killed-000 has saved and stopped: it goes on when the search does" in said
    assert said[-1].endswith("jobs/search.py --resume killed goes on")
    assert drivers(base_dir) == []
    assert search.run(killed, script=ROOT / "jobs" / "pretrain.py", echo=said.append)
    _, book = read_book(search_dir(base_dir, "killed"))
    assert results(book) == {arm: found for arm, found in results(whole[1]).items() if "matrix_lr" not in arm}
    assert book.started["killed-000"] == 3


def test_a_fork_begins_with_the_checkpoint_of_its_trunk(whole, spec, base_dir):
    base = spec("whole").base_config
    trunk = Config.from_flat({"model_tag": "whole-000"}, base)
    step = checkpoint.steps(trunk.run_dir / "checkpoints")[0]
    sibling = Config.from_flat({"model_tag": "sibling"}, base)
    lines: list[str] = []
    fork(trunk, sibling, step, echo=lines.append)
    fork(trunk, sibling, step, echo=lines.append)
    assert len(lines) == 1, "a fork that has its checkpoint keeps it"
    (found,) = (sibling.run_dir / "checkpoints").iterdir()
    assert checkpoint.verify(found).meta == checkpoint.read_meta(trunk.run_dir / "checkpoints" / found.name)


def test_trials_of_all_lengths_share_the_data_of_the_longest(tiny_config):
    made: list[Config] = []

    class Manifest:
        class spec:  # noqa: N801
            packing = "keep"

    class Data:
        manifest = Manifest
        corpus = type("Corpus", (), {"name": "folder", "train": []})

    def make(config, **_):
        made.append(config)
        return Data

    short, long = tiny_config(num_iterations=4), tiny_config(num_iterations=40)
    other = tiny_config(vocab_size=400)
    data = SharedData([short, long, other], with_gpus=False, echo=lambda line: None, make=make)
    assert data.settings(short) == data.settings(long) == {"packing": "keep"}
    assert [config.horizon.num_iterations for config in made] == [40]
    data.settings(other)
    assert [config.model.vocab_size for config in made] == [300, 400]


@pytest.mark.parametrize(
    ("flags", "wanted", "trials"),
    [
        ({"num_workers": 1, "threads": 1}, "auto", 4),
        ({"num_workers": 1, "threads": 3}, "auto", 1),
        ({"num_workers": 2, "threads": 1}, "auto", 2),
        ({"num_workers": 8, "threads": 1}, "auto", 1),
        ({"num_workers": 1}, "auto", 2),  # a run that takes all cores of its machine has it for itself
        ({}, 3, 3),
    ],
)
def test_trials_at_a_time_follow_from_the_cluster(spec, monkeypatch, flags, wanted, trials):
    monkeypatch.setattr(Cluster, "gpus", 0)
    monkeypatch.setattr(Cluster, "cpus", 4)
    monkeypatch.setattr(Cluster, "machines", 2)
    base = spec("room").base | flags
    made = SearchSpec(name="room", base=base, space={"matrix_lr": [0.02, 0.04]}, concurrency=wanted)
    assert search.concurrency(made, Cluster("somewhere", "", started_here=False)) == trials


def test_gpus_of_a_cluster_are_planned_for_and_not_the_machine_of_the_search(tiny_config, monkeypatch):
    there = Cluster("somewhere", "", started_here=False)
    monkeypatch.setattr(Cluster, "gpus", 8)
    config = tiny_config(device_type="", num_workers="auto")
    monkeypatch.setattr(Cluster, "accelerators", ["H100"])
    target = search.target_on(config, there)
    assert target is not None
    assert (target.gpu, target.device) == ("h100", "cuda")
    monkeypatch.setattr(Cluster, "accelerators", ["Unheard-of"])
    unknown = search.target_on(config, there)
    assert unknown is not None
    assert (unknown.memory_bytes, unknown.device) == (None, "cuda")
    assert search.target_on(tiny_config(), there) is None
