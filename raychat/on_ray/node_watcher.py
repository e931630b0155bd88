"""Watches for the end of a machine and drains its node in Ray, so that the run saves before the machine goes.

  python -m raychat.on_ray.node_watcher --address HEAD:6379        on every node, from its start script or a service

Ray asks no cloud by itself. The driver starts a watcher on every node that its run is on (`start_watchers`); one that runs
beside the node also learns of SIGTERM, which the shutdown of the machine or of the pod sends to it, and works before any
driver does. Two watchers of one node do no harm: they announce the same deadline.
"""

import argparse
import contextlib
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Collection, Sequence
from typing import Any

import ray
from ray._raylet import GcsClient  # pyrefly: ignore[missing-module-attribute]
from ray.core.generated import autoscaler_pb2, gcs_pb2
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raychat import cli
from raychat.checks import check_reachable
from raychat.errors import ConfigError
from raychat.on_ray.notices import Cloud, detect

POLL_S = 2.0
DETECT_AGAIN_S = 60.0  # the metadata server of a machine that has just booted may come late
RETRY_S = 1.0
CALL_S = 5.0
GRACE_S = 25.0
LEAST_LEFT_S = 1.0  # a deadline that has passed would say nothing about what to do
UNREACHABLE = (ray.exceptions.RayError, ConfigError, OSError, RuntimeError, ValueError)

logger = logging.getLogger(__name__)


class Watch:
    """Polls this machine's cloud until there is a notice or a shutdown, and drains then. Runs in one thread."""

    def __init__(self, address: str, *, node_id: str = "", metadata_url: str = "", poll_s: float = POLL_S) -> None:
        """`address` is host:port of the cluster's GCS; without a `node_id`, every node of this machine is meant."""
        self.drained = False
        self._address, self._node_id = address, node_id
        self._metadata_url, self._poll_s = metadata_url, poll_s
        self._cloud: Cloud | None = None
        self._detect_at = 0.0
        self._said_nowhere = False
        self._deadline_s = float("inf")
        self._shutdown = threading.Event()

    def shut_down(self, grace_s: float) -> None:
        """The machine goes in `grace_s` seconds, whatever the cloud says. From any thread, not from a signal handler."""
        self._deadline_s = min(self._deadline_s, time.time() + grace_s)
        self._shutdown.set()

    def run(self) -> None:
        """Watch to the end, which comes with a drain or, after one, with `shut_down`. `drained` says whether it worked."""
        text = "the machine is shutting down"
        while not self._shutdown.wait(self._poll_s):
            self._look_around()
            notice = self._cloud.poll() if self._cloud else None
            if notice:
                text = f"{notice.source}: {notice.text}"
                self._deadline_s = min(self._deadline_s, notice.deadline_s)
                break
        logger.warning("this machine goes in %.0fs (%s): draining its node", self._deadline_s - time.time(), text)
        self.drained = self._drain(text)

    def nodes(self) -> list[str]:
        """Ids of the nodes that are to be drained.

        Raises:
            one of UNREACHABLE: there is no answer from the cluster.
        """
        if self._node_id:
            return [self._node_id]
        here = {socket.gethostname(), ray.util.get_node_ip_address()}
        state = gcs_pb2.GcsNodeInfo.ALIVE  # pyrefly: ignore[missing-attribute]
        alive = self._gcs().get_all_node_info(timeout=CALL_S, state_filter=state)
        names = {
            node_id.hex(): {node.node_manager_hostname, node.node_manager_address} for node_id, node in alive.items()
        }
        return [node_id for node_id, own in names.items() if here & own]

    def _look_around(self) -> None:
        """Find out where this machine is: now, and once a minute while it seems to be nowhere."""
        if self._cloud or time.monotonic() < self._detect_at:
            return
        self._cloud = detect(self._metadata_url)
        self._detect_at = time.monotonic() + DETECT_AGAIN_S
        if self._cloud:
            logger.info("watching for the notices of %s", self._cloud.source)
        elif not self._said_nowhere:
            logger.info("this machine is in no cloud that gives notice")
            self._said_nowhere = True

    def _drain(self, text: str) -> bool:
        """Drain until the cluster has accepted it; False when the deadline comes first."""
        done: set[str] = set()
        while True:
            try:
                for node_id in self.nodes():
                    if node_id not in done:
                        self._drain_node(node_id, text)
                        done.add(node_id)
                if done or self._shutdown.is_set():  # at a shutdown, Ray may have left before us
                    return True
                logger.warning("no node of this machine is in the cluster yet")
            except UNREACHABLE as error:
                logger.warning("the drain has not been accepted yet: %s", error)
            if time.time() > self._deadline_s:
                return False
            time.sleep(RETRY_S)

    def _drain_node(self, node_id: str, text: str) -> None:
        deadline_s = max(self._deadline_s, time.time() + LEAST_LEFT_S)
        accepted, why_not = self._gcs().drain_node(
            node_id,
            autoscaler_pb2.DRAIN_NODE_REASON_PREEMPTION,  # pyrefly: ignore[missing-attribute]
            text,
            int(deadline_s * 1000),
            timeout=CALL_S,
        )
        if not accepted:
            raise RuntimeError(f"refused: {why_not}")
        logger.warning("node %s is draining", node_id)

    def _gcs(self) -> Any:
        """A new connection: an old one may lead to a head that is no more. The check answers sooner than Ray would."""
        check_reachable(self._address)
        return GcsClient(address=self._address)


