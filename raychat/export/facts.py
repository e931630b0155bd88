"""What is known of the training of a model: written into exports, for the model card and for whoever reads them later.

Values that were not measured, or of which nothing is recorded here, are null.
"""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from raychat.config import Config
from raychat.errors import DataError
from raychat.export.source import Source
from raychat.model import GPT
from raychat.tracking.journal import read_journal

FORMAT = "raychat-export-1"
CORE_TASK = "core/"


def training_facts(source: Source, model: GPT) -> dict[str, Any]:
    """The facts of a checkpoint, from it and its run directory; of an export, those that it came with."""
    if source.kind == "export" and "format" in source.meta:
        return {key: value for key, value in source.meta.items() if key != "files"}
    counts = {"parameters": model.num_params()["total"], "flops_per_token": model.flops_per_token()}
    if source.kind == "export":
        return {"format": FORMAT, "model_tag": source.name, "step": source.step} | counts
    meta = source.meta
    config, state, step = Config.from_flat(meta["config"]), meta["state"], meta["step"]
    tokens = state["rows_consumed"] * config.model.max_seq_len
    return {
        "format": FORMAT,
        "model_tag": source.name,
        "step": step,
        **counts,
        "corpus": _corpus(source, config),
        "data_fingerprint": meta["fingerprint"],
        "tokens": tokens,
        "flops": float(tokens * counts["flops_per_token"]),
        "settings": _public_settings(meta["config"]),
        "resolved": {"dtype": meta["resolved"]["dtype"], "hardware": meta["resolved"].get("hardware")},
        "training_time_s": state.get("total_training_time_s"),
        "commit": _tags(source.run_dir).get("raychat.git_commit"),
        **_measured(source, state, step),
    }


def _measured(source: Source, state: dict[str, Any], step: int) -> dict[str, Any]:
    """Results of this step: from the journal, which evaluations reach that end after the checkpoint, else its own."""
    found: dict[str, Any] = {
        name: state.get(name) if state.get(at) == step else None
        for name, at in (("val_bpb", "val_step"), ("core_metric", "core_step"))
    }
    found |= {"core_tasks": None, "cost_usd": None}
    for record in _records(source.run_dir):
        if record["step"] == step:
            names = {"val/bpb": "val_bpb", "core_metric": "core_metric"}
            found |= {ours: record[theirs] for theirs, ours in names.items() if record.get(theirs) is not None}
            tasks = {key.removeprefix(CORE_TASK): value for key, value in record.items() if key.startswith(CORE_TASK)}
            found["core_tasks"] = (found["core_tasks"] or {}) | tasks or None
        if record["step"] <= step and record.get("cost/usd") is not None:
            found["cost_usd"] = record["cost/usd"]
    return found


def _records(run_dir: Path | None) -> list[dict[str, Any]]:
    with suppress(OSError, DataError):
        if run_dir:
            return read_journal(run_dir / "metrics.jsonl")
    return []


def _corpus(source: Source, config: Config) -> str:
    """Name of the corpus: what the record of the run says, else the last part of what was asked for."""
    dataset = _json(source.run_dir, "mlflow.json").get("dataset") or {}
    asked = config.data.corpus.rstrip("/").rpartition("/")[2]
    return dataset.get("name") or asked or "the default of the machine it ran on (climbmix with GPUs, else embedded)"


def _tags(run_dir: Path | None) -> dict[str, Any]:
    return _json(run_dir, "mlflow.json").get("tags") or {}


def _json(run_dir: Path | None, name: str) -> dict[str, Any]:
    with suppress(OSError, ValueError):
        if run_dir:
            found = json.loads((run_dir / name).read_text())
            return found if isinstance(found, dict) else {}
    return {}


def _public_settings(config: dict[str, Any]) -> dict[str, Any]:
    """The settings that say how the model came about, without places, names and addresses of who trained it."""
    private = (
        "base_dir",
        "storage_path",
        "tracking_uri",
        "on_event",
        "address",
        "core_bundle",
        "init_from",
        "tokenizer",
    )
    return {
        key: value
        for key, value in config.items()
        if key not in private and not (isinstance(value, str) and ("/" in value or "\\" in value))
    }
