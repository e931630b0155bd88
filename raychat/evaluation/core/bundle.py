"""The CORE bundle: which tasks there are, their items and baselines, checked line by line before a model sees any.

A bundle is a folder with `core.yaml` (the tasks), `eval_meta_data.csv` (their random baselines) and `eval_data/`.
"""

import csv
import json
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from raychat.errors import ConfigError, DataError
from raychat.evaluation.core.archive import unpacked

TASKS_FILE, BASELINES_FILE, DATA_FOLDER = "core.yaml", "eval_meta_data.csv", "eval_data"
FIELDS = {
    "multiple_choice": ("query", "choices", "gold"),
    "schema": ("context_options", "continuation", "gold"),
    "language_modeling": ("context", "continuation"),
}
SHUFFLE_SEED = 1337  # the lineage's: a cap on items then takes the same ones everywhere


@dataclass(frozen=True)
class Item:
    """A question: its options as (prompt, continuation), of which `gold` is right.

    Options of multiple choice share the prompt, those of a schema the continuation; language modelling has one option.
    """

    line: int
    """where it stands in its file, from 1"""
    options: tuple[tuple[str, str], ...]
    gold: int


@dataclass(frozen=True, kw_only=True)
class Task:
    """One of the tasks, with its items in the order of evaluation."""

    label: str
    kind: str
    """multiple_choice, schema or language_modeling"""
    shots: int
    """solved items in front of each question"""
    delimiter: str
    """between prompt and continuation"""
    baseline: float
    """accuracy of guessing, 0..1, which scores 0"""
    items: tuple[Item, ...]


@dataclass(frozen=True)
class Bundle:
    """All tasks, checked. Plain data: it can be sent to other processes."""

    place: str
    tasks: tuple[Task, ...]

    def cut(self, max_per_task: int) -> "Bundle":
        """The first `max_per_task` items of every task (-1: all).

        Raises:
            ConfigError: that leaves a task fewer items than its examples and one question need.
        """
        if max_per_task < 0:
            return self
        needed = max((task.shots + 1 for task in self.tasks), default=1)
        if max_per_task < needed:
            raise ConfigError(
                f"--core-metric-max-per-task={max_per_task} is too few: up to {needed - 1} examples are shown with each "
                f"question, drawn from the other items of its task. Use at least {needed}, or -1 for all items."
            )
        return replace(self, tasks=tuple(replace(task, items=task.items[:max_per_task]) for task in self.tasks))


def load_bundle(place: str, cache: Path, echo: Callable[[str], None]) -> Bundle:
    """The bundle at `place`: a folder, or a zip or tar, on this machine or at an http(s) URL, unpacked into `cache` once.

    Items are in the order of evaluation, shuffled as the lineage does. `URL#sha256=HEX` also checks the archive.

    Raises:
        ConfigError: there is nothing at `place`.
        DataError: the download fails, a file is missing, or something in one is not as it must be.
    """
    folder = Path(place).expanduser()
    if not folder.is_dir():
        folder = unpacked(place, cache, echo)
    root = _root(folder, place)
    baselines = _baselines(root / BASELINES_FILE)
    files: dict[Path, list[dict[str, Any]]] = {}  # two tasks may share one
    tasks = [_task(entry, root, baselines, files) for entry in _entries(root / TASKS_FILE)]
    labels = [task.label for task in tasks]
    if twice := sorted({label for label in labels if labels.count(label) > 1}):
        raise DataError(
            f"{root / TASKS_FILE} names {', '.join(twice)} twice. Take the bundle anew from where it is whole."
        )
    return Bundle(place, tuple(tasks))


def _root(folder: Path, place: str) -> Path:
    """Where `core.yaml` stands: archives often wrap everything in one folder."""
    found = [path for path in (folder, *sorted(folder.iterdir())) if (path / TASKS_FILE).is_file()]
    if len(found) != 1:
        what = f"{len(found)} folders of it have one" if found else "there is none"
        raise DataError(
            f"--core-bundle={place} is no CORE bundle: it must hold {TASKS_FILE} ({what}), {BASELINES_FILE} and "
            f"{DATA_FOLDER}/."
        )
    return found[0]


def _entries(path: Path) -> list[Any]:
    try:
        content = yaml.safe_load(_text(path))
    except yaml.YAMLError as error:
        raise _malformed(path, f"it is not YAML: {error}") from None
    entries = content.get("icl_tasks") if isinstance(content, dict) else None
    if not isinstance(entries, list) or not entries:
        raise _malformed(path, "it must have a list icl_tasks with at least one task")
    return entries


def _baselines(path: Path) -> dict[str, str]:
    """What the file says under "Random baseline" for each task."""
    rows = csv.DictReader(_text(path).splitlines())
    if missing := {"Eval Task", "Random baseline"} - set(rows.fieldnames or ()):
        raise _malformed(path, f"it has no column {' and no column '.join(sorted(missing))}")
    return {row["Eval Task"]: row["Random baseline"] or "" for row in rows}


