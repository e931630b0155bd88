"""Submit a pretraining job to a Ray cluster, follow its log, and keep its run alive.

  python jobs/submit.py --address http://HEAD:8265 -- --depth 10 --storage-path s3://bucket/runs
  python jobs/submit.py --address http://HEAD:8265 --keep-alive -- --depth 10 --storage-path s3://bucket/runs
  python jobs/submit.py --address http://HEAD:8265 --stop JOB                 save, stop, and wait for it

What stands after -- goes to jobs/pretrain.py. --keep-alive submits the job again until its run has finished, was
stopped, is over its budget, or has crashed three times at one step; it works as long as this command runs. The working
directory is packed anew each time. On Kubernetes the `backoffLimit` of a RayJob does the same: submit nothing, apply one.
"""

import argparse
import logging
import math
import os
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

# A checkout where only the dependencies are installed is enough.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from raychat import cli
from raychat.checks import require
from raychat.uris import public_uri

ROOT = Path(__file__).resolve().parents[1]
INTERRUPTED = 130  # what a shell gives for Ctrl-C
PATIENCE_S = 60.0


def main(argv: Sequence[str]) -> int:
    """Submit or stop; the exit code is 0 when the run has finished or was stopped."""
    options, flags = _split(argv)
    args = _parser().parse_args(options)
    require(
        args.address.startswith(("http://", "https://")),
        f"--address {args.address!r} is no address of a job server: give http://HOST:8265, the dashboard of the head.",
    )
    require(args.stop_wait_s > 0, f"--stop-wait-s must be above 0, got {args.stop_wait_s}.")
    require(
        (Path(args.working_dir) / "jobs" / "pretrain.py").is_file(),
        f"--working-dir {args.working_dir} holds no jobs/pretrain.py: leave it out to upload this checkout.",
    )
    config = None if args.stop else cli.parse(flags, prog="python jobs/submit.py ... --", description=__doc__ or "")
    require(
        all(public_uri(value) == value for flag in flags for value in (flag, flag.partition("=")[2])),
        "A flag holds credentials, and Ray shows the command of a job in its log and on its dashboard: give them to the "
        "nodes of the cluster in their environment, for example AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY.",
    )
    again = config is not None and (config.run.fresh or config.run.resume_from_step >= 0)
    require(
        not (args.keep_alive and again),
        "--keep-alive with --fresh or --resume-from-step would go back at every submission, and lose what was trained "
        "since: submit the job once without --keep-alive, and follow it with --keep-alive --follow JOB without that flag.",
    )
    from raychat.on_ray import submission  # after the checks: ray takes seconds to load

    patience_s = math.inf if args.keep_alive else PATIENCE_S
    logging.getLogger("ray").setLevel(logging.WARNING)  # it names every file that it leaves out of an upload
    server = submission.JobServer(args.address, patience_s=patience_s, echo=_say, show=_show)
    if config is None:
        server.stop(args.stop)
        return 0
    entrypoint = shlex.join([args.python, "jobs/pretrain.py", *flags])
    followed = ""

    def submit() -> str:
        nonlocal followed
        followed = server.submit(entrypoint, working_dir=args.working_dir, stop_wait_s=args.stop_wait_s)
        return followed

    def leave(*_: object) -> NoReturn:
        """At once: no answer and no connection that this process may be waiting for is of use any more."""
        os.write(sys.stdout.fileno(), _farewell(args.address, followed or args.follow).encode())
        os._exit(INTERRUPTED)

    signal.signal(signal.SIGINT, leave)
    return submission.see_to_end(
        server, submit, job=args.follow, place=config.run_uri, keep_alive=args.keep_alive, echo=_say
    )


def _split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Options of this command, and the flags after `--`."""
    at = list(argv).index("--") if "--" in argv else len(argv)
    return list(argv[:at]), list(argv[at + 1 :])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python jobs/submit.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    address = os.environ.get("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:8265")
    parser.add_argument("--address", default=address, help="dashboard of the head; default: %(default)s")
    parser.add_argument("--keep-alive", action="store_true", help="submit it again until its run is done")
    parser.add_argument("--follow", default="", metavar="JOB", help="begin with this job, which was submitted before")
    parser.add_argument("--stop", default="", metavar="JOB", help="stop this job and wait until it has saved")
    parser.add_argument("--working-dir", default=str(ROOT), help="what is uploaded; default: this checkout")
    parser.add_argument("--python", default="python", help="Python on the cluster; default: %(default)s")
    parser.add_argument(
        "--stop-wait-s", type=int, default=120, help="seconds that a stopped job has for its save; default: %(default)s"
    )
    return parser


def _farewell(address: str, job: str) -> str:
    if not job:
        return "nothing was submitted\n"
    here = f"python jobs/submit.py --address {address}"
    return (
        f"\nno longer following {job}, which goes on\n"
        f"  stop it         {here} --stop {job}\n"
        f"  follow it again {here} --follow {job}, with the other options of this command\n"
    )


def _say(line: str) -> None:
    print(line, flush=True)


def _show(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


if __name__ == "__main__":
    cli.run_job(main)
