"""What a budget buys, and plans side by side. Nothing is trained; takes a second.

  python jobs/plan.py --gpu a100-40gb --budget-usd 5                      depth, batch and horizon for the money
  python jobs/plan.py --gpu rtx-4070 --max-hours 8 --depth 12             the same for a time; what is given, stays
  python jobs/plan.py --depths 8,10,12 --machines p4d.24xlarge,p5.4xlarge one row each
  python jobs/plan.py --depth 24 --gpu h100 --gpus 1,8,64,512             what more GPUs bring, and up to where
  python jobs/plan.py --list-prices                                       machine types and what an hour costs
  python jobs/plan.py --calibrate                                         fit the forecasts to finished runs

All other flags are those of jobs/pretrain.py, whose --dry-run prints one plan in full.
"""

import argparse
import contextlib
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

# A checkout where only the dependencies are installed is enough.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from raychat import cli
from raychat.atomic import write_json, write_text
from raychat.checks import require
from raychat.config import Config
from raychat.errors import ConfigError
from raychat.planning import comparison, many_gpus, proposal, recommendation
from raychat.planning.prices import load_prices
from raychat.planning.target import resolve_target
from raychat.uris import public_uri


def main(args: Sequence[str]) -> int:
    """Parse, and propose, compare or calibrate."""
    args = list(map(with_dashes, args))
    own, rest = parser().parse_known_args(args)
    several = [whole(text, "--gpus") for text in listed(own.gpus)]
    if len(several) == 1:
        rest += ["--num-workers", str(several[0])]
    if own.max_hours is not None:
        rest += ["--max-hours", str(own.max_hours)]
    config = cli.parse(rest, prog="python jobs/plan.py", description=__doc__ or "")
    if own.calibrate:
        return calibrate(config)
    if own.list_prices:
        print(comparison.format_prices(load_prices(config.plan.prices)))
        return 0
    if len(several) > 1:
        return scale(config, own, several, flags(rest))
    beside = own.depths or own.machines or own.gpus_list
    limits = [own.budget_usd, own.max_hours, config.money.budget_usd, config.money.max_hours]
    if not beside and any(limit not in (None, -1) for limit in limits):
        return propose(config, own, args, flags(rest))
    return compare(config, own, flags(rest))


