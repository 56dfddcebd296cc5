from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import shapely
import tifffile
from hypothesis import given
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter
from skimage.draw import disk

import reference
from merfish.cells import merging
from merfish.cells.counts import assign_cells, count_table, read_cells, write_cells
from merfish.cells.merging import field_frame, in_stage_frame, number_cells, same_cells
from merfish.cells.segmentation import outlines, segment
from merfish.codebook import mhd4_codebook
from merfish.errors import InputError
from merfish.simulate import simulate_experiment

BOOK = mhd4_codebook(["A", "B", "C"], n_bits=8)
SQUARES = np.array([shapely.box(0, 0, 2, 2), shapely.box(2, 0, 4, 2), shapely.box(1, 1, 5, 5)], dtype=object)
MPP = 0.108


def cell_rows(polygons, ids):
    center = shapely.get_coordinates(shapely.centroid(polygons))
    return pd.DataFrame(
        {"cell_id": ids, "fov": 0, "center_x": center[:, 0], "center_y": center[:, 1],
         "volume": shapely.area(polygons), "geometry": polygons}
    )  # fmt: skip


# --- molecules to cells ---------------------------------------------------------------------------------------


def test_assign_cells__by_hand():
    x = [0.5, 3.5, 4.5, 9.0, 2.0, 1.5, np.nan]
    y = [0.5, 0.5, 4.5, 9.0, 0.5, 1.5, 1.0]
    np.testing.assert_array_equal(assign_cells(x, y, SQUARES, [7, 3, 5]), [7, 3, 5, -1, 3, 5, -1])


@given(
    st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), max_size=25),
    st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8), st.integers(1, 5)), max_size=6),
    st.randoms(use_true_random=False),
)
def test_assign_cells__agrees_with_a_loop_in_any_order(points, boxes, random):
    polygons = np.array([shapely.box(x, y, x + side, y + side) for x, y, side in boxes] + [None], dtype=object)[:-1]
    ids = np.arange(len(boxes)) * 3
    random.shuffle(ids)
    x, y = np.array(points, float).reshape(-1, 2).T / 2
    found = assign_cells(x, y, polygons, ids)
    assert found.tolist() == [reference.cell_of(a, b, polygons, ids) for a, b in zip(x, y, strict=True)]
    order = np.argsort(ids)[::-1]
    np.testing.assert_array_equal(assign_cells(x, y, polygons[order], ids[order]), found)


def test_assign_cells__knows_cells_of_any_size_and_distance():
    rng = np.random.default_rng(0)
    centres = np.concatenate([rng.uniform(0, 10, (40, 2)), [[5.0, 5.0], [1e7, -1e7], [1e7, -1e7]]])
    polygons = shapely.buffer(shapely.points(centres), np.append(rng.uniform(0.1, 2, 40), [6.0, 1e-3, 1.0]))
    polygons = np.append(polygons, shapely.Polygon())
    x, y = np.concatenate([rng.uniform(-5, 15, (300, 2)), centres, [[np.inf, 0.0], [1e300, 1e300]]]).T
    ids = rng.permutation(len(polygons))
    expected = [reference.cell_of(a, b, polygons, ids) for a, b in zip(x, y, strict=True)]
    assert assign_cells(x, y, polygons, ids).tolist() == expected


def test_assign_cells__accepts_no_cells_and_no_molecules():
    none = np.array([], dtype=object)
    assert assign_cells([1.0, 2.0], [1.0, 2.0], none, []).tolist() == [-1, -1]
    assert assign_cells([], [], SQUARES, [1, 2, 3]).dtype == np.int64


@pytest.mark.parametrize("ids", [[1, 2], [1, 1, 2], [-1, 0, 1]])
def test_assign_cells__rejects_ids_that_do_not_name_cells(ids):
    with pytest.raises(InputError):
        assign_cells([0.0], [0.0], SQUARES, ids)


# --- counts ---------------------------------------------------------------------------------------------------


