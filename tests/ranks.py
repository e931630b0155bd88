"""`run_ranks`: call a function on several processes that form a gloo group on the loopback interface."""

import multiprocessing
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

TIMEOUT_S = 120.0


def run_ranks(fn: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = TIMEOUT_S) -> list[Any]:
    """The results of `fn(*args)` on ranks 0 .. world_size - 1, in this order. `fn` is a function of an importable module.

    A failure on one rank stops the others and raises here with that rank's traceback.
    """
    context = multiprocessing.get_context("forkserver")
    # The server that ranks are forked from imports these once; a rank then starts in milliseconds.
    context.set_forkserver_preload(["torch", "torch.distributed", "raychat.model", "raychat.optim", "ranks"])
    processes, readers = [], []
    with tempfile.TemporaryDirectory() as folder:
        try:
            for rank in range(world_size):
                reader, writer = context.Pipe(duplex=False)
                target = (fn, args, rank, world_size, str(Path(folder) / "rendezvous"), writer, timeout_s)
                process = context.Process(target=_rank, args=target, daemon=True)
                process.start()
                writer.close()
                processes.append(process)
                readers.append(reader)
            return _collect(readers, time.monotonic() + timeout_s)
        finally:
            for process in processes:
                process.terminate()
                process.join()
            for reader in readers:
                reader.close()


def _collect(readers: list[Connection], deadline: float) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(readers):
        waiting = [reader for rank, reader in enumerate(readers) if rank not in results]
        ready = wait(waiting, timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise TimeoutError(f"ranks {sorted(set(range(len(readers))) - set(results))} did not answer in time")
        for reader in ready:
            rank = readers.index(reader)
            try:
                ok, payload = pickle.loads(reader.recv_bytes())
            except EOFError:
                raise RuntimeError(f"rank {rank} died without a word") from None
            if not ok:
                raise RuntimeError(f"rank {rank} failed:\n{payload}")
            results[rank] = payload
    return [results[rank] for rank in range(len(readers))]


def _rank(
    fn: Callable[..., Any],
    args: tuple[Any, ...],
    rank: int,
    world_size: int,
    rendezvous: str,
    writer: Connection,
    timeout_s: float,
) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo0" if sys.platform == "darwin" else "lo"
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{rendezvous}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout_s),
        )
        answer = (True, fn(*args))
        dist.barrier()  # a rank that leaves early would break the others' last collective
        dist.destroy_process_group()
    except BaseException:  # noqa: BLE001  the parent must learn of any failure
        answer = (False, traceback.format_exc())
    # Plain pickle: multiprocessing would send tensors as shared memory that dies with this process.
    writer.send_bytes(pickle.dumps(answer))
    writer.close()
