"""Search specifications as TOML files: read, with flags over them, and written."""

import dataclasses
import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from raychat.checks import did_you_mean, require
from raychat.errors import ConfigError
from raychat.search.ranking import Objective
from raychat.search.spec import SearchSpec

_KINDS = ("val_bpb", "val_bpb_per_dollar")
_LIMITS = ("budget_usd", "max_hours")


def load_spec(path: Path | None, flags: Mapping[str, Any] | None = None) -> SearchSpec:
    """The search that the TOML file `path` describes, with `flags` over it.

    `flags` has the same keys and shapes as a file, dashes or underscores; its [base] and [space] are merged with the file's,
    all else replaces it. The name is that of the file where none is given.

    Raises:
        ConfigError: for what cannot be read, is not known, has the wrong type, or cannot be.
    """
    values = _read(path) if path is not None else {}
    try:
        return read_spec(_merged(values, flags or {}))
    except ConfigError as error:
        raise ConfigError(f"In the search {str(path)!r}: {error}" if path is not None else str(error)) from error


def read_spec(values: Mapping[str, Any]) -> SearchSpec:
    """The search that plain `values` describe: what `SearchSpec.flat` gives."""
    fields = {field.name: field for field in dataclasses.fields(SearchSpec)}
    if unknown := sorted(values.keys() - fields.keys()):
        raise ConfigError(
            f"A search has no setting {unknown[0]!r}{did_you_mean(unknown[0], fields) or '.'} Flags of a run belong into "
            "[base] or [space]."
        )
    require("name" in values, "The search has no name: give name = 'lr-search', or a file that is called so.")
    read = {name: _typed(fields[name], value) for name, value in values.items()}
    return SearchSpec(**read)


def literal(text: str) -> Any:
    """A value as a command line gives it: TOML (`0.02`, `[2, 3]`, `{low = 1, high = 2}`), `2,3` as a list, else text."""
    for candidate in (text, f"[{text}]") if "," in text else (text,):
        try:
            return tomllib.loads(f"value = {candidate}")["value"]
        except tomllib.TOMLDecodeError:
            continue
    return text.split(",") if "," in text else text


def to_toml(spec: SearchSpec) -> str:
    """`spec` as a file that `load_spec` reads to an equal one, credentials apart: see SearchSpec.kept."""
    values = spec.kept()
    tables = {name: values.pop(name) for name in ("base", "space")}
    lines = [f"{name} = {_toml(value)}" for name, value in values.items()]
    for title, table in tables.items():
        lines += ["", f"[{title}]", *(f"{name} = {_toml(value)}" for name, value in table.items())]
    return "\n".join(lines) + "\n"


def _read(path: Path) -> dict[str, Any]:
    try:
        values = tomllib.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"The search {str(path)!r} cannot be read: {error.strerror}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"The search {str(path)!r} is not valid TOML: {error}.") from error
    return {"name": path.stem} | {key.replace("-", "_"): value for key, value in values.items()}


def _merged(values: Mapping[str, Any], flags: Mapping[str, Any]) -> dict[str, Any]:
    found = dict(values)
    for key, value in flags.items():
        name = key.replace("-", "_")
        both = name in ("base", "space") and isinstance(value, Mapping) and isinstance(found.get(name), Mapping)
        found[name] = _underscored(found[name]) | _underscored(value) if both else value
    return found


def _underscored(table: Mapping[str, Any]) -> dict[str, Any]:
    return {key.replace("-", "_"): value for key, value in table.items()}


def _typed(field: "dataclasses.Field[Any]", value: Any) -> Any:
    """`value` as `field` needs it."""
    name = field.name
    if name == "objective":
        return _objective(value)
    if name in ("base", "space"):
        require(isinstance(value, Mapping), f"{name} = {value!r} is a table: write [{name}] and its flags below it.")
        table = _underscored(value)
        return table | {"preset": _placed(table["preset"])} if isinstance(table.get("preset"), str) else table
    if name in ("seeds", "rungs"):
        good = isinstance(value, list | tuple) and all(_is(v, int if name == "seeds" else float) for v in value)
        require(good, f"{name} = {value!r} is a list of numbers, for example {name} = {_EXAMPLES[name]}.")
        return tuple(value) if name == "seeds" else tuple(float(v) for v in value)
    if name == "concurrency":
        require(value == "auto" or _is(value, int), f"concurrency = {value!r} is a number of runs, or 'auto'.")
        return value
    wanted: Any = str if name == "name" else type(field.default)
    require(_is(value, wanted), f"{name} = {value!r} has the wrong type: {_WORDS[wanted]} is needed.")
    return float(value) if wanted is float else value


_EXAMPLES = {"seeds": "[42, 43]", "rungs": "[0.25, 0.5, 1.0]"}
_WORDS: dict[Any, str] = {int: "a whole number", float: "a number", str: "a text in quotes"}


def _is(value: Any, wanted: type) -> bool:
    return isinstance(value, (int, float) if wanted is float else wanted) and not isinstance(value, bool)


def _objective(value: Any) -> Objective:
    if isinstance(value, Objective):
        return value
    if isinstance(value, Mapping) and set(value) == {"best_under"} and isinstance(value["best_under"], Mapping):
        value = value["best_under"]
    if (
        isinstance(value, Mapping)
        and value
        and set(value) <= set(_LIMITS)
        and all(_is(v, float) for v in value.values())
    ):
        require(all(v > 0 for v in value.values()), f"objective.best_under must be above 0, got {dict(value)}.")
        return Objective(budget_usd=_limit(value, "budget_usd"), max_hours=_limit(value, "max_hours"))
    require(
        value in _KINDS if isinstance(value, str) else False,
        f"objective = {value!r}: use 'val_bpb', 'val_bpb_per_dollar', {{best_under = {{budget_usd = 5.0}}}} or "
        "{best_under = {max_hours = 2.0}}.",
    )
    return Objective(kind=value)


def _placed(presets: str) -> str:
    """`presets` with absolute paths, so that the search goes on from any folder."""
    parts = [part.strip() for part in presets.split(",")]
    return ",".join(str(Path(part).absolute()) if part.endswith(".toml") else part for part in parts)


def _limit(limits: Mapping[str, Any], name: str) -> float | None:
    return float(limits[name]) if name in limits else None


def _toml(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{name} = {_toml(item)}" for name, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    if isinstance(value, float):
        return repr(value)
    return json.dumps(value, ensure_ascii=False)
