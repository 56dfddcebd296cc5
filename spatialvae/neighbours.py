r"""The distribution of z_cell given the counts of other cells: message passing from the neighbours.

Given the counts of other cells, the field predicts z_cell at the position of cell i as a mixture of components p with
weights w_ip, means m_ip and variances V_ip (``celltypes``). Here weights and means also depend on the individual
neighbours::

    p(z_cell_i | others) = sum_p f_ip N(z_cell_i; m_ip + s (a_p + A (g_p * c_i)), exp(e_p) V_ip)
    f_ip = softmax_p(log w_ip + u_p + (U c_i)_p)

s is the prior standard deviation of each dimension of z_cell.

The context c_i is the output of a graph network on the neighbours' z_cell, each estimated from that neighbour's counts
alone and divided by s. The network runs on star graphs: a node without features for cell i, a node for each of its
neighbours, and edges from the neighbours to cell i. The counts of a cell therefore cannot reach its own context,
whatever the number of layers. u, U, a, A and e are initialised with zeros, and the weights g_p of the columns of c_i
with ones.

Training maximises the mean of log p(x_i | others). The likelihood of each cell is represented by fixed weighted draws
z_is from a wide Gaussian r_i around the mode (``evidence.weighted_draws``)::

    log p(x_i | others) = log mean_s [ p(x_i | z_is) / r_i(z_is) p(z_is | others) ]

The sum over cells is a pseudolikelihood (Besag 1975). One section has few cells for this many parameters. Each step
therefore leaves out a random share of the neighbours and of the columns of c_i (``DROPPED``), the parameters are
averaged over the last steps, and those with the highest log p of the held-out cells are kept, or the initial ones if
the improvement is less than its standard error. Encoder, decoder and field are not changed. The field prediction of a
cell is computed with the counts of a tenth of the section left out, including those of the cell (``FOLDS``).
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.spatial import cKDTree
from torch import Tensor, nn
from torch.nn import functional as F

from spatialvae import celltypes
from spatialvae.celltypes import TYPES
from spatialvae.data import WIDE_NEIGHBOURS, graphs_of, minibatches
from spatialvae.errors import InputError
from spatialvae.evidence import drawn
from spatialvae.graph import without_own
from spatialvae.mixture import Mixture
from spatialvae.module import ROWS_AT_ONCE, Section, Sites, SpatialModule
from spatialvae.sampling import Places, joined_places
from spatialvae.training import MOST_HELD, Averaged, Plan, copied, divided, threads_for

CONVOLUTIONS = ("gatv2", "sage", "gin")
ENCODERS = ("field", *CONVOLUTIONS)
HIDDEN = 64  # size of the context
HEADS = 4
KERNELS = 8  # Gaussians of a distance; 16 differed by less than 0.02 nats on three sections
FARTHEST = 2.0  # centre of the last, in mean distances between neighbours; 99 % of the distances are below 2.4
FOLDS = 10  # each is predicted from the others
MOST_TYPED = 5_000  # largest number of training cells to which types are fitted
MOST_CELLS = 20_000  # the same for messages: several times the number of parameters
DRAWS = 16  # per cell; 8 and 32 differed by less than 0.1 nats on one section
DROPPED = 0.3  # 0 lost up to 0.25 nats of log p(x | others), 0.5 up to 0.15, on sections of 2,000 to 6,000 cells
LEARNING_RATE = 3e-3
AVERAGED = 100  # steps
CHECK, PATIENCE, MOST_STEPS = 50, 500, 5000  # steps


@dataclass(frozen=True, eq=False)
class Surroundings:
    """What other cells say about positions in the tissue.

    ``mean`` and ``variance`` (position, D): z_niche given the other cells. ``index`` int64 (position, slot): the
    neighbours as rows of ``values``, -1 in empty slots. ``distance`` float32 (position, slot): their distances in units
    of the mean distance between neighbours. ``sd`` (dim,): the prior standard deviation of z_cell. ``values`` (cell,
    dim): z_cell of each cell given its own counts, in units of ``sd``.
    """

    mean: Tensor
    variance: Tensor
    index: Tensor
    distance: Tensor
    sd: Tensor
    values: Tensor

    def of(self, rows: np.ndarray, device: torch.device) -> Surroundings:
        """The positions in ``rows``, on ``device``."""
        chosen = torch.from_numpy(rows)
        mean, variance = self.mean[chosen].to(device), self.variance[chosen].to(device)
        index, distance = self.index[chosen].to(device), self.distance[chosen].to(device)
        return Surroundings(mean, variance, index, distance, self.sd.to(device), self.values)

    def thinned(self, share: float) -> Surroundings:
        """Without a random ``share`` of the neighbours."""
        left = torch.rand(self.index.shape, device=self.index.device) >= share
        return replace(self, index=torch.where(left, self.index, -1))

    def slots(self) -> tuple[Tensor, Tensor, Tensor]:
        """``values`` of the neighbours (position, slot, dim), their distances, and whether slots are filled (position,
        slot)."""
        values = self.values[self.index.clamp(min=0).to(self.values.device)]
        return values.to(self.index.device), self.distance, self.index >= 0

    def stars(self) -> tuple[Tensor, Tensor, Tensor]:
        """Star graphs: x (node, dim), the positions first, with zeros; edge_index int64 (2, edge), from neighbours to
        positions; and edge_attr (edge, 1), distances."""
        place, slot = (self.index >= 0).nonzero(as_tuple=True)
        cells, node = self.index[place, slot].unique(return_inverse=True)
        values, n = self.values[cells.to(self.values.device)].to(self.index.device), len(self.index)
        x = torch.cat([values.new_zeros(n, values.shape[1]), values])
        return x, torch.stack([n + node, place]), self.distance[place, slot][:, None]


def kernels(distance: Tensor) -> Tensor:
    """Gaussian radial basis functions (edge, ``KERNELS``) of ``distance`` (edge, 1), centred from 0 to ``FARTHEST`` at
    intervals of one standard deviation: a layer that is linear in them can be any smooth function of distance."""
    centres = torch.linspace(0, FARTHEST, KERNELS, device=distance.device)
    return torch.exp(-0.5 * ((distance - centres) * ((KERNELS - 1) / FARTHEST)) ** 2)


class Convolution(nn.Module):
    """One layer of message passing: a nonlinear map of each node's z_cell, then a layer of torch_geometric, with the
    ``kernels`` of the distance as edge features."""

    def __init__(self, kind: str, dim: int) -> None:
        super().__init__()
        layers = _torch_geometric()
        self.kind = kind
        self.lift = nn.Sequential(nn.Linear(dim, HIDDEN), nn.ReLU())
        if kind == "gatv2":
            self.join = layers.GATv2Conv(HIDDEN, HIDDEN // HEADS, HEADS, edge_dim=KERNELS, add_self_loops=False)
        elif kind == "sage":
            self.join = layers.SAGEConv(HIDDEN, HIDDEN, root_weight=False)
        else:
            each = nn.Sequential(nn.Linear(HIDDEN, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN))
            self.join = layers.GINEConv(each, edge_dim=KERNELS)

    def forward(self, x: Tensor, edge_index: Tensor, edge_attr: Tensor) -> Tensor:
        x = self.lift(x)
        if self.kind == "sage":  # SAGEConv takes no edge attributes
            return F.relu(self.join(x, edge_index))
        return F.relu(self.join(x, edge_index, kernels(edge_attr)))

    def of_slots(self, values: Tensor, distance: Tensor, there: Tensor) -> Tensor:
        """What ``forward`` returns for the positions of star graphs, (B, column), but faster, since nothing is
        scattered. The neighbours' ``values`` (B, slot, dim), ``distance`` and ``there`` (B, slot), False where a slot
        is empty."""
        layer, each, own = self.join, self.lift(values), self.lift(values.new_zeros(values.shape[2]))
        there = there[..., None]
        if self.kind == "sage":
            mean = (each * there).sum(1) / there.sum(1).clamp(min=1)
            return F.relu(layer.lin_l(mean))
        edge = kernels(distance[..., None])
        if self.kind == "gin":
            message = F.relu(each + layer.lin(edge)) * there
            return F.relu(layer.nn((1 + layer.eps) * own + message.sum(1)))
        each = layer.lin_l(each)
        raw = F.leaky_relu(each + layer.lin_r(own) + layer.lin_edge(edge), layer.negative_slope)
        score = (raw.unflatten(2, (HEADS, -1)) * layer.att).sum(-1).masked_fill(~there, -torch.inf)
        weight = torch.softmax(score, 1).nan_to_num(0)  # of a position without neighbours
        heads = torch.einsum("bsh,bshc->bhc", weight, each.unflatten(2, (HEADS, -1)))
        return F.relu(heads.flatten(1) + layer.bias)


class NeighbourPrior(nn.Module):
    """p(z_cell | others) for z_cell of ``n_cell`` dimensions; ``encoder`` maps (x, edge_index, edge_attr) to contexts
    (node, column).

    Raises InputError if ``encoder`` does not return a matrix with one row per node.
    """

    def __init__(self, n_cell: int, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        width = _width(encoder, n_cell)
        self.weights = nn.Linear(width, 1 + TYPES)
        self.shift = nn.Linear(width, n_cell, bias=False)
        self.gains = nn.Parameter(torch.empty(1 + TYPES, width))
        self.moved, self.log_wider = (nn.Parameter(torch.empty(1 + TYPES, n_cell)) for _ in range(2))
        self.start()

    @torch.no_grad()
    def start(self) -> None:
        """Reset the parameters, so that the prior is that of the field alone."""
        for parameter in (*self.weights.parameters(), *self.shift.parameters(), self.moved, self.log_wider):
            parameter.zero_()
        self.gains.fill_(1)

    def forward(self, around: Surroundings, field: Mixture) -> Mixture:
        """The distribution of z_cell at the positions ``around``, given that of the field alone, ``field``."""
        if self.training:
            around = around.thinned(DROPPED)
        if isinstance(self.encoder, Convolution):
            context = self.encoder.of_slots(*around.slots())
        else:
            context = self.encoder(*around.stars())[: len(around.mean)]
        context = F.dropout(context, DROPPED, self.training)
        parts = slice(field.log_weight.shape[1])
        log_weight = torch.log_softmax(field.log_weight + self.weights(context)[:, parts], 1)
        shifts = self.shift.weight * self.gains[parts, None]  # (component, dim, column)
        moved = self.moved[parts] + F.linear(context, shifts.flatten(0, 1)).unflatten(1, shifts.shape[:2])
        mean, variance = field.mean + around.sd * moved, field.variance * self.log_wider[parts].exp()
        near = (around.index >= 0).any(1)[:, None]  # without neighbours, the field alone
        return Mixture(
            torch.where(near, log_weight, field.log_weight),
            torch.where(near[..., None], mean, field.mean),
            torch.where(near[..., None], variance, field.variance),
        )


def prior_for(niche_encoder: str | nn.Module, module: SpatialModule) -> NeighbourPrior | None:
    """The prior for the argument ``niche_encoder`` of ``SpatialVAE``; None for "field" and for a model without
    coordinates.

    Raises InputError if ``niche_encoder`` is neither one of ``ENCODERS`` nor a module.
    """
    if not isinstance(niche_encoder, nn.Module) and niche_encoder not in ENCODERS:
        wanted = f"one of {ENCODERS} or a torch.nn.Module with forward(x, edge_index, edge_attr)"
        raise InputError(f"niche_encoder is {niche_encoder!r}; expected {wanted}")
    shape = module.shape
    if niche_encoder == "field" or not shape.n_niche:
        return None
    if not isinstance(niche_encoder, nn.Module):
        niche_encoder = Convolution(niche_encoder, shape.n_cell)
    return NeighbourPrior(shape.n_cell, copy.deepcopy(niche_encoder).eval()).eval()


@torch.no_grad()
def surroundings(module: SpatialModule, places: Places, section: Section, known: Places) -> Surroundings:
    """What the cells of ``section`` with counts, at positions ``known``, say about ``places``. All ``places`` are nodes
    of the graph of the field."""
    n, m = len(places[1]), section.cells.n_cells
    space = module.space(graphs_of(*joined_places(places, known)))
    sites, asked = module.sites(section), torch.zeros(n, module.shape.n_cell)
    joined = Sites(torch.cat([asked, sites.target]), torch.cat([asked, sites.log_precision]))
    niche = module.solve(space, joined, known=np.arange(n + m) >= n)
    there = np.flatnonzero(section.cells.depth > 0)
    index, distance = nearest(places, known, there, np.full(n, -1))
    return Surroundings(niche.mean[:n], niche.variance[:n], index, distance, *own_values(module, sites))


def nearest(places: Places, cells: Places, there: np.ndarray, own: np.ndarray) -> tuple[Tensor, Tensor]:
    """The nearest of the cells ``there`` (rows of ``cells``) in the sample of each place, without its ``own`` cell
    (place,), a row or -1.

    Returns rows of ``cells``, int64 (place, slot), -1 in empty slots, nearest first; and distances, float32 (place,
    slot), in units of the mean distance between these cells and their nearest in the same sample.
    """
    index = np.full((len(own), WIDE_NEIGHBOURS), -1)
    distance = np.zeros(index.shape, np.float32)
    number = np.full(len(cells[1]) + 1, -1)  # of each cell among those of its sample
    rows_of = pd.Series(there).groupby(cells[1][there]).indices
    for sample, asked in pd.Series(own).groupby(places[1]).indices.items():
        if sample not in rows_of:
            continue
        rows = there[rows_of[sample]]
        number[rows] = np.arange(len(rows))
        tree = cKDTree(cells[0][rows])
        far, near = tree.query(places[0][asked], WIDE_NEIGHBOURS + 1, workers=-1)
        far, near = without_own(far, near, number[own[asked]])
        apart = tree.query(tree.data, WIDE_NEIGHBOURS + 1, workers=-1)[0][:, 1:]
        unit = max(float(apart[np.isfinite(apart)].mean()), 1e-12) if len(rows) > 1 else 1.0
        index[asked] = np.append(rows, -1)[near]
        distance[asked] = np.where(np.isfinite(far), far / unit, 0)
    return torch.from_numpy(index), torch.from_numpy(distance)


def own_values(module: SpatialModule, sites: Sites) -> tuple[Tensor, Tensor]:
    """Prior standard deviation (dim,) of z_cell, and in units of it the posterior mean (cell, dim) of z_cell of each
    cell given its own counts alone."""
    variance = module.cell_variance.cpu()
    sd = variance.sqrt()
    return sd, torch.sigmoid(sites.log_precision + variance.log()) * sites.target / sd


@dataclass(frozen=True, eq=False)
class _Observed:
    """Cells to which types and messages are fitted. ``mean`` and ``variance`` (cell, D): z_niche without the cell's own
    counts. ``row`` int64 (cell,): rows of ``z`` (row, draw, dim) and ``log_weight`` (row, draw), draws that represent
    the likelihood (``evidence.drawn``), -1 for cells without. All on the CPU; results are on ``device``."""

    mean: Tensor
    variance: Tensor
    row: np.ndarray
    z: Tensor
    log_weight: Tensor
    device: torch.device

    def niche(self, part: np.ndarray) -> celltypes.Gaussian:
        cells = torch.from_numpy(part)
        return self.mean[cells].to(self.device), self.variance[cells].to(self.device)

    def draws(self, part: np.ndarray) -> tuple[Tensor, Tensor]:
        rows = torch.from_numpy(self.row[part])
        return self.z[rows].to(self.device), self.log_weight[rows].to(self.device)


def fit(prior: NeighbourPrior | None, module: SpatialModule, section: Section, plan: Plan) -> None:
    """Fit the cell types of ``module``, then ``prior``, in place to the training cells of ``plan``, until log p(x |
    others) of the held-out cells stops improving."""
    rng, division = np.random.default_rng([plan.seed, 2]), divided(section, plan)
    module.drop_types()  # the draws are those of the model without types, also if there are types of an earlier fit
    sites, most = module.sites(section), MOST_TYPED if prior is None else MOST_CELLS
    mean, variance, rows = _hidden_in_turn(module, section, sites, division.known, rng.permutation(division.rows), most)
    judged = division.judged if len(division.judged) else rows[:MOST_HELD]
    observed = _observed(module, section, mean, variance, np.union1d(rows, judged), plan.seed)
    _fit_types(module, observed, rows[:MOST_TYPED], judged, plan.seed)
    if prior is not None and section.cells.coordinates is not None:
        places = section.cells.coordinates, section.cells.samples
        near = nearest(places, places, division.rows, np.arange(section.cells.n_cells))  # training cells send messages
        around = Surroundings(mean, variance, *near, *own_values(module, sites))
        _fit_messages(prior, module, around, observed, rows, judged, plan)


def _observed(
    module: SpatialModule, section: Section, mean: Tensor, variance: Tensor, used: np.ndarray, seed: int
) -> _Observed:
    """The cells ``used``, with draws under the field's prediction of their niche."""
    row, device = np.full(section.cells.n_cells, -1), module.mean.device
    row[used] = np.arange(len(used))

    def of_field(part: np.ndarray) -> Mixture:
        return module.cells_around(mean[torch.from_numpy(part)].to(device), variance[torch.from_numpy(part)].to(device))

    return _Observed(mean, variance, row, *drawn(module, section, used, DRAWS, seed, of_field), device)


