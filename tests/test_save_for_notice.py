"""When the save for a machine that is about to go is asked for: late, and with time to spare."""

from raychat.on_ray.shift import SPARE_S, save_at_s


def test_save_is_asked_for_so_late_that_three_of_it_still_fit():
    assert save_at_s(1000.0, save_s=2.0, step_s=0.5) + 3 * 2.0 + 2 * 0.5 + SPARE_S == 1000.0


def test_longer_saves_and_longer_steps_are_asked_for_earlier():
    plain = save_at_s(1000.0, save_s=2.0, step_s=1.0)
    assert save_at_s(1000.0, save_s=5.0, step_s=1.0) < plain
    assert save_at_s(1000.0, save_s=2.0, step_s=30.0) < plain


def test_save_of_unknown_length_is_asked_for_at_once():
    assert save_at_s(1000.0, save_s=None, step_s=1.0) == 0.0
