"""Where the time of a step goes: torch's profiler, and its events added up by part of the model.

Forward operations lie inside the range of their part. A backward operation carries the sequence number of the forward
operation that it belongs to, which is how it finds its part.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function

from raychat.model import GPT
from raychat.model.gpt import MLP, Attention
from raychat.optim import MuonAdamW
from raychat.training.feed import Feed, Passes
from raychat.training.loop import Trainer

STEPS = 3  # the last so many steps are taken apart
PREFIX = "raychat: "
STREAM = "embeddings, residual stream"
HEAD = "head and loss"
OPTIMIZER = "optimizer"
EXCHANGE = "gradient norm, communication"
DATA = "data"
ATTENTION, MLP_PART = "attention", "MLP"
OTHER = "everything else"
BACKWARD = "autograd::engine::evaluate_function"


class PartsProfiler:
    """Takes the last steps of a run apart. `finish` writes the trace and prints the parts."""

    def __init__(self, folder: Path, model: GPT, optimizer: MuonAdamW) -> None:
        self.folder, self.optimizer = folder, optimizer
        folder.mkdir(parents=True, exist_ok=True)
        activities = [ProfilerActivity.CPU]
        if next(model.parameters()).is_cuda:
            activities.append(ProfilerActivity.CUDA)
        self._profile = profile(activities=activities, acc_events=True)
        self._steps = 0
        _name_parts(model)

    def attach(self, trainer: Trainer) -> None:
        """Name what is outside of the model: data, the exchange of gradients, the update."""
        optimizer = trainer.optimizer
        optimizer.reduce_gradients = _named(EXCHANGE, optimizer.reduce_gradients)
        optimizer.apply_updates = _named(OPTIMIZER, optimizer.apply_updates)
        trainer.feed = _NamedFeed(trainer.feed)

    @contextmanager
    def watch(self, step: int, steps: int) -> Iterator[None]:
        """The profiler is on in the last steps."""
        first = max(min(1, steps - 1), steps - STEPS)  # not in the first, which warms up, unless there is no other
        if step == first:
            self._profile.__enter__()
        try:
            yield
            self._steps += step >= first
        finally:
            if step == steps - 1:
                self._profile.__exit__(None, None, None)

    def finish(self, echo: Callable[[str], None]) -> dict[str, float]:
        """Milliseconds of a step by part; the trace is written beside."""
        trace = self.folder / "trace.json.gz"
        self._profile.export_chrome_trace(str(trace))
        parts = {name: ms / self._steps for name, ms in time_by_part(self._profile.events() or ()).items()}
        whole = sum(parts.values())
        echo(f"\ntime of a step by part, mean of {self._steps} steps under the profiler, which slows them down")
        for name, ms in sorted(parts.items(), key=lambda part: -part[1]):
            echo(f"  {name:<30} {ms:10.2f} ms  {100 * ms / whole:5.1f}%")
        echo(f"trace: {trace} (open it in https://ui.perfetto.dev or chrome://tracing)\n")
        return parts


def time_by_part(events: Iterable[FunctionEvent]) -> dict[str, float]:
    """Milliseconds that the operations of each part took themselves: on the device where one was used, else on the CPU."""
    operations = [event for event in events if event.device_type == torch.autograd.DeviceType.CPU]
    on_device = any(event.self_device_time_total for event in operations)
    part_of_sequence: dict[int, str] = {}
    for event in operations:
        part = _range_of(event)
        if part and event.sequence_nr >= 0 and _backward_of(event) is None:
            part_of_sequence[event.sequence_nr] = part
    times: defaultdict[str, float] = defaultdict(float)
    for event in operations:
        spent = event.self_device_time_total if on_device else event.self_cpu_time_total
        backward = _backward_of(event)
        part = _range_of(event) or (part_of_sequence.get(backward.sequence_nr) if backward else None)
        times[part or OTHER] += spent / 1000
    return dict(times)


def _chain(event: FunctionEvent | None) -> Iterator[FunctionEvent]:
    """The event and those that it lies in."""
    while event is not None:
        yield event
        event = event.cpu_parent


def _range_of(event: FunctionEvent) -> str | None:
    """The innermost named part around an event."""
    return next((found.name.removeprefix(PREFIX) for found in _chain(event) if found.name.startswith(PREFIX)), None)


def _backward_of(event: FunctionEvent) -> FunctionEvent | None:
    """The node of the backward pass that an event is a piece of."""
    return next((found for found in _chain(event) if found.name.startswith(BACKWARD)), None)


def _name_parts(model: GPT) -> None:
    """Ranges around the parts of every forward pass. What lies behind the last block is the head."""
    blocks = list(model.transformer["h"].children())
    stack = ExitStack()
    _around(model, STREAM, stack)
    for block in blocks:
        for part in block.modules():
            if isinstance(part, Attention | MLP):
                _around(part, ATTENTION if isinstance(part, Attention) else MLP_PART, ExitStack())

    def behind(module: nn.Module, args: Any, output: Any) -> None:
        stack.enter_context(record_function(PREFIX + HEAD))  # closed with the model's own range

    blocks[-1].register_forward_hook(behind)


def _around(module: nn.Module, part: str, stack: ExitStack) -> None:
    def enter(module: nn.Module, args: Any) -> None:
        stack.enter_context(record_function(PREFIX + part))

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        stack.close()

    module.register_forward_pre_hook(enter)
    module.register_forward_hook(leave)


def _named(part: str, call: Callable[[], Any]) -> Callable[[], Any]:
    def named() -> Any:
        with record_function(PREFIX + part):
            return call()

    return named


class _NamedFeed(Feed):
    def __init__(self, feed: Feed) -> None:
        self._feed = feed

    def __next__(self) -> Passes:
        with record_function(PREFIX + DATA):
            return next(self._feed)

    def close(self) -> None:
        self._feed.close()
