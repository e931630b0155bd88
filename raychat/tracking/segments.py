"""The journal of a run in an object store, where nothing can be appended to: segments that never change.

`journal/segment-{first byte:012d}.jsonl` holds whole lines from that byte of `metrics.jsonl` on, up to where the next
segment begins.
"""

import logging
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # pyarrow, which the table of local runs does not wait for
    from raychat.storage import Store

FOLDER = "journal"
READERS = 8  # segments are small: one request after the other would mostly wait
AHEAD = 32  # segments that are held in memory at a time

logger = logging.getLogger(__name__)


def segment_name(first_byte: int) -> str:
    """Name of the segment that begins at this byte of the journal."""
    return f"segment-{first_byte:012d}.jsonl"


def first_byte(name: str) -> int:
    """Where a segment begins; -1 for the name of something else."""
    matched = re.fullmatch(r"segment-(\d{12,})\.jsonl", name)
    return int(matched[1]) if matched else -1


def segment_names(run: "Store") -> list[str]:
    """Names of the segments of the run in `run`, in the order of the journal."""
    return sorted((name for name in run.child(FOLDER).names() if first_byte(name) >= 0), key=first_byte)


def read_segments(run: "Store", names: Sequence[str]) -> Iterator[bytes]:
    """The contents of the segments `names`, in their order. Raises OSError when one cannot be read."""
    folder = run.child(FOLDER)
    with ThreadPoolExecutor(READERS) as pool:
        for start in range(0, len(names), AHEAD):
            yield from pool.map(folder.read_bytes, names[start : start + AHEAD])


def join_segments(run: "Store", target: Path) -> int:
    """Write the journal of the run in `run` to the file `target`; its bytes.

    What begins before the end of what went before it (the late write of a driver that had been replaced) is left out,
    and so is all behind a gap; both are named in the log.

    Raises:
        OSError: when the store or the disk fails.
    """
    names = segment_names(run)
    end = 0
    with target.open("wb") as file:
        for name, content in zip(names, read_segments(run, names), strict=True):
            first = first_byte(name)
            if first > end:
                logger.warning("%s/%s: the journal has a gap from byte %d to %d", run.uri, FOLDER, end, first)
                break
            if first < end:
                logger.warning("%s/%s/%s: left out, because its bytes are there already", run.uri, FOLDER, name)
                continue
            end += file.write(content)
    return end
