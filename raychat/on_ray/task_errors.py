"""Errors for the user to read, brought out of Ray Data tasks as they were raised.

Ray Data adds lines of its own to the message of whatever a task raises, wraps it, and hands on a traceback as the text.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import ray.data

from raychat.errors import RaychatError


class TaskError(Exception):
    """Carries `error` out of a task, out of reach of what is done to the message."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def __reduce__(self) -> tuple[Any, ...]:
        return TaskError, (self.error,)


@contextlib.contextmanager
def in_task() -> Iterator[None]:
    """What a task does goes into this block."""
    try:
        yield
    except (RaychatError, OSError) as error:
        raise TaskError(error) from error


@contextlib.contextmanager
def of_tasks() -> Iterator[None]:
    """Making and reading a dataset goes into this block.

    Raises:
        RaychatError, OSError: what a task raised.
    """
    ray.data.DataContext.get_current().raise_original_map_exception = True
    try:
        yield
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, TaskError):
            raise error.cause.error from None
        raise
