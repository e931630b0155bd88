"""`--grad-checkpoint`: less is kept between the passes, and not a bit of the result changes."""

import os
import platform
import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from raychat.config import Config
from raychat.model import GPT, GPTConfig
from raychat.model.cache import KVCache
from raychat.training.build import build_model
from raychat.training.device import resolve

SHAPE = GPTConfig(sequence_len=256, vocab_size=320, n_layer=4, n_head=4, n_kv_head=2, n_embd=64, window_pattern="SL")


def gpt(*, grad_checkpoint: bool, dtype: torch.dtype = torch.float32, loss: str = "full") -> GPT:
    model = GPT(SHAPE)
    model.set_compute_dtype(dtype)
    model.init_weights(seed=1)
    # A fresh head and fresh projections are near zero: gradients would not reach the blocks.
    with torch.no_grad():
        for i, param in enumerate(model.parameters()):
            param.add_(torch.randn(param.shape, generator=torch.Generator().manual_seed(i)).to(param.dtype), alpha=0.05)
    model.loss_impl, model.grad_checkpoint = loss, grad_checkpoint
    return model


def rows() -> tuple[Tensor, Tensor]:
    tokens = torch.randint(0, 320, (2, 257), generator=torch.Generator().manual_seed(7))
    return tokens[:, :-1], tokens[:, 1:]


def loss_and_gradients(model: GPT) -> list[Tensor]:
    loss = model(*rows(), reduction="sum")
    (loss / 512).backward()
    grads = [p.grad for p in model.parameters()]
    return [loss.detach(), *(g for g in grads if g is not None)]


def saved_bytes(model: GPT) -> int:
    """Bytes that one forward pass keeps for its backward pass, the parameters left out."""
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(*rows())
    assert loss.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("loss", ["full", "chunked"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_and_gradients_are_the_same_bit_for_bit(dtype: torch.dtype, loss: str) -> None:
    plain = loss_and_gradients(gpt(grad_checkpoint=False, dtype=dtype, loss=loss))
    again = loss_and_gradients(gpt(grad_checkpoint=True, dtype=dtype, loss=loss))
    assert len(plain) == len(again) == 1 + len(list(GPT(SHAPE).parameters()))
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    assert all(g.abs().sum() > 0 for g in plain)


def test_a_block_keeps_its_input_and_nothing_else() -> None:
    plain, again = (saved_bytes(gpt(grad_checkpoint=on, loss="chunked")) for on in (False, True))
    assert again < plain / 3
    stream = 2 * 256 * 64 * 4
    deeper = GPTConfig(**{**vars(SHAPE), "n_layer": 6})
    six = GPT(deeper)
    six.loss_impl, six.grad_checkpoint = "chunked", True
    assert saved_bytes(six) == pytest.approx(again + 2 * stream, abs=4096)


@pytest.mark.parametrize("mode", ["eval", "no_grad", "cache"])
def test_outside_of_training_nothing_is_computed_twice(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_args: object, **_kwargs: object) -> None:
        pytest.fail("a block was checkpointed")

    monkeypatch.setattr("raychat.model.gpt.checkpoint", never)
    model = gpt(grad_checkpoint=True)
    if mode == "eval":
        model.eval()(*rows())
        return
    with torch.no_grad():
        model(*rows()) if mode == "no_grad" else model(rows()[0], cache=KVCache(model, rows=2, capacity=256))


def test_it_works_under_torch_compile() -> None:
    model = gpt(grad_checkpoint=True)
    plain = loss_and_gradients(gpt(grad_checkpoint=False))
    loss = torch.compile(model, backend="aot_eager", dynamic=False)(*rows(), reduction="sum")
    (loss / 512).backward()
    torch.testing.assert_close([loss.detach(), *(p.grad for p in model.parameters())], plain, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("on", [True, False])
def test_the_setting_reaches_the_model_and_the_heap(on: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    for way in ("give_back_freed_memory", "keep_freed_memory"):
        monkeypatch.setattr(f"raychat.training.build.{way}", lambda way=way: asked.append(way))
    config = Config.from_flat({"depth": 2, "grad_checkpoint": on, "device_type": "cpu", "vocab_size": 512})
    resolved = resolve(config, local_world_size=1)
    assert build_model(config, resolved, torch.device("cpu")).grad_checkpoint is on
    assert asked == ["give_back_freed_memory" if on else "keep_freed_memory"]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's heap can be asked")
@pytest.mark.parametrize(
    ("asked", "variable", "kept"),
    [
        ("give_back_freed_memory", "", 1),
        ("keep_freed_memory", "", 20),
        ("keep_freed_memory", "MALLOC_MMAP_THRESHOLD_", 1),  # the user's own choice stands
    ],
)
def test_freed_memory_goes_back_to_the_system_or_stays(asked: str, variable: str, kept: int) -> None:
    code = f"""
from pathlib import Path
from raychat.training.heap import {asked}
import torch

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

assert {asked}() is not {bool(variable)}
del (warm := {{0: torch.ones(2**22)}})[0]  # 16 MiB: freed, it would move glibc's threshold above its size
before = resident()
blocks = [torch.ones(2**21) for _ in range(20)]
del blocks[1:]  # the first one stays
print(resident() - before)
"""
    own = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    environment = own | ({variable: str(2**20)} if variable else {})
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    ).stdout
    assert abs(int(out) - kept * 2**23) < 2 * 2**23  # blocks of 8 MiB
