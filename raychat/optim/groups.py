"""Which parameter gets which optimizer, rate and decay. A wrong grouping would raise no error: the table is here, once."""

from typing import Any, NamedTuple

import torch
from torch import nn

REFERENCE_WIDTH = 768  # the rates of head and embeddings were tuned at this n_embd
EPS = 1e-10


class _AdamW(NamedTuple):
    lr: float
    betas: tuple[float, float]
    weight_decay: float


def parameter_groups(
    model: nn.Module,
    *,
    embedding_lr: float,
    unembedding_lr: float,
    matrix_lr: float,
    scalar_lr: float,
    weight_decay: float,
    adam_beta1: float | None = None,
    adam_beta2: float | None = None,
) -> list[dict[str, Any]]:
    """Parameter groups of a GPT: six of kind "adamw" and one of kind "muon", each with `names` in the order of `params`.

    The rates of head and embeddings are scaled by (n_embd / 768) ** -0.5 here. `adam_beta1` and `adam_beta2` replace the
    betas of these three groups only. `weight_decay` is Muon's; the others' is fixed.
    """
    wte: torch.Tensor = model.get_parameter("transformer.wte.weight")
    scale = (wte.size(1) / REFERENCE_WIDTH) ** -0.5

    def betas(beta1: float, beta2: float) -> tuple[float, float]:
        return (beta1 if adam_beta1 is None else adam_beta1, beta2 if adam_beta2 is None else adam_beta2)

    adamw = {
        "lm_head": _AdamW(unembedding_lr * scale, betas(0.8, 0.96), 0.01),
        "wte": _AdamW(embedding_lr * scale, betas(0.8, 0.995), 0.001),
        "value_embeds": _AdamW(0.5 * embedding_lr * scale, betas(0.8, 0.995), 0.01),
        "resid_lambdas": _AdamW(0.01 * scalar_lr, (0.8, 0.95), 0.05),
        "x0_lambdas": _AdamW(scalar_lr, (0.96, 0.95), 0.0),
        "smear_and_backout": _AdamW(0.2, (0.8, 0.95), 0.0),
    }
    members: dict[str, list[str]] = {role: [] for role in (*adamw, "matrices")}
    for name, _ in model.named_parameters():
        members[group_of(name)].append(name)
    groups: list[dict[str, Any]] = [
        {"kind": "adamw", **row._asdict(), "eps": EPS, "names": members[role]} for role, row in adamw.items()
    ]
    groups.append(
        {
            "kind": "muon",
            "lr": matrix_lr,
            "momentum": 0.85,
            "beta2": 0.9,
            "weight_decay": weight_decay,
            # The embeddings are stored in bfloat16 exactly when the model computes in it.
            "product_dtype": torch.bfloat16 if wte.dtype is torch.bfloat16 else torch.float32,
            "names": members["matrices"],
        }
    )
    for group in groups:
        group["initial_lr"] = group["lr"]
        group["params"] = [model.get_parameter(name) for name in group["names"]]
    return groups


def group_of(name: str) -> str:
    """The group of a parameter by its name. A name that no rule knows raises ValueError."""
    if name.startswith("transformer.h."):
        return "matrices"
    if name.startswith("value_embeds."):
        return "value_embeds"
    if name in ("smear_gate.weight", "smear_lambda", "backout_lambda"):
        return "smear_and_backout"
    role = name.removeprefix("transformer.").removesuffix(".weight")
    if role in ("lm_head", "wte", "resid_lambdas", "x0_lambdas"):
        return role
    raise ValueError(f"parameter {name!r} belongs to no group of the optimizer; add it to raychat.optim.groups")
