"""What a user can cause and mend. Everything else is a defect and keeps its traceback."""


class RaychatError(Exception):
    """A mistake in what the user gave. Jobs print the message without a traceback and exit with `exit_code`."""

    exit_code = 2


class ConfigError(RaychatError):
    """A flag, or a combination of flags, that cannot work. The message names a value that does."""


class DataError(RaychatError):
    """A corpus, tokenizer or token shard that cannot be used as it is."""


class CheckpointError(RaychatError):
    """A checkpoint or run directory that cannot be continued from."""
