"""Notices of the clouds, told by metadata servers of the tests' own that also fail in the ways real ones do."""

import json
import logging
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from raychat.on_ray import notices
from raychat.on_ray.notices import Aws, Azure, Gcp, detect

AWS_ACTION = "/latest/meta-data/spot/instance-action"
GCP_PREEMPTED = "/computeMetadata/v1/instance/preempted"
GCP_MAINTENANCE = "/computeMetadata/v1/instance/maintenance-event"
AZURE_EVENTS = "/metadata/scheduledevents"
AZURE_NAME = "/metadata/instance/compute"


class MetadataServer:
    """Answers what `answers` holds for a path: a body, a status, or a function of the request that gives either."""

    def __init__(self):
        self.answers, self.asked = {}, []
        self.closing = threading.Event()
        metadata = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                path = self.path.partition("?")[0]
                metadata.asked.append(f"{self.command} {path}")
                answer = metadata.answers.get(path, 404)
                answer = answer(self) if callable(answer) else answer
                if answer is None:
                    return
                self.send_response(answer if isinstance(answer, int) else 200)
                body = b"" if isinstance(answer, int) else answer.encode()
                self.send_header("Content-Length", str(len(body)))
                if path.startswith("/computeMetadata"):
                    self.send_header("Metadata-Flavor", "Google")
                self.end_headers()
                self.wfile.write(body)

            do_PUT = do_GET  # noqa: N815 - the name is the library's

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def hang(self, _):
        self.closing.wait(10)

    def close(self):
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()

    def be_aws(self):
        """A token server whose tokens can be made to expire, and data that want the newest token."""
        self.tokens = 0

        def token(request):
            if request.command != "PUT" or "X-aws-ec2-metadata-token-ttl-seconds" not in request.headers:
                return 400
            self.tokens += 1
            return f"token-{self.tokens}"

        self.answers["/latest/api/token"] = token
        self.put_aws("/latest/meta-data/instance-id", "i-1")

    def put_aws(self, path, answer):
        """Have `answer` at `path` for who shows the newest token."""

        def checked(request):
            if request.headers.get("X-aws-ec2-metadata-token") != f"token-{self.tokens}":
                return 401
            return answer

        self.answers[path] = checked

    def be_azure(self, name="vm_1"):
        """A machine of this name without events."""
        self.answers[AZURE_NAME] = json.dumps({"name": name, "vmId": "0-1"})
        self.put_azure()

    def put_azure(self, *events):
        """Have these scheduled events."""
        self.answers[AZURE_EVENTS] = lambda request: (
            json.dumps({"DocumentIncarnation": 1, "Events": events}) if request.headers["Metadata"] == "true" else 400
        )


@pytest.fixture
def metadata(monkeypatch):
    monkeypatch.setattr(notices, "TIMEOUT_S", 0.3)
    server = MetadataServer()
    yield server
    server.close()


def test_aws_gives_the_time_of_an_interruption_and_keeps_its_token(metadata):
    metadata.be_aws()
    aws = Aws(metadata.url)
    assert [aws.poll(), aws.poll()] == [None, None]
    metadata.put_aws(AWS_ACTION, json.dumps({"action": "terminate", "time": "2030-01-01T00:00:00Z"}))
    notice = aws.poll()
    assert (notice.deadline_s, notice.source) == (1893456000.0, "aws")
    assert "terminate" in notice.text
    assert metadata.tokens == 1


@pytest.mark.parametrize("action", ["stop", "hibernate"])
def test_aws_machines_are_also_lost_when_they_are_not_terminated(metadata, action):
    metadata.be_aws()
    metadata.put_aws(AWS_ACTION, json.dumps({"action": action, "time": "2030-01-01T00:00:00Z"}))
    assert action in Aws(metadata.url).poll().text


