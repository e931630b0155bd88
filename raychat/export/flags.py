"""The flags by which a job is told which model is meant: one place for their names, help and defaults."""

import argparse
import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the flags are there before torch, which takes seconds to load
    from raychat.export.source import Source


def _flag(default: Any, help_text: str) -> Any:
    return field(default=default, metadata={"help": help_text})


@dataclass(frozen=True, kw_only=True)
class ModelFlags:
    """What a user says about the model; `raychat.export.source.find_source` takes the same."""

    path: str = _flag("", "a checkpoint, a run directory or an exported directory; s3:// and gs:// too")
    model_tag: str = _flag("", "without --path: name of the run; default: the one that saved last")
    step: int = _flag(-1, "of the checkpoint; default: the newest that is whole")
    base_dir: str = _flag("", "as in training; default: RAYCHAT_BASE_DIR, else ~/.cache/raychat")
    storage_path: str = _flag("", "where the runs are kept, as in training; default: <base-dir>/runs")
    tokenizer: str = _flag("", "folder or name of the model's tokenizer, where it is not found by itself")

    @classmethod
    def add_to(cls, parser: argparse.ArgumentParser) -> None:
        """Give `parser` these flags, in a group of their own."""
        group = parser.add_argument_group("model")
        for one in dataclasses.fields(cls):
            name = f"--{one.name.replace('_', '-')}"
            group.add_argument(name, type=type(one.default), default=one.default, help=one.metadata["help"])

    @classmethod
    def of(cls, options: argparse.Namespace) -> "ModelFlags":
        """Those among the `options` that such a parser has parsed."""
        return cls(**{one.name: getattr(options, one.name) for one in dataclasses.fields(cls)})

    def find(self) -> "Source":
        """The model.

        Raises:
            ConfigError: there is nothing of the kind.
            CheckpointError: what was asked for is damaged, or cannot be reached.
            DataError: its tokenizer is not found.
        """
        from raychat.export.source import find_source

        return find_source(**dataclasses.asdict(self))
