"""Products of parameters, of which `make test` has a part that holds every value of every axis."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import pytest


def diagonal(parts: int, *axes: Iterable) -> list:
    """The product of the axes for `parametrize`; one of `parts` of it in `make test`, evenly, and
    the rest marked `matrix`. Of three axes and more every pair of two values is in that one.

    Args:
        parts: at most the length of every axis.
    """
    lists = [[*axis] for axis in axes]
    assert all(len(values) >= parts for values in lists)
    found = []
    for places in itertools.product(*(range(len(values)) for values in lists)):
        values = [axis[place] for axis, place in zip(lists, places, strict=True)]
        marks = [pytest.mark.matrix] if sum(places) % parts else []
        found.append(pytest.param(*values, marks=marks))
    return found
