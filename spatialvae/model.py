"""``SpatialVAE``, the public interface of the model."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, overload

import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch

from spatialvae import (
    _keys,
    analysis,
    differential,
    evidence,
    neighbours,
    niche_prior,
    sampling,
    saving,
    units,
    verbs,
)
from spatialvae._defaults import LIKELIHOODS
from spatialvae.data import build_graphs, check_table, fingerprint, minibatches, read_cells
from spatialvae.differential import Selection
from spatialvae.errors import InputError, check_count
from spatialvae.graph import knn_graph
from spatialvae.likelihoods import check_likelihood
from spatialvae.linear import fit_linear, groups_of, niche_latents
from spatialvae.mixture import Mixture
from spatialvae.module import ROWS_AT_ONCE, Section, Shape, SpatialModule
from spatialvae.posterior import posterior
from spatialvae.progress import training_bar, waiting
from spatialvae.setup import Setup, check_key, checked_coordinates, read_places
from spatialvae.training import Plan, divided, train

if TYPE_CHECKING:
    from anndata import AnnData

WHICH = ("both", "niche", "cell")
CELLS = ("model", "table")
OWN = "module"  # the niche_encoder in model.json if it is a user's module
_NEIGHBOURS = "neighbours."  # prefix of its tensors in model.safetensors


class SpatialVAE:
    """A variational autoencoder of cells (``z_cell``) and of their spatial neighbourhoods (``z_niche``).

    Parameters
    ----------
    adata : a table prepared by ``SpatialVAE.setup_anndata``
    n_latent : largest number of dimensions of z_cell; with few genes there are fewer
    n_niche : largest number of dimensions of z_niche; only those that vary in space are used
    n_hidden : width of the hidden layers
    gene_likelihood : "zinb", "nb" or "poisson". "zinb" fits the counts of STARmap and of dissociated single cells
        better than "nb", by 6 to 12 nats per cell, and those of MERFISH and osmFISH about as well
        (benchmarks/results/distribution.md); ``comparison.compare`` compares them for a table
    seed : seed of the initial weights
    measurement : model expression before detection (``spatialvae.measurement``). ``adata`` then needs
        ``var["detection_efficiency"]`` and ``var["misidentification_rate"]``, which ``merfish run`` writes
    linear_decoder : make log shares linear in z_cell, as in LDVAE; ``get_loadings`` returns the coefficients
    niche_encoder : model of z_cell given the counts of other cells (``spatialvae.neighbours``), used by all methods
        with ``given``; embeddings do not depend on it. "gatv2", "sage" and "gin" are layers of torch_geometric that
        pass messages from the 15 nearest neighbours; the first two predict best (benchmarks/results/neighbours.md).
        "field" uses the Gaussian field alone; cells can then be drawn jointly, not only one by one. A
        ``torch.nn.Module``, of which a copy is trained, is called as forward(x, edge_index, edge_attr) and returns one
        row per node: x (node, dim) is z_cell of the neighbours in prior standard deviations, zeros for the cells to be
        predicted; edge_index (2, edge) points from neighbours to these cells; edge_attr (edge, 1) is the distance in
        units of the mean distance between neighbours

    Raises
    ------
    InputError : if the table cannot be modelled or an argument is invalid; the message names the problem

    Examples
    --------
    >>> SpatialVAE.setup_anndata(adata, spatial_key="spatial")  # doctest: +SKIP
    >>> model = SpatialVAE(adata)  # doctest: +SKIP
    >>> model.train()  # doctest: +SKIP
    >>> adata.obsm["X_spatialvae"] = model.get_latent_representation()  # doctest: +SKIP
    """

    def __init__(
        self,
        adata: AnnData,
        n_latent: int = 30,
        n_niche: int = 10,
        n_hidden: int = 128,
        gene_likelihood: str = LIKELIHOODS[0],
        seed: int = 0,
        measurement: bool = False,
        linear_decoder: bool = False,
        niche_encoder: str | torch.nn.Module = "gatv2",
        **others: Any,
    ) -> None:
        verbs.refuse(others, "SpatialVAE")
        check_likelihood(gene_likelihood)
        for name, size in (("n_latent", n_latent), ("n_niche", n_niche), ("n_hidden", n_hidden)):
            check_count(name, size, "; for a model without niches set spatial_key=None" if name == "n_niche" else "")
        self.setup = replace(Setup.read(adata), measurement=measurement)
        self.adata = adata
        cells = read_cells(adata, self.setup)
        graphs = build_graphs(cells)
        start = fit_linear(cells, graphs, n_latent, n_niche, seed)
        shape = Shape(
            len(cells.genes),
            len(cells.batch_names),
            len(start.own),
            len(start.field.chosen) if start.field else 0,
            n_hidden,
            gene_likelihood,
            linear_decoder,
        )
        self.genes, self.batch_names = cells.genes, cells.batch_names
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.module = SpatialModule(shape, start).to(_device())
            self.neighbours = neighbours.prior_for(niche_encoder, self.module)
        self._niche_encoder = niche_encoder if isinstance(niche_encoder, str) else OWN
        self._to(self.module.mean.device)
        self.training_log = pd.DataFrame()
        self._section = self.module.section(cells, graphs)
        self._seen = fingerprint(adata, self.setup)

    @staticmethod
    def setup_anndata(
        adata: AnnData,
        layer: str | None = None,
        spatial_key: str | None = "spatial",
        sample_key: str | None = None,
        batch_key: str | None = None,
        labels_key: str | None = None,
        **others: Any,
    ) -> None:
        """Register the keys of the data that the model uses, and check the data; counts are checked by ``SpatialVAE``.

        Genes marked in ``var["is_blank"]`` are left out of the model.

        Parameters
        ----------
        adata : may be backed; counts are then read from its file in blocks
        layer : layer with counts, non-negative integers (cell, gene); X if None
        spatial_key : key in obsm of the coordinates, float (cell, 2 or 3), in any unit; None if there are none
        sample_key : column of obs with the section of each cell; neighbours are within a section. One section if None
        batch_key : column of obs with the batch of each cell, to be corrected for
        labels_key : column of obs with known cell types. The model does not use them; they are the default groups of
            ``differential_expression``

        Raises
        ------
        InputError : if a key does not exist, names are not unique, or coordinates are not finite
        """
        verbs.refuse(others, "setup_anndata")
        setup = Setup(layer, spatial_key, sample_key, batch_key, labels_key)
        check_table(adata, setup)
        setup.write(adata)

    @property
    def is_trained(self) -> bool:
        return len(self.training_log) > 0

    @property
    def history(self) -> dict[str, pd.DataFrame]:
        """The columns of ``training_log``, each as a frame indexed by step, as in scvi-tools; empty before training."""
        if not self.is_trained:
            return {}
        by_step = self.training_log.set_index("step")
        return {str(name): by_step[[name]] for name in by_step}

    @property
    def device(self) -> torch.device:
        return self.module.log_theta.device

    def to_device(self, device: str) -> None:
        """Move the model to the device "cpu", "gpu", "cuda:0", ...

        Raises InputError if the device is unknown or cannot be used.
        """
        self._to(verbs.device_of(device))

    def _to(self, device: torch.device) -> None:
        self.module.to(device).eval()
        if self.neighbours is not None:
            self.neighbours.to(device)

    def view_anndata_setup(self) -> None:
        """Print the size of the table and the arguments of ``setup_anndata``."""
        print(verbs.described(self.setup, self.adata.n_obs, len(self.genes), self.batch_names))

    @property
    def latent_names(self) -> list[str]:
        """Names of the columns of ``get_latent_representation()``."""
        shape = self.module.shape
        return [f"niche_{i}" for i in range(shape.n_niche)] + [f"cell_{i}" for i in range(shape.n_cell)]

    def train(
        self,
        max_epochs: int | None = None,
        *,
        max_steps: int = Plan.max_steps,
        batch_size: int | None = None,
        learning_rate: float = Plan.learning_rate,
        warm_up: int = Plan.warm_up,
        patience: int = Plan.patience,
        held_out: float = Plan.held_out,
        seed: int = Plan.seed,
        progress: bool = True,
        accelerator: str | None = None,
        train_size: float | None = None,
        early_stopping: bool = True,
        **others: Any,
    ) -> None:
        """Train on the table of the model. A second call continues the training, without warm-up. A call that is
        interrupted, or that raises an error, does not change the model.

        ``training_log`` gets one row per 100 steps. Held-out cells decide when to stop. They are not used to train the
        networks or to infer the niches of other cells meanwhile, but the linear initialisation, the final fit of the
        prior of the niches and of the units of the latents, and all results use all cells. To evaluate a model on
        unseen cells, leave these out of the table.

        Parameters
        ----------
        max_epochs : largest number of passes over the table; replaces ``max_steps``
        accelerator : device, as in ``to_device``; None or "auto" for the current one
        train_size : 1 - ``held_out``
        early_stopping : if False, train for ``max_steps``
        max_steps, batch_size, learning_rate, warm_up, patience, held_out, seed : see ``training.Plan``

        Raises
        ------
        InputError : if an argument is invalid
        FloatingPointError : if the bound is not finite, also after restarts with a lower learning rate
        """
        verbs.refuse(others, "train")
        if accelerator is not None and accelerator != "auto":
            self.to_device(accelerator)
        if train_size is not None:
            held_out = 1 - train_size
        sizes = {"max_epochs": max_epochs, "max_steps": max_steps, "batch_size": batch_size, "patience": patience}
        for name, value in sizes.items():
            if value is not None:
                check_count(name, value)
        if not 0 <= held_out < 1 or not learning_rate > 0:
            wanted = "0 <= held_out < 1 and a positive learning_rate"
            raise InputError(f"held_out is {held_out} and learning_rate {learning_rate}; expected {wanted}")
        section, trained = self._read(None), self.is_trained
        plan = Plan(
            max_steps=max_steps,
            learning_rate=learning_rate,
            warm_up=0 if trained else warm_up,
            patience=patience if early_stopping else max_steps,
            held_out=held_out,
            seed=seed,
        )
        plan = plan.fitted_to(section.cells.n_cells) if batch_size is None else replace(plan, batch_size=batch_size)
        if max_epochs is not None:
            plan = replace(plan, max_steps=max_epochs * -(-len(divided(section, plan).rows) // plan.batch_size))
        module, prior = copy.deepcopy((self.module, self.neighbours))
        module.drop_types()
        with training_bar(plan.max_steps, progress) as report:
            history = pd.DataFrame(train(module, section, plan, report))
        with waiting("priors of cells", progress), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            module.align(section)
            section = niche_prior.fit(module, section)
            units.fit(module, section, seed)
            neighbours.fit(prior, module, section, plan)
        self.module, self.neighbours, self._section = module, prior, section
        if trained:
            history[["step", "epoch"]] += self.training_log[["step", "epoch"]].iloc[-1]
            history = pd.concat([self.training_log, history], ignore_index=True)
        self.training_log = history.astype({"step": int, "restart": int})

    @overload
    def get_latent_representation(
        self,
        adata: AnnData | None = None,
        which: str = "both",
        return_dist: Literal[False] = False,
        *,
        indices: Sequence[int] | np.ndarray | None = None,
        give_mean: bool = True,
        seed: int = 0,
    ) -> np.ndarray: ...

    @overload
    def get_latent_representation(
        self,
        adata: AnnData | None = None,
        which: str = "both",
        *,
        return_dist: Literal[True],
        indices: Sequence[int] | np.ndarray | None = None,
        give_mean: bool = True,
        seed: int = 0,
    ) -> tuple[np.ndarray, np.ndarray]: ...

    def get_latent_representation(
        self,
        adata: AnnData | None = None,
        which: str = "both",
        return_dist: bool = False,
        *,
        indices: Sequence[int] | np.ndarray | None = None,
        give_mean: bool = True,
        seed: int = 0,
    ) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
        """Return the embedding: posterior means of z_niche and z_cell.

        z_cell describes the cell and is used to find cell types; z_niche, the smooth part of its first dimensions,
        describes the surroundings and is used to find domains. After training, dimensions that change expression more
        vary more (``spatialvae.units``), so that distances between cells are suitable for clustering.

        Parameters
        ----------
        adata : a table, which may be a new section; that of the model if None. Genes that it lacks are treated as
            not measured
        which : "niche", "cell" or "both", niche dimensions first
        return_dist : return mean and variance of the posterior of the full model (``spatialvae.posterior``), which is
            slower and more accurate
        indices : rows of the table, or a mask; all if None
        give_mean : if False, return one draw from the posterior
        seed : seed of that draw

        Returns
        -------
        float32 (cell, dim), or two such arrays, mean and variance, with ``return_dist``

        Raises
        ------
        InputError : for an unknown ``which``, invalid ``indices``, or a table that cannot be used with the model
        """
        if which not in WHICH:
            raise InputError(f"which is {which!r}; expected one of {WHICH}")
        section, rows = self._read(adata), self._rows(self.adata if adata is None else adata, indices)
        if not return_dist:
            if give_mean:
                niche, cell = (mean[rows] for mean in self.module.means(section))
            else:
                drawn = sampling.latent_draws(self.module, section, rows, 1, seed)
                pairs = [(of_niche[0].cpu(), of_cell[0].cpu()) for _, of_niche, of_cell in drawn]
                niche, cell = (torch.cat(parts) for parts in zip(*pairs, strict=True))
            return {"niche": niche, "cell": cell, "both": torch.cat([niche, cell], 1)}[which].numpy()
        of_niche, of_cell = posterior(self.module, section, self.module.sites(section))
        both = (torch.cat(pair, 1) for pair in zip(of_niche, of_cell, strict=True))
        mean, variance = {"niche": of_niche, "cell": of_cell, "both": both}[which]
        return mean.numpy()[rows], variance.numpy()[rows]

    @overload
    def get_normalized_expression(
        self,
        adata: AnnData | None = None,
        indices: Sequence[int] | np.ndarray | None = None,
        transform_batch: str | None = None,
        gene_list: Iterable[str] | None = None,
        library_size: float | str = 1.0,
        n_samples: int | None = None,
        return_mean: bool = True,
        return_numpy: Literal[False] = False,
        seed: int = 0,
    ) -> pd.DataFrame: ...

    @overload
    def get_normalized_expression(
        self,
        adata: AnnData | None = None,
        indices: Sequence[int] | np.ndarray | None = None,
        transform_batch: str | None = None,
        gene_list: Iterable[str] | None = None,
        library_size: float | str = 1.0,
        n_samples: int | None = None,
        return_mean: bool = True,
        *,
        return_numpy: Literal[True],
        seed: int = 0,
    ) -> np.ndarray: ...

    def get_normalized_expression(
        self,
        adata: AnnData | None = None,
        indices: Sequence[int] | np.ndarray | None = None,
        transform_batch: str | None = None,
        gene_list: Iterable[str] | None = None,
        library_size: float | str = 1.0,
        n_samples: int | None = None,
        return_mean: bool = True,
        return_numpy: bool = False,
        seed: int = 0,
    ) -> pd.DataFrame | np.ndarray:
        """Return denoised expression: each gene's share of the molecules times ``library_size``.

        Parameters
        ----------
        indices : rows of the table, or a mask; all if None
        transform_batch : batch to decode all cells in; each cell's own if None
        gene_list : genes to return; all if None
        library_size : a number, or "latent" for each cell's total count, or, with ``measurement``, for its number of
            molecules before detection
        n_samples : number of posterior draws; None for the value at the posterior mean of z_cell, which is faster
        return_mean : return the mean over draws; if False, ``return_numpy`` must be True
        return_numpy : return an array instead of a frame

        Returns
        -------
        DataFrame (cell, gene), or float32 (cell, gene), or float32 (sample, cell, gene) without ``return_mean``

        Raises
        ------
        InputError : for unknown genes or batches, or invalid arguments
        """
        if isinstance(library_size, str) and library_size == "latent":
            size = None
        elif isinstance(library_size, Real) and 0 < library_size < np.inf:
            size = float(library_size)
        else:
            raise InputError(f"library_size is {library_size!r}; expected a positive number or 'latent'")
        if not return_mean and not return_numpy:
            raise InputError("return_mean=False returns a three-dimensional array: pass return_numpy=True with it")
        section, table = self._read(adata), self.adata if adata is None else adata
        columns, rows = self._columns(gene_list), self._rows(table, indices)
        batch = None if transform_batch is None else self._batch(transform_batch)
        found = sampling.expression(self.module, section, self._cell_draws(section, rows, n_samples, seed), size, batch)
        parts = (share[..., columns] for _, share in found)
        value = np.concatenate([part.mean(0) if return_mean else part for part in parts], -2)
        if return_numpy:
            return value
        return pd.DataFrame(value, index=table.obs_names[rows], columns=[self.genes[i] for i in columns])

    def get_loadings(self) -> pd.DataFrame:
        """Return the change of each gene's log share per unit of each dimension of z_cell, for a linear decoder.

        Returns a DataFrame (gene, dim). A constant added to a column does not change shares; columns are centred, so
        that loadings are relative to the geometric mean of all genes.

        Raises InputError if the decoder is not linear.
        """
        if not self.module.shape.linear_decoder:
            raise InputError(
                "the decoder of this model is not linear: create the model with linear_decoder=True, or use "
                "spatialvae.interpret.latent_programs"
            )
        loadings = self.module.decoder.loadings.detach().cpu().numpy()
        names = self.latent_names[self.module.shape.n_niche :]
        return pd.DataFrame(loadings - loadings.mean(0), index=list(self.genes), columns=names)

    def get_likelihood_parameters(
        self,
        adata: AnnData | None = None,
        indices: Sequence[int] | np.ndarray | None = None,
        n_samples: int | None = None,
        give_mean: bool = True,
        seed: int = 0,
    ) -> dict[str, np.ndarray]:
        """Return the parameters of the likelihood of the counts, at the posterior mean of z_cell or from draws.

        Returns ``mean``, ``dispersions`` (inverse dispersion, not for "poisson") and ``dropout`` (logits of additional
        zeros, only for "zinb"): (cell, gene) each, averaged over ``n_samples`` posterior draws if it is given, or
        (sample, cell, gene) without ``give_mean``. ``mean`` is that before additional zeros.
        """
        section, rows = self._read(adata), self._rows(self.adata if adata is None else adata, indices)
        return verbs.likelihood_parameters(
            self.module, section, self._cell_draws(section, rows, n_samples, seed), give_mean
        )

    def get_feature_correlation_matrix(
        self,
        adata: AnnData | None = None,
        indices: Sequence[int] | np.ndarray | None = None,
        n_samples: int = 10,
        transform_batch: str | None = None,
        correlation_type: str = "spearman",
        seed: int = 0,
    ) -> pd.DataFrame:
        """Return correlations of genes, (gene, gene), over cells and ``n_samples`` draws of denoised expression.

        ``correlation_type`` is "spearman" or "pearson"; InputError is raised for others.
        """
        drawn = self.get_normalized_expression(
            adata, indices, transform_batch, n_samples=n_samples, return_mean=False, return_numpy=True, seed=seed
        )
        return verbs.correlations(drawn.reshape(-1, drawn.shape[-1]), correlation_type, list(self.genes))

    def posterior_predictive_sample(
        self,
        adata: AnnData | None = None,
        indices: Sequence[int] | np.ndarray | None = None,
        n_samples: int = 1,
        gene_list: Iterable[str] | None = None,
        given: AnnData | None = None,
        seed: int = 0,
    ) -> np.ndarray:
        """Draw counts from the posterior predictive distribution of the cells of a table.

        By default the latents are drawn from their posterior given the counts of the table, as in a repeated
        measurement of the same cells. With ``given``, another table, only the coordinates and total counts of
        ``adata`` are used, and the latents are drawn given the counts of ``given``: jointly for all cells if
        ``niche_encoder`` is "field", else independently for each cell.

        Returns int32 (cell, gene), or (cell, gene, sample) if ``n_samples`` is greater than 1.

        Raises InputError for invalid arguments, or for ``given`` with a model without coordinates.
        """
        section, table = self._read(adata), self.adata if adata is None else adata
        columns, rows = self._columns(gene_list), self._rows(table, indices)
        if given is None:
            parts = sampling.predictive(self.module, section, rows, n_samples, seed)
        elif self.neighbours is None:
            known = self._read(given), self._places(given)
            parts = sampling.predictive_at(self.module, section, self._places(table), rows, n_samples, seed, known)
        else:
            parts = sampling.predictive_of(self.module, section, rows, n_samples, seed, self._expected(table, given))
        counts = np.concatenate([drawn[..., columns] for _, drawn in parts], 1)
        return counts[0] if n_samples == 1 else np.moveaxis(counts, 0, -1)

    def impute(
        self,
        adata: AnnData,
        gene_list: Iterable[str] | None = None,
        n_samples: int = 100,
        interval: float = 0.9,
        seed: int = 0,
    ) -> AnnData:
        """Impute counts of genes that ``adata`` lacks, from its other genes and the neighbours.

        Parameters
        ----------
        gene_list : genes to impute; by default all genes of the model that the table lacks
        n_samples : number of posterior draws
        interval : probability of the predictive interval, which has equal tails

        Returns
        -------
        AnnData (cell, gene) with the expected counts in X, on the scale of the measured counts, and the bounds of the
        interval in ``layers["low"]`` and ``layers["high"]``, float32 each

        Raises
        ------
        InputError : if ``interval`` is not between 0 and 1, a gene is unknown, or there is no gene to impute
        """
        from anndata import AnnData

        if not 0 < interval < 1:
            raise InputError(f"interval is {interval}; expected a probability between 0 and 1")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="the table lacks")
            section = self._read(adata)
        missing = [gene for gene, absent in zip(self.genes, section.cells.missing, strict=True) if absent]
        columns = self._columns(missing if gene_list is None else gene_list)
        if not len(columns):
            raise InputError("the table has all genes of the model; pass the genes to impute as gene_list")
        found = sampling.impute(self.module, section, columns, n_samples, interval, seed)
        var = pd.DataFrame(index=[self.genes[i] for i in columns])
        return AnnData(found.expected, adata.obs.copy(), var, layers={"low": found.low, "high": found.high})

    def sample_prior(self, n_cells: int, cells: str = "model", seed: int = 0) -> AnnData:
        """Draw ``n_cells`` independent cells from the model, without positions; arguments as of ``sample_tissue``.
        With ``cells="table"`` z_niche is drawn from the prior, z_cell from cells of the table with a similar niche.

        Returns an AnnData with counts in X and the latents in ``obsm["X_spatialvae"]``.
        """
        check_count("n_cells", n_cells)
        niche = sampling.niches_alone(self.module, n_cells, seed)
        return self._sampled(niche, None, cells, seed)

    def sample_tissue(
        self,
        coordinates: np.ndarray,
        samples: Sequence[str] | np.ndarray | None = None,
        given: AnnData | None = None,
        library_size: np.ndarray | None = None,
        cells: str = "model",
        seed: int = 0,
    ) -> AnnData:
        """Draw new cells at ``coordinates``.

        With ``cells="model"`` only parameters are used, or the counts of cells that are ``given``::

            z_niche ~ N(0, v (1 + r L)^-1)  [given counts],   z_cell ~ p(z_cell | z_niche),   x ~ p(x | z_cell, l)

        With ``cells="table"`` the latents are a draw of the posterior of the cells of the model's table, (z_niche_c,
        z_cell_c) of cell c, in a new arrangement::

            p(a) = exp( sum_d c_d sum_{i ~ j} u_{a_i d} u_{a_j d} ) / Z,   x_i ~ p(x | z_cell_{a_i}, l_{a_i})

        a_i is the cell at place i, i ~ j are edges of the graph of places, and u_c are z_cell_c and log l_c. The
        couplings c are such that neighbours are on average as similar in each u_d as in the table (``arrangement``).
        Types of cells, total counts and their frequencies are therefore those of the table, but neighbours and the
        positions of domains are new. If there are as many places as the table has cells, each cell occurs once. With
        ``given``, niches are drawn from the field, and each new cell has the z_cell of a cell of the table in a similar
        niche.

        Parameters
        ----------
        coordinates : float (cell, axis), in the unit of the model's table
        samples : str (cell,), the section of each cell; one section if None. Neighbours are within a section
        given : a table of fixed cells: the field is drawn given their counts. Its ``sample_key`` names sections as in
            ``samples``
        library_size : l, total counts, a number or (cell,); by default those of the cells of the model's table that the
            latents are from, or that are the most similar in z_cell. Batches are always those of these cells
        cells : "model" or "table"

        Returns
        -------
        AnnData with counts in X, the latents in ``obsm["X_spatialvae"]``, and coordinates and sections under the keys
        of the model

        Raises
        ------
        InputError : for a model without coordinates, or invalid arguments
        """
        if self.setup.spatial_key is None:
            raise InputError("the model was set up without spatial_key and has no coordinates; use sample_prior")
        where = checked_coordinates(coordinates)
        if not len(where):
            raise InputError("coordinates has no rows; expected one for each cell to be drawn")
        names = np.full(len(where), "") if samples is None else np.asarray(samples).astype(str)
        if len(names) != len(where):
            raise InputError(f"samples has {len(names)} values for {len(where)} coordinates; expected one for each")
        if given is None and cells == "table":
            found = sampling.table_rearranged(self.module, self._read(None), (where, names), seed)
            made = self._made(*found, library_size, seed)
        else:
            known = None if given is None else (self._read(given), self._places(given))
            niche = sampling.niches_at(self.module, (where, names), 1, seed, known)[0]
            made = self._sampled(niche, library_size, cells, seed)
        made.obsm[self.setup.spatial_key] = where
        if self.setup.sample_key is not None:
            made.obs[self.setup.sample_key] = names
        return made

    def _sampled(self, niche: torch.Tensor, library_size: np.ndarray | None, cells: str, seed: int) -> AnnData:
        """Cells in ``niche`` (cell, D) and their counts."""
        if cells not in CELLS:
            raise InputError(f"cells is {cells!r}; expected one of {CELLS}")
        section = self._read(None)
        if cells == "model":
            z = sampling.cells_of_model(self.module, niche, seed)
            like = sampling.cells_like(self.module, section, z, seed)
        else:
            like, z = sampling.cells_of_table(self.module, section, niche, seed)
        return self._made(like, niche, z, library_size, seed)

    def _made(
        self, like: np.ndarray, niche: torch.Tensor, z: torch.Tensor, library_size: np.ndarray | None, seed: int
    ) -> AnnData:
        """A table of cells with latents ``niche`` (cell, D) and ``z`` (cell, dim), otherwise like the rows ``like``
        (cell,) of the model's table."""
        from anndata import AnnData

        section = sampling.as_if(self._read(None), like, library_size)
        rows, rng = np.arange(len(niche)), np.random.default_rng([seed, 3])
        parts = minibatches(rows, ROWS_AT_ONCE)
        counts = [sp.csr_matrix(sampling.draw_counts(self.module, section, part, z[part], rng)) for part in parts]
        names = pd.Index([f"sampled{i}" for i in rows])
        obs = pd.DataFrame(index=names)
        if self.setup.batch_key is not None:
            obs[self.setup.batch_key] = np.array(self.batch_names)[section.batch.numpy()]
        made = AnnData(sp.vstack(counts, format="csr"), obs, pd.DataFrame(index=list(self.genes)))
        made.obsm[_keys.LATENT] = np.concatenate([niche.numpy(), z.cpu().numpy()], 1)
        return made

    def _columns(self, gene_list: Iterable[str] | None) -> np.ndarray:
        if isinstance(gene_list, str):
            gene_list = [gene_list]
        genes = list(self.genes) if gene_list is None else list(gene_list)
        columns = pd.Index(self.genes).get_indexer(pd.Index(genes))
        unknown = [gene for gene, column in zip(genes, columns, strict=True) if column < 0]
        if unknown:
            raise InputError(f"the model was not trained on gene {unknown[0]!r} ({len(unknown)} such genes)")
        return columns

    def _rows(self, adata: AnnData, indices: Sequence[int] | np.ndarray | None) -> np.ndarray:
        if indices is None:
            return np.arange(adata.n_obs)
        rows = np.asarray(indices)
        rows = np.flatnonzero(rows) if rows.dtype == bool and rows.shape == (adata.n_obs,) else rows
        if rows.shape == (0,):
            raise InputError("indices select no cell")
        are_rows = rows.ndim == 1 and np.issubdtype(rows.dtype, np.integer)
        if not are_rows or rows.min() < 0 or rows.max() >= adata.n_obs:
            raise InputError(f"indices must be rows from 0 to {adata.n_obs - 1}, or a mask with one value per cell")
        return rows

    def _counted(
        self, section: Section, adata: AnnData | None, indices: Sequence[int] | np.ndarray | None
    ) -> np.ndarray:
        """The rows among ``indices`` whose cells have counts; at least one."""
        rows = self._rows(self.adata if adata is None else adata, indices)
        counted = rows[section.cells.depth[rows] > 0]
        if not len(counted):
            raise InputError(f"none of the {len(rows)} cells has counts")
        return counted

    def _batch(self, name: str) -> int:
        if str(name) not in self.batch_names:
            raise InputError(f"transform_batch is {name!r}; the model has the batches {list(self.batch_names)}")
        return self.batch_names.index(str(name))

    def _places(self, adata: AnnData) -> sampling.Places:
        if self.setup.spatial_key is None:
            raise InputError("the model was set up without spatial_key: leave out given, which needs coordinates")
        return read_places(adata, self.setup)

    def _cell_draws(
        self, section: Section, rows: np.ndarray, n_samples: int | None, seed: int
    ) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
        """Yield parts of ``rows`` and their z_cell (sample, row, dim); the posterior means if ``n_samples`` is None."""
        if n_samples is None:
            z = self.module.means(section)[1]
            for part in minibatches(rows, ROWS_AT_ONCE):
                yield part, z[torch.from_numpy(part)][None].to(self.device)
            return
        for part, _, z in sampling.latent_draws(self.module, section, rows, n_samples, seed):
            yield part, z

    def differential_expression(
        self,
        adata: AnnData | None = None,
        groupby: str | None = None,
        group1: str | Sequence[str] | None = None,
        group2: str | None = None,
        idx1: Selection | None = None,
        idx2: Selection | None = None,
        mode: str = "change",
        delta: float = 0.25,
        fdr_target: float = 0.05,
        within: str | None = None,
        all_stats: bool = True,
        transform_batch: str | None = None,
        seed: int = 0,
    ) -> pd.DataFrame:
        """Test which genes differ between groups of cells (``spatialvae.differential``).

        Parameters
        ----------
        groupby : column of obs with groups; the ``labels_key`` of ``setup_anndata`` if None
        group1 : groups, each compared separately; all if None
        group2 : reference group; all other cells if None
        idx1, idx2 : two groups as rows, masks or queries of obs, instead of the above
        mode : "change" for ``P(|lfc| >= delta)``, with lfc in log2; "vanilla" for P(lfc > 0)
        delta : smallest change of interest, in log2
        fdr_target : expected false discovery rate of the genes called in ``is_de_fdr_...``
        within : column of obs with cell types; cells of each type are compared between the groups separately (with
            domains as ``groupby``, the effect of the niche on a type). Types without cells in both groups are left out
        all_stats : add means of counts and shares of cells with counts
        transform_batch : batch to decode all cells in; each cell's own if None

        Returns
        -------
        DataFrame with one row per gene and comparison, and the columns of scvi-tools

        Raises
        ------
        InputError : for keys, groups or batches that do not exist, groups without cells, or invalid arguments
        """
        section, table = self._read(adata), self.adata if adata is None else adata
        if within is not None:
            check_key(table, within)
        groupby = groupby or self.setup.labels_key
        pairs = differential.pairs(table.obs, groupby, group1, group2, idx1, idx2, within)
        batch = None if transform_batch is None else self._batch(transform_batch)
        frame = differential.tables(self.module, section, pairs, mode, delta, fdr_target, all_stats, batch, seed)
        return frame.set_index(pd.Index(list(self.genes) * len(pairs)))

    def get_elbo(
        self, adata: AnnData | None = None, seed: int = 0, indices: Sequence[int] | np.ndarray | None = None
    ) -> float:
        """Return the mean evidence lower bound, nats per cell, from one draw of each latent."""
        return float(self._terms(adata, seed, indices).sum(1).mean())

    def get_reconstruction_error(
        self, adata: AnnData | None = None, seed: int = 0, indices: Sequence[int] | np.ndarray | None = None
    ) -> float:
        """Return the mean of -E_q log p(x | z), nats per cell, from one draw of each latent."""
        return float(-self._terms(adata, seed, indices)[:, 0].mean())

    @overload
    def get_marginal_ll(
        self,
        adata: AnnData | None = None,
        n_mc_samples: int = 1000,
        seed: int = 0,
        given: AnnData | None = None,
        return_mean: Literal[True] = True,
        return_error: Literal[False] = False,
        indices: Sequence[int] | np.ndarray | None = None,
    ) -> float: ...

    @overload
    def get_marginal_ll(
        self,
        adata: AnnData | None = None,
        n_mc_samples: int = 1000,
        seed: int = 0,
        given: AnnData | None = None,
        *,
        return_mean: Literal[True] = True,
        return_error: Literal[True],
        indices: Sequence[int] | np.ndarray | None = None,
    ) -> tuple[float, float]: ...

    @overload
    def get_marginal_ll(
        self,
        adata: AnnData | None = None,
        n_mc_samples: int = 1000,
        seed: int = 0,
        given: AnnData | None = None,
        *,
        return_mean: Literal[False],
        return_error: Literal[False] = False,
        indices: Sequence[int] | np.ndarray | None = None,
    ) -> np.ndarray: ...

    @overload
    def get_marginal_ll(
        self,
        adata: AnnData | None = None,
        n_mc_samples: int = 1000,
        seed: int = 0,
        given: AnnData | None = None,
        *,
        return_mean: Literal[False],
        return_error: Literal[True],
        indices: Sequence[int] | np.ndarray | None = None,
    ) -> tuple[np.ndarray, np.ndarray]: ...

    def get_marginal_ll(
        self,
        adata: AnnData | None = None,
        n_mc_samples: int = 1000,
        seed: int = 0,
        given: AnnData | None = None,
        return_mean: bool = True,
        return_error: bool = False,
        indices: Sequence[int] | np.ndarray | None = None,
    ) -> float | np.ndarray | tuple[float, float] | tuple[np.ndarray, np.ndarray]:
        """Return the mean of log p(x_i), nats per cell, estimated by importance sampling (``spatialvae.evidence``).

        By default each cell is considered alone, without its neighbours; this is comparable with the marginal
        likelihood of the same counts under other models, given the same library sizes. With ``given``, another table,
        it is log p(x_i | counts of ``given``): the prior of z_cell is the prediction at the coordinates of cell i from
        the cells of ``given`` in its section. Cells without counts are left out.

        Parameters
        ----------
        n_mc_samples : importance samples per cell
        return_mean : if False, return the value of each cell with counts, float64 (cell,)
        return_error : also return the Monte Carlo error, one standard deviation, of the same shape. The expected value
            of the estimate is lower than log p(x_i) by about half the square of the error of cell i
        indices : rows of the table, or a mask; all if None

        Raises
        ------
        InputError : for ``given`` with a model without coordinates, or invalid arguments
        """
        check_count("n_mc_samples", n_mc_samples)
        section = self._read(adata)
        expected = None if given is None else self._expected(self.adata if adata is None else adata, given)
        rows = self._counted(section, adata, indices)
        value, error = evidence.log_evidence(self.module, section, rows, n_mc_samples, seed, expected)
        if return_mean:
            mean, error_of_mean = evidence.mean_with_error(value, error)
            return (mean, error_of_mean) if return_error else mean
        return (value, error) if return_error else value

    def _around(self, adata: AnnData, given: AnnData) -> neighbours.Surroundings:
        """The information in the counts of ``given`` about the positions of ``adata``."""
        return neighbours.surroundings(self.module, self._places(adata), self._read(given), self._places(given))

    def _expected(self, adata: AnnData, given: AnnData) -> Callable[[np.ndarray], Mixture]:
        """A function from rows of ``adata`` to the distribution of their z_cell given the counts of ``given``."""
        around = self._around(adata, given)

        def expected(rows: np.ndarray) -> Mixture:
            here = around.of(rows, self.device)
            field = self.module.cells_around(here.mean, here.variance)
            return field if self.neighbours is None else self.neighbours(here, field)

        return expected

    def domains(
        self,
        k: int | None = None,
        adata: AnnData | None = None,
        seed: int = 0,
        smooth: bool = False,
        progress: bool = True,
    ) -> np.ndarray:
        """Find ``k`` spatial domains: the consensus of Gaussian mixtures of the dimensions of z_cell that vary in
        space, averaged over each cell and its 8, 15 or 30 nearest neighbours, and then over those of 36 neighbours that
        are in the same domain (``analysis.spatial_domains``). Without coordinates, by a mixture of z_cell itself.

        z_cell is that of a linear model of the table (``linear.niche_latents``), without effects that all cell types of
        a sample share, and also that of the model if it is trained, and samples, if there are several, are its batches;
        neither agrees best with known domains in all tissues.

        Parameters
        ----------
        k : number of domains; if None, the largest, at most 20, that is about as reproducible between random halves of
            the cells as any, or 1 if reproducibility is low or, averaged over numbers, about as high at permuted
            positions (``analysis.most_stable``). The agreement for each number is then written to
            ``uns["spatial_domain_number"]``; ``plots.number_of_domains`` draws it
        smooth : combine the mixture with a Potts model of the labels on the graph (``potts.smooth_labels``). The log
            probabilities of the mixture are divided by the number of cells in a neighbourhood, since averages over
            overlapping neighbourhoods are not independent

        Returns
        -------
        int64 (cell,), the labels, 0 the largest domain before smoothing. They are also written to
        ``obs["spatial_domain"]``, and the probabilities to ``obsm["spatial_domain_probability"]``, float64 (cell, k).
        """
        target = self.adata if adata is None else adata
        section = self._read(adata)
        graphs, coordinates, near = section.graphs, section.cells.coordinates, None
        if graphs is None or coordinates is None:
            latents = [self.module.means(section)[1].numpy()]
        else:
            shape, near = self.module.shape, knn_graph(coordinates, analysis.REFINED_NEIGHBOURS, section.cells.samples)
            latents = [niche_latents(section.cells, graphs, shape.n_cell, shape.n_niche, seed)]
            if self.is_trained and groups_of(section.cells).max() < len(np.unique(section.cells.batches)):
                latents.append(self.module.means(section)[1][:, : shape.n_niche].numpy())
        target.uns.pop(_keys.DOMAIN_NUMBER, None)  # it belongs to the domains that are replaced
        if k is None:
            with waiting("number of domains", progress):
                target.uns[_keys.DOMAIN_NUMBER] = found = analysis.stability(latents[0], near, seed)
            k = analysis.most_stable(found)
        with waiting("domains", progress):
            if near is None:
                probability = analysis.find_domains(latents[0], k, seed)
            else:
                probability = analysis.spatial_domains(latents, near, k, seed)
        labels, probability = analysis.in_order_of_size(probability)
        if smooth and graphs is not None:
            from spatialvae.potts import smooth_labels

            odds = np.log(np.maximum(probability, 1e-12)) / (1 + graphs.mean_degree)
            labels, probability = smooth_labels(odds, graphs.near, seed=seed)
        target.obs[_keys.DOMAIN] = pd.Categorical([str(label) for label in labels], [str(i) for i in range(k)])
        target.obsm[_keys.DOMAIN_PROBABILITY] = probability
        return labels

    def save(self, folder: str | os.PathLike[str], overwrite: bool = False, save_anndata: bool = False) -> None:
        """Write ``model.safetensors`` and ``model.json`` into ``folder``; other files in it are not changed.

        With ``save_anndata`` the table is written as ``adata.h5ad``, so that ``load`` needs no table. If writing is
        interrupted, the folder contains the old model, or files that do not belong together, which ``load`` rejects.

        Raises InputError if one of the files exists, unless ``overwrite``.
        """
        tensors = self.module.state_dict()
        if self.neighbours is not None:
            tensors |= {_NEIGHBOURS + name: value for name, value in self.neighbours.state_dict().items()}
        about = {
            "shape": asdict(self.module.shape),
            "setup": asdict(self.setup),
            "genes": list(self.genes),
            "batch_names": list(self.batch_names),
            "history": self.training_log.to_dict("list"),
            "niche_encoder": self._niche_encoder,
        }
        saving.write(Path(folder), about, tensors, self.adata if save_anndata else None, overwrite)

    @classmethod
    def load(
        cls,
        folder: str | os.PathLike[str],
        adata: AnnData | None = None,
        accelerator: str | None = None,
        niche_encoder: torch.nn.Module | None = None,
    ) -> Self:
        """Read a saved model.

        Parameters
        ----------
        adata : a table with the same genes, that of the training or another; ``setup_anndata`` is not needed, since the
            keys are saved with the model. By default the table of ``save(save_anndata=True)``, or ``table.h5ad`` in the
            output folder of ``spatialvae train``
        accelerator : device, as in ``to_device``; by default a GPU if there is one
        niche_encoder : the custom module, if the model was created with one: its parameters are saved, but not its code

        Raises
        ------
        InputError : if the folder is not a complete model, the table lacks genes or keys that the model needs, or
            ``niche_encoder`` does not match the model
        """
        about, tensors = saving.read(Path(folder))
        model = cls.__new__(cls)
        try:
            model.module = SpatialModule(Shape(**about["shape"]))
            of_neighbours = {name: tensors.pop(name) for name in list(tensors) if name.startswith(_NEIGHBOURS)}
            model.module.load_state_dict(tensors)
            model._niche_encoder = about["niche_encoder"]
            own = _own_encoder(Path(folder), model._niche_encoder, niche_encoder)
            model.neighbours = neighbours.prior_for(own or model._niche_encoder, model.module)
            if model.neighbours is not None:
                model.neighbours.load_state_dict(
                    {name.removeprefix(_NEIGHBOURS): value for name, value in of_neighbours.items()}
                )
            model.setup = Setup(**about["setup"])
            model.genes, model.batch_names = tuple(about["genes"]), tuple(about["batch_names"])
            model.training_log = pd.DataFrame(about["history"])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise InputError(f"{folder} is not a model of this version: {error}") from error
        model._to(verbs.device_of(accelerator) if accelerator else _device())
        model.adata = saving.read_table(Path(folder)) if adata is None else adata
        model._read(None, fresh=True)
        return model

    def _read(self, adata: AnnData | None, fresh: bool = False) -> Section:
        """The section of a table; that of the model's table is cached until the table changes."""
        if adata is None or adata is self.adata:
            seen = fingerprint(self.adata, self.setup)
            if fresh or seen != self._seen:
                self._section, self._seen = self._section_of(self.adata), seen
            return self._section
        return self._section_of(adata)

    def _section_of(self, adata: AnnData) -> Section:
        cells = read_cells(adata, self.setup, self.genes, self.batch_names)
        return self.module.section(cells, build_graphs(cells))

    @torch.no_grad()
    def _terms(self, adata: AnnData | None, seed: int, indices: Sequence[int] | np.ndarray | None) -> np.ndarray:
        """Terms of the bound (cell, 3), in nats, for cells with counts: log likelihood and minus the divergences of
        z_cell and z_niche."""
        section = self._read(adata)
        generator = torch.Generator().manual_seed(seed)
        niche = self.module.solve(section.space, self.module.sites(section))
        asked, found = self._counted(section, adata, indices), []
        for rows in minibatches(asked, ROWS_AT_ONCE):
            terms = self.module.terms(section, rows, niche, self.module.noise(len(rows), generator))
            found.append(torch.stack([terms.log_likelihood, -terms.kl_cell, -terms.kl_niche], 1).cpu().numpy())
        return np.concatenate(found)


def _device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def _own_encoder(folder: Path, saved: str, given: torch.nn.Module | None) -> torch.nn.Module | None:
    """``given``, checked against the ``saved`` value of ``niche_encoder``."""
    if saved == OWN and given is None:
        raise InputError(f"{folder} was created with a custom niche_encoder: pass the module as load(niche_encoder=)")
    if saved != OWN and given is not None:
        raise InputError(f"{folder} was created with niche_encoder={saved!r}; leave out niche_encoder")
    return given
