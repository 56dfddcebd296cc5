"""The training loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch

from spatialvae.data import along_curve, minibatches
from spatialvae.distributed import Team, team_of_processes
from spatialvae.module import Section, SpatialModule

PATCH = 64  # cells that lie together in a minibatch
AVERAGED = 3.0  # epochs whose parameters are averaged (Polyak & Juditsky 1992): noise of single steps cancels
CLIP = 100.0  # largest norm of a gradient
RESTARTS = 2  # of a run that diverged or collapsed, each with a third of the learning rate
SHARE = 50_000  # counts in a minibatch that a thread should have to itself, so as not to wait for the others


@dataclass(frozen=True)
class Plan:
    """How to train. ``warm_up`` epochs raise the weight of the KL terms from 0 to 1; training stops after ``patience``
    epochs without a better ELBO on the ``held_out`` share of cells, and the best parameters are kept. Those that are
    evaluated and kept are running averages of the last epochs' steps. ``weight_decay`` is the precision of a Gaussian
    prior of all parameters, which counts once for the table and not for each cell: few cells can support but little."""

    max_epochs: int = 100
    batch_size: int = 256
    learning_rate: float = 5e-3
    weight_decay: float = 10.0
    warm_up: int = 10
    patience: int = 10
    held_out: float = 0.1
    seed: int = 0


def train(
    module: SpatialModule, section: Section, plan: Plan, report: Callable[[int, dict[str, float]], None]
) -> list[dict[str, float]]:
    """Fit ``module`` in place; return one row an epoch, which ``report`` also sees as it comes.

    A run whose bound is no longer finite, or that ends with no dimension of z_cell in use, is begun again.

    Raises FloatingPointError if no run keeps a finite bound.
    """
    start = {name: value.clone() for name, value in module.state_dict().items()}
    with threads_for(plan.batch_size * module.shape.n_genes), team_of_processes() as team:
        for restart in range(RESTARTS + 1):
            module.load_state_dict(start)
            gentler = replace(plan, learning_rate=plan.learning_rate / 3**restart, seed=plan.seed + restart)
            try:
                history = _train(module, section, gentler, report, team)
            except FloatingPointError:
                if restart == RESTARTS:
                    raise
                continue
            if history[-1].get("used_cell_dimensions") != 0:
                break
    return [row | {"restart": float(restart)} for row in history]


@contextmanager
def threads_for(work: int) -> Iterator[None]:
    """As many of PyTorch's threads as minibatches of ``work`` counts keep busy.

    Whoever shares the machine sets fewer (``OMP_NUM_THREADS``): threads that wait for busy cores are slower than one.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(min(before, 1 + work // SHARE))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _train(
    module: SpatialModule, section: Section, plan: Plan, report: Callable[[int, dict[str, float]], None], team: Team
) -> list[dict[str, float]]:
    rng = np.random.default_rng(plan.seed)
    generator = torch.Generator().manual_seed(plan.seed)
    n = section.cells.n_cells
    held = np.zeros(n, bool)
    held[rng.permutation(n)[: int(plan.held_out * n)]] = True
    xyz = section.cells.coordinates
    order = along_curve(xyz, section.cells.samples) if xyz is not None else rng.permutation(n)
    patch = PATCH if xyz is not None else 1
    rows, held_rows = order[~held[order]], order[held[order]]
    parameters, gradient = flattened(module)
    team.agree(parameters)
    decay = plan.weight_decay / max(len(rows), 1)
    optimiser = torch.optim.Adam([parameters], plan.learning_rate, weight_decay=decay, fused=True)
    average, steps = parameters.detach().clone(), 0
    slowest = 1 / max(AVERAGED * len(rows) / plan.batch_size, 1.0)
    history: list[dict[str, float]] = []
    best, kept, waited = -np.inf, average, 0
    for epoch in range(plan.max_epochs):
        weight = min(1.0, (epoch + 1) / max(plan.warm_up, 1))
        module.train()
        total = torch.zeros((), device=gradient.device)
        for batch in minibatches(rows, plan.batch_size, patch, rng):
            # every process draws the noise of all, so that how many there are changes nothing
            noise = module.noise(len(batch), generator)
            part = slice(team.rank, None, team.size)
            gradient.zero_()
            terms = module.terms(section, batch[part], noise[part])
            bound = terms.elbo(weight)
            (-bound.sum() / len(batch)).backward()
            team.add_up(gradient)
            norm = float(gradient.norm())
            if norm > CLIP:
                gradient.mul_(CLIP / norm)
            optimiser.step()
            steps += 1
            average.lerp_(parameters.detach(), max(1 / steps, slowest))
            total += (bound if weight == 1.0 else terms.elbo()).detach().sum()
        team.add_up(total)
        row = {"epoch": float(epoch), "kl_weight": weight, "elbo_train": float(total) / max(len(rows), 1)}
        last = parameters.detach().clone()
        parameters.data.copy_(average)
        if len(held_rows):
            row |= evaluate(module, section, held_rows, plan.batch_size, plan.seed)
        history.append(row)
        report(epoch, row)
        if not np.isfinite(row["elbo_train"]):
            raise FloatingPointError(f"the bound is {row['elbo_train']} in epoch {epoch}")
        score = row.get("elbo_validation", row["elbo_train"])
        if score > best + 1e-4 * abs(best) if np.isfinite(best) else True:
            best, waited = score, 0
            kept = average.clone()
        else:
            waited += 1
        parameters.data.copy_(last)
        if waited >= plan.patience and weight == 1.0:
            break
    parameters.data.copy_(kept)
    module.eval()
    return history


def flattened(module: SpatialModule) -> tuple[torch.Tensor, torch.Tensor]:
    """All parameters as one tensor with one gradient, of which theirs are views: an optimiser has one step to do."""
    each = list(module.parameters())
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
def evaluate(module: SpatialModule, section: Section, rows: np.ndarray, batch_size: int, seed: int) -> dict[str, float]:
    """Mean terms over ``rows`` in nats a cell, and how many latent dimensions are in use.

    A dimension is in use if its posterior mean varies between cells by more than a hundredth of its prior's variance.
    The same noise is drawn each time, so that epochs can be compared.
    """
    module.eval()
    generator = torch.Generator().manual_seed(seed)
    sums = np.zeros(3)
    cell, niche = [], []
    for batch in minibatches(rows, batch_size, 1, None):
        terms = module.terms(section, batch, module.noise(len(batch), generator))
        sums += [float(t.sum()) for t in (terms.log_likelihood, terms.kl_cell, terms.kl_niche)]
        cell.append(terms.cell_mean)
        niche.append(terms.niche_mean)
    likelihood, kl_cell, kl_niche = (float(v) for v in sums / len(rows))
    spread = torch.cat(cell).var(0)
    used_cell = float((spread > 0.01 * module.log_residual.exp()).sum())
    used_niche = float((torch.cat(niche).var(0) > 0.01).sum()) if module.shape.n_niche else 0.0
    return {
        "elbo_validation": likelihood - kl_cell - kl_niche,
        "log_likelihood_validation": likelihood,
        "kl_cell_validation": kl_cell,
        "kl_niche_validation": kl_niche,
        "used_cell_dimensions": used_cell,
        "used_niche_dimensions": used_niche,
    }
