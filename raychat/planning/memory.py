"""How much memory a run needs on one rank, by part, from the shapes, and the largest device batch that fits.

A step has several moments that could be its peak: the loss, the backward pass of each block, the update. Each is added up
from the tensors that are alive then; the largest is the forecast. docs/memory.md has the formula and how it was checked.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from raychat.planning.activations import (
    TrainingPass,
    backward_bytes,
    block_weights,
    head_bytes,
    kept_bytes,
    logits_bytes,
    saved_bytes,
    stem_bytes,
)
from raychat.planning.scaling import ModelShape, has_value_embedding, param_counts
from raychat.planning.stacks import embedding_bytes, padded_bytes, unit_stacks

SHARE = (
    0.9  # of a device's memory, to plan with: allocators fragment, and libraries take memory that torch does not count
)
ROTARY_REACH = 10  # rotary tables reach this many times sequence_len (raychat/model/gpt.py)
MUON_CHUNK = {"cpu": 2**18, "cuda": 2**26}  # elements that one Muon call works on (raychat/optim/sharded.py)
MUON_BYTES = 20  # per element of a call: stacked parameter and gradient, update in float32, and its products
CUDA_WORKSPACE = 32 * 2**20  # bytes of cuBLAS (8 MiB, on Hopper 32 MiB: PyTorch's notes on CUDA)
# Resident memory of a process that trains next to nothing: Linux, torch 2.13 for CPU, one thread and two (docs/memory.md).
PROCESS = {"float32": 367_000_000, "bfloat16": 400_000_000, "float16": 367_000_000}
# glibc takes blocks of up to 32 MiB from a heap in which freed ones leave holes; larger ones it maps one by one (with
# recomputation, smaller ones too: raychat/training/heap.py). Holes as a share of the activations in the heap: fitted to 8
# measured configurations, 0.80 to 1.16 (docs/memory.md).
HEAP_BLOCK = 32 * 2**20
HEAP_HOLES = 0.9


@dataclass(frozen=True, kw_only=True)
class MemoryForecast:
    """Bytes on one rank at the peak of a step, by part. `moment` is when that is: loss, backward or update."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    overhead: int
    moment: str = "loss"

    @property
    def total(self) -> int:
        """The sum of the parts: what a run reports as its peak memory."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.logits + self.overhead


def forecast_memory(
    shape: ModelShape,
    *,
    device_batch_size: int,
    rows_per_rank: int,
    workers: int,
    device: Literal["cuda", "cpu"],
    dtype: str,
    loss: Literal["full", "chunked"],
    grad_checkpoint: bool,
    compiled: bool,
    fp8: bool = False,
    host_copy: bool = False,
    libraries: int = 0,
) -> MemoryForecast:
    """Peak memory of training `shape` in passes of `device_batch_size` of a rank's `rows_per_rank` sequences.

    On a CPU the whole process counts, as its resident memory does; on CUDA what torch allocates. `fp8` changes nothing:
    torchao saves the inputs of its layers in the compute dtype. `host_copy`: on a CPU, what a save in the background
    writes is there beside it, from the first save on. `libraries`: bytes that a CPU's process holds beside torch.
    """
    run = TrainingPass(
        shape=shape,
        rows=min(device_batch_size, rows_per_rank),
        device=device,
        dtype=dtype,
        loss=loss,
        grad_checkpoint=grad_checkpoint,
        compiled=compiled,
    )
    static = {"weights": weight_bytes(shape, dtype), "optimizer": optimizer_bytes(shape, dtype, workers)}
    moments = [
        MemoryForecast(**static, **moment)
        for moment in (
            *_pass_moments(run, again=device_batch_size < rows_per_rank),
            _update(shape, dtype, device, workers),
        )
    ]
    beside = libraries + (sum(static.values()) if host_copy else 0) if device == "cpu" else 0
    return max((_with_overhead(moment, run, beside) for moment in moments), key=lambda moment: moment.total)


def largest_batch(shape: ModelShape, *, rows: int, memory_bytes: int, rows_per_rank: int, **setting: Any) -> int | None:
    """The largest device batch, a power of two that divides the `rows` of a global batch, in SHARE of `memory_bytes`.

    `setting`: the other arguments of `forecast_memory`. None when not even one sequence fits.
    """
    fitting = None
    size = 1
    while size <= rows_per_rank and rows % size == 0:
        need = forecast_memory(shape, device_batch_size=size, rows_per_rank=rows_per_rank, **setting).total
        if need > SHARE * memory_bytes:
            break
        fitting, size = size, 2 * size
    return fitting


def explain_difference(full: MemoryForecast, chunked: MemoryForecast) -> str:
    """Why `--loss chunked` needs another amount than `--loss full`, in a sentence for the plan."""
    most, least = full.total / 2**30, chunked.total / 2**30
    return (
        f"--loss chunked needs {most - least:.1f} GiB less than full ({least:.1f} instead of {most:.1f} GiB): it walks "
        f"over chunks of rows, so {full.logits / 2**30:.2f} GiB of logits over the whole vocabulary are never there at once."
    )


def weight_bytes(shape: ModelShape, dtype: str) -> int:
    """Bytes of the parameters (embeddings in bfloat16 where that is computed in, else float32) and the rotary tables."""
    counts = param_counts(shape)
    embeddings = counts.wte + counts.value_embeds
    rotary = ROTARY_REACH * shape.sequence_len * shape.head_dim * (4 if dtype == "float32" else 2)
    return embedding_bytes(dtype) * embeddings + 4 * (counts.total - embeddings) + rotary


def gradient_bytes(shape: ModelShape, dtype: str) -> int:
    """Bytes of all gradients, which have the dtype of their parameters."""
    counts = param_counts(shape)
    embeddings = counts.wte + counts.value_embeds
    return embedding_bytes(dtype) * embeddings + 4 * (counts.total - embeddings)


def optimizer_bytes(shape: ModelShape, dtype: str, workers: int, rank: int = 0) -> int:
    """Bytes of the optimizer's state on `rank`: AdamW's moments by rows, Muon's momentum by matrices."""
    total = 0
    for stack in unit_stacks(shape, dtype):
        share, units = stack.share(workers), stack.units
        total += stack.state_bytes * (min((rank + 1) * share, units) - min(rank * share, units))
    return total


