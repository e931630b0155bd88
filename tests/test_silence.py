"""How long workers may be silent: by how often they were heard before."""

import pytest

from raychat.on_ray.silence import FACTOR, LEAST_S, START_S, Silence


class Clock:
    """Seconds, set by hand."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


def lasts(silence, clock):
    """For how many seconds more it is not too long."""
    at, left = clock.now, silence.limit_s - silence.seconds
    clock.now = at + left - 1
    before = silence.too_long
    clock.now = at + left + 1
    after = silence.too_long
    clock.now = at
    assert (before, after) == (False, True)
    return left


def test_the_first_report_may_take_longer_than_the_next_ones(clock):
    silence = Silence(clock)
    silence.heard(3)  # of what was done before
    assert lasts(silence, clock) == START_S
    clock.now = START_S - 1
    silence.heard(3)
    assert lasts(silence, clock) == 1
    silence.heard(4)
    assert lasts(silence, clock) == LEAST_S


def test_slow_passes_have_more_time_and_no_more_than_they_need(clock):
    silence = Silence(clock)
    for count, now in enumerate([0, 1000, 1100, 1400, 1450]):  # gaps of 100, 300 and 50 s after the first report
        clock.now = now
        silence.heard(count)
    assert lasts(silence, clock) == FACTOR * 300
    clock.now += 500
    silence.heard(4)  # an answer that reports nothing
    assert lasts(silence, clock) == FACTOR * 300 - 500
