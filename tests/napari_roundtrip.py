"""napari-spatialdata displays the SpatialData store of a run; run by `.ci/napari`."""

from __future__ import annotations

import os
import time

import anndata
import numpy as np
import pandas as pd
import pytest
import spatialdata

os.environ.setdefault("QT_QPA_PLATFORM", "offscreen")

from napari_spatialdata import Interactive
from qtpy.QtWidgets import QApplication

from merfish import results
from merfish.exchange.spatialdata import write_spatialdata
from merfish.mosaic import section_images


@pytest.fixture
def layer(done, tmp_path):
    """Add an element of the store to a viewer without a window, and return its layer."""
    write_spatialdata(done, tmp_path / "run.zarr", section_images(done))
    viewer = Interactive(spatialdata.read_zarr(tmp_path / "run.zarr"), headless=True)

    def added(element):
        viewer.add_element(element, "global")
        end = time.monotonic() + 120
        while viewer.get_layer(element) is None or viewer._sdata_widget.worker_thread.isRunning():
            assert time.monotonic() < end
            QApplication.processEvents()
            time.sleep(0.02)  # layers are loaded in a thread, which needs the interpreter
        return viewer.get_layer(element)

    return added


def test_cells_molecules_and_the_overview_share_a_frame(done, layer):
    cells = anndata.read_h5ad(done / results.CELL_BY_GENE).obsm["spatial"]
    calls = pd.read_parquet(done / results.TRANSCRIPTS)
    outlines, molecules, overview = layer("cells"), layer("transcripts"), layer("overview")
    assert len(outlines.data) == len(cells)
    assert len(molecules.data) == len(calls)
    for places, shown in ((cells, outlines), (calls[["global_x", "global_y"]].to_numpy(), molecules)):
        low, high = shown.extent.world[:, -2:]  # y, x
        assert (low <= places[:, ::-1].min(axis=0) + 1e-3).all()
        assert (high >= places[:, ::-1].max(axis=0) - 1e-3).all()
    low, high = overview.extent.world[:, -2:]
    np.testing.assert_array_less(low, molecules.extent.world[0, -2:])
    np.testing.assert_array_less(molecules.extent.world[1, -2:], high)
