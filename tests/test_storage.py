"""A local folder and an object store behave alike: whole files, plain names, bounded calls, no secret shown."""

import os
import pickle
import time
import zlib

import pytest
from s3_server import CUT, free_port, proxy

from raychat import storage
from raychat.errors import ConfigError
from raychat.storage import Store


@pytest.fixture(params=["folder", "s3"])
def store(request, tmp_path):
    """An empty store that does not exist yet."""
    if request.param == "folder":
        return Store.of(tmp_path / "runs")
    return Store.of(request.getfixturevalue("server").uri(f"bucket/{tmp_path.name}/runs"))


def test_what_was_written_is_read_back(store, tmp_path):
    data = bytes(range(256)) * 40_000  # more than one part of an upload
    source = tmp_path / "source"
    source.write_bytes(data)
    store.write_bytes("small", b"abc")
    store.write_bytes("small", b"abcd")  # replaces
    store.write_bytes("empty", b"")
    store.upload("deep/large", source)
    assert store.names() == ["deep", "empty", "small"]
    assert store.read_bytes("small") == b"abcd"
    assert store.read_bytes("empty") == b""
    assert (store.size("small"), store.size("deep/large"), store.size("deep")) == (4, len(data), None)
    assert store.crc32("deep/large") == zlib.crc32(data)
    assert store.download("deep/large", tmp_path / "got" / "copy") == zlib.crc32(data)
    assert (tmp_path / "got" / "copy").read_bytes() == data
    assert os.listdir(tmp_path / "got") == ["copy"]
    assert store.child("deep").read_bytes("large") == data


def test_what_is_not_there_is_absent_and_no_failure(store):
    assert store.names() == []
    assert not store.exists("any")
    assert store.size("any") is None
    store.delete("any")
    for read in (store.read_bytes, store.crc32):
        with pytest.raises(FileNotFoundError):
            read("any")


def test_folders_are_deleted_and_moved_whole(store):
    for name in ("a/one", "a/inner/two", "b/three"):
        store.write_bytes(name, name.encode())
    store.move("a", store.child("kept", "a2"))
    assert not store.exists("a")
    assert store.read_bytes("kept/a2/inner/two") == b"a/inner/two"
    with pytest.raises(FileExistsError):
        store.move("b", store.child("kept", "a2"))
    store.move("b/three", store.child("c"))
    assert store.read_bytes("c") == b"b/three"
    store.delete("kept")
    assert not store.exists("kept")
    assert store.exists("c")


def test_markers_of_folders_do_no_harm(server, tmp_path):
    """Consoles of object stores, and deletions by pyarrow, leave empty objects that stand for folders."""
    store = Store.of(server.uri(f"bucket/{tmp_path.name}"))
    store.write_bytes("folder/only", b"x")
    store.delete("folder/only")
    assert store.child("folder").names() == []
    store.write_bytes("folder/again", b"y")
    assert store.child("folder").names() == ["again"]
    store.delete("folder")
    assert store.names() == []


def test_store_that_works_passes_the_check_and_keeps_nothing_of_it(store):
    store.check_usable()
    assert store.names() == []


def test_store_can_be_sent_to_another_process(store):
    store.write_bytes("x", b"1")
    assert pickle.loads(pickle.dumps(store)).read_bytes("x") == b"1"
    assert Store.of(store) is store
    assert Store.of(store.address) == store


def test_secret_of_a_uri_is_not_shown(server):
    store = Store.of(server.uri("bucket/x")).child("y")
    assert "hidden" in store.address
    assert all("hidden" not in shown for shown in (store.uri, str(store), repr(store)))
    assert store.uri == server.uri("bucket/x/y").replace(":hidden", "")


def test_file_that_cannot_be_written_whole_is_not_there(tmp_path, monkeypatch):
    store = Store.of(tmp_path)
    store.write_bytes("kept", b"old")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(storage.os, "fsync", full)
    for name in ("kept", "new"):
        with pytest.raises(OSError, match="No space left"):
            store.write_bytes(name, b"data")
    assert store.names() == ["kept"]
    assert store.read_bytes("kept") == b"old"


@pytest.mark.parametrize(
    ("uri", "told"),
    [
        ("file:///tmp/x", "give a folder, s3://"),
        ("https://host/x", "give a folder, s3://"),
        ("s3:///x", "names no bucket"),
        ("s3:/bucket/x", "write s3://bucket/x, or ./s3:/bucket/x"),
        ("gs:bucket", "write gs://bucket"),
        ("s3://bucket/x?endpoint=1", "the option endpoint is not known"),
    ],
)
def test_uri_that_cannot_be_a_store_is_refused(uri, told):
    with pytest.raises(ConfigError, match=told):
        Store.of(uri)


