"""Room for workers on a cluster of several nodes: as much as is free, not as much as there is."""

import time

import pytest
import ray
from ray.util.placement_group import placement_group, remove_placement_group

from raychat.on_ray import sizing
from raychat.on_ray.nodes import NodeWatch
from raychat.on_ray.sizing import Room

pytestmark = pytest.mark.ray


def eventually(room: Room, seconds: float = 20.0) -> int | None:
    """What `found` says in the end."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        room.ask()
        if (workers := room.found()) is not None:
            return workers
        time.sleep(0.05)
    return None


@pytest.fixture
def watch(cluster, monkeypatch):
    monkeypatch.setattr(sizing, "SETTLE_S", 0.5)
    return NodeWatch(use_gpu=False)


@pytest.fixture
def tenant(cluster):
    """Somebody else who uses two of the cluster's CPUs."""
    group = placement_group([{"CPU": 2}])
    assert group.wait(60)
    yield
    remove_placement_group(group)


def test_all_that_is_asked_for_when_it_is_free(watch):
    room = Room(watch, False, most=3, fewest=1)
    assert eventually(room) == 3
    room.release()


@pytest.mark.usefixtures("tenant")
def test_what_others_leave_is_enough_when_fewer_will_do(watch):
    room = Room(watch, False, most=watch.slots(), fewest=1)
    assert eventually(room) == watch.slots() - 2
    room.release()


@pytest.mark.usefixtures("tenant")
def test_too_little_room_is_waited_for(watch):
    room = Room(watch, False, most=watch.slots(), fewest=watch.slots())
    assert eventually(room, seconds=2) is None
    room.release()


def test_a_changed_request_forgets_how_long_the_last_one_was_granted(watch):
    """Else the little that is granted at first would seem to have lasted."""
    room = Room(watch, False, most=2, fewest=1)
    room.ask_more(1, away_from=set())
    deadline = time.monotonic() + 20
    while room.more() != 1:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    room.ask()
    assert room._requests.granted()[1] < 0.5
    assert eventually(room) == 2
    room.release()


def test_nothing_is_kept_after_release(watch, cluster):
    room = Room(watch, False, most=watch.slots(), fewest=1)
    assert eventually(room) == watch.slots()
    room.release()
    deadline = time.monotonic() + 20
    while ray.available_resources().get("CPU", 0) < watch.slots():
        assert time.monotonic() < deadline
        time.sleep(0.1)
