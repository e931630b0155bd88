"""A job on a cluster that has no workers: nodes come because it asks for them, are taken from it, and go at its end.

One of the two nodes of a run of two workers is taken away with notice and one without, each time that of rank 0, and each
time another comes. The run must end as the one does that nothing disturbed, bit for bit, and nobody is left afterwards.
"""

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from ray.job_submission import JobStatus, JobSubmissionClient

from on_ray.autoscaled import AutoscaledCluster, autoscaled_cluster
from on_ray.heads import as_arguments
from raychat.config import Config
from raychat.on_ray import driver
from raychat.on_ray.processes import kill_tree
from raychat.on_ray.raylets import drain_node
from raychat.tracking.journal import read_journal, records_from
from raychat.tracking.summary import Summary

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

HERE = Path(__file__).resolve().parent
STEPS, SAVE_EVERY = 150, 25
STEP_S = 0.2  # while something is done to the run
NOTICE_S = 12.0
IDLE_S = 60.0  # more than the moment between two crews, when nodes have nothing to do
IDLE_AFTER_IT_S = 2.0
PATIENCE_S = 180.0


@dataclass
class Story:
    """The run: its journal, its job, and what was done when (Unix seconds)."""

    config: Config
    cluster: AutoscaledCluster
    jobs: JobSubmissionClient
    job: str = ""
    times: dict[str, float] = field(default_factory=dict)
    nodes: dict[str, set[str]] = field(default_factory=dict)

    def records(self) -> list[dict[str, Any]]:
        """Everything in the journal so far."""
        path = self.config.run_dir / "metrics.jsonl"
        return [record for record, _ in records_from(path)] if path.exists() else []

    def events(self, kind: str, after: str = "") -> list[dict[str, Any]]:
        """The journal's events of a kind, since `after` happened."""
        since = self.times.get(after, 0.0)
        return [r for r in self.records() if r.get("event") == kind and r["time"] >= since]

    def mark(self, name: str) -> None:
        """Remember when this happened, and which nodes there were."""
        self.times[name], self.nodes[name] = time.time(), self.cluster.nodes()

    def wait(self, what: str, condition: Callable[[], Any]) -> Any:
        """The first truth that `condition` gives."""
        deadline = time.monotonic() + PATIENCE_S
        while not (found := condition()):
            assert self.cluster.head.poll() is None, f"{what}: the head has ended\n{self.log()}"
            assert time.monotonic() < deadline, f"{what}: not within {PATIENCE_S:g}s\n{self.log()}"
            time.sleep(0.2)
        return found

    def wait_for_a_step(self, after: str) -> float:
        """Until an attempt that began after that has done its first step, and another one; the time of the first."""

        def trains() -> float | None:
            since = max(self.times[after], *(start["time"] for start in self.events("start")), 0.0)
            first = [event["time"] for event in self.events("first_step") if event["time"] >= since]
            steps = [r for r in self.records() if "train/loss" in r and first and r["time"] >= first[0]]
            return first[0] if steps and self.events("start", after) else None

        return self.wait(f"a step after {after}", trains)

    def home_of_rank_0(self) -> tuple[str, int]:
        """The node of rank 0, and its raylet's process."""
        rank = next(r for r in self.events("ranks")[-1]["ranks"] if r["rank"] == 0)
        parent = Path(f"/proc/{rank['pid']}/stat").read_text().rpartition(")")[2].split()[1]
        return rank["node_id"], int(parent)

    def log(self) -> str:
        """The end of what the head and the job have said."""
        if self.cluster.head.poll() is not None or not self.job:
            return self.cluster.log()
        return self.cluster.log() + self.jobs.get_job_logs(self.job)[-4000:]


@pytest.fixture(scope="module")
def flags(tiny_flags, prepared_base, tmp_path_factory) -> dict[str, Any]:
    """Settings of runs of two workers that share prepared data; each needs a model tag of its own."""
    return tiny_flags | {
        "base_dir": str(prepared_base),
        "storage_path": str(tmp_path_factory.mktemp("autoscaling") / "runs"),
        "num_workers": 2,
        "num_iterations": STEPS,
        "eval_every": 50,
        "save_every": SAVE_EVERY,
    }


@pytest.fixture(scope="module")
def undisturbed(connected, flags) -> Config:
    """The run of two workers that nothing happens to."""
    config = Config.from_flat(flags | {"model_tag": "undisturbed"})
    driver.run(config, echo=lambda line: None)
    return config


