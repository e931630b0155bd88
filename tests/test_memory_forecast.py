"""The memory forecast: laws that any forecast must obey, autograd's own count, and figures that were measured elsewhere."""

import dataclasses
from typing import Any

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from raychat.config import Config
from raychat.model import GPT
from raychat.optim import build_optimizer
from raychat.planning import ModelShape, model_shape
from raychat.planning.activations import TrainingPass, logits_bytes, saved_bytes
from raychat.planning.memory import (
    MemoryForecast,
    explain_difference,
    forecast_memory,
    gradient_bytes,
    largest_batch,
    optimizer_bytes,
    weight_bytes,
)
from raychat.training.build import gpt_config

A100_40GB = 40 * 2**30
SETTING: dict[str, Any] = {
    "rows_per_rank": 256,
    "workers": 1,
    "device": "cuda",
    "dtype": "bfloat16",
    "loss": "full",
    "grad_checkpoint": False,
    "compiled": True,
}
CPU = {**SETTING, "device": "cpu", "dtype": "float32", "compiled": False}


def shape_of(**flags: Any) -> ModelShape:
    return model_shape(Config.from_flat(flags).model)


def forecast(shape: ModelShape, batch: int, **changes: Any) -> MemoryForecast:
    return forecast_memory(shape, device_batch_size=batch, **{**SETTING, **changes})


@pytest.mark.parametrize(("batch", "gigabytes"), [(16, 11.6), (32, 21.2)])
def test_the_peaks_measured_on_an_a100_come_out(batch: int, gigabytes: float) -> None:
    total = forecast(shape_of(depth=10), batch).total
    # Whoever wrote the figures down may have meant either kind of GB.
    assert total / 1e9 == pytest.approx(gigabytes, rel=0.1)
    assert total / 2**30 == pytest.approx(gigabytes, rel=0.1)


def test_a_batch_of_64_that_ran_out_of_memory_does_not_fit() -> None:
    fitting = largest_batch(shape_of(depth=10), rows=256, memory_bytes=A100_40GB, **SETTING)
    assert fitting == 32


def test_chunked_logits_make_room_for_the_next_batch() -> None:
    shape = shape_of(depth=10)
    full, chunked = forecast(shape, 32), forecast(shape, 32, loss="chunked")
    assert full.logits - chunked.logits > 2**31
    assert "GiB less than full" in explain_difference(full, chunked)
    assert largest_batch(shape, rows=256, memory_bytes=A100_40GB, **{**SETTING, "loss": "chunked"}) == 64


@pytest.mark.parametrize("base", [SETTING, CPU], ids=["cuda", "cpu"])
@pytest.mark.parametrize("loss", ["full", "chunked"])
@pytest.mark.parametrize("grad_checkpoint", [False, True])
def test_a_larger_batch_never_needs_less(base: dict[str, Any], loss: str, grad_checkpoint: bool) -> None:
    changes = {**base, "loss": loss, "grad_checkpoint": grad_checkpoint}
    totals = [forecast(shape_of(depth=6), batch, **changes).total for batch in (1, 2, 4, 8, 16, 32, 64, 128, 256)]
    assert totals == sorted(totals)
    assert totals[-1] > 4 * totals[0]


@pytest.mark.parametrize("base", [SETTING, CPU], ids=["cuda", "cpu"])
@pytest.mark.parametrize("depth", [2, 6, 12])
@pytest.mark.parametrize("batch", [4, 32])
def test_recomputation_and_chunks_never_need_more(base: dict[str, Any], depth: int, batch: int) -> None:
    shape = shape_of(depth=depth)
    plain, again = (forecast(shape, batch, **{**base, "grad_checkpoint": on}) for on in (False, True))
    chunked = forecast(shape, batch, **{**base, "loss": "chunked"})
    assert again.total < plain.total
    assert chunked.total < plain.total


def test_the_parts_add_up_and_none_is_negative() -> None:
    for base in (SETTING, CPU):
        for batch in (1, 16, 256):
            found = forecast(shape_of(depth=4), batch, **base)
            parts = {k: v for k, v in dataclasses.asdict(found).items() if k != "moment"}
            assert min(parts.values()) >= 0
            assert sum(parts.values()) == found.total


