"""What machines cost by the hour: a table with sources and dates, and a user's own over it. Nothing is fetched."""

import math
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from raychat.checks import did_you_mean
from raychat.errors import ConfigError
from raychat.planning.devices import find_gpu

TABLE = Path(__file__).with_name("prices.toml")
UNKNOWN = "unknown"
KEYS = ("name", "provider", "gpu", "gpus", "cores", "on_demand", "spot", "region", "source", "as_of")

Refuse = Callable[[str], ConfigError]
"""makes the error that says where in which file a problem is"""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """A machine type. Prices are dollars per hour of one machine; None: not known, or not on sale."""

    name: str
    provider: str = ""
    gpu: str
    """a plan name of raychat.planning.devices, or cpu"""
    gpus: int
    """0 with cpu"""
    cores: int = 0
    """CPU cores; 0: not known"""
    on_demand: float | None = None
    spot: tuple[float, float] | None = None
    """lowest and highest seen"""
    region: str = ""
    source: str = ""
    as_of: str = UNKNOWN
    """date of the price, or unknown"""

    @property
    def devices(self) -> str:
        """Its devices in words."""
        return f"{self.cores or 'an unknown number of'} CPU cores" if self.gpu == "cpu" else f"{self.gpus} x {self.gpu}"

    @property
    def dated(self) -> str:
        """Source and date in words."""
        date = f"of a date that is not known ({self.source})" if self.as_of == UNKNOWN else f"of {self.as_of}"
        return date if self.as_of == UNKNOWN else f"{date} ({self.source})"


def load_prices(own: str = "") -> dict[str, Machine]:
    """Machine types by name: those that ship with raychat, and over them those of the file `own`, entry by entry.

    Raises:
        ConfigError: when `own` cannot be read, or holds what cannot be.
    """
    return dict(_shipped()) | (_read(Path(own).expanduser(), own) if own else {})


def find_machine(name: str, table: dict[str, Machine]) -> Machine:
    """The machine type of that name, in any case.

    Raises:
        ConfigError: when `table` has none, with near names.
    """
    wanted = name.strip().lower()
    for key, machine in table.items():
        if key.lower() == wanted:
            return machine
    alike = [key for key in table if wanted and wanted in key.lower()]
    meant = f"; did you mean {' or '.join(alike)}?" if alike else did_you_mean(wanted, table)
    raise ConfigError(
        f"--machine {name!r} is not in the price table, which knows {', '.join(table)}. Name one of these, the GPU alone "
        f"(--gpu), or add the machine in a file of your own (--prices FILE){meant or '.'}"
    )


def machines_with(gpu: str, gpus: int, table: dict[str, Machine]) -> list[Machine]:
    """Machine types with that GPU, of which as many as `gpus` need are cheapest first on demand; unknown prices last."""

    def price(machine: Machine) -> float:
        return math.inf if machine.on_demand is None else machine.on_demand * -(-gpus // machine.gpus)

    return sorted((m for m in table.values() if m.gpu == gpu and m.gpus > 0), key=lambda m: (price(m), m.name))


@cache
def _shipped() -> dict[str, Machine]:
    return _read(TABLE, TABLE.name)


def _read(path: Path, shown: str) -> dict[str, Machine]:
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--prices {shown} cannot be read: {error.strerror or error}.") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"--prices {shown} is no text: {error}.") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"--prices {shown} is no TOML: {error}.") from None
    if unknown := sorted(set(content) - {"machine"}):
        raise ConfigError(f"--prices {shown}: {unknown[0]!r} has no meaning there: each price is a [[machine]] entry.")
    entries = content.get("machine", [])
    if not isinstance(entries, list) or not entries:
        raise ConfigError(f"--prices {shown} holds no prices: each is an entry that begins with [[machine]].")
    table: dict[str, Machine] = {}
    for number, entry in enumerate(entries, 1):
        machine = _machine(entry, f"--prices {shown}, entry {number}", shown)
        if machine.name in table:
            raise ConfigError(f"--prices {shown}: {machine.name!r} is there twice: keep one of them.")
        table[machine.name] = machine
    return table


def _machine(entry: Any, where: str, file: str) -> Machine:
    """One entry, checked; `where` begins the message of what it refuses."""

    def refuse(problem: str) -> ConfigError:
        return ConfigError(
            f"{where}{' (' + str(entry['name']) + ')' if isinstance(entry, dict) and 'name' in entry else ''}: {problem}"
        )

    if not isinstance(entry, dict):
        raise refuse("an entry is a table, which begins with [[machine]].")
    _check_keys(entry, refuse)
    try:
        gpu = "cpu" if entry["gpu"].strip().lower() == "cpu" else find_gpu(entry["gpu"])
    except ConfigError as error:
        raise refuse(str(error).replace("--gpu ", "gpu ")) from None
    if gpu == "cpu" and entry.get("gpus"):
        raise refuse(f"gpus = {entry['gpus']}, but gpu is cpu: leave gpus out.")
    return Machine(
        name=entry["name"],
        provider=entry.get("provider", ""),
        gpu=gpu,
        gpus=0 if gpu == "cpu" else _count(entry.get("gpus"), "gpus", 1, refuse),
        cores=_count(entry.get("cores", 0), "cores", 0, refuse),
        on_demand=_dollars(entry["on_demand"], "on_demand", refuse) if "on_demand" in entry else None,
        spot=_spot(entry["spot"], refuse) if "spot" in entry else None,
        region=entry.get("region", ""),
        source=entry.get("source", file),
        as_of=entry.get("as_of", UNKNOWN),
    )


def _check_keys(entry: dict[str, Any], refuse: Refuse) -> None:
    if unknown := sorted(set(entry) - set(KEYS)):
        raise refuse(
            f"there is no key {unknown[0]!r}{did_you_mean(unknown[0], KEYS) or ': use ' + ', '.join(KEYS) + '.'}"
        )
    if missing := [key for key in ("name", "gpu") if not entry.get(key)]:
        raise refuse(f"{missing[0]!r} is missing: an entry needs name and gpu, and gpus unless gpu is cpu.")
    for key in ("name", "provider", "gpu", "region", "source", "as_of"):
        if not isinstance(entry.get(key, ""), str):
            raise refuse(f"{key} = {entry[key]!r} is to be text in quotes.")


def _count(value: Any, key: str, least: int, refuse: Refuse) -> int:
    if value is None:
        raise refuse(f"{key!r} is missing: say how many, at least {least}.")
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise refuse(f"{key} = {value!r} is to be a whole number of at least {least}.")
    return value


def _dollars(value: Any, key: str, refuse: Refuse) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise refuse(
            f"{key} = {value!r} is to be dollars per hour of one machine, above 0; leave it out when not known."
        )
    return float(value)


def _spot(value: Any, refuse: Refuse) -> tuple[float, float]:
    if not isinstance(value, list) or len(value) != 2:
        raise refuse(f"spot = {value!r} is to be [lowest, highest], in dollars per hour of one machine.")
    low, high = (_dollars(part, "spot", refuse) for part in value)
    if low > high:
        raise refuse(f"spot = {value!r} begins with the higher price: write [{high:g}, {low:g}].")
    return low, high
