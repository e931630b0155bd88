"""The same training without Ray: `python -m raychat.training [flags]`, or under torchrun with as many ranks as it starts.

Rank 0 prepares the data and keeps the run directory. The record is the journal; `jobs/runs.py --sync` sends it to MLflow.
"""

import contextlib
import dataclasses
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import Literal

from raychat import cli
from raychat.config import Config
from raychat.data.prepare import TokenData, make_in_process, prepare
from raychat.errors import RaychatError
from raychat.planning import format_plan, make_plan
from raychat.planning.money import priced
from raychat.tracking.shipping_state import MLFLOW_STATUS, End, ShippingState
from raychat.tracking.tracking_uri import default_tracking_uri, store_error
from raychat.training import device
from raychat.training.build import train
from raychat.training.events import Event
from raychat.training.job import Job
from raychat.training.lease import LeaseLostError
from raychat.training.reading import read_here
from raychat.training.rehearsal import Rehearsal, steps_only
from raychat.training.session import Session
from raychat.training.state import Signal
from raychat.training.world import World
from raychat.uris import public_uri


def main(args: list[str]) -> int:
    """Run one training on this process, or on this rank of torchrun's."""
    config = priced(cli.parse(args, prog="python -m raychat.training", description=__doc__ or ""))
    if config.run.dry_run:
        sys.stdout.write(format_plan(make_plan(config)) + "\n")
        return 0
    world = World.from_environment()
    kind = device.device_type(config.precision.device_type)
    rehearsing = config.run.dry_run_steps > 0
    # Refuse before anything is prepared.
    asked = steps_only(config) if rehearsing else config
    device.refuse_gpu_sized(asked, device.resolve(config, local_world_size=world.local_world_size))
    with world.process_group(kind):
        return (_rehearse if rehearsing else _run)(config, world, with_gpus=kind == "cuda")


def _rehearse(config: Config, world: World, *, with_gpus: bool) -> int:
    """A short run beside the run, and the plan with what it measured: rank 0's to stage and to read."""
    if world.rank != 0:
        return _run(config, world, with_gpus=with_gpus)
    with Rehearsal(config, on_ray=False, echo=_echo) as trial:
        _run(config, world, with_gpus=with_gpus, stage=trial.stage, echo=trial.tell)
        trial.conclude()
    return 0


def _run(
    config: Config,
    world: World,
    *,
    with_gpus: bool,
    stage: Callable[[TokenData], Config] | None = None,
    echo: Callable[[str], None] | None = None,
) -> int:
    """Prepare the data of `config` and train it, or what `stage` makes of it then."""
    session, problem, job, echo = None, None, None, echo or _echo
    if world.rank == 0:
        try:
            data = prepare(config, with_gpus=with_gpus, maker=make_in_process, echo=echo)
            session = Session(stage(data) if stage else config, data, echo=echo)
            nodes = -(-world.world_size // world.local_world_size)
            job = None if session.done else session.begin_attempt(world_size=world.world_size, nodes=nodes)
            if job:
                _leave_for_mlflow(session)
        except RaychatError as error:
            problem = error
    problem, job = world.broadcast((problem, job))
    if problem:
        raise problem
    if job is None:
        if session:
            session.abort()
            echo(session.done_line())
        return 0
    status: Literal["finished", "failed", "stopped"] = "failed"
    wrong = None
    try:
        status = "finished" if _train(job, world, session) else "stopped"
    except BaseException as failure:
        wrong = str(failure) or type(failure).__name__
        raise
    finally:
        if session:
            summary = session.close(
                status, error=wrong, finish_tracking=lambda summary: _leave_end_for_mlflow(session, summary.status)
            )
            for line in session.closing_lines(summary):
                echo(line)
    return 0


def _train(job: Job, world: World, session: Session | None) -> bool:
    """Train on this rank; whether the horizon was reached. Rank 0 has the session.

    Raises:
        LeaseLostError: the run may be another driver's by now; what was trained since is saved unless it is.
    """
    sink = session.receive if session else _ignore
    with _stop_on_signals() as asked:
        poll = (lambda: Signal.STOP if session.lease.lost else asked()) if session else asked
        finished = train(job, world=world, batches=read_here, sink=sink, poll=poll)
    if session and session.lease.lost:
        raise LeaseLostError(str(session.lease.why_lost))
    return finished


def _leave_for_mlflow(session: Session) -> None:
    """Write down what MLflow needs, so that `jobs/runs.py --sync` can send the journal; nothing here talks to MLflow."""
    config = session.config
    if config.run.run == "dummy":
        return
    uri = config.run.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or default_tracking_uri(config.base_dir)
    if problem := store_error(uri):
        raise problem
    before = ShippingState.load(session.run_dir)
    if before is None:
        facts = session.tracking_facts() | {"tags": {"raychat.run_dir": str(session.run_dir)}}
        ShippingState(uri=public_uri(uri), experiment=config.run.experiment, **facts).save(session.run_dir)


def _leave_end_for_mlflow(session: Session, status: str) -> None:
    """Write down how the run ended, for `jobs/runs.py --sync`."""
    if state := ShippingState.load(session.run_dir):
        artifacts = [str(path) for path in session.artifacts()]
        end = End(status=MLFLOW_STATUS[status], time_ms=round(time.time() * 1000), artifacts=artifacts)
        dataclasses.replace(state, end=end).save(session.run_dir)


@contextlib.contextmanager
def _stop_on_signals() -> Iterator[Callable[[], Signal]]:
    """A poll that asks to save and stop after SIGTERM or Ctrl-C. A second Ctrl-C ends at once."""
    asked = []

    def remember(number: int, _: object) -> None:
        asked.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    old = {number: signal.signal(number, remember) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: Signal.STOP if asked else Signal.NONE
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def _echo(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _ignore(event: Event) -> None:
    """Ranks other than 0 have nobody to tell."""


if __name__ == "__main__":
    cli.run_job(main)
