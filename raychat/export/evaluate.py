"""Evaluates a model that was found by `find_source`, in this process or as one of several ranks."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from raychat.config import Config
from raychat.data.shards import Manifest, needed_manifest, read_manifest
from raychat.data.tokenizer import Tokenizer
from raychat.errors import DataError
from raychat.export.source import Source
from raychat.storage import Store
from raychat.training.device import DTYPES, device_type, resolve
from raychat.training.evaluate_checkpoint import Beat, Findings, examine, open_validation
from raychat.training.evaluating import BPB
from raychat.training.examiner import CoreTasks, Examiner
from raychat.training.world import World


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to evaluate and how: plain values, for other processes too. `dtype` empty: as `Source.load` chooses."""

    source: Source
    kinds: tuple[str, ...]
    core: CoreTasks | None
    tokens_dir: str = field(repr=False)
    eval_tokens: int
    device_batch_size: int
    device_type: str = ""
    dtype: str = ""


def evaluate_source(
    world: World, request: Request, echo: Callable[[str], None] = lambda line: None, *, beat: Beat = lambda: None
) -> Findings:
    """What `request` asks for, on this rank of `world`, whose ranks all call this. Findings of rank 0 are whole.

    `beat` is called now and then: the evaluation goes on.

    Raises:
        CheckpointError: the model cannot be loaded.
        DataError: the validation rows are of another tokenizer or too long for the model.
    """
    kind = device_type(request.device_type)
    if kind == "cpu":
        threads = resolve(Config.from_flat({"device_type": kind}), local_world_size=world.world_size).threads
        torch.set_num_threads(threads)
    device = torch.device(kind, world.device_index) if kind == "cuda" else torch.device(kind)
    loaded = request.source.load(device, DTYPES.get(request.dtype))
    validation, tokens = None, 0
    if BPB in request.kinds:
        manifest = _fitting(request.tokens_dir, loaded.tokenizer, loaded.model.config.sequence_len)
        validation, tokens = open_validation(
            manifest, world, eval_tokens=request.eval_tokens, device_batch_size=request.device_batch_size
        )
    examiner = Examiner(loaded.model, loaded.tokenizer, world, validation=validation, core=request.core, echo=echo)
    return examine(examiner, request.kinds, val_tokens=tokens, beat=beat)


def find_tokens(source: Source, *, base_dir: str, given: str) -> str:
    """Folder of the token shards that the model was trained on, or its address in an object store, or `given`.

    Raises:
        DataError: there are none at this place, or they are not found.
    """
    if given:
        if read_manifest(given) is None:
            raise DataError(
                f"--tokens {Store.of(given)} holds no token shards: give a folder below tokens/ of a base directory, or of a "
                "storage path in an object store."
            )
        return given
    config, mark = source.meta.get("config") or {}, source.meta.get("fingerprint")
    homes = [base_dir, config.get("base_dir", ""), os.environ.get("RAYCHAT_BASE_DIR", ""), "~/.cache/raychat"]
    bases = list(dict.fromkeys(str(Path(home).expanduser()) for home in homes if home))
    places = [Store.of(base) for base in bases] + ([source.storage] if source.storage else [])
    for place in places if mark else ():
        folder = place.child("tokens", str(mark))
        if read_manifest(folder) is not None:
            return folder.address
    raise DataError(
        f"Bits per byte needs validation rows, and the token shards of {source.name}"
        + (
            f" ({mark}) are not in {', '.join(map(str, places))}"
            if mark
            else " are not known: its files do not say which it had"
        )
        + ". Give --base-dir of the run, or --tokens (a folder that jobs/prepare_data.py made with its tokenizer), or leave "
        "bpb out of --eval."
    )


def _fitting(tokens_dir: str, tokenizer: Tokenizer, sequence_len: int) -> Manifest:
    manifest, place = needed_manifest(tokens_dir), Store.of(tokens_dir)
    if manifest.spec.tokenizer_sha256 != tokenizer.sha256:
        raise DataError(
            f"The rows in {place} were made with another tokenizer than the model has: give others as --tokens."
        )
    if manifest.row_len - 1 > sequence_len:
        raise DataError(
            f"The rows in {place} have {manifest.row_len - 1} tokens, and the model was trained on {sequence_len}: give "
            "shorter ones as --tokens."
        )
    return manifest
