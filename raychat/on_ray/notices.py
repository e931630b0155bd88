"""What the cloud says about the end of this machine: the notices of AWS, Google Cloud and Azure, over HTTP.

Each cloud answers on a link-local address that only its own machines reach. A `poll` never raises for what such a
server can do (absent, slow, garbled, token expired): it logs the trouble once and asks again next time.
"""

import contextlib
import datetime
import email.utils
import http.client
import json
import logging
import os
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

Source = Literal["aws", "gcp", "azure"]

METADATA_URL = "http://169.254.169.254"  # of all three; by number, because the lookup of a name can hang
TIMEOUT_S = 2.0
DETECT_S = 3.0
LONGEST_ANSWER = 1 << 20
TOKEN_TTL_S = 21600

# Seconds that a machine has where its cloud names no time.
AWS_NOTICE_S = 120.0
GCP_NOTICE_S = 25.0  # 30 from the ACPI signal to the end, less the time until this is read
GCP_MAINTENANCE_S = 60.0  # the least that is promised; machines with GPUs get an hour
AZURE_NOTICE_S = 30.0

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Notice:
    """This machine will be taken away."""

    deadline_s: float
    """unix time when it may be gone"""
    source: Source
    text: str


class Cloud(Protocol):
    """A cloud that announces the end of its machines."""

    source: Source

    def is_here(self) -> bool:
        """Whether this machine is in this cloud."""
        ...

    def poll(self) -> Notice | None:
        """The notice, if there is one. Ends within a few times `TIMEOUT_S` and does not raise."""
        ...


class _RefusedError(Exception):
    """The server answered with an HTTP status that is an error."""

    def __init__(self, status: int) -> None:
        super().__init__(f"HTTP status {status}")
        self.status = status


class _GarbledError(Exception):
    """The server answered with something that has another form than documented."""


# A metadata server is never behind a proxy, and a proxy would answer for its own machine.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def _get(url: str, headers: Mapping[str, str], *, method: str = "GET") -> tuple[str, Mapping[str, str]]:
    """Body and headers of the answer.

    Raises:
        _RefusedError: the status is an error.
        OSError: no answer in time.
        _GarbledError: an answer that is no HTTP.
    """
    request = urllib.request.Request(url, headers=dict(headers), method=method)
    end = time.monotonic() + TIMEOUT_S
    try:
        with _OPENER.open(request, timeout=TIMEOUT_S) as response:
            body = b""
            while chunk := response.read1(65536):
                body += chunk
                if time.monotonic() > end or len(body) > LONGEST_ANSWER:
                    raise TimeoutError(f"{url} answers without end")
            return body.decode(errors="replace"), response.headers
    except urllib.error.HTTPError as error:
        with error:
            raise _RefusedError(error.code) from None
    except (http.client.HTTPException, ValueError) as error:
        raise _GarbledError(f"{type(error).__name__}: {error}") from error


def _json_object(body: str) -> dict[str, Any]:
    try:
        value = json.loads(body)
    except ValueError as error:
        raise _GarbledError(f"no JSON: {body[:80]!r}") from error
    if not isinstance(value, dict):
        raise _GarbledError(f"no JSON object: {body[:80]!r}")
    return value


class _Quiet:
    """Turns the troubles of a metadata server into None and one log line for each spell of them."""

    def __init__(self, source: Source) -> None:
        self._source, self._troubled = source, False

    def ask(self, question: Callable[[], Notice | None]) -> Notice | None:
        try:
            notice = question()
        except (_RefusedError, _GarbledError, OSError) as trouble:
            if not self._troubled:
                logger.warning("the metadata server (%s) does not answer as it should: %s", self._source, trouble)
            self._troubled = True
            return None
        self._troubled = False
        return notice


class Aws:
    """EC2 spot interruptions, over IMDSv2.

    In a container on a bridge network the token only arrives with a hop limit of 2 or more on the instance.
    """

    source: Source = "aws"

    def __init__(self, base_url: str = METADATA_URL) -> None:
        self._base, self._token, self._hinted, self._quiet = base_url, "", False, _Quiet("aws")

    def is_here(self) -> bool:
        with contextlib.suppress(_RefusedError, _GarbledError, OSError):
            self._renew_token()
            return bool(self._read("/latest/meta-data/instance-id"))
        return False

    def poll(self) -> Notice | None:
        """An interruption that is scheduled: terminate, stop or hibernate, some two minutes ahead."""
        return self._quiet.ask(self._ask)

    def _ask(self) -> Notice | None:
        body = self._read("/latest/meta-data/spot/instance-action")
        if body is None:
            self._log_hint()
            return None
        answer = _json_object(body)
        action = answer.get("action")
        if action not in ("terminate", "stop", "hibernate"):
            raise _GarbledError(f"unknown action {action!r}")
        try:
            when = datetime.datetime.fromisoformat(answer["time"])
        except (KeyError, TypeError, ValueError):  # it is announced all the same
            return Notice(time.time() + AWS_NOTICE_S, "aws", f"spot {action}, at no readable time")
        when = when if when.tzinfo else when.replace(tzinfo=datetime.UTC)
        return Notice(when.timestamp(), "aws", f"spot {action} at {answer['time']}")

    def _log_hint(self) -> None:
        """A rebalance recommendation only says that the risk has grown: no reason to leave."""
        if self._hinted:
            return
        with contextlib.suppress(_RefusedError, _GarbledError, OSError):
            if self._read("/latest/meta-data/events/recommendations/rebalance") is not None:
                self._hinted = True
                logger.warning("AWS sees a higher risk that this spot machine is taken away soon")

    def _read(self, path: str) -> str | None:
        """The item at `path`, None when there is none; with a fresh token when the old one has expired."""
        for fresh in (False, True):
            if fresh or not self._token:
                self._renew_token()
            try:
                return _get(self._base + path, {"X-aws-ec2-metadata-token": self._token})[0]
            except _RefusedError as refused:
                if refused.status == 404:
                    return None
                if refused.status != 401 or fresh:
                    raise
        return None

    def _renew_token(self) -> None:
        headers = {"X-aws-ec2-metadata-token-ttl-seconds": str(TOKEN_TTL_S)}
        token = _get(self._base + "/latest/api/token", headers, method="PUT")[0].strip()
        if not token or not token.isascii() or len(token.split()) != 1:
            raise _GarbledError("no token")
        self._token = token


