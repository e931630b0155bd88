"""Search for the best model: many runs of jobs/pretrain.py on one cluster, within a budget, and a report to decide from.

  python jobs/search.py jobs/searches/cpu_baseline.toml                     what the file says
  python jobs/search.py --resume cpu_baseline                               go on after any death
  python jobs/search.py --resume mine -- --storage-path s3://key:secret@..  with credentials, which are not written down
  python jobs/search.py --name rates --space matrix_lr=0.01,0.02,0.04 -- --preset d4-cpu
  python jobs/search.py --iso-flops 1e12,3e12,1e13 --depths 2,3,4 -- --preset d4-cpu
  python jobs/search.py --lr-range -- --preset d4-cpu                       between which rates to search

Settings of a search file are options too and stand over the file's; docs/search.md explains them. What stands after --
goes into [base]: flags of jobs/pretrain.py. Ctrl-C and SIGTERM save all runs and stop; the same command, or --resume,
goes on. Exit code: 0 when the search is done or was stopped, 1 when none of its runs has a result, 2 for what cannot be.
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# A checkout where only the dependencies are installed is enough.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from raychat import cli
from raychat.checks import require
from raychat.config import Config
from raychat.planning import format_plan, make_plan
from raychat.tracking.run_table import default_base_dir

PRETRAIN = Path(__file__).with_name("pretrain.py")
PROG = "python jobs/search.py"


def main(argv: Sequence[str]) -> int:
    """Parse, and search or test a range of rates."""
    at = list(argv).index("--") if "--" in argv else len(argv)
    args = parser().parse_args(argv[:at])
    config = cli.parse(argv[at + 1 :], prog=f"{PROG} ... --", description=__doc__ or "")
    if args.lr_range:
        if args.base_dir is not None:
            config = Config.from_flat({"base_dir": str(args.base_dir)}, config)
        require(
            not (args.spec or args.space or args.resume or args.iso_flops or args.depths),
            "--lr-range is one run and no search: give its flags behind --, and leave out files, spaces and sweeps.",
        )
        return lr_range(config, steps=args.range_steps, least=args.range_least, most=args.range_most)
    spec = specification(args, base_flags(argv[at + 1 :], config))
    from raychat.on_ray import search

    return 0 if search.run(spec, script=PRETRAIN, echo=echo) else 1


def lr_range(config: Config, **ends: Any) -> int:
    """Test a range of rates, or show the plan of the test."""
    if config.run.dry_run:
        from raychat.search.range_run import range_config

        echo(format_plan(make_plan(range_config(config, **ends))))
        return 0
    from raychat.on_ray import range_test  # after the checks: ray and torch take seconds to load

    range_test.run(config, **ends, echo=echo)
    return 0


def parser() -> argparse.ArgumentParser:
    """The options before `--`."""
    made = argparse.ArgumentParser(
        prog=PROG, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    made.add_argument("spec", nargs="?", type=Path, metavar="SPEC.toml", help="file that describes the search")
    made.add_argument("--resume", metavar="NAME", help="go on with the search of this name")
    made.add_argument("--base-dir", type=Path, help="where everything is kept; default: as for a run")
    made.add_argument(
        "--space",
        action="append",
        default=[],
        metavar="NAME=VALUES",
        help="values of a flag, as depth=2,3,4; repeatable",
    )
    sweep = made.add_argument_group("scaling laws")
    sweep.add_argument("--iso-flops", metavar="C,C,...", help="budgets in FLOPs: each depth is trained for each")
    sweep.add_argument("--depths", metavar="D,D,...", help="with --iso-flops, or alone: one run each at the data ratio")
    rates = made.add_argument_group("range of rates")
    rates.add_argument("--lr-range", action="store_true", help="one short run with rising rates, and its picture")
    rates.add_argument("--range-steps", type=int, default=200, metavar="N", help="its steps; default: %(default)s")
    for end, multiple in (("least", 0.01), ("most", 10.0)):
        said = f"the rates at its {'begin' if end == 'least' else 'end'}, as a multiple of those given; default: %(default)g"
        rates.add_argument(f"--range-{end}", type=float, default=multiple, metavar="X", help=said)
    group = made.add_argument_group("settings of a search file")
    for name in settings():
        group.add_argument(f"--{name.replace('_', '-')}", dest=name, metavar="VALUE")
    return made


def settings() -> list[str]:
    """Settings of a search that are not tables."""
    from raychat.search.spec import SearchSpec

    return [field.name for field in dataclasses.fields(SearchSpec) if field.name not in ("base", "space")]


def specification(args: argparse.Namespace, base: dict[str, Any]) -> Any:
    """The search that the command line describes.

    Raises:
        ConfigError: it cannot be, or there is no search to resume.
    """
    from raychat.search.book import SPEC, read_book, search_dir
    from raychat.search.spec_file import literal, load_spec

    given: dict[str, Any] = {n: literal(v) for n in settings() if (v := getattr(args, n)) is not None}
    space = dict(_assignment(text) for text in args.space)
    if args.resume:
        require(
            not (args.spec or space or args.iso_flops or args.depths),
            "--resume NAME goes on with a search as it was begun: leave out its file and its space.",
        )
        folder = search_dir((args.base_dir or default_base_dir()).expanduser().absolute(), args.resume)
        read_book(folder)  # says which searches there are
        return load_spec(folder / SPEC, given | {"base": base})
    require(
        bool(args.spec or space or args.iso_flops or args.depths),
        "Nothing says what to search: give a file, as jobs/searches/cpu_baseline.toml, or --space NAME=VALUES.",
    )
    if args.base_dir is not None:
        base = {"base_dir": str(args.base_dir.expanduser().absolute())} | base
    if args.iso_flops or args.depths:
        given, space, base = sweep(args, given, space, base)
    return load_spec(args.spec, given | {"base": base, "space": space})


def sweep(
    args: argparse.Namespace, given: dict[str, Any], space: dict[str, Any], base: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Settings, space and base of a sweep for scaling laws: every run at its whole horizon, and nothing is promoted."""
    from raychat.search.spec_file import literal

    depths = _list(literal(args.depths or ""))
    require(bool(depths), "--iso-flops needs --depths, at least three for each budget: a parabola goes through them.")
    given = {"scheduler": "none", "noise_repeats": 0, "confirm_seeds": 0} | given
    space, base = {"depth": depths} | space, {"depth": depths[0]} | base
    if args.iso_flops:
        budgets = [float(value) for value in _list(literal(args.iso_flops))]
        space, base = {"target_flops": budgets} | space, {"target_flops": budgets[0]} | base
    return {"name": "iso-flops" if args.iso_flops else "miniseries"} | given, space, base


def base_flags(flags: Sequence[str], config: Config) -> dict[str, Any]:
    """The flags that were given, with the values that they have in `config`."""
    names = {flag.removeprefix("--").partition("=")[0].replace("-", "_") for flag in flags if flag.startswith("--")}
    names |= {name.removeprefix("no_") for name in names}
    return {name: value for name, value in config.flat().items() if name in names}


def _list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list) else [value] if value != "" else []


def _assignment(text: str) -> tuple[str, Any]:
    from raychat.search.spec_file import literal

    name, mark, values = text.partition("=")
    require(bool(mark and name), f"--space {text!r}: write a flag and its values, as --space depth=2,3,4.")
    value = literal(values)
    return name.strip().replace("-", "_"), value if isinstance(value, dict) else _list(value)


def echo(text: str) -> None:
    """Print a line at once."""
    print(text, flush=True)


if __name__ == "__main__":
    cli.run_job(main)
