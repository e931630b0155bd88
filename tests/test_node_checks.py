"""What is asked of nodes before they train, as far as it needs no cluster."""

import dataclasses
from types import SimpleNamespace

import pytest

from raychat.config import Config
from raychat.errors import ConfigError
from raychat.evaluation.core.archive import fetched_folder
from raychat.on_ray import node_checks, node_probe, sizing
from raychat.on_ray.node_checks import as_error, compare_software, loopback_warnings, off_by, places_of
from raychat.on_ray.node_probe import DRIVER, Read, Seen, Software, fingerprint, look
from raychat.on_ray.node_reads import reads_of
from raychat.on_ray.nodes import Node

MINE = Software(python="3.11.7", ray="2.60.0", torch="2.13.0", raychat="abc")
OK = Seen(software=MINE, troubles=("",), name_is_loopback=False, time_s=0.0)


def node(name: str, *, cpus: int = 8, gpus: int = 0, address: str = "") -> Node:
    return Node(name, name, address or name, 1, cpus, gpus, None)


def has(**versions: str) -> Seen:
    return dataclasses.replace(OK, software=dataclasses.replace(MINE, **versions))


@pytest.mark.parametrize(
    ("versions", "said"),
    [
        ({"python": "3.12.1"}, "Python 3.12.1, the driver 3.11.7"),
        ({"ray": "2.61.0"}, "Ray 2.61.0"),
        ({"raychat": "def"}, "install the same commit"),
        ({"torch": "2.12.0"}, "torch 2.12.0"),
        ({"torch": ""}, "torch (none)"),
    ],
)
def test_software_that_breaks_training_is_an_error(versions, said):
    sound, other = node("a", gpus=8), node("b", gpus=8)
    errors, warnings = compare_software(MINE, {sound: OK, other: has(**versions)})
    assert list(errors) == [other]
    assert said in errors[other]
    assert not warnings


@pytest.mark.parametrize("versions", [{}, {"python": "3.11.2"}, {"torch": "2.13.0+cu128"}])
def test_software_that_differs_in_nothing_that_counts_is_fine(versions):
    assert compare_software(MINE, {node("a", gpus=8): OK, node("b", gpus=8): has(**versions)}) == ({}, [])


def test_a_patch_of_torch_is_a_warning_and_a_node_that_does_not_train_may_have_none():
    answers = {node("a", gpus=8): OK, node("b", gpus=8): has(torch="2.13.1"), node("cpu"): has(torch="")}
    errors, warnings = compare_software(MINE, answers)
    assert not errors
    assert [line.split()[1] for line in warnings] == ["b"]


def test_a_clock_is_off_by_what_the_round_trip_does_not_explain():
    assert off_by(103.0, 100.0, 104.0) == 0
    assert off_by(110.0, 100.0, 104.0) == 6
    assert off_by(93.0, 100.0, 104.0) == 7


def test_only_real_machines_are_warned_of_their_loopback_names():
    bad = dataclasses.replace(OK, name_is_loopback=True)
    raylets = {node("a", address="10.0.0.1"): bad, node("b", address="10.0.0.1"): bad}
    assert loopback_warnings(raylets, "10.0.0.1") == []
    machines = {node("a", address="10.0.0.1"): OK, node("b", address="10.0.0.2"): bad}
    assert ["name of node b " in line for line in loopback_warnings(machines, "10.0.0.1")] == [True]


def test_a_name_that_stands_for_loopback_counts_unless_an_interface_is_named(monkeypatch):
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setattr(node_probe.socket, "gethostbyname", lambda name: "127.0.1.1")
    assert node_probe.gloo_is_on_loopback()
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth0")
    assert not node_probe.gloo_is_on_loopback()


def test_nodes_with_the_same_problem_are_named_together():
    text = as_error({node(f"n{i}"): "no" if i < 8 else "yes" for i in range(9)})
    assert "node n0, node n1, node n2, node n3, node n4 and 3 more: no" in text
    assert "node n8: yes" in text


def test_what_the_driver_wrote_is_read_and_answered(tmp_path):
    (tmp_path / DRIVER).write_text("t")
    assert look("t", "n1", [str(tmp_path)]).troubles == ("",)
    assert (tmp_path / "n1").read_text() == "t"


def test_a_node_that_sees_nothing_leaves_nothing(tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / DRIVER).write_text("old")
    troubles = look("t", "n1", [str(tmp_path / "absent"), str(tmp_path / "other")]).troubles
    assert "does not see" in troubles[0]
    assert "something else" in troubles[1]
    assert [file.name for file in tmp_path.rglob("*")] == ["other", DRIVER]


def test_a_folder_that_may_not_be_written_is_said(tmp_path):
    (tmp_path / DRIVER).write_text("t")
    (tmp_path / "n1").mkdir()  # root may write anywhere, but not a file over a folder
    assert "cannot write there" in look("t", "n1", [str(tmp_path)]).troubles[0]


def test_a_changed_line_of_source_is_another_fingerprint(tmp_path):
    (tmp_path / "a.py").write_text("x = 1\n")
    first = fingerprint(tmp_path)
    (tmp_path / "notes.txt").write_text("not code")
    assert fingerprint(tmp_path) == first
    (tmp_path / "a.py").write_text("x = 2\n")
    assert fingerprint(tmp_path) != first


