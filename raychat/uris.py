"""URIs without their secrets: what may go into files, log lines and MLflow."""

import re
from urllib.parse import urlsplit

from raychat.errors import ConfigError

HIDDEN = "..."
"""stands for a secret"""
_NAMED_SECRET = r"[^=&]*(?:secret|token|password|signature|sig|key)[^=&]*="
_SECRET = re.compile(rf"([?&]{_NAMED_SECRET})[^&#]*", re.IGNORECASE)
_MARKED = re.compile(rf"[?&]{_NAMED_SECRET}{re.escape(HIDDEN)}(?:[&#]|$)", re.IGNORECASE)
_URI = re.compile(r"[^\s'\"<>()]+://[^\s'\"<>()]+")
_USER = re.compile(r"://[^/?#]*@")
_OPTION = re.compile(rf"(?<=[?&]){_NAMED_SECRET}[^&#]*&?", re.IGNORECASE)


def check_place(place: str) -> None:
    """Raises ConfigError for `s3:/bucket` and the like, which would otherwise be a folder of that name on this machine."""
    if mistyped := re.match(r"(s3|gs):(?!//)/?(.*)", place):
        scheme, rest = mistyped.groups()
        raise ConfigError(
            f"{place!r} is neither an object store, which begins with {scheme}://, nor a plain folder: write "
            f"{scheme}://{rest or 'BUCKET/FOLDER'}, or ./{place} for a folder of this name."
        )


def public_uri(uri: str) -> str:
    """`uri` without its password and without options whose names say that they are secret. Other text is unchanged."""
    password = _password(uri)
    without = uri.replace(f":{password}@", "@", 1) if password else uri
    return _SECRET.sub(rf"\1{HIDDEN}", without) if "://" in uri else without


def public_text(text: str) -> str:
    """`text`, an error message perhaps, with `public_uri` of each URI in it."""
    return _URI.sub(lambda found: public_uri(found[0]), text)


def marked_uri(uri: str) -> str:
    """As `public_uri`, with a mark in the place of a password too: what is kept of a URI that must be given again."""
    password = _password(uri)
    marked = uri.replace(f":{password}@", f":{HIDDEN}@", 1) if password else uri
    return _SECRET.sub(rf"\1{HIDDEN}", marked) if "://" in uri else marked


def lacks_credentials(uri: str) -> bool:
    """Whether `uri` has marks where its credentials were: nothing can be opened with it."""
    return _password(uri) == HIDDEN or _MARKED.search(uri) is not None


def place_of(uri: str) -> str:
    """What `uri` names, whoever opens it: without user, password and secret options. Other text is unchanged."""
    return _OPTION.sub("", _USER.sub("://", uri)).rstrip("?&") if "://" in uri else uri


def _password(uri: str) -> str | None:
    try:
        return urlsplit(uri).password if "://" in uri else None
    except ValueError:  # brackets that close nothing: not a URI that anything could open
        return None
