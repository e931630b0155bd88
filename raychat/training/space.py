"""Room for checkpoints, looked at before a run begins."""

from raychat.errors import ConfigError
from raychat.storage import Store
from raychat.training.checkpoint import estimated_bytes


def check_space(store: Store, num_params: int) -> None:
    """Refuse a place that has no room for two checkpoints of a model of so many parameters.

    Raises:
        ConfigError: it has not.
    """
    need, free = 2 * estimated_bytes(num_params), store.free_bytes()
    if free is not None and free < need:
        raise ConfigError(
            f"{store.uri} has {free / 1e9:.2f} GB free, and two checkpoints of this model take {need / 1e9:.2f} GB: "
            "free some space, or give a --storage-path with more."
        )