@pytest.mark.parametrize("workers", [1, 2, 3, 5, 8])
def test_the_shards_of_the_optimizer_are_the_whole(workers: int) -> None:
    shape = shape_of(depth=5, vocab_size=1000)
    whole = optimizer_bytes(shape, "bfloat16", 1)
    shards = [optimizer_bytes(shape, "bfloat16", workers, rank) for rank in range(workers)]
    assert sum(shards) == whole
    assert max(shards) == shards[0]  # the rank that a forecast is for
    assert workers == 1 or shards[0] < optimizer_bytes(shape, "bfloat16", workers - 1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_weights_gradients_and_optimizer_are_those_of_the_built_model(dtype: str, kv_heads: int) -> None:
    config = Config.from_flat(
        {"depth": 4, "head_dim": 64, "vocab_size": 1024, "max_seq_len": 128, "num_kv_heads": kv_heads}
    )
    model = GPT(gpt_config(config))
    model.set_compute_dtype(getattr(torch, dtype))
    rates = dict.fromkeys(("embedding_lr", "unembedding_lr", "matrix_lr", "scalar_lr", "weight_decay"), 0.1)
    optimizer = build_optimizer(model, **rates)
    shape = model_shape(config.model)
    assert gradient_bytes(shape, dtype) == sum(p.nbytes for p in model.parameters())
    assert weight_bytes(shape, dtype) == sum(p.nbytes for p in (*model.parameters(), *model.buffers()))
    assert optimizer_bytes(shape, dtype, 1) == sum(t.nbytes for _, t in optimizer.owned_state().values())


def saved_by_autograd(
    config: Config, dtype: str, *, rows: int, loss: str, grad_checkpoint: bool, compiled: bool
) -> int:
    """Bytes that a forward pass of the real model keeps, parameters and tables left out."""
    model = GPT(gpt_config(config))
    model.set_compute_dtype(getattr(torch, dtype))
    model.init_weights(seed=0)
    model.grad_checkpoint, model.loss_impl = grad_checkpoint, loss
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    saved: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage
        return tensor

    # This back-end partitions forward and backward as a GPU's does, and generates no code.
    forward = torch.compile(model, backend="aot_eager_decomp_partition", dynamic=False) if compiled else model
    T, V = config.model.max_seq_len, config.model.vocab_size
    tokens = torch.randint(0, V, (rows, T + 1), generator=torch.Generator().manual_seed(3))
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        forward(tokens[:, :-1], tokens[:, 1:], reduction="sum")
    return sum(storage.nbytes() for storage in saved.values())


@pytest.mark.parametrize(
    ("dtype", "pattern", "kv_heads", "T", "grad_checkpoint"),
    [
        ("float32", "L", 4, 256, False),
        ("bfloat16", "SSSL", 4, 512, False),
        ("float32", "SL", 2, 1024, False),
        ("bfloat16", "SSSL", 4, 512, True),
    ],
)
def test_activations_are_what_autograd_saves(
    dtype: str, pattern: str, kv_heads: int, T: int, grad_checkpoint: bool
) -> None:
    flags = {"depth": 4, "head_dim": 64, "vocab_size": 512, "window_pattern": pattern, "num_kv_heads": kv_heads}
    config = Config.from_flat({**flags, "max_seq_len": T})
    setting: dict[str, Any] = {"rows": 2, "loss": "chunked", "grad_checkpoint": grad_checkpoint, "compiled": False}
    run = TrainingPass(shape=model_shape(config.model), device="cpu", dtype=dtype, **setting)
    # The chunked loss saves the gradients of the stream (as large as its input) and of the head.
    counted = saved_by_autograd(config, dtype, **setting) - 4 * 512 * 256
    assert saved_bytes(run) == pytest.approx(counted, rel=0.02)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")  # torch's own imports when it compiles
@pytest.mark.parametrize("grad_checkpoint", [False, True])
def test_compiled_activations_and_logits_are_what_the_partitioner_saves(grad_checkpoint: bool) -> None:
    config = Config.from_flat(
        {"depth": 3, "aspect_ratio": 64, "head_dim": 64, "vocab_size": 512, "max_seq_len": 256, "window_pattern": "L"}
    )
    setting: dict[str, Any] = {"rows": 2, "loss": "full", "grad_checkpoint": grad_checkpoint, "compiled": True}
    run = TrainingPass(shape=model_shape(config.model), device="cpu", dtype="bfloat16", **setting)
    counted = saved_by_autograd(config, "bfloat16", **setting)
    assert saved_bytes(run) + logits_bytes(run)[0] == pytest.approx(counted, rel=0.02)


def test_a_save_in_the_background_is_counted_on_a_cpu() -> None:
    shape = shape_of(depth=4)
    plain, saving = (forecast(shape, 4, **CPU, host_copy=copy) for copy in (False, True))
    assert saving.total - plain.total == plain.weights + plain.optimizer
    assert forecast(shape, 4, host_copy=True) == forecast(shape, 4)


def test_no_batch_fits_into_no_memory() -> None:
    assert largest_batch(shape_of(depth=10), rows=256, memory_bytes=2**30, **SETTING) is None


def test_the_largest_batch_divides_the_rows_and_stays_within_a_rank() -> None:
    shape = shape_of(depth=2, max_seq_len=128)
    huge = 2**50
    assert largest_batch(shape, rows=24, memory_bytes=huge, **{**SETTING, "rows_per_rank": 24}) == 8
    assert largest_batch(shape, rows=64, memory_bytes=huge, **{**SETTING, "rows_per_rank": 16, "workers": 4}) == 16
