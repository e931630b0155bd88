"""Really trains in passes of one size after the other, to see which fit the memory of a GPU.

The model and the optimizer are those of the run, but thrown away afterwards. Not yet run on a GPU.
"""

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from raychat.config import Config
from raychat.model import GPT
from raychat.model.regions import CompiledTraining
from raychat.optim import MuonAdamW
from raychat.planning.memory import SHARE
from raychat.training.device_batch import Fit, largest
from raychat.training.memory import explained, is_out_of_memory


class Meter(Protocol):
    """Bytes of a device: what this process may take of `total`, and the most that it took since `begin`."""

    total: int
    room: int

    def begin(self) -> None:
        """Give back what is not in use, and count the peak from here."""
        ...

    def peak(self) -> int:
        """Bytes in use at the peak."""
        ...


class CudaMeter:
    """A GPU, of which other processes may have taken a part. Made before the model is."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.begin()
        free, self.total = torch.cuda.mem_get_info(device)
        self.room = free + torch.cuda.memory_reserved(device)

    def begin(self) -> None:
        """Give back what is not in use, and count the peak from here."""
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self._device)

    def peak(self) -> int:
        """Bytes in use at the peak, as torch counts them."""
        torch.cuda.synchronize(self._device)
        return torch.cuda.max_memory_allocated(self._device)


@dataclass(frozen=True)
class Training:
    """A model with its optimizer, and whether the run compiles it."""

    model: GPT
    optimizer: MuonAdamW
    compiled: bool


class PassTrial:
    """Called with a number of sequences, says why a step in passes of so many does not fit; empty where it does.

    Made by all ranks together, since an update is: what it needs besides gradients does not depend on the passes.
    """

    def __init__(self, config: Config, training: Training, meter: Meter, rank_rows: int) -> None:
        self._T, self._vocab_size = config.model.max_seq_len, config.model.vocab_size
        self._training, self._meter, self._rank_rows = training, meter, rank_rows
        self._device = next(training.model.parameters()).device
        meter.begin()
        with explained("the update", self._device):
            training.optimizer.reduce_gradients()  # of zeros, where there are none
            training.optimizer.apply_updates()
        training.optimizer.zero_grad(set_to_none=True)
        self._update_peak = meter.peak()

    def __call__(self, size: int) -> str:
        """Forward and backward of one pass, and of a second where a step has several: gradients are there by then."""
        self._meter.begin()
        fits = self._fits(size)
        peak = max(self._meter.peak(), self._update_peak)
        self._training.optimizer.zero_grad(set_to_none=True)
        if self._training.compiled:  # another size is another shape, and must not make the run's code general
            torch.compiler.reset()
        if not fits:
            return "ran out of memory"
        limit = SHARE * self._meter.room
        return "" if peak <= limit else f"took {peak / 2**30:.1f} GiB, of which {limit / 2**30:.1f} are planned with"

    def _fits(self, size: int) -> bool:
        model = self._training.model
        forward = CompiledTraining(model) if self._training.compiled else model
        generator = torch.Generator(self._device).manual_seed(0)
        shape = (size, self._T + 1)
        try:
            for _ in range(2 if size < self._rank_rows else 1):
                rows = torch.randint(self._vocab_size, shape, generator=generator, device=self._device)
                loss = forward(rows[:, :-1], rows[:, 1:], reduction="sum")
                (loss / rows.numel()).backward()
                del rows, loss
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return False
        return True


def measured(
    config: Config,
    make: Callable[[], Training],
    sizes: Sequence[int],
    guess: int,
    *,
    rank_rows: int,
    meter: Meter,
) -> Fit:
    """What fits of `sizes`, tried with what `make` makes; nothing of it is left on the device."""
    lasting = meter.room >= SHARE * meter.total  # else others have a part of the memory now
    try:
        fit = largest(sizes, guess, PassTrial(config, make(), meter, rank_rows))
    finally:
        meter.begin()
    return Fit(fit.size, fit.why, lasting)
