"""Saving while training goes on: a copy in memory, then a thread that writes it and has all ranks agree on the outcome.

On a file system ranks write into a hidden staging folder on storage that they share, and rank 0 renames it when all
have. In an object store they write into a folder within that of the step, and rank 0 writes the marker last.
"""

import errno
import json
import logging
import os
import sys
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from raychat.errors import CheckpointError
from raychat.model import GPT
from raychat.optim import MuonAdamW
from raychat.storage import Store
from raychat.training import checkpoint
from raychat.training.snapshot import Snapshot
from raychat.training.world import World

SPARE = 1.1  # free space asked for, over the size of what is written
# That ranks wait for another's files. One that died is noticed at once, one that hangs by its beats; a timeout would close
# the group's connections, and with them end every later save.
SLOWEST_RANK = timedelta(hours=12)
CLOSE_S = 60.0  # that `close` waits for a save in flight
# Added for the thread that writes while training goes on, on Linux: at 19, busy processors leave it so little that a save of
# 0.2 s takes 20; it costs training the same, and all of that time the newest checkpoint is an old one.
NICENESS = 10
FULL = (errno.ENOSPC, errno.EDQUOT)

logger = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class SaveOutcome:
    """How a save went, the same on all ranks. `stall_s`: training stood still; `total_s`: from the request to the end."""

    step: int
    uri: str | None
    """of the checkpoint, without credentials; None when it failed"""
    error: str | None
    fenced: bool
    """it failed because another driver, or a later attempt, writes now: stop at once"""
    state: dict[str, Any]
    stall_s: float
    total_s: float
    bytes: int


