"""Compatibility with scvi-tools: advice on arguments with other names, and the return values of its methods."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pandas as pd
import torch

from spatialvae.errors import InputError
from spatialvae.module import Section, SpatialModule
from spatialvae.sampling import expected_counts
from spatialvae.setup import Setup

INSTEAD = {
    "check_val_every_n_epoch": "held-out cells are evaluated every 100 steps",
    "continuous_covariate_keys": "only batch_key is corrected for",
    "categorical_covariate_keys": "only batch_key is corrected for: combine the categories in one column of obs",
    "datamodule": "for tables larger than memory, use a backed AnnData",
    "devices": "start one process per device with torchrun",
    "dispersion": "there is one inverse dispersion per gene",
    "dropout_rate": "parameters have a Gaussian prior instead",
    "early_stopping_patience": "use patience=, in steps",
    "enable_progress_bar": "use progress=",
    "latent_distribution": "latents are normal",
    "n_epochs": "use max_epochs=",
    "n_epochs_kl_warmup": "use warm_up=, in steps",
    "n_layers": "each network has one hidden layer of n_hidden units",
    "n_steps_kl_warmup": "use warm_up=",
    "plan_kwargs": "use learning_rate= or warm_up=",
    "size_factor_key": "the size factor of a cell is its total count",
    "use_gpu": "use accelerator='gpu'",
    "validation_size": "use held_out= or train_size=",
}


def refuse(given: Mapping[str, Any], where: str) -> None:
    """Raise InputError if ``given``, unknown arguments of ``where``, is not empty; the message says what to use."""
    for name in given:
        advice = INSTEAD.get(name, "see its documentation")
        raise InputError(f"{where} has no argument {name!r}: {advice}")


def device_of(accelerator: str) -> torch.device:
    """The device with the name ``accelerator``: "cpu", "gpu", "cuda", "cuda:1".

    Raises InputError for unknown names and devices that cannot be used.
    """
    try:
        device = torch.device("cuda" if accelerator == "gpu" else accelerator)
        tensor = torch.empty(0, device=device)
        tensor.cpu()  # "meta" has no values
        return tensor.device
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device {accelerator!r} cannot be used: {str(error).splitlines()[0]}") from error


def described(setup: Setup, cells: int, genes: int, batches: tuple[str, ...]) -> str:
    """The arguments of ``setup_anndata``, one per line."""
    where = {
        "layer": f"layers[{setup.layer!r}]" if setup.layer else "X",
        "spatial_key": f"obsm[{setup.spatial_key!r}]" if setup.spatial_key else "none: cells without coordinates",
        "sample_key": f"obs[{setup.sample_key!r}]" if setup.sample_key else "none: one section",
        "batch_key": f"obs[{setup.batch_key!r}], {len(batches)} batches" if setup.batch_key else "none",
        "labels_key": f"obs[{setup.labels_key!r}]" if setup.labels_key else "none",
    }
    lines = [f"{name:12} {value}" for name, value in where.items()]
    measured = "in the likelihood" if setup.measurement else "not modelled"
    return "\n".join([f"{cells} cells, {genes} genes", *lines, f"{'measurement':12} {measured}"])


def likelihood_parameters(
    module: SpatialModule,
    section: Section,
    draws: Iterator[tuple[np.ndarray, torch.Tensor]],
    give_mean: bool,
) -> dict[str, np.ndarray]:
    """``mean`` of counts before additional zeros, ``dispersions`` (inverse dispersion, not for "poisson") and
    ``dropout`` (logits of additional zeros, for "zinb"): (cell, gene), averaged over draws of z_cell, or
    (sample, cell, gene) without ``give_mean``."""
    means: list[np.ndarray] = []
    zeros: list[np.ndarray] = []
    for rows, z_cell in draws:
        found = [expected_counts(module, section, rows, z) for z in z_cell]
        for parts, values in zip((means, zeros), zip(*found, strict=True), strict=True):
            stacked = torch.stack(values).cpu().numpy()
            parts.append(stacked.mean(0) if give_mean else stacked)
    parameters = {"mean": np.concatenate(means, -2)}
    if module.shape.likelihood != "poisson":
        theta = module.bounded_log_theta.detach().exp().cpu().numpy()
        parameters["dispersions"] = np.broadcast_to(theta, parameters["mean"].shape)
    if module.shape.likelihood == "zinb":
        zero = np.concatenate(zeros, -2)
        parameters["dropout"] = np.log(zero) - np.log1p(-zero)
    return parameters


def correlations(values: np.ndarray, kind: str, genes: list[str]) -> pd.DataFrame:
    """Correlations (gene, gene) over the rows of ``values`` (row, gene); ``kind`` is "spearman" or "pearson"."""
    if kind not in ("spearman", "pearson"):
        raise InputError(f"correlation_type is {kind!r}; expected 'spearman' or 'pearson'")
    if kind == "spearman":
        from scipy.stats import rankdata

        values = rankdata(values, axis=0)
    return pd.DataFrame(np.corrcoef(values, rowvar=False), index=genes, columns=genes)
