"""The price table and a user's own: what is found, what is refused, and that nothing is invented."""

import re

import pytest

from raychat.errors import ConfigError
from raychat.planning.devices import PEAKS
from raychat.planning.prices import find_machine, load_prices, machines_with

OWN = """
[[machine]]
name = "p4d.24xlarge"
gpu = "A100 40GB"
gpus = 8
on_demand = 19.5
as_of = "2026-11-01"

[[machine]]
name = "desk"
gpu = "4070"
gpus = 1
"""


def written(path, text):
    path.write_text(text)
    return str(path)


def test_every_shipped_price_says_where_it_is_from():
    for machine in load_prices().values():
        assert machine.source
        assert machine.as_of
        assert machine.gpu in {*PEAKS, "cpu"}
        assert machine.on_demand is not None


def test_the_shipped_table_has_the_prices_that_were_read():
    table = load_prices()
    p4d = table["p4d.24xlarge"]
    assert (p4d.gpu, p4d.gpus, p4d.on_demand, p4d.spot) == ("a100-40gb", 8, 21.958, (6.0, 9.7))
    assert table["p5.48xlarge"].on_demand == 55.04
    assert table["a100-rented"].on_demand == pytest.approx(4.36 / (60.7 / 60), abs=0.005)  # document 004


def test_a_date_that_is_not_known_is_said_in_words():
    assert "a date that is not known" in load_prices()["p4d.24xlarge"].dated


def test_a_users_file_replaces_and_adds(tmp_path):
    table = load_prices(written(tmp_path / "own.toml", OWN))
    assert (table["p4d.24xlarge"].on_demand, table["p4d.24xlarge"].spot) == (19.5, None)
    assert "2026-11-01" in table["p4d.24xlarge"].dated
    assert "own.toml" in table["p4d.24xlarge"].dated
    assert (table["desk"].gpu, table["desk"].on_demand) == ("rtx-4070", None)
    assert set(table) == set(load_prices()) | {"desk"}
    assert load_prices()["p4d.24xlarge"].on_demand == 21.958


def test_a_machine_is_found_in_any_case_and_an_unknown_one_gets_near_names():
    table = load_prices()
    assert find_machine(" P4D.24xlarge", table) is table["p4d.24xlarge"]
    with pytest.raises(ConfigError, match=r"'p4d' is not in the price table.*did you mean p4d\.24xlarge or p4de"):
        find_machine("p4d", {**table, "p4de": table["p4de.24xlarge"]})
    with pytest.raises(ConfigError, match="--prices FILE"):
        find_machine("abacus", table)


def test_machines_with_a_gpu_are_cheapest_first_for_so_many(tmp_path):
    names = [machine.name for machine in machines_with("h100", 1, load_prices())]
    assert names[:3] == ["nebius-h100", "a3-highgpu-1g", "p5.4xlarge"]
    eight = machines_with("h100", 8, load_prices())
    costs = [machine.on_demand * -(-8 // machine.gpus) for machine in eight]
    assert costs == sorted(costs)
    assert machines_with("rtx-4070", 1, load_prices()) == []
    own = load_prices(written(tmp_path / "own.toml", OWN))
    assert [machine.name for machine in machines_with("rtx-4070", 1, own)] == ["desk"]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("name = ", "is no TOML"),
        ("", "holds no prices"),
        ("[price]\nx = 1", "'price' has no meaning there"),
        ('[[machine]]\ngpu = "h100"\ngpus = 1', "entry 1: 'name' is missing"),
        ('[[machine]]\nname = "x"\ngpu = "h100"', "'gpus' is missing: say how many, at least 1"),
        ("machine = [1, 2]", "entry 1: an entry is a table"),
        ('[[machine]]\nname = "x"\ngpu = "h101"\ngpus = 1', "(x): gpu 'h101' is not in the table"),
        ('[[machine]]\nname = "x"\ngpu = "h100"\ngpus = 1\nprice = 3', "there is no key 'price'"),
        ('[[machine]]\nname = "x"\ngpu = "h100"\ngpus = 1\non_demnd = 3', "did you mean on_demand"),
        ('[[machine]]\nname = "x"\ngpu = "h100"\ngpus = 1\non_demand = -3', "on_demand = -3 is to be dollars"),
        ('[[machine]]\nname = "x"\ngpu = "h100"\ngpus = 1\non_demand = "3"', "on_demand = '3' is to be dollars"),
        ('[[machine]]\nname = "x"\ngpu = "h100"\ngpus = 1\non_demand = inf', "on_demand = inf is to be dollars"),
        ('[[machine]]\nname = "x"\ngpu = "h100"\ngpus = 1\nspot = [3]', "is to be [lowest, highest]"),
        ('[[machine]]\nname = "x"\ngpu = "h100"\ngpus = 1\nspot = [3, 2]', "write [2, 3]"),
        ('[[machine]]\nname = "x"\ngpu = "h100"\ngpus = true', "gpus = True is to be a whole number"),
        ('[[machine]]\nname = "x"\ngpu = "cpu"\ngpus = 2', "leave gpus out"),
        ('[[machine]]\nname = "x"\ngpu = "h100"\ngpus = 1\nas_of = 2026-11-01', "is to be text in quotes"),
        ('[[machine]]\nname = "x"\ngpu = "cpu"\n[[machine]]\nname = "x"\ngpu = "cpu"', "'x' is there twice"),
    ],
)
def test_what_a_users_file_cannot_mean_is_refused(tmp_path, text, problem):
    path = written(tmp_path / "own.toml", text)
    with pytest.raises(ConfigError, match=re.escape(problem)) as refusal:
        load_prices(path)
    assert "own.toml" in str(refusal.value)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.toml cannot be read: No such file"):
        load_prices(str(tmp_path / "none.toml"))
