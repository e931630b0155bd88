"""What a node of the cluster answers before it may take part: its software, what it sees of the run's places, its clock.

Runs in a task on that node, so it must not need more than raychat itself there.
"""

import hashlib
import importlib.metadata
import os
import platform
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import requests

import raychat
from raychat.errors import ConfigError
from raychat.storage import Store
from raychat.uris import public_text, public_uri

DRIVER = "driver"
"""name of the file that the driver wrote"""
FETCH_S = 10.0  # for a server to begin to answer


@dataclass(frozen=True, kw_only=True)
class Software:
    """Versions; "" for a package that is not there. `raychat`: a fingerprint of its source."""

    python: str
    ray: str
    torch: str
    raychat: str


@dataclass(frozen=True, kw_only=True)
class Read:
    """Something that the node is only to read, and that the driver sees. `remedy`: what helps where a node does not."""

    setting: str
    """how messages call it"""
    address: str = field(repr=False)
    """a folder as `Store.of` takes it, or an http(s) URL; may hold credentials"""
    entries: tuple[tuple[str, int | None], ...] = ()
    """names in the folder with the bytes of the files (None for a folder); none for a URL"""
    cached: str = ""
    """folder in which a node may have what is at the URL already"""
    remedy: str

    @property
    def place(self) -> str:
        """The address without credentials."""
        return public_uri(self.address)


@dataclass(frozen=True, kw_only=True)
class Seen:
    """The answer of a node."""

    software: Software
    troubles: tuple[str, ...]
    """one for each place, "" where all is well"""
    unread: tuple[str, ...] = ()
    """the same for each of what is only read"""
    name_is_loopback: bool
    """whether gloo will listen where no other machine reaches it"""
    time_s: float
    """the node's clock when it answered"""


def look(token: str, name: str, addresses: Sequence[str], reads: Sequence[Read] = ()) -> Seen:
    """Read what the driver wrote into each folder, and write a file `name` beside it; nothing where nothing is read.

    Of `reads` it is seen whether they are here too, and the same.
    """
    troubles = tuple(_trouble(token, name, Store.of(address)) for address in addresses)
    unread = tuple(_unread(read) for read in reads)
    loopback = gloo_is_on_loopback()
    return Seen(software=software(), troubles=troubles, unread=unread, name_is_loopback=loopback, time_s=time.time())


def clock() -> float:
    """Seconds since 1970, as this machine has them."""
    return time.time()


def gloo_is_on_loopback() -> bool:
    """Whether this machine's name stands for a loopback address, as `127.0.1.1 name` in /etc/hosts makes it.

    gloo listens on the address of the name, unless GLOO_SOCKET_IFNAME names an interface.
    """
    if os.environ.get("GLOO_SOCKET_IFNAME"):
        return False
    try:
        return socket.gethostbyname(socket.gethostname()).startswith("127.")
    except OSError:  # no address at all: gloo takes the loopback interface, too
        return True


def software() -> Software:
    """What this process runs on. Nothing is imported for it."""
    return Software(
        python=platform.python_version(), ray=_version("ray"), torch=_version("torch"), raychat=fingerprint()
    )


def fingerprint(folder: Path = Path(raychat.__file__).parent) -> str:
    """Of the source in `folder`: the same where all .py and .toml files have the same names and content."""
    digest = hashlib.sha256()
    for file in sorted(path for path in folder.rglob("*") if path.suffix in (".py", ".toml")):
        digest.update(f"{file.relative_to(folder)}\n".encode())
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()[:12]


def _trouble(token: str, name: str, folder: Store) -> str:
    try:
        found = folder.read_bytes(DRIVER)
    except FileNotFoundError:
        return "does not see what the driver wrote there"
    except OSError as error:
        return f"cannot read there: {error.strerror or error}"
    if found != token.encode():
        return "reads something else there than the driver wrote"
    try:
        folder.write_bytes(name, token.encode())
    except OSError as error:
        return f"cannot write there: {error.strerror or error}"
    return ""


def _unread(read: Read) -> str:
    if not read.entries:
        return "" if read.cached and Path(read.cached).is_dir() else _unfetched(read.address)
    try:
        folder = Store.of(read.address)
        for name, size in read.entries:
            if not folder.exists(name):
                return f"does not see {name}, which the driver sees there"
            if folder.size(name) != size:
                return f"sees another {name} there than the driver"
    except (OSError, ConfigError) as error:
        return f"cannot read there: {public_text(str(error))}"
    return ""


def _unfetched(url: str) -> str:
    try:
        with requests.get(url, stream=True, timeout=FETCH_S) as answer:
            answer.raise_for_status()
    except requests.RequestException as error:
        return f"cannot fetch it: {public_text(str(error))}"
    return ""


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