def test_aws_renews_a_token_that_has_expired(metadata):
    metadata.be_aws()
    aws = Aws(metadata.url)
    assert aws.poll() is None
    metadata.tokens = 7  # the one it has is not the newest any more
    metadata.put_aws(AWS_ACTION, json.dumps({"action": "terminate", "time": "2030-01-01T00:00:00Z"}))
    assert aws.poll() is not None
    assert metadata.tokens == 8


def test_an_aws_notice_without_a_readable_time_still_counts(metadata):
    metadata.be_aws()
    metadata.put_aws(AWS_ACTION, json.dumps({"action": "terminate", "time": "soon"}))
    left = Aws(metadata.url).poll().deadline_s - time.time()
    assert notices.AWS_NOTICE_S - 5 < left <= notices.AWS_NOTICE_S


def test_a_rebalance_recommendation_is_said_once_and_is_no_notice(metadata, caplog):
    metadata.be_aws()
    metadata.put_aws("/latest/meta-data/events/recommendations/rebalance", '{"noticeTime": "2030-01-01T00:00:00Z"}')
    aws = Aws(metadata.url)
    assert [aws.poll(), aws.poll()] == [None, None]
    assert len(caplog.records) == 1


def test_google_leaves_25_seconds_from_the_first_look_that_sees_it(metadata):
    metadata.answers |= {GCP_PREEMPTED: "FALSE", GCP_MAINTENANCE: "NONE"}
    gcp = Gcp(metadata.url)
    assert gcp.poll() is None
    metadata.answers[GCP_PREEMPTED] = lambda request: (
        "TRUE\n" if request.headers["Metadata-Flavor"] == "Google" else 403
    )
    before = time.time()
    notice = gcp.poll()
    assert before + 25 <= notice.deadline_s <= time.time() + 25
    assert gcp.poll() == notice


def test_google_maintenance_counts_when_it_stops_the_machine(metadata):
    metadata.answers |= {GCP_PREEMPTED: "FALSE", GCP_MAINTENANCE: "MIGRATE_ON_HOST_MAINTENANCE"}
    gcp = Gcp(metadata.url)
    assert gcp.poll() is None
    metadata.answers[GCP_MAINTENANCE] = "TERMINATE_ON_HOST_MAINTENANCE"
    maintenance = gcp.poll()
    assert maintenance.deadline_s - time.time() > 50
    metadata.answers[GCP_PREEMPTED] = "TRUE"
    assert gcp.poll().deadline_s < maintenance.deadline_s  # what comes first


def azure_event(kind="Preempt", names=("vm_1",), when="Tue, 01 Jan 2030 00:00:00 GMT"):
    return {"EventId": "e", "EventType": kind, "EventStatus": "Scheduled", "Resources": list(names), "NotBefore": when}


def test_azure_gives_the_earliest_event_of_this_machine(metadata):
    metadata.be_azure(name="VM_1")
    later = azure_event("Terminate", when="Tue, 01 Jan 2030 01:00:00 GMT")
    metadata.put_azure(later, azure_event(), azure_event(names=["vm_2"], when="Mon, 31 Dec 2029 00:00:00 GMT"))
    notice = Azure(metadata.url).poll()
    assert (notice.deadline_s, notice.text) == (1893456000.0, "Preempt")


@pytest.mark.parametrize("event", [azure_event(names=["vm_2"]), azure_event("Reboot"), azure_event("Freeze")])
def test_azure_events_of_other_machines_and_kinds_are_none(metadata, event):
    metadata.be_azure()
    metadata.put_azure(event)
    assert Azure(metadata.url).poll() is None


def test_azure_events_count_while_the_name_of_this_machine_is_not_known(metadata):
    metadata.be_azure()
    metadata.answers[AZURE_NAME] = 500
    metadata.put_azure(azure_event(names=["vm_2"]))
    assert Azure(metadata.url).poll() is not None


def test_an_azure_event_without_a_time_has_begun_and_leaves_30_seconds_from_when_it_was_seen(metadata):
    metadata.be_azure()
    metadata.put_azure(azure_event(when=""))
    azure = Azure(metadata.url)
    before = time.time()
    notice = azure.poll()
    assert before + 30 <= notice.deadline_s <= time.time() + 30
    assert azure.poll() == notice


