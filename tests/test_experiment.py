"""Tables of an experiment in the variants that laboratories write, and the corresponding image files."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import tifffile
from hypothesis import given
from hypothesis import strategies as st

from merfish import Codebook, datasets
from merfish.config import RunConfig
from merfish.errors import InputError
from merfish.imaging import opening as module
from merfish.imaging.field import chosen_stains
from merfish.imaging.frames import read_bits, read_fiducials, read_stain, read_stain_beads
from merfish.imaging.opening import match_names, open_experiment
from merfish.imaging.organization import read_data_organization, read_microscope, read_positions
from merfish.imaging.preflight import preflight

HEADER = (
    "channelName,readoutName,imageType,imageRegExp,bitNumber,imagingRound,color,frame,zPos,"
    "fiducialImageType,fiducialRegExp,fiducialImagingRound,fiducialFrame,fiducialColor"
)
ROUND = r"(?P<imageType>[\w|-]+)_(?P<fov>[0-9]+)_(?P<imagingRound>[0-9]+)"
NO_ROUND = r"(?P<imageType>[\w|-]+)_(?P<fov>[0-9]+)"
# Two rounds of two bits in three planes, the second colour's from the top down, beads last; stains in a file whose
# name has no round.
ROWS = [
    f'bit1,R1,hal,{ROUND},1,0,750,"[0,1,2]","[0,1.5,3]",hal,{ROUND},0,6,561',
    f"bit2,R2,hal,{ROUND},2,0,650,[3 4 5],[3.0 1.5 0.0],hal,{ROUND},0,6,561",
    f"bit3,R3,hal,{ROUND},3,1,750,0;1;2;,0;1.5;3.0;,hal,{ROUND},1,6,561",
    f'bit4,R4,hal,{ROUND},4,1,650," [ 3, 4, 5 ] ",[ 3.0 1.5 0 ],hal,{ROUND},1,6,561',
    f"DAPI,DAPI,hal-stain,{NO_ROUND},40,-1,405,1,1.5,hal-stain,{NO_ROUND},-1,0,561",
    f"polyT,polyT,hal-stain,{NO_ROUND},,-1,488,[2],[1.5],,,,,",
]
SHAPE = (8, 12)


def movie(fov: int, number: int, frames: int = 7) -> np.ndarray:
    rng = np.random.default_rng([fov, number + 1])
    return rng.integers(90, 2000, (frames, *SHAPE), dtype=np.uint16)


def write_movie(path: Path, frames: np.ndarray) -> None:
    tifffile.imwrite(path, frames, photometric="minisblack")


def write_experiment(folder: Path, rows: list[str] | None = None, **microscope: object) -> Path:
    folder.mkdir()
    (folder / "data_organization.csv").write_text("\n".join([HEADER, *(rows or ROWS)]) + "\n")
    (folder / "codebook.csv").write_text("name,id,bit1,bit2,bit3,bit4\nA,a,1,1,0,0\nB,b,0,0,1,1\nBlank-1,,1,0,1,0\n")
    (folder / "positions.csv").write_text("0,0\n10.5,-3\n")
    plain = {"microns_per_pixel": 0.1, "transpose": False, "flip_horizontal": False, "flip_vertical": False}
    (folder / "microscope.json").write_text(json.dumps(plain | {"image_dimensions": SHAPE[::-1]} | microscope))
    for fov in (0, 1):
        for number in (0, 1):
            write_movie(folder / f"hal_{fov:03d}_{number:02d}.tif", movie(fov, number))
        write_movie(folder / f"hal-stain_{fov:03d}.tif", movie(fov, -1, 3))
    return folder


@pytest.fixture
def folder(tmp_path):
    return write_experiment(tmp_path / "raw")


def edit(path: Path, before: str, after: str) -> None:
    text = path.read_text()
    assert before in text
    path.write_text(text.replace(before, after))


def test_open_experiment__reads_every_spelling(folder):
    opened = open_experiment(folder)
    assert [channel.name for channel in opened.bits] == ["bit1", "bit2", "bit3", "bit4"]
    assert [channel.frames for channel in opened.bits] == [(0, 1, 2), (5, 4, 3), (0, 1, 2), (5, 4, 3)]
    assert opened.z == (0.0, 1.5, 3.0)
    assert [(c.name, c.bit, c.frames, c.z) for c in opened.stains] == [
        ("DAPI", None, (1,), (1.5,)),
        ("polyT", None, (2,), (1.5,)),
    ]
    np.testing.assert_array_equal(opened.positions, [[0, 0], [10.5, -3]])
    assert opened.fovs == (0, 1)
    assert not preflight(opened)["problem"].any()


def test_read_bits__planes_upwards_for_every_colour(folder):
    bits = read_bits(open_experiment(folder), 1)
    expected = np.stack(
        [movie(1, 0)[[0, 1, 2]], movie(1, 0)[[5, 4, 3]], movie(1, 1)[[0, 1, 2]], movie(1, 1)[[5, 4, 3]]]
    )
    np.testing.assert_array_equal(bits, expected)
    assert bits.dtype == np.uint16


def test_read_fiducials__one_image_a_round(folder):
    images, round_of_bit = read_fiducials(open_experiment(folder), 0)
    np.testing.assert_array_equal(images, np.stack([movie(0, 0)[6], movie(0, 1)[6]]))
    assert round_of_bit.tolist() == [0, 0, 1, 1]


def test_read_fiducials__experiment_without_beads(tmp_path):
    rows = [row[: row.rindex(f",hal,{ROUND}")] + ",,,,," for row in ROWS[:4]]
    images, round_of_bit = read_fiducials(open_experiment(write_experiment(tmp_path / "raw", rows)), 0)
    assert images.shape == (0, *SHAPE)
    assert round_of_bit.tolist() == [0, 0, 1, 1]


def test_read_stain__planes_and_beads(folder):
    opened = open_experiment(folder)
    np.testing.assert_array_equal(read_stain(opened, 0, "dapi"), movie(0, -1, 3)[[1]])
    np.testing.assert_array_equal(read_stain_beads(opened, 0, "dapi"), movie(0, -1, 3)[0])
    assert read_stain_beads(opened, 0, "polyT") is None
    with pytest.raises(InputError, match=r"no stain 'GFP'.*DAPI, polyT"):
        read_stain(opened, 0, "GFP")


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("horizontal", [False, True])
@pytest.mark.parametrize("vertical", [False, True])
def test_read_bits__orientation(transpose, horizontal, vertical, tmp_path):
    folder = write_experiment(tmp_path / "raw", transpose=transpose, flip_horizontal=horizontal, flip_vertical=vertical)
    bits = read_bits(open_experiment(folder), 0)
    y, x = 3, 5
    row, column = (x, y) if transpose else (y, x)
    height, width = SHAPE[::-1] if transpose else SHAPE
    row = height - 1 - row if vertical else row
    column = width - 1 - column if horizontal else column
    assert bits.shape[-2:] == (height, width)
    assert bits[0, 0, row, column] == movie(0, 0)[0, y, x]


def test_open_experiment__tables_elsewhere(folder, tmp_path):
    for name in ("data_organization.csv", "codebook.csv", "positions.csv", "microscope.json"):
        (folder / name).rename(tmp_path / f"other_{name}")
    with pytest.raises(InputError, match=r"codebook\.csv"):
        open_experiment(folder)
    opened = open_experiment(
        folder,
        data_organization=tmp_path / "other_data_organization.csv",
        codebook=tmp_path / "other_codebook.csv",
        positions=str(tmp_path / "other_positions.csv"),
        microscope=tmp_path / "other_microscope.json",
    )
    assert len(opened.files) == 6


def test_open_experiment__real_fields():
    opened = open_experiment(datasets.merfish_raw())
    assert (len(opened.bits), opened.fovs, [stain.name for stain in opened.stains]) == (16, (0, 1), ["DAPI", "polyT"])
    listing = preflight(opened)
    assert len(listing) == 16
    assert not listing["problem"].any()
    assert read_bits(opened, 1).shape == (16, 1, 128, 128)


M_ROUND = r"(?<imageType>[\w|-]+)_(?<fov>[0-9]+)_(?<imagingRound>[0-9]+)"
MATLAB = rf"""{HEADER.replace("channelName,readoutName", "bitName")}
RS1,hal,{M_ROUND},1,0,650,4;5;6;,0.0;0.3;0.6;,hal,{M_ROUND},0,2,561
RS2,hal,{M_ROUND},2,0,750,7;8;9;,0.6;0.3;0.0;,hal,{M_ROUND},0,2,561
DAPI,hal-405,(?<imageType>[\w|-]+)_(?<fov>[0-9]+),47,-1,405,1;,0.6;,hal,{M_ROUND},0,2,561
"""


def test_read_data_organization__matlab_counts_from_one(tmp_path):
    path = tmp_path / "d.csv"
    path.write_text(MATLAB)
    first, second, stain = read_data_organization(path)
    assert first.movie.regexp == ROUND
    assert (first.frames, second.frames, stain.frames) == ((3, 4, 5), (8, 7, 6), (0,))
    assert first.z == second.z == (0.0, 0.3, 0.6)
    assert stain.movie.imaging_round == -1
    assert stain.fiducial == (first.movie, 1)
    path.write_text(MATLAB.replace("405,1;", "405,0;"))  # frame 0 exists, so counting starts there
    assert [channel.frames for channel in read_data_organization(path)] == [(4, 5, 6), (9, 8, 7), (0,)]


def test_read_data_organization__keeps_look_behinds(tmp_path):
    path = tmp_path / "d.csv"
    path.write_text(MATLAB.replace("_(?<fov>", "(?<=x)(?<!y)_(?<fov>"))
    assert "(?<=x)(?<!y)_(?P<fov>" in read_data_organization(path)[0].movie.regexp


@given(
    st.lists(st.integers(0, 10**6), min_size=1, max_size=8, unique=True),
    st.sampled_from([("[", " ", "]"), ("[", ",", "]"), ("[ ", ", ", " ]"), ("", ";", ";"), ("", " ", "")]),
)
def test_numbers__every_spelling_of_a_list(values, spelling):
    from merfish.imaging.organization import _numbers

    opening, separator, closing = spelling
    assert _numbers("f", "frame", opening + separator.join(map(str, values)) + closing, int) == values


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("imageRegExp", "regexp", "no column imageRegExp"),
        (",3,1,750", ",4,1,750", "no row for bit 3"),
        ("bit4,R4", "bit1,R4", "names appear in several rows: bit1"),
        ("polyT,polyT,hal-stain", "polyT,polyT,", r"line 7 \('polyT'\): imageType is empty"),
        ("0;1;2;", "0;1;", r"line 4 \('bit3'\): 2 values in frame but 3 in zPos"),
        ("0;1;2;", "0;1;x;", r"line 4 \('bit3'\): frame: expected integers such as .*, got '0;1;x;'"),
        ("0;1;2;", "0;1;2.5;", r"line 4 \('bit3'\): frame: expected integers"),
        ("0;1;2;", "-1;1;2;", r"line 4 \('bit3'\): frame: expected indices from 0"),
        ("0;1.5;3.0;", "0;1.5;nan;", r"line 4 \('bit3'\): zPos: expected numbers"),
        ("0;1.5;3.0;", "0;1.5;1.5;", r"line 4 \('bit3'\): zPos: a plane is listed twice"),
        ("0;1.5;3.0;", "0;1.5;4.0;", r"line 4 \('bit3'\): zPos .* differs from .* of line 2"),
        (",3,1,750", ",x,1,750", r"line 4 \('bit3'\): bitNumber: expected integers"),
        (",3,1,750", ",0,1,750", r"line 4 \('bit3'\): bitNumber: expected one integer from 1"),
        ('"[0,1,2]"', "[0,1,2]", "line 2 has 16 fields.*needs quotes"),
        ("_(?P<imagingRound>[0-9]+),3,1", ",3,1", r"line 4 \('bit3'\): imageRegExp: expected a group .*imagingRound"),
        ("(?P<fov>[0-9]+),40", "[0-9]+,40", r"line 6 \('DAPI'\): imageRegExp: expected a group .*fov"),
        ("[0-9]+),40", "[0-9]+,40", "cannot be used"),
        (",-1,0,561", ",-1,[0 1],561", r"line 6 \('DAPI'\): fiducialFrame: expected one index"),
    ],
)
def test_open_experiment__names_row_and_field(before, after, message, folder):
    edit(folder / "data_organization.csv", before, after)
    with pytest.raises(InputError, match=message) as caught:
        open_experiment(folder)
    assert "data_organization.csv" in str(caught.value)


def test_open_experiment__bit_given_twice(tmp_path):
    folder = write_experiment(tmp_path / "raw", [*ROWS, ROWS[2].replace("bit3,R3", "bit5,R5")])
    with pytest.raises(InputError, match=r"bitNumber 3 appears in several rows: line 4 \('bit3'\), line 8 \('bit5'\)"):
        open_experiment(folder)


def test_open_experiment__readouts_in_another_order(folder):
    text = (folder / "codebook.csv").read_text().splitlines()[1:]
    words = "\n".join(row[: row.index(",") + 1] + row.split(",")[1] + "," + "".join(row.split(",")[2:]) for row in text)
    (folder / "codebook.csv").write_text(
        f"version,1\ncodebook_name,x\nbit_names,R1,R2,R4,R3\nname,id,barcode\n{words}\n"
    )
    with pytest.raises(InputError, match=r"line 4: bitNumber 3 is readout 'R3', but the codebook's bit 3 is 'R4'"):
        open_experiment(folder)
    edit(folder / "codebook.csv", "R4,R3", "R3,R4")
    assert [channel.readout for channel in open_experiment(folder).bits] == ["R1", "R2", "R3", "R4"]


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("0;1;2;", "0;3;2;", r"line 4 \('bit3'\): frame 3 .*'hal', round 1, is also that of line 5|line 5 .* line 4"),
        ("0;1;2;", "0;1;6;", r"line 4 \('bit3'\): frame 6 .*'hal', round 1, shows the beads of line 4 \('bit3'\)"),
        ("DAPI,DAPI", "bit5,DAPI", r"has 4 bits, but the table has more: line 6 \('bit5'\)"),
        ("zPos,fid", "frame,fid", "several columns are called 'frame'"),
        ("0;1;2;", "0;1;1e300;", r"line 4 \('bit3'\): frame: 3 numbers up to 1e\+300"),
        (",3,1,750", ",3," + "9" * 30 + ",750", r"line 4 \('bit3'\): imagingRound: 1 numbers up to 1e\+30"),
        ("polyT,polyT", "poly\x1b[31mT,polyT", r"line 7: found the control character '\\x1b'"),
        ("polyT,polyT", '"poly\nT",polyT', "expected one line of plain text"),
    ],
)
def test_open_experiment__refuses_what_would_mislead(before, after, message, folder):
    edit(folder / "data_organization.csv", before, after)
    with pytest.raises(InputError, match=message):
        open_experiment(folder)


def test_open_experiment__codebook_of_fewer_bits(folder):
    text = (folder / "codebook.csv").read_text().splitlines()
    (folder / "codebook.csv").write_text(
        "\n".join(line.rsplit(",", 1)[0] for line in text).replace("B,b,0,0,1", "B,b,0,1,1")
    )
    with pytest.raises(InputError, match=r"3 bits, but the table has more: line 5 \('bit4'\)"):
        open_experiment(folder)
    # a number that follows those of the bits, in their images and with one of their colours, is a bit for any name
    edit(folder / "data_organization.csv", "bit4,R4", "last,R4")
    with pytest.raises(InputError, match=r"line 5 \('last'\)"):
        open_experiment(folder)
    edit(folder / "data_organization.csv", ",4,1,650", ",,1,650")
    assert [stain.name for stain in open_experiment(folder).stains] == ["last", "DAPI", "polyT"]


def test_open_experiment__one_file_by_two_expressions(folder):
    other = ROUND.replace("[0-9]", r"\d")
    edit(folder / "data_organization.csv", f"bit3,R3,hal,{ROUND},3,1", f"bit3,R3,hal,{other},3,0")
    with pytest.raises(InputError, match=r"line 4 \('bit3'\): frame 0 .*'hal', round 0, is also that of line 2"):
        open_experiment(folder)


@pytest.mark.parametrize(
    ("bits", "extra"),
    [
        # readout names for bits, stains with much higher numbers; genes imaged one by one directly after the bits
        (("RS0247", "RS0255"), (("polyT", 25, "hal-stains", 488), ("DAPI", 47, "hal-stains", 405))),
        (("bit1", "bit2"), (("polyT", 48, "hal", 488), ("DAPI", 47, "hal", 405))),
        (("bit1", "bit2"), (("Ncdn", 3, "hal-single", 650), ("Cck", 4, "hal-single", 750), ("DAPI", 47, "dapi", 405))),
    ],
)
def test_match_bits__labs_number_stains_and_genes_beyond_the_bits(tmp_path, bits, extra):
    path = tmp_path / "d.csv"
    rows = [(bits[0], 1, "hal", 650), (bits[1], 2, "hal", 750), *extra]
    lines = [f"{name},{name},{kind},{ROUND},{n},0,{color},{n},0,,,,," for name, n, kind, color in rows]
    path.write_text("\n".join([HEADER, *lines]) + "\n")
    book = Codebook(("A",), ("",), np.array([[1, 1]], np.uint8), ("a", "b"))
    found, stains = module._match_bits(read_data_organization(path), book, path)
    assert ([c.name for c in found], [c.name for c in stains]) == (list(bits), [name for name, *_ in extra])
    shorter = Codebook(("A",), ("",), np.array([[1]], np.uint8), ("a",))
    with pytest.raises(InputError, match="has 1 bits, but the table has more"):
        module._match_bits(read_data_organization(path), shorter, path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_tables__that_are_pipes(folder):
    for name in ("data_organization.csv", "codebook.csv", "positions.csv", "microscope.json"):
        (folder / name).rename(folder / "whole")
        os.mkfifo(folder / name)
        with pytest.raises(InputError, match=rf"{name}: expected the .*, a regular file; got a pipe"):
            open_experiment(folder)
        (folder / name).unlink()
        (folder / "whole").rename(folder / name)


def test_tables__that_are_missing_are_named_together_with_what_is_there(folder):
    (folder / "codebook.csv").rename(folder / "book.csv")
    (folder / "microscope.json").unlink()
    message = r"not found: codebook.csv, microscope.json. Give other paths with --codebook, --microscope. .* book.csv"
    with pytest.raises(InputError, match=message):
        open_experiment(folder)


def test_chosen_stains__default_may_be_absent_but_not_what_was_asked(folder):
    edit(folder / "data_organization.csv", "polyT,polyT", "cyto,cyto")
    opened = open_experiment(folder)
    assert chosen_stains(opened, RunConfig()) == ("DAPI", None)
    assert chosen_stains(opened, RunConfig(cytoplasm_stain="CYTO")) == ("DAPI", "cyto")
    with pytest.raises(InputError, match="nuclei_stain: the experiment has no stain 'DAPII'; it has DAPI, cyto"):
        chosen_stains(opened, RunConfig(nuclei_stain="DAPII"))
    with pytest.raises(InputError, match="cytoplasm_stain: the experiment has no stain 'polyT'"):
        chosen_stains(opened, RunConfig(cytoplasm_stain="polyT"))


def test_open_experiment__bits_by_name_without_numbers(tmp_path):
    rows = [",".join(field for i, field in enumerate(row.split(",")) if i != 4) for row in ROWS if '"' not in row]
    path = tmp_path / "d.csv"
    path.write_text("\n".join([HEADER.replace("bitNumber,", ""), *rows]))
    channels = read_data_organization(path, ("R4", "R3", "bit2"))
    assert {channel.name: channel.bit for channel in channels} == {"bit2": 2, "bit3": 1, "DAPI": None, "polyT": None}


@pytest.mark.parametrize("text", ["", "\n\n", HEADER])
def test_read_data_organization__rejects_empty(text, tmp_path):
    (tmp_path / "d.csv").write_text(text)
    with pytest.raises(InputError, match="no rows"):
        read_data_organization(tmp_path / "d.csv")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no positions"),
        ("1,2\n3\n", "line 2: expected x,y"),
        ("x,y\n1,2\n", "line 1: expected x,y"),
        ("1,2\n\n3,nan\n", "line 3: expected finite"),
        ("1,2\n-inf,2\n", "line 2: expected finite"),
        ("1,1e300\n", "line 1: expected finite x,y in micrometres, at most 1e.07, got '1,1e300'"),
        ("1,2\n1,\x002\n", r"line 2: found the control character '\\x00'"),
        ("1,2,3\n", "line 1: expected x,y"),
    ],
)
def test_read_positions__rejects(text, message, tmp_path):
    (tmp_path / "p.csv").write_text(text)
    with pytest.raises(InputError, match=message):
        read_positions(tmp_path / "p.csv")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not a microscope file in JSON"),
        ("[1]", "expected an object"),
        ("[" * 60_000, "not a microscope file in JSON"),
        ('{"microns_per_pixel": ' + "9" * 5000 + "}", "not a microscope file in JSON"),
        ("{}", "microns_per_pixel: expected a positive number from .*, got None"),
        ('{"microns_per_pixel": 0}', "microns_per_pixel"),
        ('{"microns_per_pixel": true}', "microns_per_pixel"),
        ('{"microns_per_pixel": NaN}', "microns_per_pixel"),
        ('{"microns_per_pixel": Infinity}', "microns_per_pixel: .* got inf"),
        ('{"microns_per_pixel": 1' + "0" * 400 + "}", "microns_per_pixel: .* got 1000.*"),
        ('{"microns_per_pixel": 1e-300}', "microns_per_pixel: .* got 1e-300"),
        ('{"microns_per_pixel": 0.1, "transpose": 1}', "transpose: expected true or false, got 1"),
        ('{"microns_per_pixel": 0.1, "image_dimensions": [2048]}', "image_dimensions: expected .*width"),
        ('{"microns_per_pixel": 0.1, "image_dimensions": [2048, -1]}', "image_dimensions"),
        ('{"microns_per_pixel": 0.1, "image_dimensions": [2048, 1000000]}', "image_dimensions: .*at most 65536"),
    ],
)
def test_read_microscope__rejects(text, message, tmp_path):
    (tmp_path / "m.json").write_text(text)
    with pytest.raises(InputError, match=message):
        read_microscope(tmp_path / "m.json")


def problems(folder: Path, **options: object) -> dict[str, str]:
    listing = preflight(open_experiment(folder), **options)
    assert list(listing) == ["fov", "channel", "round", "file", "expected", "found", "problem"]
    bad = listing[listing["problem"] != ""]
    return dict(zip(bad["fov"].astype(str) + "/" + bad["round"].astype(str), bad["problem"], strict=True))


def test_preflight__missing_round(folder):
    (folder / "hal_001_01.tif").unlink()
    assert problems(folder) == {
        "1/1": "missing: no name of image type 'hal' and imaging round 1 matches this expression"
    }
    assert preflight(open_experiment(folder))["file"].tolist()[-2:] == [ROUND, "hal-stain_001.tif"]
    assert problems(folder, fovs=[0]) == {}
    with pytest.raises(InputError, match="'hal', field 1, imaging round 1"):
        read_bits(open_experiment(folder), 1)


def test_preflight__whole_field_missing(folder):
    for path in folder.glob("*_001*"):
        path.unlink()
    found = problems(folder)
    assert set(found) == {"1/0", "1/1", "1/-1"}
    assert found["1/-1"] == "missing: no name of image type 'hal-stain' matches this expression"


@pytest.mark.parametrize(("frames", "message"), [(6, "frame 6 .from 0. is needed"), (9, "most files .* have 7")])
def test_preflight__wrong_number_of_frames(frames, message, folder):
    write_movie(folder / "hal_001_01.tif", np.resize(movie(1, 1), (frames, *SHAPE)))
    found = problems(folder)
    assert list(found) == ["1/1"]
    assert re.search(message, found["1/1"])


def test_preflight__wrong_size_and_depth(folder):
    write_movie(folder / "hal_000_01.tif", movie(0, 1)[:, :6])
    write_movie(folder / "hal_001_00.tif", (movie(1, 0) // 16).astype(np.uint8))
    found = problems(folder)
    assert found == {
        "0/1": "size 12 x 6 px instead of 12 x 8",
        "1/0": "pixels are uint8 instead of uint16",
    }
    with pytest.raises(InputError, match="differ in size"):
        read_bits(open_experiment(folder), 0)
    with pytest.raises(InputError, match="expected 16-bit"):
        read_bits(open_experiment(folder), 1)


def test_preflight__size_from_the_files_themselves(tmp_path):
    folder = write_experiment(tmp_path / "raw", image_dimensions=None)
    write_movie(folder / "hal_000_01.tif", movie(0, 1)[:, :6])
    assert problems(folder) == {"0/1": "size 12 x 6 px instead of 12 x 8"}


def test_preflight__truncated(folder):
    path = folder / "hal_000_00.tif"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert set(problems(folder)) == {"0/0"}
    path.write_bytes(b"")
    assert "hal_000_00.tif" in problems(folder)["0/0"]


def test_preflight__same_field_twice(folder):
    for number in (0, 1):
        shutil.copy(folder / f"hal_000_{number:02d}.tif", folder / f"hal_001_{number:02d}.tif")
    found = problems(folder)
    assert set(found) == {"0/0", "0/1", "1/0", "1/1"}
    assert found["1/1"].startswith("same content as hal_000_01.tif")


def test_preflight__saturated_fields_are_not_copies(folder):
    for fov in (0, 1):
        write_movie(folder / f"hal_{fov:03d}_00.tif", np.full((7, *SHAPE), 65535, np.uint16))
    assert problems(folder) == {}


def test_preflight__field_without_position(folder):
    with pytest.raises(InputError, match="field 2 has no stage position"):
        preflight(open_experiment(folder), fovs=[0, 2])


def test_open_experiment__file_without_position(folder):
    shutil.copy(folder / "hal_000_00.tif", folder / "hal_002_00.tif")
    with pytest.raises(InputError, match=r"hal_002_00\.tif: field 2 has no line in the positions, which end at 1"):
        open_experiment(folder)


def test_open_experiment__two_files_for_one_round(folder):
    shutil.copy(folder / "hal_000_00.tif", folder / "hal_0_0.tiff")
    with pytest.raises(InputError, match=r"hal_0_0\.tiff.*both 'hal' field 0 round 0|both 'hal' field 0 round 0"):
        open_experiment(folder)


def test_open_experiment__no_files(folder):
    for path in folder.glob("*.tif"):
        path.unlink()
    with pytest.raises(InputError, match="none of its 0 image files matches"):
        open_experiment(folder)


def test_open_experiment__link_leading_outside(folder, tmp_path):
    outside = tmp_path / "elsewhere.tif"
    (folder / "hal_001_01.tif").rename(outside)
    (folder / "hal_001_01.tif").symlink_to(outside)
    with pytest.raises(InputError, match="outside the experiment's folder"):
        open_experiment(folder)


def test_open_experiment__folder_may_be_a_link(folder, tmp_path):
    (tmp_path / "link").symlink_to(folder)
    assert not preflight(open_experiment(tmp_path / "link"))["problem"].any()


def test_match_names__bounds_what_an_expression_costs(monkeypatch):
    monkeypatch.setattr(module, "MATCH_SECONDS", 1.0)
    with pytest.raises(InputError, match="took more than 1 s"):
        match_names([r"(?P<fov>(\w+)+)-"], ["a" * 60])


def test_match_names__whole_name_before_its_start():
    names = ["hal_001.tif", "hal_001_extra.tif", "hal_002.ome.tif"]
    (whole,) = match_names([NO_ROUND], names)
    assert isinstance(whole, dict)
    assert {name: groups["fov"] for name, groups in whole.items()} == {"hal_001.tif": "001", "hal_002.ome.tif": "002"}
    (start,) = match_names([r"(?P<imageType>hal)_(?P<fov>[0-9]+)_e"], names)
    assert start == {"hal_001_extra.tif": {"imageType": "hal", "fov": "001"}}
    (broken,) = match_names(["("], names)
    assert isinstance(broken, str)
