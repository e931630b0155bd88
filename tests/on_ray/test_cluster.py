"""Joining a cluster from a process of its own."""

import subprocess
import sys

import pytest

from on_ray.conftest import ROOT

pytestmark = pytest.mark.ray

CONNECT = """
import sys
from raychat.config import Config
from raychat.errors import ConfigError
from raychat.on_ray.cluster import connect
try:
    with connect(Config.from_flat({"address": sys.argv[1]}), echo=print):
        print("connected")
except ConfigError as error:
    print("error:", error)
"""


@pytest.mark.parametrize(
    ("shown", "answer"),
    [
        (
            {},
            "asks for a token, and this process gave none, or another one: export RAY_AUTH_MODE=token and RAY_AUTH_TOKEN",
        ),
        (
            {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "not-the-one-" * 4},
            "asks for a token, and this process gave none",
        ),
    ],
    ids=["none", "another"],
)
def test_a_cluster_that_asks_for_a_token_says_so(cluster, environment, shown, answer):
    """It was "there is no Ray cluster", of one that is there."""
    bare = {name: value for name, value in environment.items() if not name.startswith("RAY_AUTH")}
    env = bare | {"RAY_NUM_REDIS_GET_RETRIES": "1", "PYTHONPATH": str(ROOT)} | shown  # of 20, a second each
    done = subprocess.run([sys.executable, "-c", CONNECT, cluster.address], env=env, capture_output=True, text=True)
    last = done.stdout.splitlines()[-1]
    assert last.startswith(f"error: The Ray cluster at '{cluster.address}' {answer}"), done