def _pass_moments(run: TrainingPass, *, again: bool) -> Iterator[dict[str, Any]]:
    """The loss and the backward pass of each block; `again`: gradients of an earlier pass are there from the beginning."""
    shape, stored = run.shape, embedding_bytes(run.dtype)
    everything = gradient_bytes(shape, run.dtype)
    height, ahead = logits_bytes(run)
    # The chunked loss counts its gradient of the head among the logits until it becomes the parameter's.
    yield {
        "moment": "loss",
        "gradients": everything if again else 0,
        "activations": saved_bytes(run) - (run.stream if run.loss == "chunked" else 0),
        "logits": height,
        "overhead": 0,
    }
    done = 4 * param_counts(shape).lm_head
    held = saved_bytes(run) - head_bytes(run)
    table = stored * shape.padded_vocab * shape.n_kv_head * shape.head_dim
    for layer in reversed(range(shape.n_layer)):
        yield {
            "moment": "backward",
            "gradients": everything if again else done,
            "activations": held + backward_bytes(run, layer),
            "logits": 0,
            "overhead": 0,
        }
        held -= kept_bytes(run, layer)
        done += 4 * block_weights(shape, layer)
        if has_value_embedding(layer, shape.n_layer):
            done += table
            yield {
                "moment": "backward",
                "gradients": everything + table if again else done,
                "activations": held + 3 * run.stream,
                "logits": 0,
                "overhead": 0,
            }
    yield {
        "moment": "backward",
        "gradients": everything + (stored * param_counts(shape).wte if again else 0),
        "activations": stem_bytes(run),
        "logits": 0,
        "overhead": 0,
    }


def _update(shape: ModelShape, dtype: str, device: str, workers: int) -> dict[str, Any]:
    """The update: gradients, and what Muon and the exchange with other ranks hold for a moment (as overhead)."""
    counts, gradients = param_counts(shape), gradient_bytes(shape, dtype)
    largest = 4 * shape.n_embd**2
    muon = MUON_BYTES * min(max(MUON_CHUNK[device], largest), largest * shape.n_layer)
    exchange = 0
    if workers > 1 and device == "cpu":  # the bucket of all gradients stays while parameters go through another
        exchange = 2 * gradients
    elif workers > 1:  # all parameters coming in, padded to equal shares, and this rank's share
        padded = padded_bytes(shape, dtype, workers)
        exchange = padded + padded // workers
    norm = 8 * counts.wte // workers if device == "cpu" else 0  # a float64 copy of the largest gradient
    return {
        "moment": "update",
        "gradients": gradients,
        "activations": 0,
        "logits": 0,
        "overhead": max(muon, norm) + exchange,
    }


def _with_overhead(moment: MemoryForecast, run: TrainingPass, beside: int) -> MemoryForecast:
    """`moment` with what is not the model's: workspaces on CUDA; on a CPU the process, the holes of its heap, a save."""
    parts = dict(vars(moment))
    parts["overhead"] += beside
    if run.device == "cuda":
        parts["overhead"] += CUDA_WORKSPACE
    else:
        parts["overhead"] += PROCESS[run.dtype] + round(HEAP_HOLES * _in_heap(moment, run))
    return MemoryForecast(**parts)


def _in_heap(moment: MemoryForecast, run: TrainingPass) -> float:
    """Bytes of activations in blocks small enough for the heap. Of 19 streams that a block saves, 8 are in two tensors."""
    if run.grad_checkpoint or run.stream > HEAP_BLOCK:
        return 0
    return moment.activations * (1 if 4 * run.stream <= HEAP_BLOCK else 11 / 19)
