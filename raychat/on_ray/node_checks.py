"""Checks of the cluster's nodes before they train: each must see the run's folders, and run what the driver runs.

The driver writes a file into each folder, every other node reads it and writes one of its own, and the driver reads that.
What nodes only read must be there as the driver sees it. That takes seconds for all nodes together, in tasks that need no
CPU. Before training begins a node that does not pass is an error; one that joins later is left out.
"""

import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raychat.config import Config
from raychat.errors import ConfigError
from raychat.on_ray.crew import last_line
from raychat.on_ray.node_probe import DRIVER, Read, Seen, Software, clock, look, software
from raychat.on_ray.node_reads import reads_of
from raychat.on_ray.nodes import Node, nodes
from raychat.on_ray.nodes import answers as is_there
from raychat.storage import Store
from raychat.training.lease import FENCE_S, STALE_S

FOLDER = ".raychat-probe-"
LIMIT_S = 60.0  # for a node to answer: an object store that is out of reach ends in less
POLL_S = 0.05
AGAIN_S = 30.0  # after the driver itself could not write
CLOCK_LIMIT_S = 5.0
# The lease leaves this much for clocks that differ and for a write on its way; half of it for the clocks.
APART_S = (STALE_S - FENCE_S) / 2
NAMED = 5  # nodes that a message names

Echo = Callable[[str], None]


@dataclass(frozen=True)
class Place:
    """A folder that all nodes are to see. `remedy`: what helps where one does not."""

    store: Store
    remedy: str


def places_of(config: Config) -> list[Place]:
    """The folders of `config`: an object store has tokens and runs; else the base directory, and a storage path beside it."""
    runs = Store.of(config.run.storage_path or config.runs_dir)
    if not runs.is_local:
        return [Place(runs, "Every node needs the credentials, and a way to the object store.")]
    shared = "give one that all nodes share (NFS, EFS, Filestore), or --storage-path s3://... (gs://...) instead."
    base = Place(Store.of(config.base_dir), f"Every node reads token shards in --base-dir: {shared}")
    if runs.path.is_relative_to(config.base_dir):
        return [base]
    return [base, Place(runs, f"Every node writes and reads checkpoints in --storage-path: {shared}")]


class NodeChecks:
    """Remembers which nodes were checked. The driver's own node counts as sound."""

    def __init__(self, config: Config, *, echo: Echo) -> None:
        self.places, self._config, self._echo = places_of(config), config, echo
        self.strict = True
        """whether a node that does not pass is an error, as before training begins; else it is left out"""
        self.unfit: set[str] = set()
        self._known: set[str] = {ray.get_runtime_context().get_node_id()}
        self._round: _Round | None = None
        self._not_before = 0.0

    @property
    def pending(self) -> bool:
        """Whether nodes are being checked at this moment."""
        return self._round is not None

    def check_all(self) -> None:
        """Check all nodes that are there, and say so in a line; nothing where there is but one.

        Raises:
            ConfigError: a node does not see what it must, or runs something else.
        """
        begun = time.monotonic()
        self.tick(nodes().values())
        asked, reads = (self._round.asked, self._round.reads) if self._round else ({}, [])
        while self._round:
            time.sleep(POLL_S)
            self.tick([])
        if asked:
            apart = self._compare_clocks(list(asked.values()))
            seen = [*(place.store.uri for place in self.places), *(read.place for read in reads)]
            self._echo(
                f"{len(asked)} other node{'s' if len(asked) > 1 else ''} checked in {time.monotonic() - begun:.1f}s: "
                f"{' and '.join(seen)} seen by all, the same software, clocks {apart}"
            )

    def tick(self, there: Iterable[Node]) -> None:
        """Begin to check those of `there` that are new, and take in what the nodes asked before have answered.

        Raises:
            ConfigError: as `check_all`, as long as `strict`.
        """
        if self._round is None:
            new = [node for node in there if node.node_id not in self._known and node.deadline_s is None]
            if new and time.monotonic() >= self._not_before:
                self._begin(new)
        elif self._round.over:
            ended, self._round = self._round, None
            self._judge(ended)

    def _begin(self, new: list[Node]) -> None:
        try:
            self._round = _Round(self.places, reads_of(self._config), new)
        except ConfigError:
            if self.strict:
                raise
            self._not_before = time.monotonic() + AGAIN_S  # an outage of the storage is no reason to end a run
        else:
            self._known |= set(self._round.asked)

    def _judge(self, ended: "_Round") -> None:
        answers, problems = ended.close()
        errors, warnings = compare_software(software(), answers)
        problems |= {node: text for node, text in errors.items() if node not in problems}
        for node, seen in answers.items():
            off = off_by(seen.time_s, ended.begun_s, time.time())
            if node not in problems and off > APART_S and not self.strict:
                warnings.append(clock_warning(node, off))
        warnings += loopback_warnings(answers, ray.util.get_node_ip_address())
        for line in warnings:
            self._echo(f"warning: {line}")
        if problems and self.strict:
            raise ConfigError(as_error(problems))
        for node, text in problems.items():
            self.unfit.add(node.node_id)
            self._echo(f"{name_of(node)} is left out: {text}")

    def _compare_clocks(self, asked: list[Node]) -> str:
        """How far the clocks of these nodes may be from the driver's; says which are too far."""
        begun_s = time.time()
        waiting = {_on(node, clock).remote(): node for node in asked}
        widest, deadline = 0.0, time.monotonic() + CLOCK_LIMIT_S
        while waiting and time.monotonic() < deadline:
            ready, _ = ray.wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
            ended_s = time.time()
            for ref in ready:
                node = waiting.pop(ref)
                with suppress(ray.exceptions.RayError):  # gone by now
                    told = ray.get(ref)
                    widest = max(widest, ended_s - told, told - begun_s)
                    if (off := off_by(told, begun_s, ended_s)) > APART_S:
                        self._echo(f"warning: {clock_warning(node, off)}")
        return f"within {widest:.1g}s" if not waiting else "not known of all"