def test_bucket_that_is_not_there_is_told_with_a_remedy(server):
    with pytest.raises(ConfigError, match="Check that the bucket exists") as caught:
        Store.of(server.uri("nowhere/x")).check_usable()
    assert "hidden" not in str(caught.value)


def test_folder_that_cannot_be_written_to_is_told_with_a_remedy(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="Give a --storage-path"):
        Store.of(tmp_path / "file" / "runs").check_usable()


def test_endpoint_region_and_credentials_come_from_the_environment(server, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.port}")
    monkeypatch.setenv("AWS_REGION", "eu-west-1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "user")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hidden")
    storage._connect.cache_clear()
    Store.of("s3://bucket/environment").check_usable()


def test_server_that_does_not_answer_is_an_error_in_bounded_time(server, monkeypatch):
    monkeypatch.setattr(storage, "SILENCE_S", 1.0)
    monkeypatch.setattr(storage, "ATTEMPTS", 1)
    storage._connect.cache_clear()
    store = Store.of(server.uri("bucket/frozen"))
    store.write_bytes("x", b"1")
    with server.frozen():
        start = time.monotonic()
        for call in (store.names, lambda: store.write_bytes("y", b"2")):
            with pytest.raises(OSError, match="Timeout"):
                call()
        assert time.monotonic() - start < 30
    storage._connect.cache_clear()
    assert store.read_bytes("x") == b"1"
    if store.exists("y"):  # the request lay in the server's queue; it was whole
        assert store.read_bytes("y") == b"2"


@pytest.mark.parametrize("status", [503, CUT])
def test_upload_that_breaks_off_leaves_no_object(server, tmp_path, monkeypatch, status):
    """The second part of a large upload fails for good: there is no cut object that looks whole."""
    monkeypatch.setattr(storage, "ATTEMPTS", 1)
    storage._connect.cache_clear()
    source = tmp_path / "source"
    source.write_bytes(bytes(25_000_000))
    with proxy(server, lambda method, path: status if "partNumber=2" in path else None) as port:
        store = Store.of(server.uri(f"bucket/{tmp_path.name}", port=port))
        store.write_bytes("small", b"passes")
        with pytest.raises(OSError, match="AWS Error"):
            store.upload("large", source)
        with pytest.raises(OSError, match="AWS Error"):
            store.write_bytes("large", bytes(25_000_000))
        assert store.names() == ["small"]
    storage._connect.cache_clear()


def test_google_storage_that_is_out_of_reach_is_an_error_in_bounded_time(monkeypatch):
    monkeypatch.setattr(storage, "SILENCE_S", 1.0)
    monkeypatch.setattr(storage, "ATTEMPTS", 1)
    storage._connect.cache_clear()
    store = Store.of(f"gs://anonymous@bucket/x?endpoint_override=127.0.0.1:{free_port()}&scheme=http")
    start = time.monotonic()
    for call in (store.names, lambda: store.write_bytes("y", b"2")):
        with pytest.raises(OSError, match="[Cc]onnect"):
            call()
    assert time.monotonic() - start < 30
    storage._connect.cache_clear()


def test_upload_whose_source_breaks_off_leaves_no_object(server, tmp_path):
    store = Store.of(server.uri(f"bucket/{tmp_path.name}"))

    def blocks():
        yield bytes(1000)
        raise OSError(5, "Input/output error")

    with pytest.raises(OSError, match="Input/output"):
        store.write_blocks("x", blocks())
    assert store.names() == []


def test_large_objects_and_other_buckets_are_moved_through_this_process(server, tmp_path, monkeypatch):
    server.make_bucket("second")
    store, other = (Store.of(server.uri(f"{bucket}/{tmp_path.name}")) for bucket in ("bucket", "second"))
    monkeypatch.setattr(storage, "LARGEST_COPY", 3)
    store.write_bytes("a/large", b"1234")
    store.write_bytes("a/b/small", b"12")
    store.move("a", other.child("c"))
    assert store.names() == []
    assert other.read_bytes("c/large") == b"1234"
    assert other.read_bytes("c/b/small") == b"12"


def test_server_that_fails_now_and_then_is_asked_again(server, tmp_path):
    """Every second request fails with 500: all goes through."""
    count = iter(range(10**6))
    with proxy(server, lambda method, path: 500 if next(count) % 2 else None) as port:
        store = Store.of(server.uri(f"bucket/{tmp_path.name}", port=port))
        store.write_bytes("a", b"1")
        assert store.read_bytes("a") == b"1"
        assert store.names() == ["a"]