@pytest.fixture(scope="module")
def story(flags, environment, tmp_path_factory) -> Iterator[Story]:
    pace = tmp_path_factory.mktemp("pace") / "slow"
    pace.touch()
    config = Config.from_flat(flags | {"model_tag": "autoscaled"})
    entrypoint = [sys.executable, HERE / "paced_pretrain.py", pace, STEP_S]
    entrypoint += as_arguments(flags | {"model_tag": "autoscaled"})
    with autoscaled_cluster(environment, most=3, idle_s=IDLE_S) as cluster:
        story = Story(config, cluster, JobSubmissionClient(cluster.dashboard))
        story.mark("submit")
        story.job = story.jobs.submit_job(entrypoint=" ".join(map(str, entrypoint)))
        story.times["first step"] = story.wait_for_a_step("submit")

        leaving, raylet = story.home_of_rank_0()
        story.mark("notice")
        deadline = time.time() + NOTICE_S
        drain_node(cluster.gcs, leaving, NOTICE_S)
        story.wait("another node", lambda: cluster.nodes() - story.nodes["notice"])
        story.mark("another node")
        time.sleep(max(0.0, deadline - time.time()))
        story.times["taken with notice"] = deadline
        kill_tree(raylet)
        story.times["step after notice"] = story.wait_for_a_step("taken with notice")

        _, raylet = story.home_of_rank_0()
        story.mark("taken without")
        kill_tree(raylet)
        story.times["step without"] = story.wait_for_a_step("taken without")

        pace.unlink()
        story.wait("the end of the job", lambda: story.jobs.get_job_status(story.job).is_terminal())
        (end,) = story.events("end")
        story.times["end"] = end["time"]
        cluster.let_go_after(IDLE_AFTER_IT_S)
        story.wait("no nodes", lambda: not cluster.nodes())
        story.mark("no nodes")
        yield story


def test_the_job_asked_for_its_nodes_and_left_none(story, capsys):
    """From none to two, never more than three, and back."""
    assert story.nodes["submit"] == set()
    assert len(story.nodes["notice"]) == 2
    assert max(map(len, story.nodes.values())) <= 3
    assert story.nodes["no nodes"] == set()
    assert story.jobs.get_job_status(story.job) == JobStatus.SUCCEEDED, story.log()
    told = story.jobs.get_job_logs(story.job)
    assert "waiting for machines: at least 2 free CPUs are needed" in told
    spans = {
        "submit to first step": ("submit", "first step"),
        "notice to another node": ("notice", "another node"),
        "node taken with notice to next step": ("taken with notice", "step after notice"),
        "node lost to next step": ("taken without", "step without"),
        "end to no nodes": ("end", "no nodes"),
    }
    with capsys.disabled():
        sys.stdout.write("\n")
        for name, (begin, end) in spans.items():
            sys.stdout.write(f"  {name}: {story.times[end] - story.times[begin]:.1f} s\n")


def test_the_run_is_the_one_that_nothing_disturbed(story, undisturbed):
    """The same rows, losses and validation, bit for bit, each step once."""

    def curve(config: Config, metric: str) -> list[tuple[int, float]]:
        return [(r["step"], r[metric]) for r in read_journal(config.run_dir / "metrics.jsonl") if metric in r]

    assert [step for step, _ in curve(story.config, "train/loss")] == list(range(STEPS))
    for metric in ("train/loss", "val/bpb"):
        assert curve(story.config, metric) == curve(undisturbed, metric)
    mine, whole = (Summary.read(config.run_dir / "summary.json") for config in (story.config, undisturbed))
    assert (mine.status, mine.rows_consumed, mine.val_bpb) == ("finished", whole.rows_consumed, whole.val_bpb)


def test_what_was_lost_is_what_the_contract_says(story):
    """Rank 0 was on both nodes. With notice: the steps after the save for it; without: those after the last save."""
    starts, failures = story.events("start"), story.events("failure")
    assert [start["world_size"] for start in starts] == [2] * len(starts)
    assert [failure["cause"] for failure in failures] == ["preempted", "lost"]
    (notice,) = story.events("notice")
    save = next(event for event in story.events("checkpoint", after="notice") if event["synchronous"])
    assert save["time"] < notice["time"] + notice["seconds"]
    resumed = [start["resume_step"] for start in starts]
    assert resumed[1] >= save["step"]
    assert starts[2]["replayed"] <= SAVE_EVERY
    assert Summary.read(story.config.run_dir / "summary.json").preemptions == 1
