"""Which settings a run may change when it goes on from a checkpoint.

free: who computes, how often something is looked at or saved, where things are kept.
permission: rates, decay, schedule, horizon, precision; the new values act, whatever the optimizer state says.
never: what the weights or the data order are made of. The data themselves are compared by their fingerprint.
"""

from pathlib import Path
from typing import Any, Literal

from raychat.config import Config
from raychat.errors import CheckpointError
from raychat.planning import recipe
from raychat.uris import public_uri

Kind = Literal["free", "permission", "never"]

NEVER = frozenset(
    {
        "depth",
        "aspect_ratio",
        "head_dim",
        "num_kv_heads",
        "max_seq_len",
        "window_pattern",
        "short_window_ratio",
        "vocab_size",
        "seed",
        "init_from",
        "perturbation",
    }
)
PERMISSION = frozenset(
    {
        "dtype",
        "fp8",
        "fp8_recipe",
        "embedding_lr",
        "unembedding_lr",
        "matrix_lr",
        "scalar_lr",
        "weight_decay",
        "adam_beta1",
        "adam_beta2",
        "warmup_steps",
        "warmup_ratio",
        "warmup_from",
        "warmdown_ratio",
        "final_lr_frac",
        "grad_clip",
        "muon_momentum_start",
        "muon_momentum",
        "muon_momentum_steps",
        "muon_momentum_final",
        "num_iterations",
        "target_flops",
        "target_param_data_ratio",
        "total_batch_size",
    }
)


def kind_of(name: str) -> Kind:
    """The class of a setting."""
    return "never" if name in NEVER else "permission" if name in PERMISSION else "free"


def check_changes(
    old: dict[str, Any], new: Config, *, old_fingerprint: str, new_fingerprint: str, permitted: bool
) -> list[str]:
    """Compare the configuration `old` of a checkpoint with the one that wants to go on from it.

    Returns:
        What changed with permission, as `name: old -> new`.

    Raises:
        CheckpointError: naming the fields, when something changed that must not, or not without permission.
    """
    before, after = _comparable(Config.from_flat(old)), _comparable(new)
    changed = {name: f"{name}: {before[name]} -> {after[name]}" for name in after if before.get(name) != after[name]}
    never = [text for name, text in changed.items() if kind_of(name) == "never"]
    if old_fingerprint != new_fingerprint:
        never.append(f"the data (fingerprint {old_fingerprint} -> {new_fingerprint}: corpus, tokenizer or packing)")
    if never:
        raise CheckpointError(
            f"The run {new.run_dir} cannot go on with another {'; '.join(never)}. Give what it was started with, "
            "another --model-tag, or --fresh to start over."
        )
    permission = [text for name, text in changed.items() if kind_of(name) == "permission"]
    if permission and not permitted:
        raise CheckpointError(
            f"The run {new.run_dir} was started with other settings ({'; '.join(permission)}). Add --allow-config-change "
            "to go on with the new ones, or give the old ones."
        )
    return permission


def _absolute(place: str) -> str:
    """A place as it is written down: drivers make paths absolute, and leave credentials out."""
    return public_uri(place) if not place or "://" in place else str(Path(place).expanduser().absolute())


def _comparable(config: Config) -> dict[str, Any]:
    """Settings with the horizon and the batch as what they come to: asking for them in another way is no change."""
    values = {name: value for name, value in config.flat().items() if kind_of(name) != "free"}
    for name in ("target_flops", "target_param_data_ratio", "weight_decay"):
        del values[name]
    run = recipe(config)
    values |= {
        "num_iterations": run.num_iterations,
        "total_batch_size": run.total_batch_size,
        "weight_decay": run.weight_decay,
        "window_pattern": values["window_pattern"].upper(),
        "init_from": _absolute(values["init_from"]),
    }
    return values
