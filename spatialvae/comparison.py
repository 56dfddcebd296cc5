"""Comparison of models of a table by their evidence for held-out cells."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import product
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from spatialvae.errors import InputError, check_count
from spatialvae.evidence import mean_with_error
from spatialvae.likelihoods import check_likelihood
from spatialvae.model import SpatialVAE
from spatialvae.setup import Setup

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.figure import Figure

LEAST_HELD = 10  # cells


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
    """Compare likelihoods and latent sizes, with and without neighbours, by the evidence for held-out cells.

    All models are trained on the same cells.

    Parameters
    ----------
    adata : a table prepared by ``SpatialVAE.setup_anndata``
    likelihoods : values of ``gene_likelihood``: "zinb", "nb", "poisson"
    latents : values of ``n_latent``
    held_out : share of cells to hold out
    samples : importance samples per cell
    max_epochs : largest number of passes over the table
    report : called with a description of each model before it is trained

    Returns
    -------
    DataFrame with one row per model, best first. ``log_p`` is the mean log p(x) of the held-out cells, nats per cell,
    given the training cells if ``neighbours`` is True; ``monte_carlo_error`` is the error of its estimate.
    ``difference`` is the mean difference to the best model over cells, and ``difference_error`` its standard error over
    held-out cells: a model is worse than the best if the difference is several times its error

    Raises
    ------
    InputError : if fewer than 10 cells would be held out or left for training, or if a likelihood or size is invalid
    """
    likelihoods, latents = list(likelihoods), list(latents)
    if not likelihoods or not latents:
        raise InputError("there is no model to compare; expected at least one likelihood and one latent size")
    for likelihood in likelihoods:
        check_likelihood(likelihood)
    for n_latent in latents:
        check_count("n_latent", n_latent)
    setup, n = Setup.read(adata), adata.n_obs
    n_held = round(held_out * n)
    if not LEAST_HELD <= n_held <= n - LEAST_HELD:
        raise InputError(
            f"held_out is {held_out}: {n_held} of {n} cells; expected at least {LEAST_HELD} held out and as many to "
            "train on"
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
    """Differences of the models of ``compare`` to the best, with two standard errors, best on top."""
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
    axes.set(xlabel="log p of held-out cells relative to the best, nats per cell", title="Evidence")
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    return figure