class Gcp:
    """Google Compute Engine: the end of a spot machine, and maintenance that stops it."""

    source: Source = "gcp"

    def __init__(self, base_url: str = METADATA_URL) -> None:
        self._base, self._quiet = base_url + "/computeMetadata/v1/instance/", _Quiet("gcp")
        self._seen: Notice | None = None

    def is_here(self) -> bool:
        with contextlib.suppress(_RefusedError, _GarbledError, OSError):
            return _get(self._base + "id", {"Metadata-Flavor": "Google"})[1].get("Metadata-Flavor") == "Google"
        return False

    def poll(self) -> Notice | None:
        """Google says that it happens and not when: the time runs from the first look that sees it."""
        found = self._quiet.ask(self._ask)
        if found and (self._seen is None or found.deadline_s < self._seen.deadline_s):
            self._seen = found
        return self._seen

    def _ask(self) -> Notice | None:
        if self._read("preempted") == "TRUE":
            return Notice(time.time() + GCP_NOTICE_S, "gcp", "preempted")
        if self._read("maintenance-event") == "TERMINATE_ON_HOST_MAINTENANCE":
            return Notice(time.time() + GCP_MAINTENANCE_S, "gcp", "stopped for the maintenance of its host")
        return None

    def _read(self, name: str) -> str | None:
        try:
            return _get(self._base + name, {"Metadata-Flavor": "Google"})[0].strip()
        except _RefusedError as refused:
            if refused.status == 404:
                return None
            raise


class Azure:
    """Azure scheduled events: evictions of spot machines and deletions of scale-set machines.

    Every machine of a scale set is told the events of all of them, hence the look at this machine's name.
    """

    source: Source = "azure"

    def __init__(self, base_url: str = METADATA_URL) -> None:
        self._base, self._quiet, self._name = base_url + "/metadata/", _Quiet("azure"), ""
        self._started: dict[str, float] = {}

    def is_here(self) -> bool:
        with contextlib.suppress(_RefusedError, _GarbledError, OSError):
            return bool(self._compute().get("vmId"))
        return False

    def poll(self) -> Notice | None:
        """The earliest `Preempt` or `Terminate` event that concerns this machine."""
        return self._quiet.ask(self._ask)

    def _ask(self) -> Notice | None:
        if not self._name:
            with contextlib.suppress(_RefusedError, _GarbledError, OSError):
                self._name = str(self._compute().get("name") or "")
        body, _ = _get(self._base + "scheduledevents?api-version=2020-07-01", {"Metadata": "true"})
        events = _json_object(body).get("Events", [])
        if not isinstance(events, list):
            raise _GarbledError(f"Events is {events!r:.80}")
        mine = [event for event in events if isinstance(event, dict) and self._is_mine(event)]
        notices = [Notice(self._deadline(event), "azure", str(event["EventType"])) for event in mine]
        return min(notices, key=lambda notice: notice.deadline_s, default=None)

    def _is_mine(self, event: Mapping[str, Any]) -> bool:
        if event.get("EventType") not in ("Preempt", "Terminate"):
            return False
        names = event.get("Resources")
        if not self._name or not isinstance(names, list) or not names:
            return True
        return self._name.lower() in [str(name).lower() for name in names]

    def _deadline(self, event: Mapping[str, Any]) -> float:
        """Unix time. An event without a time has begun; what is left then runs from when it was first seen."""
        try:
            return email.utils.parsedate_to_datetime(event["NotBefore"]).timestamp()
        except (KeyError, TypeError, ValueError):
            return self._started.setdefault(str(event.get("EventId")), time.time() + AZURE_NOTICE_S)

    def _compute(self) -> dict[str, Any]:
        return _json_object(_get(self._base + "instance/compute?api-version=2021-02-01", {"Metadata": "true"})[0])


def detect(base_url: str = "") -> Cloud | None:
    """The cloud that this machine is in, or None; within `DETECT_S` seconds.

    `base_url` (default: the environment's RAYCHAT_METADATA_URL, else the clouds' own address) is where to ask.
    """
    base = (base_url or os.environ.get("RAYCHAT_METADATA_URL") or METADATA_URL).rstrip("/")
    clouds: tuple[Cloud, ...] = (Aws(base), Gcp(base), Azure(base))
    here: list[Cloud] = []

    def probe(cloud: Cloud) -> None:
        if cloud.is_here():
            here.append(cloud)

    threads = [threading.Thread(target=probe, args=(cloud,), daemon=True) for cloud in clouds]
    for thread in threads:
        thread.start()
    end = time.monotonic() + DETECT_S
    while not here and any(thread.is_alive() for thread in threads) and time.monotonic() < end:
        time.sleep(0.02)
    return here[0] if here else None