def _fit_types(module: SpatialModule, observed: _Observed, rows: np.ndarray, judged: np.ndarray, seed: int) -> None:
    """Fit the types of ``module`` to ``rows``, given the predicted niche and, so that they also fit single cells, given
    its prior."""

    def cells(part: np.ndarray) -> celltypes.Observed:
        niches = (observed.niche(part), module.unknown_niche(1))
        return celltypes.Observed(*observed.draws(part), niches if module.shape.n_niche else niches[1:])

    module.set_types(celltypes.fit(cells(rows), cells(judged), module.log_residual.detach().exp(), seed))


def _fit_messages(
    prior: NeighbourPrior,
    module: SpatialModule,
    around: Surroundings,
    observed: _Observed,
    rows: np.ndarray,
    judged: np.ndarray,
    plan: Plan,
) -> None:
    """Fit ``prior`` to ``rows``, whose surroundings are those of ``around`` (cell, ...)."""
    types, own = module.types, module.log_residual.detach().exp()
    blocks = minibatches(np.flatnonzero(observed.row >= 0), ROWS_AT_ONCE)
    # computed once: it would be a tenth of each step
    log_frequency = torch.cat([types.log_frequency_around(observed.niche(part)) for part in blocks])

    def log_p(part: np.ndarray) -> Tensor:
        z, log_weight = observed.draws(part)
        frequency = log_frequency[torch.from_numpy(observed.row[part]).to(observed.device)]
        field = types.beside(celltypes.around_niche(observed.niche(part), own), frequency)
        density = prior(around.of(part, observed.device), field).log_density(z)
        return torch.logsumexp(log_weight + density, 1) - np.log(DRAWS)

    _maximise(log_p, prior, rows, judged, plan)


