"""How long a run will take: steps, evaluation, checkpoints, start-up and replay, each between bounds, with its source."""

from dataclasses import dataclass, field, replace

from raychat.checks import require
from raychat.config import Config
from raychat.planning.communication import StepParts
from raychat.planning.pace import body_flops, find_pace, recomputation
from raychat.planning.ranges import Range
from raychat.planning.save_interval import LEAST_STALL_S, save_interval_s
from raychat.planning.scaling import ModelShape, Recipe, param_counts
from raychat.planning.target import Target, plan_compiled

ZERO = Range.exactly(0.0)

# Forward passes of evaluation, a third of a training pass's FLOPs, at so much of its rate. GPU: 41.9 M tokens of d10 in
# about 70 s on an A100 (document 004) are 31.7% of the peak against 47.0% in training. CPU: `make demo`, docs/evaluation.md.
EVALUATION_RATE = {"cuda": Range(0.54, 0.67, 0.80), "cpu": Range(0.70, 0.87, 1.05)}
CORE_TASKS, CORE_ITEMS = 22, 91_000  # tasks of the metric, and about how many items they have together
# 440 items on d4 took 16.5 s on 2 cores without the head's FLOPs (docs/evaluation.md): tokens an item, at the rate of training.
CORE_TOKENS = Range(200, 400, 800)
# Not compiled, passes of every size; cuda assumed.
CORE_RATE = {"cuda": Range(0.08, 0.25, 0.5), "cpu": Range(0.7, 1.0, 1.2)}

BYTES_A_PARAMETER, BYTES_OF_MOMENTS = 12, 8  # float32 weights and two moments, as raychat.training.checkpoint estimates
# Bytes per second: into host memory (25 and 3.6 measured on a CPU; PCIe between), and to storage: a disk or a shared file
# system, an object store. Assumed, but for 0.5 to 0.8 GB/s of a local disk.
COPY = Range(3e9, 8e9, 20e9)
STORAGE = {"files": Range(0.15e9, 0.5e9, 2e9), "objects": Range(0.05e9, 0.2e9, 1e9)}

START = Range(9, 14, 24)  # seconds from the command to the first step: 14.0 measured on a CPU (docs/faults.md)
START_GPU = Range(10, 20, 45)  # the same with CUDA's and nccl's own, assumed
COMPILE = {"cuda": Range(30, 60, 120), "cpu": Range(5, 30, 80)}  # cuda: estimate; cpu: 7 s cached, 54 s cold
# From a failure to the next first step: 9.5 to 21.5 measured (docs/faults.md), without compiling.
RECOVERY = Range(8, 12, 25)

TOKENIZER_S_A_CHAR = {"cuda": Range(35e-9, 45e-9, 75e-9), "cpu": Range(45e-9, 60e-9, 100e-9)}
TOKENIZER_START = Range(0.5, 1.5, 4.0)  # the process
TOKENIZING_S_A_TOKEN = Range(0.25e-6, 0.30e-6, 0.50e-6)  # CPU seconds on one core, measured end to end
CHARS_PER_TOKEN = Range(3.5, 4.3, 5.0)
# Tokenized over trained, where the corpus's size is not known: packing loses some.
TOKENS_FOR_A_RUN = Range(1.0, 1.3, 2.0)
CORES_A_GPU = Range(4, 8, 24)  # of a machine that was not named, assumed
DOWNLOAD = Range(25e6, 100e6, 500e6)  # bytes per second, assumed
BYTES_A_CHAR = 0.37  # of ClimbMix's parquet files


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a short real run found; None: not measured. It replaces what would be forecast."""

    step_s: float | None = None
    peak_memory_bytes: int | None = None
    save_s: float | None = None
    save_stall_s: float | None = None
    eval_tok_per_sec: float | None = None
    """tokens per second of all ranks together"""
    startup_s: float | None = None
    step_spread: float = 0.03
    """how far step times lay apart, as a share of `step_s`"""


@dataclass(frozen=True, kw_only=True)
class TimeForecast:
    """Seconds of a whole run by part. `sources` says in words where each part comes from, by the field's name."""

    startup: Range
    """cluster, imports, compilation"""
    tokenizer: Range
    tokenizing: Range
    """with the download of the corpus, where it is one that is downloaded"""
    steps: Range
    evaluation: Range
    """all evaluations of bits per byte and CORE that training waits for"""
    checkpoints: Range
    """training stands still for saves"""
    replay: Range
    """expected from preemptions: lost steps and recoveries"""
    step_s: Range
    """one step"""
    eval_s: Range
    """one evaluation of bits per byte"""
    evaluations: int
    """of bits per byte, in the whole run"""
    saves: Range
    """checkpoints in the whole run"""
    tok_per_sec: Range
    mfu: Range | None
    """percent; None on CPU, and where the peak is not known"""
    parts: StepParts | None
    """of one step; None as `mfu`"""
    sources: dict[str, str] = field(default_factory=dict)

    @property
    def undisturbed(self) -> Range:
        """The whole run without preemptions."""
        parts = (self.startup, self.tokenizer, self.tokenizing, self.steps, self.evaluation, self.checkpoints)
        return Range.total(parts)

    @property
    def total(self) -> Range:
        """The whole run."""
        return self.undisturbed + self.replay


