"""Loops over pairs of calls."""

from __future__ import annotations

from merfish._jit import kernel


@kernel
def settle_pairs(i, j, taken_a, taken_b, settled):
    """Greedy matching: go through pairs i, j (pair,), best first, and accept each whose two ends are both still free.

    taken_a, taken_b: bool, one for each end, False at first; settled (pair,) bool is filled.
    """
    for k in range(len(i)):
        settled[k] = not (taken_a[i[k]] or taken_b[j[k]])
        if settled[k]:
            taken_a[i[k]] = True
            taken_b[j[k]] = True
