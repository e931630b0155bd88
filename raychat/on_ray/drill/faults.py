"""The faults: how each is done to a run, and how long it takes until the run has noticed and goes on."""

import contextlib
import random
import time
from dataclasses import dataclass
from pathlib import Path

from raychat.on_ray.drill.disk import Ballast, FileLimit
from raychat.on_ray.drill.schedule import AWAY_S, HANG_S, NOTICE_S, Fault
from raychat.on_ray.drill.site import Site
from raychat.on_ray.drill.tracking import TrackingServer
from raychat.on_ray.drill.watch import LostRunError, Rank, Run
from raychat.training import checkpoint

PATIENCE_S = 300.0  # after which a run that does not go on is lost


@dataclass
class Injected:
    """What a fault did. All times in Unix seconds."""

    fault: Fault
    at: float
    """when it struck; a notice strikes when it is given, and damage when the driver is started that must read it"""
    since: float
    """from when the way back counts: of a notice its deadline, of a full disk its end"""
    detected: float | None = None
    resumed: float | None = None
    """first step of the next attempt; of a full disk, the first save that succeeded"""
    note: str = ""
    problem: str = ""


class Faults:
    """Does faults to `run` on `site`, whose run directory lies on the small disk `disk` if there is one."""

    def __init__(self, run: Run, site: Site, *, workers: int, server: TrackingServer | None, disk: Path | None) -> None:
        self.run, self.site, self.workers, self.server, self.disk = run, site, workers, server, disk
        self._kinds = {
            "worker-kill": self._worker_kill,
            "node-drain": self._node_drain,
            "node-kill": self._node_kill,
            "driver-kill": self._driver_kill,
            "bit-flip": self._damage,
            "torn-save": self._damage,
            "disk-full": self._disk_full,
            "tracking-hang": self._tracking_hang,
        }

    def strike(self, fault: Fault) -> Injected | None:
        """Do it once the run is ready for it and wait until the run has recovered; None when it ended before.

        Raises:
            LostRunError: the run did not come back.
        """
        what = f"step {fault.step} with all workers, for {fault.kind}"
        if not self.run.wait_for(lambda: self._ready(fault), what, PATIENCE_S, may_end=True):
            return None
        return self._kinds[fault.kind](fault)

    def _ready(self, fault: Fault) -> bool:
        """Whether the run is at the fault's step, whole, and has saved since it last started."""
        journal = self.run.journal
        starts = journal.events("start")
        if not starts or journal.steps < fault.step or starts[-1]["world_size"] != self.workers:
            return False
        began = starts[-1]["time"]
        saved = [event for event in journal.events("checkpoint", began) if event["step"] > starts[-1]["resume_step"]]
        whole = len(self.run.ranks()) == self.workers and bool(journal.events("first_step", began))
        return whole and bool(saved) and len(checkpoint.steps(self._checkpoints)) >= 2

    @property
    def _checkpoints(self) -> Path:
        return self.run.run_dir / "checkpoints"

    def _victim(self, fault: Fault) -> Rank:
        ranks = self.run.ranks()
        return ranks[fault.salt % len(ranks)]

    def _worker_kill(self, fault: Fault) -> Injected:
        victim = self._victim(fault)
        at = time.time()
        self.site.kill_process(victim.node_id, victim.pid)
        return self._back(Injected(fault, at, at, note=f"rank {victim.rank}"))

    def _driver_kill(self, fault: Fault) -> Injected:
        at = time.time()
        self.run.kill()
        self.run.start()
        return self._back(Injected(fault, at, at))

    def _damage(self, fault: Fault) -> Injected:
        """Damage the newest checkpoint while nobody writes another one, and start the driver that must read it."""
        ranks = self.run.ranks()
        self.run.kill()
        deadline = time.monotonic() + PATIENCE_S
        while any(self.site.is_running(rank.node_id, rank.pid) for rank in ranks):
            if time.monotonic() > deadline:
                raise LostRunError(f"workers outlived their driver by {PATIENCE_S:g}s")
            time.sleep(0.1)
        step = checkpoint.steps(self._checkpoints)[0]
        folder = self._checkpoints / checkpoint.folder_name(step)
        damage = flip_bit if fault.kind == "bit-flip" else tear
        note = f"step {step}: {damage(folder, random.Random(fault.salt))}"
        at = self.run.start()
        injected = self._back(Injected(fault, at, at, note=note))
        injected.detected = self.run.said_after(at, folder.name)
        if injected.detected is None:
            injected.problem = f"nothing was said about the damaged checkpoint of step {step}"
        if self.run.journal.events("start", at)[0]["resume_step"] >= step:
            injected.problem = f"the damaged checkpoint of step {step} was used"
        return injected

    def _node_kill(self, fault: Fault) -> Injected:
        victim = self._victim(fault)
        at = time.time()
        self.site.kill_node(victim.node_id)
        injected = self._back(Injected(fault, at, at, note=f"node of rank {victim.rank}"))
        self._whole_again(injected)
        return injected

    def _node_drain(self, fault: Fault) -> Injected:
        victim = self._victim(fault)
        at = time.time()
        self.site.drain(victim.node_id, NOTICE_S)
        injected = Injected(fault, at, at + NOTICE_S, note=f"node of rank {victim.rank}")
        self.run.wait_for(lambda: time.time() >= injected.since, "the end of the notice", NOTICE_S + 5)
        if self.site.ends_nodes:
            self.site.kill_node(victim.node_id)
        self._back(injected)
        saves = [event for event in self.run.journal.events("checkpoint", at) if event.get("synchronous")]
        in_time = [event["time"] for event in saves if event["time"] <= injected.since]
        injected.note += f", saved {in_time[0] - at:.1f}s after the notice" if in_time else ", no save for the notice"
        self._whole_again(injected)
        return injected

    def _whole_again(self, injected: Injected) -> None:
        """Bring another node some time after the run has gone on without one, and wait for it to grow back."""
        if not self.site.ends_nodes:
            return
        time.sleep(AWAY_S)
        came = time.time()
        self.site.replace()
        journal = self.run.journal

        def grown() -> float | None:
            starts = [event for event in journal.events("start", injected.at) if event["world_size"] == self.workers]
            first = journal.events("first_step", starts[0]["time"]) if starts else []
            return first[0]["time"] if first else None

        back = self.run.wait_for(grown, f"{self.workers} workers again", PATIENCE_S, may_end=True)
        if back is None:
            injected.problem = f"the run ended before it had {self.workers} workers again"
            return
        injected.note += f", {self.workers} workers again {max(0.0, back - came):.1f}s after another node came"

    def _disk_full(self, fault: Fault) -> Injected:
        journal = self.run.journal
        full = Ballast(self.disk) if self.disk else FileLimit([rank.pid for rank in self.run.ranks()])
        at = time.time()

        def failed() -> float | None:
            full.fill()
            events = journal.events("save_failed", at)
            return events[0]["time"] if events else None

        try:
            detected = self.run.wait_for(failed, "a save that fails on a full disk", PATIENCE_S)
        finally:
            full.lift()
        lifted = time.time()
        injected = Injected(fault, at, lifted, detected, note="small disk" if self.disk else "file size limit")
        saved = self.run.wait_for(lambda: journal.events("checkpoint", lifted), "a save after that", PATIENCE_S)
        injected.resumed = saved[0]["time"]
        if journal.events("start", at):
            injected.problem = "training was interrupted by a save that failed"
        return injected

    def _tracking_hang(self, fault: Fault) -> Injected:
        if self.server is None:
            raise RuntimeError("no tracking server was started")
        at = time.time()
        self.server.freeze()
        try:
            self.run.wait_for(lambda: time.time() >= at + HANG_S, "the end of the hang", HANG_S + 5, may_end=True)
        finally:
            self.server.thaw()
        injected = Injected(fault, at, at, self.run.said_after(at, "MLflow"))
        if self.run.journal.events("start", at):
            injected.problem = "training was interrupted by the tracking server"
        return injected

    def _back(self, injected: Injected) -> Injected:
        """Wait for the first step of the next attempt."""
        journal, at = self.run.journal, injected.at
        what = f"the first step after {injected.fault.kind}"
        injected.resumed = self.run.wait_for(lambda: journal.first_step_after(at), what, PATIENCE_S)
        signs = [*journal.events("notice", at), *journal.events("failure", at), *journal.events("start", at)]
        injected.detected = min(event["time"] for event in signs)
        return injected


def flip_bit(folder: Path, rng: random.Random) -> str:
    """Flip one bit of one tensor file of a checkpoint; which, in words."""
    file = rng.choice(sorted(folder.glob("*.safetensors")))
    place = rng.randrange(file.stat().st_size)
    with file.open("r+b") as content:
        content.seek(place)
        byte = content.read(1)[0]
        content.seek(place)
        content.write(bytes([byte ^ 1 << rng.randrange(8)]))
    return f"bit flipped in {file.name}"


def tear(folder: Path, rng: random.Random) -> str:
    """Cut one tensor file of a checkpoint short, or take it away; which, in words."""
    file = rng.choice(sorted(folder.glob("*.safetensors")))
    if rng.random() < 0.5:
        with contextlib.closing(file.open("r+b")) as content:
            content.truncate(file.stat().st_size // 2)
        return f"{file.name} cut in half"
    file.unlink()
    return f"{file.name} taken away"
