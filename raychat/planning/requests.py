"""Which tokens a configuration would use: what `prepare` writes down beside a manifest, and how a plan finds it again.

A fingerprint needs every file's ends and a trained tokenizer. A request is what was asked for instead: corpus as given,
tokenizer settings, number of files. Its record says which manifest came of it, with which totals, and what the files
were like (name, size, time), so that a corpus that changed since is noticed without reading it.
"""

import dataclasses
import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raychat.atomic import write_json
from raychat.checks import require
from raychat.config import Config
from raychat.planning.text import CLIMBMIX_SHARDS, PACKINGS, Packing, climbmix_files
from raychat.uris import public_uri

FORMAT = 1
DECISIVE = (
    "corpus",
    "val_corpus",
    "text_column",
    "num_data_shards",
    "tokenizer",
    "vocab_size",
    "tok_max_chars",
    "tok_doc_cap",
    "max_seq_len",
    "packing",
)
"""settings that decide which rows a run reads"""

# (name, bytes, modification time in ns; -1 where the file is not local)
FileMark = tuple[str, int, int]

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """What the first documents of a corpus say about the rest."""

    docs: int
    chars: int
    tokens: int
    """tokens of these documents, BOS included"""
    corpus_chars: float
    """characters of the whole training text, from the sizes of its files"""
    margin: float
    """how far best-fit must outlast the run, as a share"""
    best_fit_share: dict[str, float]
    """share of tokens that best-fit keeps, by T"""

    @property
    def corpus_tokens(self) -> float:
        """Tokens of the whole training text."""
        return self.corpus_chars * self.tokens / self.chars


@dataclass(frozen=True, kw_only=True)
class Totals:
    """A split as a manifest has it."""

    rows: int
    docs: int
    tokens_in: int


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """Token shards that were made for a request."""

    fingerprint: str
    seq_len: int
    packing: Packing
    tokenizer_dir: str
    train: Totals
    val: Totals
    train_files: tuple[FileMark, ...]
    val_files: tuple[FileMark, ...]
    sample: Sample | None = None

    @property
    def kept(self) -> float:
        """Tokens in the training rows by tokens of the training text; keep's added BOS can make it more than 1."""
        return self.train.rows * (self.seq_len + 1) / self.train.tokens_in


def corpus_name(config: Config, *, with_gpus: bool) -> str:
    """The corpus of `config`, as given or by default."""
    return config.data.corpus or ("climbmix" if with_gpus else "embedded")


def begun(config: Config) -> dict[str, Any] | None:
    """config.json of the run on this machine that `config` would go on with; None for one that begins."""
    path = config.run_dir / "config.json"
    if config.run.fresh or not path.exists() or not any((config.run_dir / "checkpoints").glob("step_*")):
        return None
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def files_wanted(config: Config, run: dict[str, Any] | None) -> int | None:
    """Files of the corpus to use: as asked, or as many as `run` (as `begun` gives it) has, or None for what the horizon
    needs.

    A run that goes on to a longer horizon stays with its data; a download of its own size would make it another corpus.
    """
    if config.data.num_data_shards != -1:
        return config.data.num_data_shards
    if run is None:
        return None
    same = run["config"]["corpus"] == config.data.corpus and not config.data.val_corpus
    return run.get("corpus_files") if same and config.data.corpus in ("", "climbmix") else None


def check_files(number: int, corpus: str, val_corpus: str) -> None:
    """Refuse a `--num-data-shards` (-1: all) that leaves nothing to train on, or is more than climbmix has."""
    least = 1 if val_corpus and corpus not in ("climbmix", "embedded") else 2
    require(
        number == -1 or number >= least,
        f"--num-data-shards {number} leaves no file of --corpus {public_uri(corpus)} to train on"
        f"{', since the last one validates' if least == 2 else ''}. Use {least} or more.",
    )
    require(
        corpus != "climbmix" or number <= CLIMBMIX_SHARDS + 1,
        f"--num-data-shards {number:,} is more than the {CLIMBMIX_SHARDS + 1:,} files of climbmix. "
        f"Use {CLIMBMIX_SHARDS + 1} or less.",
    )


