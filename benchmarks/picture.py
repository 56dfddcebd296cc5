"""The picture of the README, from the results of ``merfish demo``: python benchmarks/picture.py demo_output."""

from __future__ import annotations

import sys
from pathlib import Path

import anndata
import numpy as np
import shapely
from tables import RESULTS

from merfish import plots, results
from merfish.cells.counts import read_cells
from merfish.transcripts import read_transcripts


def main(demo: Path) -> None:
    """Draw molecules of one field, enlarged, next to the cells coloured by their domain."""
    run = demo / "tissue_run"
    calls = read_transcripts(run / results.TRANSCRIPTS)
    fov = int(calls["fov"].value_counts().idxmax())
    image = np.load(results.field_folder(run, fov) / "overview.npy", allow_pickle=False)
    calls = calls[calls["fov"] == fov]
    square = plots.densest_square(calls, image.shape)
    figure, (left, middle, right) = plots.new_figure(15, 5, 3)
    plots.draw_field(left, image, calls, square)
    plots.draw_detail(middle, image, calls, square)
    left.set_title("one field, brightest bit, molecules called", fontsize=10)
    middle.set_title("enlarged", fontsize=10)
    cells = read_cells(run / results.CELLS).set_index("cell_id")
    table = anndata.read_h5ad(demo / "tissue_embedded.h5ad")
    kinds = table.obs["spatial_domain"].astype(str).to_numpy()
    for kind, colour in plots.colours_of(kinds).items():
        for shape in cells.loc[table.obs["cell_id"].to_numpy()[kinds == kind], "geometry"]:
            for part in shapely.get_parts(shape):
                right.fill(*np.array(part.exterior.coords).T, color=colour, edgecolor="#334155", linewidth=0.3)
    right.set(aspect="equal", xticks=[], yticks=[])
    right.invert_yaxis()
    right.spines[:].set_visible(False)
    right.set_title("cells, coloured by the domain found from counts and positions", fontsize=10)
    figure.savefig(RESULTS / "demo.png", metadata={"Software": None})


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "demo_output"))
