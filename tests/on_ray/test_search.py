"""Searches on Ray Tune: full runs as trials, through the death of the search, and with nothing left behind."""

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import ray
from ray.util import placement_group, remove_placement_group
from runs import Ran, run_here

from on_ray.conftest import CPUS, ROOT
from raychat.config import Config
from raychat.on_ray import search
from raychat.on_ray.cluster import Cluster
from raychat.on_ray.forking import fork
from raychat.on_ray.processes import children, kill_tree
from raychat.on_ray.search_data import SharedData
from raychat.search.book import read_book, search_dir
from raychat.search.spec import SearchSpec
from raychat.search.spec_file import to_toml
from raychat.tracking.journal import read_journal, records_from
from raychat.tracking.search_table import read_search_row
from raychat.training import checkpoint

pytestmark = [
    pytest.mark.ray,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning"),
]
HERE = Path(__file__).resolve().parent
PRETRAIN = ROOT / "jobs" / "pretrain.py"
STEPS = 12


@pytest.fixture(scope="module")
def base_dir(prepared_base, tmp_path_factory) -> Path:
    """A base directory of the searches here, with the data that are there already."""
    base = tmp_path_factory.mktemp("searches") / "base"
    base.mkdir()
    for folder in prepared_base.iterdir():
        (base / folder.name).symlink_to(folder)
    return base


@pytest.fixture(scope="module")
def spec(tiny_flags, base_dir) -> SearchSpec:
    """A search of two configurations that can be and two that cannot."""
    own = {"num_iterations": STEPS, "eval_every": 6, "save_every": 2, "price_per_hour": 1.0, "threads": 1}
    return SearchSpec(
        name="s",
        base=tiny_flags | own | {"base_dir": str(base_dir)},
        space={"matrix_lr": [0.02, 0.04], "device_batch_size": [2, 3]},
        scheduler="none",
        noise_repeats=0,
        confirm_seeds=0,
        concurrency=1,
    )


@dataclass
class Story:
    """A search through what befalls one: its first run is hit by all of it, the second by nothing."""

    spec: SearchSpec
    folder: Path
    runs: Path
    stopped: list[str] = field(default_factory=list)
    """what it said that was stopped with its process group"""
    code: int = -1
    """with which that one ended"""
    report_then: bool = False
    """whether there was a report"""
    left: list[int] = field(default_factory=list)
    """processes that outlived it"""
    lines: list[str] = field(default_factory=list)
    """what was said by the one that came to the end"""
    begun: list[subprocess.Popen[bytes]] = field(default_factory=list)
    """processes of the search besides this one"""

    def steps(self, run: int = 0) -> int:
        """Records in the journal of a run."""
        return len(read_journal(self.runs / f"s-{run:03d}" / "metrics.jsonl"))

    def events(self, kind: str, run: int = 0) -> list[dict]:
        return [r for r in read_events(self.runs / f"s-{run:03d}" / "metrics.jsonl") if r.get("event") == kind]

    def begin(self, environment: dict[str, str], said: Path) -> subprocess.Popen[bytes]:
        """The search in a process group of its own, with slow runs."""
        file = self.folder.parent / "s.toml"
        file.parent.mkdir(exist_ok=True)
        file.write_text(to_toml(self.spec))
        command = [sys.executable, str(HERE / "slow_search.py"), str(file)]
        with said.open("wb") as out:
            begun = subprocess.Popen(
                command, env=environment, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
            )
        self.begun.append(begun)
        return begun

    def goes_on(self, what: str) -> None:
        """Wait until the first run makes more steps."""
        before = self.steps()
        wait_until(lambda: self.steps() > before, what)


@pytest.fixture(scope="module")
def story(connected, spec, cluster, environment, base_dir, tmp_path_factory) -> Iterator[Story]:
    """A worker is killed; then the search is stopped with all its group; then it is killed; then it comes to its end."""
    told = Story(spec, search_dir(base_dir, "s"), base_dir / "runs")
    said = tmp_path_factory.mktemp("said") / "lines"
    try:
        stop_with_its_group(told, environment, said)
        kill(told, environment | {"RAY_ADDRESS": cluster.address}, said)
        come_to_the_end(told)
        yield told
    finally:
        for process in told.begun:
            if process.poll() is None:  # a wait was in vain
                kill_tree(process.pid)


def stop_with_its_group(story: Story, environment: dict[str, str], said: Path) -> None:
    """On a cluster of its own, behind the death of a worker."""
    with story.begin(environment, said) as process:
        wait_until(lambda: checkpoint.steps(story.runs / "s-000" / "checkpoints"), "no checkpoint")
        os.kill(training_worker(process.pid), signal.SIGKILL)
        wait_until(lambda: len(story.events("start")) > 1, "the worker does not come back")
        story.goes_on("it does not train again")
        os.killpg(process.pid, signal.SIGTERM)
        story.code = process.wait(120.0)
    story.stopped, story.report_then = said.read_text().splitlines(), (story.folder / "report.html").exists()
    story.left = drivers(story.runs.parent)


