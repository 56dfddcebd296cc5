"""Cells from other programs for decoded molecules: real outlines, and memory and time of large sections.

    python benchmarks/exchange.py [--cells 10000 100000 1000000] [--data ../shared/data]

Writes results/exchange.md. The runs contain only molecules (fields of 1000 cells, 50 molecules per cell, three of four
are genes), as `merfish run` writes them; the report is not written. Label images are discs on a grid, as tiled TIFF.
Each size runs in a separate process.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing as mp
import tempfile
import time
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import shapely
import tifffile
from memory import peak_bytes
from scipy.sparse import csr_matrix
from tables import RESULTS, as_markdown

from merfish import results
from merfish._files import write_json
from merfish.cells.counts import word_var, write_cells
from merfish.codebook import Codebook, mhd4_codebook
from merfish.exchange.labels import read_label_outlines
from merfish.pipeline import assign as assigning
from merfish.pipeline.tables import transcript_schema
from merfish.transcripts import transcript_table

HERE = Path(__file__).parent
CELLS_A_FIELD, MOLECULES_A_CELL = 1000, 50
TILE = 64  # pixels; side of a cell in a label image
PITCH = 10.0  # micrometres between cells
SCALE = 0.108
COST = ("CPU seconds", "peak memory [GB]")


def write_run(
    out: Path, book: Codebook, positions: np.ndarray, shape: tuple[int, int], scale: float, calls: list
) -> None:
    """Write a finished run with molecules only; calls: for each field words, and x, y in micrometres (molecule,)."""
    out.mkdir(parents=True)
    schema, n = transcript_schema(book), 0
    with pq.ParquetWriter(out / results.TRANSCRIPTS, schema) as file:
        for fov, make in enumerate(calls):
            word, x, y = make()
            left, top = positions[fov]
            pixels = {"x": (x - left) / scale, "y": (y - top) / scale}
            micrometres = {"global_x": x, "global_y": y, "global_z": 0.0}
            told = {"hamming_distance": 0, "intensity": 1.0, "probability": 0.9, "fov": fov}
            ids = np.arange(n, n + len(word))
            table = transcript_table(book, word, transcript_id=ids, **pixels, **micrometres, **told)
            file.write_table(pa.Table.from_pandas(table, schema, preserve_index=False))
            n += len(word)
    var = word_var(book).assign(sequential=False)
    anndata.AnnData(csr_matrix((0, book.n_words), dtype=np.int32), var=var).write_h5ad(out / results.CELL_BY_GENE)
    record = {
        "figures": {"n_kept": n},
        "fields": {str(fov): {"shape": shape, "n_outlines": 0} for fov in range(len(positions))},
        "failed": {},
        "bits": {"names": book.bit_names},
        "codebook": {"names": book.names, "words": ["".join(map(str, word)) for word in book.words.tolist()]},
        "microns_per_pixel": scale,
        "z": [0.0],
        "stage": {"positions": positions.tolist()},
    }
    write_json(out / results.RUN, record)


def assign(out: Path, segmentation: Path) -> None:
    """Run `merfish assign` without the report, which such a run cannot fill."""
    assigning.write_run_report = lambda *_: None  # type: ignore[assignment]
    assigning.assign(out, segmentation)


def u2os(data: Path, folder: Path) -> tuple[int, float]:
    """Return the number of molecules of the U-2 OS cells, and the share assigned to the same cell as by the authors."""
    table = anndata.read_h5ad(data / "molecules" / "u2os_merfish_sample.h5ad")
    points = table.uns["points"]
    cells = table.obs_names.tolist()
    features = [
        {"type": "Feature", "id": name, "geometry": json.loads(shapely.to_geojson(shapely.from_wkt(str(outline))))}
        for name, outline in table.obs["cell_shape"].items()
    ]
    (folder / "cells.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    genes = sorted(points["gene"].astype(str).unique())
    book = mhd4_codebook(genes[:140], 16)
    book = Codebook(tuple(genes), tuple(genes), book.words[: len(genes)], book.bit_names)
    words = pd.Categorical(points["gene"].astype(str), genes).codes.astype(np.int32)
    places = points[["x", "y"]].to_numpy(float)
    write_run(folder / "run", book, np.zeros((1, 2)), (2048, 2048), 1.0, [lambda: (words, places[:, 0], places[:, 1])])
    assign(folder / "run", folder / "cells.geojson")
    found = pd.read_parquet(folder / "run" / results.TRANSCRIPTS)["cell_id"].to_numpy()
    named = pd.read_parquet(folder / "run" / results.CELLS).set_index("cell_id")["name"]
    assert sorted(named) == sorted(cells)
    ours = named.reindex(found).to_numpy()
    return len(points), float((ours == points["cell"].astype(str).to_numpy()).mean())


def large(n_cells: int, queue: mp.Queue) -> None:
    """Measure seconds and peak memory of cells and molecules on a grid of fields, and check every count."""
    rng = np.random.default_rng(0)
    n_fields = n_cells // CELLS_A_FIELD
    across, side = int(np.ceil(np.sqrt(n_fields))), int(np.sqrt(CELLS_A_FIELD)) + 1
    size = side * PITCH
    positions = np.array([(k % across * size, k // across * size) for k in range(n_fields)], float)
    book = mhd4_codebook([f"g{k}" for k in range(105)], 16)
    angle = np.linspace(0, 2 * np.pi, 33)[:-1]
    grid = np.stack(np.meshgrid(np.arange(side), np.arange(side)), -1).reshape(-1, 2)[:CELLS_A_FIELD]
    centres = (positions[:, None] + (grid + 0.5) * PITCH).reshape(-1, 2)
    rings = centres[:, None] + 4.0 * np.stack([np.cos(angle), np.sin(angle)], -1)

    def make(fov: int):
        middle = np.repeat(centres[fov * CELLS_A_FIELD : (fov + 1) * CELLS_A_FIELD], MOLECULES_A_CELL, axis=0)
        # half the side of a square that contains the circle around each cell in the ratio 1 : 4 / pi
        place = middle + rng.uniform(-4.5, 4.5, middle.shape)
        return rng.integers(0, 140, len(middle)).astype(np.int32), *place.T

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cells = pd.DataFrame({"cell_id": np.arange(1, n_cells + 1), "geometry": shapely.polygons(rings)})
        write_cells(cells, folder / "cells.parquet")
        pixels = int(size / SCALE)
        calls = [lambda fov=fov: make(fov) for fov in range(n_fields)]
        write_run(folder / "run", book, positions, (pixels, pixels), SCALE, calls)
        del cells, rings
        made = mp.get_context("spawn").Process(target=_assign_and_tell, args=(folder, queue))
        made.start()
        made.join()


def _assign_and_tell(folder: Path, queue: mp.Queue) -> None:
    started, began = time.perf_counter(), time.process_time()
    assign(folder / "run", folder / "cells.parquet")
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - began
    peak = peak_bytes() / 1e9
    table = anndata.read_h5ad(folder / "run" / results.CELL_BY_GENE)
    molecules = pq.read_table(folder / "run" / results.TRANSCRIPTS, columns=["cell_id"])["cell_id"].to_numpy()
    right = int(table.X.sum()) == int((molecules >= 0).sum())
    queue.put((table.n_obs, len(molecules), float((molecules >= 0).mean()), right, seconds, cpu_seconds, peak))


def label_image(pixels: int, queue: mp.Queue) -> None:
    """Measure size on disk, cells, seconds and peak memory for the outlines of a label image of pixels x pixels."""
    place = np.arange(TILE) - TILE / 2 + 0.5
    disc = np.hypot(place, place[:, None]) < 0.45 * TILE
    across = pixels // TILE
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "labels.tif"
        tiles = (disc * np.uint32(label) for label in range(1, across**2 + 1))
        layout = {"tile": (TILE, TILE), "compression": "zlib", "photometric": "minisblack"}
        tifffile.imwrite(path, tiles, shape=(across * TILE, across * TILE), dtype=np.uint32, **layout)
        began = time.process_time()
        found = len(read_label_outlines(path)[1])
        seconds = time.process_time() - began
        peak = peak_bytes() / 1e9
        queue.put((pixels, pixels**2 * 4 / 1e9, path.stat().st_size / 1e6, found, found == across**2, seconds, peak))


def apart(work: Any, size: int) -> tuple:
    """Return what a function puts into its queue, run in a separate process."""
    context = mp.get_context("spawn")
    queue: mp.Queue = context.Queue()
    made = context.Process(target=work, args=(size, queue))
    made.start()
    made.join()
    return queue.get()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--pixels", type=int, nargs="+", default=[8_192, 32_768])
    parser.add_argument("--data", type=Path, default=HERE.parent.parent / "shared" / "data")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        n, share = u2os(options.data, Path(folder))
    rows = []
    for n_cells in options.cells:
        queue: mp.Queue = mp.get_context("spawn").Queue()
        large(n_cells, queue)
        rows.append(queue.get())
    images = pd.DataFrame(
        [apart(label_image, pixels) for pixels in options.pixels],
        columns=["pixels along a side", "in memory [GB]", "file [MB]", "cells", "all found", *COST],
    )
    columns = ["cells", "molecules", "share in cells", "counts add up", "seconds", *COST]
    table = pd.DataFrame(rows, columns=columns)
    sizes = f"--cells {' '.join(map(str, options.cells))} --pixels {' '.join(map(str, options.pixels))}"
    page = f"""# Cells from other programs

    python benchmarks/exchange.py {sizes}

## Real outlines

U-2 OS (bento-tools): with the authors' outlines as GeoJSON, `merfish assign` assigns {share:.3%} of {n:,} molecules to
the same cell as the authors.

## Large sections

`merfish assign` of outlines with 32 corners in one GeoParquet file, one process: reading cells, assigning molecules,
and writing the tables. A circle covers {np.pi * 16 / 81:.1%} of the square in which the molecules of its cell lie.

{as_markdown(table)}

## Label images of large sections

Outlines of a uint32 label image in a tiled TIFF (zlib), which is read in blocks of rows.

{as_markdown(images)}
"""
    (RESULTS / "exchange.md").write_text(page)
    print(page)


if __name__ == "__main__":
    main()
