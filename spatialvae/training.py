"""The training loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch

from spatialvae.data import minibatches
from spatialvae.distributed import Team, team_of_processes
from spatialvae.module import Niche, Section, SpatialModule

AVERAGED = 300  # steps over which parameters are averaged
CHECK = 100  # steps between two evaluations of held-out cells
SMOOTHED = 3  # evaluations whose mean decides on stopping: a single one is too noisy
MOST_HELD = 2000  # held-out cells that are evaluated: the error of their mean is about 0.1 nats
LEAST_BATCHES = 8  # minibatches in an epoch, so that a small table has enough steps
CLIP = 100.0  # largest norm of a gradient
RESTARTS = 2  # of a run that diverged or collapsed, each with a third of the learning rate
SHARE = 50_000  # counts in a minibatch for each thread; with fewer, threads mainly wait for each other

Row = dict[str, float]
Report = Callable[[Row], None]


@dataclass(frozen=True)
class Plan:
    """How to train; durations are in steps, whatever the size of the table.

    The weight of the KL terms is raised from 0 to 1 over ``warm_up`` steps. Training stops after ``max_steps``, or
    after ``patience`` steps without better evidence of the ``held_out`` share of cells, and the best parameters are
    kept. The parameters that are evaluated and kept are running averages over the last steps. The fit of the neighbour
    prior, which follows, also has at most ``max_steps``. ``weight_decay`` is the precision of a Gaussian prior of all
    parameters; it counts once per table, not per cell, so that small tables are regularised most.
    """

    max_steps: int = 20_000
    batch_size: int = 256  # at most; small tables have smaller minibatches, see LEAST_BATCHES
    learning_rate: float = 5e-3
    weight_decay: float = 10.0
    warm_up: int = 400
    patience: int = 2000
    held_out: float = 0.1
    seed: int = 0

    def fitted_to(self, n_cells: int) -> Plan:
        """The same plan, with minibatches small enough that ``n_cells`` cells make at least ``LEAST_BATCHES``."""
        return replace(self, batch_size=int(np.clip(n_cells // LEAST_BATCHES, 1, self.batch_size)))


def train(module: SpatialModule, section: Section, plan: Plan, report: Report) -> list[Row]:
    """Fit ``module`` in place; return one row per ``CHECK`` steps, and call ``report`` with each.

    A run is restarted with a lower learning rate if its bound becomes non-finite or if it ends with no dimension of
    z_cell in use.

    Raises FloatingPointError if the bound becomes non-finite in the last restart.
    """
    start, division = copied(module), divided(section, plan)
    with threads_for(plan.batch_size * module.shape.n_genes), team_of_processes() as team:
        for restart in range(RESTARTS + 1):
            module.load_state_dict(start)
            gentler = replace(plan, learning_rate=plan.learning_rate / 3**restart, seed=plan.seed + restart)
            try:
                history = _train(module, section, division, gentler, report, team)
            except FloatingPointError:
                if restart == RESTARTS:
                    raise
                continue
            if history[-1].get("used_cell_dimensions") != 0:
                break
    return [row | {"restart": float(restart)} for row in history]


def copied(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The state of a module, which training does not change."""
    return {name: value.clone() for name, value in module.state_dict().items()}