class Saver:
    """One per rank, made by all ranks together. At most one save is in flight, from one copy in host memory.

    Nothing here raises into training: a save that fails says so in its outcome.
    """

    def __init__(self, root: Store | Path, world: World, *, keep: int, fence: Callable[[], bool]) -> None:
        """`root` is the folder of the checkpoints, of which the newest `keep` and the best are kept.

        `fence` tells rank 0, before it changes anything on storage, whether another one has taken the run over.
        """
        self.root, self.keep, self.fence = Store.of(root), keep, fence
        self._world = world.apart(SLOWEST_RANK)
        self._snapshot = Snapshot()
        self._thread: threading.Thread | None = None
        self._outcomes: deque[SaveOutcome] = deque()

    @property
    def busy(self) -> bool:
        """Whether a save is in flight, as far as this rank sees."""
        return self._thread is not None and self._thread.is_alive()

    def begin(self, model: GPT, optimizer: MuonAdamW, meta: dict[str, Any], *, urgent: bool = False) -> None:
        """Start to save; returns when what this rank owns is copied. Every rank calls this; `meta` is rank 0's.

        `urgent`: training stands still until it is done. A save that is still in flight is finished first; its outcome
        stays to be asked for.
        """
        start = time.perf_counter()
        if self._thread:
            self._thread.join()
        request = _Request(step=meta["step"], state=dict(meta["state"]), started=start)
        try:
            request = replace(request, **self._copy(model, optimizer, meta))
        except Exception as error:  # noqa: BLE001 - whatever it is, all ranks learn of it in the thread
            request = replace(request, problem=f"{type(error).__name__}: {error}")
        stall_s = time.perf_counter() - start
        self._thread = threading.Thread(target=self._run, args=(request, stall_s, urgent), daemon=True, name="saver")
        self._thread.start()

    def finished(self) -> SaveOutcome | None:
        """The outcome of a save that has ended and was not asked for yet. Never blocks."""
        return self._outcomes.popleft() if self._outcomes else None

    def wait(self) -> SaveOutcome | None:
        """Wait for the save in flight. Every rank calls this and gets what is new to rank 0; None: nothing is."""
        start = time.perf_counter()
        if self._thread:
            self._thread.join()
        mine = self._outcomes.pop() if self._outcomes else None
        if mine:
            mine = replace(mine, stall_s=mine.stall_s + time.perf_counter() - start)
        try:
            return self._world.broadcast(mine)
        except Exception as error:  # noqa: BLE001 - a rank that died, which training notices by itself
            return replace(mine, error=f"{type(error).__name__}: {error}", uri=None) if mine else None

    def close(self) -> None:
        """Give a save in flight some time to end, and the process group back."""
        if self._thread:
            self._thread.join(CLOSE_S)
        if not self.busy and self._world.group is not None and dist.is_initialized():
            dist.destroy_process_group(self._world.group)

    def _copy(self, model: GPT, optimizer: MuonAdamW, meta: dict[str, Any]) -> dict[str, Any]:
        """Take the snapshot; what a request says about it."""
        rank, world_size = self._world.rank, self._world.world_size
        facts = {"format": checkpoint.FORMAT, "optimizer_steps": optimizer.step_count}
        text = json.dumps(meta | facts, indent=2, allow_nan=False)
        owned = optimizer.owned_state()
        contents = {checkpoint.optimizer_name(rank, world_size): {key: tensor for key, (_, tensor) in owned.items()}}
        if rank == 0:
            contents[checkpoint.MODEL] = model.state_dict()
        self._snapshot.take(contents)
        slices = {key: [first, first + len(tensor)] for key, (first, tensor) in owned.items()}
        return {"meta": text.encode(), "identity": checkpoint.identity(meta), "slices": slices}

    def _run(self, request: "_Request", stall_s: float, urgent: bool) -> None:
        if not urgent:
            _step_back()
        size, error, fenced = 0, None, False
        folder = self.root.child(checkpoint.folder_name(request.step))
        try:
            size = self._save(request)
        except _SaveError as failure:
            error, fenced = str(failure), failure.fenced
        except Exception as failure:  # noqa: BLE001 - such as a rank that died
            error = f"{type(failure).__name__}: {failure}"
        outcome = SaveOutcome(
            step=request.step,
            uri=None if error else folder.uri,
            error=error,
            fenced=fenced,
            state=request.state,
            stall_s=stall_s,
            total_s=time.perf_counter() - request.started,
            bytes=size,
        )
        self._outcomes.append(outcome)
        if not error and self._world.rank == 0:
            try:
                if not self.fence():
                    checkpoint.prune(self.root, self.keep)
            except OSError as failure:
                logger.warning("old checkpoints in %s could not be deleted: %s", self.root, failure)

    def _save(self, request: "_Request") -> int:
        """Write and commit; the bytes written, 0 when the checkpoint was there. A full disk is tried a second time."""
        need = sum(self._all(lambda: self._own_size(request)))
        token, identity = self._lead(lambda: (uuid.uuid4().hex, request.identity))
        request = replace(request, identity=identity, token=token)
        try:
            return self._try(request, need)
        except _SaveError as failure:
            if not failure.full or not self._lead(lambda: checkpoint.make_room(self.root)):
                raise
        return self._try(request, need)

    def _try(self, request: "_Request", need: int) -> int:
        if not self._lead(lambda: self._prepare(request, need)):
            return 0
        # Ranks that were left behind by an earlier attempt must not meet what this one writes.
        final = checkpoint.folder_name(request.step)
        target = f".{final}.{request.token}.tmp" if self.root.is_local else f"{final}/{request.token}"
        try:
            manifests = dict(self._all(lambda: self._write(request, self.root.child(target), need)))
            self._lead(lambda: self._commit(request, manifests, target))
        except _SaveError as failure:
            if self._world.rank == 0 and not failure.fenced:
                with suppress(OSError):  # what stays is an orphan, and goes before the next save
                    if self.root.is_local:
                        self.root.delete(target)
                    else:
                        checkpoint.withdraw(self.root, request.step, request.token)
            raise
        return need

    def _own_size(self, request: "_Request") -> int:
        if request.problem:
            raise OSError(request.problem)
        return self._snapshot.size

    def _prepare(self, request: "_Request", need: int) -> bool:
        """Clear the way. False: the checkpoint is there already, and is not written over."""
        self._refuse_if_fenced()
        checkpoint.prune_orphans(self.root)
        if checkpoint.stands(self.root, request.identity):
            return False
        free = self.root.free_bytes()
        if free is not None and free < SPARE * need:
            raise OSError(errno.ENOSPC, _space(self.root, free, int(SPARE * need)))
        return True

    def _write(self, request: "_Request", target: Store, need: int) -> tuple[str, list[int]]:
        """Write this rank's files and its manifest; the manifest's name, size and CRC-32."""
        rank, files = self._world.rank, {}
        contents = {name: (file.size, file.blocks()) for name, file in self._snapshot.files.items()}
        if rank == 0:
            contents[checkpoint.META] = (len(request.meta), iter([memoryview(request.meta)]))
        try:
            for name, (size, blocks) in contents.items():
                files[name] = [size, target.write_blocks(name, blocks)]
            manifest = request.identity | {
                "rank": rank,
                "world_size": self._world.world_size,
                "files": files,
                "optimizer_file": checkpoint.optimizer_name(rank, self._world.world_size),
                "slices": request.slices,
            }
            content, name = json.dumps(manifest, indent=2).encode(), checkpoint.manifest_name(rank)
            return name, [len(content), target.write_blocks(name, [content])]
        except OSError as error:
            free = self.root.free_bytes() if error.errno in FULL else None
            if free is None:
                raise
            raise OSError(error.errno, f"{error.strerror}: {_space(self.root, free, need)}") from error

    def _commit(self, request: "_Request", manifests: dict[str, list[int]], target: str) -> None:
        self._refuse_if_fenced()
        final, marker = checkpoint.folder_name(request.step), request.identity | {"manifests": manifests}
        if not self.root.is_local:
            marker["folder"] = request.token
        content = json.dumps(marker, indent=2).encode()
        self.root.write_bytes(f"{target if self.root.is_local else final}/{checkpoint.MARKER}", content)
        if self.root.is_local:
            self.root.move(target, self.root.child(final))

    def _refuse_if_fenced(self) -> None:
        if self.fence():
            raise _SaveError(f"another driver, or a later attempt, has taken over {self.root}", fenced=True)

    def _lead(self, action: Callable[[], T]) -> T:
        """What `action` gives on rank 0, on every rank; _SaveError on every rank when it fails there."""
        answer = _attempt(action) if self._world.rank == 0 else None
        return _taken(self._world.broadcast(answer))

    def _all(self, action: Callable[[], T]) -> list[T]:
        """What `action` gives on each rank, on every rank; _SaveError on every rank when it fails on any."""
        answers = self._world.gather(_attempt(action))
        return [_taken(answer) for answer in answers]


