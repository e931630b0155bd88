"""URIs without their secrets: what may go into files, log lines and MLflow."""

import re
from urllib.parse import urlsplit

_SECRET = re.compile(r"([?&][^=&]*(?:secret|token|password|signature|sig|key)[^=&]*=)[^&#]*", re.IGNORECASE)


def public_uri(uri: str) -> str:
    """`uri` without its password and without options whose names say that they are secret. Other text is unchanged."""
    if "://" not in uri:
        return uri
    try:
        password = urlsplit(uri).password
    except ValueError:  # brackets that close nothing: not a URI that anything could open
        return uri
    without = uri.replace(f":{password}@", "@", 1) if password else uri
    return _SECRET.sub(r"\1...", without)