@threads_for(0)  # the matrices are small: a second thread saves a quarter, but on busy cores takes five times as long
def _maximise(
    log_p: Callable[[np.ndarray], Tensor],
    prior: NeighbourPrior,
    rows: np.ndarray,
    judged: np.ndarray,
    plan: Plan,
) -> None:
    """Maximise the mean of ``log_p`` of ``rows`` from the initial parameters, in ``plan.max_steps`` at most, and keep
    those that are best for ``judged``; the initial ones if the improvement is less than its standard error."""
    rng = np.random.default_rng([plan.seed, 3])

    @torch.no_grad()
    def score() -> Tensor:
        prior.eval()
        return log_p(judged)

    prior.start()
    parameters = Averaged(prior, LEARNING_RATE, plan.weight_decay / len(rows), AVERAGED)
    first = best = score()
    start = kept = copied(prior)
    since, most = 0, min(MOST_STEPS, plan.max_steps)
    while parameters.done < most and since < PATIENCE:
        prior.train()
        # larger minibatches would make each step slower, but not fewer
        for part in minibatches(rows, min(plan.batch_size, Plan.batch_size), rng):
            parameters.gradient.zero_()
            (-log_p(part).mean()).backward()
            parameters.step()
            if parameters.done % CHECK and parameters.done < most:
                continue
            with parameters.at_mean():
                now, since = score(), since + CHECK
                if now.mean() > best.mean():
                    best, kept, since = now, copied(prior), 0
            prior.train()
            if parameters.done == most or since >= PATIENCE:
                break
    gain = best - first
    prior.load_state_dict(kept if gain.mean() > gain.std(correction=0) / len(gain) ** 0.5 else start)
    prior.eval()