@pytest.mark.parametrize(
    ("storage", "seen"),
    [("", ["base"]), ("{}/base/mine", ["base"]), ("{}/runs", ["base", "runs"]), ("s3://bucket/x", ["s3://bucket/x"])],
)
def test_the_places_are_those_that_nodes_use(tmp_path, storage, seen):
    config = Config.from_flat({"base_dir": str(tmp_path / "base"), "storage_path": storage.format(tmp_path)})
    places = [place.store.uri.removeprefix(f"{tmp_path}/") for place in places_of(config)]
    assert places == seen


@pytest.fixture
def base(tmp_path):
    """A base directory with CORE tasks; beside it, weights, a tokenizer and an archive."""
    for place in ("base/core_bundle", "base/weights", "weights", "words"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "meta_000001.json").write_text("{}")
    (tmp_path / "core.zip").write_bytes(b"zip")
    return tmp_path / "base"


URL = "https://user:secret@example.org/core.zip"


@pytest.mark.parametrize(
    ("settings", "read"),
    [
        ({}, []),  # CORE tasks in a base directory that all share
        ({"init_from": "{}/weights"}, ["--init-from {}/weights"]),
        ({"init_from": "{}/base/weights", "tokenizer": "name"}, []),
        ({"init_from": "{}/nowhere", "core_bundle": URL}, []),  # the driver says so itself; the driver fetches for all
        ({"core_bundle": "{}/core.zip", "tokenizer": "{}/words"}, ["--core-bundle {}", "--tokenizer {}/words"]),
        ({"core_bundle": "{}/core.zip", "core_metric_every": -1}, []),
        ({"storage_path": "s3://b/x", "tokenizer": "{}/words"}, ["the CORE tasks in {}/base/core_bundle"]),
        ({"storage_path": "s3://b/x", "core_bundle": URL}, [f"--core-bundle {URL.replace(':secret', '')}"]),
    ],
)
def test_nodes_are_asked_for_what_they_read_besides_the_shared_folders(tmp_path, base, settings, read):
    given = {key: value.format(tmp_path) if isinstance(value, str) else value for key, value in settings.items()}
    found = reads_of(Config.from_flat({"base_dir": str(base), **given}))
    assert [f"{one.setting} {one.place}" for one in found] == [text.format(tmp_path) for text in read]
    assert all("://" in one.address or one.entries for one in found)


def test_a_run_that_goes_on_reads_no_initial_weights(tmp_path, base):
    config = Config.from_flat({"base_dir": str(base), "init_from": str(tmp_path / "weights"), "model_tag": "x"})
    assert reads_of(config)
    (config.run_dir / "checkpoints" / "step_00000001").mkdir(parents=True)
    (config.run_dir / "config.json").write_text("{}")
    assert not reads_of(config)


def test_a_node_says_what_it_cannot_read(tmp_path, base):
    (same,) = reads_of(Config.from_flat({"base_dir": str(base), "init_from": str(tmp_path / "weights")}))
    other = dataclasses.replace(same, entries=(("meta_000001.json", 3),))
    missing = dataclasses.replace(same, entries=(("eval_data", None),))
    url = Read(setting="--core-bundle", address="http://me:secret@127.0.0.1:9/core.zip?token=t", remedy="")
    cached = fetched_folder(url.address, tmp_path)
    cached.mkdir()
    seen = look("t", "n1", [], [same, other, missing, url, dataclasses.replace(url, cached=str(cached))])
    assert (seen.unread[0], seen.unread[4]) == ("", "")
    assert "sees another meta_000001.json there" in seen.unread[1]
    assert "does not see eval_data" in seen.unread[2]
    assert "cannot fetch it" in seen.unread[3]
    assert "secret" not in seen.unread[3] + url.place


class Granted:
    """Stands for requests that are all granted at once."""

    def __init__(self, use_gpu: bool) -> None:
        self.asked, self.away_from = 0, set()

    def set(self, workers: int, away_from=()) -> None:
        self.asked, self.away_from = workers, set(away_from)

    def granted(self) -> tuple[int, float]:
        return self.asked, 1000.0


class Watch:
    """Stands for a watch of two nodes of one CPU."""

    checked, unfit = False, frozenset()

    def slots(self) -> int:
        return 2 - len(self.unfit)

    def avoid(self) -> list[str]:
        return sorted(self.unfit)


def test_workers_start_only_when_nodes_are_checked_and_keep_off_those_that_are_unfit(monkeypatch):
    monkeypatch.setattr(sizing, "Requests", Granted)
    watch = Watch()
    room = sizing.Room(watch, False, most=2, fewest=1)
    room.ask()
    assert room.found() is None
    watch.checked = True
    assert room.found() == 2
    room.ask_more(1, away_from={"home"})
    watch.unfit = {"bad"}  # found after the room was asked for
    assert room.more() == 1
    assert room._requests.away_from == {"home", "bad"}
    watch.checked = False
    assert room.more() == 0


def test_an_outage_of_the_storage_is_an_error_before_training_and_no_reason_to_end_it_later(monkeypatch, tmp_path):
    def out_of_reach(places, reads, some):
        raise ConfigError("cannot be written to")

    monkeypatch.setattr(node_checks, "_Round", out_of_reach)
    monkeypatch.setattr(node_checks.ray, "get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: "me"))
    checks = node_checks.NodeChecks(Config.from_flat({"base_dir": str(tmp_path)}), echo=print)
    with pytest.raises(ConfigError):
        checks.tick([node("joined")])
    checks.strict = False
    checks.tick([node("joined")])
    assert not checks.pending
    assert not checks.unfit
