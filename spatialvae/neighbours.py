r"""What is expected of a cell before its own counts are looked at: message passing from its neighbours, and types.

The field tells the mean of z_cell at the place of cell i from the counts of other cells; but no mean says "half of the
cells here are interneurons". Here z_cell_i given the others is a mixture of what the field says and of K types, the
same in all sections, whose weights and means depend on the place::

    p(z_cell_i | others) = sum_k w_ik N(z_cell_i; m_ik, V_ik)
    m_i0 = field_i + A c_i,        V_i0 = variance of the field_i + S
    m_ik = t_k + A c_i,            V_ik = V_k
    w_i  = softmax(b + W (field_i, c_i))

The context c_i is what a graph network makes of the neighbours' z_cell, as their own counts tell it. It works on stars:
a node without features for the cell in question, nodes for its neighbours, and edges from those to it. No path leads
from the counts of a cell to its own context, however many layers the network has. A and W are zero at the start, and
types have no weight before the training.

What is maximised is the mean of log p(x_i | others) itself, with the likelihood of each cell held fixed as draws z_is
from a wide Gaussian r_i around the mode, with weights (``evidence.weighted_draws``)::

    log p(x_i | others) = log mean_s [ p(x_i | z_is) / r_i(z_is) p(z_is | others) ]

The sum over cells is a pseudolikelihood (Besag 1975): each cell is predicted from the others, and encoder, decoder and
field stay as the bound has made them. The field that a cell is predicted from is solved without a tenth of the section,
the cell among it (``FOLDS``).
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spatialvae.analysis import equal_rows_allowed
from spatialvae.data import graphs_of, minibatches
from spatialvae.errors import InputError
from spatialvae.evidence import proposal, weighted_draws
from spatialvae.graph import NeighbourGraph
from spatialvae.mixture import Mixture
from spatialvae.module import Section, Sites, SpatialModule
from spatialvae.posterior import blocks
from spatialvae.sampling import Places
from spatialvae.training import MOST_HELD, Plan, divided, threads_for

CONVOLUTIONS = ("gatv2", "sage", "gin")
ENCODERS = ("field", "mixture", *CONVOLUTIONS)
TYPES = 20  # more than a section has cost little: their weights fall
HIDDEN = 64  # columns of a context
HEADS = 4
FOLDS = 10  # parts of a table, each predicted from the others
MOST_CELLS = 20_000  # that are predicted: several times the number of parameters
DRAWS = 16  # of each cell; 8 and 32 came to the same within 0.1 nats on one section
LEAST_VARIANCE = 0.05  # of a type at the start, in units of z_cell, in which cells vary by about 1
NEVER = -30.0  # log odds of types before the training
LEARNING_RATE = 3e-3
CHECK, PATIENCE, MOST_STEPS = 50, 500, 5000  # steps


@dataclass(frozen=True, eq=False)
class Surroundings:
    """What is known of places from other cells.

    ``mean`` and ``variance`` (place, D) of z_niche; ``index`` int64 (place, slot), rows of ``values`` or -1, and
    ``distance`` (place, slot) in mean spacings of cells; ``values`` (cell, dim), what z_cell is by a cell's own counts.
    """

    mean: Tensor
    variance: Tensor
    index: Tensor
    distance: Tensor
    values: Tensor

    def of(self, rows: np.ndarray, device: torch.device) -> Surroundings:
        """Those of ``rows`` alone, on ``device``."""
        chosen = torch.from_numpy(rows)
        mean, variance = self.mean[chosen].to(device), self.variance[chosen].to(device)
        index, distance = self.index[chosen].to(device), self.distance[chosen].to(device)
        return Surroundings(mean, variance, index, distance, self.values)

    def stars(self) -> tuple[Tensor, Tensor, Tensor]:
        """x (node, dim), the places first and zero; edge_index (2, edge) from neighbours to places; and edge_attr
        (edge, 1), distances."""
        place, slot = (self.index >= 0).nonzero(as_tuple=True)
        cells, node = self.index[place, slot].unique(return_inverse=True)
        values, n = self.values[cells.to(self.values.device)].to(self.index.device), len(self.index)
        x = torch.cat([values.new_zeros(n, values.shape[1]), values])
        return x, torch.stack([n + node, place]), self.distance[place, slot][:, None]


class Convolution(nn.Module):
    """One layer of messages: what each neighbour is, made nonlinear, and joined by a layer of torch_geometric."""

    def __init__(self, kind: str, dim: int) -> None:
        super().__init__()
        layers = _torch_geometric()
        self.kind = kind
        self.lift = nn.Sequential(nn.Linear(dim, HIDDEN), nn.ReLU())
        if kind == "gatv2":
            self.join = layers.GATv2Conv(HIDDEN, HIDDEN // HEADS, HEADS, edge_dim=1, add_self_loops=False)
        elif kind == "sage":
            self.join = layers.SAGEConv(HIDDEN, HIDDEN, root_weight=False)
        else:
            each = nn.Sequential(nn.Linear(HIDDEN, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN))
            self.join = layers.GINEConv(each, edge_dim=1)

    def forward(self, x: Tensor, edge_index: Tensor, edge_attr: Tensor) -> Tensor:
        x = self.lift(x)
        if self.kind == "sage":  # knows no distances
            return F.relu(self.join(x, edge_index))
        return F.relu(self.join(x, edge_index, edge_attr))


class NeighbourPrior(nn.Module):
    """p(z_cell | others) of cells of ``n_cell`` and niches of ``n_niche`` dimensions; ``encoder`` (x, edge_index,
    edge_attr) -> context (node, column), or None for a mixture that depends on the field alone.

    Raises InputError if ``encoder`` does not return a matrix with a row for each node.
    """

    def __init__(self, n_cell: int, n_niche: int, encoder: nn.Module | None) -> None:
        super().__init__()
        self.encoder = encoder
        width = 0 if encoder is None else _width(encoder, n_cell)
        self.weights = nn.Linear(n_niche + width, 1 + TYPES)
        self.shift = nn.Linear(width, n_cell, bias=False) if width else None
        self.types = nn.Parameter(torch.zeros(TYPES, n_cell))
        self.log_variance = nn.Parameter(torch.zeros(TYPES, n_cell))
        with torch.no_grad():
            self.weights.weight.zero_()
            self.weights.bias.fill_(NEVER)[0] = 0
            if self.shift is not None:
                self.shift.weight.zero_()

    def forward(self, around: Surroundings, own: Tensor) -> Mixture:
        """Of the places ``around``; ``own`` (dim,) is S, the variance that a cell does not share with its niche."""
        field = of_field(around, own)
        n, seen, step = len(around.mean), around.mean, torch.zeros((), device=own.device)
        if self.encoder is not None and self.shift is not None:
            context = self.encoder(*around.stars())[:n]
            seen, step = torch.cat([seen, context], 1), self.shift(context)[:, None]
        mean = torch.cat([field.mean, self.types.expand(n, -1, -1)], 1) + step
        variance = torch.cat([field.variance, self.log_variance.exp().expand(n, -1, -1)], 1)
        return Mixture(torch.log_softmax(self.weights(seen), 1), mean, variance)

    @torch.no_grad()
    def start(self, cells: Tensor, uncertain: Tensor, seed: int) -> None:
        """Let types be clusters of ``cells`` (cell, dim), each of a variance that adds ``uncertain`` (cell, dim), with
        together as much weight as the field."""
        from sklearn.cluster import KMeans

        with equal_rows_allowed():
            found = KMeans(min(TYPES, len(cells)), n_init=1, random_state=seed).fit(cells.numpy())
        label = torch.from_numpy(found.labels_.astype(np.int64))
        sums, share = torch.zeros_like(self.types).cpu(), torch.bincount(label, minlength=TYPES) / len(cells)
        centre = sums.clone()
        centre[: len(found.cluster_centers_)] = torch.from_numpy(found.cluster_centers_)
        sums.index_add_(0, label, (cells - centre[label]) ** 2 + uncertain)
        variance = sums / (share * len(cells)).clamp(min=1)[:, None]
        self.types.copy_(centre)
        self.log_variance.copy_(variance.clamp(min=LEAST_VARIANCE).log())
        self.weights.bias[1:] = share.log().clamp(min=NEVER)


def prior_for(niche_encoder: str | nn.Module, module: SpatialModule) -> NeighbourPrior | None:
    """What ``SpatialVAE(niche_encoder=)`` asks for: None for the field alone, as of a table without positions.

    Raises InputError for what is neither one of ``ENCODERS`` nor a module.
    """
    if not isinstance(niche_encoder, nn.Module) and niche_encoder not in ENCODERS:
        wanted = f"one of {ENCODERS} or a torch.nn.Module with forward(x, edge_index, edge_attr)"
        raise InputError(f"niche_encoder is {niche_encoder!r}; expected {wanted}")
    shape = module.shape
    if niche_encoder == "field" or not shape.n_niche:
        return None
    encoder = niche_encoder if isinstance(niche_encoder, nn.Module) else None
    if niche_encoder in CONVOLUTIONS:
        encoder = Convolution(str(niche_encoder), shape.n_cell)
    return NeighbourPrior(shape.n_cell, shape.n_niche, encoder).eval()


def of_field(around: Surroundings, own: Tensor) -> Mixture:
    """What the field alone says of z_cell: one Gaussian; ``own`` (dim,) is S."""
    rest = len(own) - around.mean.shape[1]
    return Mixture.gaussian(F.pad(around.mean, (0, rest)), own + F.pad(around.variance, (0, rest)))


@torch.no_grad()
def surroundings(module: SpatialModule, places: Places, section: Section, known: Places) -> Surroundings:
    """Of ``places``, from the cells of ``section``, which sit at ``known``; without positions, nothing is known."""
    n, m = len(places[1]), section.cells.n_cells
    coordinates, samples = (np.concatenate(pair) for pair in zip(places, known, strict=True))
    graphs, sites = graphs_of(coordinates, samples), module.sites(section)
    asked = torch.zeros(n, module.shape.n_cell)
    joined = Sites(torch.cat([asked, sites.target]), torch.cat([asked, sites.log_precision]))
    niche = module.solve(module.space(graphs), joined, known=np.arange(n + m) >= n)
    index, distance = neighbours_among(graphs.wide, samples, np.arange(n + m) >= n)
    index = torch.where(index >= n, index - n, -1)[:n]
    return Surroundings(niche.mean[:n], niche.variance[:n], index, distance[:n], own_values(module, sites)[0])


def neighbours_among(graph: NeighbourGraph, samples: np.ndarray, known: np.ndarray) -> tuple[Tensor, Tensor]:
    """Index (cell, slot), -1 where a neighbour is not ``known`` (cell,), and distances in mean spacings of the cells
    of each of ``samples`` (cell,)."""
    code, there = np.unique(samples, return_inverse=True)[1], graph.index >= 0
    total = np.bincount(code, np.where(there, graph.distance, 0).sum(1))
    spacing = np.maximum(total / np.maximum(np.bincount(code, there.sum(1)), 1), 1e-12)
    index = np.where(there & known[graph.index], graph.index, -1).astype(np.int64)
    return torch.from_numpy(index), torch.from_numpy((graph.distance / spacing[code, None]).astype(np.float32))


def own_values(module: SpatialModule, sites: Sites) -> tuple[Tensor, Tensor]:
    """Posterior mean and variance (cell, dim) of z_cell of cells that know of no other."""
    variance = module.cell_variance.cpu()
    gain = torch.sigmoid(sites.log_precision + variance.log())
    return gain * sites.target, (1 - gain) * variance


@threads_for(0)  # matrices are small
def fit(prior: NeighbourPrior, module: SpatialModule, section: Section, plan: Plan, fresh: bool) -> None:
    """Fit ``prior`` in place to the cells that ``plan`` trains on, until those it holds out are explained no better;
    ``fresh``: from types that are found first."""
    rng, device, own = np.random.default_rng(plan.seed), module.mean.device, module.log_residual.detach().exp()
    held, rows = divided(section, plan, rng)
    sites = module.sites(section)
    values, uncertain = own_values(module, sites)
    around, rows = _hidden_in_turn(module, section, sites, held, rng.permutation(rows))
    held = held[:MOST_HELD]
    used = np.concatenate([rows, held])
    if fresh:
        prior.start(values[rows], uncertain[rows], plan.seed)
    drawn = _drawn(module, section, around, used, plan.seed)
    place = np.full(section.cells.n_cells, -1)
    place[used] = np.arange(len(used))

    def mean_log_p(part: np.ndarray) -> Tensor:
        z, log_weight = (value[torch.from_numpy(place[part])].to(device) for value in drawn)
        density = prior(around.of(part, device), own).log_density(z)
        return (torch.logsumexp(log_weight + density, 1) - np.log(DRAWS)).mean()

    optimiser = torch.optim.Adam(prior.parameters(), LEARNING_RATE, weight_decay=plan.weight_decay / len(rows))
    best, kept, steps, since = -np.inf, prior.state_dict(), 0, 0
    while steps < MOST_STEPS and since < PATIENCE:
        prior.train()
        for part in minibatches(rows, plan.batch_size, rng):
            optimiser.zero_grad()
            (-mean_log_p(part)).backward()
            optimiser.step()
            steps += 1
            if steps % CHECK:
                continue
            prior.eval()
            with torch.no_grad():
                score = float(mean_log_p(held if len(held) else rows[:MOST_HELD]))
            prior.train()
            since += CHECK
            if score > best:
                best, since = score, 0
                kept = {name: value.clone() for name, value in prior.state_dict().items()}
    prior.load_state_dict(kept)
    prior.eval()


def _hidden_in_turn(
    module: SpatialModule, section: Section, sites: Sites, held: np.ndarray, rows: np.ndarray
) -> tuple[Surroundings, np.ndarray]:
    """Surroundings of all cells of a section, and those of ``rows`` (in random order) that are valid for a prediction:
    part by part is hidden, until there are enough. Nothing is ever known of ``held``."""
    if section.graphs is None:
        raise InputError("a table without positions has no neighbours")
    known = np.ones(section.cells.n_cells, bool)
    known[held] = False
    index, distance = neighbours_among(section.graphs.wide, section.cells.samples, known & (section.cells.depth > 0))
    niche = module.solve(section.space, sites, known)
    mean, variance, done = niche.mean.clone(), niche.variance.clone(), 0
    for part in np.array_split(rows, min(FOLDS, len(rows))):
        hidden = known.copy()
        hidden[part] = False
        found, chosen = module.solve(section.space, sites, hidden, niche.mean), torch.from_numpy(part)
        mean[chosen], variance[chosen] = found.mean[chosen], found.variance[chosen]
        done += len(part)
        if done >= MOST_CELLS:
            break
    return Surroundings(mean, variance, index, distance, own_values(module, sites)[0]), rows[:done]


@torch.no_grad()
def _drawn(
    module: SpatialModule, section: Section, around: Surroundings, rows: np.ndarray, seed: int
) -> tuple[Tensor, Tensor]:
    """z (row, draw, dim) and log p(x | z) / r(z) (row, draw), r around the mode given the field."""
    generator, found = torch.Generator().manual_seed(seed), []
    for part in blocks(module, rows):
        expected = of_field(around.of(part, module.mean.device), module.log_residual.exp()).moments()
        likelihood, mode, precision = proposal(module, section, part, expected)
        pairs = weighted_draws(likelihood, mode, precision, DRAWS, generator)
        found.append([torch.stack(values, 1).cpu() for values in zip(*pairs, strict=True)])
    z, log_weight = (torch.cat(values) for values in zip(*found, strict=True))
    return z, log_weight


def _torch_geometric() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # on import, about torch.jit.script
        import torch_geometric.nn
    return torch_geometric.nn


def _width(encoder: nn.Module, dim: int) -> int:
    """Columns of what ``encoder`` returns."""
    device = next((parameter.device for parameter in encoder.parameters()), torch.device("cpu"))
    x, edge_index, edge_attr = torch.zeros(2, dim), torch.tensor([[1], [0]]), torch.ones(1, 1)
    with torch.no_grad():
        out = encoder(x.to(device), edge_index.to(device), edge_attr.to(device))
    if out.ndim != 2 or len(out) != 2:
        raise InputError(f"niche_encoder made {tuple(out.shape)} of 2 nodes; expected a matrix with a row for each")
    return int(out.shape[1])
