"""The book of a search, `book.jsonl`: what was proposed, started and what came out, so that it goes on after any death.

One JSON object per line, appended, synced and never changed. `{"event": "session", ...}` begins each process's part and
`closed` ends it, unless the process died; `proposed` carries a trial, `started` its tag, `ended` its outcome. Beside it lies
`spec.toml`. One process writes at a time.
"""

import dataclasses
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

from raychat.atomic import sync_folder, write_text
from raychat.errors import CheckpointError, ConfigError
from raychat.search.limits import spent_usd
from raychat.search.spec import SearchSpec
from raychat.search.spec_checks import check_credentials
from raychat.search.spec_file import load_spec, to_toml
from raychat.search.trial import Outcome, Trial
from raychat.training.changes import kind_of
from raychat.training.lease import Lease
from raychat.uris import place_of

FORMAT = 1
SPEC, LINES = "spec.toml", "book.jsonl"
FREE = frozenset({"budget_usd", "max_hours", "concurrency", "confirm_seeds"})
"""settings of a search that may change when it goes on: they decide how long, and not what is tried"""
FREE_FLAGS = frozenset({"base.address", "base.tracking_uri", "base.on_event"})
"""flags of the base that may change: where it runs, and who is told"""


def search_dir(base_dir: Path, name: str) -> Path:
    """Where the search `name` is kept."""
    return base_dir / "searches" / name


@dataclass(kw_only=True)
class Contents:
    """What a book says."""

    trials: dict[str, Trial] = field(default_factory=dict)
    """tag -> trial, in the order of being proposed"""
    started: dict[str, int] = field(default_factory=dict)
    """tag -> times that it was started: more than once after a death"""
    done: dict[str, Outcome] = field(default_factory=dict)
    """tag -> outcome, in the order of coming"""
    base: dict[str, Any] = field(default_factory=dict)
    """flags of the baseline when the search began, without credentials"""
    sessions: list[tuple[float, float]] = field(default_factory=list)
    """unix seconds of the first and the last line of each process"""

    def runs(self) -> list[tuple[Trial, Outcome]]:
        """Trials that have an outcome, with it, in the order of being proposed."""
        return [(trial, self.done[tag]) for tag, trial in self.trials.items() if tag in self.done]

    @property
    def spent_usd(self) -> float:
        """Dollars of all outcomes."""
        return spent_usd(self.done)

    @property
    def hours(self) -> float:
        """Wall time of all sessions, each up to its last line."""
        return sum(last - first for first, last in self.sessions) / 3600

    def take(self, line: Mapping[str, Any]) -> None:
        """Enter one line of the file."""
        kind = line["event"]
        if kind == "session":
            self.sessions.append((line["time"], line["time"]))
            self.base = self.base or dict(line["base"])
        elif kind == "proposed":
            trial = Trial(**line["trial"])
            self.trials[trial.tag] = trial
        elif kind == "started":
            self.started[line["tag"]] = self.started.get(line["tag"], 0) + 1
        elif kind == "ended":
            self.done[line["tag"]] = Outcome(**line["outcome"])
        self.sessions[-1] = (self.sessions[-1][0], line["time"])


def read_book(folder: Path) -> tuple[SearchSpec, Contents]:
    """The search in `folder`, which may be running.

    Raises:
        ConfigError: where there is none, or its specification cannot be read.
        CheckpointError: for a book that is damaged before its last line.
    """
    if not (folder / SPEC).is_file():
        there = sorted(path.parent.name for path in folder.parent.glob(f"*/{SPEC}"))
        raise ConfigError(
            f"There is no search in {folder}" + (f"; searches beside it: {', '.join(there)}." if there else ".")
        )
    contents = Contents()
    for line, _ in _lines(folder / LINES):
        contents.take(line)
    return load_spec(folder / SPEC), contents


