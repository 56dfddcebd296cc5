"""Speed and memory of SpatialVAE's training: python benchmarks/training_speed.py.

    --quick      2,000 cells, one run each
        --scvi       also scVI, in a separate environment (see benchmarks/peers/embed.py)
    --million    instead: `spatialvae train` for 10 epochs and `embed` on 10^6 cells

Writes benchmarks/results/training_speed.md, or training_million.md.

50,000 cells x 500 genes, NB, one hidden layer of 128, z of 10 dimensions, 2 threads. A run creates the model from a
table in memory and trains 10 epochs without held-out cells; the fastest of several runs counts, because the machine
may be shared. Trainings with the defaults, until they stop, are run once.
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
from tables import RESULTS, as_markdown

from spatialvae import SpatialVAE
from spatialvae._product import Linear
from spatialvae.data import build_graphs, minibatches
from spatialvae.encoder import log_normalised
from spatialvae.training import flattened, threads_for

HERE = Path(__file__).parent
RESULT = RESULTS / "training_speed.md"
MILLION = RESULTS / "training_million.md"
BATCHES = (128, 1024)
GENES, HIDDEN, LATENT = 500, 128, 10  # scVI's sizes
EPOCHS = 10
ROUNDS = 3  # interleaved, so that other load slows all methods alike
TIMES = 30
PEER = "scVI 1.4.2"


def tissue(n: int, seed: int = 0) -> anndata.AnnData:
    """Simulate cells of 12 types in patches of 4 mixtures; negative binomial counts, a quarter of them non-zero."""
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
    """Return the seconds of the fastest of some calls."""
    best = np.inf
    for _ in range(times):
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    return best


def cells_per_second(adata: anndata.AnnData, key: str | None, batch: int) -> float:
    """Return cells per second of a run: all cells of its epochs, divided by its time, model creation included."""
    start = time.perf_counter()
    model = made(adata, key)
    model.train(EPOCHS, batch_size=batch, held_out=0.0, patience=10**9, progress=False)
    return EPOCHS * adata.n_obs / (time.perf_counter() - start)


def made(adata: anndata.AnnData, key: str | None) -> SpatialVAE:
    SpatialVAE.setup_anndata(adata, spatial_key=key)
    return SpatialVAE(adata, n_latent=LATENT, n_hidden=HIDDEN, gene_likelihood="nb")  # as scVI's


def floor(batch: int) -> float:
    """Return cells per second if only the matrix products of the network without neighbours took time."""
    layers = [(GENES, LATENT + HIDDEN), (HIDDEN, 2 * LATENT), (LATENT, HIDDEN), (LATENT + HIDDEN, GENES)]
    seconds = 0.0
    for k, (inputs, outputs) in enumerate(layers):
        layer, x, pull = Linear(inputs, outputs), torch.rand(batch, inputs), torch.rand(batch, outputs)
        x.requires_grad_(k > 0)
        seconds += fastest(lambda layer=layer, x=x, pull=pull: layer(x).backward(pull), TIMES)  # type: ignore[misc]
    return batch / seconds


def parts(model: SpatialVAE, batch: int) -> dict[str, float]:
    """Return microseconds per cell for each part of a step, the fastest of ``TIMES``.

    Parts use the same cells again and again, whole steps new cells each time, which are not in the processor's cache.
    """
    from spatialvae import likelihoods

    module, section = model.module, model._section
    order = np.arange(model.adata.n_obs // batch * batch)
    steps = itertools.cycle(minibatches(order, batch, np.random.default_rng(0)))
    rows = next(steps)
    index = torch.from_numpy(rows)
    parameters, gradient = flattened(module)
    optimiser = torch.optim.Adam([parameters], 1e-9, fused=True)
    depth, batches = section.depth[index], section.batch[index]
    generator = torch.Generator().manual_seed(0)
    x = module.counts(section, rows)
    y = log_normalised(x, module.scale / depth)
    z_cell = torch.randn(batch, module.shape.n_cell, requires_grad=True)
    logits = module.decoder(z_cell, batches)[0].detach().requires_grad_()
    log_theta = module.log_theta.detach().clone().requires_grad_()

    with threads_for(batch * GENES):
        sites = module.sites(section)
        niche = module.solve(section.space, sites)

    def pulled(work: Callable[[], tuple[torch.Tensor, ...]]) -> Callable[[], None]:
        return lambda: sum(t.sum() for t in work()).backward()  # type: ignore[union-attr]

    def likelihood() -> tuple[torch.Tensor]:
        return (likelihoods.negative_binomial_of_logits(x, logits, depth, log_theta),)

    def step() -> None:
        noise = module.noise(batch, generator)
        gradient.zero_()
        (-module.terms(section, next(steps), niche, noise).elbo().sum() / batch).backward()
        gradient.norm()
        optimiser.step()

    work: dict[str, Callable[[], object]] = {
        "gather counts": lambda: module.counts(section, rows),
        "log of counts": lambda: log_normalised(x, module.scale / depth),
        "cell encoder, forward and backward": pulled(lambda: module.cell_encoder(y, batches)),
        "decoder, forward and backward": pulled(lambda: module.decoder(z_cell, batches)[:1]),
        "likelihood, forward and backward": pulled(likelihood),
        "optimiser": optimiser.step,
        "noise": lambda: module.noise(batch, generator),
        "zeroing of the gradient, its norm": lambda: gradient.zero_().norm(),
        "whole step": step,
    }
    with threads_for(batch * GENES):
        found = {name: 1e6 * fastest(do, TIMES) / batch for name, do in work.items()}
    whole = found.pop("whole step")
    rest = "draws, divergences, cold caches, rest"
    with threads_for(batch * GENES):
        renewal = 1e6 * fastest(lambda: module.solve(section.space, module.sites(section)), 3) / model.adata.n_obs
    return {**found, rest: whole - sum(found.values()), "whole step": whole, "solution for the niches, once": renewal}


def whole(adata: anndata.AnnData, key: str | None) -> float:
    """Return seconds of the creation of a model and its training with the defaults, until it stops."""
    start = time.perf_counter()
    made(adata, key).train(progress=False)
    return time.perf_counter() - start


def scvi_speed(table: Path, cache: Path, batch: int) -> float:
    """Return cells per second of scVI's run."""
    return EPOCHS * anndata.read_h5ad(table, backed="r").n_obs / scvi_seconds(table, cache, str(batch), str(EPOCHS))


