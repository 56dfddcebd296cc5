"""Speed and memory of SpatialVAE's training: python benchmarks/training_speed.py.

    --quick      5,000 cells
    --scvi       scVI beside it, in an environment of its own (see benchmarks/peers/embed.py)
    --patches    what minibatches of cells that lie together do to gradients, also on the bundled osmFISH section
    --million    instead: `spatialvae train` for 10 epochs and `embed` on 10^6 cells

Writes benchmarks/results/training_speed.md, or training_million.md.

50,000 cells x 500 genes, NB, one hidden layer of 128, z of 10 dimensions, 2 threads. Epochs are those of the training
loop, without held-out cells; of several the fastest counts: the machine may be shared.
"""

from __future__ import annotations

import argparse
import itertools
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import anndata
import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from peers.embed import CACHE, environment
from tables import as_markdown

from merfish import datasets
from spatialvae import SpatialVAE
from spatialvae._product import Linear
from spatialvae.data import along_curve, build_graphs, minibatches, with_neighbours
from spatialvae.encoder import log_normalised
from spatialvae.training import PATCH, Plan, flattened, threads_for, train

HERE = Path(__file__).parent
RESULT = HERE / "results" / "training_speed.md"
MILLION = HERE / "results" / "training_million.md"
BATCHES = (128, 1024)
GENES, HIDDEN, LATENT = 500, 128, 10  # scVI's sizes
EPOCHS = 10
ROUNDS = 3  # by turns, so that a busy machine slows all alike
TIMES = 30