def test_count_table__by_hand():
    transcripts = pd.DataFrame({"barcode_id": [0, 0, 2, 5, 1, 0], "cell_id": [7, 7, 7, 3, -1, -1]})
    table = count_table(transcripts, cell_rows(SQUARES, [7, 3, 5]), BOOK)
    expected = np.zeros((3, BOOK.n_words))
    expected[0, [0, 2]], expected[1, 5] = (2, 1), 1
    np.testing.assert_array_equal(table.X.toarray(), expected)
    assert table.X.format == "csr"
    assert table.X.dtype == np.int32
    assert list(table.obs_names) == ["7", "3", "5"]
    assert list(table.obs["n_transcripts"]) == [3, 1, 0]
    assert list(table.var_names) == list(BOOK.names)
    assert list(table.var["is_blank"]) == list(BOOK.is_blank)
    np.testing.assert_allclose(table.obsm["spatial"], [[1, 1], [3, 1], [3, 3]])
    assert {"cell_id", "fov", "volume"} <= set(table.obs)
    assert "geometry" not in table.obs


@given(st.lists(st.tuples(st.floats(-1, 6), st.floats(-1, 6), st.integers(0, BOOK.n_words - 1)), max_size=60))
def test_count_table__counts_sum_to_assigned_molecules(rows):
    x, y, word = np.array(rows, float).reshape(-1, 3).T
    transcripts = pd.DataFrame({"barcode_id": word.astype(np.int32), "cell_id": assign_cells(x, y, SQUARES, [1, 2, 3])})
    table = count_table(transcripts, cell_rows(SQUARES, [1, 2, 3]), BOOK)
    inside = transcripts["cell_id"] >= 0
    assert table.X.sum() == inside.sum()
    assert table.shape == (3, BOOK.n_words)
    per_word = np.asarray(table.X.sum(axis=0)).ravel()
    np.testing.assert_array_equal(per_word, np.bincount(word[inside].astype(int), minlength=BOOK.n_words))


def test_count_table__survives_its_file(tmp_path):
    import anndata

    transcripts = pd.DataFrame({"barcode_id": [0, 1], "cell_id": [7, -1]})
    table = count_table(transcripts, cell_rows(SQUARES, [7, 3, 5]), BOOK)
    table.write_h5ad(tmp_path / "t.h5ad")
    back = anndata.read_h5ad(tmp_path / "t.h5ad")
    np.testing.assert_array_equal(back.X.toarray(), table.X.toarray())
    pd.testing.assert_frame_equal(back.obs, table.obs)


def test_count_table__rejects_what_its_tables_do_not_know():
    cells = cell_rows(SQUARES, [7, 3, 5])
    with pytest.raises(InputError, match="cell_id 8 "):
        count_table(pd.DataFrame({"barcode_id": [0], "cell_id": [8]}), cells, BOOK)
    with pytest.raises(InputError, match="barcode_id 99 "):
        count_table(pd.DataFrame({"barcode_id": [99], "cell_id": [7]}), cells, BOOK)
    with pytest.raises(InputError, match="twice"):
        count_table(pd.DataFrame({"barcode_id": [0], "cell_id": [7]}), cell_rows(SQUARES, [7, 7, 5]), BOOK)


def test_cells__survive_their_file(tmp_path):
    cells = cell_rows(SQUARES, [7, 3, 5])
    write_cells(cells, tmp_path / "cells.parquet")
    assert isinstance(pd.read_parquet(tmp_path / "cells.parquet")["geometry"][0], bytes)
    back = read_cells(tmp_path / "cells.parquet")
    assert shapely.equals(back["geometry"].to_numpy(), cells["geometry"].to_numpy()).all()
    write_cells(cells[:0], tmp_path / "none.parquet")
    assert list(read_cells(tmp_path / "none.parquet").columns) == list(cells.columns)


