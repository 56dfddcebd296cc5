"""Kernel of `merfish.imaging.leaks`."""

from __future__ import annotations

import numpy as np

from merfish._jit import kernel, parallel_kernel, prange

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
    n = np.searchsorted(values, MOST)
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
        away = np.abs(values[:n] - centre)
        away = away[away < 3 * sigma]
        count = len(away)
        sigma = max(1.4826 * np.median(away), 1e-6)
    below = np.searchsorted(values, min(centre - 3 * sigma, 0.5 * centre)) if centre > 3 * sigma else 0
    if count < least or below > BELOW * count or centre + 2 * sigma > MOST:
        return np.nan, np.nan
    return centre, sigma / np.sqrt(count)


@parallel_kernel
def locate_pairs(seen, start, least, centre, error):
    """`locate_group` of the light in each bit relative to that in the bit of the peak, into (source, target) arrays.

    seen: (peak, bit), peaks of bit b in rows start[b] to below start[b + 1]. least: smallest share of a bit's peaks in
    a group.
    """
    n = seen.shape[1]
    for source in prange(n):
        a, b = start[source], start[source + 1]
        for target in range(n):
            centre[source, target] = error[source, target] = np.nan
            if target != source and b - a >= FEWEST:
                values = np.sort(seen[a:b, target] / seen[a:b, source])
                centre[source, target], error[source, target] = locate_group(values, max(FEWEST, least * (b - a)))
