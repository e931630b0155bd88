"""Targets and dollars: which machine a plan is for, what it costs there, and that an unknown price stays unknown."""

import pytest

from raychat.config import Config
from raychat.errors import ConfigError
from raychat.planning import model_shape, recipe
from raychat.planning import target as targets
from raychat.planning.duration import forecast_time
from raychat.planning.money import forecast_money, price_per_hour, priced
from raychat.planning.target import local_memory, plan_compiled, plan_dtype, plan_loss, resolve_target

A100_D10 = {"depth": 10, "num_iterations": 1500, "device_batch_size": 32, "eval_every": 250, "core_metric_every": -1,
            "tok_max_chars": 1_000_000_000, "corpus": "climbmix"}  # fmt: skip


@pytest.fixture(autouse=True)
def a_machine_without_gpus(tmp_path, monkeypatch):
    monkeypatch.setenv("RAYCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.setattr(targets, "local_gpu", lambda: None)


def target(**settings):
    return resolve_target(Config.from_flat(settings))


def money(**settings):
    config = Config.from_flat(A100_D10 | settings)
    aim, shape = resolve_target(config), model_shape(config.model)
    time = forecast_time(
        config, recipe(config), shape, aim, tokens_ready=False, tokenizer_ready=False, corpus_chars=18 * 250e6
    )
    return forecast_money(config, aim, time), time


def own_prices(folder, text):
    (folder / "own.toml").write_text(text)
    return str(folder / "own.toml")


def test_a_machine_decides_gpu_workers_and_machines():
    one = target(machine="P4D.24xlarge")
    assert (one.device, one.gpu, one.workers, one.machines, one.cores) == ("cuda", "a100-40gb", 8, 1, 96)
    assert one.memory_bytes == 40 * 2**30
    assert target(machine="p4d.24xlarge", num_workers=12).machines == 2
    assert target(machine="p4d.24xlarge", num_workers=1).machines == 1


def test_a_gpu_alone_is_one_worker_and_no_machine():
    one = target(gpu="A100 40GB")
    assert (one.gpu, one.workers, one.machines, one.machine) == ("a100-40gb", 1, 1, None)
    assert target(gpu="h100", num_workers=16).machines == 2


def test_nothing_said_is_this_machine(monkeypatch):
    monkeypatch.setattr(targets, "local_cores", lambda: 6)
    here = target()
    assert (here.device, here.gpu, here.workers, here.cores, here.peak) == ("cpu", "cpu", 1, 6, None)
    monkeypatch.setattr(targets, "local_gpu", lambda: ("NVIDIA H100 80GB HBM3", 4))
    assert (target().gpu, target().workers, target().machines) == ("h100", 4, 1)
    assert target(device_type="cpu").gpu == target(gpu="cpu").gpu == "cpu"


def test_machine_and_device_stand_over_the_gpu_that_a_preset_names():
    assert target(machine="p4d.24xlarge", gpu="h100").gpu == "a100-40gb"
    assert target(gpu="h100", device_type="cpu").gpu == "cpu"


def test_a_gpu_of_this_machine_that_no_table_knows_keeps_its_name(monkeypatch):
    monkeypatch.setattr(targets, "local_gpu", lambda: ("Abacus 3000", 2))
    here = target()
    assert (here.gpu, here.workers, here.peak, here.memory_bytes) == ("Abacus 3000", 2, None, None)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"machine": "p4d.24xlarge", "device_type": "cpu"}, "contradict each other"),
        ({"gpu": "cpu", "device_type": "cuda"}, "contradict each other"),
        ({"gpu": "h1000"}, "did you mean h100"),
        ({"machine": "p4d"}, "did you mean p4d.24xlarge"),
        ({"device_type": "cuda"}, "shows no GPU"),
    ],
)
def test_what_cannot_be_planned_for_is_refused(settings, problem):
    with pytest.raises(ConfigError, match=problem):
        target(**settings)


def test_memory_is_the_machines_or_the_containers_where_that_is_less(tmp_path, monkeypatch):
    (tmp_path / "meminfo").write_text("MemTotal:       1000 kB\nMemFree:  10 kB\n")
    monkeypatch.setattr(targets, "MEMORY", tmp_path / "meminfo")
    monkeypatch.setattr(targets, "CGROUP", tmp_path)
    assert local_memory() == 1_024_000
    (tmp_path / "memory.max").write_text("max\n")
    assert local_memory() == 1_024_000
    (tmp_path / "memory.max").write_text("500000\n")
    assert local_memory() == 500_000


def test_the_plan_chooses_as_the_run_does(tmp_path, monkeypatch):
    monkeypatch.setattr(targets, "CPUINFO", tmp_path / "cpuinfo")
    config = Config()
    assert plan_dtype(config, target()) == "float32"
    (tmp_path / "cpuinfo").write_text("processor : 0\nflags\t\t: fpu avx512_bf16 sse\n")
    assert plan_dtype(config, target()) == "bfloat16"
    on_gpu = target(gpu="h100")
    assert [plan_loss(config, t) for t in (target(), on_gpu)] == ["chunked", "full"]
    short = Config.from_flat({"depth": 4, "num_iterations": 10, "total_batch_size": 2048, "device_batch_size": 1})
    assert [plan_compiled(run, t) for run in (config, short) for t in (target(), on_gpu)] == [True, True, False, True]


