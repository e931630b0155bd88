"""Evaluates one model on the ranks of a world: bits per byte, CORE, samples. In training, beside it, or long after it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from raychat.config import Config
from raychat.data.tokenizer import Tokenizer
from raychat.evaluation.bpb import BitsPerByte
from raychat.evaluation.core import Bundle, CoreResult, evaluate_core, load_bundle
from raychat.evaluation.samples import DEFAULT_PROMPTS, samples
from raychat.model import GPT
from raychat.training.memory import explained
from raychat.training.world import World

Echo = Callable[[str], None]
Between = Callable[[], bool]
"""asked by every rank between batches, equally often; True on all of them: give up"""


@dataclass(frozen=True, kw_only=True)
class Validation:
    """The validation rows of a world. `passes`: those of this rank; `rounds`: how many the rank with the most has."""

    passes: Callable[[], Iterator[np.ndarray]]
    rounds: int


@dataclass(frozen=True, kw_only=True)
class CoreTasks:
    """Where the CORE tasks come from, how many items of each are used (-1: all), and rows of a pass (None: by the device)."""

    place: str
    cache: Path
    max_per_task: int
    batch_rows: int | None = None

    @staticmethod
    def of(config: Config) -> "CoreTasks | None":
        """Those of a run: the bundle that was asked for, else the one in the base directory; None where there is none."""
        default = config.base_dir / "core_bundle"
        place = config.eval.core_bundle or (str(default) if default.is_dir() else "")
        if config.eval.core_metric_every == -1 or not place:
            return None
        return CoreTasks(
            place=place, cache=config.base_dir / "core_bundles", max_per_task=config.eval.core_metric_max_per_task
        )

    def load(self, echo: Echo) -> Bundle:
        """The tasks, downloaded where the place is a URL and that was not done before.

        Raises:
            ConfigError: there is nothing of the kind at the place, or so few items cannot be evaluated.
            DataError: a task is missing or malformed.
        """
        return load_bundle(self.place, self.cache, echo).cut(self.max_per_task)


class Examiner:
    """Every rank of `world` has one, of the same model, and makes the same calls. fp8 layers compute in high precision."""

    def __init__(
        self,
        model: GPT,
        tokenizer: Tokenizer,
        world: World,
        *,
        validation: Validation | None,
        core: CoreTasks | None,
        echo: Echo = lambda line: None,
    ) -> None:
        self.model, self.tokenizer, self.world = model, tokenizer, world
        self.device = next(model.parameters()).device
        self._token_bytes = torch.as_tensor(tokenizer.token_bytes, device=self.device)
        self._validation, self._core, self._echo = validation, core, echo
        self._bundle: Bundle | None = None

    def bpb(self, between: Between = lambda: False) -> float | None:
        """Bits per byte on the validation rows; None when `between` says to give up."""
        if self._validation is None:
            raise ValueError("there are no validation rows")
        passes = self._validation.passes()
        meter = BitsPerByte(self.model, self._token_bytes, self.device)
        # In chunks: the full float32 logits of a batch that fits in training would not fit here, uncompiled.
        loss_impl, self.model.loss_impl = self.model.loss_impl, "chunked"
        try:
            for _ in range(self._validation.rounds):  # a rank that has no rows left is still asked
                if (rows := next(passes, None)) is not None:
                    with explained("the evaluation", self.device):
                        meter.add(torch.from_numpy(rows.astype(np.int32)))
                if between():
                    return None
        finally:
            self.model.loss_impl = loss_impl
        return meter.total()

    def core(self, between: Between = lambda: False) -> CoreResult | None:
        """CORE, the same on all ranks; None when `between` says to give up. The first call reads the tasks."""
        if self._core is None:
            raise ValueError("there are no CORE tasks")
        if self._bundle is None:
            self._bundle = self._core.load(self._echo)
        rows = self._core.batch_rows
        with explained("the evaluation of CORE", self.device):
            return evaluate_core(
                self.model,
                self.tokenizer,
                self._bundle,
                max_per_task=self._core.max_per_task,
                world=self.world,
                batch_tokens=rows and rows * self.model.config.sequence_len,
                between=between,
                echo=self._echo,
            )

    def samples(self) -> list[tuple[str, str]]:
        """Prompts and what the model makes of each, prompt included; only rank 0 computes, and others have none."""
        if self.world.rank != 0:
            return []
        return list(zip(DEFAULT_PROMPTS, samples(self.model, self.tokenizer), strict=True))


def check_core(config: Config, tasks: CoreTasks | None, echo: Echo) -> None:
    """Read the CORE tasks of a run before it begins, or say that there are none.

    Raises:
        ConfigError, DataError: they cannot be used.
    """
    if tasks is not None:
        tasks.load(echo)
    elif config.eval.core_metric_every > 0:
        echo(
            f"note: CORE is not evaluated: there is no {config.base_dir / 'core_bundle'}. Give --core-bundle (a folder, or "
            "the URL of a zip or tar) to have it, or --core-metric-every -1 to be rid of this line"
        )
