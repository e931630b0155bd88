"""What torch.compile has made, kept for the next start: under the base directory, and in the run for other machines.

Compiled code fits one kind of machine: the folder is named after the device, the processor, torch and Python. What lies
there is code that will be run, so only the run's own directory is taken from, and whoever can write there is trusted.
"""

import hashlib
import io
import os
import platform
import shutil
import sys
import tarfile
import tempfile
from pathlib import Path

import torch

from raychat.storage import Store

FOLDER = "compiled"  # below the base directory, and in a run
VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
CPUINFO = Path("/proc/cpuinfo")


class CompileCache:
    """The cache of one rank's process. `fetch` comes before the first pass, `ship` once it has compiled."""

    def __init__(self, base_dir: Path, run: Store, device_name: str) -> None:
        self._mark = machine_mark(device_name)
        self._store = run.child(FOLDER)
        self._asked = os.environ.get(VARIABLE)
        self.folder = Path(self._asked) if self._asked else base_dir / FOLDER / self._mark

    def use(self) -> None:
        """Have torch compile into the folder, unless the user chose another one."""
        if not self._asked:
            self.folder.mkdir(parents=True, exist_ok=True)
            os.environ[VARIABLE] = str(self.folder)

    def fetch(self) -> bool:
        """Take over what the run brings, where this machine has nothing; whether there was something.

        Raises:
            OSError: the storage, or the disk, does not do it.
        """
        if self._asked or any(self.folder.iterdir()):
            return False
        if not self._store.exists(self._name):
            return False
        staging = Path(tempfile.mkdtemp(prefix=f".{self._mark}.", dir=self.folder.parent))
        try:
            with tarfile.open(fileobj=io.BytesIO(self._store.read_bytes(self._name))) as packed:
                packed.extractall(staging, filter="data")
            for made in staging.iterdir():
                made.replace(self.folder / made.name)
        except (tarfile.TarError, EOFError) as error:
            raise OSError(f"{self._store.uri}/{self._name} is damaged: {error}") from error
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        return True

    def ship(self) -> int:
        """Keep the folder in the run, unless it is there already; bytes that were written.

        Raises:
            OSError: the storage, or the disk, does not do it.
        """
        if self._asked or self._store.exists(self._name):
            return 0
        content = io.BytesIO()
        with tarfile.open(fileobj=content, mode="w:gz") as packed:
            for made in sorted(self.folder.iterdir()):
                packed.add(made, arcname=made.name, filter=_without_locks)
        self._store.write_bytes(self._name, content.getvalue())
        return content.tell()

    @property
    def _name(self) -> str:
        return f"{self._mark}.tar.gz"


def machine_mark(device_name: str) -> str:
    """What compiled code depends on, as a short name: 16 hexadecimal digits."""
    try:
        lines = CPUINFO.read_text().splitlines()
    except OSError:
        lines = []
    processor = {line for line in lines if line.startswith(("model name", "flags", "Features"))}
    facts = [device_name, platform.machine(), sys.version, torch.__version__, *sorted(processor)]
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:16]


def _without_locks(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
    return None if member.name.endswith(".lock") else member