@dataclass(frozen=True, kw_only=True)
class _Job:
    """What all parts are computed from. `rate`: training's FLOPs per second of all devices together."""

    config: Config
    recipe: Recipe
    shape: ModelShape
    target: Target
    measured: Measured
    rate: Range
    sources: dict[str, str]

    @property
    def forward_rate(self) -> Range:
        """The same for evaluation, which never computes anything twice."""
        return self.rate.scaled(recomputation(self.config, self.recipe, self.shape))


def forecast_time(
    config: Config,
    recipe: Recipe,
    shape: ModelShape,
    target: Target,
    *,
    tokens_ready: bool,
    tokenizer_ready: bool,
    corpus_chars: float | None,
    measured: Measured | None = None,
) -> TimeForecast | None:
    """The time of the run on `target`; None when nothing is known of its device and no step was measured.

    `corpus_chars` is the size of the files that will be tokenized, None where it is not known.
    """
    measured, sources = measured or Measured(), dict[str, str]()
    known = Range.around(measured.step_s, max(0.03, measured.step_spread)) if measured.step_s else None
    pace = find_pace(config, recipe, shape, target, known, sources)
    if pace is None:
        return None
    step_s = pace.step_s
    job = _Job(
        config=config, recipe=recipe, shape=shape, target=target, measured=measured, rate=pace.rate, sources=sources
    )
    tok_per_sec = step_s.under(float(recipe.total_batch_size))
    eval_s = _one_evaluation(job)
    steps, evaluation = step_s.scaled(recipe.num_iterations), _evaluation(job, eval_s)
    saves, interval_s = _saves(job, step_s)
    forecast = TimeForecast(
        startup=_startup(job),
        tokenizer=ZERO if tokenizer_ready else _tokenizer(job, corpus_chars),
        tokenizing=ZERO if tokens_ready else _tokenizing(job, corpus_chars),
        steps=steps,
        evaluation=evaluation,
        checkpoints=_checkpoints(job, saves),
        replay=ZERO,
        step_s=step_s,
        eval_s=eval_s,
        evaluations=evaluations(config.eval.eval_every, recipe.num_iterations),
        saves=saves,
        tok_per_sec=tok_per_sec,
        mfu=tok_per_sec.scaled(100 * recipe.flops_per_token / (target.peak.flops * target.workers))
        if target.peak
        else None,
        parts=pace.parts,
        sources=sources,
    )
    return replace(forecast, replay=_replay(job, forecast, interval_s))


def evaluations(every: int, steps: int) -> int:
    """How often bits per byte are evaluated: at step 0, at each multiple of `every`, and at the last step; -1: never."""
    return (steps - 1) // every + 2 if every > 0 else 0


