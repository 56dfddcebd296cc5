r"""Evidence: log p(x) of cells, with its Monte Carlo error, and what it says of models that were fitted to others.

z_niche_i ~ N(c_i, diag M_i), given or, with neighbours unknown, its marginal prior c = 0, M = v spread. With z_niche
integrated out z_cell_i ~ N(c_i, M_i + S). It is drawn from r, Laplace's approximation of its posterior made wider:

    log p(x) = log E_r [ w ],   w = p(x | z_cell) p(z_cell) / r(z_cell)

The error of the logarithm of a mean is the standard error of the mean over the mean (delta method).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from itertools import product
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from spatialvae.encoder import combined
from spatialvae.errors import InputError
from spatialvae.module import Section, SpatialModule
from spatialvae.posterior import blocks, climbed, expanded

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.figure import Figure

PROPOSAL_WIDTH = 1.2  # sd of importance samples in units of the approximation's, whose tails are too thin
LEAST_HELD = 10  # cells

Gaussian = tuple[Tensor, Tensor]  # mean and variance, (cell, dim) each


def log_mean_weight(
    log_likelihood: Callable[[Tensor], Tensor],
    prior: Gaussian,
    mode: Tensor,
    precision: Tensor,
    samples: int,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """log E_r [ p(x | z) N(z; prior) / r(z) ] and its Monte Carlo error, (B,) each, in nats.

    r = N(mode, PROPOSAL_WIDTH^2 precision^-1); ``mode`` (B, dim), ``precision`` (B, dim, dim).
    """
    centre, variance = prior
    root = torch.linalg.cholesky(precision) / PROPOSAL_WIDTH
    log_det, found = root.diagonal(dim1=1, dim2=2).log().sum(-1), []
    for _ in range(samples):
        noise = torch.randn(mode.shape, generator=generator).to(mode.device)
        z = mode + torch.linalg.solve_triangular(root.mT, noise[..., None], upper=True)[..., 0]
        log_r = log_det - 0.5 * (noise**2).sum(-1)
        log_p = -0.5 * ((z - centre) ** 2 / variance + variance.log()).sum(-1)
        found.append(log_likelihood(z) + log_p - log_r)
    weights = torch.stack(found).double()
    value = torch.logsumexp(weights, 0) - math.log(samples)
    relative = (weights - value).exp()
    error = relative.std(0) / math.sqrt(samples) if samples > 1 else torch.full_like(value, math.nan)
    return value, error


@torch.no_grad()
def log_evidence(
    module: SpatialModule,
    section: Section,
    rows: np.ndarray,
    samples: int,
    seed: int = 0,
    niche: Gaussian | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """log p(x_i) and its Monte Carlo error of ``rows``, float64 (row,) each, in nats.

    ``niche``: mean and variance of z_niche, (cell, D) each, of all cells of the section.
    """
    generator, device = torch.Generator().manual_seed(seed), module.mean.device
    parts = []
    for part in blocks(module, rows):
        index, x = torch.from_numpy(part), module.counts(section, part)
        if niche is None:
            unknown = module.niche_variance.expand(len(part), -1)
            prior = module.prior_of_cells(torch.zeros_like(unknown), unknown)
        else:
            prior = module.prior_of_cells(niche[0][index].to(device), niche[1][index].to(device))
        start = combined(*module.encoded(section, part, x), *prior)[0]
        mode = climbed(module, section, part, start, *prior)
        precision = expanded(module, section, part, mode)[0] + torch.diag_embed(prior[1].reciprocal())

        def likelihood(z: Tensor, part: np.ndarray = part, x: Tensor = x) -> Tensor:
            return module.log_likelihood(section, part, x, z)

        parts.append(torch.stack(log_mean_weight(likelihood, prior, mode, precision, samples, generator)).cpu().numpy())
    value, error = np.concatenate(parts, 1)
    return value, error


def mean_with_error(value: np.ndarray, error: np.ndarray) -> tuple[float, float]:
    """Mean over cells, and the error that it has from independent ``error`` (cell,)."""
    return float(value.mean()), float(np.sqrt((error**2).sum()) / len(error))


def compare(
    adata: AnnData,
    likelihoods: Iterable[str],
    latents: Iterable[int],
    *,
    held_out: float = 0.1,
    samples: int = 300,
    max_epochs: int | None = None,
    seed: int = 0,
    report: Callable[[str], object] = lambda text: None,
) -> pd.DataFrame:
    """Held-out evidence of models of a table, with and without neighbours, the best first.

    Each model is trained on the same cells. ``log_p`` is its mean log p(x) of the others in nats a cell, given the
    training cells where it knows ``neighbours``; ``monte_carlo_error`` that of its estimate. ``difference`` is from the
    best model, cell by cell, and ``difference_error`` its standard error, as other cells could have been held out: a
    model is worse than the best where the difference is several times its error.

    Parameters
    ----------
    adata : prepared by ``SpatialVAE.setup_anndata``
    likelihoods : of "nb", "zinb", "poisson"
    latents : each an ``n_latent``
    held_out : share of cells
    report : is told which model is trained

    Raises
    ------
    InputError : if fewer than 10 cells are held out, or would be left to train on
    """
    from spatialvae.model import SpatialVAE
    from spatialvae.setup import Setup

    setup, n = Setup.read(adata), adata.n_obs
    n_held = round(held_out * n)
    if not LEAST_HELD <= n_held <= n - LEAST_HELD:
        raise InputError(
            f"held_out is {held_out}: {n_held} of {n} cells; expected {LEAST_HELD} at least, and as many to train on"
        )
    order = np.random.default_rng(seed).permutation(n)
    held, train = (adata[np.sort(rows)].to_memory() for rows in (order[:n_held], order[n_held:]))
    rows, values = [], []
    for key in dict.fromkeys([None, setup.spatial_key]):
        SpatialVAE.setup_anndata(train, **(setup.keys | {"spatial_key": key}))
        for likelihood, n_latent in product(likelihoods, latents):
            report(f"{likelihood}, {n_latent} latent dimensions, {'with' if key else 'without'} neighbours")
            model = SpatialVAE(train, n_latent=n_latent, gene_likelihood=likelihood, seed=seed)
            model.train(max_epochs, seed=seed, progress=False)
            each = model.get_marginal_ll(
                held, samples, seed, given=train if key else None, return_mean=False, return_error=True
            )
            log_p, error = mean_with_error(*each)
            rows.append((likelihood, n_latent, key is not None, log_p, error))
            values.append(each[0])
    table = pd.DataFrame(rows, columns=["gene_likelihood", "n_latent", "neighbours", "log_p", "monte_carlo_error"])
    difference = np.array(values) - values[int(table["log_p"].argmax())]
    table["difference"] = difference.mean(1)
    table["difference_error"] = difference.std(1, ddof=1) / np.sqrt(difference.shape[1])
    return table.sort_values("log_p", ascending=False, ignore_index=True)


def evidence_plot(table: pd.DataFrame) -> Figure:
    """Differences of ``compare`` from the best model, with two standard errors, the best on top."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 1.2 + 0.3 * len(table)), layout="constrained", dpi=130)
    axes, place = figure.add_subplot(), np.arange(len(table))
    for known, colour in ((True, "tab:blue"), (False, "tab:orange")):
        rows = table["neighbours"].to_numpy(bool) == known
        if rows.any():
            of = table[rows]
            label = "given neighbours" if known else "without neighbours"
            bars = {"xerr": 2 * of["difference_error"], "fmt": "o", "capsize": 3, "color": colour, "label": label}
            axes.errorbar(of["difference"], place[rows], **bars)
    names = [f"{of.gene_likelihood}, {of.n_latent} dimensions" for of in table.itertuples()]
    axes.set_yticks(place, names)
    axes.invert_yaxis()
    axes.axvline(0, color="0.7", lw=0.8, zorder=0)
    axes.set(xlabel="log p of held-out cells, nats a cell from the best", title="Evidence")
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    return figure
