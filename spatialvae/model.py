"""SpatialVAE: what users call."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import pandas as pd
import torch

from spatialvae import _keys, analysis
from spatialvae._files import whole
from spatialvae.data import FIELD_NEIGHBOURS, Setup, along_curve, build_graphs, check_table, minibatches, read_cells
from spatialvae.errors import InputError
from spatialvae.graph import nearest_among
from spatialvae.linear import fit_linear
from spatialvae.module import LIKELIHOODS, Posterior, Section, Shape, SpatialModule
from spatialvae.training import Plan, train

if TYPE_CHECKING:
    from anndata import AnnData

FORMAT = 4
ROWS_AT_ONCE = 2048
WHICH = ("both", "niche", "cell")


class SpatialVAE:
    """A variational autoencoder of cells (``z_cell``) and of the neighbourhoods they sit in (``z_niche``).

    Parameters
    ----------
    adata : prepared by ``SpatialVAE.setup_anndata``
    n_latent : dimensions of z_cell, at most; fewer genes give fewer
    n_niche : dimensions of z_niche, at most; as many are used as vary in space
    n_hidden : width of the hidden layers
    gene_likelihood : "nb", "zinb" or "poisson"
    seed : of the initial weights

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
        gene_likelihood: str = "nb",
        seed: int = 0,
    ) -> None:
        if gene_likelihood not in LIKELIHOODS:
            raise InputError(f"gene_likelihood is {gene_likelihood!r}; expected one of {LIKELIHOODS}")
        self.setup = Setup.read(adata)
        self.adata = adata
        cells = read_cells(adata, self.setup)
        graphs = build_graphs(cells)
        start = fit_linear(cells, graphs, n_latent, n_niche, seed)
        shares = sum(block.sum(0, dtype=float) for _, block in cells.counts.blocks()) + 0.5
        shape = Shape(
            len(cells.genes),
            len(cells.batch_names),
            len(start.residual),
            start.field.n_directions if start.field else 0,
            n_hidden,
            gene_likelihood,
        )
        self.genes, self.batch_names = cells.genes, cells.batch_names
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.module = SpatialModule(shape, start, np.log(shares / shares.sum())).to(_device())
        self.module.eval()
        self.history = pd.DataFrame()
        self._section = self.module.section(cells, graphs)

    @staticmethod
    def setup_anndata(
        adata: AnnData,
        layer: str | None = None,
        spatial_key: str | None = "spatial",
        sample_key: str | None = None,
        batch_key: str | None = None,
    ) -> None:
        """Say where ``adata`` keeps what the model reads, and check it; the counts are checked when the model is made.

        Parameters
        ----------
        adata : may be backed; counts are then streamed from its file, and not kept in memory
        layer : counts, non-negative integers; X if None
        spatial_key : obsm with coordinates (cell, 2 or 3), any unit; None for cells without positions
        sample_key : obs naming the section of each cell; neighbours are found within it
        batch_key : obs naming batches whose effect on expression is to be removed

        Genes marked in ``var["is_blank"]`` are left out of the model.
        """
        setup = Setup(layer, spatial_key, sample_key, batch_key)
        check_table(adata, setup)
        setup.write(adata)

    @property
    def latent_names(self) -> list[str]:
        """Names of the columns of ``get_latent_representation()``."""
        shape = self.module.shape
        return [f"niche_{i}" for i in range(shape.n_niche)] + [f"cell_{i}" for i in range(shape.n_cell)]

    def train(
        self,
        max_epochs: int = Plan.max_epochs,
        *,
        batch_size: int = Plan.batch_size,
        learning_rate: float = Plan.learning_rate,
        warm_up: int = Plan.warm_up,
        patience: int = Plan.patience,
        held_out: float = Plan.held_out,
        seed: int = Plan.seed,
        progress: bool = True,
    ) -> None:
        """Train on the table given at the start; ``history`` gets one row an epoch. See ``training.Plan``."""
        plan = Plan(
            max_epochs=max_epochs,
            batch_size=batch_size,
            learning_rate=learning_rate,
            warm_up=warm_up,
            patience=patience,
            held_out=held_out,
            seed=seed,
        )
        if max_epochs < 1 or batch_size < 1 or not 0 <= held_out < 1 or not learning_rate > 0:
            raise InputError(f"a training plan needs positive epochs, batches and rate and held_out < 1; got {plan}")
        with _bar(max_epochs, progress) as report:
            history = pd.DataFrame(train(self.module, self._section, plan, report))
        self.history = history.astype({"epoch": int, "restart": int})

    def get_latent_representation(self, adata: AnnData | None = None, which: str = "both") -> np.ndarray:
        """The embedding, float32 (cell, dim): niche then cell dimensions, or one of them ("niche", "cell").

        Both are posterior means. z_cell is what the cell's own counts say, and serves to find cell types; it is given
        in units of its prior's standard deviation, as where the prior is N(0, 1). z_niche is what its surroundings
        say, and serves to find domains; there, what varies more in space counts for more.

        ``adata`` may be a section that the model has never seen, with the same genes and keys.
        """
        if which not in WHICH:
            raise InputError(f"which is {which!r}; expected one of {WHICH}")
        section, shape = self._read(adata), self.module.shape
        unit = self.module.cell_variance.sqrt()
        out = np.empty((section.cells.n_cells, shape.n_niche + shape.n_cell), np.float32)
        for rows, posterior in self._posteriors(section):
            out[rows] = torch.cat([posterior.niche_mean, posterior.cell_mean / unit], 1).cpu().numpy()
        part = {"niche": out[:, : shape.n_niche], "cell": out[:, shape.n_niche :], "both": out}[which]
        return np.ascontiguousarray(part)

    @torch.no_grad()
    def get_normalized_expression(
        self,
        adata: AnnData | None = None,
        gene_list: Iterable[str] | None = None,
        library_size: float | str = 1.0,
        transform_batch: str | None = None,
    ) -> pd.DataFrame:
        """Denoised expression (cell, gene): each gene's share at the posterior means, times ``library_size``.

        library_size : a number, or "latent" for each cell's own total count
        transform_batch : decode every cell as if it were of this batch
        """
        section = self._read(adata)
        genes = list(self.genes) if gene_list is None else list(gene_list)
        unknown = [gene for gene in genes if gene not in self.genes]
        if unknown:
            raise InputError(f"the model was not trained on gene {unknown[0]!r} ({len(unknown)} such genes)")
        if transform_batch is not None and transform_batch not in self.batch_names:
            raise InputError(f"transform_batch is {transform_batch!r}; the model knows {list(self.batch_names)}")
        if isinstance(library_size, str) and library_size != "latent":
            raise InputError(f"library_size is {library_size!r}; expected a number or 'latent'")
        columns = [self.genes.index(gene) for gene in genes]
        out = np.empty((section.cells.n_cells, len(genes)), np.float32)
        for rows, posterior in self._posteriors(section):
            batch = section.batch[torch.from_numpy(rows)]
            if transform_batch is not None:
                batch = torch.full_like(batch, self.batch_names.index(transform_batch))
            logits = self.module.decoder(posterior.cell_mean, posterior.niche_mean, batch.to(self._device))[0]
            share = torch.softmax(logits, -1).cpu().numpy()[:, columns]
            size = section.cells.depth[rows][:, None] if isinstance(library_size, str) else library_size
            out[rows] = share * size
        names = (self.adata if adata is None else adata).obs_names
        return pd.DataFrame(out, index=names, columns=genes)

    def get_elbo(self, adata: AnnData | None = None, seed: int = 0) -> float:
        """Mean evidence lower bound, nats a cell, from one draw of each latent."""
        return float(self._terms(adata, seed).sum(1).mean())

    def get_reconstruction_error(self, adata: AnnData | None = None, seed: int = 0) -> float:
        """Mean of -E_q log p(x | z), nats a cell, from one draw of each latent."""
        return float(-self._terms(adata, seed)[:, 0].mean())

    @torch.no_grad()
    def get_marginal_ll(
        self,
        adata: AnnData | None = None,
        n_mc_samples: int = 1000,
        seed: int = 0,
        given: AnnData | None = None,
    ) -> float:
        """Mean log p(x_i), nats a cell, by importance sampling.

        By default of each cell by itself, its neighbours unknown: to be compared with other models' marginal
        likelihood of the same counts given the same library sizes. With ``given``, another table, log p(x_i | counts of
        the 6 cells of ``given`` nearest to it in its sample): their niches say what is to be expected in this place.

        Raises InputError if ``given`` is asked of a model without positions.
        """
        if given is not None and self.setup.spatial_key is None:
            raise InputError("a model without spatial_key knows no neighbours; leave out given")
        if n_mc_samples < 1:
            raise InputError(f"n_mc_samples is {n_mc_samples}; expected at least 1")
        section = self._read(adata)
        generator = torch.Generator().manual_seed(seed)
        niche = None if given is None else self._niche_given(self.adata if adata is None else adata, given)
        found = []
        for rows in minibatches(np.arange(section.cells.n_cells), ROWS_AT_ONCE, 1, None):
            index = torch.from_numpy(rows)
            x = self.module.counts(section, rows)
            depth, batch = section.depth[index].to(x.device), section.batch[index].to(x.device)
            prior = None if niche is None else (niche[0][index].to(x.device), niche[1][index].to(x.device))
            found.append(self.module.marginal_log_likelihood(x, depth, batch, n_mc_samples, generator, prior).cpu())
        return float(torch.cat(found).double().mean())

    def _niche_given(self, adata: AnnData, given: AnnData) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and variance (cell, D) of z_niche of ``adata`` from the cells of ``given`` around it."""
        assert self.setup.spatial_key is not None
        mean, variance = torch.empty(2, given.n_obs, self.module.shape.n_niche)
        for rows, posterior in self._posteriors(self._read(given)):
            index = torch.from_numpy(rows)
            mean[index], variance[index] = posterior.niche_mean.cpu(), posterior.niche_log_variance.exp().cpu()
        key = self.setup.sample_key
        here, there = (np.asarray(t.obsm[self.setup.spatial_key]) for t in (adata, given))
        samples, others = (None if key is None else t.obs[key].astype(str).to_numpy() for t in (adata, given))
        near = torch.from_numpy(nearest_among(here, there, FIELD_NEIGHBOURS, samples, others))
        device = self._device
        inner = self.module.niche_given(mean[near].to(device), variance[near].to(device), (near >= 0).to(device))
        return inner[0].cpu(), inner[1].cpu()

    def domains(self, k: int | None = None, adata: AnnData | None = None, seed: int = 0) -> np.ndarray:
        """Find ``k`` spatial domains by a Gaussian mixture on z_niche (z_cell without coordinates).

        Without ``k`` the number with the best Bayesian information criterion is taken, 20 at most, a cell counting as
        much of an observation as it is of its neighbourhood.
        Writes ``obs["spatial_domain"]`` and ``obsm["spatial_domain_probability"]``; returns int64 labels (cell,).
        """
        target = self.adata if adata is None else adata
        which = "niche" if self.module.shape.n_niche else "cell"
        latent = self.get_latent_representation(adata, which)
        if k is None:
            degree = (self._read(adata).wide >= 0).sum(1).double() if which == "niche" else torch.zeros(1)
            k = analysis.choose_number(latent, float((1 + degree).mean()), seed)
        labels, probability = analysis.find_domains(latent, k, seed)
        target.obs[_keys.DOMAIN] = pd.Categorical([str(label) for label in labels], [str(i) for i in range(k)])
        target.obsm[_keys.DOMAIN_PROBABILITY] = probability
        return labels

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write ``model.safetensors`` and ``model.json`` into ``folder``, whole or not at all."""
        from safetensors.torch import save_file

        about = {
            "format": FORMAT,
            "shape": asdict(self.module.shape),
            "setup": asdict(self.setup),
            "genes": list(self.genes),
            "batch_names": list(self.batch_names),
            "history": self.history.to_dict("list"),
        }
        tensors = {name: value.detach().cpu().contiguous() for name, value in self.module.state_dict().items()}
        with whole(folder) as part:
            part.mkdir()
            save_file(tensors, part / "model.safetensors")
            (part / "model.json").write_text(json.dumps(about, indent=1))

    @classmethod
    def load(cls, folder: str | os.PathLike[str], adata: AnnData) -> Self:
        """Read a saved model and give it a table with the same genes, the one it was trained on or another.

        ``adata`` needs no ``setup_anndata``; the model knows its keys.

        Raises
        ------
        InputError : if the folder is not a whole model, or the table lacks genes or keys that the model needs
        """
        about, tensors = _read_folder(Path(folder))
        model = cls.__new__(cls)
        try:
            model.module = SpatialModule(Shape(**about["shape"]))
            model.module.load_state_dict(tensors)
            model.setup = Setup(**about["setup"])
            model.genes, model.batch_names = tuple(about["genes"]), tuple(about["batch_names"])
            model.history = pd.DataFrame(about["history"])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise InputError(f"{folder} is not a model of this version: {error}") from error
        model.module = model.module.to(_device()).eval()
        model.adata = adata
        model._section = model._read(adata, fresh=True)
        return model

    @property
    def _device(self) -> torch.device:
        return self.module.log_theta.device

    def _read(self, adata: AnnData | None, fresh: bool = False) -> Section:
        if adata is None or (adata is self.adata and not fresh):
            return self._section
        cells = read_cells(adata, self.setup, self.genes, self.batch_names)
        return self.module.section(cells, build_graphs(cells))

    @torch.no_grad()
    def _posteriors(self, section: Section) -> Iterable[tuple[np.ndarray, Posterior]]:
        for rows in _coherent(section):
            yield rows, self.module.infer(section, rows)

    @torch.no_grad()
    def _terms(self, adata: AnnData | None, seed: int) -> np.ndarray:
        """(cell, 3): log likelihood and the two divergences, negative."""
        section = self._read(adata)
        generator = torch.Generator().manual_seed(seed)
        out = np.empty((section.cells.n_cells, 3))
        for rows in _coherent(section):
            terms = self.module.terms(section, rows, self.module.noise(len(rows), generator))
            out[rows] = torch.stack([terms.log_likelihood, -terms.kl_cell, -terms.kl_niche], 1).cpu().numpy()
        return out


