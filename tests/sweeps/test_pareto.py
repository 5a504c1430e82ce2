"""Which points no other one beats."""

import math

from hypothesis import given
from hypothesis import strategies as st

from sweeps.pareto import pareto_front

POINTS = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=12)


def dominates(one: tuple[float, float], other: tuple[float, float]) -> bool:
    return one != other and one[0] <= other[0] and one[1] <= other[1]


@given(POINTS)
def test_the_front_is_what_nothing_dominates(points: list[tuple[float, float]]) -> None:
    front = pareto_front(points)
    expected = {i for i, point in enumerate(points) if not any(dominates(other, point) for other in points)}
    assert set(front) == expected
    assert len(front) == len(expected)
    assert [points[i] for i in front] == sorted(points[i] for i in front)


def test_what_is_no_number_is_in_no_front() -> None:
    assert pareto_front([(math.nan, 0), (1, 1), (0, math.inf), (-math.inf, 0)]) == [1]
    assert pareto_front([]) == []
