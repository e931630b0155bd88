"""Credentials in URIs open what they are for, and reach neither files nor lines nor MLflow."""

import json
import shutil

import pytest
from runs import after, open_session, run_here

from raychat.storage import Store
from raychat.training import checkpoint
from raychat.training.events import Note
from raychat.training.mirror import Mirror
from raychat.training.secrets import Secrets
from raychat.training.session import Session
from raychat.training.state import Signal
from raychat.uris import lacks_credentials, marked_uri, place_of, public_text, public_uri


@pytest.fixture
def config(own_config):
    return lambda **changes: own_config(**{"save_every": 2, "keep_checkpoints": 9} | changes)


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("s3://key:pw@bucket/path?region=eu", "s3://key@bucket/path?region=eu"),
        ("https://u:p%40w@host:8000/x", "https://u@host:8000/x"),
        ("s3://bucket/x?secret_key=abc&region=eu", "s3://bucket/x?secret_key=...&region=eu"),
        ("https://host/x?sig=abc", "https://host/x?sig=..."),
    ],
)
def test_uri_is_shown_without_password_and_secret_options(uri, shown):
    assert public_uri(uri) == shown
    assert public_uri(shown) == shown


@pytest.mark.parametrize("text", ["/a/path", "d12", "s3://bucket/x", "sqlite:////a/b.db", "http://[::1", "me:pw@host"])
def test_what_holds_no_credentials_is_left_as_it_is(text):
    assert public_uri(text) == text


def test_uris_in_a_text_are_shown_without_their_secrets():
    text = "no 's3://key:pw@bucket/path', nor (https://host/x?sig=abc&n=1). Give s3://bucket"
    assert public_text(text) == "no 's3://key@bucket/path', nor (https://host/x?sig=...&n=1). Give s3://bucket"


@pytest.mark.parametrize(
    "uri", ["s3://key:pw@bucket/path?region=eu", "s3://bucket/x?secret_key=abc&region=eu", "https://host/x?sig=abc"]
)
def test_a_uri_that_was_written_down_names_the_same_place_and_lacks_what_opens_it(uri):
    kept = marked_uri(uri)
    assert place_of(kept) == place_of(uri) == place_of(public_uri(uri))
    assert public_uri(kept) == public_uri(uri)
    assert (lacks_credentials(uri), lacks_credentials(kept)) == (False, True)
    assert marked_uri(place_of(uri)) == place_of(uri)
    assert not lacks_credentials(place_of(uri))


SECRET = "s3cr3t-pw"
WITH_SECRETS = {
    "corpus": f"s3://me:{SECRET}@texts/all?endpoint_override=http://127.0.0.1:1",
    "val_corpus": f"s3://texts/val?secret_key={SECRET}",
    "tracking_uri": f"postgresql://me:{SECRET}@127.0.0.1:1/db",
    "on_event": f"true https://me:{SECRET}@example.org/hook",
}


def files_with(secret, folder):
    return [path for path in folder.rglob("*") if path.is_file() and secret.encode() in path.read_bytes()]


def test_no_credentials_are_in_what_a_session_writes_says_or_tells_mlflow(config, tmp_path):
    plain, lines = open_session(config()), []
    plain.abort()
    session = Session(config(**WITH_SECRETS), plain.data, echo=lines.append)
    session.begin_attempt()
    session.receive(Note("save_failed", {"step": 1, "error": f"no s3://me:{SECRET}@texts"}))
    session.echo(f"cannot open {WITH_SECRETS['corpus']}")
    session.attempt_failed("crash", f"OSError: {WITH_SECRETS['corpus']}")
    told = session.tracking_facts()
    session.close("failed")
    assert files_with(SECRET, tmp_path) == []
    assert SECRET not in json.dumps(told)
    assert lines
    assert not any(SECRET in line for line in lines)
    again = Session(config(**WITH_SECRETS), plain.data, echo=lines.append)  # compared with what was written: no change
    assert again.changed == []
    again.abort()


def test_secrets_are_found_however_they_stand_in_a_setting(config):
    secrets = Secrets(config(**WITH_SECRETS, storage_path="s3://key:pass%2Fword@bucket/x?token=abcdef&region=eu"))
    text = f"{SECRET} pass%2Fword pass/word abcdef eu key bucket 127.0.0.1"
    assert secrets.hide(text) == "... ... ... ... eu key bucket 127.0.0.1"


def test_password_of_the_tracking_server_in_the_environment_is_hidden(config, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"https://me:{SECRET}@mlflow.example.org/")
    lines = []
    session = open_session(config(), lines.append)
    session.echo(f"API request to https://me:{SECRET}@mlflow.example.org/api/2.0 failed")
    session.abort()
    assert lines[-1] == "API request to https://me:...@mlflow.example.org/api/2.0 failed"


def test_fresh_run_begins_anew_though_nothing_of_the_last_one_reached_the_store(config, server, monkeypatch):
    there = {"storage_path": server.uri("runs/lost")}
    with monkeypatch.context() as patch:
        patch.setattr(Mirror, "start", lambda self: None)
        cut_off = open_session(config(**there))
        cut_off.begin_attempt()
        cut_off.abort()
    anew = open_session(config(**there, fresh=True))
    assert anew.begin_attempt().attempt == 1
    anew.abort()


def test_run_in_an_object_store_goes_on_on_another_machine_and_keeps_no_credentials(
    config, prepared_base, server, tmp_path
):
    def machine(number, **changes):
        base = tmp_path / f"machine-{number}"
        for name in ("tokenizers", "tokens", "corpora"):
            if (prepared_base / name).exists():
                shutil.copytree(prepared_base / name, base / name, dirs_exist_ok=True)
        return config(base_dir=str(base), storage_path=server.uri("runs/mine"), **changes)

    whole = run_here(config())
    first = run_here(machine(1), after(2, Signal.STOP))
    second = run_here(machine(2))
    assert second.losses == whole.losses
    assert second.summary.restarts == 1
    assert first.summary.checkpoint.startswith("s3://user@runs/mine/d2/checkpoints/step_00000002?")
    fresh = machine(2, fresh=True)
    open_session(fresh).abort()
    runs = Store.of(fresh.run.storage_path)
    assert runs.names() == ["d2", "d2.old-1", "tokenizers", "tokens"]
    assert checkpoint.steps(runs.child("d2.old-1", "checkpoints")) == [4, 2]
    kept = tmp_path / "download"
    for name in everything_in(runs):
        runs.download(name, kept / name.replace("/", "__"))
    assert {path.name for path in kept.iterdir()} > {"d2.old-1__summary.json", "d2.old-1__config.json"}
    assert files_with("hidden", tmp_path) == []  # the password in the server's URI


def everything_in(store, prefix=""):
    for name in store.names():
        below = list(everything_in(store.child(name), f"{prefix}{name}/"))
        yield from below or [prefix + name]