class _Watcher:
    """A watch of the node that this actor runs on."""

    def __init__(self, metadata_url: str) -> None:
        here = ray.get_runtime_context()
        watch = Watch(here.gcs_address, node_id=here.get_node_id(), metadata_url=metadata_url)
        threading.Thread(target=watch.run, daemon=True, name="node-watcher").start()


def start_watchers(known: dict[str, Any], wanted: Collection[str] | None = None) -> None:
    """Bring `known` (node id -> what watches it) up to date with the nodes that are alive, and start what is missing.

    For the driver, again and again: it waits for nothing but one look at the list of nodes. The watchers take no CPU,
    end with the driver's job, and look where the driver's RAYCHAT_METADATA_URL says, if it is set. Nodes that are not
    `wanted` (None: all are) are left: an autoscaler keeps a node on which any process of a job lives.
    """
    try:
        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
    except ray.exceptions.RayError:  # the next call may find the cluster again
        return
    for node_id in known.keys() - alive:
        del known[node_id]
    if wanted is not None:
        for node_id in known.keys() - set(wanted):
            ray.kill(known.pop(node_id))
        alive &= set(wanted)
    for node_id in alive - known.keys():
        there = NodeAffinitySchedulingStrategy(node_id, soft=False)
        watcher = ray.remote(_Watcher).options(num_cpus=0, max_restarts=-1, scheduling_strategy=there)
        known[node_id] = watcher.remote(os.environ.get("RAYCHAT_METADATA_URL", ""))


def main(argv: Sequence[str]) -> int:
    """Watch until SIGTERM; 0 when what had to be drained was."""
    parser = argparse.ArgumentParser(
        prog="python -m raychat.on_ray.node_watcher",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--address", default=os.environ.get("RAY_ADDRESS"), help="host:port of the head; default: RAY_ADDRESS"
    )
    parser.add_argument("--node-id", default="", help="Ray's id of the node; default: every node of this machine")
    parser.add_argument("--poll-s", type=float, default=POLL_S, help="seconds between two looks; default: %(default)s")
    parser.add_argument(
        "--grace-s", type=float, default=GRACE_S, help="seconds from SIGTERM to the end; default: %(default)s"
    )
    args = parser.parse_args(argv)
    if not args.address:
        raise ConfigError(
            "There is no address of the cluster: give --address HOST:PORT, as `ray start --head` prints it."
        )
    logging.basicConfig(level=logging.INFO, format="%(asctime)s node_watcher: %(message)s")
    # Before any thread starts, so that SIGTERM waits for `sigtimedwait` and never interrupts a drain.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    watch = Watch(args.address, node_id=args.node_id, poll_s=args.poll_s)
    _check(watch, args.address)
    thread = threading.Thread(target=watch.run, daemon=True, name="node-watcher")
    thread.start()
    while not signal.sigtimedwait({signal.SIGTERM}, 1.0):
        pass  # also after a drain: a watcher that ends would only be started anew
    watch.shut_down(args.grace_s)
    thread.join()
    return 0 if watch.drained else 1


def _check(watch: Watch, address: str) -> None:
    """Say now what would make a drain fail later. Only what no time mends is refused."""
    try:
        nodes = watch.nodes()
    except ray.exceptions.AuthenticationError as error:
        raise ConfigError(
            f"The Ray cluster at {address!r} asks for a token: export RAY_AUTH_MODE=token and RAY_AUTH_TOKEN."
        ) from error
    except UNREACHABLE as error:
        logger.warning("the cluster does not answer yet: %s", error)
        return
    if nodes:
        logger.info("watching over %s", ", ".join(nodes))
    else:
        logger.warning("no node of the cluster at %s is on this machine yet", address)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        cli.run_job(main)
