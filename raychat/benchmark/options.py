"""What a benchmark is told besides the configuration of the run that it measures. No torch: `--help` does not wait."""

from dataclasses import dataclass

from raychat.checks import require
from raychat.config import Config
from raychat.planning import recipe

DEFAULT_STEPS = 20


@dataclass(frozen=True, kw_only=True)
class Options:
    """`steps`: -1 for the horizon that --num-iterations sets, else DEFAULT_STEPS. Empty names: not asked for."""

    steps: int = -1
    rows: str = ""
    init: str = ""
    profile: str = ""

    def __post_init__(self) -> None:
        require(self.steps > 0 or self.steps == -1, f"--steps must be 1 or more, got {self.steps}.")


def prepared(config: Config, world_size: int) -> Config:
    """`config` as it is measured: nothing but steps, and one pass of every rank a step unless a total batch is given."""
    T, size = config.model.max_seq_len, config.batch.device_batch_size
    total = config.batch.total_batch_size
    if total == -1:
        require(
            size != "auto",
            "--device-batch-size auto needs --total-batch-size here: a step of the benchmark is one pass unless that is given.",
        )
        total = config.batch.sequences * T * world_size
    return Config.from_flat(
        {
            "total_batch_size": total,
            "run": "dummy",
            "eval_every": -1,
            "core_metric_every": -1,
            "sample_every": -1,
            "save_every": -1,
            "log_every": 1,
        },
        base=config,
    )


def steps_of(config: Config, options: Options) -> int:
    """Steps to run, which the horizon bounds: the rates follow the schedule of the whole run."""
    horizon = recipe(config).num_iterations
    if options.steps == -1:
        return horizon if config.horizon.num_iterations > 0 else min(DEFAULT_STEPS, horizon)
    require(
        options.steps <= horizon,
        f"--steps {options.steps} is beyond the horizon of {horizon} steps. Give --num-iterations {options.steps} or more.",
    )
    return options.steps
