"""Results of other tools for benchmarks/embedding.py --peers FOLDER, each in a separate environment.

    python benchmarks/peers/embed.py TABLE.h5ad FOLDER [--seeds 5] [--methods scVI ...] [--cache DIR]

Counts in X, coordinates in obsm["spatial"]. Writes FOLDER/TABLE-METHOD-SEED.npy; existing files are kept. The files
NAME.txt in this folder pin the packages of each environment. benchmarks/heldout.py, distribution.py and batches.py use
the other methods.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

HERE = Path(__file__).parent
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "spatialvae-peers"
DOMAINS = {
    "BANKSY": ("banksy", "banksy_niche.py"),
    "STAGATE": ("stagate", "stagate_niche.py"),
    "CellCharter": ("cellcharter", "cellcharter_niche.py"),
    "scVIVA": ("scvi", "scviva_niche.py"),
    "scVI": ("scvi", "scvi_latent.py"),
}
COUNTS = {  # of tables with obs["held_out"] and layers["thinned"]
    "scVI_heldout": ("scvi", "scvi_heldout.py"),
    "scVI_thinned": ("scvi", "scvi_thinned.py"),
}
FITTED = {  # of tables with the columns that each of them names
    "scVI_panel": ("scvi", "scvi_panel.py"),
    "scVI_de": ("scvi", "scvi_de.py"),
    "scVI_batches": ("scvi", "scvi_batches.py"),
}
METHODS = DOMAINS | COUNTS | FITTED


def environment(cache: Path, name: str) -> Path:
    """Return the interpreter of the environment with the packages in NAME.txt; create it if it does not exist."""
    folder, pins = cache / name, HERE / f"{name}.txt"
    python, done = folder / "bin" / "python", folder / "installed.txt"
    if not (done.is_file() and done.read_text() == pins.read_text()):
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", "-r", str(pins)], check=True)
        done.write_text(pins.read_text())
    return python


def deliver(table: Path, folder: Path, methods: Iterable[str], seeds: int, cache: Path) -> None:
    """Write FOLDER/TABLE-METHOD-SEED.npy for every method and seed, unless it exists."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed in range(seeds):
        for method in methods:
            name, script = METHODS[method]
            out = folder / f"{table.stem}-{method}-{seed}.npy"
            if not out.exists():
                python = environment(cache, name)
                subprocess.run([python, "-W", "ignore", HERE / script, table, out, str(seed)], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(DOMAINS))
    parser.add_argument("--cache", type=Path, default=CACHE)
    options = parser.parse_args()
    deliver(options.table, options.folder, options.methods, options.seeds, options.cache)


if __name__ == "__main__":
    main()