PATHS = {Aws: AWS_ACTION, Gcp: GCP_PREEMPTED, Azure: AZURE_EVENTS}
BROKEN = {
    "error": lambda _: 500,
    "throttled": lambda _: 429,
    "garbage": lambda _: "<html>",
    "other JSON": lambda _: '["a"]',
    "bytes": lambda request: request.wfile.write(b"\x00\xff\x00\n\n"),
    "no answer": lambda request: request.connection.close(),
}


@pytest.mark.parametrize("cloud", PATHS)
@pytest.mark.parametrize("answer", BROKEN.values(), ids=BROKEN)
def test_a_broken_answer_is_no_notice_and_one_line_of_log_until_the_server_mends(metadata, cloud, answer, caplog):
    metadata.be_aws()
    metadata.be_azure()
    metadata.answers[PATHS[cloud]] = answer
    there = cloud(metadata.url)
    assert [there.poll(), there.poll()] == [None, None]
    assert len(caplog.records) <= 1
    metadata.put_aws(AWS_ACTION, json.dumps({"action": "terminate", "time": "2030-01-01T00:00:00Z"}))
    metadata.answers[GCP_PREEMPTED] = "TRUE"
    metadata.put_azure(azure_event())
    assert there.poll() is not None


def trickle(metadata):
    """An answer that comes byte by byte and never ends."""

    def answer(request):
        request.wfile.write(b"HTTP/1.0 200 OK\r\n\r\n")
        while not metadata.closing.wait(0.05):
            try:
                request.wfile.write(b"x")
            except OSError:
                return

    return answer


@pytest.mark.parametrize("slow", ["hang", "trickle"])
@pytest.mark.parametrize("cloud", PATHS)
def test_a_poll_ends_soon_when_the_answer_does_not_come(metadata, cloud, slow):
    metadata.be_aws()
    metadata.be_azure()
    metadata.answers[PATHS[cloud]] = metadata.hang if slow == "hang" else trickle(metadata)
    begun = time.monotonic()
    assert cloud(metadata.url).poll() is None
    assert time.monotonic() - begun < 6 * notices.TIMEOUT_S


def test_a_server_that_refuses_connections_is_no_notice(metadata):
    metadata.close()
    assert [cloud(metadata.url).poll() for cloud in PATHS] == [None, None, None]


def test_each_cloud_is_told_from_the_others(metadata):
    metadata.be_aws()
    assert detect(metadata.url).source == "aws"
    metadata.answers.clear()
    metadata.be_azure()
    assert detect(metadata.url).source == "azure"
    metadata.answers.clear()
    metadata.answers["/computeMetadata/v1/instance/id"] = "1"
    assert detect(metadata.url).source == "gcp"


def test_a_machine_outside_of_the_clouds_is_in_none_and_says_nothing(metadata, caplog):
    caplog.set_level(logging.DEBUG, "raychat")
    assert detect(metadata.url) is None
    metadata.answers["/latest/api/token"] = "<html> a portal answers everything </html>"
    metadata.answers["/computeMetadata/v1/instance/id"] = metadata.hang
    assert detect(metadata.url) is None
    assert caplog.records == []


def test_detection_is_bounded_where_nothing_answers(metadata, monkeypatch):
    monkeypatch.setattr(notices, "TIMEOUT_S", 5.0)
    monkeypatch.setattr(notices, "DETECT_S", 0.3)
    for path in ("/latest/api/token", "/computeMetadata/v1/instance/id", AZURE_NAME):
        metadata.answers[path] = metadata.hang
    begun = time.monotonic()
    assert detect(metadata.url) is None
    assert time.monotonic() - begun < 2


def test_the_environment_says_where_to_ask_and_no_proxy_is_asked(metadata, monkeypatch):
    metadata.be_aws()
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("RAYCHAT_METADATA_URL", metadata.url + "/")
    assert detect().source == "aws"
