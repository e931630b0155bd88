"""The schedules at their corners."""

import pytest

from raychat.optim.schedule import lr_multiplier, muon_momentum, weight_decay_at


def test_lr_rises_stays_and_falls():
    lrm = [lr_multiplier(s, 100, 10, 0.4, 0.05) for s in range(101)]
    assert lrm[:10] == pytest.approx([(s + 1) / 10 for s in range(10)])
    assert lrm[10:61] == [1.0] * 51
    assert lrm[60:] == pytest.approx([1 - 0.95 * k / 40 for k in range(41)])
    assert lrm[100] == pytest.approx(0.05)


def test_an_exponential_warmup_rises_by_the_same_factor_at_each_step_to_exactly_one():
    lrm = [lr_multiplier(s, 200, 150, 0.0, 1.0, 0.001) for s in range(200)]
    assert lrm[0] == pytest.approx(0.001)
    factors = [b / a for a, b in zip(lrm[:149], lrm[1:150], strict=True)]
    assert factors == pytest.approx([1000 ** (1 / 149)] * 149)
    assert lrm[149:] == [1.0] * 51


@pytest.mark.parametrize("start", [0.0, 0.001])
def test_a_warmup_of_one_step_or_none_has_the_full_rate(start):
    assert [lr_multiplier(s, 4, steps, 0.0, 1.0, start) for steps in (0, 1) for s in range(4)] == [1.0] * 8


def test_without_warmup_and_warmdown_lr_is_constant():
    assert {lr_multiplier(s, 20, 0, 0.0, 0.0) for s in range(20)} == {1.0}


def test_warmup_counts_even_inside_the_warmdown():
    assert lr_multiplier(5, 10, 8, 1.0, 0.0) == 6 / 8
    assert lr_multiplier(8, 10, 8, 1.0, 0.0) == pytest.approx(0.2)


def test_momentum_ramps_over_400_steps_and_falls_in_the_warmdown():
    momentum = [muon_momentum(s, 2000, 0.5) for s in range(2001)]
    assert momentum[0] == 0.85
    assert momentum[200] == pytest.approx(0.91)
    assert set(momentum[400:1001]) == {0.97}
    assert momentum[1500] == pytest.approx(0.935)
    assert momentum[2000] == pytest.approx(0.90)


def test_momentum_jumps_from_the_ramp_into_a_warmdown_that_began_before():
    assert muon_momentum(399, 500, 0.8) == pytest.approx(0.85 + 0.12 * 399 / 400)
    assert muon_momentum(400, 500, 0.8) == pytest.approx(0.97 - 0.07 * 300 / 400)


def test_momentum_without_final_stays_at_its_peak():
    """The February recipe: 0.85 to 0.95 over 300 steps."""
    settings = {"start": 0.85, "peak": 0.95, "ramp_steps": 300, "final": None}
    assert muon_momentum(150, 1000, 0.5, **settings) == pytest.approx(0.90)
    assert muon_momentum(999, 1000, 0.5, **settings) == 0.95
    assert muon_momentum(999, 1000, 0.0) == 0.97


def test_weight_decay_is_half_a_cosine():
    assert weight_decay_at(0, 100, 0.28) == 0.28
    assert weight_decay_at(50, 100, 0.28) == pytest.approx(0.14)
    assert weight_decay_at(100, 100, 0.28) == pytest.approx(0.0)
    assert weight_decay_at(25, 100, 1.0) + weight_decay_at(75, 100, 1.0) == pytest.approx(1.0)
