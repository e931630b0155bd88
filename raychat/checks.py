"""Refusals that several settings share, each with the value that was given and one that works."""

import difflib
import math
import re
import socket
from collections.abc import Iterable

from raychat.errors import ConfigError


def require(condition: bool, message: str) -> None:
    """Raise ConfigError with `message` unless `condition` holds."""
    if not condition:
        raise ConfigError(message)


def positive(group: object, *names: str) -> None:
    """Refuse fields of `group` that are not above 0 and finite."""
    for name in names:
        value = getattr(group, name)
        require(0 < value < math.inf, f"--{name.replace('_', '-')} must be above 0, got {value}.")


def positive_or_minus_one(group: object, *names: str) -> None:
    """Refuse fields of `group` that are neither above 0 nor -1, which turns them off."""
    for name in names:
        value = getattr(group, name)
        require(
            0 < value < math.inf or value == -1,
            f"--{name.replace('_', '-')} must be above 0, or -1 to turn it off, got {value}.",
        )


def not_negative(group: object, *names: str) -> None:
    """Refuse fields of `group` that are below 0 or not finite."""
    for name in names:
        value = getattr(group, name)
        require(0 <= value < math.inf, f"--{name.replace('_', '-')} must be 0 or more, got {value}.")


def check_batch(total_batch_size: int, device_batch_size: int, max_seq_len: int) -> None:
    """Refuse a total batch (tokens) that is no whole number of passes, and say which device batches fit it."""
    if total_batch_size % (device_batch_size * max_seq_len) == 0:
        return
    if total_batch_size % max_seq_len:
        below = total_batch_size // max_seq_len * max_seq_len
        near = " or ".join(f"{n:,}" for n in (below, below + max_seq_len) if n)
        raise ConfigError(
            f"--total-batch-size {total_batch_size:,} tokens is no whole number of sequences of {max_seq_len:,} tokens "
            f"(--max-seq-len). Use {near}."
        )
    rows = total_batch_size // max_seq_len
    fitting = ", ".join(str(2**k) for k in range(rows.bit_length()) if rows % 2**k == 0)
    raise ConfigError(
        f"--device-batch-size {device_batch_size} is impossible: {total_batch_size:,} tokens / ({device_batch_size} x "
        f"{max_seq_len:,}) = {total_batch_size / (device_batch_size * max_seq_len):.2f} passes, which must be a whole number. "
        f"Powers of two that divide this batch: {fitting}."
    )


def check_reachable(address: str) -> None:
    """Refuse a Ray address where nothing listens, in seconds: Ray itself would try for minutes."""
    found = re.fullmatch(r"(?:ray://)?\[?([^/]*?)\]?:(\d{1,5})", address)
    if not found:
        require(
            address in ("auto", "local") or "://" in address,
            f"--address {address!r} is no address of a Ray cluster: give host:port, as `ray start --head` prints it, or auto.",
        )
        return
    try:
        socket.create_connection((found[1], int(found[2])), timeout=10).close()
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"There is no Ray cluster at {address!r} ({error}). Start one with `ray start --head`, correct --address or "
            "RAY_ADDRESS, or leave both out to start one here."
        ) from error


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`; did you mean a or b?` for the nearest of `known`, or nothing."""
    near = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(near)}?" if near else ""
