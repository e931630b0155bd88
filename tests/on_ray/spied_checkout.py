"""A copy of the checkout whose functions say that it was they who ran, and from where."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from on_ray.conftest import ROOT

# Added to modules of the copy: a function leaves a file that says which code it is, for each process that calls it.
SPY = """

import functools as _functools
import os as _os


def _seen(function):
    @_functools.wraps(function)
    def spy(*args, **kwargs):
        with open(_os.path.join({folder!r}, function.__name__ + "." + str(_os.getpid())), "w") as file:
            file.write(__file__)
        return function(*args, **kwargs)

    return spy


{name} = _seen({name})
"""
SPIED = {
    "raychat/cli.py": "run_job",
    "raychat/data/shards.py": "make_shard",
    "raychat/on_ray/stream.py": "read_block",
    "raychat/on_ray/worker.py": "train_worker",
}


@dataclass(frozen=True)
class SpiedCheckout:
    """A copy of the code that tells itself from the installed one. `seen` takes the files of its spies."""

    root: Path
    seen: Path

    def roots(self) -> set[str]:
        """Folders from which its code ran."""
        return {file.read_text().partition("/raychat/")[0] for file in self.seen.iterdir()}

    def who_ran(self, root: str) -> set[str]:
        """Which functions ran, each in a process of its own kind and from under `root`; forgets them."""
        processes: dict[str, str] = {}
        for file in list(self.seen.iterdir()):
            name, process = file.name.split(".")
            assert file.read_text().startswith(root), f"{name} came from {file.read_text()}"
            assert processes.setdefault(process, name) == name
            file.unlink()
        return set(processes.values())


def copy_checkout(folder: Path) -> SpiedCheckout:
    """The jobs and their code in `folder`/checkout, with spies."""
    copy = SpiedCheckout(folder / "checkout", folder / "seen")
    copy.seen.mkdir()
    for name in ("raychat", "jobs"):
        shutil.copytree(ROOT / name, copy.root / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path, name in SPIED.items():
        with (copy.root / path).open("a") as module:
            module.write(SPY.format(folder=str(copy.seen), name=name))
    return copy
