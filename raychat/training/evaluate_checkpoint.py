"""Evaluates one checkpoint of a run as training would have done at its step: for workers that do not train."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from raychat.config import Config
from raychat.data.batches import validation_passes, validation_rows
from raychat.data.shards import Manifest, RowReader, needed_manifest
from raychat.data.tokenizer import Tokenizer
from raychat.evaluation.core import CoreResult
from raychat.training import checkpoint
from raychat.training.build import build_model
from raychat.training.device import Resolved
from raychat.training.evaluating import BPB, CORE, SAMPLES
from raychat.training.examiner import CoreTasks, Echo, Examiner, Validation
from raychat.training.world import World

Beat = Callable[[], None]
APART = 1 << 20  # added to the rank, by which a node's copy of a checkpoint is named: ranks that train have their own


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """What is to be evaluated: plain values, which cross process and machine borders. `kinds` as in `LoopState.owed`."""

    checkpoint: str
    tokens_dir: str
    tokenizer_dir: str
    config: dict[str, Any]
    kinds: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What came out, and the seconds that each kind took; what was not asked for is None or empty."""

    bpb: float | None = None
    core: CoreResult | None = None
    samples: tuple[tuple[str, str], ...] = ()
    val_tokens: int = 0
    seconds: dict[str, float]


def evaluate_checkpoint(
    world: World, task: Assignment, echo: Echo = lambda line: None, *, beat: Beat = lambda: None
) -> Findings:
    """Evaluate on this rank of `world`, whose ranks all call this. As many ranks as trained give the very same values.

    `beat` is called now and then: the evaluation goes on.

    Raises:
        CheckpointError: the checkpoint is gone or does not suit the model.
        DataError: validation rows, tokenizer or CORE tasks are not there.
        OSError: the checkpoint could not be downloaded.
    """
    config, found = Config.from_flat(task.config), checkpoint.trusted(task.checkpoint)
    resolved = Resolved(**found.meta["resolved"])
    torch.set_num_threads(resolved.threads)
    device = torch.device("cuda", world.device_index) if resolved.device_type == "cuda" else torch.device("cpu")
    model = build_model(config, resolved, device)
    found.load(model, world=World(rank=APART + world.rank))
    manifest = needed_manifest(task.tokens_dir)
    size = config.batch.device_batch_size
    if size == "auto":
        size = max(1, resolved.device_batch_size)
    validation, tokens = open_validation(manifest, world, eval_tokens=config.eval.eval_tokens, device_batch_size=size)
    examiner = Examiner(
        model.eval(),
        Tokenizer.load(task.tokenizer_dir),
        world,
        validation=validation,
        core=CoreTasks.of(config),
        echo=echo,
    )
    return examine(examiner, task.kinds, val_tokens=tokens, beat=beat)


def open_validation(
    manifest: Manifest, world: World, *, eval_tokens: int, device_batch_size: int
) -> tuple[Validation, int]:
    """The first `eval_tokens` of the validation rows on the ranks of `world`, and how many tokens they are."""
    reader, T = RowReader(manifest, "val"), manifest.row_len - 1
    rows, size, ranks = min(reader.num_rows, eval_tokens // T), device_batch_size, world.world_size
    validation = Validation(
        passes=lambda: validation_rows(reader, rows=rows, device_batch_size=size, rank=world.rank, world_size=ranks),
        rounds=validation_passes(rows, device_batch_size=size, world_size=ranks),
    )
    return validation, rows * T


def examine(examiner: Examiner, kinds: tuple[str, ...], *, val_tokens: int, beat: Beat = lambda: None) -> Findings:
    """Everything in `kinds`, one after the other, with a `beat` between passes and after each of them."""

    def between() -> bool:
        beat()
        return False

    values: dict[str, Any] = {}
    seconds: dict[str, float] = {}
    makers = {
        BPB: lambda: examiner.bpb(between),
        CORE: lambda: examiner.core(between),
        SAMPLES: lambda: tuple(examiner.samples()),
    }
    for kind in kinds:
        start = time.perf_counter()
        values[kind] = makers[kind]()
        seconds[kind] = time.perf_counter() - start
        beat()
    return Findings(**values, seconds=seconds, val_tokens=val_tokens)
