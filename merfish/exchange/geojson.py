"""GeoJSON: outlines as read and written by QGIS, QuPath, Baysor and proseg."""

from __future__ import annotations

import gzip
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import shapely
from shapely.geometry import shape

from merfish._files import plain
from merfish._text import shown
from merfish.errors import InputError
from merfish.exchange.run import cell_tables

CHUNK = 1 << 22  # characters
NAMES = (
    "cell_id",
    "EntityID",
    "cell",
    "id",
    "label",
    "name",
)  # properties that name a cell in other tools
_LIST = re.compile(r'"(?:features|geometries)"\s*:\s*\[')
_BETWEEN = " \t\r\n,\x1e"


def read_geojson(path: str | os.PathLike[str]) -> tuple[list[Any], np.ndarray]:
    """Read names and outlines (cell,) from a FeatureCollection, Baysor's GeometryCollection, or one feature per line.

    The file may be compressed. The name is the id of the feature or the property that names the cell, else None.
    Features are parsed one at a time. Raises InputError naming a feature that is not a polygon.
    """
    names, outlines = [], []
    try:
        with _open(Path(path)) as file:
            for k, feature in enumerate(_objects(file)):
                geometry = feature.get("geometry", feature) if isinstance(feature, Mapping) else None
                kind = geometry.get("type") if isinstance(geometry, dict) else None
                if not isinstance(geometry, dict) or kind not in ("Polygon", "MultiPolygon"):
                    raise InputError(f"{path}: feature {k + 1}: expected a Polygon or MultiPolygon, got {shown(kind)}")
                try:
                    outlines.append(shape(geometry))
                except (ValueError, TypeError, KeyError, IndexError, shapely.errors.ShapelyError) as error:
                    raise InputError(
                        f"{path}: feature {k + 1}: its coordinates do not form a polygon: {error}"
                    ) from error
                names.append(_name(feature))
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as GeoJSON: {error}") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: feature {len(names) + 1}: not JSON: {error}") from error
    return names, np.array(outlines, dtype=object)


def _open(path: Path) -> IO[str]:
    return gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else open(path, encoding="utf-8-sig")


def _objects(file: IO[str]) -> Iterator[Any]:
    """Yield the items of a collection, or the objects of a sequence, one at a time."""
    decoder = json.JSONDecoder()
    text = file.read(CHUNK)
    found = _LIST.search(text)
    text = text[found.end() :] if found else text
    place, ended = 0, False
    while True:
        while place < len(text) and text[place] in _BETWEEN:
            place += 1
        if place < len(text) and not (found and text[place] == "]"):
            try:
                item, place = decoder.raw_decode(text, place)
                yield item
                continue
            except json.JSONDecodeError:
                if ended:
                    raise
        elif place < len(text) or ended:
            if found and place >= len(text):
                raise ValueError("the file ends within the collection")
            return
        more = file.read(CHUNK)
        text, place, ended = text[place:] + more, 0, not more


def _name(feature: Mapping[str, Any]) -> Any:
    places = (feature.get("properties") or {}, feature, feature.get("geometry") or {})
    return next((place[name] for place in places for name in NAMES if place.get(name) is not None), None)


def write_geojson(run: Path, out: Path) -> None:
    """Write the cells of a run as a FeatureCollection in micrometres; the columns of the cells become properties."""
    with open(out, "w", encoding="utf-8") as file:
        file.write('{"type": "FeatureCollection", "features": [')
        between = "\n"
        for cells in cell_tables(run):
            outlines = shapely.to_geojson(cells.pop("geometry").to_numpy(object))
            for outline, said in zip(outlines, cells.to_dict("records"), strict=True):
                properties = json.dumps(plain(said), allow_nan=False)
                file.write(f'{between}{{"type": "Feature", "properties": {properties}, "geometry": {outline}}}')
                between = ",\n"
        file.write("\n]}\n")