def _one_evaluation(job: _Job) -> Range:
    tokens = job.config.eval.eval_tokens // job.shape.sequence_len * job.shape.sequence_len
    if job.measured.eval_tok_per_sec:
        job.sources["evaluation"] = f"measured: {job.measured.eval_tok_per_sec:,.0f} tokens/s"
        return Range.around(tokens / job.measured.eval_tok_per_sec, 0.05)
    factor = EVALUATION_RATE[job.target.device]
    known = "document 004: 41.9 M tokens in 70 s" if job.target.device == "cuda" else "measured: make demo"
    job.sources["evaluation"] = (
        f"a third of training's FLOPs at {factor.mid:.0%} of its rate ({known}); --eval-tokens at most"
    )
    rate = job.forward_rate.times(factor)
    if job.config.precision.fp8:  # evaluation is never in fp8
        rate = rate.times(Range(0.8, 0.85, 1.0))
    return rate.under(job.recipe.flops_per_token / 3 * tokens)


def _evaluation(job: _Job, eval_s: Range) -> Range:
    settings, steps = job.config.eval, job.recipe.num_iterations
    if settings.eval_workers:  # besides training, but for that of step 0 and the wait for the last one
        job.sources["evaluation"] += "; others evaluate, training waits at step 0 and at the end"
        return eval_s.scaled(min(2, evaluations(settings.eval_every, steps)))
    return eval_s.scaled(evaluations(settings.eval_every, steps)) + _core(job)


