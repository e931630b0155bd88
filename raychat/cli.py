"""The command line: defaults < `--preset` < flags, parsed from the dataclasses of `raychat.config` by tyro."""

import errno
import io
import os
import sys
import tomllib
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any

from raychat.checks import did_you_mean
from raychat.config import Config
from raychat.errors import ConfigError, RaychatError
from raychat.uris import public_text

# What the machine refuses and the user can mend: a full or read-only disk, a quota, a permission.
MACHINE_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}
DRY_RUN_STEPS = 20  # of a --dry-run-steps without a number
WARMUPS = {"warmup_steps", "warmup_ratio"}
PRESETS = Path(__file__).parent / "presets"


def parse(args: Sequence[str], *, prog: str, description: str) -> Config:
    """The configuration that `args` describe. Exits with 2 on a flag that does not exist or parse.

    Raises:
        ConfigError: for a value that cannot be.
    """
    import tyro  # not at import: a Ray worker needs Config and not the parser

    args = _with_dry_run_steps(args)
    names = _flag_values(args, "--preset")
    _refuse_both_warmups(args)
    base = load_presets(names[-1]) if names else Config()
    cleared = other_warmup_cleared({flag for flag in WARMUPS if _flag_values(args, f"--{flag.replace('_', '-')}")})
    base = Config.from_flat(cleared, base)
    if (there := os.environ.get("RAYCHAT_STORAGE_PATH")) and not base.run.storage_path:
        base = Config.from_flat({"storage_path": there}, base)
    return tyro.cli(
        Config,
        prog=prog,
        description=description,
        args=list(args),
        default=base,
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes, tyro.conf.FlagCreatePairsOff),
        compact_help=False,
    )


def load_presets(names: str) -> Config:
    """The presets in the comma-separated `names`, each over the ones before; a name that ends in .toml is a file."""
    values: dict[str, Any] = {}
    for name in filter(None, (part.strip() for part in names.split(","))):
        layer = _read_preset(name)
        values |= other_warmup_cleared(layer.keys() & WARMUPS) | layer
    try:
        return Config.from_flat(values | {"preset": names})
    except ConfigError as error:
        raise ConfigError(f"In the preset {names!r}: {error}") from error


def preset_names() -> list[str]:
    """Names of the presets that ship with raychat."""
    return sorted(path.stem for path in PRESETS.glob("*.toml"))


def run_job(main: Callable[[list[str]], int | None]) -> None:
    """Call `main` with the arguments and exit: 0 done, 2 bad input in one message, 1 anything else."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a letter that a terminal has not ends no job
            stream.reconfigure(errors="backslashreplace")
    try:
        code = main(sys.argv[1:])
    except RaychatError as error:
        sys.stdout.flush()
        sys.stderr.write(f"error: {public_text(str(error))}\n")
        code = error.exit_code
    except BrokenPipeError:  # `| head` has seen enough; the flush at exit must not find the pipe again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        code = 1
    except OSError as error:
        if error.errno not in MACHINE_ERRORS:
            raise
        sys.stdout.flush()
        sys.stderr.write(
            f"error: {error.strerror}: {error.filename or 'no file named'}. Mend it and run the same command.\n"
        )
        code = 2
    sys.stdout.flush()
    sys.stderr.flush()
    sys.exit(code or 0)


def _read_preset(name: str) -> dict[str, Any]:
    path = Path(name) if name.endswith(".toml") else PRESETS / f"{name}.toml"
    if not path.is_file():
        known = preset_names()
        hint = did_you_mean(name, known) or "."
        raise ConfigError(f"There is no preset {name!r}{hint} Presets: {', '.join(known)}, or a .toml file.")
    try:
        values = tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"The preset {name!r} is not valid TOML: {error}.") from error
    return {key.replace("-", "_"): value for key, value in values.items()}


def _flag_values(args: Sequence[str], flag: str) -> list[str]:
    """Values given to `flag`, as `--flag value` or `--flag=value`."""
    found = []
    for index, arg in enumerate(args):
        name, _, value = arg.partition("=")
        if name.replace("_", "-") == flag:
            if "=" not in arg and index + 1 < len(args):
                value = args[index + 1]
            found.append(value)
    return found


def _with_dry_run_steps(args: Sequence[str]) -> list[str]:
    """`args` with the number of steps behind a `--dry-run-steps` that stands alone."""
    given = []
    for arg, following in zip(args, [*args[1:], "--"], strict=False):
        given.append(arg)
        if arg.replace("_", "-") == "--dry-run-steps" and following.startswith("--"):
            given.append(str(DRY_RUN_STEPS))
    return given


def other_warmup_cleared(given: AbstractSet[str]) -> dict[str, Any]:
    """A layer that says how to warm up takes the place of what the layers below it said."""
    return dict.fromkeys(WARMUPS - given, -1) if given else {}


def _refuse_both_warmups(args: Sequence[str]) -> None:
    steps, ratio = _flag_values(args, "--warmup-steps"), _flag_values(args, "--warmup-ratio")
    if steps and ratio and "-1" not in (steps[-1], ratio[-1]):
        raise ConfigError(
            f"--warmup-steps {steps[-1]} and --warmup-ratio {ratio[-1]} both set the warm-up: give one of them."
        )