def test_the_documents_bill_lies_in_the_range_at_their_price():
    found, time = money(gpu="a100-40gb", price_per_hour=4.3)
    assert found.on_demand.includes(4.36)
    assert found.on_demand.mid == pytest.approx(4.3 * time.total.mid / 3600)
    assert (found.price, found.machine, found.spot, found.price_source) == (4.3, "", None, "--price-per-hour")


def test_without_a_machine_the_cheapest_with_this_gpu_is_named():
    found, _ = money(gpu="a100-40gb")
    assert found.machine == "a100-rented"
    assert found.on_demand.includes(4.36)
    assert "the cheapest of the table" in found.price_source
    assert "document 004" in found.price_source
    assert [option.machine.name for option in found.options] == ["a100-rented", "p4d.24xlarge"]


def test_machines_that_would_have_to_be_joined_by_a_network_are_no_option():
    one, _ = money(gpu="h100", num_workers=8)
    assert {option.machines for option in one.options} == {1}
    assert [option.machine.name for option in one.options] == ["lambda-8xh100", "a3-highgpu-8g", "p5.48xlarge"]
    two, _ = money(gpu="h100", num_workers=16)
    assert {option.machines for option in two.options} == {2}


def test_a_named_machine_costs_what_its_nodes_cost():
    found, time = money(machine="p4d.24xlarge", num_workers=16)
    assert found.node_hours.mid == pytest.approx(2 * time.total.mid / 3600)
    assert found.on_demand.mid == pytest.approx(21.958 * found.node_hours.mid)
    assert found.spot.low == pytest.approx(6.0 * found.node_hours.low)
    assert found.spot.high == pytest.approx(9.7 * found.node_hours.high)
    assert (found.price_as_of, found.machine) == ("unknown", "p4d.24xlarge")


def test_only_spot_pays_for_replay():
    calm, _ = money(machine="p4d.24xlarge")
    rough, time = money(machine="p4d.24xlarge", preemptions_per_hour=0.3)
    assert rough.on_demand == calm.on_demand
    assert rough.replay_s == time.replay
    assert rough.spot.mid / calm.spot.mid == pytest.approx(time.total.mid / time.undisturbed.mid)


def test_an_unknown_price_is_no_price_all_the_way(tmp_path):
    found, _ = money(gpu="rtx-4070", device_batch_size=8)
    assert (found.price, found.on_demand, found.spot, found.options) == (None, None, None, ())
    assert "no price is known for rtx-4070" in found.price_source
    desk = own_prices(tmp_path, '[[machine]]\nname = "desk"\ngpu = "4070"\ngpus = 1\n')
    named, _ = money(machine="desk", prices=desk, device_batch_size=8)
    assert (named.price, named.on_demand) == (None, None)
    assert price_per_hour(Config.from_flat({"machine": "desk", "prices": desk})) is None


def test_a_cpu_costs_nothing_that_is_known():
    found, _ = money(gpu="cpu")
    assert (found.on_demand, found.spot, found.machine) == (None, None, "")


def test_what_has_no_time_has_no_cost():
    assert money(gpu="mi300x") == (None, None)


def test_a_cpu_machine_of_the_users_own_has_a_price(tmp_path):
    own = own_prices(tmp_path, '[[machine]]\nname = "c7a"\ngpu = "cpu"\ncores = 32\non_demand = 1.5\n')
    found, _ = money(machine="c7a", prices=own)
    assert target(machine="c7a", prices=own).cores == 32
    assert found.on_demand.mid == pytest.approx(1.5 * found.node_hours.mid)


def test_the_ledgers_price_is_the_flag_then_the_named_machine_then_none():
    assert price_per_hour(Config.from_flat({"machine": "p4d.24xlarge", "price_per_hour": 3.0})) == 3.0
    assert price_per_hour(Config.from_flat({"machine": "p4d.24xlarge"})) == 21.958
    assert price_per_hour(Config.from_flat({"gpu": "a100-40gb"})) is None
    assert price_per_hour(Config()) is None


def test_a_priced_configuration_says_the_price_and_keeps_its_source():
    config = Config.from_flat(A100_D10 | {"machine": "p4d.24xlarge"})
    assert priced(config).money.price_per_hour == 21.958
    assert priced(priced(config)) == priced(config)
    assert priced(Config()) == Config()
    before, _ = money(machine="p4d.24xlarge")
    after, _ = money(machine="p4d.24xlarge", price_per_hour=21.958)
    assert (after.price_source, after.spot) == (before.price_source, before.spot)


def test_a_price_of_ones_own_is_not_taken_for_the_machines():
    found, _ = money(machine="p4d.24xlarge", price_per_hour=15.0)
    assert (found.price, found.price_source, found.spot) == (15.0, "--price-per-hour", None)
