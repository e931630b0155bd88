"""Evaluate a trained model: CORE, bits per byte on its validation rows, samples.

  python jobs/evaluate.py --core-bundle ../shared/data/core         everything, of the newest run of the base directory
  python jobs/evaluate.py --eval bpb --model-tag d12 --step 2000
  python jobs/evaluate.py --path exported/d12 --eval core,sample --output results

Writes core.json (every item), core.csv, bpb.json and samples.json, and logs to the MLflow run that made the checkpoint.
"""

import argparse
import dataclasses
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

# A checkout where only the dependencies are installed is enough.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from raychat import cli
from raychat.checks import require
from raychat.config import Config
from raychat.errors import ConfigError
from raychat.export.flags import ModelFlags

if TYPE_CHECKING:  # --help does not wait for torch
    from raychat.export.evaluate import Request
    from raychat.export.source import Source
    from raychat.training.evaluate_checkpoint import Findings

KINDS = {"core": "core", "bpb": "bpb", "sample": "samples"}


def main(args: Sequence[str]) -> int:
    """Find the model, evaluate it, and write down what came out."""
    options = parser().parse_args(args)
    kinds = asked(options.eval)
    if options.num_workers < 1:
        raise ConfigError(f"--num-workers {options.num_workers} is no number of workers: use 1 or more.")
    source = ModelFlags.of(options).find()
    step = "" if source.step is None else f", step {source.step}"
    print(f"model: {source.name}{step} ({source.place})", flush=True)
    folder = output_folder(options, source)
    wanted = request(options, source, kinds)
    check_output(folder)
    findings = evaluate(wanted, options)
    files = write(
        folder, source, findings
    )  # all of them before a word: a terminal that is gone takes no result with it
    show(findings, files)
    if source.run_dir and source.step is not None and not options.no_tracking:
        log(source.run_dir, source.step, findings, files, options.tracking_uri)
    return 0


def parser() -> argparse.ArgumentParser:
    """The flags."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--eval", default="core,bpb,sample", help="what to do, in this order (default: %(default)s)")
    ModelFlags.add_to(made)
    how = made.add_argument_group("evaluation")
    how.add_argument("--core-bundle", default="", help="folder or URL; default: the run's, else <base-dir>/core_bundle")
    how.add_argument("--core-metric-max-per-task", type=int, default=-1, help="items per CORE task; default: all")
    how.add_argument("--tokens", default="", help="folder of token shards for bpb; default: those that the run had")
    how.add_argument("--eval-tokens", type=int, default=-1, help="tokens for bpb; default: as the run had it")
    how.add_argument(
        "--device-batch-size",
        type=int,
        default=-1,
        help="sequences a pass, which changes speed and memory; default: for bpb the run's",
    )
    how.add_argument(
        "--device-type", default="", choices=["", "cuda", "cpu", "mps"], help="default: cuda where there is one"
    )
    how.add_argument("--dtype", default="", choices=["", "bfloat16", "float32", "float16"], help="default: the run's")
    how.add_argument("--num-workers", type=int, default=1, help="1: in this process; more: on Ray")
    how.add_argument("--address", default="", help="Ray cluster; default: RAY_ADDRESS, else one that is started here")
    results = made.add_argument_group("results")
    results.add_argument("--output", default="", help="folder for them; default: <run>/evaluations/step_<step>")
    results.add_argument("--tracking-uri", default="", help="MLflow store; default: the one the run was sent to")
    results.add_argument("--no-tracking", action="store_true", help="log nothing to MLflow")
    return made


def asked(text: str) -> tuple[str, ...]:
    """The kinds of evaluation in `--eval`."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    if unknown := [name for name in names if name not in KINDS]:
        raise ConfigError(f"--eval {text}: there is no evaluation {unknown[0]!r}; use some of {', '.join(KINDS)}.")
    if not names:
        raise ConfigError(f"--eval is empty: use some of {', '.join(KINDS)}.")
    return tuple(KINDS[name] for name in dict.fromkeys(names))


def output_folder(options: argparse.Namespace, source: "Source") -> Path:
    """Where the results go."""
    if options.output:
        return Path(options.output).expanduser()
    if source.run_dir is None or source.step is None:
        raise ConfigError(
            f"There is no run directory of {source.name} on this machine: give --output, a folder for the results."
        )
    return source.run_dir / "evaluations" / f"step_{source.step:08d}"


