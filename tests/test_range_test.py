"""The range test of the rates as a run: what it trains, what it leaves, and what happens when it ends early or is repeated."""

import math
import struct
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from runs import after, run_here

from raychat.config import Config
from raychat.errors import ConfigError
from raychat.on_ray import range_test
from raychat.on_ray.limits import WorkerError
from raychat.planning import recipe
from raychat.search.range_run import is_over, range_config
from raychat.search.range_test import RATES, RangeTest
from raychat.search.rate_range import NoRange
from raychat.search.report.of_run import run_contents
from raychat.search.spec_file import read_spec
from raychat.tracking.summary import Summary
from raychat.training import loop
from raychat.training.state import Signal

STEPS = 24
GIVEN = {"matrix_lr": 0.02, "embedding_lr": 0.3, "unembedding_lr": 0.008, "scalar_lr": 0.5}


def curve(steps: int = 200, climbs_at: float = 4.0) -> tuple[list[float], list[float]]:
    """Multiples from a hundredth to ten, and a loss that falls about 0.2 and climbs."""
    rates = np.geomspace(0.01, 10, steps)
    falls = 9 - 4 / (1 + np.exp(-3 * np.log(rates / 0.2)))
    noise = np.random.default_rng(0).normal(size=steps)
    return rates.tolist(), (falls + 6 * np.maximum(0, np.log(rates / climbs_at)) + 0.05 * noise).tolist()


@dataclass
class Trainer:
    """Trains in this process instead of on Ray."""

    poll: Callable[[], Signal] = lambda: Signal.NONE
    runs: int = 0
    configs: list[Config] = field(default_factory=list)

    def __call__(self, config: Config, *, echo: Callable[[str], None]) -> Summary | None:
        self.runs += 1
        self.configs.append(config)
        poll, self.poll = self.poll, lambda: Signal.NONE
        try:
            return run_here(config, poll).summary
        except loop.DivergedError as error:
            kept = config.run_dir / "summary.json"
            replace(Summary.read(kept), error=str(error)).write(kept)  # which the driver says when it closes
            raise WorkerError(str(error), exit_code=1) from error


def make(config: Config, train: Trainer, **ends: float) -> tuple[RangeTest | None, list[str]]:
    """The range test of `config`, and what it says."""
    said: list[str] = []
    wanted = {"steps": STEPS, "least": 0.01, "most": 10.0} | ends
    return range_test.run(config, **wanted, echo=said.append, train=train), said


def test_the_run_rises_in_the_logarithm_between_its_ends_and_changes_nothing_else(own_config):
    config = own_config()
    test = range_config(config, steps=100, least=0.1, most=5.0)
    assert {name: getattr(test.optim, name) for name in RATES} == pytest.approx(
        {name: 5 * getattr(config.optim, name) for name in RATES}
    )
    optim = test.optim
    assert (optim.warmup_ratio, optim.warmup_steps, optim.warmup_from) == (1.0, -1, pytest.approx(0.02))
    assert (optim.warmdown_ratio, optim.muon_momentum_steps, test.horizon.num_iterations) == (0.0, 0, 100)
    assert test.model_tag == f"{config.model_tag}-lr-range"
    assert recipe(test).total_batch_size == recipe(config).total_batch_size
    assert recipe(test).weight_decay == recipe(config).weight_decay
    for steps, least, most, said in ((5, 0.1, 1, "at least 8"), (99, 2, 1, "--range-least 2"), (99, 0, 1, "-least 0")):
        with pytest.raises(ConfigError, match=said):
            range_config(config, steps=steps, least=least, most=most)


def test_a_stopped_test_goes_on_exactly_and_one_that_is_over_is_not_made_again(own_config, tmp_path):
    undisturbed, _ = make(own_config(storage_path=str(tmp_path / "other")), Trainer())
    trainer, config = Trainer(after(9, Signal.STOP)), own_config()
    assert make(config, trainer) == (None, ["the range test was stopped: the same command goes on with it"])
    found, said = make(config, trainer)
    assert found == undisturbed
    assert found.multipliers == pytest.approx(np.geomspace(0.01, 10, STEPS).tolist())
    again, said_again = make(config, trainer)
    assert (again, trainer.runs) == (found, 2)
    assert "is there already" in said_again[0]
    assert said_again[1:] == said
    folder = trainer.configs[0].run_dir
    assert RangeTest.read(folder / "lr_range.json") == found
    width, height = struct.unpack(">II", (folder / "lr_range.png").read_bytes()[16:24])
    assert (width > 800, height > 400) == (True, True)
    with pytest.raises(ConfigError, match=r"other settings \(.*warmup_from: 0\.001 -> 0\.0001.*--fresh"):
        make(config, trainer, least=0.001)
    trainer.poll = after(1, Signal.STOP)
    make(own_config(fresh=True), trainer)
    assert trainer.runs == 3


def test_a_loss_that_is_no_number_ends_the_test_with_its_picture(own_config, monkeypatch):
    whole = loop.Trainer._agree

    def agree(self, nats, seconds):
        return whole(self, math.nan if self.state.step == 18 else nats, seconds)

    monkeypatch.setattr(loop.Trainer, "_agree", agree)
    trainer, config = Trainer(), own_config()
    for runs in (1, 1):  # nor is it trained again
        found, _ = make(config, trainer, least=0.1, most=100.0)
        assert trainer.runs == runs
        assert len(found.losses) == 19
        assert np.isfinite(found.losses).tolist() == [True] * 18 + [False]
        rate = 0.1 * 1000 ** (18 / 23)
        assert (found.multipliers[-1], found.found.diverges) == (pytest.approx(rate), pytest.approx(rate))
        assert found.found.high == found.multipliers[17]
        folder = trainer.configs[0].run_dir
        assert (folder / "lr_range.png").stat().st_size > 10_000
        contents = run_contents(folder)
        assert (contents.state, contents.sentence) == ("diverged", found.sentence)
    assert is_over(trainer.configs[0])


def test_a_test_that_finds_no_range_says_why_and_still_leaves_its_picture(own_config):
    trainer = Trainer()
    with pytest.raises(NoRange, match="may be chance"):
        make(own_config(), trainer, least=1e-9, most=1e-8)
    folder = trainer.configs[0].run_dir
    assert (folder / "lr_range.png").exists()
    assert "may be chance" in RangeTest.read(folder / "lr_range.json").refusal
    assert "suggests no range" in run_contents(folder).sentence


def test_the_lines_to_paste_are_a_search(own_config):
    test = RangeTest.of(GIVEN, *curve())
    pasted = tomllib.loads('[base]\npreset = "d4-cpu"\n' + "\n".join(test.space))
    spec = read_spec({"name": "rates"} | pasted)
    low, high = 0.02 * test.found.low, 0.02 * test.found.high
    assert spec.space["matrix_lr"].grid()[::3] == pytest.approx((low, high), rel=5e-3)
    everything = "\n".join(line.removeprefix("# ") for line in test.space if "=" in line or line == "[space]")
    spec = read_spec({"name": "rates", "base": {"preset": "d4-cpu"}} | tomllib.loads(everything))
    assert sorted(spec.space) == sorted(RATES)


def test_a_record_keeps_what_json_has_no_number_for(tmp_path):
    rates, losses = curve()
    test = RangeTest.of(GIVEN, rates[:151], [*losses[:150], math.nan])
    test.write(tmp_path / "lr_range.json")
    again = RangeTest.read(tmp_path / "lr_range.json")
    assert again.found == test.found
    assert again.found.diverges == rates[150]
    assert RangeTest.read(tmp_path / "absent.json") is None