class _Round:
    """Several nodes asked at the same time. `asked`: by their ids; `reads`: what they are asked to read."""

    def __init__(self, places: list[Place], reads: list[Read], some: list[Node]) -> None:
        self.reads, self.asked = reads, {node.node_id: node for node in some}
        self.begun_s, self._begun = time.time(), time.monotonic()
        self._token = uuid.uuid4().hex
        self._places, self._folders = places, [place.store.child(FOLDER + self._token) for place in places]
        self._made = [parent for folder in self._folders if folder.is_local for parent in _missing(folder.path)]
        for place, folder in zip(places, self._folders, strict=True):
            try:
                folder.write_bytes(DRIVER, self._token.encode())
            except OSError as error:
                self._tidy()
                raise ConfigError(f"{place.store.uri} cannot be written to ({error}). {place.remedy}") from error
        addresses = [folder.address for folder in self._folders]
        self._refs = {_on(node, look).remote(self._token, node.node_id, addresses, reads): node for node in some}

    @property
    def over(self) -> bool:
        """Whether all have answered, or the time is up."""
        _, busy = ray.wait(list(self._refs), num_returns=len(self._refs), timeout=0)
        return not busy or time.monotonic() - self._begun > LIMIT_S

    def close(self) -> tuple[dict[Node, Seen], dict[Node, str]]:
        """What the nodes said, and the problems of those that did not pass; a node that is gone has none."""
        answers: dict[Node, Seen] = {}
        problems: dict[Node, str] = {}
        alive = nodes()
        ready, busy = ray.wait(list(self._refs), num_returns=len(self._refs), timeout=0)
        try:
            for ref in [*ready, *busy]:
                node = self._refs[ref]
                if node.node_id not in alive:
                    continue
                try:
                    answers[node] = seen = ray.get(ref, timeout=0)
                    if problem := self._problem(node, seen):
                        problems[node] = problem
                except ray.exceptions.GetTimeoutError:
                    ray.cancel(ref, force=True)
                    problems[node] = f"has not answered for {LIMIT_S:.0f}s, as where a mounted folder hangs."
                except ray.exceptions.RayError as error:
                    if not is_there(node):  # gone, which the cluster finds out only later
                        continue
                    problems[node] = f"cannot be asked ({last_line(error)}): is raychat there, with its dependencies?"
        finally:
            self._tidy()
        return answers, problems

    def _problem(self, node: Node, seen: Seen) -> str:
        for place, folder, trouble in zip(self._places, self._folders, seen.troubles, strict=True):
            if not trouble:
                try:
                    same = folder.read_bytes(node.node_id) == self._token.encode()
                except OSError:
                    same = False
                trouble = "" if same else "writes what the driver does not see"
            if trouble:
                return f"{place.store.uri}: it {trouble}. {place.remedy}"
        for read, trouble in zip(self.reads, seen.unread, strict=True):
            if trouble:
                return f"{read.setting} {read.place}: it {trouble}. {read.remedy}"
        return ""

    def _tidy(self) -> None:
        for place, folder in zip(self._places, self._folders, strict=True):
            with suppress(OSError):
                place.store.delete(FOLDER + self._token)
            if folder.is_local:
                for parent in self._made:
                    with suppress(OSError):  # not empty: somebody else uses it by now
                        parent.rmdir()


