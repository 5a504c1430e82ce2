"""Which of several points no other one beats."""

from collections.abc import Sequence

from numpy import isfinite


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points [N] (x, y), of which less is better in both, that no other point dominates; by rising x.

    A point dominates another if it is no worse in either and better in one. Of equal points all are in the front;
    points that are not finite never are.
    """
    front: list[int] = []
    order = sorted((i for i, point in enumerate(points) if isfinite(point).all()), key=lambda i: points[i])
    for i in order:
        if not front or points[i][1] < points[front[-1]][1] or points[i] == points[front[-1]]:
            front.append(i)
    return front
