"""Where a run starts: the checkpoint that it goes on from, and whether these settings and data may go on from it."""

import json
from collections.abc import Callable

from raychat.config import Config
from raychat.data.prepare import TokenData
from raychat.data.tokenizer import Tokenizer
from raychat.errors import CheckpointError, RaychatError
from raychat.planning import recipe
from raychat.storage import Store
from raychat.training import checkpoint
from raychat.training.changes import check_changes
from raychat.training.checkpoint import Checkpoint
from raychat.training.initial import check_initial


def find_start(config: Config, root: Store, *, echo: Callable[[str], None]) -> Checkpoint | None:
    """The checkpoint below `root` that was asked for, or the newest good one; None to start at the beginning.

    Raises:
        CheckpointError: the one that was asked for is not there, or damaged.
    """
    wanted = config.run.resume_from_step
    if wanted < 0:
        return checkpoint.newest(root, echo=echo)
    there = checkpoint.steps(root)
    if wanted not in there:
        raise CheckpointError(
            f"--resume-from-step {wanted}: {root.uri} holds "
            + (
                f"the steps {', '.join(map(str, sorted(there)))}."
                if there
                else "no checkpoint: leave it out to start at the beginning."
            )
        )
    return checkpoint.verify(root.child(checkpoint.folder_name(wanted)))


def check_start(config: Config, data: TokenData, start: Checkpoint | None, *, echo: Callable[[str], None]) -> list[str]:
    """What is other than before in a run that goes on from `start`; empty when it will come out the same.

    Raises:
        CheckpointError: the run cannot go on like this.
        ConfigError: a run that begins cannot begin with the weights of `--init-from`.
    """
    if start is None:
        if config.run.init_from:
            check_initial(config, Tokenizer.load(data.tokenizer_dir), echo=echo)
        return [] if _begun_alike(config, data) else ["what was begun here without a checkpoint"]
    run = config.run
    changed = check_changes(
        start.meta["config"],
        config,
        old_fingerprint=start.meta["fingerprint"],
        new_fingerprint=data.manifest.fingerprint,
        permitted=run.allow_config_change or run.resume_from_step >= 0,
    )
    if changed:
        echo(f"going on with other settings: {'; '.join(changed)}")
    T, lanes, plan = config.model.max_seq_len, start.meta["lanes"], recipe(config)
    if plan.total_batch_size // T % lanes:
        raise CheckpointError(
            f"The run {config.run_dir} reads its rows in {lanes} lanes, and {plan.total_batch_size:,} tokens are "
            f"{plan.total_batch_size // T} rows: give a --total-batch-size that is a multiple of {lanes * T:,}."
        )
    if start.step > plan.num_iterations:
        raise CheckpointError(
            f"The run {config.run_dir} is at step {start.step:,} and the horizon is now "
            f"{plan.num_iterations:,}: give a longer one, or go back with --resume-from-step."
        )
    return changed


def _begun_alike(config: Config, data: TokenData) -> bool:
    """Whether a run that never saved was begun with these settings and data, so that it will come out the same."""
    path = config.run_dir / "config.json"
    if not path.exists():
        return True
    begun = json.loads(path.read_text())
    fingerprints = {"old_fingerprint": begun["data_fingerprint"], "new_fingerprint": data.manifest.fingerprint}
    try:
        return not check_changes(begun["config"], config, **fingerprints, permitted=False)
    except RaychatError:
        return False
