"""What the base and the space of a search may hold, and what early stopping and late forks need of them."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from raychat.checks import did_you_mean, require
from raychat.config import Config
from raychat.errors import ConfigError
from raychat.planning import recipe
from raychat.search.space import Parameter
from raychat.uris import HIDDEN, lacks_credentials, public_uri

OWN = {
    "model_tag": "every run of a search has its own; the search's name decides it",
    "seed": "give seeds = [...] beside [base]",
    "mlflow_parent": "the search is the parent itself",
    "stop_at": "the scheduler decides it",
    "perturbation": "noise_repeats decides it",
    "resume_from_step": "resume the search instead",
    "fresh": "give the search another name instead",
    "allow_config_change": "a search that goes on keeps its configurations",
    "dry_run": "it trains nothing",
    "dry_run_steps": "give dry_run_steps beside [base]",
}
"""flags that a search sets itself -> what to do instead"""

LATE = ("warmdown_ratio", "final_lr_frac", "muon_momentum_final")
"""settings that act only from the beginning of the warmdown on"""

_SPACES = ("model", "precision", "horizon", "batch", "optim", "save", "data")
"""groups of settings that a space may vary, besides num_workers and init_from"""


def check_base(base: Mapping[str, Any]) -> None:
    """Refuse flags that the search sets itself."""
    for name in base:
        own = name.replace("-", "_")
        require(own not in OWN, f"[base] may not set {own}: {OWN.get(own)}.")


def check_credentials(base: Mapping[str, Any]) -> None:
    """Refuse to run with a specification that was written down, where credentials were left out: they must be given again."""
    lacking = [
        name
        for name, value in base.items()
        if isinstance(value, str)
        if lacks_credentials(value) or (name.replace("-", "_") == "on_event" and value == HIDDEN)
    ]
    flags = " ".join(f"--{name.replace('_', '-')} ..." for name in lacking)
    require(
        not lacking,
        f"Credentials are not written down, and {', '.join(lacking)} had some: give the whole value of each again, as "
        f"jobs/search.py --resume NAME -- {flags}",
    )


def check_space_name(name: str, base: Config) -> None:
    """Refuse a setting that does not exist, and one that must be the same in all runs of a search."""
    groups = {
        leaf.name: group.name
        for group in dataclasses.fields(base)
        for leaf in dataclasses.fields(getattr(base, group.name))
    }
    require(name in groups, f"In [space]: There is no setting {name!r}{did_you_mean(name, groups) or '.'}")
    require(name not in OWN, f"[space] may not vary {name}: {OWN.get(name)}.")
    compared = name in ("eval_tokens", "val_corpus") or (name == "corpus" and not base.data.val_corpus)
    require(
        not compared,
        f"[space] may not vary {name}: val_bpb compares on one validation text only. Search each in its own search"
        + (", or name the validation text as val_corpus in [base]." if name == "corpus" else "."),
    )
    require(
        groups[name] in _SPACES or name in ("num_workers", "init_from"),
        f"[space] may not vary {name}: it changes nothing of the model. Set it in [base].",
    )


def check_value(name: str, value: Any, base: Config) -> None:
    """Refuse a value of the wrong type. A number that cannot be with others is found with its configuration: infeasible."""
    require(
        not isinstance(value, str) or public_uri(value) == value,
        f"[space] may not hold credentials, and {name} {public_uri(str(value))} does: values of a space are in the names of "
        "runs. Give them in the environment of the search (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY).",
    )
    default = Config().flat()[name]
    judged_later = (
        _is_number(value) and _is_number(default) and not (isinstance(value, float) and isinstance(default, int))
    )
    try:
        Config.from_flat({name: value}, base)
    except ConfigError as error:
        if not judged_later:
            raise ConfigError(f"In [space]: {error}") from error


def check_continued(base: Config, space: Mapping[str, Parameter]) -> None:
    """Refuse `asha` where a rate falls over the run: runs are then not comparable before their end."""
    for name, value in _warmdowns(base, space):
        require(
            value == 0,
            f"scheduler = 'asha' compares runs in the middle, which ranks them only while all rates are constant; {name} is "
            f"{value:g}. On decaying rates the loss at 15 to 45% of a run hardly ranks its end (rank correlation 0.09 to "
            "0.23): use scheduler = 'rungs', or warmdown_ratio = 0 in [base].",
        )


def check_forks(base: Config, space: Mapping[str, Parameter], fork_at: float) -> None:
    """Refuse a fork where some configuration differs from the trunk before it."""
    for name in space:
        require(
            name in LATE,
            f"fork_at = {fork_at:g}: {name} acts from the first step on, so a run that takes it up at {fork_at:.0%} is "
            f"another one. Settings that act late: {', '.join(LATE)}. Search {name} without fork_at.",
        )
    iterations = recipe(base).num_iterations
    step = max(1, round(fork_at * iterations))
    for name, value in _warmdowns(base, space):
        begins = iterations - round(value * iterations)
        require(
            begins >= step,
            f"fork_at = {fork_at:g} is step {step} of {iterations}, and with {name} {value:g} the warmdown begins at step "
            f"{begins}: the trunk would have trained on other rates. Use fork_at up to {begins / iterations:.2g}, or a "
            f"warmdown_ratio up to {1 - step / iterations:.2g} in [base] and [space].",
        )


def _warmdowns(base: Config, space: Mapping[str, Parameter]) -> Iterator[tuple[str, float]]:
    yield "warmdown_ratio of [base]", base.optim.warmdown_ratio
    if (values := space.get("warmdown_ratio")) is not None:
        yield from (("warmdown_ratio in [space]", value) for value in values.bounds())


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
