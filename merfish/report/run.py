"""A finished run, as the sections of its report use it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from merfish import results
from merfish._parquet import read_table
from merfish.errors import InputError
from merfish.report.summary import Molecules, field_table, sum_molecules

OVERVIEW, STAINS = "overview.npy", "stains.npz"  # files of each field
MOST_OUTLINED = 10_000  # cells; outlines of more would be as small as pixels


@dataclass(frozen=True, eq=False)
class Run:
    """A finished run: its folder, the folder of its results (not yet published, possibly), and its record."""

    out: Path
    stage: Path
    record: dict[str, Any]

    @property
    def is_blank(self) -> np.ndarray:
        """(word,) bool."""
        return np.array(self.record["codebook"]["is_blank"], bool)

    @cached_property
    def fovs(self) -> np.ndarray:
        """Fields with results, ascending."""
        return np.sort(np.array([int(fov) for fov in self.record["fields"]], int))

    @property
    def places(self) -> np.ndarray:
        """Corrected positions (field, 2) of the fields with results, x and y in micrometres."""
        return np.array(self.record["stage"]["positions"], float).reshape(-1, 2)[self.fovs]

    @property
    def size(self) -> tuple[float, float]:
        """(x, y) of a field, in micrometres."""
        height, width = next((field["shape"] for field in self.record["fields"].values()), (1, 1))
        return width * self.record["microns_per_pixel"], height * self.record["microns_per_pixel"]

    @property
    def corners(self) -> tuple[np.ndarray, np.ndarray]:
        """First and last corner (x, y) of the section, in micrometres."""
        places = self.places if len(self.fovs) else np.zeros((1, 2))
        return places.min(axis=0), places.max(axis=0) + self.size

    @cached_property
    def molecules(self) -> Molecules:
        """Sums over the kept molecules."""
        return sum_molecules(self.stage / results.TRANSCRIPTS, self.fovs, self.is_blank, *self.corners)

    @cached_property
    def fields(self) -> pd.DataFrame:
        """See `field_table`."""
        return field_table(self.record, self.molecules)

    @cached_property
    def outlines(self) -> np.ndarray | None:
        """Outlines (cell,) of the cells, shapely, in micrometres; None if there are too many to draw."""
        import shapely

        if self.record["figures"]["n_cells"] > MOST_OUTLINED:
            return None
        column = read_table(self.stage / results.CELLS, ["geometry"])["geometry"]
        return np.asarray(shapely.from_wkb(column.to_numpy(zero_copy_only=False)), object)


def read_record(folder: Path) -> dict[str, Any]:
    """Read the record of a run. Raises InputError if there is none, or if an older version wrote it."""
    record = results.read_run(folder)
    if "microns_per_pixel" not in record:
        raise InputError(f"{folder / results.RUN}: written by an older version; run again into the same folder")
    return record


def read_overview(path: Path) -> np.ndarray:
    """Map the overview image of a field into memory, uint8 (y, x). Raises InputError if it is damaged."""
    try:
        image: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{path}: damaged ({error}); run again into the same folder") from error
    return image
