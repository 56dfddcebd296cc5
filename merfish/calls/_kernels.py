"""Kernels on pairs of calls."""

from __future__ import annotations

from merfish._jit import kernel


@kernel
def settle_pairs(i, j, taken_a, taken_b, settled):
    """Match greedily: accept each of the pairs i, j (pair,), best first, whose members are not taken yet.

    taken_a, taken_b: bool, one for each possible i and j, False on entry. out: settled (pair,) bool, accepted pairs.
    """
    for k in range(len(i)):
        settled[k] = not (taken_a[i[k]] or taken_b[j[k]])
        if settled[k]:
            taken_a[i[k]] = True
            taken_b[j[k]] = True
