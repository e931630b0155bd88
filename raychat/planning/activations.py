"""What one training pass holds between its forward and its backward half, from the shapes: block by block, and the logits.

The counts are of tensors that autograd saves, read off `saved_tensors_hooks`; a test compares the two. Compiled, the
partitioner of torch.compile decides what is saved: the same tensors, but what is only a change of dtype (the float32
copies that a norm reads) is computed again, and so is everything between raw logits and loss.

Legend: N tokens of a pass, C channels, V vocabulary, e bytes of an element in the compute dtype.
"""

from dataclasses import dataclass
from typing import Literal

from raychat.planning.scaling import SMEAR_CHANNELS, VALUE_GATE_CHANNELS, ModelShape, has_value_embedding

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
BAND = 128  # queries per block of windowed attention without flash (raychat/model/attention.py)
CHUNK_LOGITS = 2**22  # of the chunked loss on a CPU: 16 MiB in float32, which caches hold (docs/speed.md)
LEAST_CHUNK = 64  # rows: with fewer, the head's gradient is gone over too often
CUDA_CHUNK = 1024


def loss_chunk_rows(vocab_size: int, device: str) -> int:
    """Rows of the logits that the chunked loss works on at a time (raychat/model/loss.py)."""
    return max(LEAST_CHUNK, CHUNK_LOGITS // vocab_size) if device == "cpu" else CUDA_CHUNK


@dataclass(frozen=True, kw_only=True)
class TrainingPass:
    """A pass of `rows` sequences forward and backward. With flash attention no window costs memory: CUDA in 16 bits."""

    shape: ModelShape
    rows: int
    device: Literal["cuda", "cpu"]
    dtype: str
    loss: Literal["full", "chunked"]
    grad_checkpoint: bool
    compiled: bool

    @property
    def element(self) -> int:
        """Bytes of an element in the compute dtype (e)."""
        return BYTES[self.dtype]

    @property
    def tokens(self) -> int:
        """Tokens (N)."""
        return self.rows * self.shape.sequence_len

    @property
    def stream(self) -> int:
        """Bytes of one copy of the residual stream (e N C)."""
        return self.element * self.tokens * self.shape.n_embd

    @property
    def norm_input(self) -> int:
        """Bytes that a norm of the whole stream keeps of its input: a CPU's kernel reads a float32 copy."""
        copied = self.device == "cpu" and not self.compiled
        return self.stream * 4 // self.element if copied else self.stream

    @property
    def flash(self) -> bool:
        """Whether attention runs on a kernel that knows windows and grouped heads."""
        return self.device == "cuda" and self.element == 2

    def casts(self, weights: int) -> int:
        """Bytes of the 16-bit copies of so many float32 weights, which backward needs again."""
        return 2 * weights if self.element == 2 else 0


def block_weights(shape: ModelShape, layer: int) -> int:
    """Elements of a block's matrices."""
    C, kv = shape.n_embd, shape.n_kv_head * shape.head_dim
    gate = VALUE_GATE_CHANNELS * shape.n_kv_head if has_value_embedding(layer, shape.n_layer) else 0
    return 10 * C * C + 2 * C * kv + gate


def block_bytes(run: TrainingPass, layer: int) -> int:
    """Bytes that block `layer` saves for its backward pass when nothing is computed again, its input among them."""
    shape, stream, norm = run.shape, run.stream, run.norm_input
    grouped = shape.n_kv_head / shape.n_head  # size of keys or values beside that of queries
    kept = 3 * stream + 2 * norm  # the block's input; what attention and MLP read, before and after the norms
    kept += (1 + grouped) * norm  # queries and keys before their norms
    kept += _attention(run, layer)
    kept += 8 * stream  # MLP: relu and its square, 4 C each
    if has_value_embedding(layer, shape.n_layer):
        kept += grouped * stream + run.tokens * 2 * shape.n_kv_head * run.element  # the embedding, and its gate
    kept += run.tokens * 4 * (2 + 2 * shape.n_head + shape.n_kv_head)  # scales of the norms, log-sum-exp of attention
    return round(kept) + run.casts(block_weights(shape, layer))


def _attention(run: TrainingPass, layer: int) -> float:
    """Queries, keys, values and result; in windowed attention without flash the keys that each band of queries sees."""
    shape, stream = run.shape, run.stream
    T, window = shape.sequence_len, shape.windows[layer]
    if run.flash or window >= T - 1:
        return stream * (2 + 2 * shape.n_kv_head / shape.n_head)
    bands = -(-T // BAND)
    reach = -(-window // BAND)
    seen = sum(min(band, reach) + 1 for band in range(bands)) / bands  # blocks of keys for each block of queries
    return stream * (1 + 2 * seen + 2)  # queries; keys and values; the bands' results and their concatenation


def kept_bytes(run: TrainingPass, layer: int) -> int:
    """Bytes that block `layer` holds until its backward pass begins."""
    return run.stream if run.grad_checkpoint else block_bytes(run, layer)


def stem_bytes(run: TrainingPass) -> int:
    """Bytes saved before the first block: the embedding's norm, and the smear (compiled, one is made from the other)."""
    gate = run.tokens * (8 + SMEAR_CHANNELS * run.element)
    again = run.compiled and not run.grad_checkpoint
    return (0 if again else run.norm_input) + run.stream + gate


def head_bytes(run: TrainingPass) -> int:
    """Bytes saved behind the last block, without the logits: the last norm (not compiled), and what the head reads."""
    return (0 if run.compiled else run.norm_input) + run.stream


def saved_bytes(run: TrainingPass) -> int:
    """All that a pass saves for its backward half, without logits and without the chunked loss's own gradients."""
    blocks = sum(kept_bytes(run, layer) for layer in range(run.shape.n_layer))
    return stem_bytes(run) + blocks + head_bytes(run)


def backward_bytes(run: TrainingPass, layer: int) -> int:
    """Bytes that the backward pass of block `layer` adds at its height, in the MLP, to what is saved.

    Eager: the gradients of the stream, of its beginning and of its middle, and three tensors of 4 C for relu^2, while one
    that was saved is free again. Compiled, the three are one. With recomputation the whole block is there as well.
    """
    again = block_bytes(run, layer) - run.stream if run.grad_checkpoint else 0
    return again + 3 * run.stream + (0 if run.compiled else 8 * run.stream)


def logits_bytes(run: TrainingPass) -> tuple[int, int]:
    """Bytes of the loss at its height, and of these what is left when the gradient of the stream is there.

    `full`, eager: float32 copies of N V; two are saved (tanh and log-softmax), the backward pass adds two. `full`,
    compiled: one in the compute dtype is saved, its gradient is written into its place, all between is fused.
    `chunked`: the gradients of stream and head, ready after the forward pass and scaled into a second copy, or
    those and the chunks' own tensors: eager, two chunks when one follows another; compiled, one's logits and slope.
    """
    shape, e = run.shape, run.element
    V, head = shape.vocab_size, shape.padded_vocab * shape.n_embd
    if run.loss == "full":
        cast = run.casts(V * shape.n_embd)
        return (e if run.compiled else 16) * run.tokens * V + cast, cast
    chunk = min(loss_chunk_rows(V, run.device), run.tokens) * V
    ahead = run.stream + 4 * head
    eager = 16 if e == 4 else 20  # bytes: three or four float32 tensors of a chunk, and two 16-bit ones
    walking = chunk * (2 * e if run.compiled else eager) + 2 * run.casts(head)
    scaling = 4 * head + (run.stream if e == 4 else 5 * run.stream)
    return ahead + max(walking, scaling), ahead
