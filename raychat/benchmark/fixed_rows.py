"""Rows and weights that are given: with them two programs, or two versions of one, train on the same numbers."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from raychat.config import ModelSettings
from raychat.data.batches import Batch
from raychat.data.order import rank_slice
from raychat.errors import ConfigError
from raychat.model import GPT
from raychat.training.exported import fill, read_tensors


def load_rows(path: str, model: ModelSettings) -> np.ndarray:
    """The array (N, T+1) in a .npy file, checked against the model.

    Raises:
        ConfigError: it is no such file, has other shapes, or holds tokens that the vocabulary does not have.
    """
    T, V = model.max_seq_len, model.vocab_size
    try:
        rows = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ConfigError(f"--rows {path} cannot be read as a .npy file: {error}.") from error
    if not isinstance(rows, np.ndarray) or rows.ndim != 2 or rows.dtype.kind not in "iu" or not len(rows):
        kind = f"{rows.dtype} {rows.shape}" if isinstance(rows, np.ndarray) else "an archive"
        raise ConfigError(f"--rows {path} holds {kind}: token ids of the shape (rows, T+1) are needed, as uint16.")
    if rows.shape[1] != T + 1:
        raise ConfigError(
            f"--rows {path} has rows of {rows.shape[1]:,} tokens, and --max-seq-len {T} needs {T + 1:,}: inputs and targets "
            f"overlap. Use --max-seq-len {rows.shape[1] - 1}, or other rows."
        )
    if (least := int(rows.min())) < 0 or (most := int(rows.max())) >= V:
        wrong = least if least < 0 else most
        raise ConfigError(f"--rows {path} holds the token {wrong:,}, and --vocab-size is {V:,}.")
    return rows


def batches_of(rows: np.ndarray, *, rows_per_batch: int, rank: int, world_size: int, step: int = 0) -> Iterator[Batch]:
    """This rank's part of every batch, without end: step i trains on the rows from i * rows_per_batch on, modulo N."""
    lo, hi = rank_slice(rows_per_batch, rank, world_size)
    while True:
        first = step * rows_per_batch
        ids = np.arange(first + lo, first + hi) % len(rows)
        step += 1
        yield Batch(rows[ids], rows_consumed=first + rows_per_batch, epoch=first // len(rows))


def load_weights(path: str, model: GPT) -> None:
    """Fill `model` with the state dict in a file of `torch.save` or safetensors, in the interop names.

    Raises:
        ConfigError: there is no such file.
        CheckpointError: it holds something else, or another model.
    """
    try:
        state = read_tensors(Path(path))
    except OSError as error:
        raise ConfigError(f"--init {path} cannot be read: {error.strerror}.") from error
    fill(state, model, path)
