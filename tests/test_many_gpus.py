"""What more GPUs bring: laws of the plan for several numbers of them, and the published run as a check."""

import re

import pytest

from raychat.config import Config
from raychat.errors import ConfigError
from raychat.planning import make_plan
from raychat.planning.comparison import compare
from raychat.planning.many_gpus import DEARER, PAYS, critical_batch, doublings, extra_tokens, format_gpus, likely_loss
from raychat.planning.proposal import with_values


@pytest.fixture
def d24(tmp_path) -> Config:
    return Config.from_flat({"depth": 24, "gpu": "h100", "fp8": True, "base_dir": str(tmp_path)})


def plan_of(config: Config, gpus: int) -> dict:
    return make_plan(with_values(config, num_workers=gpus, device_batch_size=1 if gpus > 64 else 8))


def test_eight_h100s_run_at_what_the_lineage_published(d24):
    """Its run 6: 983,000 tokens/s, and 99 minutes of training from 12 tokens per parameter's 8,352 steps or fewer."""
    found = make_plan(with_values(d24, num_workers=8, device_batch_size=16))
    low, _, high = found["time"]["tok_per_sec"]
    assert low < 983_000 < high
    assert 0.01 < found["exchange"]["share"] < 0.04  # 12 to 25 ms of 1.1 to 1.3 s, from the nominal rates alone


def test_no_number_of_gpus_is_faster_than_its_share(d24):
    """Tokens per second grow with GPUs while a rank has several rows, and never by more than GPUs do."""
    rates = {gpus: plan_of(d24, gpus)["time"]["tok_per_sec"][1] for gpus in (1, 2, 4, 8, 16, 32, 64)}
    numbers = list(rates)
    for fewer, more in zip(numbers, numbers[1:], strict=False):
        assert 1 < rates[more] / rates[fewer] <= 2


def test_one_gpu_exchanges_nothing_and_a_machine_reads_what_it_trains_on(d24):
    assert plan_of(d24, 1)["exchange"] is None
    for gpus, machines in ((8, 1), (64, 8)):
        found = plan_of(d24, gpus)
        read, rate = found["exchange"]["read_bytes_per_s"][1], found["time"]["tok_per_sec"][1]
        assert read * machines == pytest.approx(2 * rate * 2049 / 2048)


def test_the_exchange_takes_its_share_of_the_step(d24):
    found = plan_of(d24, 64)
    parts = found["time"]["parts"]
    assert found["exchange"]["share"] == pytest.approx(parts["exchange"][1] / found["time"]["step_s"][1])
    assert sum(parts[name][1] for name in ("compute", "muon", "exchange")) == pytest.approx(found["time"]["step_s"][1])
    assert found["exchange"]["padding"] == pytest.approx(1.8, abs=0.1)  # 24 matrices of a shape on 64 ranks


def test_doublings_pay_less_and_less_and_end_with_the_batch(d24):
    found = doublings(d24)
    assert [step.gpus for step in found] == [1, 2, 4, 8, 16, 32, 64, 128, 256]
    assert found[0].fast == pytest.approx(2, rel=0.02)
    beyond = [step.fast < PAYS for step in found]
    assert beyond == sorted(beyond)  # once it stops paying, it pays no more
    assert all(step.fast <= 2 for step in found)
    assert found[-1].hours > DEARER


def test_the_table_says_where_it_stops(d24):
    settings = [{"num_workers": gpus} for gpus in (1, 8, 64, 1024)]
    text = format_gpus(d24, compare(d24, [24], settings, keep_batch=False))
    assert [line.split()[0] for line in text.splitlines()[1:4]] == ["1", "8", "64"]
    assert "--num-workers 1024 is more than the 512 sequences of a batch" in text
    assert re.search(r"from (\d+) to (\d+) GPUs a step gets 1\.\d\d times as fast", text)
    assert "a batch has 512 sequences" in text


def test_a_slow_network_stops_paying_sooner(d24):
    plain = with_values(d24, gpu="a100-40gb", fp8=False)
    last = {
        name: next(s.gpus for s in doublings(config) if s.fast < PAYS)
        for name, config in (
            ("nvlink, 3,200 Gb/s", d24),
            ("nvlink, 400 Gb/s", plain),
            ("pcie", with_values(plain, gpu="l40s")),
        )
    }
    assert last["nvlink, 3,200 Gb/s"] > last["nvlink, 400 Gb/s"] >= last["pcie"]


def test_a_gpu_of_which_nothing_is_known_is_refused(d24):
    with pytest.raises(ConfigError, match="how fast 'mi300x' computes"):
        format_gpus(with_values(d24, gpu="mi300x", fp8=False), [])


def test_a_batch_far_above_the_critical_one_needs_tokens_in_proportion():
    assert extra_tokens(2.0, 1.0, 1e9) == pytest.approx(0, abs=1e-6)
    assert extra_tokens(2e9, 1e9, 1.0) == pytest.approx(1)
    assert extra_tokens(1e6, 0.0, 1e6) == pytest.approx(1)  # what critical means
    assert extra_tokens(1e6, 1e6, 1e6) == 0


def test_lower_losses_have_larger_critical_batches():
    """2.1e8 / loss^4.8 is how the source's figure writes the same law; large models on much text come to 1.69 nats."""
    assert critical_batch(2.0) > critical_batch(3.0)
    assert critical_batch(3.0) == pytest.approx(2.1e8 / 3.0**4.8, rel=0.1)
    assert likely_loss(10**15, 1e18) == pytest.approx(1.69, abs=0.01)
    assert likely_loss(70_000_000_000, 1.4e12) == pytest.approx(1.94, abs=0.03)  # Chinchilla itself