def _hidden_in_turn(
    module: SpatialModule, section: Section, sites: Sites, known: np.ndarray, rows: np.ndarray, most: int
) -> tuple[Tensor, Tensor, np.ndarray]:
    """Mean and variance (cell, D) of z_niche given the counts of cells that are ``known``, and the first ``most`` of
    ``rows`` (in random order), for which these are predicted without the cell's own counts, fold by fold."""
    niche = module.solve(section.space, sites, known)
    mean, variance, done = niche.mean.clone(), niche.variance.clone(), 0
    for part in np.array_split(rows, min(FOLDS, len(rows))):
        hidden = known.copy()
        hidden[part] = False
        found, chosen = module.solve(section.space, sites, hidden, niche.mean), torch.from_numpy(part)
        mean[chosen], variance[chosen] = found.mean[chosen], found.variance[chosen]
        done += len(part)
        if done >= most:
            break
    return mean, variance, rows[:most]


def _torch_geometric() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # raised by the import, about torch.jit.script
        import torch_geometric.nn
    return torch_geometric.nn


def _width(encoder: nn.Module, dim: int) -> int:
    """Number of columns that ``encoder`` returns."""
    device = next((parameter.device for parameter in encoder.parameters()), torch.device("cpu"))
    x, edge_index, edge_attr = torch.zeros(2, dim), torch.tensor([[1], [0]]), torch.ones(1, 1)
    with torch.no_grad():
        out = encoder(x.to(device), edge_index.to(device), edge_attr.to(device))
    if out.ndim != 2 or len(out) != 2:
        raise InputError(f"niche_encoder returned shape {tuple(out.shape)} for 2 nodes; expected one row per node")
    if out.dtype != torch.float32:
        raise InputError(f"niche_encoder returned {out.dtype}; expected torch.float32, as x is")
    return int(out.shape[1])