def kill(story: Story, environment: dict[str, str], said: Path) -> None:
    """On the cluster of the tests: nothing of it is left there."""
    with story.begin(environment, said) as process:
        story.goes_on("it does not go on where it was stopped")
        assert drivers(story.runs.parent), "a run is no process of its own"
        process.kill()
    wait_until(lambda: not drivers(story.runs.parent), "runs outlive their search", 15.0)
    wait_until(lambda: free_cpus() == CPUS, "workers outlive their search", 30.0)


def come_to_the_end(story: Story) -> None:
    """In this process, two runs at a time on two free CPUs."""
    taken = placement_group([{"CPU": CPUS - 2}])
    ray.get(taken.ready())
    try:
        both = dataclasses.replace(story.spec, concurrency=2)
        assert search.run(both, script=PRETRAIN, echo=story.lines.append)
    finally:
        remove_placement_group(taken)


def wait_until(condition, what, seconds=300.0):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, f"{what}: not within {seconds:g}s"
        time.sleep(0.1)


def read_events(journal: Path) -> list[dict]:
    return [record for record, _ in records_from(journal)] if journal.exists() else []


def training_worker(driver: int) -> int:
    """The process that trains on the cluster that the process `driver` has started."""
    (found,) = [pid for pid in children(driver) if "RayTrainWorker" in Path(f"/proc/{pid}/cmdline").read_text()]
    return found


def drivers(folder: Path) -> list[int]:
    """Processes of runs whose command names `folder`."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and f"{folder}".encode() in (command := (entry / "cmdline").read_bytes()):
                found += [int(entry.name)] if b"pretrain.py" in command else []
    return found


def free_cpus() -> int:
    return int(ray.available_resources().get("CPU", 0))


def undisturbed(story: Story, tag: str, **settings) -> Ran:
    """The run of these settings without Ray, without a search, and with nothing in its way."""
    return run_here(Config.from_flat(settings | {"model_tag": f"alone-{tag}"}, story.spec.base_config))


def test_a_search_makes_full_runs_and_enters_what_came_out(story):
    _, book = read_book(story.folder)
    found = {trial.arm: (trial.tag, outcome) for trial, outcome in book.runs()}
    assert {arm: outcome.status for arm, (_, outcome) in found.items()} == {
        "base": "finished",
        "matrix_lr=0.04": "finished",
        "device_batch_size=3": "infeasible",
        "device_batch_size=3,matrix_lr=0.04": "infeasible",
    }
    for tag, outcome in found.values():
        assert (story.runs / tag / "summary.json").exists() == (outcome.status == "finished")
        assert bool(outcome.cost_usd) == (outcome.status == "finished")
    assert story.lines[-1].startswith("finished: 4 done")
    assert {"report.html", "report.md", "trials.csv", "logs"} <= {path.name for path in story.folder.iterdir()}
    assert read_search_row(story.folder).status == "finished"


def test_neither_killed_workers_nor_killed_searches_change_what_comes_out(story):
    _, book = read_book(story.folder)
    assert len(story.events("failure")) >= 1
    assert (book.started["s-000"], book.started["s-002"]) == (3, 1)
    for tag, settings in (("s-000", {}), ("s-002", {"matrix_lr": 0.04})):
        alone, outcome = undisturbed(story, tag, **settings), book.done[tag]
        assert outcome.val_bpb == alone.summary.val_bpb
        assert (outcome.tokens, outcome.facts["step"]) == (alone.summary.tokens, STEPS)
        records = read_journal(story.runs / tag / "metrics.jsonl")
        assert [record["train/loss"] for record in records if "train/loss" in record] == alone.losses
    assert book.done["s-000"].val_bpb != book.done["s-001"].val_bpb


def test_a_signal_to_its_whole_process_group_saves_and_ends_the_search_in_good_order(story):
    assert "s-000 has saved and stopped: it goes on when the search does" in story.stopped
    assert story.stopped[-1].endswith("jobs/search.py --resume s goes on")
    assert (story.code, story.report_then, story.left) == (0, True, [])


def test_a_search_leaves_no_process_and_no_cpu_taken(story, base_dir):
    wait_until(lambda: free_cpus() == CPUS, "CPUs are still taken")
    assert drivers(base_dir) == []


def test_a_search_that_is_over_makes_nothing_again(story):
    again: list[str] = []
    assert search.run(story.spec, script=Path("not needed"), echo=again.append)
    assert not [line for line in again if "started" in line]
    assert again[-1] == story.lines[-1]


def test_a_fork_begins_with_the_checkpoint_of_its_trunk(story):
    base = story.spec.base_config
    trunk = Config.from_flat({"model_tag": "s-000"}, base)
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
    base = {name: value for name, value in spec.base.items() if name != "threads"} | flags
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