class Book:
    """Writes one search's book, from `open` to `close`; a `with` statement closes it."""

    def __init__(self, folder: Path, spec: SearchSpec, contents: Contents, lease: Lease) -> None:
        self.folder, self.spec, self.contents, self._lease = folder, spec, contents, lease
        self._file = (folder / LINES).open("ab")
        self._began = time.time()
        self._before = contents.hours
        self._write("session", format=FORMAT, base=spec.base_config.public())

    @classmethod
    def open(cls, folder: Path, spec: SearchSpec, echo: Callable[[str], None] = lambda line: None) -> Self:
        """Begin the search `spec` in `folder`, or go on with the one that is there.

        A last line that a death cut short is removed. `echo` hears it when another process must be waited for.

        Raises:
            ConfigError: when another search is there, with the differences, or `spec` lacks its credentials.
            LeaseError: when another process writes this book.
        """
        check_credentials(spec.base)
        folder.mkdir(parents=True, exist_ok=True)
        lease = Lease(folder)
        lease.acquire(echo)
        try:
            contents = Contents()
            if (folder / SPEC).is_file():
                old, contents = read_book(folder)
                _refuse_changes(folder, old, spec, contents.base)
                _cut_torn_line(folder / LINES)
            write_text(folder / SPEC, to_toml(spec))
            book = cls(folder, spec, contents, lease)
            sync_folder(folder)
        except BaseException:
            lease.release()
            raise
        return book

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def done(self) -> Mapping[str, Outcome]:
        """Tag -> outcome."""
        return self.contents.done

    @property
    def lost(self) -> bool:
        """Whether another process has, or may have, taken this search over: write nothing more."""
        return self._lease.lost

    @property
    def hours(self) -> float:
        """Wall time of the search so far, this process until now and those before up to their last line."""
        return self._before + (time.time() - self._began) / 3600

    def propose(self, trial: Trial) -> None:
        """Enter a trial; nothing where it stands already.

        Raises:
            CheckpointError: where another one has its tag: the search was begun by another version of raychat.
        """
        old = self.contents.trials.get(trial.tag)
        if old is None:
            self._write("proposed", trial=dataclasses.asdict(trial))
        elif old != trial:
            raise CheckpointError(
                f"{trial.tag} is {old.title!r} (rung {old.rung:g}, seed {old.seed}) in {self.folder / LINES}, and would be "
                f"{trial.title!r} (rung {trial.rung:g}, seed {trial.seed}) now: another version of raychat began this search. "
                "Go on with that version, or give the search another name."
            )

    def start(self, tag: str) -> None:
        """Enter that the run of `tag` starts, or goes on."""
        self._write("started", tag=tag)

    def end(self, tag: str, outcome: Outcome) -> None:
        """Enter what became of `tag`, once. Figures that are no numbers are written as null."""
        if tag in self.contents.done:
            raise ValueError(f"{tag} has an outcome already")
        self._write("ended", tag=tag, outcome=_finite(dataclasses.asdict(outcome)))

    def say_end(self, status: Literal["finished", "stopped", "failed"]) -> None:
        """Enter how this process ends, as its last word: a book without one was left by a process that died."""
        self._write("closed", status=status)

    def close(self) -> None:
        """Close the file and let others write."""
        self._file.close()
        self._lease.release()

    def _write(self, event: str, **fields: Any) -> None:
        line = {"event": event, "time": time.time(), **fields}
        text = json.dumps(line, allow_nan=False)
        self._file.write(text.encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self.contents.take(json.loads(text))


def _lines(path: Path) -> Iterator[tuple[dict[str, Any], int]]:
    """Each whole line with the offset of its end. A last one that is cut short is left out."""
    content = path.read_bytes() if path.exists() else b""
    end = 0
    for number, raw in enumerate(content.splitlines(keepends=True), start=1):
        if not raw.endswith(b"\n"):
            return
        end += len(raw)
        try:
            yield json.loads(raw), end
        except ValueError as error:
            raise CheckpointError(f"Line {number} of {path} is damaged: {error}.") from error


def _cut_torn_line(path: Path) -> None:
    end = max((end for _, end in _lines(path)), default=0)
    if path.exists() and end < path.stat().st_size:
        with path.open("r+b") as file:
            file.truncate(end)
            os.fsync(file.fileno())


def _refuse_changes(folder: Path, old: SearchSpec, new: SearchSpec, base: Mapping[str, Any]) -> None:
    """Refuse another specification under the same name, or presets that say something else now."""
    before, after = _flattened(old), _flattened(new)
    changed = [
        f"{name}: {before.get(name, 'default')} -> {after.get(name, 'default')}"
        for name in sorted(before.keys() | after.keys())
        if name not in FREE | FREE_FLAGS and _place(before.get(name)) != _place(after.get(name))
    ]
    resolved = json.loads(json.dumps(new.base_config.public()))
    changed = changed or [
        f"{name} of the presets: {base[name]} -> {value}"
        for name, value in resolved.items()
        if name in base and _place(base[name]) != _place(value) and kind_of(name) != "free"
    ]
    if changed:
        raise ConfigError(
            f"{folder} holds another search of this name ({'; '.join(changed)}). Its trials would not be comparable: give the "
            f"new one another name, or go on with the old one. May change: {', '.join(sorted(FREE | FREE_FLAGS))}."
        )


def _flattened(spec: SearchSpec) -> dict[str, Any]:
    flat = spec.kept()
    tables = {f"{table}.{name}": value for table in ("base", "space") for name, value in flat.pop(table).items()}
    return flat | tables


def _place(value: Any) -> Any:
    """`value`, the same for a URI with other credentials."""
    return place_of(value) if isinstance(value, str) else value


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
