"""Keeps the credentials that a user's URIs hold out of what a run says and writes down."""

import os
import re
from urllib.parse import parse_qsl, unquote, urlsplit

from raychat.config import Config
from raychat.uris import public_uri

HIDDEN = "..."
SHORTEST = 4
"""letters: shorter ones stand in many a word, and hide nothing"""


class Secrets:
    """The credentials of a configuration, and what they are replaced by in a text that came from elsewhere.

    The environment may name the MLflow server, with a password, where the configuration does not.
    """

    def __init__(self, config: Config) -> None:
        texts = [value for value in config.flat().values() if isinstance(value, str)]
        texts.append(os.environ.get("MLFLOW_TRACKING_URI", ""))
        uris = [uri for text in texts for uri in re.findall(r"[^\s'\"]+://[^\s'\"]+", text)]
        found = {secret for uri in uris for secret in _secrets_of(uri) if len(secret) >= SHORTEST}
        self._found = sorted(found, key=len, reverse=True)  # the longest first: one may be a part of another

    def hide(self, text: str) -> str:
        """`text`, an error message perhaps, without the credentials."""
        for secret in self._found:
            text = text.replace(secret, HIDDEN)
        return text


def _secrets_of(uri: str) -> set[str]:
    try:
        parts = urlsplit(uri)
        password = parts.password
    except ValueError:  # brackets that close nothing: not a URI that anything could open
        return set()
    kept = {value for _, value in parse_qsl(urlsplit(public_uri(uri)).query)}
    options = {value for _, value in parse_qsl(parts.query)} - kept
    found = options | ({password} if password else set())
    return found | {unquote(secret) for secret in found}