def compare_software(mine: Software, answers: Mapping[Node, Seen]) -> tuple[dict[Node, str], list[str]]:
    """Nodes that cannot work with the driver, or with each other, and why; and what is only worth a warning.

    Code and Python must be the driver's: what they send each other is pickled. torch must agree where it trains, because
    ranks of two releases may not talk to each other and compute different numbers; builds (+cu128) may differ.
    """
    errors: dict[Node, str] = {}
    warnings: list[str] = []
    with_gpus = any(node.gpus for node in answers)
    trainers = [node for node in answers if (node.gpus if with_gpus else node.cpus)]
    first = next((answers[node].software.torch for node in trainers if answers[node].software.torch), mine.torch)
    for node, seen in answers.items():
        its = seen.software
        if _minor(its.python) != _minor(mine.python):
            errors[node] = f"it has Python {its.python}, the driver {mine.python}: install the same minor version."
        elif its.ray != mine.ray:
            errors[node] = f"it has Ray {its.ray}, the driver {mine.ray}: install the same version."
        elif its.raychat != mine.raychat:
            errors[node] = (
                f"its raychat differs from the driver's (sources {its.raychat}, {mine.raychat}): install the same commit "
                "everywhere, or submit with `ray job submit --working-dir .`."
            )
        elif node in trainers and _minor(its.torch) != _minor(first):
            errors[node] = f"it has torch {its.torch or '(none)'}, another node {first}: install the same version."
        elif node in trainers and _release(its.torch) != _release(first):
            warnings.append(
                f"{name_of(node)} has torch {its.torch}, another node {first}: losses may differ in a last digit"
            )
    return errors, warnings


def loopback_warnings(answers: Mapping[Node, Seen], own_address: str) -> list[str]:
    """Nodes whose gloo the others will not reach; none where all are raylets of the driver's machine."""
    if {node.address for node in answers} <= {own_address}:
        return []
    return [
        f"the name of {name_of(node)} stands for a loopback address there, on which the other nodes cannot reach gloo: correct "
        "its /etc/hosts, or export GLOO_SOCKET_IFNAME before `ray start`."
        for node, seen in answers.items()
        if seen.name_is_loopback
    ]


def off_by(told_s: float, begun_s: float, ended_s: float) -> float:
    """Seconds that a clock is off for certain, which told the time at some moment between `begun_s` and `ended_s`."""
    return max(0.0, told_s - ended_s, begun_s - told_s)


def clock_warning(node: Node, off_s: float) -> str:
    """What a clock that is off endangers."""
    return (
        f"the clock of {name_of(node)} is {off_s:.0f}s or more off the driver's: a notice of preemption may be read "
        f"too late, and beyond {STALE_S - FENCE_S:.0f}s a run may be taken over while it is alive. Let NTP set the clocks."
    )


def name_of(node: Node) -> str:
    """How messages name a node."""
    return f"node {node.host}" if node.host == node.address else f"node {node.host} ({node.address})"


def as_error(problems: Mapping[Node, str]) -> str:
    """All nodes that do not pass, those with the same problem together."""
    alike: dict[str, list[Node]] = {}
    for node, text in problems.items():
        alike.setdefault(text, []).append(node)
    lines = []
    for text, some in alike.items():
        more = f" and {len(some) - NAMED} more" if len(some) > NAMED else ""
        lines.append(f"{', '.join(name_of(node) for node in some[:NAMED])}{more}: {text}")
    return "Training cannot begin on these nodes:\n  " + "\n  ".join(lines)


def _on(node: Node, function: Callable[..., Any]) -> Any:
    """`function` as a task that only `node` runs, whatever else it does."""
    there = NodeAffinitySchedulingStrategy(node.node_id, soft=False)
    task: Any = ray.remote(function)
    return task.options(num_cpus=0, max_retries=0, scheduling_strategy=there)


def _missing(folder: Path) -> list[Path]:
    """Parents of `folder` that are not there, the innermost first."""
    return [parent for parent in folder.parents if not parent.exists()]


def _release(version: str) -> str:
    return version.partition("+")[0]


def _minor(version: str) -> list[str]:
    return _release(version).split(".")[:2]