def request_of(config: Config, tokens_needed: int, run: dict[str, Any] | None, *, with_gpus: bool) -> dict[str, Any]:
    """All settings that decide the text and its tokenizer, without credentials. T and packing come on top.

    `run` is that of `files_wanted`.
    """
    data, corpus = config.data, corpus_name(config, with_gpus=with_gpus)
    check_files(data.num_data_shards, corpus, data.val_corpus)
    files = files_wanted(config, run)
    if files is None:
        files = climbmix_files(tokens_needed) if corpus == "climbmix" else -1
    return {
        "corpus": _place(corpus),
        "val_corpus": _place(data.val_corpus),
        "text_column": data.text_column,
        "num_data_shards": files,
        "vocab_size": config.model.vocab_size,
        "tokenizer": data.tokenizer,
        "tok_max_chars": data.tok_max_chars,
        "tok_doc_cap": data.tok_doc_cap,
    }


def write_record(folder: Path, request: dict[str, Any], prepared: Prepared) -> None:
    """Write down beside the manifest in `folder` that it is what `request` asks for; nothing where that stands there.

    A sample stays where the new record has none: the same manifest means the same text and tokenizer.
    """
    path = folder / _record_name(request)
    old = _read_json(path) or {}
    # Through JSON, where tuples are lists.
    content = json.loads(json.dumps({"format": FORMAT, "request": request} | dataclasses.asdict(prepared)))
    content["sample"] = content["sample"] or old.get("sample")
    if old != content:
        write_json(path, content)


def find_records(base_dir: Path, request: dict[str, Any]) -> list[Prepared]:
    """What was prepared for `request`, for any T and packing, newest first. A manifest that is gone does not count."""
    paths = [
        path for path in base_dir.glob(f"tokens/*/{_record_name(request)}") if (path.parent / "manifest.json").exists()
    ]
    found = [_record_of(path) for path in sorted(paths, key=lambda path: path.stat().st_mtime_ns, reverse=True)]
    return [record for record in found if record is not None]


def same_data(config: Config, run: dict[str, Any]) -> bool:
    """Whether the data settings with which `run` (its config.json) began are still those of `config`."""
    now, then = config.public(), run["config"]
    return all(then.get(name) == now[name] for name in DECISIVE)


def record_of_run(config: Config, run: dict[str, Any]) -> Prepared | None:
    """The manifest that `run` (as `begun` gives it) began with, where its data settings are still those of `config`.

    For token shards that an earlier version made, which left no record; nothing is known of their files.
    """
    manifest = _read_json(config.base_dir / "tokens" / str(run.get("data_fingerprint")) / "manifest.json")
    if manifest is None or not same_data(config, run):
        return None
    try:
        totals = {split: _totals(manifest["shards"], split) for split in ("train", "val")}
        spec = manifest["spec"]
        return Prepared(
            fingerprint=manifest["fingerprint"],
            seq_len=spec["seq_len"],
            packing=PACKINGS[PACKINGS.index(spec["packing"])],
            tokenizer_dir="",
            train=totals["train"],
            val=totals["val"],
            train_files=(),
            val_files=(),
        )
    except (KeyError, TypeError, ValueError) as error:
        log.warning("the manifest %s cannot be used by the plan: %s", run.get("data_fingerprint"), error)
        return None


def _totals(shards: list[dict[str, Any]], split: str) -> Totals:
    mine = [shard for shard in shards if shard["split"] == split]
    return Totals(**{name: sum(shard[name] for shard in mine) for name in ("rows", "docs", "tokens_in")})


def _place(place: str) -> str:
    """A place as it is written down: names stay, paths become absolute, credentials are left out."""
    if place in ("", "embedded", "climbmix") or "://" in place:
        return public_uri(place)
    return str(Path(place).expanduser().absolute())


def _record_name(request: dict[str, Any]) -> str:
    return f"request-{hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()[:16]}.json"


def _record_of(path: Path) -> Prepared | None:
    content = _read_json(path)
    try:
        if content is None or content.pop("format") != FORMAT:
            return None
        content.pop("request")
        content |= {split: Totals(**content[split]) for split in ("train", "val")}
        content |= {name: tuple(map(_mark, content[name])) for name in ("train_files", "val_files")}
        content["sample"] = Sample(**content["sample"]) if content["sample"] else None
        return Prepared(**content)
    except (KeyError, TypeError, ValueError) as error:
        log.warning("%s cannot be used by the plan: %s", path, error)
        return None


def _mark(entry: list[Any]) -> FileMark:
    name, size, changed = entry
    return name, size, changed


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None