def parser() -> argparse.ArgumentParser:
    """The flags that are not those of a run."""
    made = argparse.ArgumentParser(
        prog="python jobs/plan.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    budget = made.add_argument_group("what a budget buys")
    budget.add_argument("--budget-usd", type=float, help="dollars; needs a known price, or --price-per-hour")
    budget.add_argument("--max-hours", type=float, help="hours of wall time, instead or besides")
    budget.add_argument(
        "--gpus", default="", help="GPUs: the same as --num-workers; several, as 1,8,64,512, are planned side by side"
    )
    budget.add_argument("--write-preset", type=Path, metavar="FILE", help="keep the proposal as a preset, a .toml file")
    beside = made.add_argument_group("plans side by side")
    beside.add_argument("--depths", default="", help="as 8,10,12; default: --depth")
    beside.add_argument("--machines", default="", help="machine types of the price table, as p4d.24xlarge,p5.4xlarge")
    beside.add_argument("--gpus-list", default="", help="GPUs with how many, as a100-40gb,8xh100")
    beside.add_argument("--output", type=Path, metavar="DIR", help="folder for plans.csv and plans.json")
    made.add_argument("--list-prices", action="store_true", help="the price table, with --prices FILE over it")
    made.add_argument("--calibrate", action="store_true", help="fit the forecasts to the finished runs of --base-dir")
    return made


def propose(config: Config, own: argparse.Namespace, args: Sequence[str], given: set[str]) -> int:
    """Print what the budget buys best, and keep it as a preset where that is asked for."""
    require_toml(own.write_preset)
    target, pins = resolve_target(config), given | of_presets(config)
    hours, budget = proposal.hours_of(
        config,
        target,
        budget_usd=known(own.budget_usd, config.money.budget_usd),
        max_hours=known(own.max_hours, config.money.max_hours),
    )
    found = proposal.propose(config, target=target, hours=hours, pins=pins)
    print(recommendation.format_proposal(found, budget))
    command = recommendation.training_command(found, sorted(given))
    print(f"\nto train it  {command}\nthe plan     {command} --dry-run")
    if own.write_preset:
        mine = shlex.join(["python", "jobs/plan.py", *map(public, without(args, "--write-preset", "--base-dir"))])
        with writing("--write-preset", own.write_preset):
            write_text(own.write_preset, recommendation.preset_text(found, mine, budget, sorted(pins)))
        print(f"written to {own.write_preset}")
    return 0


def compare(config: Config, own: argparse.Namespace, given: set[str]) -> int:
    """Print the plans side by side, and keep them where that is asked for."""
    machines: list[dict[str, Any]] = [{"machine": name, "gpu": ""} for name in listed(own.machines)]
    machines += [gpus(text) for text in listed(own.gpus_list)]
    depths = [whole(text, "--depths") for text in listed(own.depths)] or [config.model.depth]
    rows = comparison.compare(
        config, depths, machines or [{}], keep_batch="device_batch_size" in given | of_presets(config)
    )
    print(comparison.format_rows(rows))
    keep_rows(own, rows)
    return 0


def keep_rows(own: argparse.Namespace, rows: Sequence[comparison.Row]) -> None:
    """Write `rows` to the folder of --output, where there is one."""
    if not own.output:
        return
    with writing("--output", own.output):
        own.output.mkdir(parents=True, exist_ok=True)
        write_text(own.output / "plans.csv", comparison.as_csv(rows))
        write_json(own.output / "plans.json", [comparison.facts(row) | {"plan": row.plan} for row in rows])
    print(f"written to {own.output / 'plans.csv'} and {own.output / 'plans.json'}")


def scale(config: Config, own: argparse.Namespace, several: Sequence[int], given: set[str]) -> int:
    """Print the plans for several numbers of GPUs, and keep them where that is asked for."""
    target = resolve_target(config)
    other = own.depths or own.machines or own.gpus_list or own.budget_usd or own.max_hours
    require(not other, "--gpus with several numbers goes with one depth and one kind of GPU, and without a budget.")
    require(target.device == "cuda", f"--gpus {own.gpus}: name the kind of GPU as well, as --gpu h100.")
    settings = [{"num_workers": number} for number in several]
    keep = "device_batch_size" in given | of_presets(config)
    rows = comparison.compare(config, [config.model.depth], settings, keep_batch=keep)
    print(many_gpus.format_gpus(config, rows))
    keep_rows(own, rows)
    return 0


def calibrate(config: Config) -> int:
    """Fit the forecasts of this base directory to its finished runs."""
    from raychat.planning.calibration import calibrate_runs

    calibrate_runs(config.base_dir, config.runs_dir, echo=print)
    return 0


def require_toml(path: Path | None) -> None:
    """Refuse a preset that `--preset` would not take for a file."""
    if path is not None and path.suffix != ".toml":
        raise ConfigError(f"--write-preset {path}: the name of a preset file ends in .toml, for example {path}.toml.")


@contextlib.contextmanager
def writing(flag: str, path: Path) -> Iterator[None]:
    """Writes a place that a flag named. Raises ConfigError where that cannot be."""
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"{flag} {path} cannot be written ({error.strerror or error}): name another place."
        ) from error


def with_dashes(arg: str) -> str:
    """A flag as it is declared, of one that may be written with underscores."""
    name, equals, value = arg.partition("=")
    return name.replace("_", "-") + equals + value if name.startswith("--") else arg


def public(arg: str) -> str:
    """An argument without credentials."""
    name, equals, value = arg.partition("=") if arg.startswith("--") else ("", "", arg)
    return name + equals + public_uri(value)


def known(flag: float | None, setting: float) -> float | None:
    """A limit as a flag of this job gives it, else as a preset does."""
    return flag if flag is not None else setting if setting > 0 else None


def flags(args: Sequence[str]) -> set[str]:
    """Settings that `args` give, by name."""
    return {arg.partition("=")[0][2:].replace("-", "_") for arg in args if arg.startswith("--")}


def of_presets(config: Config) -> set[str]:
    """Settings that the presets of `config` give."""
    if not config.run.preset:
        return set()
    values, defaults = cli.load_presets(config.run.preset).flat(), Config().flat()
    return {name for name in values if values[name] != defaults[name]}


def without(args: Sequence[str], *names: str) -> list[str]:
    """`args` less these flags and their values."""
    kept, skip = [], False
    for arg in args:
        if not skip and arg.partition("=")[0] not in names:
            kept.append(arg)
        skip = not skip and arg in names
    return kept


def listed(text: str) -> list[str]:
    """The parts of a list with commas."""
    return [part.strip() for part in text.split(",") if part.strip()]


def gpus(text: str) -> dict[str, Any]:
    """Settings for `8xh100` or `h100`."""
    number, by, name = text.partition("x")
    if by and number.isdigit():
        if int(number) < 1:
            raise ConfigError(f"--gpus-list {text!r} asks for no GPU: give a list as a100-40gb,8xh100.")
        return {"machine": "", "gpu": name, "num_workers": int(number)}
    return {"machine": "", "gpu": text}


def whole(text: str, flag: str) -> int:
    """A number of a list. Raises ConfigError when it is none above 0."""
    if not text.isdigit() or int(text) < 1:
        raise ConfigError(f"{flag} {text!r} is no whole number above 0: give a list as 8,10,12.")
    return int(text)


if __name__ == "__main__":
    cli.run_job(main)
