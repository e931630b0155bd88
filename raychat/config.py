"""Everything a run can be told, as frozen dataclasses that refuse what cannot be.

The docstring under a field is its help text. Flags are flat (`--matrix-lr`), fields are grouped
(`config.optim.matrix_lr`); names are unique over all groups. -1 disables or leaves to the scaling laws, as each field
says. What needs a machine (devices, files, cluster) is checked where the machine is known.
"""

import dataclasses
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from raychat.checks import check_batch, did_you_mean, not_negative, positive, positive_or_minus_one, require
from raychat.errors import ConfigError
from raychat.uris import check_place, public_uri

DEFAULT_WARMUP_STEPS = 40
OBJECT_STORES = ("s3", "gs")
BESIDE_RUNS = ("tokens", "tokenizers")
NUMBER_OR_AUTO = ("device_batch_size", "save_every", "num_workers")


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    run: str = ""
    """name of the MLflow run; default: the model tag; `dummy` turns tracking off"""
    model_tag: str = ""
    """name of the run directory; default: d{depth}"""
    preset: str = ""
    """presets to start from, later ones over earlier ones: `a100_d10` or `d4-cpu,my.toml`"""
    base_dir: str = ""
    """where everything is kept; default: RAYCHAT_BASE_DIR, else ~/.cache/raychat"""
    storage_path: str = ""
    """where the runs are kept: a folder that all nodes share, or s3:// or gs://, which then has token shards and tokenizers
    besides; default: RAYCHAT_STORAGE_PATH, else <base-dir>/runs"""
    seed: int = 42
    """seed of the initial weights and of the data order"""
    init_from: str = ""
    """exported directory whose weights a new run begins with; default: random ones from the seed"""
    perturbation: int = 0
    """changes the last bit of some initial weights, another set for each number: what a repeat differs by; 0: none"""
    stop_at: int = -1
    """save and stop at this step, in the middle of the schedule; -1: at the horizon"""
    mlflow_parent: str = ""
    """MLflow run that this one is shown under, as the trials of a search are"""
    log_every: int = 1
    """steps between log lines"""
    resume_from_step: int = -1
    """go back to the checkpoint of this step and train on from there with the rates given now; -1: newest"""
    fresh: bool = False
    """start over in a new run directory, even when this one holds checkpoints"""
    allow_config_change: bool = False
    """continue with other rates, decay, schedule, horizon, batch or precision than the run was started with"""
    force: bool = False
    """run even where it would take unreasonably long, as a GPU-sized run on a CPU would"""
    tracking_uri: str = ""
    """MLflow tracking server or store; default: MLFLOW_TRACKING_URI, else sqlite under the base directory"""
    experiment: str = "raychat"
    """MLflow experiment"""
    on_event: str = ""
    """command that the shell runs when the run has stopped, failed or finished; RAYCHAT_EVENT says which"""
    upload_checkpoint: bool = False
    """log the last checkpoint to MLflow as an artifact"""
    dry_run: bool = False
    """print the plan, write plan.json, and stop"""
    dry_run_steps: int = -1
    """really train so many steps, beside the run, and print the plan with what was measured; alone: 20; -1: off"""

    def __post_init__(self) -> None:
        positive(self, "log_every")
        positive_or_minus_one(self, "dry_run_steps", "stop_at")
        not_negative(self, "perturbation")
        require(0 <= self.seed < 2**63, f"--seed must be at least 0 and below 2**63, got {self.seed}.")
        require(self.resume_from_step >= -1, f"--resume-from-step must be a step, or -1, got {self.resume_from_step}.")
        require(
            not (self.fresh and self.resume_from_step >= 0),
            "--fresh starts over and --resume-from-step goes back: give one of them.",
        )
        for flag, value in (("model-tag", self.model_tag), ("run", self.run)):
            require(
                re.fullmatch(r"[\w.@+-]*", value) is not None and value not in (".", ".."),
                f"--{flag} {value!r} names a folder: use letters, digits, '.', '_' and '-', for example d12-test.",
            )
        require(
            "://" not in self.base_dir,
            f"--base-dir {self.base_dir!r} is no folder of a file system: give a folder that all nodes share, and the "
            "object store as --storage-path.",
        )
        check_place(self.storage_path)
        scheme = self.storage_path.partition("://")[0] if "://" in self.storage_path else "s3"
        require(
            scheme in OBJECT_STORES,
            f"--storage-path {scheme}://... is of a kind that raychat cannot keep runs in: give a folder, or a URI that "
            f"begins with {' or '.join(f'{name}://' for name in OBJECT_STORES)}.",
        )


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    depth: int = 20
    """number of Transformer blocks: the one dial; everything else follows from it"""
    aspect_ratio: int = 64
    """model_dim = depth * aspect_ratio, rounded up to a multiple of head_dim"""
    head_dim: int = 128
    """channels per attention head; even, because rotary embedding pairs its halves"""
    num_kv_heads: int = -1
    """key and value heads, a divisor of the heads (grouped-query attention); -1: as many as heads"""
    max_seq_len: int = 2048
    """context length T, tokens"""
    window_pattern: str = "SSSL"
    """attention window per block, tiled over depth: L = full context, S = short window; the last block is always L"""
    short_window_ratio: float = 0.25
    """an S window as a share of the context, rounded up to 128 tokens (0.5: the older meaning of S)"""
    vocab_size: int = 32768
    """tokens of the vocabulary, nine special tokens included"""

    def __post_init__(self) -> None:
        positive(self, "depth", "aspect_ratio", "head_dim", "max_seq_len")
        positive_or_minus_one(self, "num_kv_heads")
        require(
            self.head_dim % 2 == 0,
            f"--head-dim must be even, because rotary embedding turns pairs of channels, got {self.head_dim}; "
            f"use {self.head_dim + 1}.",
        )
        unknown = sorted(set(self.window_pattern.upper()) - set("SL"))
        require(
            bool(self.window_pattern) and not unknown,
            f"--window-pattern {self.window_pattern!r} has {', '.join(map(repr, unknown)) or 'no letters'}: each letter is "
            "L (full context) or S (short window), for example SSSL.",
        )
        require(
            0 < self.short_window_ratio <= 1,
            f"--short-window-ratio must be above 0 and at most 1, got {self.short_window_ratio}.",
        )
        require(
            265 <= self.vocab_size <= 2**31,
            "--vocab-size must be at least 265 (256 bytes and nine special tokens) and at most 2**31, "
            f"got {self.vocab_size}.",
        )
        require(
            self.model_dim >= 24,
            f"--depth {self.depth} x --aspect-ratio {self.aspect_ratio} gives {self.model_dim} channels, and the smear gate "
            "reads 24: raise --aspect-ratio or --head-dim.",
        )
        require(
            self.num_kv_heads == -1 or self.num_heads % self.num_kv_heads == 0,
            f"--num-kv-heads {self.num_kv_heads} does not divide the {self.num_heads} heads of this model.",
        )

    @property
    def model_dim(self) -> int:
        """Channels: depth * aspect_ratio, rounded up to whole heads."""
        return -(-self.depth * self.aspect_ratio // self.head_dim) * self.head_dim

    @property
    def num_heads(self) -> int:
        """Query heads."""
        return self.model_dim // self.head_dim


@dataclass(frozen=True, kw_only=True)
class PrecisionSettings:
    device_type: Literal["", "cuda", "cpu", "mps"] = ""
    """device to train on; default: cuda where there is one, else cpu (mps is accepted and untested)"""
    dtype: Literal["auto", "bfloat16", "float32", "float16"] = "auto"
    """compute dtype; auto: bfloat16 where the hardware multiplies it, else float32 (float16 scales its loss)"""
    fp8: bool = False
    """train the large linear layers in 8-bit floats (needs a capable GPU)"""
    fp8_recipe: Literal["tensorwise", "rowwise"] = "tensorwise"
    """scaling of the 8-bit floats: tensorwise is faster, rowwise more accurate"""
    loss: Literal["auto", "full", "chunked"] = "auto"
    """cross entropy over all logits at once, or in chunks that need less memory; auto: chunked on a CPU"""
    attention: Literal["auto", "sdpa", "flash", "varlen", "flex"] = "auto"
    """attention back-end: torch's own, flash attention of any version, torch's packed rows, FlexAttention; auto: the fastest
    of those that work, timed on the GPU at the start of the first run of its kind"""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile; auto: on with CUDA, and on a CPU for runs that are long enough for it to pay"""
    grad_checkpoint: bool = False
    """keep only the input of each block and compute the rest again in the backward pass: less memory, more time"""


@dataclass(frozen=True, kw_only=True)
class HorizonSettings:
    num_iterations: int = -1
    """optimizer steps; -1: from target_flops, else from the data ratio"""
    target_flops: float = -1.0
    """FLOPs to spend in the whole run; -1: off"""
    target_param_data_ratio: float = 12.0
    """training tokens per scaling parameter (block matrices and lm_head)"""

    def __post_init__(self) -> None:
        positive_or_minus_one(self, "num_iterations", "target_flops", "target_param_data_ratio")
        require(
            max(self.num_iterations, self.target_flops, self.target_param_data_ratio) > 0,
            "Nothing says how long to train: give --num-iterations, --target-flops or --target-param-data-ratio.",
        )
        for name, most in (("target_flops", 1e30), ("target_param_data_ratio", 1e6)):
            value = getattr(self, name)
            require(value <= most, f"--{name.replace('_', '-')} must be at most {most:g}, got {value:g}.")


@dataclass(frozen=True, kw_only=True)
class BatchSettings:
    device_batch_size: Literal["auto"] | int = 32
    """sequences per forward pass on one device; auto: the most that fit, tried out on a GPU once, by a rule on a CPU"""
    total_batch_size: int = -1
    """tokens per optimizer step over all devices; -1: from the scaling law"""

    def __post_init__(self) -> None:
        if self.device_batch_size != "auto":
            positive(self, "device_batch_size")
        positive_or_minus_one(self, "total_batch_size")

    @property
    def sequences(self) -> int:
        """`device_batch_size` as a number. Raises ValueError while it is `auto`: plans and runs put a number in its place."""
        if self.device_batch_size == "auto":
            raise ValueError("device_batch_size is auto still, where a number is needed")
        return self.device_batch_size

    @property
    def step_of_passes(self) -> int:
        """Sequences that a total batch has to be a multiple of: any will do while they are not known."""
        return 1 if self.device_batch_size == "auto" else self.device_batch_size


@dataclass(frozen=True, kw_only=True)
class OptimSettings:
    embedding_lr: float = 0.3
    """learning rate of token and value embeddings (AdamW), at width 768 and a batch of 2^19 tokens"""
    unembedding_lr: float = 0.008
    """learning rate of lm_head (AdamW), at width 768 and a batch of 2^19 tokens"""
    matrix_lr: float = 0.02
    """learning rate of the block matrices (Muon): spectral size of a step, at a batch of 2^19 tokens"""
    scalar_lr: float = 0.5
    """learning rate of the residual and input lambdas (AdamW), at a batch of 2^19 tokens"""
    weight_decay: float = 0.28
    """cautious weight decay of the block matrices, at depth 12"""
    adam_beta1: float = -1.0
    """AdamW beta1 of lm_head and embeddings; -1: per group"""
    adam_beta2: float = -1.0
    """AdamW beta2 of lm_head and embeddings; -1: per group"""
    warmup_steps: int = DEFAULT_WARMUP_STEPS
    """steps of warm-up"""
    warmup_ratio: float = -1.0
    """warm-up as a share of the run, instead of warmup_steps; -1: off"""
    warmup_from: float = 0.0
    """rates at the first step as a share of the full ones, from which the warm-up rises exponentially; 0: it is linear"""
    warmdown_ratio: float = 0.65
    """share of the run, at its end, over which the rates fall linearly"""
    final_lr_frac: float = 0.05
    """rates at the last step as a share of the full ones"""
    grad_clip: float = 0.0
    """largest global norm of the gradient; 0: off"""
    on_bad_step: Literal["rollback", "skip", "stop"] = "rollback"
    """when the loss or the gradient is no number: go back to the newest checkpoint and leave the batch out (three times
    at most), leave out this update alone, or stop"""
    muon_momentum_start: float = 0.85
    """Muon momentum at the first step"""
    muon_momentum: float = 0.97
    """Muon momentum after its ramp"""
    muon_momentum_steps: int = 400
    """steps of the momentum's ramp"""
    muon_momentum_final: float = 0.90
    """Muon momentum at the last step of the warmdown; -1: it stays"""

    def __post_init__(self) -> None:
        positive(self, "embedding_lr", "unembedding_lr", "matrix_lr", "scalar_lr")
        not_negative(self, "weight_decay", "grad_clip", "final_lr_frac", "muon_momentum_steps")
        require(self.warmup_steps >= -1, f"--warmup-steps must be 0 or more, got {self.warmup_steps}.")
        for name in ("warmup_ratio", "warmdown_ratio"):
            value = getattr(self, name)
            require(
                0 <= value <= 1 or (name == "warmup_ratio" and value == -1),
                f"--{name.replace('_', '-')} is a share of the run, from 0 to 1, got {value}.",
            )
        require(
            0 <= self.warmup_from < 1,
            f"--warmup-from is a share of the full rates, at least 0 and below 1, got {self.warmup_from:g}: 0.01 begins at a "
            "hundredth of them.",
        )
        for name in ("adam_beta1", "adam_beta2", "muon_momentum_start", "muon_momentum", "muon_momentum_final"):
            value = getattr(self, name)
            require(
                0 <= value < 1 or (value == -1 and name not in ("muon_momentum_start", "muon_momentum")),
                f"--{name.replace('_', '-')} must be at least 0 and below 1, got {value}.",
            )
        require(
            self.warmup_ratio == -1 or self.warmup_steps in (-1, DEFAULT_WARMUP_STEPS),
            f"--warmup-steps {self.warmup_steps} and --warmup-ratio {self.warmup_ratio} both set the warm-up: "
            "give one, and set the other to -1.",
        )


@dataclass(frozen=True, kw_only=True)
class EvalSettings:
    eval_every: int = 250
    """steps between evaluations of validation bits per byte; -1: never"""
    eval_tokens: int = 41_943_040
    """tokens of the validation split that an evaluation uses"""
    core_metric_every: int = 2000
    """steps between evaluations of the CORE metric; -1: never"""
    core_metric_max_per_task: int = 500
    """items per CORE task; -1: all"""
    core_bundle: str = ""
    """folder, or URL of a zip or tar, with the CORE tasks; default: <base-dir>/core_bundle where that is there"""
    sample_every: int = 2000
    """steps between text samples; -1: never"""
    eval_workers: int = 0
    """workers besides those that train, which evaluate finished checkpoints meanwhile; 0: training waits for evaluation"""

    def __post_init__(self) -> None:
        positive_or_minus_one(self, "eval_every", "core_metric_every", "core_metric_max_per_task", "sample_every")
        positive(self, "eval_tokens")
        require(self.eval_workers >= 0, f"--eval-workers must be at least 0, got {self.eval_workers}.")


@dataclass(frozen=True, kw_only=True)
class SaveSettings:
    save_every: Literal["auto"] | int = "auto"
    """steps between checkpoints; auto: by time, from the measured cost of a save; -1: only at the end"""
    keep_checkpoints: int = 2
    """newest checkpoints to keep; the best one by val_bpb stays besides"""
    save_mode: Literal["async", "sync"] = "async"
    """async: training goes on while a checkpoint is written; the last one, and one before a node goes, are always sync"""

    def __post_init__(self) -> None:
        if self.save_every != "auto":
            positive_or_minus_one(self, "save_every")
        positive(self, "keep_checkpoints")


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    corpus: str = ""
    """embedded, climbmix, or a folder, file or glob of parquet, jsonl or txt, local or s3:// or gs://;
    default: climbmix on GPUs, else embedded"""
    val_corpus: str = ""
    """corpus of the validation split; default: the last file of the corpus"""
    text_column: str = "text"
    """column (parquet) or key (jsonl) of the text"""
    num_data_shards: int = -1
    """files of the corpus to use, the validation one included; -1: all (climbmix: as many as the run needs)"""
    packing: Literal["auto", "best-fit", "keep"] = "auto"
    """rows of documents: best-fit crops what does not fit (the lineage's way), keep carries it over into another row;
    auto: best-fit when what it delivers outlasts the run, else keep"""
    tokenizer: str = ""
    """name or folder of a trained tokenizer; default: trained on this corpus when it is not there"""
    tok_max_chars: int = 2_000_000_000
    """characters that the tokenizer is trained on, at most"""
    tok_doc_cap: int = 10_000
    """characters of one document that the tokenizer is trained on, at most"""

    def __post_init__(self) -> None:
        positive_or_minus_one(self, "num_data_shards")
        positive(self, "tok_max_chars", "tok_doc_cap")
        require(
            bool(self.text_column), "--text-column is empty: name the column that holds the text, for example text."
        )


@dataclass(frozen=True, kw_only=True)
class ClusterSettings:
    address: str = ""
    """Ray cluster to use; default: RAY_ADDRESS, which `ray job submit` sets, else one that the job starts and stops"""
    num_workers: Literal["auto"] | int = "auto"
    """training workers, one per device; auto: all GPUs that the cluster has now, else 1"""
    min_workers: int = -1
    """fewest workers to begin or go on with when num_workers cannot be had; -1: num_workers, and 1 when that is auto"""
    threads: int = -1
    """CPU threads of each worker; -1: the cores of its machine, divided by the workers there"""
    max_failures: int = 3
    """crashes at one step, or without a new checkpoint, before the run is given up"""
    max_preemptions: int = -1
    """times that machines may be taken away before the run is given up; -1: no limit"""
    max_wait: float = -1.0
    """hours to wait for machines before the run is given up; -1: no limit"""

    def __post_init__(self) -> None:
        if self.num_workers != "auto":
            positive(self, "num_workers")
            require(
                self.min_workers <= self.num_workers,
                f"--min-workers {self.min_workers} is above --num-workers {self.num_workers}.",
            )
        positive_or_minus_one(self, "min_workers", "threads", "max_wait")
        not_negative(self, "max_failures")
        require(
            self.max_preemptions >= -1,
            f"--max-preemptions must be 0 or more, or -1 for no limit, got {self.max_preemptions}.",
        )


@dataclass(frozen=True, kw_only=True)
class MoneySettings:
    price_per_hour: float = -1.0
    """dollars per hour of one machine of the run; -1: not known, and cost stays null"""
    budget_usd: float = -1.0
    """save and stop when the run has cost this much (needs price_per_hour, or machine); -1: no limit"""
    max_hours: float = -1.0
    """save and stop after this many hours of wall time; -1: no limit"""

    def __post_init__(self) -> None:
        positive_or_minus_one(self, "price_per_hour", "budget_usd", "max_hours")


@dataclass(frozen=True, kw_only=True)
class PlanSettings:
    gpu: str = ""
    """GPU to plan for, as a100-40gb, h100, rtx-4070 or cpu; default: that of the machine type, else what is here"""
    machine: str = ""
    """machine type of the price table that the run is for, as p4d.24xlarge: it decides GPUs and price"""
    prices: str = ""
    """TOML file with prices of your own, over those that ship with raychat"""
    mfu: float = -1.0
    """model FLOPs utilisation to plan with, percent; -1: from the table of what was measured on such devices"""
    preemptions_per_hour: float = 0.0
    """how often a spot machine is taken away, per machine and hour, for the cost of replayed steps"""

    def __post_init__(self) -> None:
        positive_or_minus_one(self, "mfu")
        not_negative(self, "preemptions_per_hour")
        require(self.mfu <= 100, f"--mfu is in percent, at most 100, got {self.mfu:g}.")


@dataclass(frozen=True, kw_only=True)
class Config:
    """All settings of a run. `flat()` and `from_flat` convert to and from the flag names."""

    run: RunSettings = field(default_factory=RunSettings)
    model: ModelSettings = field(default_factory=ModelSettings)
    precision: PrecisionSettings = field(default_factory=PrecisionSettings)
    horizon: HorizonSettings = field(default_factory=HorizonSettings)
    batch: BatchSettings = field(default_factory=BatchSettings)
    optim: OptimSettings = field(default_factory=OptimSettings)
    eval: EvalSettings = field(default_factory=EvalSettings)
    save: SaveSettings = field(default_factory=SaveSettings)
    data: DataSettings = field(default_factory=DataSettings)
    cluster: ClusterSettings = field(default_factory=ClusterSettings)
    money: MoneySettings = field(default_factory=MoneySettings)
    plan: PlanSettings = field(default_factory=PlanSettings)

    def __post_init__(self) -> None:
        require(
            "://" not in self.run.storage_path or self.model_tag not in BESIDE_RUNS,
            f"--model-tag {self.model_tag}: in an object store, token shards have the folder of this name beside the runs. "
            "Give another one.",
        )
        T = self.model.max_seq_len
        total = self.batch.total_batch_size
        if total != -1:
            check_batch(total, self.batch.step_of_passes, T)
        require(
            self.eval.eval_every == -1 or self.eval.eval_tokens >= T,
            f"--eval-tokens {self.eval.eval_tokens} is less than one sequence of {T} tokens.",
        )
        require(
            self.money.budget_usd == -1 or self.money.price_per_hour > 0 or bool(self.plan.machine),
            "--budget-usd needs a price: give --price-per-hour, in dollars for one machine, or --machine, a type of the price "
            "table (python jobs/plan.py --list-prices).",
        )

    def flat(self) -> dict[str, Any]:
        """Flag name with underscores -> value, over all groups."""
        return {
            leaf.name: getattr(getattr(self, group.name), leaf.name)
            for group in dataclasses.fields(self)
            for leaf in dataclasses.fields(getattr(self, group.name))
        }

    @staticmethod
    def from_flat(values: Mapping[str, Any], base: "Config | None" = None) -> "Config":
        """`base` (or the defaults) with `values`, whose keys are flag names with dashes or underscores.

        Raises ConfigError for a name that is no setting, with the nearest ones, and for a value of the wrong type.
        """
        base = base or Config()
        values = {name.replace("-", "_"): value for name, value in values.items()}
        if unknown := sorted(set(values) - set(base.flat())):
            raise ConfigError(f"There is no setting {unknown[0]!r}{did_you_mean(unknown[0], base.flat())}.")
        groups = {}
        for group in dataclasses.fields(base):
            old = getattr(base, group.name)
            mine = {
                leaf.name: _typed(leaf, values[leaf.name]) for leaf in dataclasses.fields(old) if leaf.name in values
            }
            groups[group.name] = dataclasses.replace(old, **mine)
        return Config(**groups)

    @property
    def model_tag(self) -> str:
        """Name of the run directory."""
        return self.run.model_tag or f"d{self.model.depth}"

    @property
    def base_dir(self) -> Path:
        """Absolute base directory."""
        chosen = self.run.base_dir or os.environ.get("RAYCHAT_BASE_DIR") or "~/.cache/raychat"
        return Path(chosen).expanduser().absolute()

    @property
    def runs_dir(self) -> Path:
        """Absolute folder of the run directories on this machine: copies, when the runs are kept in an object store."""
        chosen = self.run.storage_path
        if "://" in chosen:
            return self.base_dir / "copies" / re.sub(r"[^\w.-]+", "-", public_uri(chosen)).strip("-")
        return Path(chosen).expanduser().absolute() if chosen else self.base_dir / "runs"

    @property
    def run_dir(self) -> Path:
        """Absolute run directory on this machine."""
        return self.runs_dir / self.model_tag

    @property
    def run_uri(self) -> str:
        """Where the run is kept: the run directory, or its URI in an object store, with credentials if it has some."""
        chosen = self.run.storage_path
        if "://" not in chosen:
            return str(self.run_dir)
        path, mark, query = chosen.partition("?")  # options of the store, such as its endpoint
        return f"{path.rstrip('/')}/{self.model_tag}{mark}{query}"

    def public(self) -> dict[str, Any]:
        """`flat()` without the credentials that URIs and the command of `on_event` may hold: what may be written down."""
        shown = {key: public_uri(value) if isinstance(value, str) else value for key, value in self.flat().items()}
        return shown | {"on_event": "..." if self.run.on_event else ""}


def _typed(leaf: "dataclasses.Field[Any]", value: Any) -> Any:
    """`value` as the type of `leaf`'s default, as TOML or JSON gave it."""
    default = leaf.default
    if isinstance(default, bool):
        good = isinstance(value, bool)
    elif isinstance(default, float):
        good = isinstance(value, int | float) and not isinstance(value, bool)
        value = float(value) if good else value
    elif isinstance(default, int) or leaf.name in NUMBER_OR_AUTO:
        good = isinstance(value, int) and not isinstance(value, bool)
        good = good or (value == "auto" and leaf.name in NUMBER_OR_AUTO)
    else:
        good = isinstance(value, str)
        choices = getattr(leaf.type, "__args__", None)
        if good and choices and all(isinstance(c, str) for c in choices):
            require(value in choices, f"{leaf.name} = {value!r}: use one of {', '.join(map(repr, choices))}.")
    auto = ", and 'auto' is possible" if leaf.name in NUMBER_OR_AUTO and default != "auto" else ""
    require(good, f"{leaf.name} = {value!r} has the wrong type: its default is {default!r}{auto}.")
    return value
