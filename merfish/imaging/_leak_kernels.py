"""Kernel of `merfish.imaging.leaks`."""

from __future__ import annotations

import numpy as np

from merfish._jit import kernel

MOST = 0.6  # largest share; bits that are on together show more, lognormal about 1
WINDOW = 0.2  # share of the values in the narrowest interval; the group must hold more
FEWEST = 20  # values in the group
CUT = 4.0  # sigmas from the centre at which a value has no weight
STEPS = 6
BELOW = 0.25  # values below the group relative to those in it; leaked light is never missing


@kernel
def locate_group(values, least):
    """Centre of the narrowest group of sorted values (n,), and its standard error; NaN if it has below ``least``.

    Starts at the median of the shortest interval with `WINDOW` of the values below `MOST`. The centre is then the mean
    with biweights (Tukey) that vanish `CUT` sigmas away; sigma is measured on the values within 3 sigmas. NaN too for a
    group that is no leak: one with many values below it, or cut off by `MOST`.
    """
    n = count_below(values, MOST)
    inside = max(int(WINDOW * n), FEWEST // 2)
    if n < 2 * inside:
        return np.nan, np.nan
    first, width = 0, np.inf
    for k in range(n - inside + 1):
        if values[k + inside - 1] - values[k] < width:
            first, width = k, values[k + inside - 1] - values[k]
    centre = values[first + inside // 2]
    # an interval with a fifth of a Gaussian is half a sigma wide; the group may be a part of the values
    sigma = max(2 * width, 1e-6)
    count = 0
    for _ in range(STEPS):
        weights = total = 0.0
        for k in range(n):
            u = (values[k] - centre) / (CUT * sigma)
            if abs(u) < 1:
                weight = (1 - u * u) ** 2
                weights += weight
                total += weight * values[k]
        centre = total / weights
        count, distance = median_distance(values[:n], centre, 3 * sigma)
        sigma = max(1.4826 * distance, 1e-6)
    below = count_below(values, min(centre - 3 * sigma, 0.5 * centre)) if centre > 3 * sigma else 0
    if count < least or below > BELOW * count or centre + 2 * sigma > MOST:
        return np.nan, np.nan
    return centre, sigma / np.sqrt(count)


@kernel
def count_below(values, limit):
    """Number of sorted values (n,) below a limit."""
    n = 0
    while n < len(values) and values[n] < limit:
        n += 1
    return n


@kernel
def median_distance(values, centre, limit):
    """Number of sorted values (n,) closer than ``limit`` to the centre, and the median of their distances; NaN if none.

    np.median takes seconds to compile.
    """
    left = count_below(values, centre) - 1
    right = left + 1
    low, high = left, right
    while low >= 0 and centre - values[low] < limit:
        low -= 1
    while high < len(values) and values[high] - centre < limit:
        high += 1
    count = high - low - 1
    if count == 0:
        return 0, np.nan
    nearest = previous = 0.0
    for _ in range(count // 2 + 1):
        previous = nearest
        if right == high or (left > low and centre - values[left] < values[right] - centre):
            nearest = centre - values[left]
            left -= 1
        else:
            nearest = values[right] - centre
            right += 1
    return count, nearest if count % 2 else (previous + nearest) / 2


@kernel
def locate_groups(values, least, centre, error):
    """`locate_group` of each row of sorted values (row, n), into centre and error (row,)."""
    for row in range(len(values)):
        centre[row], error[row] = locate_group(values[row], least)
