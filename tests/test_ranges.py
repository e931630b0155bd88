"""Ranges: that bounds stay bounds, whatever is computed with them."""

import pytest

from raychat.planning.ranges import Range

A, B = Range(1, 2, 4), Range(3, 5, 6)


def test_sum_has_the_sums_of_the_bounds_in_any_order():
    assert A + B == B + A == Range(4, 7, 10)
    assert Range.total([A, B, A]) == A + B + A
    assert Range.total([]) == Range.exactly(0)


def test_scaling_is_multiplying_by_what_is_exactly_known():
    assert A.scaled(2.5) == A.times(Range.exactly(2.5))


def test_dividing_turns_the_bounds_round():
    assert A.under(8) == Range(2, 4, 8)
    assert A.under(8).under(8) == A


def test_around_a_value_it_lies_in_the_middle():
    assert Range.around(10, 0.3).as_list() == pytest.approx([7, 10, 13])
    assert Range.around(10, 0.3).includes(12.9)
    assert not Range.around(10, 0.3).includes(13.1)


def test_bounds_in_the_wrong_order_are_our_own_mistake():
    with pytest.raises(ValueError, match="low <= mid <= high"):
        Range(2, 1, 3)