def test_read_cells__rejects_other_files(tmp_path):
    (tmp_path / "text.parquet").write_text("cells")
    pd.DataFrame({"cell_id": [1]}).to_parquet(tmp_path / "no_geometry.parquet")
    pd.DataFrame({"geometry": [b"\x01\x02"], "cell_id": [1]}).to_parquet(tmp_path / "no_wkb.parquet")
    for name in ("absent.parquet", "text.parquet", "no_geometry.parquet", "no_wkb.parquet"):
        with pytest.raises(InputError, match=name):
            read_cells(tmp_path / name)


# --- segmentation ---------------------------------------------------------------------------------------------


def stained_field(shape=(300, 300), light=None, seed=0):
    """Simulate nuclei and bodies of nine cells, three of them dim, with camera noise; light: (y, x) illumination."""
    rng = np.random.default_rng(seed)
    nuclei, bodies = np.full(shape, 60.0), np.full(shape, 60.0)
    truth = np.zeros(shape, int)
    for number, (y, x) in enumerate(((y, x) for y in (50, 150, 250) for x in (50, 150, 250)), start=1):
        strength = 0.35 if number % 3 == 0 else 1.0
        rows = disk((y, x), 42, shape=shape)
        bodies[rows] += 300 * strength
        truth[rows] = number
        nuclei[disk((y + 5, x - 4), 22, shape=shape)] += 500 * strength
    light = np.ones(shape) if light is None else light
    images = (rng.poisson(gaussian_filter(image, 2) * light) + 100.0 for image in (nuclei, bodies))
    return *(image.astype(np.uint16) for image in images), truth


def agreement(labels, truth):
    """Return the intersection over union of each true cell with the label that covers most of it."""
    found = []
    for number in range(1, truth.max() + 1):
        label = np.argmax(np.bincount(labels[truth == number]))
        both = ((labels == label) & (truth == number)).sum() if label else 0
        found.append(both / ((labels == label) | (truth == number)).sum())
    return np.array(found)


def test_segment__finds_bright_and_dim_cells():
    nuclei, bodies, truth = stained_field()
    labels = segment(nuclei, bodies, MPP)
    assert labels.dtype == np.int32
    assert labels.max() == 9
    assert agreement(labels, truth).min() > 0.9


def test_segment__parts_cells_and_nuclei_that_touch():
    rng = np.random.default_rng(3)
    nuclei, bodies = np.full((160, 220), 60.0), np.full((160, 220), 60.0)
    for x, strength in ((90, 1.0), (130, 0.6)):  # nuclei of radius 22 that overlap in a lens of 4 pixels
        nuclei[disk((80, x), 22)] = 60 + 500 * strength
    bodies[disk((80, 90), 40)] = bodies[disk((80, 130), 40)] = 360
    labels = segment(rng.poisson(gaussian_filter(nuclei, 2)), rng.poisson(gaussian_filter(bodies, 2)), MPP)
    assert labels.max() == 2
    left, right = (np.argwhere(labels == label) for label in np.unique(labels[80, [90, 130]]))
    assert left[:, 1].max() < 110 + 8
    assert right[:, 1].min() > 110 - 8
    assert len(left) == pytest.approx(len(right), rel=0.15)


def test_segment__without_cytoplasm_widens_nuclei():
    nuclei, _, _ = stained_field()
    labels = segment(nuclei, None, MPP)
    assert labels.max() == 9
    assert np.median(np.bincount(labels.ravel())[1:]) == pytest.approx(np.pi * (22 + 2.5 / MPP) ** 2, rel=0.1)


def test_segment__bears_uneven_light_and_other_units():
    y, x = np.mgrid[-1:1:300j, -1:1:300j]
    nuclei, bodies, truth = stained_field(light=1 - 0.25 * (y**2 + x**2))
    assert agreement(segment(nuclei, bodies, MPP), truth).min() > 0.85
    plain, plain_bodies, _ = stained_field()
    np.testing.assert_array_equal(
        segment(plain / 8.0 - 3.0, plain_bodies / 8.0 - 3.0, MPP), segment(plain, plain_bodies, MPP)
    )


