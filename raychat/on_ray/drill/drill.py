"""The drill from its first run to its verdict."""

import contextlib
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from raychat.errors import ConfigError
from raychat.on_ray.drill import measure, report
from raychat.on_ray.drill.disk import small_disk
from raychat.on_ray.drill.faults import PATIENCE_S, Faults, Injected
from raychat.on_ray.drill.schedule import KINDS, ON_OTHERS, Schedule, schedules
from raychat.on_ray.drill.site import Site, open_site
from raychat.on_ray.drill.tracking import TrackingServer, missing_points
from raychat.on_ray.drill.watch import LostRunError, Run
from raychat.progress import Progress, format_duration
from raychat.tracking.journal import read_journal
from raychat.tracking.summary import Summary

Echo = Callable[[str], None]
PRETRAIN = Path(__file__).resolve().parents[3] / "jobs" / "pretrain.py"
WORKERS = 2
SAVE_EVERY = 10
ROWS, CONTEXT = 16, 128  # of a step; a row has one token more
UNWANTED = ("RAY_ADDRESS", "MLFLOW_TRACKING_URI", "RAYCHAT_BASE_DIR", "RAYCHAT_STORAGE_PATH")
START_S = 900.0  # the first run prepares the data
TRAINING: dict[str, Any] = {
    "depth": 4,
    "aspect_ratio": 32,
    "head_dim": 32,
    "max_seq_len": CONTEXT,
    "vocab_size": 512,
    "window_pattern": "L",
    "device_batch_size": ROWS // WORKERS,
    "total_batch_size": ROWS * CONTEXT,
    "eval_every": 50,
    "eval_tokens": 16 * 1024,
    "core_metric_every": -1,
    "sample_every": -1,
    "save_every": SAVE_EVERY,
    "keep_checkpoints": 3,
    "device_type": "cpu",
    "dtype": "float32",
    "packing": "keep",
    "num_workers": WORKERS,
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a drill is told. Empty `faults`: all that the cluster allows."""

    faults: tuple[str, ...] = ()
    rounds: int = 1
    seed: int = 0
    step_s: float = 0.2
    address: str = ""
    allow_node_kill: bool = False
    corpus: str = "embedded"
    work_dir: Path | None = None
    out: Path | None = None

    def __post_init__(self) -> None:
        if not self.address:
            return
        if "node-kill" in self.faults and not self.allow_node_kill:
            raise ConfigError(
                f"--faults node-kill would end a node of the cluster at {self.address} with all that runs on it: give "
                "--allow-node-kill if it may, or leave --address out for a cluster of its own on this machine."
            )
        if "disk-full" in self.faults:
            raise ConfigError(
                f"--faults disk-full on the cluster at {self.address} would fill a disk that others use: leave it out, or "
                "leave --address out for a cluster of its own on this machine."
            )
        if self.work_dir is None:
            raise ConfigError(f"--address {self.address} needs --work-dir, a folder that all its nodes share.")

    @property
    def kinds(self) -> tuple[str, ...]:
        """The faults to do."""
        allowed = (*ON_OTHERS, *(("node-kill",) if self.allow_node_kill else ())) if self.address else KINDS
        return self.faults or allowed


@dataclass
class Verdict:
    """What was found: a line for each fault, what is to be known besides, and everything that was not as promised."""

    rows: list[measure.Row] = field(default_factory=list)
    facts: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def run(settings: Settings, *, echo: Echo) -> int:
    """Do the drill: 0 when nothing was lost and all is equal, else 1."""
    planned = schedules(
        settings.kinds, rounds=settings.rounds, seed=settings.seed, step_s=settings.step_s, save_every=SAVE_EVERY
    )
    folder = (settings.work_dir or Path(tempfile.mkdtemp(prefix="raychat-drill-"))).absolute()
    with _open(settings, folder, planned, echo) as drill:
        verdict = drill.carry_out()
    echo("")
    echo(report.table(verdict.rows))
    for line in [*verdict.facts, *(f"NOT AS PROMISED: {problem}" for problem in verdict.problems)]:
        echo(line)
    if settings.out:
        report.write(settings.out, verdict.rows, [*verdict.facts, *verdict.problems])
        echo(f"written to {settings.out}")
    if settings.work_dir or verdict.problems:
        echo(f"what the drivers said, and what they left, is in {folder}")
    else:
        shutil.rmtree(folder, ignore_errors=True)
    return 1 if verdict.problems else 0


@contextlib.contextmanager
def _open(settings: Settings, folder: Path, planned: list[Schedule], echo: Echo) -> Iterator["Drill"]:
    with contextlib.ExitStack() as stack:
        server = None
        if "tracking-hang" in settings.kinds:
            server = TrackingServer(folder / "mlflow")
            stack.callback(server.close)
        disk = None
        if "disk-full" in settings.kinds and stack.enter_context(small_disk(folder / "disk")):
            disk = folder / "disk"
        site = stack.enter_context(open_site(settings.address, WORKERS))
        if server:
            server.wait()
        yield Drill(settings, folder, planned, site, server, disk, echo)


class Drill:
    """The runs of a drill: the undisturbed one, and one for each schedule."""

    def __init__(
        self,
        settings: Settings,
        folder: Path,
        planned: list[Schedule],
        site: Site,
        server: TrackingServer | None,
        disk: Path | None,
        echo: Echo,
    ) -> None:
        self.settings, self.folder, self.planned, self.site, self.server = settings, folder, planned, site, server
        self.disk, self.echo = disk, echo
        self.steps = max(schedule.steps for schedule in planned)
        self.verdict = Verdict()
        self.tag = f"{time.strftime('%m%d-%H%M%S')}-seed{settings.seed}"

    def carry_out(self) -> Verdict:
        """Make all runs and compare them."""
        total = self.steps * (1 + len(self.planned))
        count = sum(len(schedule.faults) for schedule in self.planned)
        self.echo(f"drill: {count} faults, seed {self.settings.seed}; runs of {self.steps} steps in {self.folder}")
        with Progress("drill", total, "steps", every_s=15, echo=self.echo) as progress:
            plain = self._run("plain", elastic=False)
            self._undisturbed(plain, progress)
            for schedule in self.planned:
                run = self._run(schedule.name, elastic=schedule.name == "elastic")
                self._disturbed(schedule, run, plain, progress)
        self.verdict.facts += report.medians(self.verdict.rows)
        return self.verdict

    def _undisturbed(self, run: Run, progress: Progress) -> None:
        began = run.start()
        with contextlib.closing(run), _counted(run, progress):
            first = run.wait_for(lambda: run.journal.first_step_after(began), "the first step", START_S)
            started = run.journal.events("start")[0]["time"]
            self._to_the_end(run)
        dts = [record["train/dt"] for record in run.journal.records if "train/dt" in record]
        self.verdict.facts.append(
            f"undisturbed: {self.steps} steps of {statistics.median(dts):.2f}s on {os.cpu_count()} cores, "
            f"{first - began:.1f}s from the command to the first step ({first - started:.1f}s of it after the data were there)"
        )

    def _disturbed(self, schedule: Schedule, run: Run, plain: Run, progress: Progress) -> None:
        disk = self.disk if schedule.name == "steady" else None
        faults = Faults(run, self.site, workers=WORKERS, server=self.server, disk=disk)
        done: list[Injected] = []
        run.start()
        try:
            with contextlib.closing(run), _counted(run, progress):
                for number, fault in enumerate(schedule.faults, start=1):
                    injected = faults.strike(fault)
                    if injected is None:
                        break
                    done.append(injected)
                    self._tell(f"{schedule.name} {number} of {len(schedule.faults)}", injected)
                self._to_the_end(run)
        except LostRunError as lost:
            self.verdict.problems.append(
                f"{schedule.name}: the run is LOST: {lost}; the driver's output is {run.output}"
            )
        self._compare(schedule, run, plain, done)
        if disk and run.journal.path.exists():  # the disk goes with the drill
            shutil.copy(run.journal.path, self.folder / f"{run.run_dir.name}.jsonl")

    def _tell(self, place: str, injected: Injected) -> None:
        back = "" if injected.resumed is None else f", back after {injected.resumed - injected.since:.1f}s"
        self.echo(f"{place}: {injected.fault.kind} ({injected.note}){back}")

    def _to_the_end(self, run: Run) -> None:
        """Wait until the driver has ended; a run whose journal stands still for long is lost."""
        while run.exit_code is None:
            count = len(run.journal.records)
            more = partial(self._more, run, count)
            run.wait_for(more, "the next step", PATIENCE_S, may_end=True)
        code = run.exit_code
        if code != 0:
            raise LostRunError(f"the driver ended with {code}: {run.last_words()}")

    @staticmethod
    def _more(run: Run, count: int) -> bool:
        return len(run.journal.records) > count

    def _compare(self, schedule: Schedule, run: Run, plain: Run, done: list[Injected]) -> None:
        records, expected = run.journal.look(), measure.losses(plain.journal.records)
        rows = measure.rows(schedule.name, done, records, expected)
        self.verdict.rows += rows
        problems = [f"{row.fault} at step {row.step}: {row.note or 'other losses'}" for row in rows if not row.equal]
        if missed := schedule.faults[len(done) :]:
            problems.append(
                f"{len(missed)} faults did not strike, as the run was over or lost before ({missed[0].kind} at step "
                f"{missed[0].step} the first): a smaller --step-s makes it longer"
            )
        if not any(problem.startswith(f"{schedule.name}: the run is LOST") for problem in self.verdict.problems):
            problems += self._compare_ends(schedule, run, plain, expected)
        self.verdict.problems += [f"{schedule.name}: {problem}" for problem in problems]

    def _compare_ends(self, schedule: Schedule, run: Run, plain: Run, expected: dict[int, float]) -> list[str]:
        exact = schedule.name == "steady"
        ours, theirs = (Summary.read(one.run_dir / "summary.json") for one in (run, plain))
        distance = measure.weights_distance(run.run_dir, plain.run_dir, self.steps)
        bpb = abs((ours.val_bpb or 0.0) - (theirs.val_bpb or 0.0))
        curve = measure.losses(read_journal(run.run_dir / "metrics.jsonl"))
        self.verdict.facts.append(
            f"{schedule.name}: {ours.status}, {len(schedule.faults)} faults, {ours.restarts} restarts, "
            f"{ours.replayed_steps} steps replayed, goodput {ours.goodput or 0:.0%}, {format_duration(ours.wall_time_s or 0)}; "
            f"largest difference of a weight {distance:.2g}, of val_bpb {bpb:.2g}"
        )
        found = [
            ("the run did not finish", ours.status != "finished"),
            ("the final weights differ", exact and distance > 0),
            (f"val_bpb differs by {bpb:.2g}", bpb > (0.0 if exact else measure.BPB_TOLERANCE)),
            ("steps are missing in the journal", sorted(curve) != sorted(expected)),
            ("the losses are not those of the same rows", not measure.alike(curve, expected, exact=exact)),
        ]
        problems = [problem for problem, is_so in found if is_so]
        problems += filter(None, [measure.rows_in_order(run.run_dir / "checkpoints", ROWS)])
        if self.server and exact:
            problems += filter(None, [missing_points(run.run_dir, self.server.uri)])
        return problems

    def _run(self, name: str, *, elastic: bool) -> Run:
        storage = (self.disk if self.disk and name == "steady" else self.folder) / "runs"
        tag = f"{name}-{self.tag}"
        flags = TRAINING | {
            "address": self.site.address,
            "base_dir": self.folder / "base",
            "storage_path": storage,
            "model_tag": tag,
            "corpus": self.settings.corpus,
            "num_iterations": self.steps,
            "min_workers": 1 if elastic else WORKERS,
        }
        flags |= {"tracking_uri": self.server.uri} if self.server and name == "steady" else {"run": "dummy"}
        command = [
            sys.executable,
            str(PRETRAIN),
            *(f"--{key.replace('_', '-')}={value}" for key, value in flags.items()),
        ]
        environment = {key: value for key, value in os.environ.items() if key not in UNWANTED}
        self.folder.mkdir(parents=True, exist_ok=True)
        return Run(command, environment, storage / tag, self.folder / f"{tag}.log")


@contextlib.contextmanager
def _counted(run: Run, progress: Progress) -> Iterator[None]:
    """Count the steps of a run as progress while the block runs."""
    counted = 0

    def more(steps: int) -> None:
        nonlocal counted
        progress.advance(steps - counted)
        counted = steps

    run.on_step = more
    yield
