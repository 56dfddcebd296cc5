r"""The linear, spatial part of the model: which directions of expression vary smoothly in space, and how smoothly.

Scores ``y`` (cell, direction) on the graph with Laplacian ``L`` are modelled, direction by direction, as

    y_d ~ N(0, V_d),   V_d = s_d (1 + r L)^-1  +  g_d (1 + a L)^-1  +  e_d I

a smooth field (the niche), a rough one (neighbours that resemble each other because they touch) and what belongs to
the cell alone. The smooth part penalises squared differences along edges (a conditional autoregression, Besag 1974):
of the graph forms of Matern fields (Lindgren, Rue & Lindstrom 2011) the one that blurs borders least. Range ``r`` is
shared by all directions, variances are each direction's own, and all are learnt by maximum likelihood: V_d is a
function of L, so the log determinant and the quadratic form are integrals against spectral measures, which a few
Lanczos steps give by Gauss quadrature (Ubaru, Chen & Saad 2017). Nothing of size (cell, cell) is made. The posterior
mean of the smooth part is a polynomial filter on the graph, so that a fitted field applies to a new section at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
from scipy.linalg import eigh, eigh_tridiagonal

ROUGH_RANGE = 0.3  # a: hardly beyond the nearest neighbours
RANGES = np.geomspace(1, 2000, 25)  # of r, in squared graph steps
LANCZOS_STEPS = 40
PROBES = 6  # random vectors for traces, at least
COLUMNS_AT_ONCE = 8  # of Lanczos' vectors, four of which are held for each column
UPDATES = 150
MAX_DEGREE_OF_FILTER = 400


@dataclass(frozen=True, eq=False)
class Field:
    """A fitted field. ``directions`` (score, direction) maps centred principal components to ``y``; the other
    arrays are (direction,). ``gain`` is the log likelihood, in nats, gained over a model without the smooth part;
    ``doubt`` the posterior variance of the smooth part at a cell, ``own`` the variance of what is not smooth there."""

    directions: np.ndarray
    range: float
    smooth: np.ndarray
    rough: np.ndarray
    noise: np.ndarray
    gain: np.ndarray
    doubt: np.ndarray
    own: np.ndarray

    @property
    def n_directions(self) -> int:
        return self.directions.shape[1]

    def smooth_part(self, laplacian: sp.csr_array, scores: np.ndarray) -> np.ndarray:
        """Posterior mean of the smooth part, (cell, direction) float32, of ``scores`` (cell, score)."""
        y = np.asarray(scores @ self.directions, np.float32)

        def response(eigenvalue: np.ndarray) -> np.ndarray:
            smooth, variance = self._spectrum(eigenvalue)
            return smooth / variance

        return graph_filter(laplacian, y, response)

    def niche(self, laplacian: sp.csr_array, neighbours: sp.csr_array, scores: np.ndarray) -> np.ndarray:
        """The niche of each cell as field and neighbourhood show it, (cell, direction) float32.

        The plain mean of ``y`` over a cell and its n ``neighbours`` estimates the niche with error variance
        own / (1 + n), the field with variance doubt; each is weighted by the inverse of its variance. Where a few
        cells tell much the mean prevails, whose borders are sharper; where they tell little, the field, which sees
        further.
        """
        y = np.asarray(scores @ self.directions, np.float32)
        members = 1 + np.asarray(neighbours.sum(1), np.float32).reshape(-1, 1)
        mean = (y + neighbours @ y) / members
        doubt, own = self.doubt.astype(np.float32), self.own.astype(np.float32)
        field = self.smooth_part(laplacian, scores)
        return field + doubt / (doubt + own / members) * (mean - field)

    def _spectrum(self, eigenvalue: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return _parts(eigenvalue, self.range, np.stack([self.smooth, self.rough, self.noise]))


def laplacian_of(adjacency: sp.csr_array) -> sp.csr_array:
    """Combinatorial Laplacian, degree on the diagonal, of a symmetric ``adjacency`` (cell, cell)."""
    degree = np.asarray(adjacency.sum(1)).ravel()
    return sp.csr_array(sp.diags_array(degree) - adjacency)


def fit_field(scores: np.ndarray, neighbours: sp.csr_array, laplacian: sp.csr_array, max_directions: int) -> Field:
    """Find the spatial directions of ``scores`` (cell, score; centred) and fit a field to them.

    ``neighbours`` (cell, cell) lists each cell's neighbourhood, without itself. Directions are those that make a cell
    most like the mean of its neighbours (Wartenberg 1985), in units in which the total variance is 1; a direction
    is kept if its smooth part gains more log likelihood than its parameter costs (Akaike 1974).
    """
    n = len(scores)
    directions = _autocorrelated(scores, neighbours)
    y = scores @ directions
    power = (y**2).mean(0)
    measure = _spectral_measure(laplacian, y)
    trace = _trace_measure(laplacian)
    chosen = np.arange(y.shape[1])
    for _ in range(2):  # the shared range is learnt from the directions that turn out to be spatial
        r, variances, gain = _maximum_likelihood(power[chosen], (measure[0][chosen], measure[1][chosen]), trace, n)
        keep = np.flatnonzero(gain > 1)
        keep = keep if len(keep) else np.array([int(np.argmax(gain))])
        keep = keep[np.argsort(-gain[keep], kind="stable")][:max_directions]
        chosen, variances, gain = chosen[keep], variances[:, keep], gain[keep]
    part, total = _parts(trace[0], r, variances)
    doubt = (trace[1] * (part - part**2 / total)).sum(1)
    own = (trace[1] * (total - part)).sum(1)
    smooth, rough, noise = variances
    return Field(directions[:, chosen], r, smooth, rough, noise, gain, doubt, own)


def spectral_means(laplacian: sp.csr_array, r: float) -> tuple[float, float]:
    """log det(1 + r L) and the trace of (1 + r L)^-1, each divided by the number of cells."""
    nodes, weights = _trace_measure(laplacian)
    return float((weights * np.log1p(r * nodes)).sum()), float((weights / (1 + r * nodes)).sum())


def graph_filter(laplacian: sp.csr_array, values: np.ndarray, response: object) -> np.ndarray:
    """Apply ``response(L)`` to ``values`` (cell, direction) by its Chebyshev series.

    ``response`` maps eigenvalues (m,) to (direction, m). The degree is the smallest that leaves coefficients below
    1e-4 of the largest.
    """
    top = 2.0 * float(laplacian.diagonal().max(initial=0.0)) + 1e-6  # Gershgorin
    points = MAX_DEGREE_OF_FILTER + 1
    angle = np.pi * (np.arange(points) + 0.5) / points
    at = response(top * (np.cos(angle) + 1) / 2)  # type: ignore[operator]
    series = 2 / points * at @ np.cos(np.outer(angle, np.arange(points)))
    series[:, 0] /= 2
    large = np.abs(series).max(0) > 1e-4 * np.abs(series).max()
    degree = max(int(np.flatnonzero(large).max()), 1)
    series = series.astype(np.float32)
    step = sp.csr_array(laplacian * np.float32(2 / top) - sp.eye_array(len(values), dtype=np.float32))
    before, now = values, step @ values
    out = series[:, 0] * before + series[:, 1] * now
    for order in range(2, degree + 1):
        before, now = now, 2 * (step @ now) - before
        out += series[:, order] * now
    return out


def _autocorrelated(scores: np.ndarray, neighbours: sp.csr_array) -> np.ndarray:
    """Directions (score, direction) with unit total variance, most autocorrelated first; positive ones only."""
    degree = np.maximum(np.asarray(neighbours.sum(1)).ravel(), 1)
    means = (neighbours @ scores) / degree[:, None]
    total = scores.T @ scores / len(scores)
    shared = scores.T @ means / len(scores)
    ridge = 1e-6 * np.trace(total) / len(total) * np.eye(len(total))
    correlation, directions = eigh((shared + shared.T) / 2, total + ridge)
    order = np.argsort(-correlation)
    order = order[: max(int((correlation > 0).sum()), 1)]
    directions = directions[:, order]
    return directions * np.sign(directions[np.abs(directions).argmax(0), np.arange(directions.shape[1])])


def _spectral_measure(laplacian: sp.csr_array, vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Gauss quadrature of each column's spectral measure: nodes and weights (column, step), weights summing to 1."""
    laplacian = laplacian.astype(float)
    parts = [
        _lanczos(laplacian, vectors[:, first : first + COLUMNS_AT_ONCE])
        for first in range(0, vectors.shape[1], COLUMNS_AT_ONCE)
    ]
    return np.concatenate([nodes for nodes, _ in parts]), np.concatenate([weights for _, weights in parts])