def _coherent(section: Section) -> Iterable[np.ndarray]:
    """All rows, in minibatches of cells that lie together and so share neighbours, which are encoded once."""
    cells = section.cells
    n, places = cells.n_cells, cells.coordinates
    return minibatches(np.arange(n) if places is None else along_curve(places, cells.samples), ROWS_AT_ONCE, 1, None)


def _device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def _bar(epochs: int, visible: bool) -> Any:
    from contextlib import contextmanager

    from rich.progress import Progress

    @contextmanager
    def bar() -> Any:
        with Progress(disable=not visible, transient=True) as progress:
            task = progress.add_task("training", total=epochs)

            def report(epoch: int, row: dict[str, float]) -> None:
                bound = row.get("elbo_validation", row["elbo_train"])
                progress.update(task, completed=epoch + 1, description=f"training, ELBO {bound:.2f}")

            yield report

    return bar()


def _read_folder(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    for name in ("model.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise InputError(f"{folder} is not a saved model: it has no {name}")
    try:
        about = json.loads((folder / "model.json").read_text())
        tensors = load_file(folder / "model.safetensors")
    except (ValueError, OSError, SafetensorError) as error:
        raise InputError(f"{folder} cannot be read: {error}") from error
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        raise InputError(f"{folder}/model.json is not of format {FORMAT}")
    return about, tensors