@dataclass(frozen=True, kw_only=True)
class _Request:
    """What one save is to write, besides the snapshot. `token` is its own name; `problem`: why it cannot."""

    step: int
    state: dict[str, Any]
    started: float
    token: str = ""
    meta: bytes = b""
    identity: dict[str, Any] = field(default_factory=dict)
    slices: dict[str, list[int]] = field(default_factory=dict)
    problem: str | None = None


class _SaveError(Exception):
    """Why a save failed, on all ranks. `full`: for want of space. `fenced`: another one has taken the run over."""

    def __init__(self, message: str, *, full: bool = False, fenced: bool = False) -> None:
        super().__init__(message)
        self.full, self.fenced = full, fenced


@dataclass(frozen=True)
class _Failure:
    """A _SaveError on its way to the other ranks."""

    message: str
    full: bool
    fenced: bool


def _attempt(action: Callable[[], T]) -> T | _Failure:
    try:
        return action()
    except _SaveError as error:
        return _Failure(str(error), error.full, error.fenced)
    except Exception as error:  # noqa: BLE001 - ranks agree on any outcome instead of leaving each other
        full = isinstance(error, OSError) and error.errno in FULL
        return _Failure(f"{type(error).__name__}: {error}", full, fenced=False)


def _taken(answer: Any) -> Any:
    if isinstance(answer, _Failure):
        raise _SaveError(answer.message, full=answer.full, fenced=answer.fenced)
    return answer


def _space(root: Store, free: int, need: int) -> str:
    return f"{root} has {free / 1e9:.3f} GB free and a checkpoint needs {need / 1e9:.3f} GB"


def _step_back() -> None:
    """Let training have the processors first. Threads have priorities of their own on Linux only."""
    if sys.platform == "linux":
        with suppress(OSError):
            thread = threading.get_native_id()
            os.setpriority(os.PRIO_PROCESS, thread, os.getpriority(os.PRIO_PROCESS, thread) + NICENESS)


def save(root: Store | Path, model: GPT, optimizer: MuonAdamW, meta: dict[str, Any], world: World) -> Store:
    """Write one checkpoint and wait for it; where it is. Every rank calls this. Nothing is pruned.

    Raises:
        CheckpointError: on every rank when it could not be written.
    """
    saver = Saver(root, world, keep=sys.maxsize, fence=lambda: False)
    saver.begin(model, optimizer, meta, urgent=True)
    outcome = saver.wait()
    saver.close()
    if outcome is None or outcome.error:
        raise CheckpointError(f"no checkpoint at step {meta['step']}: {outcome and outcome.error}")
    return saver.root.child(checkpoint.folder_name(meta["step"]))