@pytest.mark.parametrize("background", [0.0, 100.0, 60000.0])
def test_segment__empty_fields_give_no_cells(background):
    rng = np.random.default_rng(1)
    noise = rng.poisson(background, (256, 200)).astype(np.float32)
    assert not segment(noise, noise, MPP).any()
    assert not segment(noise, None, MPP).any()


def test_segment__rejects_images_it_cannot_use():
    good = np.zeros((20, 20))
    for nuclei, cytoplasm, scale in (
        (np.zeros((2, 20, 20)), None, MPP),
        (good, np.zeros((20, 21)), MPP),
        (good * np.nan, None, MPP),
        (good, good, 0.0),
    ):
        with pytest.raises(InputError):
            segment(nuclei, cytoplasm, scale)


def test_outlines__have_the_area_of_their_pixels():
    labels = np.zeros((40, 60), np.int32)
    labels[disk((15, 20), 9)] = 3
    labels[10:12, 0:2] = 1
    labels[30, 59] = 7
    found = outlines(labels)
    assert list(found) == [1, 3, 7]
    for label, outline in found.items():
        assert outline.is_valid
        assert outline.area == pytest.approx((labels == label).sum(), abs=0.51)
    assert found[3].centroid.coords[0] == pytest.approx((20, 15))
    assert found[1].bounds == (-0.5, 9.5, 1.5, 11.5)


def test_outlines__keep_holes_and_the_largest_piece():
    labels = np.zeros((30, 30), np.int32)
    labels[2:12, 2:12] = 1
    labels[5:8, 5:8] = 2
    labels[20:22, 20:22] = 1
    found = outlines(labels)
    assert found[1].area == pytest.approx(100 - 9, abs=1.01)
    assert found[1].intersection(found[2]).area == pytest.approx(0, abs=0.6)
    assert outlines(np.zeros((5, 5), np.int32)) == {}


@given(st.integers(0, 2**32 - 1))
def test_outlines__are_valid_whatever_the_labels(seed):
    labels = np.random.default_rng(seed).integers(0, 3, (9, 8)).astype(np.int32)
    assert all(outline.is_valid and outline.area > 0 for outline in outlines(labels).values())


# --- fields ---------------------------------------------------------------------------------------------------


def disc(x, y, radius):
    return shapely.Point(x, y).buffer(radius)


def merge_fields(outlines_by_fov, positions, shape, scale):
    """Merge all cells of some fields as a run does, but all at once."""
    fovs = sorted(outlines_by_fov)
    shapes = {
        fov: in_stage_frame(np.array([*outlines_by_fov[fov].values(), None], dtype=object)[:-1], positions[fov], scale)
        for fov in fovs
    }
    frames = {fov: field_frame(positions[fov], shape, scale) for fov in fovs}
    links = [
        (a, i, b, j)
        for a in fovs
        for b in fovs
        if a < b
        for i, j in zip(*same_cells(shapes[a], shapes[b], frames[a], frames[b]), strict=True)
    ]
    numbers = number_cells({fov: len(shapes[fov]) for fov in fovs}, np.array(links, int).reshape(-1, 4))
    members = numbers.members(np.arange(len(numbers.home)))
    geometry = [shapes[row.fov][row.outline] for row in members.itertuples()]
    measured = pd.DataFrame({"depth": [float(row.fov) for row in members.itertuples()]})
    cells = merging.merge_outlines(members, np.array([*geometry, None], dtype=object)[:-1], measured)
    return merging.trim_overlaps(cells, cells)


def test_merge_fields__counts_a_cell_in_an_overlap_once():
    # fields of 100 x 100 pixels of 1 micrometre with 40 common columns; both show the whole cell at 80
    left = {1: disc(80, 50, 12), 2: disc(20, 20, 10)}
    right = {1: disc(20.5, 50, 12), 2: disc(70, 70, 10)}
    cells = merge_fields({0: left, 1: right}, [(0, 0), (60, 0)], (100, 100), 1.0)
    assert len(cells) == 3
    assert list(cells["cell_id"]) == [1, 2, 3]
    assert list(cells["fov"]) == [0, 0, 1]
    assert cells["center_x"][0] == pytest.approx(80, abs=0.6)
    assert cells["center_x"][2] == pytest.approx(130)
    assert cells["depth"].tolist() == [0.0, 0.0, 1.0]
    assert cells["area"][0] == pytest.approx(np.pi * 144, rel=0.02)


