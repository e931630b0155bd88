"""Break a small training run in every way there is, and see that nothing is lost.

  python jobs/drill.py --faults worker-kill,bit-flip --rounds 3 --seed 1
  python jobs/drill.py --address 10.0.0.1:6379 --work-dir /shared/drill     on a cluster of yours

A training run is made without disturbance, and again under faults that strike by a seeded schedule; the end must be the
same, bit for bit. Faults that change the number of workers (node-drain, node-kill) strike a run of their own, which must
take the same rows in every step and end within 1e-3 of the validation loss. Exit code: 0 when nothing was lost and all is
equal, 1 when not, 2 for what cannot be done.
"""

import argparse
import signal
import sys
from pathlib import Path

# A checkout where only the dependencies are installed is enough.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from raychat import cli
from raychat.on_ray.drill.schedule import KINDS


def main(args: list[str]) -> int:
    """Parse, and do the drill."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", default="", help=f"some of {','.join(KINDS)}; default: all that the cluster allows")
    parser.add_argument("--rounds", type=int, default=1, help="how often each fault strikes; default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of the schedule; default: %(default)s")
    parser.add_argument("--step-s", type=float, default=0.2, help="seconds of a step, about; default: %(default)s")
    parser.add_argument("--address", default="", help="a Ray cluster of yours; default: a new one on this machine")
    parser.add_argument("--allow-node-kill", action="store_true", help="node-kill may end nodes of that cluster")
    parser.add_argument("--corpus", default="embedded", help="text to train on; default: %(default)s")
    parser.add_argument(
        "--work-dir", type=Path, help="folder that keeps all runs; default: one that goes when all is well"
    )
    parser.add_argument("--out", type=Path, help="file for the table: .csv, else markdown")
    given = vars(parser.parse_args(args))
    faults = tuple(filter(None, given.pop("faults").split(",")))
    from raychat.on_ray.drill import drill  # after the parser: ray and torch take seconds to load

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what was started and mounted is not left behind
    return drill.run(drill.Settings(faults=faults, **given), echo=lambda text: print(text, flush=True))


if __name__ == "__main__":
    cli.run_job(main)