def _lanczos(laplacian: sp.csr_array, vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Plain three-term Lanczos: lost orthogonality only splits nodes, which does not change the integrals."""
    steps = min(LANCZOS_STEPS, len(vectors))
    columns = vectors.shape[1]
    diagonal, below = np.zeros((steps, columns)), np.zeros((steps, columns))
    before = np.zeros_like(vectors)
    now = vectors / np.maximum(np.linalg.norm(vectors, axis=0), 1e-300)
    for step in range(steps):
        after = laplacian @ now - (below[step - 1] * before if step else 0)
        diagonal[step] = (after * now).sum(0)
        after -= diagonal[step] * now
        below[step] = np.linalg.norm(after, axis=0)
        before, now = now, after / np.maximum(below[step], 1e-12)
        below[step][below[step] < 1e-10] = 0
    nodes, weights = np.zeros((columns, steps)), np.zeros((columns, steps))
    for column in range(columns):
        values, basis = eigh_tridiagonal(diagonal[:, column], below[:-1, column])
        nodes[column], weights[column] = np.maximum(values, 0), basis[0] ** 2
    return nodes, weights


def _trace_measure(laplacian: sp.csr_array) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights (node,): the sum of weight * f(node) is the trace of f(L) divided by the number of cells.

    The random vectors are always the same, so that a table has one field whatever the seed of the training.
    """
    n = laplacian.shape[0]
    count = int(np.clip(400_000 // n, PROBES, 200))  # the error falls with cells and with probes
    nodes, weights = _spectral_measure(laplacian, np.random.default_rng(0).choice([-1.0, 1.0], (n, count)))
    return nodes.ravel(), weights.ravel() / count


def _parts(eigenvalue: np.ndarray, r: float, variances: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Spectrum of the smooth part and of the whole, (direction, m), at ``eigenvalue`` (m,)."""
    parts = variances[:, :, None] * _bases(eigenvalue, np.array([r]))[0][:, None, :]
    return parts[0], parts.sum(0)


def _bases(eigenvalue: np.ndarray, ranges: np.ndarray) -> np.ndarray:
    """Spectra of the three parts at unit variance: (range, part, *eigenvalue.shape)."""
    r = ranges.reshape(-1, *([1] * eigenvalue.ndim))
    smooth = 1 / (1 + r * eigenvalue)
    rough = np.broadcast_to(1 / (1 + ROUGH_RANGE * eigenvalue), smooth.shape)
    return np.stack([smooth, rough, np.ones_like(smooth)], 1)


def _maximum_likelihood(
    power: np.ndarray, measure: tuple[np.ndarray, np.ndarray], trace: tuple[np.ndarray, np.ndarray], n: int
) -> tuple[float, np.ndarray, np.ndarray]:
    """Range, variances (part, direction) and gain (direction,) in nats.

    Each variance is updated by the square root of data over expectation, which never lowers the likelihood
    (Zhou, Hu, Zhou & Lange 2019); all ranges of the grid are fitted at once.
    """
    nodes, weights = measure
    data = np.moveaxis(_bases(nodes, RANGES), 1, 0)  # (part, range, direction, step)
    expected = np.moveaxis(_bases(trace[0], RANGES), 1, 0)[:, :, None]  # (part, range, 1, node)

    def fitted(variances: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        for _ in range(UPDATES):
            v_data = (variances[..., None] * data).sum(0)
            v_trace = (variances[..., None] * expected).sum(0)
            up = power * (weights * data / v_data**2).sum(-1)
            down = (trace[1] * expected / v_trace).sum(-1)
            variances = variances * np.sqrt(up / down)
        v_data = (variances[..., None] * data).sum(0)
        v_trace = (variances[..., None] * expected).sum(0)
        return variances, 0.5 * (power * (weights / v_data).sum(-1) + (trace[1] * np.log(v_trace)).sum(-1))

    at_first = np.stack([10 * power, 0.3 * power, 0.5 * power])[:, None, :] * np.ones((3, len(RANGES), 1))
    variances, cost = fitted(at_first)
    without = fitted(at_first * np.array([0.0, 1.0, 1.0])[:, None, None])[1]
    gain = n * (without - cost)
    best = int(np.argmax(gain.sum(1)))
    return float(RANGES[best]), np.maximum(variances[:, best], 1e-8), gain[best]
