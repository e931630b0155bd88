"""The depth dial: shapes, parameters, FLOPs, batch, rates, decay and horizon as pure functions of the configuration.

No torch here: `--help`, `--dry-run` and a scheduler ask these questions without loading it.
"""

import math
from dataclasses import dataclass

from raychat.checks import check_batch, require
from raychat.config import Config, HorizonSettings, ModelSettings

REFERENCE_DEPTH = 12
REFERENCE_BATCH = 2**19  # tokens
BATCH_EXPONENT = 0.383  # arXiv:2505.13738
VOCAB_MULTIPLE = 64  # embedding and head rows are padded to it, for the tensor cores and for even shards
WINDOW_MULTIPLE = 128
SMEAR_CHANNELS = 24  # first channels of the embedding that decide how much of the previous token is mixed in
VALUE_GATE_CHANNELS = 12  # first channels of a block's input that decide how much value embedding each head takes


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Sizes of a model. `windows` holds the left window of each block in positions, at most `sequence_len`."""

    n_layer: int
    n_head: int
    n_kv_head: int
    head_dim: int
    n_embd: int
    vocab_size: int
    padded_vocab: int
    sequence_len: int
    windows: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class ParamCounts:
    """Parameters by group."""

    wte: int
    value_embeds: int
    lm_head: int
    transformer_matrices: int
    scalars: int

    @property
    def total(self) -> int:
        """All parameters."""
        return self.wte + self.value_embeds + self.lm_head + self.transformer_matrices + self.scalars

    @property
    def scaling(self) -> int:
        """The parameters that the scaling laws count: block matrices and lm_head."""
        return self.transformer_matrices + self.lm_head


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What follows from the dial for one run. Rates are multiplied by `lr_scale`; `weight_decay` is already scaled."""

    tokens_target: int | None
    total_batch_size: int
    lr_scale: float
    weight_decay: float
    num_iterations: int
    flops_per_token: int

    @property
    def tokens(self) -> int:
        """Tokens that the run trains on."""
        return self.num_iterations * self.total_batch_size

    @property
    def flops(self) -> float:
        """FLOPs of the whole run, forward and backward."""
        return float(self.flops_per_token) * self.tokens


def window_sizes(pattern: str, n_layer: int, sequence_len: int, short_window_ratio: float) -> tuple[int, ...]:
    """Left window of each block: the pattern tiled over the blocks, the last one always full context."""
    short = math.ceil(short_window_ratio * sequence_len / WINDOW_MULTIPLE) * WINDOW_MULTIPLE
    letters = [pattern[i % len(pattern)].upper() for i in range(n_layer)]
    letters[-1] = "L"
    return tuple(sequence_len if letter == "L" else min(short, sequence_len) for letter in letters)


def has_value_embedding(layer: int, n_layer: int) -> bool:
    """Every other block has a value embedding, the last one included."""
    return layer % 2 == (n_layer - 1) % 2