@contextmanager
def threads_for(work: int) -> Iterator[None]:
    """Limit PyTorch's threads to the number that minibatches of ``work`` counts can use.

    On a shared machine, set fewer (``OMP_NUM_THREADS``): threads that wait for busy cores are slower than one thread.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(min(before, 1 + work // SHARE))
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True, eq=False)
class Division:
    """Which cells train. ``rows``: the training cells, those with counts that are not held out; ``judged``: at most
    ``MOST_HELD`` random held-out cells, which are evaluated; both int64, ascending. ``known`` bool (cell,), False for
    all held-out cells."""

    rows: np.ndarray
    judged: np.ndarray
    known: np.ndarray


def divided(section: Section, plan: Plan) -> Division:
    """Hold out the random cells of ``plan``, among those with counts."""
    order = np.random.default_rng(plan.seed).permutation(np.flatnonzero(section.cells.depth > 0))
    held, rows = np.split(order, [int(plan.held_out * len(order))])
    known = np.ones(section.cells.n_cells, bool)
    known[held] = False
    return Division(np.sort(rows), np.sort(held[:MOST_HELD]), known)


class Averaged:
    """The trainable parameters of a module, updated by Adam, and their running average over the last ``steps`` steps
    (Polyak & Juditsky 1992), which has less noise."""

    def __init__(self, module: torch.nn.Module, learning_rate: float, weight_decay: float, steps: int) -> None:
        self.now, self.gradient = flattened(module)
        self.mean, self.done, self.over = self.now.detach().clone(), 0, steps
        self.optimiser = torch.optim.Adam([self.now], learning_rate, weight_decay=weight_decay, fused=True)

    def step(self) -> None:
        """Update the parameters from ``gradient``."""
        self.optimiser.step()
        self.done += 1
        self.mean.lerp_(self.now.detach(), max(1 / self.done, 1 / self.over))

    @contextmanager
    def at_mean(self) -> Iterator[None]:
        """Set the parameters to their average."""
        last = self.now.detach().clone()
        self.now.data.copy_(self.mean)
        yield
        self.now.data.copy_(last)


class _Run:
    """The state that changes while a module is trained."""

    def __init__(self, module: SpatialModule, section: Section, division: Division, plan: Plan, team: Team) -> None:
        self.module, self.section, self.plan, self.team = module, section, plan, team
        self.rows, self.judged, self.known = division.rows, division.judged, division.known
        self.rng = np.random.default_rng([plan.seed, 1])
        self.generator = torch.Generator().manual_seed(plan.seed)
        decay = plan.weight_decay / max(len(self.rows), 1)
        self.parameters = Averaged(module, plan.learning_rate, decay, AVERAGED)
        team.agree(self.parameters.now)
        self.bound = torch.zeros((), device=self.parameters.now.device)
        self.niche = self.solved(None)

    @property
    def steps(self) -> int:
        return self.parameters.done

    def solved(self, before: Niche | None) -> Niche:
        """The posterior of the niches, given the training cells."""
        sites = self.module.sites(self.section)
        return self.module.solve(self.section.space, sites, self.known, None if before is None else before.mean)

    def step(self, rows: np.ndarray) -> None:
        """One step of the optimiser on ``rows``."""
        # every process draws the noise of the whole minibatch: results do not depend on the number of processes
        noise = self.module.noise(len(rows), self.generator)
        part = slice(self.team.rank, None, self.team.size)
        gradient = self.parameters.gradient.zero_()
        terms = self.module.terms(self.section, rows[part], self.niche, noise[part])
        bound = terms.elbo(min(1.0, (self.steps + 1) / max(self.plan.warm_up, 1)))
        (-bound.sum() / len(rows)).backward()
        self.team.add_up(gradient)
        norm = float(gradient.norm())
        if norm > CLIP:
            gradient.mul_(CLIP / norm)
        self.parameters.step()
        self.bound += bound.detach().sum() / len(rows)

    def look(self, steps: int) -> Row:
        """The row of the last ``steps``, with the averaged parameters evaluated on held-out cells."""
        self.team.add_up(self.bound)
        row = {
            "step": float(self.steps),
            "epoch": self.steps * self.plan.batch_size / max(len(self.rows), 1),
            "elbo_train": float(self.bound) / max(steps, 1),
        }
        self.bound.zero_()
        if len(self.judged):
            with self.parameters.at_mean():
                row |= evaluate(self.module, self.section, self.judged, self.niche, self.plan.seed)
        return row


def _train(
    module: SpatialModule, section: Section, division: Division, plan: Plan, report: Report, team: Team
) -> list[Row]:
    run = _Run(module, section, division, plan, team)
    history: list[Row] = []
    best, kept, since = -np.inf, run.parameters.mean.clone(), 0
    epoch = -(-len(run.rows) // plan.batch_size)
    wait = renewal = max(CHECK, epoch)  # steps until niches are updated; the interval doubles as the encoder converges
    looked = 0
    module.train()
    while run.steps < plan.max_steps and since < plan.patience:
        for rows in minibatches(run.rows, plan.batch_size, run.rng):
            run.step(rows)
            if run.steps == renewal:
                run.niche = run.solved(run.niche)
                wait, renewal = 2 * wait, renewal + 2 * wait
            if run.steps - looked < CHECK and run.steps < plan.max_steps:
                continue
            row, looked = run.look(run.steps - looked), run.steps
            history.append(row)
            report(row)
            module.train()
            if not np.isfinite(row["elbo_train"]):
                raise FloatingPointError(f"the bound is {row['elbo_train']} in step {run.steps}")
            scores = [r.get("evidence_validation", r["elbo_train"]) for r in history[-SMOOTHED:]]
            score, warm = float(np.mean(scores)), run.steps >= plan.warm_up
            since = since + CHECK if warm else 0
            if not warm or score > best:
                best, kept, since = (score if warm else -np.inf), run.parameters.mean.clone(), 0
            if run.steps >= plan.max_steps or since >= plan.patience:
                break
    run.parameters.now.data.copy_(kept)
    module.eval()
    return history


def flattened(module: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """Make all trainable parameters views of one tensor with one gradient, so that the optimiser updates a single
    tensor."""
    each = [parameter for parameter in module.parameters() if parameter.requires_grad]
    flat = torch.nn.utils.parameters_to_vector(each).detach().requires_grad_()
    gradient = flat.grad = torch.zeros_like(flat)
    start = 0
    for parameter in each:
        part = slice(start, start + parameter.numel())
        parameter.data = flat.data[part].view_as(parameter)
        parameter.grad = gradient[part].view_as(parameter)
        start += parameter.numel()
    return flat, gradient


@torch.no_grad()
def evaluate(module: SpatialModule, section: Section, rows: np.ndarray, niche: Niche, seed: int) -> Row:
    """Mean terms of the bound over ``rows``, in nats per cell, and the number of latent dimensions in use.

    ``niche`` is the posterior at the positions of ``rows`` given other cells, so that the evidence, log likelihood less
    divergence of z_cell, is a lower bound on log p(x_i | others). A dimension is in use if the variance of its
    posterior mean over cells exceeds a hundredth of its prior variance. The same noise is drawn each time, so that
    steps can be compared.
    """
    module.eval()
    generator = torch.Generator().manual_seed(seed)
    terms = module.terms(section, rows, niche, module.noise(len(rows), generator))
    likelihood, divergence = float(terms.log_likelihood.mean()), float(terms.kl_cell.mean())
    row = {
        "evidence_validation": likelihood - divergence,
        "log_likelihood_validation": likelihood,
        "kl_cell_validation": divergence,
    }
    if len(rows) > 1:  # one cell has no variance
        row["used_cell_dimensions"] = float((terms.cell_mean.var(0) > 0.01 * module.cell_variance).sum())
    return row
