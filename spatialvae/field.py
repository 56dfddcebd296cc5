r"""Gaussian fields on the graph of cells: which directions of expression vary smoothly in space, and how smoothly.

Scores ``y`` (cell, direction) on the graph with Laplacian ``L`` are modelled, for each direction d, as

    y_d ~ N(0, V_d),   V_d = s_d (1 + r L)^-1  +  g_d (1 + a L)^-1  +  e_d I

the sum of a smooth field (the niche), a rough field (similarity of adjacent cells only) and a component that is
independent between cells. The smooth component penalises squared differences along edges (a conditional autoregression,
Besag 1974): of the graph forms of Matern fields (Lindgren, Rue & Lindstrom 2011) it blurs borders least. The range
``r`` is shared by all directions; the variances are specific to each. All are estimated by maximum likelihood: V_d is a
function of L, so the log determinant and the quadratic form are integrals against spectral measures. These are computed
exactly for small tables, and for large ones by Gauss quadrature from a few Lanczos steps (Ubaru, Chen & Saad 2017),
without any matrix of size (cell, cell).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
from scipy.linalg import eigh, eigh_tridiagonal

ROUGH_RANGE = 0.3  # a: correlation hardly extends beyond the nearest neighbours
RANGES = np.geomspace(1, 2000, 25)  # grid of r, in squared graph steps
EXACT = 1500  # largest number of cells for which all eigenvalues are computed (half a second)
LANCZOS_STEPS = 40
PROBES = 6  # smallest number of random vectors for traces
COLUMNS_AT_ONCE = 8  # vectors in one Lanczos run, which holds four arrays of their size
NODES = 128  # of a trace measure, after neighbouring nodes are merged
UPDATES = 150
TOLERANCE = 1e-4  # of conjugate gradients, relative to the right-hand side
MOST_ITERATIONS = 1000

Measure = tuple[np.ndarray, np.ndarray]  # nodes and weights, (..., node)


@dataclass(frozen=True, eq=False)
class Field:
    """A fitted field of the directions that vary in space.

    ``chosen`` int64 (direction,) are columns of the scores, in order of decreasing ``gain``. ``smooth``, ``rough`` and
    ``noise`` (direction,) are s, g and e of V; ``gain`` (direction,) is the increase of the log likelihood over a model
    without the smooth component, in nats. ``spread`` is the mean of diag (1 + r L)^-1 and ``rough_spread`` that of
    diag (1 + a L)^-1.
    """

    chosen: np.ndarray
    range: float
    smooth: np.ndarray
    rough: np.ndarray
    noise: np.ndarray
    gain: np.ndarray
    spread: float
    rough_spread: float


def laplacian_of(adjacency: sp.csr_array) -> sp.csr_array:
    """Combinatorial Laplacian, degree on the diagonal, of a symmetric ``adjacency`` (cell, cell)."""
    degree = np.asarray(adjacency.sum(1)).ravel()
    return sp.csr_array(sp.diags_array(degree) - adjacency)


def spatial_directions(scores: np.ndarray, neighbours: sp.csr_array | None) -> np.ndarray:
    """Directions (score, direction) in which ``scores`` (cell, score; centred) have unit variance and are uncorrelated.

    With ``neighbours`` (cell, cell), the adjacency matrix without self-loops, they are ordered by the correlation of a
    cell with the mean of its neighbours, highest first (maximum autocorrelation factors, Switzer & Green 1984;
    Wartenberg 1985); without it, by variance.
    """
    total = scores.T @ scores / len(scores)
    ridge = 1e-6 * np.trace(total) / len(total) * np.eye(len(total))
    if neighbours is None:
        shared = total @ total
    else:
        degree = np.maximum(np.asarray(neighbours.sum(1)).ravel(), 1)
        shared = scores.T @ ((neighbours @ scores) / degree[:, None]) / len(scores)
    directions = eigh((shared + shared.T) / 2, total + ridge)[1][:, ::-1]
    return directions * np.sign(directions[np.abs(directions).argmax(0), np.arange(directions.shape[1])])


def fit_field(y: np.ndarray, laplacian: sp.csr_array, max_directions: int) -> Field:
    """Fit a field to ``y`` (cell, direction; centred), whose directions are uncorrelated.

    A direction is kept if its smooth component increases the log likelihood by more than 1, the cost of a parameter
    (Akaike 1974); at least one and at most ``max_directions`` are kept.
    """
    n = len(y)
    power = (y**2).mean(0)
    measure = _spectral_measure(laplacian, y)
    trace = trace_measure(laplacian)
    chosen = np.arange(y.shape[1])
    for _ in range(2):  # the shared range is estimated from the directions found to be spatial
        r, variances, gain = _maximum_likelihood(power[chosen], (measure[0][chosen], measure[1][chosen]), trace, n)
        keep = np.flatnonzero(gain > 1)
        keep = keep if len(keep) else np.array([int(np.argmax(gain))])
        keep = keep[np.argsort(-gain[keep], kind="stable")][:max_directions]
        chosen, variances, gain = chosen[keep], variances[:, keep], gain[keep]
    nodes, weights = trace
    spread, rough_spread = (float(weights @ (1 / (1 + a * nodes))) for a in (r, ROUGH_RANGE))
    smooth, rough, noise = variances
    return Field(chosen, r, smooth, rough, noise, gain, spread, rough_spread)


def solve(
    laplacian: sp.csr_array, r: np.ndarray, weight: np.ndarray, target: np.ndarray, start: np.ndarray | None = None
) -> np.ndarray:
    """Solve (1 + r L) m + W m = target by conjugate gradients with a diagonal preconditioner.

    Parameters
    ----------
    r : float (dim,)
    weight : W, float (cell, dim), non-negative; or (cell, dim, dim), positive semidefinite matrices
    target : float (cell, dim)
    start : float (cell, dim), the initial guess; zero if None

    Returns
    -------
    m : float64 (cell, dim)
    """
    joined = weight.ndim == 3
    diagonal = 1 + np.outer(laplacian.diagonal(), r) + (np.einsum("idd->id", weight) if joined else weight)
    m = np.zeros(target.shape) if start is None else np.array(start, float)

    def times(v: np.ndarray) -> np.ndarray:
        own = np.einsum("ide,ie->id", weight, v) if joined else weight * v
        return v + own + r * (laplacian @ v)

    def product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        each = np.einsum("id,id->d", a, b)
        return each.sum(keepdims=True) if joined else each  # one system, or one for each dimension

    rest = target - times(m)
    along = step = rest / diagonal
    size = product(rest, step)
    enough = TOLERANCE**2 * np.maximum(product(target, target), 1e-300)
    for _ in range(MOST_ITERATIONS):
        if (product(rest, rest) <= enough).all():
            break
        image = times(along)
        length = size / np.maximum(product(along, image), 1e-300)
        m += length * along
        rest = rest - length * image
        step = rest / diagonal
        before, size = size, product(rest, step)
        along = step + size / np.maximum(before, 1e-300) * along
    return m


def draws(laplacian: sp.csr_array, r: np.ndarray, weight: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One draw of N(0, (1 + r L + W)^-1), float64 (cell, dim), r and W as in ``solve``.

    The precision matrix is B'B for a matrix B with a row for each edge and cell; B' times standard normal noise
    therefore has the precision matrix as covariance (Papandreou & Yuille 2010).
    """
    shape, upper = weight.shape[:2], sp.triu(-laplacian, 1, format="coo")
    columns = np.arange(upper.nnz)
    noise = rng.standard_normal((upper.nnz, shape[1])) * np.sqrt(np.outer(upper.data, r))
    ends = np.repeat([1.0, -1.0], upper.nnz), (np.r_[upper.row, upper.col], np.r_[columns, columns])
    target = sp.csr_array(ends, shape=(shape[0], upper.nnz)) @ noise
    excess = np.maximum(np.asarray(laplacian.sum(1)).reshape(-1, 1), 0)  # of cells without neighbours
    target += rng.standard_normal(shape) * np.sqrt(1 + r * excess)
    own = rng.standard_normal(shape)
    if weight.ndim == 2:
        target += np.sqrt(weight) * own
    else:
        values, vectors = np.linalg.eigh(weight)
        target += np.einsum("ide,ie->id", vectors, np.sqrt(np.maximum(values, 0)) * own)
    return solve(laplacian, r, weight, target)


