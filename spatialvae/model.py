"""SpatialVAE: what users call."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, overload

import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch

from spatialvae import _keys, analysis, differential, evidence, neighbours, sampling, saving, verbs
from spatialvae._defaults import LIKELIHOODS
from spatialvae.celltypes import Types
from spatialvae.data import build_graphs, check_table, fingerprint, minibatches, read_cells
from spatialvae.differential import Selection
from spatialvae.errors import InputError, check_count
from spatialvae.linear import fit_linear
from spatialvae.mixture import Mixture
from spatialvae.module import ROWS_AT_ONCE, Section, Shape, SpatialModule
from spatialvae.posterior import posterior
from spatialvae.setup import Setup, check_key, checked_coordinates, read_places
from spatialvae.training import Plan, train

if TYPE_CHECKING:
    from anndata import AnnData

WHICH = ("both", "niche", "cell")
CELLS = ("model", "table")
OWN = "module"  # a user's niche_encoder, in model.json
_NEIGHBOURS = "neighbours."  # before its tensors' names in model.safetensors


class SpatialVAE:
    """A variational autoencoder of cells (``z_cell``) and of the neighbourhoods they sit in (``z_niche``).

    Parameters
    ----------
    adata : prepared by ``SpatialVAE.setup_anndata``
    n_latent : dimensions of z_cell, at most; fewer genes give fewer
    n_niche : dimensions of z_niche, at most; as many are used as vary in space
    n_hidden : width of the hidden layers
    gene_likelihood : "zinb", "nb" or "poisson"; the first explains counts of STARmap and of single cells in suspension
        better than the second, by 6 to 12 nats a cell, and those of MERFISH and osmFISH about as well
        (benchmarks/results/distribution.md): ``comparison.compare`` says which is best
    seed : of the initial weights
    measurement : model expression as it was before it was measured (``spatialvae.measurement``): ``adata`` gives each
        gene's ``var["detection_efficiency"]`` and ``var["misidentification_rate"]``, as ``merfish run`` writes them
    linear_decoder : log shares are linear in z_cell, as in LDVAE, and ``get_loadings`` says how
    niche_encoder : what is expected of a cell from others' counts (``spatialvae.neighbours``), for everything that is
        asked with ``given``; embeddings do not depend on it. "gatv2", "sage", "gin": layers of torch_geometric that
        take messages of the 15 neighbours, of which the first predicts best (benchmarks/results/neighbours.md);
        "field": the Gaussian field alone, whose cells can be drawn together and not only one by one; or a
        ``torch.nn.Module`` with forward(x, edge_index, edge_attr) that returns
        a row for each node. x (node, z_cell's dimensions) are neighbours' z_cell, zeros for the cells in question;
        edge_attr (edge, 1) distances in mean spacings of neighbours

    Raises
    ------
    InputError : for a table that cannot be modelled; the message names what is wrong

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
        if gene_likelihood not in LIKELIHOODS:
            raise InputError(f"gene_likelihood is {gene_likelihood!r}; expected one of {LIKELIHOODS}")
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
        """Say where ``adata`` keeps what the model reads, and check it; the counts are checked when the model is made.

        Parameters
        ----------
        adata : may be backed; counts are then streamed from its file, and not kept in memory
        layer : counts, non-negative integers; X if None
        spatial_key : obsm with coordinates (cell, 2 or 3), any unit; None for cells without positions
        sample_key : obs naming the section of each cell; neighbours are found within it
        batch_key : obs naming batches whose effect on expression is to be removed
        labels_key : obs naming known types; the model does not see them, ``differential_expression`` compares them

        Genes marked in ``var["is_blank"]`` are left out of the model.
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
        """As scvi-tools gives it: each column of ``training_log``, by its name, as a frame over steps."""
        if not self.is_trained:
            return {}
        by_step = self.training_log.set_index("step")
        return {str(name): by_step[[name]] for name in by_step}

    @property
    def device(self) -> torch.device:
        return self.module.log_theta.device

    def to_device(self, device: str) -> None:
        """Move the model to "cpu", "cuda:0", ...; training goes on there."""
        self._to(verbs.device_of(device))

    def _to(self, device: torch.device) -> None:
        self.module.to(device).eval()
        if self.neighbours is not None:
            self.neighbours.to(device)

    def view_anndata_setup(self) -> None:
        """Print what ``setup_anndata`` was told."""
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
        """Train on the table given at the start; a second call goes on from where the first ended, without warm-up.

        ``training_log`` gets one row for every 100 steps. ``max_epochs`` is the same limit as ``max_steps`` in passes
        over the table, ``train_size`` is 1 - ``held_out``, ``accelerator`` a device as in ``to_device``; without
        ``early_stopping`` training goes on to its limit. For the others see ``training.Plan``. Held-out cells add
        nothing to the training of parameters or to the niches of others; but the linear start has seen them, and
        results come from all cells. To judge a model by cells that it has not seen, leave them out of the table.
        """
        verbs.refuse(others, "train")
        if accelerator is not None and accelerator != "auto":
            self.to_device(accelerator)
        if train_size is not None:
            held_out = 1 - train_size
        for name, value in (("max_epochs", max_epochs), ("max_steps", max_steps), ("batch_size", batch_size)):
            if value is not None:
                check_count(name, value)
        if not 0 <= held_out < 1 or not learning_rate > 0:
            wanted = "a share in [0, 1) and a positive rate"
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
            n_train = section.cells.n_cells - int(held_out * section.cells.n_cells)
            plan = replace(plan, max_steps=max_epochs * -(-n_train // plan.batch_size))
        self.module.set_types(Types.of_sizes(0, self.module.shape.n_niche, self.module.shape.n_cell))
        with _bar(plan.max_steps, progress) as report:
            history = pd.DataFrame(train(self.module, section, plan, report))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            neighbours.fit(self.neighbours, self.module, section, plan)
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
        """The embedding, float32 (cell, dim): niche then cell dimensions, or one of them ("niche", "cell").

        These are posterior means: z_cell says what a cell is, and serves to find cell types; z_niche, the smooth part
        of its first dimensions, what its surroundings are, and serves to find domains. Both are in the units of the
        latents, in which cells vary by about 1. With ``return_dist`` means and variances of the posterior around its
        mode are returned (``spatialvae.posterior``), of the same shape: slower, and closer to the posterior. Without
        ``give_mean`` one draw from it is returned. ``indices``: rows of the table; all if None.

        ``adata`` may be a section that the model has never seen. Genes that it lacks count as not measured.
        """
        if which not in WHICH:
            raise InputError(f"which is {which!r}; expected one of {WHICH}")
        section, rows = self._read(adata), self._rows(self.adata if adata is None else adata, indices)
        if not return_dist:
            if give_mean:
                niche, cell = (mean[rows] for mean in self._means(section))
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
        """Denoised expression (cell, gene): each gene's share of the molecules times ``library_size``.

        Parameters
        ----------
        indices : rows of the table; all if None
        transform_batch : decode every cell as if it were of this batch
        library_size : a number, or "latent" for each cell's own total count: with ``measurement`` of the molecules that
            were there, not of those that were called
        n_samples : draws from the posterior; None for the value at the posterior means, which is faster
        return_mean : over draws; otherwise an array (sample, cell, gene), which needs ``return_numpy``
        """
        if isinstance(library_size, str) and library_size != "latent":
            raise InputError(f"library_size is {library_size!r}; expected a number or 'latent'")
        if not return_mean and not return_numpy:
            raise InputError("draws make an array, not a frame: pass return_numpy=True with return_mean=False")
        section, table = self._read(adata), self.adata if adata is None else adata
        columns, rows = self._columns(gene_list), self._rows(table, indices)
        batch = None if transform_batch is None else self._batch(transform_batch)
        size = None if isinstance(library_size, str) else library_size
        found = sampling.expression(self.module, section, self._cell_draws(section, rows, n_samples, seed), size, batch)
        parts = (share[..., columns] for _, share in found)
        value = np.concatenate([part.mean(0) if return_mean else part for part in parts], -2)
        if return_numpy:
            return value
        return pd.DataFrame(value, index=table.obs_names[rows], columns=[self.genes[i] for i in columns])

    def get_loadings(self) -> pd.DataFrame:
        """Of a linear decoder: how much the log share of each gene grows with each dimension of z_cell, (gene, dim).

        A constant added to a column changes no share; columns have mean zero, so that a loading is relative to the
        geometric mean of all genes. Raises InputError for models with another decoder.
        """
        if not self.module.shape.linear_decoder:
            raise InputError(
                "loadings are those of a linear decoder: make the model with linear_decoder=True, or see "
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
        """``mean``, ``dispersions`` and ``dropout`` of the counts' likelihood, (cell, gene) each, at the posterior
        means or averaged over ``n_samples`` draws; (sample, cell, gene) without ``give_mean``."""
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
        """Correlations of genes over cells and draws of their denoised expression, (gene, gene)."""
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
        """Counts drawn anew for the cells of a table, int32 (cell, gene), or (cell, gene, sample) of several samples.

        By default z is drawn from the posterior given the table's counts: what a second measurement of the same cells
        would give. With ``given``, another table, nothing of ``adata`` is looked at but the cells' places and total
        counts: z is drawn from what the cells of ``given`` say of these places, of all cells together if the model was
        made with niche_encoder="field", else of each by itself.
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
        """Counts of genes that ``adata`` lacks, from those that it has and the neighbours.

        Parameters
        ----------
        gene_list : by default all genes of the model that the table lacks
        interval : probability of the interval between ``layers["low"]`` and ``layers["high"]``, that counts drawn from
            the posterior fall on either side of with equal probability

        Returns an AnnData with expected counts in X, as they would have been beside the counts that were measured.
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
            raise InputError("the table has all genes of the model; name those to impute in gene_list")
        found = sampling.impute(self.module, section, columns, n_samples, interval, seed)
        var = pd.DataFrame(index=[self.genes[i] for i in columns])
        return AnnData(found.expected, adata.obs.copy(), var, layers={"low": found.low, "high": found.high})

    def sample_prior(self, n_cells: int, cells: str = "model", seed: int = 0) -> AnnData:
        """``n_cells`` cells drawn from the model by themselves, each far from any other; see ``sample_tissue``."""
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
        """New cells at ``coordinates``: niches drawn from the field, cells from their niches, counts from the cells.

        Parameters
        ----------
        coordinates : (cell, axis), in the unit of the model's table
        samples : the section of each cell, one if None; neighbours are found within it
        given : a table of cells that are held fixed: the field is drawn given their counts. Their sections are named in
            ``samples`` as in their ``sample_key``
        library_size : total counts (cell,); by default those of the cells of the model's table that are most alike in
            z_cell, whose batches they take, too
        cells : "model" for p(z_cell | z_niche) of the model; "table" for that of a cell of the model's table whose
            niche is alike, so that there are the same types of cells

        Returns an AnnData with counts in X, ``obsm["X_spatialvae"]``, the latents that they come from, and places and
        sections under the keys of the model.
        """
        if self.setup.spatial_key is None:
            raise InputError("a model without spatial_key knows no places; use sample_prior")
        where = checked_coordinates(coordinates)
        names = np.full(len(where), "") if samples is None else np.asarray(samples).astype(str)
        if len(names) != len(where):
            raise InputError(f"{len(names)} names of samples for {len(where)} places; expected one each")
        known = None if given is None else (self._read(given), self._places(given))
        niche = sampling.niches_at(self.module, (where, names), 1, seed, known)[0]
        made = self._sampled(niche, library_size, cells, seed)
        made.obsm[self.setup.spatial_key] = where
        if self.setup.sample_key is not None:
            made.obs[self.setup.sample_key] = names
        return made

    def _sampled(self, niche: torch.Tensor, library_size: np.ndarray | None, cells: str, seed: int) -> AnnData:
        """Cells in ``niche`` (cell, D) and their counts."""
        from anndata import AnnData

        if cells not in CELLS:
            raise InputError(f"cells is {cells!r}; expected one of {CELLS}")
        section = self._read(None)
        if cells == "model":
            z = sampling.cells_of_model(self.module, niche, seed)
            like = sampling.cells_like(self.module, section, z, seed)
        else:
            z, like = sampling.cells_of_table(self.module, section, niche, seed)
        section = sampling.as_if(section, like, library_size)
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
        unknown = [gene for gene in genes if gene not in self.genes]
        if unknown:
            raise InputError(f"the model was not trained on gene {unknown[0]!r} ({len(unknown)} such genes)")
        return np.array([self.genes.index(gene) for gene in genes], int)

    def _rows(self, adata: AnnData, indices: Sequence[int] | np.ndarray | None) -> np.ndarray:
        if indices is None:
            return np.arange(adata.n_obs)
        rows = np.asarray(indices)
        rows = np.flatnonzero(rows) if rows.dtype == bool and len(rows) == adata.n_obs else rows
        if not len(rows):
            raise InputError("indices name no cell")
        if not np.issubdtype(rows.dtype, np.integer) or rows.min(initial=0) < 0 or rows.max(initial=0) >= adata.n_obs:
            raise InputError(f"indices must be numbers of rows from 0 to {adata.n_obs - 1}, or a mask of all rows")
        return rows

    def _counted(
        self, section: Section, adata: AnnData | None, indices: Sequence[int] | np.ndarray | None
    ) -> np.ndarray:
        """Those of ``indices`` whose cells have counts."""
        rows = self._rows(self.adata if adata is None else adata, indices)
        return rows[section.cells.depth[rows] > 0]

    def _batch(self, name: str) -> int:
        if name not in self.batch_names:
            raise InputError(f"transform_batch is {name!r}; the model knows {list(self.batch_names)}")
        return self.batch_names.index(name)

    def _places(self, adata: AnnData) -> sampling.Places:
        if self.setup.spatial_key is None:
            raise InputError("a model without spatial_key knows no neighbours; leave out given")
        return read_places(adata, self.setup)

    def _cell_draws(
        self, section: Section, rows: np.ndarray, n_samples: int | None, seed: int
    ) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
        """z_cell (sample, row, dim) of parts of ``rows``; the posterior means where ``n_samples`` is None."""
        if n_samples is None:
            z = self._means(section)[1]
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
        """Which genes differ between groups of cells: a row a gene with scvi-tools' columns (``differential``).

        Parameters
        ----------
        groupby : obs naming groups; the ``labels_key`` of ``setup_anndata`` if None
        group1 : groups to compare, each by itself; all if None
        group2 : what each is compared with; all other cells if None
        idx1, idx2 : two groups as rows, masks or queries of obs, instead of the above
        mode : "change" for ``P(|lfc| >= delta)``, lfc in log2; "vanilla" for P(lfc > 0)
        fdr_target : expected share of wrong ones among the genes of ``is_de_fdr_...``
        within : obs naming types; each type is compared by itself, between its cells in one group and the other (with
            ``groupby`` the domains: what a niche does to cells of one type). Types without cells in both are left out
        transform_batch : compare all cells as if they were of this batch; by default each as of its own
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
        """Mean evidence lower bound, nats a cell, from one draw of each latent."""
        return float(self._terms(adata, seed, indices).sum(1).mean())

    def get_reconstruction_error(
        self, adata: AnnData | None = None, seed: int = 0, indices: Sequence[int] | np.ndarray | None = None
    ) -> float:
        """Mean of -E_q log p(x | z), nats a cell, from one draw of each latent."""
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
        """Mean log p(x_i), nats a cell, by importance sampling (``spatialvae.evidence``).

        By default of each cell by itself, its neighbours unknown: to be compared with other models' marginal
        likelihood of the same counts given the same library sizes. With ``given``, another table, log p(x_i | counts of
        ``given``): what the cells of ``given`` in its sample say of its place is what is expected there, and nothing of
        ``adata`` but its places is looked at before. Cells without counts are left out.

        Without ``return_mean`` the value of each cell that has counts is returned, float64 (cell,). ``return_error``
        adds its Monte Carlo error, one standard deviation, of the same shape. The value itself is a lower bound that
        lies below log p(x_i) by about half the square of that error. ``indices``: rows of the table; all if None.

        Raises InputError if ``given`` is asked of a model without positions.
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
        """What is known of the places of ``adata`` from the counts of ``given`` alone."""
        return neighbours.surroundings(self.module, self._places(adata), self._read(given), self._places(given))

    def _expected(self, adata: AnnData, given: AnnData) -> Callable[[np.ndarray], Mixture]:
        """What is expected of z_cell of rows of ``adata`` from the counts of ``given`` alone."""
        around = self._around(adata, given)

        def expected(rows: np.ndarray) -> Mixture:
            here = around.of(rows, self.device)
            field = self.module.cells_around(here.mean, here.variance)
            return field if self.neighbours is None else self.neighbours(here, field)

        return expected

    def domains(
        self, k: int | None = None, adata: AnnData | None = None, seed: int = 0, smooth: bool = False
    ) -> np.ndarray:
        """Find ``k`` spatial domains, by a Gaussian mixture of the dimensions of z_cell that vary in space, averaged
        over each cell and its 15 nearest neighbours; without coordinates, of z_cell itself.

        Parameters
        ----------
        k : number of domains; if None, the most reproducible number between random halves of the cells, at most 20
            (``analysis.most_stable``). The agreement for each number is then written to
            ``uns["spatial_domain_number"]``; ``plots.number_of_domains`` draws it
        smooth : combine the mixture with a Potts model of the labels on the graph (``potts.smooth_labels``). The log
            probabilities of the mixture are divided by the number of cells in a neighbourhood, since averages over
            overlapping neighbourhoods are not independent

        Returns
        -------
        int64 (cell,), the labels, 0 the largest domain of the mixture. They are also written to
        ``obs["spatial_domain"]``, and the probabilities to ``obsm["spatial_domain_probability"]``, float64 (cell, k).
        """
        target = self.adata if adata is None else adata
        section = self._read(adata)
        graphs, latent = section.graphs, self._means(section)[1].numpy()
        if graphs is not None:
            near, latent = graphs.wide.adjacency(), latent[:, : self.module.shape.n_niche]
            latent = (latent + near @ latent) / (1 + graphs.wide.degree)[:, None]
        target.uns.pop(_keys.DOMAIN_NUMBER, None)  # it belongs to the domains that are replaced
        if k is None:
            target.uns[_keys.DOMAIN_NUMBER] = found = analysis.stability(latent, seed)
            k = analysis.most_stable(found)
        labels, probability = analysis.find_domains(latent, k, seed)
        if smooth and graphs is not None:
            from spatialvae.potts import smooth_labels

            odds = np.log(np.maximum(probability, 1e-12)) / (1 + graphs.near.degree.mean())
            labels, probability = smooth_labels(odds, graphs.near.adjacency(), seed=seed)
        target.obs[_keys.DOMAIN] = pd.Categorical([str(label) for label in labels], [str(i) for i in range(k)])
        target.obsm[_keys.DOMAIN_PROBABILITY] = probability
        return labels

    def save(self, folder: str | os.PathLike[str], overwrite: bool = False, save_anndata: bool = False) -> None:
        """Write ``model.safetensors`` and ``model.json`` into ``folder``; other files there stay as they are. With
        ``save_anndata`` the table, too, as ``adata.h5ad``, so that ``load`` needs none.

        Raises InputError if either is there already, unless ``overwrite``. Interrupted, it leaves the old model, or two
        files that ``load`` tells apart.
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
        """Read a saved model and give it a table with the same genes, the one it was trained on or another.

        ``adata`` needs no ``setup_anndata``; the model knows its keys. Without it the table is that of
        ``save(save_anndata=True)``, or the one beside the model in the folder that ``spatialvae train`` wrote.
        ``accelerator`` is the device to load to, as in ``to_device``. ``niche_encoder``: your own module, if the model
        was made with one: files hold its parameters, and not its code.

        Raises
        ------
        InputError : if the folder is not a whole model, the table lacks genes or keys that the model needs, or
            ``niche_encoder`` is not what the model was made with
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
        """The section of a table; that of the model's own is made again when the table has changed."""
        if adata is None or adata is self.adata:
            seen = fingerprint(self.adata, self.setup)
            if fresh or seen != self._seen:
                self._section, self._seen = self._section_of(self.adata), seen
            return self._section
        return self._section_of(adata)

    def _section_of(self, adata: AnnData) -> Section:
        cells = read_cells(adata, self.setup, self.genes, self.batch_names)
        return self.module.section(cells, build_graphs(cells))

    def _means(self, section: Section) -> tuple[torch.Tensor, torch.Tensor]:
        """Posterior means of z_niche (cell, D) and z_cell (cell, dim)."""
        sites = self.module.sites(section)
        niche = self.module.solve(section.space, sites)
        return niche.mean, self.module.cells_given(sites, niche)[0]

    @torch.no_grad()
    def _terms(self, adata: AnnData | None, seed: int, indices: Sequence[int] | np.ndarray | None) -> np.ndarray:
        """(cell, 3): log likelihood and the two divergences, negative; of cells that have counts."""
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
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def _own_encoder(folder: Path, saved: str, given: torch.nn.Module | None) -> torch.nn.Module | None:
    """``given``, if it is what a model that was ``saved`` with a ``niche_encoder`` needs."""
    if saved == OWN and given is None:
        raise InputError(f"{folder} has a niche_encoder of your own: pass one like it to load(niche_encoder=)")
    if saved != OWN and given is not None:
        raise InputError(f"{folder} was made with niche_encoder={saved!r}; leave out niche_encoder")
    return given


def _bar(steps: int, visible: bool) -> Any:
    from contextlib import contextmanager

    from rich.progress import Progress

    @contextmanager
    def bar() -> Any:
        with Progress(disable=not visible, transient=True) as progress:
            task = progress.add_task("training", total=steps)

            def report(row: dict[str, float]) -> None:
                bound = row.get("evidence_validation", row["elbo_train"])
                progress.update(task, completed=row["step"], description=f"training, {bound:.2f} nats a cell")

            yield report

    return bar()
