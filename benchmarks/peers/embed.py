"""Embeddings of peers for benchmarks/embedding.py --peers FOLDER, each made in an environment of its own.

    python benchmarks/peers/embed.py TABLE.h5ad FOLDER [--seeds 5] [--cache DIR]

Counts in X, places in obsm["spatial"]. Writes FOLDER/TABLE-METHOD-SEED.npy, leaving alone what is there already.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
METHODS = {
    "BANKSY": ("banksy", "banksy_niche.py"),
    "STAGATE": ("stagate", "stagate_niche.py"),
    "CellCharter": ("cellcharter", "cellcharter_niche.py"),
    "scVIVA": ("scvi", "scviva_niche.py"),
    "scVI": ("scvi", "scvi_latent.py"),
}


def environment(cache: Path, name: str) -> Path:
    """The interpreter of an environment with what NAME.txt pins, made when it is not there yet."""
    folder, pins = cache / name, HERE / f"{name}.txt"
    python, done = folder / "bin" / "python", folder / "installed.txt"
    if not (done.is_file() and done.read_text() == pins.read_text()):
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", "-r", str(pins)], check=True)
        done.write_text(pins.read_text())
    return python


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, default=5)
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "spatialvae-peers"
    parser.add_argument("--cache", type=Path, default=cache)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    for seed in range(options.seeds):
        for method, (name, script) in METHODS.items():
            out = options.folder / f"{options.table.stem}-{method}-{seed}.npy"
            if not out.exists():
                python = environment(options.cache, name)
                subprocess.run([python, "-W", "ignore", HERE / script, options.table, out, str(seed)], check=True)


if __name__ == "__main__":
    main()
