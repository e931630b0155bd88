"""How long a run will take: steps, evaluation, checkpoints, start-up and replay, each between bounds."""

from dataclasses import dataclass, field

from raychat.planning.ranges import Range


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a short real run found; None: not measured. It replaces what would be forecast."""

    step_s: float | None = None
    peak_memory_bytes: int | None = None
    save_s: float | None = None
    save_stall_s: float | None = None
    eval_tok_per_sec: float | None = None
    startup_s: float | None = None
    step_spread: float = 0.03
    """how far step times lay apart, as a share of `step_s`"""


@dataclass(frozen=True, kw_only=True)
class TimeForecast:
    """Seconds of a whole run by part. `sources` says in words where each part comes from."""

    startup: Range
    """cluster, imports, compilation"""
    tokenizer: Range
    tokenizing: Range
    steps: Range
    evaluation: Range
    """all evaluations of bits per byte and CORE"""
    checkpoints: Range
    """training stands still for saves"""
    replay: Range
    """expected from preemptions: lost steps and recoveries"""
    step_s: Range
    """one step"""
    eval_s: Range
    """one evaluation of bits per byte"""
    tok_per_sec: Range
    mfu: Range | None
    """percent; None on CPU"""
    sources: dict[str, str] = field(default_factory=dict)

    @property
    def total(self) -> Range:
        """The whole run."""
        return Range.total(
            [
                self.startup,
                self.tokenizer,
                self.tokenizing,
                self.steps,
                self.evaluation,
                self.checkpoints,
                self.replay,
            ]
        )
