"""The optimizer: AdamW and Muon as pure functions, parameter groups, schedules, and the sharded hybrid."""

from torch import nn

from raychat.optim.groups import parameter_groups
from raychat.optim.sharded import MuonAdamW

__all__ = ["MuonAdamW", "build_optimizer"]


def build_optimizer(
    model: nn.Module,
    embedding_lr: float = 0.3,
    unembedding_lr: float = 0.008,
    matrix_lr: float = 0.02,
    scalar_lr: float = 0.5,
    weight_decay: float = 0.28,
    adam_beta1: float | None = None,
    adam_beta2: float | None = None,
) -> MuonAdamW:
    """The optimizer of a GPT with the lineage's groups and rates; see `parameter_groups`.

    Build it after `set_compute_dtype`, on materialised parameters, and inside the process group where there is one.
    """
    return MuonAdamW(
        parameter_groups(
            model,
            embedding_lr=embedding_lr,
            unembedding_lr=unembedding_lr,
            matrix_lr=matrix_lr,
            scalar_lr=scalar_lr,
            weight_decay=weight_decay,
            adam_beta1=adam_beta1,
            adam_beta2=adam_beta2,
        )
    )
