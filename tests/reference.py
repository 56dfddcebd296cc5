"""Slow, obvious versions of what the packages compute fast."""

from __future__ import annotations

import numpy as np


# --- decoding ---------------------------------------------------------------------------------------------------


def decode_pixel(vector, words, min_magnitude, max_distance):
    """(word, distance, magnitude) of one normalised pixel vector: Euclidean distance between unit vectors."""
    vector = np.maximum(np.asarray(vector, float), 0)
    magnitude = np.linalg.norm(vector)
    if magnitude == 0 or magnitude < min_magnitude:
        return -1, np.inf, magnitude
    distances = [np.linalg.norm(vector / magnitude - word / np.linalg.norm(word)) for word in words]
    nearest = int(np.argmin(distances))
    if distances[nearest] > max_distance:
        return -1, np.inf, magnitude
    return nearest, distances[nearest], magnitude


def nearest_word(observed, words):
    """(word, Hamming distance, ambiguous) of one observed word; the first of the nearest."""
    distances = [int((np.asarray(observed) != word).sum()) for word in words]
    best = min(distances)
    return distances.index(best), best, distances.count(best) > 1


def components(word):
    """8-connected components of equal word in one plane (y, x): a list of sets of (y, x), in scan order."""
    height, width = word.shape
    seen, found = set(), []
    for start in np.ndindex(height, width):
        if word[start] < 0 or start in seen:
            continue
        component, stack = set(), [start]
        while stack:
            y, x = stack.pop()
            if (y, x) in component:
                continue
            component.add((y, x))
            stack += [
                (v, u)
                for v in range(max(y - 1, 0), min(y + 2, height))
                for u in range(max(x - 1, 0), min(x + 2, width))
                if word[v, u] == word[start]
            ]
        seen |= component
        found.append(component)
    return found


# --- simulation and cells ---------------------------------------------------------------------------------------


def spot(shape, y, x, flux, sigma):
    """(y, x) image of a Gaussian of total ``flux`` averaged over pixels, by its integral along both axes."""
    from scipy.stats import norm

    shares = [norm.cdf(np.arange(n) + 0.5, at, sigma) - norm.cdf(np.arange(n) - 0.5, at, sigma)
              for n, at in zip(shape, (y, x), strict=True)]  # fmt: skip
    return flux * np.outer(*shares)


def cell_of(x, y, polygons, cell_ids):
    """Smallest id of the polygons that hold or touch (x, y); -1 if there is none."""
    import shapely

    return min((i for i, polygon in zip(cell_ids, polygons, strict=True) if polygon.intersects(shapely.Point(x, y))),
               default=-1)  # fmt: skip