def model_shape(model: ModelSettings, depth: int | None = None) -> ModelShape:
    """The model that `model` describes, or its sibling of another `depth` (same vocabulary, aspect ratio, head_dim)."""
    depth = depth or model.depth
    width = -(-depth * model.aspect_ratio // model.head_dim) * model.head_dim
    heads = width // model.head_dim
    kv_heads = heads if model.num_kv_heads == -1 or depth != model.depth else model.num_kv_heads
    return ModelShape(
        n_layer=depth,
        n_head=heads,
        n_kv_head=kv_heads,
        head_dim=model.head_dim,
        n_embd=width,
        vocab_size=model.vocab_size,
        padded_vocab=-(-model.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE,
        sequence_len=model.max_seq_len,
        windows=window_sizes(model.window_pattern, depth, model.max_seq_len, model.short_window_ratio),
    )


def param_counts(shape: ModelShape) -> ParamCounts:
    """Parameters of a model of this shape, by group."""
    C, kv_dim = shape.n_embd, shape.n_kv_head * shape.head_dim
    value_layers = sum(has_value_embedding(i, shape.n_layer) for i in range(shape.n_layer))
    block = 2 * C * C + 2 * C * kv_dim + 8 * C * C  # c_q and c_proj, c_k and c_v, the MLP's two of 4C
    return ParamCounts(
        wte=shape.padded_vocab * C,
        value_embeds=value_layers * shape.padded_vocab * kv_dim,
        lm_head=shape.padded_vocab * C,
        transformer_matrices=shape.n_layer * block + value_layers * VALUE_GATE_CHANNELS * shape.n_kv_head,
        scalars=2 * shape.n_layer + SMEAR_CHANNELS + 2,
    )


def flops_per_token(shape: ModelShape) -> int:
    """Forward and backward FLOPs of one token: 6 per weight of a linear layer, 12 H D window per block for attention."""
    counts = param_counts(shape)
    linear = counts.transformer_matrices + counts.lm_head + SMEAR_CHANNELS
    attention = sum(12 * shape.n_head * shape.head_dim * window for window in shape.windows)
    return 6 * linear + attention


def causal_flops_per_token(shape: ModelShape) -> float:
    """As `flops_per_token`, with only the keys that a query really sees, as a mean over the positions of a row."""
    T = shape.sequence_len
    seen = [sum(min(i, window) + 1 for i in range(T)) / T for window in shape.windows]
    windows = sum(12 * shape.n_head * shape.head_dim * window for window in shape.windows)
    return flops_per_token(shape) - windows + sum(12 * shape.n_head * shape.head_dim * keys for keys in seen)


def optimal_batch(tokens_over_reference: float) -> int:
    """Batch in tokens, a power of two: B_ref * (D / D_ref)^0.383 (arXiv:2505.13738)."""
    return 2 ** round(math.log2(REFERENCE_BATCH * tokens_over_reference**BATCH_EXPONENT))


def recipe(config: Config) -> Recipe:
    """Batch, rates, decay and horizon of `config`.

    Raises:
        ConfigError: when the batch does not split into passes of `--device-batch-size`, or the horizon is empty.
    """
    scaling = param_counts(model_shape(config.model)).scaling
    reference = param_counts(model_shape(config.model, REFERENCE_DEPTH)).scaling
    ratio = config.horizon.target_param_data_ratio
    tokens = int(ratio * scaling) if ratio > 0 else None
    quotient = tokens / (ratio * reference) if tokens else scaling / reference  # D / D_ref
    total = config.batch.total_batch_size
    if total == -1:
        total = optimal_batch(quotient)
    check_batch(total, config.batch.step_of_passes, config.model.max_seq_len)
    rows, workers = total // config.model.max_seq_len, config.cluster.num_workers
    require(
        workers == "auto" or workers <= rows,
        f"--num-workers {workers} is more than the {rows:,} sequences of a batch: use at most {rows:,}, or raise "
        "--total-batch-size.",
    )
    flops = flops_per_token(model_shape(config.model))
    iterations = _iterations(config.horizon, tokens, total, flops)
    return Recipe(
        tokens_target=tokens,
        total_batch_size=total,
        lr_scale=math.sqrt(total / REFERENCE_BATCH),
        weight_decay=config.optim.weight_decay * math.sqrt(total / REFERENCE_BATCH) / quotient,  # arXiv:2405.13698
        num_iterations=iterations,
        flops_per_token=flops,
    )


def warmup_steps(config: Config, num_iterations: int) -> int:
    """Steps of warm-up, from `--warmup-ratio` where it is given, else `--warmup-steps`."""
    if config.optim.warmup_ratio >= 0:
        return round(config.optim.warmup_ratio * num_iterations)
    return max(0, config.optim.warmup_steps)


def _iterations(horizon: HorizonSettings, tokens: int | None, total_batch: int, flops: int) -> int:
    if horizon.num_iterations > 0:
        return horizon.num_iterations
    if horizon.target_flops > 0:
        found, flag = round(horizon.target_flops / (flops * total_batch)), "--target-flops"
    else:
        found, flag = (tokens or 0) // total_batch, "--target-param-data-ratio"
    require(
        found > 0,
        f"{flag} pays for less than one step of {total_batch:,} tokens: raise it, or lower --total-batch-size.",
    )
    return found