def scvi_seconds(table: Path, cache: Path, *sizes: str) -> float:
    """Return seconds of scVI's run, see benchmarks/peers/scvi_speed.py."""
    command = [environment(cache, "scvi"), "-W", "ignore", HERE / "peers" / "scvi_speed.py", table, *sizes]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(json.loads(done.stdout.splitlines()[-1]))


ALONE = """
import resource, subprocess, sys
code = subprocess.run(sys.argv[1:]).returncode
print(code, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, file=sys.stderr)
"""  # a process starts with the peak of the one that starts it: this one is small


def peak(command: list[str]) -> tuple[float, float]:
    """Return minutes and peak GB of a command."""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", ALONE, *command], stderr=subprocess.PIPE, text=True, check=True)
    code, memory = done.stderr.splitlines()[-1].split()
    if code != "0":
        raise SystemExit(f"{command} ended with {code}: {done.stderr}")
    return (time.perf_counter() - start) / 60, int(memory) / 2**20


def million(n: int) -> str:
    """Return minutes and memory of both commands, and seconds of the graph."""
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
        f"{entries:.0f} genes detected per cell, a file of {size:.1f} GB, 2 cores; time of the whole command, with",
        "files, and memory of its process.\n",
        as_markdown(pd.DataFrame(rows)),
        f"\nGraph of 15 neighbours and symmetric graph of 6: {graph:.1f} s, the fastest of 3.",
    ]
    return "\n".join(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag in ("quick", "scvi", "million"):
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
    """Measure speed and parts of a step."""
    torch.set_num_threads(2)
    adata, n_rounds = (tissue(2_000), 1) if options.quick else (tissue(50_000), ROUNDS)
    kinds = {"SpatialVAE, without neighbours": None, "SpatialVAE, with neighbours": "spatial"}
    with tempfile.TemporaryDirectory() as folder:
        clocks = {name: partial(cells_per_second, adata, key) for name, key in kinds.items()}
        if options.scvi:
            file = Path(folder) / "table.h5ad"
            adata.write_h5ad(file)
            clocks[PEER] = partial(scvi_speed, file, options.cache)
        rounds = [{(name, b): clock(b) for name, clock in clocks.items() for b in BATCHES} for _ in range(n_rounds)]
        trainings = {name: whole(adata, key) for name, key in kinds.items()}
        if options.scvi:
            trainings[PEER] = scvi_seconds(file, options.cache)
    fast = {which: max(found[which] for found in rounds) for which in rounds[0]}
    speeds = [{"": name} | {f"minibatch {b}": fast[name, b] for b in BATCHES} for name in clocks]
    speeds.append({"": "matrix products alone"} | {f"minibatch {b}": floor(b) for b in BATCHES})
    steps = {
        f"{name}, {b}": {**parts(made(adata, key), b), "run": 1e6 / fast[name, b]}
        for name, key in kinds.items()
        for b in BATCHES
    }
    start = time.perf_counter()
    made(adata, "spatial")
    seconds = time.perf_counter() - start
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    table = pd.DataFrame(speeds)
    table[table.columns[1:]] = table[table.columns[1:]].round(-2).astype(int)
    breakdown = pd.DataFrame(steps).rename_axis("").reset_index().fillna(0).round(2)
    text = [
        "# Speed of training\n",
        f"Made by `python benchmarks/training_speed.py{' --quick' * options.quick}{' --scvi' * options.scvi}`.\n",
        f"{adata.n_obs:,} cells x {GENES} genes, NB, one hidden layer of {HIDDEN}, z of {LATENT} dimensions",
        f"(and at most 10 of z_niche), 2 threads; cells per second in the fastest of {n_rounds} interleaved runs of",
        f"{EPOCHS} epochs, including the creation of the model.\n",
        as_markdown(table),
        "\nCreation of the model and training with the defaults, until the evidence of held-out cells no longer",
        "increases; scVI stops by its own rule. Seconds of one run:\n",
        as_markdown(pd.DataFrame({"": list(trainings), "seconds": [round(each) for each in trainings.values()]})),
        f"\nMicroseconds per cell of one step, by part (fastest of {TIMES} each), and of a run:\n",
        as_markdown(breakdown),
        f"\nCreation of the model, with neighbours: {seconds:.1f} s.\n",
        f"\nPeak memory of this process, including table and libraries: {memory:.1f} GB.\n",
    ]
    return "\n".join(text)


if __name__ == "__main__":
    main()
