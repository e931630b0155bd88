"""`--dry-run-steps` on Ray: its driver trains the short run, and nothing but what was measured is left."""

import contextlib
import json

import pytest

from raychat.config import Config
from raychat.on_ray import cluster as clusters
from raychat.on_ray import rehearsing

pytestmark = pytest.mark.ray


@pytest.fixture
def connected(cluster, monkeypatch):
    """Drivers in this process find themselves connected to the cluster of the tests."""
    monkeypatch.setattr(clusters, "connect", lambda config, *, echo: contextlib.nullcontext(cluster))


@pytest.mark.usefixtures("connected")
def test_two_workers_measure_and_leave_nothing_else(tiny_flags, prepared_base, tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    for name in ("tokenizers", "tokens"):
        (base / name).symlink_to(prepared_base / name)
    asked = {"base_dir": str(base), "num_iterations": 100, "num_workers": 2, "dry_run_steps": 6, "run": "told"}
    lines = []
    plan = rehearsing.rehearse(Config.from_flat(tiny_flags | asked), echo=lines.append)
    assert (plan["horizon"]["num_iterations"], plan["target"]["workers"]) == (100, 2)
    assert all(value is not None for value in plan["measured"].values())
    assert {path.name for path in base.iterdir()} == {"tokenizers", "tokens", "rehearsals"}
    [kept] = (base / "rehearsals").iterdir()
    assert json.loads(kept.read_text()) == plan
    assert sum(line.startswith("finished: step 6 of 6") for line in lines) == 1
