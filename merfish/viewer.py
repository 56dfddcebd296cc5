"""View a run in napari: its layers as plain data, and a function that opens them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq

from merfish import results
from merfish._parquet import between, parts
from merfish.errors import InputError
from merfish.imaging.ngff import open_image
from merfish.mosaic import BRIGHTEST, Channel, lazy_mosaic
from merfish.pipeline.images import BITS, STAINS, image_folder, saved_channels
from merfish.plots import CATEGORIES
from merfish.report import OVERVIEW, read_overview, read_record

MOST_POINTS, MOST_OUTLINES = 1_000_000, 50_000  # largest numbers of molecules and cells that napari shows smoothly
COARSEST = 8  # downsampling of the coarsest image of a section
STAIN_COLOURS = ("blue", "green", "magenta", "cyan")
POINT_SIZE, LINE_WIDTH = 0.4, 0.2  # micrometre
Box = tuple[np.ndarray, np.ndarray] | None  # corners (x, y), micrometre; None: everything


@dataclass(frozen=True, eq=False)
class Layer:
    """Data of a layer and the options for napari; kind: "image", "points" or "vectors"."""

    kind: str
    data: Any
    options: dict[str, Any] = field(default_factory=dict)


def view(out: Path, fov: int | None = None) -> None:
    """Open napari with a field of a run, or the whole section, and wait until it is closed.

    Raises InputError if napari cannot be imported, or if the run has no such field.
    """
    try:
        import napari
    except ImportError as error:
        raise InputError(f"napari cannot be imported ({error}): pip install 'merfish[viewer]'") from error
    layers = layers_of_section(out) if fov is None else layers_of_field(out, fov)
    viewer = napari.Viewer(title=f"{out}" if fov is None else f"{out}, field {fov}")
    show(viewer, layers)
    napari.run()


def show(viewer: Any, layers: list[Layer]) -> None:
    """Add layers to a napari viewer."""
    for layer in layers:
        getattr(viewer, f"add_{layer.kind}")(layer.data, units="um", **layer.options)


def layers_of_field(out: Path, fov: int) -> list[Layer]:
    """Images, outlines and molecules of one field, stage coordinates in micrometres, axes (z,) y, x.

    The images are the bits and stains saved by ``--save-images``, or else the overview image. Raises InputError if the
    run has no such field.
    """
    run = read_record(out)
    if str(fov) not in run["fields"]:
        raise InputError(f"{out}: no results of field {fov}; the run has {_ends(run)}")
    scale, place = run["microns_per_pixel"], np.array(run["stage"]["positions"][fov], float)
    height, width = run["fields"][str(fov)]["shape"]
    box = place, place + scale * np.array([width, height])
    return [
        *_field_images(out, fov, scale, place[::-1].tolist(), run["z"]),
        *_outlines(out, box),
        *_molecules(out, box, len(run["z"]) > 1),
    ]


def layers_of_section(out: Path) -> list[Layer]:
    """Layers of all fields: saved stains and overview images, loaded lazily, outlines and molecules."""
    run = read_record(out)
    fovs = sorted(map(int, run["fields"]))
    if not fovs:
        raise InputError(f"{out}: no field of the run has results")
    places = np.array(run["stage"]["positions"], float)[fovs]
    return [
        *_section_images(out, fovs, places, run["microns_per_pixel"]),
        *_outlines(out, None),
        *_molecules(out, None, len(run["z"]) > 1),
    ]


def _ends(run: dict[str, Any]) -> str:
    fovs = sorted(map(int, run["fields"]))
    return f"fields from {fovs[0]} to {fovs[-1]}" if fovs else "none"


# --- images -------------------------------------------------------------------------------------------------------


def _field_images(out: Path, fov: int, scale: float, corner: list[float], planes: list[float]) -> list[Layer]:
    import dask.array as da

    layers = []
    if image_folder(out, fov).is_dir():
        saved_channels(out, fov)  # refuses images of another run
        z_step = float(np.median(np.diff(planes))) if len(planes) > 1 else 1.0
        for store in (STAINS, BITS):
            path = image_folder(out, fov) / store
            levels, names = open_image(path) if path.is_dir() else ([], [])
            flat = bool(levels) and levels[0].shape[1] == 1
            place = {"scale": [scale, scale], "translate": corner}
            if not flat:
                place = {"scale": [z_step, scale, scale], "translate": [planes[0], *corner]}
            for k, name in enumerate(names):
                stack = [da.from_array(level, chunks=level.chunks)[k] for level in levels]
                data = [level[0] for level in stack] if flat else stack
                limits = _limits(np.asarray(data[-1]))
                layers.append(_image(data, name, limits, _colour(k, store == STAINS), store == STAINS, **place))
    if not layers:
        picture = read_overview(results.field_folder(out, fov) / OVERVIEW)
        layers.append(_image([picture], BRIGHTEST, (0, 255), "gray", True, scale=[scale, scale], translate=corner))
    return layers


def _section_images(out: Path, fovs: list[int], places: np.ndarray, scale: float) -> list[Layer]:
    origin = places.min(axis=0)
    corners = (places - origin) / scale
    place = {"scale": [scale, scale], "translate": origin[::-1].tolist()}
    pictures = [read_overview(results.field_folder(out, fov) / OVERVIEW) for fov in fovs]
    steps = [step for step in (1, 2, 4, COARSEST) if step <= min(pictures[0].shape)]
    levels = [lazy_mosaic([picture[::step, ::step] for picture in pictures], corners / step) for step in steps]
    layers = [_image(levels, BRIGHTEST, (0, 255), "gray", True, **place)]
    if all((image_folder(out, fov) / STAINS).is_dir() for fov in fovs):
        for fov in fovs:
            saved_channels(out, fov)
        stores = [open_image(image_folder(out, fov) / STAINS) for fov in fovs]
        for k, name in enumerate(stores[0][1]):
            levels = [
                lazy_mosaic([Channel(found[level], names.index(name)) for found, names in stores], corners / 2**level)
                for level in range(len(stores[0][0]))
            ]
            limits = _limits(np.concatenate([np.asarray(found[-1][k]).ravel() for found, _ in stores[:50]]))
            layers.append(_image(levels, name, limits, _colour(k, True), False, **place))
    return layers


def _image(
    data: list[Any], name: str, limits: tuple[float, float], colour: str, visible: bool, **place: list[float]
) -> Layer:
    options: dict[str, Any] = {"name": name, "contrast_limits": limits, "colormap": colour, "visible": visible, **place}
    return Layer("image", data, {**options, "multiscale": True, "blending": "additive"})


def _colour(k: int, stain: bool) -> str:
    return STAIN_COLOURS[k % len(STAIN_COLOURS)] if stain else "gray"


def _limits(sample: np.ndarray) -> tuple[float, float]:
    low, high = np.percentile(sample, [1, 99.8]).tolist()
    return low, max(high, low + 1e-6)


# --- outlines and molecules ---------------------------------------------------------------------------------------


def _outlines(out: Path, box: Box) -> list[Layer]:
    """Outlines, as lines, of the cells whose centres lie in a box, or of all; only centres if there are too many."""
    import shapely

    columns = ["center_x", "center_y"]
    centres = _rows(out / results.CELLS, columns, "center", box)
    if not len(centres):
        return []
    if len(centres) > MOST_OUTLINES:
        options = {"name": "centres of cells", "size": 5.0, "face_color": "yellow", "border_width": 0}
        return [Layer("points", centres[columns[::-1]].to_numpy(), options)]
    table = _rows(out / results.CELLS, ["geometry"], "center", box)
    lines = edges(shapely.from_wkb(table["geometry"].to_numpy()))
    options = {"name": "cells", "edge_width": LINE_WIDTH, "edge_color": "yellow", "vector_style": "line"}
    return [Layer("vectors", lines, options)]


def edges(geometry: np.ndarray) -> np.ndarray:
    """Edges of polygons, (edge, 2, 2): start (y, x), and vector (y, x) to the end."""
    import shapely

    rings = shapely.get_rings(geometry)
    places, ring = shapely.get_coordinates(rings, return_index=True)
    same = ring[1:] == ring[:-1]
    start, way = places[:-1][same], np.diff(places, axis=0)[same]
    return np.stack([start[:, ::-1], way[:, ::-1]], axis=1)


def _molecules(out: Path, box: Box, deep: bool) -> list[Layer]:
    """Molecules of genes and of blanks in a box, or all; if there are too many, every n-th, as stated in the name."""
    axes = ["global_z", "global_y", "global_x"] if deep else ["global_y", "global_x"]
    calls, step = _sample(out / results.TRANSCRIPTS, [*axes, "gene", "is_blank", "probability"], box)
    layers = []
    for blank, name in ((False, "molecules"), (True, "blanks")):
        chosen = calls[calls["is_blank"].to_numpy(bool) == blank]
        options: dict[str, Any] = {"name": name + (f", one of {step}" if step > 1 else ""), "size": POINT_SIZE}
        options |= {"features": chosen[["gene", "probability"]].reset_index(drop=True), "border_width": 0}
        options |= {"face_color": "red"} if blank else {"face_color": "gene", "face_color_cycle": list(CATEGORIES)}
        if len(chosen):
            layers.append(Layer("points", chosen[axes].to_numpy(float), {**options, "visible": not blank}))
    return layers


def _sample(path: Path, columns: list[str], box: Box) -> tuple[pd.DataFrame, int]:
    """All molecules in a box, or about `MOST_POINTS` of the whole section; and n, if every n-th one is taken."""
    step = 1 if box else max(-(-pq.read_metadata(path).num_rows // MOST_POINTS), 1)
    if step == 1:
        return _rows(path, columns, "global", box), step
    some = [part.take(np.arange(0, len(part), step)).to_pandas() for part in parts(path, columns)]
    return pd.concat(some, ignore_index=True), step


def _rows(path: Path, columns: list[str], name: str, box: Box) -> pd.DataFrame:
    """Rows of a table whose positions lie in a box, or all rows."""
    return between(path, columns, name, *box) if box else pd.read_parquet(path, columns=columns)
