"""Simulated tissue: packed cells with nuclei, spatial domains, and their molecules. Lengths in micrometres."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
import shapely
from scipy.spatial import Voronoi

from merfish.cells.counts import assign_cells

N_DOMAINS = 3
N_TYPES = 6
CELL_SPACING = 10.0
CELL_GAP = 0.8  # between neighbouring cells
CORNER_RADIUS = 1.6
MISSING_CELLS = 0.05  # fraction of empty lattice sites
OUTSIDE_DENSITY = 0.1  # relative to the density in cells
MARKER_FOLD = 5.0  # expression of the markers of a type relative to other types
DOMAIN_FOLD = 2.2  # expression of the genes of a domain relative to other domains
LAYER_GAP = 1.0  # between cells above each other
NUCLEUS_HEIGHT = 0.5  # relative to the height of the cell, if there are several layers
CELL_SPREAD = 0.2  # sigma of the lognormal number of molecules per area


@dataclass(frozen=True, eq=False)
class Tissue:
    """Cells of a tissue.

    outlines, nuclei: (cell,) shapely polygons; domain, cell_type: (cell,) int64 from 0;
    profile: (cell, gene), fraction of each gene among the molecules of a cell; amount: (cell,), relative number of
    molecules per area, mean 1. layer: (cell,) int64 from 0, the lowest; cells of one layer do not overlap. n_layers:
    number of layers.
    """

    outlines: np.ndarray
    nuclei: np.ndarray
    domain: np.ndarray
    cell_type: np.ndarray
    profile: np.ndarray
    amount: np.ndarray
    layer: np.ndarray
    n_layers: int

    def span(self, thickness: float) -> tuple[np.ndarray, np.ndarray]:
        """Lowest and highest z (cell,) of each cell in a tissue from 0 to ``thickness``, micrometre."""
        height, gap = thickness / self.n_layers, min(LAYER_GAP / 2, thickness / 4)
        low = self.layer * height + np.where(self.layer > 0, gap, 0.0)
        return low, (self.layer + 1) * height - np.where(self.layer < self.n_layers - 1, gap, 0.0)


def make_tissue(
    bounds: tuple[float, float, float, float], n_genes: int, rng: np.random.Generator, layers: int = 1
) -> Tissue:
    """Fill ``bounds`` (x0, y0, x1, y1) with cells in domains; each domain has all types and an expression program.

    The domain of a cell is not its type: domains differ in the proportions of types, and the genes of a domain's
    program are more highly expressed in all of its cells. ``layers`` layers of cells lie above each other, each packed
    independently.
    """
    packed = [_pack_cells(bounds, rng) for _ in range(layers)]
    outlines = np.concatenate(packed)
    centers = np.column_stack([shapely.get_x(shapely.centroid(outlines)), shapely.get_y(shapely.centroid(outlines))])
    domain = _layers(centers, bounds, rng)
    shares = 0.5 * rng.dirichlet(np.full(N_TYPES, 0.8), N_DOMAINS) + 0.5 / N_TYPES
    chance = rng.random(len(outlines))
    cell_type = (chance[:, None] > np.cumsum(shares, axis=1)[domain]).sum(axis=1).clip(max=N_TYPES - 1)
    log_profile = (
        rng.normal(0.0, 1.0, n_genes)
        + _program(N_TYPES, n_genes, MARKER_FOLD, rng)[cell_type]
        + _program(N_DOMAINS, n_genes, DOMAIN_FOLD, rng)[domain]
        + rng.normal(0.0, 0.3, (len(outlines), n_genes))
    )
    profile = np.exp(log_profile)
    return Tissue(
        outlines=outlines,
        nuclei=_nuclei(outlines, rng),
        domain=domain,
        cell_type=cell_type,
        profile=profile / profile.sum(axis=1, keepdims=True),
        amount=np.exp(rng.normal(-(CELL_SPREAD**2) / 2, CELL_SPREAD, len(outlines))),
        layer=np.repeat(np.arange(layers), [len(cells) for cells in packed]),
        n_layers=layers,
    )


def _pack_cells(bounds: tuple[float, float, float, float], rng: np.random.Generator) -> np.ndarray:
    """Rounded Voronoi cells of a jittered hexagonal lattice that covers ``bounds`` and one cell beyond."""
    x0, y0, x1, y1 = bounds
    reach = 3.0 * CELL_SPACING
    rows = np.arange(y0 - reach, y1 + reach, CELL_SPACING * np.sqrt(3.0) / 2.0)
    columns = np.arange(x0 - reach, x1 + reach, CELL_SPACING)
    shift = np.where(np.arange(len(rows)) % 2, CELL_SPACING / 2.0, 0.0)
    lattice = np.stack(np.broadcast_arrays(columns[None, :] + shift[:, None], rows[:, None]), axis=-1).reshape(-1, 2)
    points = lattice + rng.normal(0.0, 0.14 * CELL_SPACING, lattice.shape)
    diagram = Voronoi(points)
    near = (points > [x0 - CELL_SPACING, y0 - CELL_SPACING]) & (points < [x1 + CELL_SPACING, y1 + CELL_SPACING])
    kept = np.flatnonzero(near.all(axis=1) & (rng.random(len(points)) >= MISSING_CELLS))
    regions = [diagram.regions[diagram.point_region[k]] for k in kept]
    outlines = shapely.polygons([shapely.linearrings(diagram.vertices[region]) for region in regions])
    outlines = shapely.buffer(outlines, -(CELL_GAP / 2.0 + CORNER_RADIUS), quad_segs=4)
    outlines = shapely.buffer(outlines, CORNER_RADIUS, quad_segs=4)
    whole = (shapely.get_type_id(outlines) == shapely.GeometryType.POLYGON) & (shapely.area(outlines) > 25.0)
    return outlines[whole]


def _nuclei(outlines: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draw an ellipse of 0.25 to 0.4 of the area of each cell, near its centre and clipped to its inside."""
    n = len(outlines)
    radius = np.sqrt(rng.uniform(0.25, 0.4, n) * shapely.area(outlines) / np.pi)
    ratio = np.sqrt(rng.uniform(0.7, 1.0, n))
    tilt = rng.uniform(0.0, np.pi, n)
    angle = np.linspace(0.0, 2.0 * np.pi, 32, endpoint=False)
    along, across = (radius / ratio)[:, None] * np.cos(angle), (radius * ratio)[:, None] * np.sin(angle)
    center = shapely.get_coordinates(shapely.centroid(outlines)) + rng.normal(0.0, 0.3, (n, 2))
    cos, sin = np.cos(tilt)[:, None], np.sin(tilt)[:, None]
    x = center[:, :1] + cos * along - sin * across
    y = center[:, 1:] + sin * along + cos * across
    ellipses = shapely.polygons(np.stack([x, y], axis=-1))
    return shapely.intersection(ellipses, shapely.buffer(outlines, -0.5, quad_segs=4))