def _task(entry: Any, root: Path, baselines: dict[str, str], files: dict[Path, list[dict[str, Any]]]) -> Task:
    path = root / TASKS_FILE
    if not isinstance(entry, dict) or not isinstance(entry.get("label"), str):
        raise _malformed(path, f"a task without a label: {str(entry)[:80]!r}")
    label, kind, shots = entry["label"], entry.get("icl_task_type"), entry.get("num_fewshot")
    delimiter = entry.get("continuation_delimiter", " ")
    if kind not in FIELDS:
        raise _malformed(path, f"task {label} has icl_task_type {kind!r}; it must be one of {', '.join(FIELDS)}")
    if not (isinstance(shots, list) and len(shots) == 1 and _whole(shots[0]) and shots[0] >= 0):
        raise _malformed(path, f"task {label} has num_fewshot {shots!r}; it must be a list of one number, such as [10]")
    if not isinstance(delimiter, str):
        raise _malformed(path, f"task {label} has continuation_delimiter {delimiter!r}; it must be text")
    data = _data_file(root, label, entry.get("dataset_uri"))
    if data not in files:
        files[data] = _objects(data)
    items = [_item(fields, kind, f"line {number} of {data}") for number, fields in enumerate(files[data], 1)]
    items = [replace(item, line=number) for number, item in enumerate(items, 1)]
    if len(items) <= shots[0]:
        raise _malformed(
            data, f"it has {len(items)} items; {label} shows {shots[0]} with each question and needs {shots[0] + 1}"
        )
    random.Random(SHUFFLE_SEED).shuffle(items)
    return Task(
        label=label,
        kind=kind,
        shots=shots[0],
        delimiter=delimiter,
        baseline=_baseline(label, baselines, root / BASELINES_FILE),
        items=tuple(items),
    )


def _baseline(label: str, baselines: dict[str, str], path: Path) -> float:
    if label not in baselines:
        raise _malformed(path, f"it has no row for the task {label}")
    try:
        percent = float(baselines[label])
    except ValueError:
        percent = -1.0
    if not 0 <= percent < 100:
        raise _malformed(
            path, f"the random baseline of {label} is {baselines[label]!r}; it must be a percentage below 100"
        )
    return 0.01 * percent


def _data_file(root: Path, label: str, uri: Any) -> Path:
    if not isinstance(uri, str) or not uri or PurePosixPath(uri).is_absolute() or ".." in PurePosixPath(uri).parts:
        raise _malformed(
            root / TASKS_FILE, f"task {label} has dataset_uri {uri!r}; it must be a path inside {DATA_FOLDER}/"
        )
    return root / DATA_FOLDER / uri


def _objects(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a file, one a line; empty lines at its end do not count."""
    objects = []
    # Not splitlines: it also cuts at characters that JSON allows inside a text, such as U+2028.
    for number, line in enumerate(_text(path).rstrip().split("\n"), 1):
        try:
            value = json.loads(line)
        except ValueError as error:
            raise _malformed(path, f"line {number} is not JSON ({error})") from None
        if not isinstance(value, dict):
            raise _malformed(path, f"line {number} is not a JSON object")
        objects.append(value)
    return objects


def _item(fields: dict[str, Any], kind: str, where: str) -> Item:
    if missing := [name for name in FIELDS[kind] if name not in fields]:
        raise DataError(f"{where} has no {' and no '.join(missing)}, which {kind} needs. Take the bundle anew.")
    for name in ("query", "context", "continuation"):
        if name in FIELDS[kind] and not isinstance(fields[name], str):
            raise DataError(f"{where}: {name} must be text, got {fields[name]!r:.60}. Take the bundle anew.")
    if kind == "language_modeling":
        options = ((fields["context"].strip(), fields["continuation"]),)
    elif kind == "schema":
        options = tuple((context, fields["continuation"]) for context in _texts(fields, "context_options", where))
    else:
        options = tuple((fields["query"], choice) for choice in _texts(fields, "choices", where))
    if any(not continuation.strip() for _, continuation in options):
        raise DataError(f"{where} has an empty continuation: there is nothing to score. Take the bundle anew.")
    gold = fields.get("gold", 0) if kind != "language_modeling" else 0
    if not _whole(gold) or not 0 <= gold < len(options):
        raise DataError(f"{where}: gold is {gold!r}; it must be 0..{len(options) - 1}, one of the options.")
    return Item(0, options, gold)


def _texts(fields: dict[str, Any], name: str, where: str) -> list[str]:
    texts = fields[name]
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise DataError(f"{where}: {name} must be a list of texts, got {texts!r:.60}. Take the bundle anew.")
    return texts


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise DataError(f"the CORE bundle lacks {path}. Take it anew from where it is whole.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path} of the CORE bundle cannot be read: {error}. Take it anew from where it is whole."
        ) from None


def _malformed(path: Path, what: str) -> DataError:
    return DataError(f"{path} of the CORE bundle cannot be used: {what}. Mend it, or take the bundle anew.")
