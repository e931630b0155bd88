"""Nodes that see different folders, though all are on this machine: prints what their checks say, as JSON.

    python checked_nodes.py FOLDER

A symbolic link to /proc/self/cwd leads each process to its own current directory, and the workers of a raylet have that of
their raylet: so the folder behind it is another one on every node.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
from ray.job_config import JobConfig

from raychat.config import Config
from raychat.errors import RaychatError
from raychat.on_ray import driver
from raychat.on_ray.cluster import code_path
from raychat.on_ray.node_checks import NodeChecks
from raychat.on_ray.nodes import NodeWatch
from raychat.on_ray.raylets import Raylets
from raychat.on_ray.stream import PackedRows, Span, open_dataset
from raychat.training.job import BatchPlan


class Where(PackedRows):
    """Blocks that hold the node on which they were read."""

    def reader(self, steps: Span):
        return lambda: [pa.table({"node": [ray.get_runtime_context().get_node_id()]})]


def read_here() -> tuple[str, list[str]]:
    """This node, and the nodes where the blocks of a dataset were read that was opened here."""
    plan = BatchPlan(tokens_dir="", rows_per_batch=1, num_batches=8, cursor=0, seed=0, rank=0, world_size=1, lanes=1)
    rows = open_dataset(Where(plan, Span(0, 8), 1)).take_all()
    return ray.get_runtime_context().get_node_id(), [row["node"] for row in rows]


def checks(base: Path, lines: list[str], **settings: Any) -> NodeChecks:
    return NodeChecks(Config.from_flat({"base_dir": str(base), **settings}), echo=lines.append)


def awaited(found: NodeChecks, some: list[Any]) -> float:
    """Check the nodes `some`; the seconds that took."""
    begun = time.monotonic()
    found.tick(some)
    while found.pending:
        time.sleep(0.05)
        found.tick([])
    return time.monotonic() - begun


def asked(raylets: Raylets, first: Any, shared: Path, own: Path, told: dict[str, Any]) -> None:
    """Connected to the cluster: nodes that see a folder, that do not, and that die."""
    lines: list[str] = []
    checks(shared, lines).check_all()
    told["sound"] = lines
    told["shared_is_left"] = shared.exists()
    (own / "config.json").touch()  # on the driver's node alone
    try:
        checks(shared, [], init_from=str(own)).check_all()
    except RaychatError as error:
        told["unread"] = str(error)
    (own / "config.json").unlink()
    told["read"] = ray.get(ray.remote(read_here).options(num_cpus=1).remote())

    joined: list[str] = []
    later = checks(own, joined)
    later.strict = False
    watch = NodeWatch(False, later)
    while later.pending:
        time.sleep(0.05)
        watch.look()
    told["unfit"], told["slots"], told["joined"] = len(later.unfit), watch.slots(), joined
    told["avoided"] = sorted(later.unfit) == watch.avoid()

    dying: list[str] = []
    again = checks(shared, dying)
    again.tick(watch.nodes.values())
    raylets.kill(first)
    told["dying_s"] = awaited(again, [])
    told["dying"] = [dying, len(again.unfit)]


def main(folder: Path) -> dict[str, Any]:
    """All that the tests want to know, in one cluster."""
    machines = [folder / f"machine{i}" for i in range(4)]
    for machine in machines:
        (machine / "disk").mkdir(parents=True)
    shared, own = folder / "shared", folder / "own"
    own.symlink_to("/proc/self/cwd/disk")
    told: dict[str, Any] = {}
    os.chdir(machines[0])
    with Raylets() as raylets:

        def add(machine: Path) -> Any:
            os.chdir(machine)
            try:
                return raylets.add(num_cpus=1)
            finally:
                os.chdir(machines[0])

        first, _ = add(machines[1]), add(machines[2])
        try:
            driver.run(Config.from_flat({"base_dir": str(own), "address": raylets.address, "depth": 2}), echo=print)
        except RaychatError as error:
            told["refused"] = [str(error), error.exit_code]
        told["left"] = sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
        ray.init(address=raylets.address, log_to_driver=False, job_config=JobConfig(_py_driver_sys_path=code_path()))
        try:
            asked(raylets, first, shared, own, told)
        finally:
            ray.shutdown()  # before the cluster ends, or this process ends with it
    return told


if __name__ == "__main__":
    place = Path(sys.argv[1])
    (place / "told.json").write_text(json.dumps(main(place / "nodes")))