def tissue(n: int, seed: int = 0) -> anndata.AnnData:
    """Cells of 12 types in patches of 4 mixtures; negative binomial counts, a quarter of them not zero."""
    rng = np.random.default_rng(seed)
    places = rng.uniform(0, np.sqrt(n), (n, 2))
    profiles = rng.gamma(0.3, 1, (12, GENES))
    profiles /= profiles.sum(1, keepdims=True)
    mixture = rng.dirichlet(np.full(12, 0.3), 4)[(places[:, 0] // 20 + 3 * (places[:, 1] // 30)).astype(int) % 4]
    kind = (rng.random((n, 1)) > mixture.cumsum(1)).sum(1).clip(0, 11)
    depth = rng.lognormal(5.5, 0.4, (n, 1))
    blocks = []
    for first in range(0, n, 5000):
        part = slice(first, first + 5000)
        mean = profiles[kind[part]] * depth[part]
        blocks.append(sp.csr_matrix(rng.poisson(mean * rng.gamma(2, 0.5, mean.shape)).astype(np.float32)))
    names = [f"c{i}" for i in range(n)], [f"g{i}" for i in range(GENES)]
    obs, var = (pd.DataFrame(index=index) for index in names)
    return anndata.AnnData(sp.vstack(blocks, format="csr"), obs, var, obsm={"spatial": places})


def fastest(work: Callable[[], object], times: int) -> float:
    """Seconds of the fastest of some calls."""
    best = np.inf
    for _ in range(times):
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    return best


def cells_per_second(model: SpatialVAE, batch: int) -> float:
    """Cells a second in the fastest epoch."""
    ends = [time.perf_counter()]
    plan = Plan(max_epochs=EPOCHS, batch_size=batch, held_out=0.0, patience=EPOCHS)
    train(model.module, model._section, plan, lambda *_: ends.append(time.perf_counter()))
    return model.adata.n_obs / float(np.diff(ends).min())


def floor(batch: int) -> float:
    """Cells a second if the matrix products of the network without neighbours were all there is."""
    layers = [(GENES, LATENT + HIDDEN), (HIDDEN, 2 * LATENT), (LATENT, HIDDEN), (LATENT + HIDDEN, GENES)]
    seconds = 0.0
    for k, (inputs, outputs) in enumerate(layers):
        layer, x, pull = Linear(inputs, outputs), torch.rand(batch, inputs), torch.rand(batch, outputs)
        x.requires_grad_(k > 0)
        seconds += fastest(lambda layer=layer, x=x, pull=pull: layer(x).backward(pull), TIMES)  # type: ignore[misc]
    return batch / seconds


def parts(model: SpatialVAE, batch: int) -> dict[str, float]:
    """Microseconds a cell of each part of a step, the fastest of ``TIMES``.

    Parts see the same cells again and again, whole steps other cells each time, not yet in the processor's cache.
    """
    from spatialvae import likelihoods

    module, section = model.module, model._section
    n, spatial = model.adata.n_obs, module.shape.n_niche > 0
    order = along_curve(section.cells.coordinates, section.cells.samples) if spatial else np.arange(n)
    order = order[: n // batch * batch]
    steps = itertools.cycle(minibatches(order, batch, PATCH if spatial else 1, np.random.default_rng(0)))
    rows = next(steps)
    index = torch.from_numpy(rows)
    parameters, gradient = flattened(module)
    optimiser = torch.optim.Adam([parameters], 1e-9, fused=True)
    depth, batches = section.depth[index], section.batch[index]
    generator = torch.Generator().manual_seed(0)
    x = module.counts(section, rows)
    y = log_normalised(x, module.scale / depth)
    z_cell = torch.randn(batch, module.shape.n_cell, requires_grad=True)
    z_niche = torch.randn(batch, module.shape.n_niche, requires_grad=True)
    logits = module.decoder(z_cell, z_niche, batches)[0].detach().requires_grad_()
    log_theta = module.log_theta.detach().clone().requires_grad_()

    def pulled(work: Callable[[], tuple[torch.Tensor, ...]]) -> Callable[[], None]:
        return lambda: sum(t.sum() for t in work()).backward()  # type: ignore[union-attr]

    def likelihood() -> tuple[torch.Tensor]:
        return (likelihoods.negative_binomial_of_logits(x, logits, depth, log_theta),)

    def step() -> None:
        noise = module.noise(batch, generator)
        gradient.zero_()
        (-module.terms(section, next(steps), noise).elbo().sum() / batch).backward()
        gradient.norm()
        optimiser.step()

    work: dict[str, Callable[[], object]] = {
        "gather counts": lambda: module.counts(section, rows),
        "log of counts": lambda: log_normalised(x, module.scale / depth),
        "cell encoder, forward and backward": pulled(lambda: module.cell_encoder(y)),
        "decoder, forward and backward": pulled(lambda: module.decoder(z_cell, z_niche, batches)[:1]),
        "likelihood, forward and backward": pulled(likelihood),
        "optimiser": optimiser.step,
        "noise": lambda: module.noise(batch, generator),
        "gradient to zero, its norm": lambda: gradient.zero_().norm(),
        "whole step": step,
    }
    if spatial:
        nodes = with_neighbours(rows, section.near.numpy(), section.scratch)[0]
        work["niche encoder, forward and backward"] = pulled(lambda: module.infer_niche(section, nodes))
    with threads_for(batch * GENES):
        found = {name: 1e6 * fastest(do, TIMES) / batch for name, do in work.items()}
    whole = found.pop("whole step")
    rest = "draws, divergences, caches that are cold, the rest"
    return {**found, rest: whole - sum(found.values()), "whole step": whole}


def patches(name: str, adata: anndata.AnnData, batch: int = 256) -> dict[str, object]:
    """Gradients of an epoch of minibatches made of patches against those made of random cells.

    The model is trained for 5 epochs, then held. ``difference``: of the two epochs' mean gradients, relative to the
    norm of the mean; each cell has the same noise in both. ``deviation``: root of the mean square distance of a
    minibatch's gradient from that mean, relative to its norm. ``nodes``: cells to be encoded, for each in a minibatch.
    """
    SpatialVAE.setup_anndata(adata, spatial_key="spatial")
    model = SpatialVAE(adata)
    module, section = model.module, model._section
    train(module, section, Plan(max_epochs=5, batch_size=batch, held_out=0.0), lambda *_: None)
    gradient = flattened(module)[1]
    noise = module.noise(adata.n_obs, torch.Generator().manual_seed(0))
    order = along_curve(section.cells.coordinates, section.cells.samples)
    order = order[: adata.n_obs // batch * batch]
    means, deviations, nodes = [], [], []
    for patch in (1, PATCH):
        batches = list(minibatches(order, batch, patch, np.random.default_rng(0)))
        each = np.empty((len(batches), len(gradient)), np.float32)
        for k, rows in enumerate(batches):
            gradient.zero_()
            (-module.terms(section, rows, noise[rows]).elbo().sum() / batch).backward()
            each[k] = gradient.numpy()
        nodes.append(np.mean([len(with_neighbours(r, section.near.numpy(), section.scratch)[0]) for r in batches]))
        means.append(each.mean(0, dtype=float))
        deviations.append(np.sqrt(((each - means[0]) ** 2).sum(1, dtype=float).mean()) / np.linalg.norm(means[0]))
    return {
        "table": name,
        "difference": np.linalg.norm(means[1] - means[0]) / np.linalg.norm(means[0]),
        "deviation, random": deviations[0],
        "deviation, patches": deviations[1],
        "nodes, random": nodes[0] / batch,
        "nodes, patches": nodes[1] / batch,
    }


def scvi_speed(table: Path, cache: Path, batch: int) -> float:
    """Cells a second in scVI's fastest epoch."""
    script = HERE / "peers" / "scvi_speed.py"
    command = [environment(cache, "scvi"), "-W", "ignore", script, table, str(batch), str(EPOCHS)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return anndata.read_h5ad(table, backed="r").n_obs / min(json.loads(done.stdout.splitlines()[-1]))


ALONE = """
import resource, subprocess, sys
code = subprocess.run(sys.argv[1:]).returncode
print(code, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, file=sys.stderr)
"""  # a process starts with the peak of the one that starts it: this one is small


def peak(command: list[str]) -> tuple[float, float]:
    """Minutes and peak GB of a command."""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", ALONE, *command], stderr=subprocess.PIPE, text=True, check=True)
    code, memory = done.stderr.splitlines()[-1].split()
    if code != "0":
        raise SystemExit(f"{command} ended with {code}: {done.stderr}")
    return (time.perf_counter() - start) / 60, int(memory) / 2**20


def million(n: int) -> str:
    """Minutes and memory of both commands, and seconds of the graph."""
    with tempfile.TemporaryDirectory() as name:
        folder, table = Path(name), Path(name) / "cells.h5ad"
        adata = tissue(n)
        adata.write_h5ad(table)
        places, entries = adata.obsm["spatial"], adata.X.nnz / n
        del adata
        cells = SimpleNamespace(coordinates=places, samples=np.zeros(n, int))
        graph = fastest(lambda: build_graphs(cells), 3)  # type: ignore[arg-type]
        commands = {
            "train, 10 epochs": ["train", str(table), "--out", str(folder / "run"), "--max-epochs", "10"],
            "embed": ["embed", str(table), "--model", str(folder / "run"), "--out", str(folder / "embedded.h5ad")],
        }
        rows = []
        for what, arguments in commands.items():
            minutes, memory = peak([sys.executable, "-m", "spatialvae.cli", *arguments])
            rows.append({"command": what, "minutes": round(minutes, 1), "peak GB": round(memory, 2)})
        size = table.stat().st_size / 2**30
    text = [
        f"# A table of {n:,} cells x {GENES} genes\n",
        "Made by `python benchmarks/training_speed.py --million`.\n",
        f"{entries:.0f} genes found in a cell, a file of {size:.1f} GB, 2 processor cores; the whole of each command,",
        "from the file to the file, the memory that of its process.\n",
        as_markdown(pd.DataFrame(rows)),
        f"\nGraph of 15 neighbours and symmetric graph of 6: {graph:.1f} s, the fastest of 3.",
    ]
    return "\n".join(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag in ("quick", "scvi", "patches", "million"):
        parser.add_argument(f"--{flag}", action="store_true")
    parser.add_argument("--cache", type=Path, default=CACHE)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.million:
        text = million(20_000 if options.quick else 1_000_000)
        out = options.out or MILLION
    else:
        text = speed(options)
        out = options.out or RESULT
    out.write_text(text.rstrip() + "\n")
    print(text)


def speed(options: argparse.Namespace) -> str:
    """Speed and parts of a step."""
    torch.set_num_threads(2)
    adata = tissue(5_000 if options.quick else 50_000)
    models = {}
    for key, name in ((None, "SpatialVAE, without neighbours"), ("spatial", "SpatialVAE, 15 neighbours")):
        SpatialVAE.setup_anndata(adata, spatial_key=key)
        models[name] = SpatialVAE(adata, n_latent=LATENT, n_hidden=HIDDEN)
    with tempfile.TemporaryDirectory() as folder:
        clocks = {name: partial(cells_per_second, model) for name, model in models.items()}
        if options.scvi:
            file = Path(folder) / "table.h5ad"
            adata.write_h5ad(file)
            clocks["scVI 1.4.2"] = partial(scvi_speed, file, options.cache)
        rounds = [{(name, b): clock(b) for name, clock in clocks.items() for b in BATCHES} for _ in range(ROUNDS)]
    fast = {which: max(found[which] for found in rounds) for which in rounds[0]}
    speeds = [{"": name} | {f"minibatch {b}": fast[name, b] for b in BATCHES} for name in clocks]
    speeds.append({"": "matrix products alone"} | {f"minibatch {b}": floor(b) for b in BATCHES})
    steps = {
        f"{name}, {b}": {**parts(models[name], b), "epoch": 1e6 / fast[name, b]} for name in models for b in BATCHES
    }
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    tables = {"osmFISH": datasets.osmfish(), "synthetic": adata} if options.patches else {}
    coherent = pd.DataFrame([patches(name, table) for name, table in tables.items()])
    table = pd.DataFrame(speeds)
    table[table.columns[1:]] = table[table.columns[1:]].round(-2).astype(int)
    breakdown = pd.DataFrame(steps).rename_axis("").reset_index().fillna(0).round(2)
    text = [
        "# Speed of training\n",
        f"Made by `python benchmarks/training_speed.py{' --scvi' * options.scvi}{' --patches' * options.patches}`.\n",
        f"{adata.n_obs:,} cells x {GENES} genes, NB, one hidden layer of {HIDDEN}, z of {LATENT} dimensions",
        f"(z_niche of at most 10 besides), 2 threads; cells a second in the fastest of {ROUNDS} x {EPOCHS} epochs.\n",
        as_markdown(table),
        f"\nMicroseconds a cell of one step, by part (fastest of {TIMES} each), and of an epoch:\n",
        as_markdown(breakdown),
        f"\nPeak memory of this process, with table and libraries: {memory:.1f} GB.\n",
    ]
    if len(coherent):
        note = "difference of mean gradients and deviation of minibatches relative to the mean; nodes encoded a cell"
        text += [f"\nMinibatches of 256 made of patches of {PATCH} cells: {note}:\n", as_markdown(coherent)]
    return "\n".join(text)


if __name__ == "__main__":
    main()
