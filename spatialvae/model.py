"""SpatialVAE: what users call."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, overload

import numpy as np
import pandas as pd
import torch

from spatialvae import _keys, analysis
from spatialvae._files import whole
from spatialvae.data import (
    build_graphs,
    check_table,
    fingerprint,
    graphs_of,
    minibatches,
    read_cells,
)
from spatialvae.errors import InputError
from spatialvae.linear import fit_linear
from spatialvae.module import LIKELIHOODS, ROWS_AT_ONCE, Section, Shape, Sites, SpatialModule
from spatialvae.posterior import posterior
from spatialvae.setup import Setup, read_places
from spatialvae.training import Plan, train

if TYPE_CHECKING:
    from anndata import AnnData

FORMAT = 5
FILES = ("model.json", "model.safetensors")
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
        for name, size in (("n_latent", n_latent), ("n_niche", n_niche), ("n_hidden", n_hidden)):
            if size < 1:
                advice = "; for a model without niches set spatial_key=None" if name == "n_niche" else ""
                raise InputError(f"{name} is {size}; expected at least 1{advice}")
        self.setup = Setup.read(adata)
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
        )
        self.genes, self.batch_names = cells.genes, cells.batch_names
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.module = SpatialModule(shape, start).to(_device())
        self.module.eval()
        self.history = pd.DataFrame()
        self._section = self.module.section(cells, graphs)
        self._seen = fingerprint(adata, self.setup)

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
    ) -> None:
        """Train on the table given at the start; a second call goes on from where the first ended, without warm-up.

        ``history`` gets one row for every 100 steps. ``max_epochs`` is the same limit as ``max_steps`` in passes over
        the table. For the others see ``training.Plan``. Held-out cells add nothing to the training of parameters or to
        the niches of others; but the linear start has seen them, and results come from all cells. To judge a model by
        cells that it has not seen, leave them out of the table.
        """
        for name, value in (("max_epochs", max_epochs), ("max_steps", max_steps), ("batch_size", batch_size)):
            if value is not None and value < 1:
                raise InputError(f"{name} is {value}; expected at least 1")
        if not 0 <= held_out < 1 or not learning_rate > 0:
            wanted = "a share in [0, 1) and a positive rate"
            raise InputError(f"held_out is {held_out} and learning_rate {learning_rate}; expected {wanted}")
        section, trained = self._read(None), len(self.history) > 0
        plan = Plan(
            max_steps=max_steps,
            learning_rate=learning_rate,
            warm_up=0 if trained else warm_up,
            patience=patience,
            held_out=held_out,
            seed=seed,
        )
        plan = plan.fitted_to(section.cells.n_cells) if batch_size is None else replace(plan, batch_size=batch_size)
        if max_epochs is not None:
            n_train = section.cells.n_cells - int(held_out * section.cells.n_cells)
            plan = replace(plan, max_steps=max_epochs * -(-n_train // plan.batch_size))
        with _bar(plan.max_steps, progress) as report:
            history = pd.DataFrame(train(self.module, section, plan, report))
        if trained:
            history[["step", "epoch"]] += self.history[["step", "epoch"]].iloc[-1]
            history = pd.concat([self.history, history], ignore_index=True)
        self.history = history.astype({"step": int, "restart": int})

    @overload
    def get_latent_representation(
        self, adata: AnnData | None = None, which: str = "both", return_dist: Literal[False] = False
    ) -> np.ndarray: ...

    @overload
    def get_latent_representation(
        self, adata: AnnData | None = None, which: str = "both", *, return_dist: Literal[True]
    ) -> tuple[np.ndarray, np.ndarray]: ...

    def get_latent_representation(
        self, adata: AnnData | None = None, which: str = "both", return_dist: bool = False
    ) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
        """The embedding, float32 (cell, dim): niche then cell dimensions, or one of them ("niche", "cell").

        These are posterior means: z_cell says what a cell is, and serves to find cell types; z_niche, the smooth part
        of its first dimensions, what its surroundings are, and serves to find domains. Both are in the units of the
        latents, in which cells vary by about 1. With ``return_dist`` means and variances of the posterior around its
        mode are returned (``spatialvae.posterior``), of the same shape: slower, and closer to the posterior.

        ``adata`` may be a section that the model has never seen. Genes that it lacks count as not measured.
        """
        if which not in WHICH:
            raise InputError(f"which is {which!r}; expected one of {WHICH}")
        section = self._read(adata)
        if not return_dist:
            niche, cell = self._means(section)
            return {"niche": niche, "cell": cell, "both": torch.cat([niche, cell], 1)}[which].numpy()
        of_niche, of_cell = posterior(self.module, section, self.module.sites(section))
        both = (torch.cat(pair, 1) for pair in zip(of_niche, of_cell, strict=True))
        mean, variance = {"niche": of_niche, "cell": of_cell, "both": both}[which]
        return mean.numpy(), variance.numpy()

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
        z_cell = self._means(section)[1]
        for rows in minibatches(np.arange(section.cells.n_cells), ROWS_AT_ONCE):
            batch = section.batch[torch.from_numpy(rows)]
            if transform_batch is not None:
                batch = torch.full_like(batch, self.batch_names.index(transform_batch))
            logits = self.module.decoder(z_cell[torch.from_numpy(rows)].to(self._device), batch.to(self._device))[0]
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
        ``given``): what the cells of ``given`` in its sample say of its place is what is expected there, and nothing of
        ``adata`` but its places is looked at before. Cells without counts are left out.

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
        for rows in minibatches(np.flatnonzero(section.cells.depth > 0), ROWS_AT_ONCE):
            index = torch.from_numpy(rows)
            prior = None if niche is None else (niche[0][index].to(self._device), niche[1][index].to(self._device))
            found.append(self.module.marginal_log_likelihood(section, rows, n_mc_samples, generator, prior).cpu())
        return float(torch.cat(found).double().mean())

    def _niche_given(self, adata: AnnData, given: AnnData) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and variance (cell, D) of z_niche at the places of ``adata`` given the counts of ``given`` alone."""
        sites = self.module.sites(self._read(given))
        n, asked = adata.n_obs, Sites(*(torch.zeros(adata.n_obs, self.module.shape.n_cell) for _ in range(2)))
        places = [read_places(table, self.setup) for table in (adata, given)]
        space = self.module.space(graphs_of(*(np.concatenate(pair) for pair in zip(*places, strict=True))))
        both = Sites(torch.cat([asked.target, sites.target]), torch.cat([asked.log_precision, sites.log_precision]))
        niche = self.module.solve(space, both, known=np.arange(n + given.n_obs) >= n)
        return niche.mean[:n], niche.variance[:n]

    def domains(
        self, k: int | None = None, adata: AnnData | None = None, seed: int = 0, smooth: bool = False
    ) -> np.ndarray:
        """Find ``k`` spatial domains by a Gaussian mixture on the dimensions of z_cell that vary in space, averaged
        over a cell and its 15 neighbours (on z_cell without coordinates).

        Without ``k`` the number with the best Bayesian information criterion is taken, 20 at most, a cell counting as
        much of an observation as it is of its neighbourhood. With ``smooth`` a Potts model of the labels on the graph
        decides with the mixture (``potts.smooth_labels``); a cell's average and those of its nearest neighbours are
        taken for one observation.
        Writes ``obs["spatial_domain"]`` and ``obsm["spatial_domain_probability"]``; returns int64 labels (cell,).
        """
        target = self.adata if adata is None else adata
        section = self._read(adata)
        graphs, latent = section.graphs, self._means(section)[1].numpy()
        if graphs is not None:
            near, latent = graphs.wide.adjacency(), latent[:, : self.module.shape.n_niche]
            latent = (latent + near @ latent) / (1 + graphs.wide.degree)[:, None]
        if k is None:
            k = analysis.choose_number(latent, 1.0 if graphs is None else 1 + float(graphs.wide.degree.mean()), seed)
        labels, probability = analysis.find_domains(latent, k, seed)
        if smooth and graphs is not None:
            from spatialvae.potts import smooth_labels

            odds = np.log(np.maximum(probability, 1e-12)) / (1 + graphs.near.degree.mean())
            labels, probability = smooth_labels(odds, graphs.near.adjacency(), seed=seed)
        target.obs[_keys.DOMAIN] = pd.Categorical([str(label) for label in labels], [str(i) for i in range(k)])
        target.obsm[_keys.DOMAIN_PROBABILITY] = probability
        return labels

    def save(self, folder: str | os.PathLike[str], overwrite: bool = False) -> None:
        """Write ``model.safetensors`` and ``model.json`` into ``folder``; other files there stay as they are.

        Raises InputError if either is there already, unless ``overwrite``. Interrupted, it leaves the old model, or two
        files that ``load`` tells apart.
        """
        from safetensors.torch import save_file

        folder = Path(folder)
        if folder.exists() and not folder.is_dir():
            raise InputError(f"{folder} is not a folder; name one for the model's files")
        there = [name for name in FILES if (folder / name).exists()]
        if there and not overwrite:
            raise InputError(f"{folder} has a {there[0]} already; pass overwrite=True to replace it")
        tensors = {name: value.detach().cpu().contiguous() for name, value in self.module.state_dict().items()}
        with whole(folder / "model.safetensors") as part:
            save_file(tensors, part)
            digest = _digest(part)
        about = {
            "format": FORMAT,
            "shape": asdict(self.module.shape),
            "setup": asdict(self.setup),
            "genes": list(self.genes),
            "batch_names": list(self.batch_names),
            "history": self.history.to_dict("list"),
            "sha256": digest,
        }
        with whole(folder / "model.json") as part:
            part.write_text(json.dumps(about, indent=1))

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
        model._read(adata, fresh=True)
        return model

    @property
    def _device(self) -> torch.device:
        return self.module.log_theta.device

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
    def _terms(self, adata: AnnData | None, seed: int) -> np.ndarray:
        """(cell, 3): log likelihood and the two divergences, negative; of cells that have counts."""
        section = self._read(adata)
        generator = torch.Generator().manual_seed(seed)
        niche = self.module.solve(section.space, self.module.sites(section))
        found = []
        for rows in minibatches(np.flatnonzero(section.cells.depth > 0), ROWS_AT_ONCE):
            terms = self.module.terms(section, rows, niche, self.module.noise(len(rows), generator))
            found.append(torch.stack([terms.log_likelihood, -terms.kl_cell, -terms.kl_niche], 1).cpu().numpy())
        return np.concatenate(found)


def _device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


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


def _digest(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _read_folder(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    for name in FILES:
        if not (folder / name).is_file():
            raise InputError(f"{folder} is not a saved model: it has no {name}")
    try:
        about = json.loads((folder / "model.json").read_text())
        tensors = load_file(folder / "model.safetensors")
    except (ValueError, OSError, SafetensorError) as error:
        raise InputError(f"{folder} cannot be read: {error}") from error
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        raise InputError(f"{folder}/model.json is not of format {FORMAT}")
    if about.get("sha256") != _digest(folder / "model.safetensors"):
        raise InputError(f"{folder}: model.safetensors is not the file that model.json tells of; save the model again")
    return about, tensors