def check_output(folder: Path) -> None:
    """Make the folder of the results before anything is computed, and see that files can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(
            f"{folder} is no folder that results can be written to ({error.strerror or error}): give another as --output."
        ) from error


def request(options: argparse.Namespace, source: "Source", kinds: tuple[str, ...]) -> "Request":
    """What was asked for, where the flags leave it open as the run had it; all of it checked."""
    from raychat.export.evaluate import Request, find_tokens
    from raychat.training.examiner import CoreTasks

    had = {name: value for name, value in (source.meta.get("config") or {}).items() if name in Config().flat()}
    names = ("base_dir", "core_bundle", "eval_tokens")
    size = options.device_batch_size  # not the configuration's: it need not divide the batch of training
    require(size == -1 or size > 0, f"--device-batch-size must be positive, got {size}.")
    given = {name: value for name in names if (value := getattr(options, name)) not in ("", -1)}
    items = {"core_metric_every": 1, "core_metric_max_per_task": options.core_metric_max_per_task}
    config = Config.from_flat(had | items | given)
    core = CoreTasks.of(config) if "core" in kinds else None
    if "core" in kinds:
        if core is None:
            raise ConfigError(
                f"CORE needs its tasks, and there is no {config.base_dir / 'core_bundle'}: give --core-bundle (a folder, or "
                "the URL of a zip or tar), or leave core out of --eval."
            )
        core.load(say)
        core = dataclasses.replace(core, batch_rows=None if size == -1 else size)
    return Request(
        source=source,
        kinds=kinds,
        core=core,
        tokens_dir=find_tokens(source, base_dir=options.base_dir, given=options.tokens) if "bpb" in kinds else "",
        eval_tokens=config.eval.eval_tokens,
        device_batch_size=config.batch.sequences if size == -1 else size,
        device_type=options.device_type,
        dtype=options.dtype,
    )


def evaluate(wanted: "Request", options: argparse.Namespace) -> "Findings":
    """Here, or on Ray."""
    if options.num_workers > 1:
        from raychat.on_ray.evaluation_job import evaluate_on_ray

        return evaluate_on_ray(wanted, workers=options.num_workers, address=options.address, echo=say)
    from raychat.export.evaluate import evaluate_source
    from raychat.training.world import World

    return evaluate_source(World(), wanted, say)


def write(folder: Path, source: "Source", findings: "Findings") -> list[Path]:
    """What came out, as files in `folder`."""
    from raychat.evaluation import report

    files: list[Path] = []
    if findings.core is not None:
        files += report.write_core(folder, findings.core)
    if findings.bpb is not None:
        facts = {
            "tokens": findings.val_tokens,
            "model": source.name,
            "step": source.step,
            "seconds": findings.seconds["bpb"],
        }
        files.append(report.write_bpb(folder, findings.bpb, facts))
    if findings.samples:
        files.append(report.write_samples(folder, findings.samples))
    return files


def show(findings: "Findings", files: Sequence[Path]) -> None:
    """What came out, on the terminal."""
    from raychat.evaluation import report

    if findings.core is not None:
        say(report.core_table(findings.core))
    if findings.bpb is not None:
        say(f"bits per byte: {findings.bpb:.6f} on {findings.val_tokens:,} tokens")
    for _, text in findings.samples:
        say(f"sample: {text!r}")
    for file in files:
        say(f"written: {file}")


def log(run_dir: Path, step: int, findings: "Findings", files: Sequence[Path], tracking_uri: str) -> None:
    """Tell the MLflow run that made the checkpoint; that this fails is no failure of the evaluation."""
    from raychat.tracking.mlflow_late import log_late

    values = {} if findings.bpb is None else {"val/bpb": findings.bpb}
    values |= findings.core.metrics() if findings.core else {}
    log_late(run_dir, step, values, files, folder=f"evaluations/step_{step:08d}", tracking_uri=tracking_uri, echo=say)


def say(text: str) -> None:
    """A line on the terminal, at once."""
    print(text, flush=True)


if __name__ == "__main__":
    cli.run_job(main)
