"""What the tests of checkpoints share: a small model in training, and the record that is saved with it."""

from typing import Any

import torch

from raychat.model import GPT, GPTConfig
from raychat.optim import MuonAdamW, build_optimizer

SHAPE = {
    "sequence_len": 16,
    "vocab_size": 70,
    "n_layer": 2,
    "n_head": 2,
    "n_kv_head": 2,
    "n_embd": 32,
    "window_pattern": "L",
}


def trained(steps: int = 2, seed: int = 0) -> tuple[GPT, MuonAdamW]:
    """A small model and its optimizer after some steps, on as many ranks as there are."""
    model = GPT(GPTConfig(**SHAPE))
    optimizer = build_optimizer(model)
    train(model, optimizer, steps, seed)
    return model, optimizer


def train(model: GPT, optimizer: MuonAdamW, steps: int, seed: int = 0) -> None:
    """Some more steps."""
    for step in range(steps):
        tokens = torch.randint(70, (4, 17), generator=torch.Generator().manual_seed(100 * seed + step))
        model(tokens[:, :-1], tokens[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()


def meta(step: int, val_bpb: float | None = None, *, tag: str = "tag") -> dict[str, Any]:
    """What a checkpoint records besides weights and moments, as far as the tests need it."""
    return {"step": step, "state": {"val_bpb": val_bpb, "val_step": step}, "config": {"model_tag": tag}, "attempt": 1}


def values(model: GPT, optimizer: MuonAdamW) -> dict[str, torch.Tensor]:
    """A copy of all weights and of this rank's moments."""
    tensors = model.state_dict() | {key: tensor for key, (_, tensor) in optimizer.owned_state().items()}
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