def _layers(centers: np.ndarray, bounds: tuple[float, float, float, float], rng: np.random.Generator) -> np.ndarray:
    """Assign cells to three domains of equal size, by distance from a point beyond a corner, with wavy borders."""
    x0, y0, x1, y1 = bounds
    size = max(x1 - x0, y1 - y0)
    dx, dy = centers[:, 0] - (x0 - 0.3 * size), centers[:, 1] - (y0 - 0.6 * size)
    depth = np.hypot(dx, dy) + 0.08 * size * np.sin(6.0 * np.arctan2(dy, dx) + rng.uniform(0, 2 * np.pi))
    return np.searchsorted(np.quantile(depth, [1 / 3, 2 / 3]), depth)


def _program(n: int, n_genes: int, fold: float, rng: np.random.Generator) -> np.ndarray:
    """Log expression (program, gene): each of ``n`` programs increases its own genes by a factor of about ``fold``."""
    owner = rng.permutation(n_genes) % (n + n // 2)  # a third of the genes belong to no program
    raised = owner[None, :] == np.arange(n)[:, None]
    return np.where(raised, rng.normal(np.log(fold), 0.3, (n, n_genes)), 0.0)


def scatter_molecules(
    tissue: Tissue,
    bounds: tuple[float, float, float, float],
    density: float,
    thickness: float,
    rng: np.random.Generator,
) -> pd.DataFrame:
    """Draw molecules in and between the cells.

    density: molecules per square micrometre of cell, over all layers. thickness: of the tissue, micrometre; 0 = flat.
    Returns cell (row of the tissue, -1 = outside cells), gene (column of the profile), x, y and z (micrometre) of the
    molecules within ``bounds``.
    """
    number = rng.poisson(density * shapely.area(tissue.outlines) * tissue.amount / tissue.n_layers)
    cell = np.repeat(np.arange(len(number)), number)
    x, y = _points_inside(tissue.outlines, cell, rng)
    x0, y0, x1, y1 = bounds
    stray = rng.poisson(OUTSIDE_DENSITY * density * (x1 - x0) * (y1 - y0))
    stray_x, stray_y = rng.uniform(x0, x1, stray), rng.uniform(y0, y1, stray)
    between = assign_cells(stray_x, stray_y, tissue.outlines, np.arange(len(tissue.outlines))) < 0
    x, y = np.append(x, stray_x[between]), np.append(y, stray_y[between])
    cell = np.append(cell, np.full(between.sum(), -1))
    profile = np.vstack([tissue.profile, tissue.profile.mean(axis=0)])  # row -1: between cells
    chance = rng.random(len(cell))[:, None]
    gene = np.concatenate(
        [
            (chance[part] > np.cumsum(profile, axis=1)[cell[part]]).sum(axis=1)
            for part in np.array_split(np.arange(len(cell)), max(len(cell) // 100_000, 1))
        ]
    )
    table = pd.DataFrame({"cell": cell, "gene": gene.clip(max=profile.shape[1] - 1), "x": x, "y": y})
    low, high = (np.append(end, outer) for end, outer in zip(tissue.span(thickness), (0.0, thickness), strict=True))
    table["z"] = rng.uniform(low[cell], high[cell]) if thickness else 0.0
    return table[(x >= x0) & (x < x1) & (y >= y0) & (y < y1)].reset_index(drop=True)


def _points_inside(outlines: np.ndarray, cell: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draw a uniform point within the outline of each entry of ``cell``, by rejection sampling."""
    low_x, low_y, high_x, high_y = shapely.bounds(outlines).T
    shapely.prepare(outlines)
    x, y = np.empty(len(cell)), np.empty(len(cell))
    left = np.arange(len(cell))
    while len(left):
        row = cell[left]
        x[left], y[left] = rng.uniform(low_x[row], high_x[row]), rng.uniform(low_y[row], high_y[row])
        left = left[~shapely.contains_xy(outlines[row], x[left], y[left])]
    return x, y