def posterior_covariance(
    laplacian: sp.csr_array, r: np.ndarray, weight: np.ndarray, rng: np.random.Generator, samples: int
) -> np.ndarray:
    """Diagonal blocks of (1 + r L + W)^-1, float64 (cell, dim, dim), with r and W (cell, dim, dim) as in
    ``solve``.

    The covariance of a cell given its neighbours is exact; only the contribution of the neighbours is estimated, from
    ``samples`` draws (Siden, Lindgren, Bolin & Villani 2018).
    """
    diagonal = laplacian.diagonal()
    given = np.linalg.inv(weight + (1 + np.outer(diagonal, r))[..., None] * np.eye(weight.shape[1]))
    others = sp.csr_array(sp.diags_array(diagonal) - laplacian)
    added = np.zeros(weight.shape)
    for _ in range(samples):
        moved = np.einsum("ide,ie->id", given, r * (others @ draws(laplacian, r, weight, rng)))
        added += moved[:, :, None] * moved[:, None]
    return given + added / samples


def _spectral_measure(laplacian: sp.csr_array, vectors: np.ndarray) -> Measure:
    """Gauss quadrature of each column's spectral measure: nodes and weights (column, step), weights summing to 1."""
    laplacian = laplacian.astype(float)
    parts = [
        _lanczos(laplacian, vectors[:, first : first + COLUMNS_AT_ONCE])
        for first in range(0, vectors.shape[1], COLUMNS_AT_ONCE)
    ]
    return np.concatenate([nodes for nodes, _ in parts]), np.concatenate([weights for _, weights in parts])


