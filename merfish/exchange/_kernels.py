"""Kernels that trace the outlines of label images."""

from __future__ import annotations

from merfish._jit import kernel


@kernel
def find_corners(rows, label, y, x):
    """Find the corners of regions of equal labels; returns their number, and stores as many as the outputs can hold.

    rows: (row, column) integers, 0 = outside. label, y, x: (corner,) outputs; corner y, x lies between the pixels y, x
    and y + 1, x + 1. A region that touches itself at a corner has two corners there.
    """
    n = 0
    for i in range(rows.shape[0] - 1):
        for j in range(rows.shape[1] - 1):
            a, b, c, d = rows[i, j], rows[i, j + 1], rows[i + 1, j], rows[i + 1, j + 1]
            if (a == b and c == d) or (a == c and b == d):
                continue  # inside a region, or on a straight edge
            for k in range(4):
                value = rows[i + k // 2, j + k % 2]
                if value == 0 or (k > 0 and value == a) or (k > 1 and value == b) or (k > 2 and value == c):
                    continue  # outside, or already processed
                pixels = int(a == value) + int(b == value) + int(c == value) + int(d == value)
                corners = 1
                if pixels == 2:
                    corners = 2 if (a == value) == (d == value) else 0  # diagonal pixels, or a straight edge
                for _ in range(corners):
                    if n < len(label):
                        label[n], y[n], x[n] = value, i, j
                    n += 1
    return n


@kernel
def follow(across, along, order, ring):
    """Follow the edges from corner to corner until every ring is closed; returns the number of rings.

    across, along: (corner,) corners at the other end of the horizontal and of the vertical edge of each corner. order:
    (corner,) output, corners in the order in which they are visited. ring: (corner,) output, number of the ring of each
    corner; must be -1 on input.
    """
    n = n_rings = 0
    for start in range(len(across)):
        corner = start
        if ring[corner] >= 0:
            continue
        while ring[corner] < 0:
            order[n], order[n + 1] = corner, across[corner]
            ring[corner] = ring[across[corner]] = n_rings
            corner = along[across[corner]]
            n += 2
        n_rings += 1
    return n_rings