def _core(job: _Job) -> Range:
    """All evaluations of CORE; none without its tasks."""
    settings, steps = job.config.eval, job.recipe.num_iterations
    every = settings.core_metric_every
    there = bool(settings.core_bundle) or (job.config.base_dir / "core_bundle").exists()
    if every <= 0 or not there:
        return ZERO
    cap = settings.core_metric_max_per_task
    items = CORE_ITEMS if cap == -1 else min(CORE_ITEMS, CORE_TASKS * cap)
    rate = job.forward_rate.times(CORE_RATE[job.target.device])
    work = CORE_TOKENS.scaled(items * body_flops(job.recipe, job.shape) / 3)
    once = Range(work.low / rate.high, work.mid / rate.mid, work.high / rate.low)
    count = -(-steps // every)  # at multiples of it, not at step 0, and at the last one
    job.sources["core"] = f"{count} x {items:,} items of some 400 tokens, not compiled: an estimate"
    return once.scaled(count)


def _saves(job: _Job, step_s: Range) -> tuple[Range, Range]:
    """Checkpoints in the whole run, and seconds of training between two that are due. At most one follows a step."""
    settings, iterations = job.config.save, job.recipe.num_iterations
    steps = step_s.scaled(iterations)
    if settings.save_every == -1:
        return Range.exactly(1), steps
    # Besides those that are due by time or step: the last one, and one at each evaluation that finds a new lowest value.
    found = evaluations(job.config.eval.eval_every, iterations)
    besides = Range(1, max(1, found), found + 1)
    if settings.save_every == "auto":
        stall = _stall(job)
        wanted = [save_interval_s(max(x, LEAST_STALL_S)) for x in stall.as_list()]
        interval = Range(*(max(pair) for pair in zip(wanted, step_s.as_list(), strict=True)))
        due = (steps.low / interval.high, steps.mid / interval.mid, steps.high / interval.low)
        saves = besides + Range(*(min(x, iterations) for x in due))
        return Range(*(min(x, iterations + 1) for x in saves.as_list())), interval
    every = min(settings.save_every, iterations)
    return besides + Range.exactly(iterations // settings.save_every), step_s.scaled(every)


def _stall(job: _Job) -> Range:
    """Seconds that training stands still for a save: the copy into host memory, or all of it with `sync`."""
    if job.config.save.save_mode == "sync":
        return _whole_save(job)
    if job.measured.save_stall_s is not None:
        return Range.around(job.measured.save_stall_s, 0.3)
    params = param_counts(job.shape).total
    first_rank = params * (BYTES_A_PARAMETER - BYTES_OF_MOMENTS + BYTES_OF_MOMENTS / job.target.workers)
    return COPY.under(first_rank)


def _whole_save(job: _Job) -> Range:
    if job.measured.save_s is not None:
        return Range.around(job.measured.save_s, 0.3)
    size = param_counts(job.shape).total * BYTES_A_PARAMETER
    return STORAGE["objects" if "://" in job.config.run.storage_path else "files"].under(size)


def _checkpoints(job: _Job, saves: Range) -> Range:
    """The stalls of all saves, and the last one whole: the run waits for it."""
    size = param_counts(job.shape).total * BYTES_A_PARAMETER
    known = job.measured.save_stall_s is not None
    job.sources["checkpoints"] = (
        "measured: one save"
        if known
        else f"{size / 1e9:.2g} GB; copied at 3 to 20 GB/s, the last one written at the storage's rate: assumed"
    )
    before = Range(*(max(0.0, x - 1) for x in saves.as_list()))
    return _stall(job).times(before) + _whole_save(job)


def _startup(job: _Job) -> Range:
    if job.measured.startup_s is not None:
        job.sources["startup"] = f"measured: {job.measured.startup_s:.3g} s"
        return Range.around(job.measured.startup_s, 0.2)
    cuda, compiled = job.target.device == "cuda", plan_compiled(job.config, job.target)
    start = START_GPU if cuda else START
    job.sources["startup"] = "estimate for a GPU" if cuda else "measured: 14 s on a CPU"
    if not compiled:
        return start
    job.sources["startup"] += ", and compilation"
    return start + COMPILE[job.target.device]


def _tokenizer(job: _Job, corpus_chars: float | None) -> Range:
    most = job.config.data.tok_max_chars
    if corpus_chars is None:
        chars = Range(0, min(most, job.recipe.tokens * CHARS_PER_TOKEN.mid), most)
    else:
        chars = Range.exactly(min(most, corpus_chars))
    known = "1e9 characters in 45 s, document 004" if job.target.device == "cuda" else "20 MB in 1.2 s"
    job.sources["tokenizer"] = f"{chars.mid:.2g} characters ({known}); nothing when it is there"
    return chars.times(TOKENIZER_S_A_CHAR[job.target.device]) + TOKENIZER_START


def _tokenizing(job: _Job, corpus_chars: float | None) -> Range:
    known = CHARS_PER_TOKEN.under(corpus_chars) if corpus_chars is not None else None
    tokens = known or TOKENS_FOR_A_RUN.scaled(job.recipe.tokens)
    target = job.target
    cores = Range.exactly(target.cores * target.machines) if target.cores else CORES_A_GPU.scaled(target.workers)
    assumed = "" if target.cores else " (8 a GPU, assumed)"
    job.sources["tokenizing"] = (
        f"{tokens.mid / 1e6:,.0f} M tokens at 0.3 CPU seconds a million on {cores.mid:.0f} cores{assumed}"
    )
    work = tokens.times(TOKENIZING_S_A_TOKEN)
    done = Range(work.low / cores.high, work.mid / cores.mid, work.high / cores.low)
    if job.config.data.corpus == "climbmix" or (not job.config.data.corpus and target.device == "cuda"):
        size = BYTES_A_CHAR * (corpus_chars or tokens.mid * CHARS_PER_TOKEN.mid)
        job.sources["tokenizing"] += f", and {size / 1e9:.1f} GB downloaded at 25 to 500 MB/s, assumed"
        done += DOWNLOAD.under(size)
    return done


def _replay(job: _Job, forecast: TimeForecast, interval: Range) -> Range:
    """Expected: preemptions of any machine, times half an interval between saves and a recovery.

    Replay is itself disturbed: with x lost per second of progress, the whole takes 1 / (1 - x) times as long.
    """
    rate = job.config.plan.preemptions_per_hour * job.target.machines / 3600
    if not rate:
        return ZERO
    recovery = RECOVERY + (COMPILE[job.target.device] if plan_compiled(job.config, job.target) else ZERO)
    # A notice in time leaves no step to redo; at worst the one before the next save is lost.
    lost = Range(0.0, interval.mid / 2, interval.high) + recovery
    shares = lost.scaled(rate)
    require(
        shares.mid < 1,
        f"--preemptions-per-hour {job.config.plan.preemptions_per_hour:g} on {job.target.machines} machines loses more time "
        f"than it leaves ({lost.mid:.0f} s each): such a run does not end. Use fewer machines, or a lower --save-every.",
    )
    job.sources["replay"] = (
        f"{rate * 3600:g} preemptions an hour, {lost.mid:.0f} s each: half a save interval and a recovery"
    )
    parts = zip(forecast.undisturbed.as_list(), shares.as_list(), strict=True)
    return Range(*(seconds * share / (1 - min(share, 0.9)) for seconds, share in parts))