def _lanczos(laplacian: sp.csr_array, vectors: np.ndarray) -> Measure:
    """Lanczos without reorthogonalisation: loss of orthogonality splits nodes, but does not change the integrals."""
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


def trace_measure(laplacian: sp.csr_array) -> Measure:
    """Nodes and weights, (node,) each, such that sum(weight * f(node)) is the trace of f(L) over the number of cells.

    The random vectors are always the same, so that the field of a table does not depend on the training seed.
    """
    n = laplacian.shape[0]
    if n <= EXACT:
        values = np.maximum(np.linalg.eigvalsh(laplacian.toarray().astype(float)), 0)
        return _merged(values, np.full(n, 1 / n))
    count = int(np.clip(400_000 // n, PROBES, 200))  # the error decreases with cells and with probes
    nodes, weights = _spectral_measure(laplacian, np.random.default_rng(0).choice([-1.0, 1.0], (n, count)))
    return _merged(nodes.ravel(), weights.ravel() / count)


def _merged(nodes: np.ndarray, weights: np.ndarray) -> Measure:
    """The measure with the nodes in each bin of log(1e-3 + node) replaced by their mean: 1 / (1 + r node) varies little
    within a bin."""
    place = np.log(1e-3 + nodes)
    low, high = place.min(), place.max()
    bins = np.minimum(((place - low) / max(high - low, 1e-12) * NODES).astype(int), NODES - 1)
    total = np.bincount(bins, weights, NODES)
    there = total > 0
    return np.bincount(bins, weights * nodes, NODES)[there] / total[there], total[there]


def _bases(eigenvalue: np.ndarray, ranges: np.ndarray) -> np.ndarray:
    """Spectra of the three components at unit variance: (range, component, *eigenvalue.shape)."""
    r = ranges.reshape(-1, *([1] * eigenvalue.ndim))
    smooth = 1 / (1 + r * eigenvalue)
    rough = np.broadcast_to(1 / (1 + ROUGH_RANGE * eigenvalue), smooth.shape)
    return np.stack([smooth, rough, np.ones_like(smooth)], 1)


def _maximum_likelihood(
    power: np.ndarray, measure: Measure, trace: Measure, n: int
) -> tuple[float, np.ndarray, np.ndarray]:
    """Range, variances (component, direction) and gain (direction,) in nats.

    Each variance is multiplied by the square root of a ratio of data to expectation, which never lowers the likelihood
    (MM algorithm, Zhou, Hu, Zhou & Lange 2019). All ranges of the grid are fitted at once.
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
