"""Downloads from a server on loopback that misbehaves in every way that was seen in practice."""

import hashlib
import io
import threading
import time
from contextlib import contextmanager
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import requests

from raychat.data import climbmix
from raychat.data.download import Job, download, download_all
from raychat.errors import ConfigError, DataError

BODY = bytes(range(256)) * 1024
DIGEST = hashlib.sha256(BODY).hexdigest()
QUICK = {"backoff_s": 0.001, "timeout_s": 5.0}


class Server:
    """Serves `bodies` by path; `script` holds, per path, what goes wrong with the next requests."""

    def __init__(self):
        self.bodies, self.script, self.requests, self.headers = {"/file": BODY}, {}, [], {}
        self.ranges_work = True

    def answer(self, handler):
        self.requests.append((handler.path, handler.headers.get("Range")))
        queue = self.script.get(handler.path, [])
        fault = queue.pop(0) if queue else None
        if callable(fault):
            return fault(handler)
        body = self.bodies.get(handler.path)
        if isinstance(fault, tuple):
            return self.send(handler, fault[0], b"error page", fault[1])
        if body is None:
            return self.send(handler, 404, b"no such file", {})
        headers, status = dict(self.headers), 200
        asked = handler.headers.get("Range")
        if asked and self.ranges_work:
            first = int(asked.removeprefix("bytes=").removesuffix("-"))
            if first >= len(body):
                return self.send(handler, 416, b"error page", {"Content-Range": f"bytes */{len(body)}"})
            headers["Content-Range"], status = f"bytes {first}-{len(body) - 1}/{len(body)}", 206
            body = body[first:]
        return self.send(handler, status, body, headers, fault)

    @staticmethod
    def send(handler, status, body, headers, fault=None):
        handler.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            handler.send_header(name, value)
        handler.end_headers()
        if fault == "cut":
            body = body[: len(body) // 2]
        elif fault == "wrong":
            body = bytes(len(body))
        handler.wfile.write(body)


@contextmanager
def serving():
    server = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):  # the name is http.server's
            server.answer(self)

        def log_message(self, *args):
            """Keep the test output clean."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        http.daemon_threads = True
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        server.url = f"http://127.0.0.1:{http.server_port}"
        yield server
        http.shutdown()
        thread.join()


@pytest.fixture
def server():
    with serving() as server:
        yield server


@pytest.fixture
def target(tmp_path):
    return tmp_path / "new" / "folder" / "file.bin"


def fetched(server, target, **options):
    """Download and hold the two laws of success: the file is whole, and nothing else is there."""
    counted = []
    download(f"{server.url}/file", target, progress=counted.append, **{**QUICK, **options})
    assert target.read_bytes() == BODY
    assert [path.name for path in target.parent.iterdir()] == [target.name]
    assert sum(counted) == len(BODY)
    return server.requests


def test_a_file_arrives_whole_at_the_first_attempt(server, target):
    assert len(fetched(server, target, sha256=DIGEST)) == 1


def test_a_file_that_is_there_is_not_asked_for(server, target):
    target.parent.mkdir(parents=True)
    target.write_bytes(b"mine")
    download(f"{server.url}/file", target)
    assert (target.read_bytes(), server.requests) == (b"mine", [])


def test_server_errors_are_tried_again(server, target):
    server.script["/file"] = [(500, {}), (503, {})]
    assert len(fetched(server, target)) == 3


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_retry_after_is_waited_for(server, target, form):
    value = "1" if form == "seconds" else formatdate(time.time() + 2, usegmt=True)
    server.script["/file"] = [(429, {"Retry-After": value})]
    start = time.monotonic()
    assert len(fetched(server, target)) == 2
    assert 0.9 < time.monotonic() - start < 5


def test_a_long_retry_after_is_cut_short(server, target, monkeypatch):
    monkeypatch.setattr("raychat.data.download.MAX_WAIT_S", 0.05)
    server.script["/file"] = [(429, {"Retry-After": "86400"}), (503, {"Retry-After": "nonsense"})]
    start = time.monotonic()
    assert len(fetched(server, target)) == 3
    assert time.monotonic() - start < 5


def test_a_body_cut_short_is_continued_where_it_broke(server, target):
    server.script["/file"] = ["cut", "cut"]
    assert [asked for _, asked in fetched(server, target)] == [None, "bytes=131072-", "bytes=196608-"]


def test_a_network_that_breaks_often_but_delivers_gets_there(server, target):
    server.script["/file"] = ["cut"] * 4
    assert len(fetched(server, target, attempts=2)) == 5


def test_a_connection_dropped_without_an_answer_is_tried_again(server, target):
    server.script["/file"] = [lambda handler: handler.connection.close()]
    assert len(fetched(server, target)) == 2


def test_a_server_that_falls_silent_is_tried_again(server, target):
    server.script["/file"] = [lambda handler: time.sleep(0.5)]
    assert len(fetched(server, target, timeout_s=0.1)) == 2


def test_a_part_left_by_an_earlier_process_is_continued(server, target):
    target.parent.mkdir(parents=True)
    target.with_name("file.bin.part").write_bytes(BODY[:1000])
    assert [asked for _, asked in fetched(server, target, sha256=DIGEST)] == ["bytes=1000-"]


def test_a_server_that_ignores_ranges_starts_over(server, target):
    server.ranges_work = False
    server.script["/file"] = ["cut"]
    assert [asked for _, asked in fetched(server, target)] == [None, "bytes=131072-"]


def test_a_part_that_is_whole_already_is_checked_and_taken(server, target):
    target.parent.mkdir(parents=True)
    target.with_name("file.bin.part").write_bytes(BODY)
    assert [asked for _, asked in fetched(server, target, sha256=DIGEST)] == [f"bytes={len(BODY)}-"]


def test_a_part_longer_than_the_file_is_thrown_away(server, target):
    target.parent.mkdir(parents=True)
    target.with_name("file.bin.part").write_bytes(BODY + b"more")
    assert len(fetched(server, target)) == 2


def test_an_answer_for_another_range_is_thrown_away(server, target):
    target.parent.mkdir(parents=True)
    target.with_name("file.bin.part").write_bytes(BODY[:1000])
    other = {"Content-Range": f"bytes 500-999/{len(BODY)}"}
    server.script["/file"] = [(206, other)]
    assert [asked for _, asked in fetched(server, target)] == ["bytes=1000-", None]


def test_wrong_bytes_are_fetched_again(server, target):
    server.script["/file"] = ["wrong"]
    assert [asked for _, asked in fetched(server, target, sha256=DIGEST.upper())] == [None, None]


def test_a_damaged_part_is_not_continued_for_ever(server, target):
    target.parent.mkdir(parents=True)
    target.with_name("file.bin.part").write_bytes(bytes(1000))
    assert [asked for _, asked in fetched(server, target, sha256=DIGEST)] == ["bytes=1000-", None]


@pytest.mark.parametrize("header", ["ETag", "X-Linked-ETag"])
def test_a_digest_named_by_the_server_is_checked(server, target, header):
    server.headers = {header: f'"{DIGEST}"'}
    server.script["/file"] = ["wrong"]
    assert len(fetched(server, target)) == 2


def test_the_digest_on_a_redirect_counts_and_the_tag_behind_it_does_not(server, target):
    server.script["/link"] = [(302, {"Location": "/file", "X-Linked-ETag": f'"{DIGEST}"'})] * 2
    server.headers = {"ETag": f'"{"0" * 64}"'}
    server.script["/file"] = ["wrong"]
    download(f"{server.url}/link", target, **QUICK)
    assert target.read_bytes() == BODY
    assert [path for path, _ in server.requests] == ["/link", "/file"] * 2


@pytest.mark.parametrize("tag", [f'W/"{DIGEST[::-1]}"', '"abc"', f'"{DIGEST[::-1]}-1"'])
def test_tags_that_are_no_digest_are_not_taken_for_one(server, target, tag):
    server.headers = {"ETag": tag}
    assert len(fetched(server, target)) == 1


def test_a_file_that_does_not_validate_is_fetched_again(server, target):
    seen = []

    def validate(path):
        seen.append(path.read_bytes())
        if seen[-1] != BODY:
            raise ValueError("no footer")

    server.script["/file"] = ["wrong"]
    assert len(fetched(server, target, validate=validate)) == 2
    assert seen == [bytes(len(BODY)), BODY]


@pytest.mark.parametrize("status", [401, 403, 404, 410])
def test_a_refusal_is_final_and_named(server, target, status):
    server.script["/file"] = [(status, {})]
    with pytest.raises(DataError, match=f"/file cannot be downloaded: the server answered {status}"):
        download(f"{server.url}/file", target, **QUICK)
    assert len(server.requests) == 1
    assert not target.exists()


def test_attempts_are_limited_and_what_arrived_is_kept(server, target):
    server.script["/file"] = ["cut", *[(500, {})] * 9]
    with pytest.raises(DataError, match=r"answered 500 \(attempt 3 of 3\)"):
        download(f"{server.url}/file", target, attempts=3, **QUICK)
    assert len(server.requests) == 3
    assert not target.exists()
    assert target.with_name("file.bin.part").stat().st_size == len(BODY) // 2


def test_a_file_that_stays_damaged_is_refused(server, target):
    with pytest.raises(DataError, match="damaged on the way: its SHA-256 is"):
        download(f"{server.url}/file", target, sha256="0" * 64, attempts=3, **QUICK)
    assert len(server.requests) == 3
    assert not target.exists()


@pytest.mark.parametrize("url", ["no-scheme/file", "ftp://127.0.0.1/file", "http://"])
def test_an_address_that_is_none_is_refused_at_once(target, url):
    with pytest.raises(DataError, match="Check the address"):
        download(url, target, **QUICK)


def test_no_server_at_all_is_a_data_error(target):
    with serving() as gone:
        url = f"{gone.url}/file"
    with pytest.raises(DataError, match="ConnectionError.*attempt 2 of 2"):
        download(url, target, attempts=2, **QUICK)


def test_a_place_that_cannot_be_written_is_a_data_error(server, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match="cannot be stored as .*--base-dir"):
        download(f"{server.url}/file", tmp_path / "file" / "x.bin", **QUICK)


def test_two_downloads_of_one_file_ask_once(server, target):
    threads = [threading.Thread(target=download, args=(f"{server.url}/file", target), kwargs=QUICK) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert target.read_bytes() == BODY
    assert len(server.requests) == 1
    assert [path.name for path in target.parent.iterdir()] == [target.name]


def test_passwords_and_tokens_in_an_address_are_told_nobody(target, caplog):
    url = "http://me:geheim@127.0.0.1:1/x?token=geheim"
    with pytest.raises(DataError, match="127.0.0.1") as told:
        download(url, target, attempts=2, backoff_s=0.01)
    assert "127.0.0.1" in caplog.text
    assert "geheim" not in caplog.text + str(told.value)


def test_a_session_handed_in_stays_open(server, target, monkeypatch):
    with requests.Session() as session:
        closed = []
        monkeypatch.setattr(session, "close", lambda: closed.append(True))
        fetched(server, target, session=session)
        assert not closed


def test_many_files_arrive_with_their_bytes_counted(server, tmp_path):
    server.bodies = {f"/{i}": BODY[i:] for i in range(9)}
    server.script["/3"] = ["cut", (500, {})]
    jobs = [Job(url=f"{server.url}/{i}", target=tmp_path / f"{i}") for i in range(9)]
    lines = []
    download_all(jobs, label="corpus", echo=lines.append, **QUICK)
    assert [(tmp_path / f"{i}").read_bytes() for i in range(9)] == [BODY[i:] for i in range(9)]
    assert f"corpus: {sum(len(BODY[i:]) for i in range(9)):,} bytes" in lines[-1]


def test_the_first_failure_stops_the_others_and_is_raised(server, tmp_path):
    server.script = {f"/{i}": [(503, {"Retry-After": "60"})] for i in (0, 1)}
    server.bodies = {f"/{i}": BODY for i in range(40) if i != 2}
    jobs = [Job(url=f"{server.url}/{i}", target=tmp_path / f"{i}") for i in range(40)]
    start = time.monotonic()
    with pytest.raises(DataError, match="/2 cannot be downloaded: the server answered 404"):
        download_all(jobs, parallel=3, echo=lambda line: None, **QUICK)
    assert time.monotonic() - start < 10, "those that wait for a minute are woken"
    assert len(server.requests) < 40


def test_the_shards_needed_deliver_the_tokens_and_one_less_would_not():
    """A file holds at least 250e6 / 5 * 0.87 = 43.5e6 packed tokens; one more file validates."""
    assert climbmix.shards_needed(1) == 2
    assert climbmix.shards_needed(43_500_000) == 2
    assert climbmix.shards_needed(43_500_001) == 3
    assert climbmix.shards_needed(5_000_000_000) == 115 + 1
    assert climbmix.shards_needed(10**13) == 6543, "there are no more"


def test_the_validation_shard_is_always_the_last_of_all():
    assert climbmix.shard_names(3) == ["shard_00000.parquet", "shard_00001.parquet", "shard_06542.parquet"]
    assert climbmix.shard_names(1) == ["shard_06542.parquet"]
    every = climbmix.shard_names(6543)
    assert (len(set(every)), every[-2:]) == (6543, ["shard_06541.parquet", "shard_06542.parquet"])
    with pytest.raises(DataError, match="Use 6543 or less"):
        climbmix.shard_names(6544)
    with pytest.raises(ConfigError, match="Use 2 or more"):
        climbmix.shard_names(0)


def parquet_bytes(text):
    sink = io.BytesIO()
    pq.write_table(pa.table({"text": [text]}), sink)
    return sink.getvalue()


def test_fetch_downloads_what_is_missing_and_refuses_what_is_no_parquet(server, tmp_path):
    server.bodies = {f"/{name}": parquet_bytes(name) for name in climbmix.shard_names(4)}
    options = {"base_url": server.url, "backoff_s": 0.001, "echo": lambda line: None}
    server.script["/shard_06542.parquet"] = ["wrong"]
    folder = climbmix.fetch(tmp_path, 3, **options)
    assert folder == tmp_path / "corpora" / "climbmix"
    assert sorted(path.name for path in folder.iterdir()) == climbmix.shard_names(3)
    assert pq.read_table(folder / "shard_06542.parquet")["text"].to_pylist() == ["shard_06542.parquet"]
    before = len(server.requests)
    climbmix.fetch(tmp_path, 4, **options)
    assert server.requests[before:] == [("/shard_00002.parquet", None)]
    server.bodies["/shard_00003.parquet"] = b"<html>please sign in</html>"
    with pytest.raises(DataError, match="not a whole parquet file"):
        climbmix.fetch(tmp_path, 5, attempts=2, **options)