def test_merge_fields__joins_a_cell_that_each_field_cuts():
    whole = disc(95, 50, 20)
    left = whole & shapely.box(-0.5, -0.5, 99.5, 99.5)
    right = shapely.transform(whole & shapely.box(89.5, -0.5, 189.5, 99.5), lambda xy: xy - [90, 0])
    cells = merge_fields({4: {1: left}, 9: {5: right}}, {4: (0, 0), 9: (90, 0)}, (100, 100), 1.0)
    assert len(cells) == 1
    assert cells["area"][0] == pytest.approx(whole.area, rel=1e-6)
    assert cells["center_x"][0] == pytest.approx(95, abs=0.01)
    right_share = right.area / (left.area + right.area)
    assert cells["depth"][0] == pytest.approx(4 + 5 * right_share)


def test_merge_fields__a_sliver_belongs_to_the_cell_that_the_neighbour_sees():
    whole = disc(80, 50, 15)  # extends 5 micrometres into the other field
    sliver = shapely.transform(whole & shapely.box(89.5, 0, 200, 99.5), lambda xy: xy - [90, 0])
    cells = merge_fields({0: {1: whole}, 1: {1: sliver}}, [(0, 0), (90, 0)], (100, 100), 1.0)
    assert len(cells) == 1
    assert cells["area"][0] == pytest.approx(whole.area)


def test_merge_fields__neighbours_stay_apart_and_never_overlap():
    left, right = {1: disc(75, 50, 12)}, {1: disc(36, 50, 12)}  # at 96: they overlap in a lens
    cells = merge_fields({0: left, 1: right}, [(0, 0), (60, 0)], (100, 100), 1.0)
    a, b = cells["geometry"]
    assert a.intersection(b).area < 1e-6
    assert cells["area"].sum() == pytest.approx(disc(75, 50, 12).union(disc(96, 50, 12)).area)


def test_merge_fields__accepts_fields_without_cells():
    for entries in ({}, {0: {}, 1: {}}):
        cells = merge_fields(entries, [(0, 0), (60, 0)], (100, 100), 1.0)
        assert len(cells) == 0
        assert list(cells.columns) == ["cell_id", "fov", "center_x", "center_y", "area", "geometry", "depth"]


def test_segmentation__finds_the_cells_of_a_simulated_tissue(tmp_path):
    folder = simulate_experiment(tmp_path / "e", fields=(2, 2), shape=(384, 384), density=0.0, drift=0.0, seed=11)
    positions = np.loadtxt(folder / "positions.csv", delimiter=",")
    found = {}
    for fov in range(4):
        dapi, polyt, _ = tifffile.imread(folder / f"stains_{fov:03d}_08.tif")
        found[fov] = outlines(segment(dapi, polyt, MPP))
    cells = merge_fields(found, positions, (384, 384), MPP)
    truth = read_cells(folder / "truth" / "cells.parquet")
    most = truth["visible"].to_numpy() > 0.5
    real, mine = truth["geometry"].to_numpy(), cells["geometry"].to_numpy()
    i, j = shapely.STRtree(mine).query(real, predicate="intersects")
    shared, either = shapely.area(real[i] & mine[j]), shapely.area(real[i] | mine[j])
    matched = shared / either > 0.5
    assert most.sum() > 60
    assert np.isin(np.flatnonzero(most), i[matched]).mean() >= 0.95
    assert np.isin(np.arange(len(mine)), j[matched]).mean() >= 0.95
    assert np.median((shared / either)[matched]) > 0.9
    a, b = shapely.STRtree(mine).query(mine, predicate="intersects")
    assert shapely.area(mine[a[a < b]] & mine[b[a < b]]).sum() < 1e-6
