"""`--init-from`: a new run that begins with the weights of an exported directory instead of random ones.

The weights alone are taken: the optimizer, the data order and the schedule begin anew.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from raychat.config import Config
from raychat.data.tokenizer import RANKS_FILE, Tokenizer
from raychat.errors import CheckpointError, ConfigError, RaychatError
from raychat.model import GPT, GPTConfig
from raychat.planning import model_shape
from raychat.training.exported import Exported, open_export
from raychat.training.world import World
from raychat.uris import public_uri

FLAGS = {
    "n_layer": "--depth",
    "n_head": "--head-dim",
    "n_kv_head": "--num-kv-heads",
    "n_embd": "--aspect-ratio",
    "vocab_size": "--vocab-size",
}


def check_initial(config: Config, tokenizer: Tokenizer, *, echo: Callable[[str], None]) -> None:
    """Refuse weights that do not suit the run, before anything is started.

    Raises:
        ConfigError: they are not there, are of another shape, or were trained with another tokenizer.
        CheckpointError: they are damaged.
    """
    found = _opened(config)
    found.verify()
    _check_shapes(config, found.shapes)
    theirs = found.tokenizer()
    if theirs.sha256 != tokenizer.sha256:
        raise ConfigError(
            f"--init-from {found.store}: its model reads another tokenizer ({theirs.vocab_size:,} tokens, digest "
            f"{theirs.sha256[:12]}...) than this run has ({tokenizer.vocab_size:,} tokens, {tokenizer.sha256[:12]}...), so "
            f"its ids mean other text. Give its own as --tokenizer{_own_folder(found)}."
        )
    echo(f"initial weights: {found.store}" + (f", step {found.step:,}" if found.step is not None else ""))
    shape = model_shape(config.model)
    for name, mine, its in (
        ("--max-seq-len", shape.sequence_len, found.shapes.sequence_len),
        ("--window-pattern", config.model.window_pattern.upper(), found.shapes.window_pattern.upper()),
        ("--short-window-ratio", config.model.short_window_ratio, found.shapes.short_window_ratio),
    ):
        if mine != its:
            echo(f"note: {name} is {mine}, and these weights were trained with {its}")


def put_initial(config: Config, model: GPT, world: World) -> None:
    """Put the weights of `--init-from` into `model` on every rank; rank 0 reads them. Every rank calls this.

    Raises:
        RaychatError: on every rank, when they cannot be used.
        OSError: on every rank, when an object store cannot be reached.
    """
    problem: Exception | None = None
    if world.rank == 0:
        try:
            _opened(config).load(model)
        except (RaychatError, OSError) as error:
            problem = error
    if problem := world.broadcast(problem):
        raise problem
    if world.world_size > 1:
        with torch.no_grad():
            for param in model.parameters():
                dist.broadcast(param, src=0, group=world.group)


def _opened(config: Config) -> Exported:
    place = config.run.init_from
    try:
        found = open_export(place)
    except OSError as error:
        raise CheckpointError(f"--init-from {public_uri(place)} cannot be read: {error}") from error
    if found is None:
        raise ConfigError(
            f"--init-from {public_uri(place)}: there is no exported directory (model_*.pt and meta_*.json, or a Hugging "
            "Face directory of raychat) that this machine can see. Give the full path of one, on a file system that all "
            "nodes share, or make it with jobs/export.py."
        )
    return found


def _check_shapes(config: Config, theirs: GPTConfig) -> None:
    shape = model_shape(config.model)
    wrong = {name: getattr(theirs, name) for name in FLAGS if getattr(theirs, name) != getattr(shape, name)}
    if not wrong:
        return
    said = ", ".join(f"{name} {value:,} instead of {getattr(shape, name):,}" for name, value in wrong.items())
    raise ConfigError(
        f"--init-from {public_uri(config.run.init_from)}: its model has {said}. Give "
        + " ".join(f"{flag} {value}" for flag, value in _flags(theirs).items())
        + ", or other weights."
    )


def _flags(shapes: GPTConfig) -> dict[str, Any]:
    """Flags that make a model of these shapes."""
    flags = {
        "--depth": shapes.n_layer,
        "--aspect-ratio": shapes.n_embd // shapes.n_layer,
        "--head-dim": shapes.head_dim,
        "--vocab-size": shapes.vocab_size,
    }
    return flags | ({"--num-kv-heads": shapes.n_kv_head} if shapes.n_kv_head != shapes.n_head else {})


def _own_folder(found: Exported) -> str:
    folder = found.tokenizer_folder()
    return f" {folder}" if folder.exists(RANKS_FILE) else ", after exporting it with jobs/export.py"
