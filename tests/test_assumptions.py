from __future__ import annotations

import numpy as np
import pytest

import merfish
from merfish import mhd4_codebook, results, simulate_stack
from merfish.codebook import Codebook
from merfish.config import FILTER_SIGMAS, RunConfig
from merfish.decoding.assumptions import Optics, broken_assumptions, measure_optics
from merfish.pipeline.record import molecule_lines, run_summary
from merfish.simulate import Imaging, simulate_experiment
from merfish.stack import prepare

BOOK = mhd4_codebook([f"g{k}" for k in range(130)])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, None),
        ({"bit_shift": 0.25}, None),
        ({"bit_shift": 0.9}, "shifted"),
        ({"imaging": Imaging(psf_sigma=(2.2, 2.2))}, "wide"),
    ],
)
def test_images_unlike_those_assumed_are_named(options, expected):
    stack, _ = simulate_stack(BOOK, shape=(256, 256), density=0.01, seed=21, **options)
    filtered, normalization = prepare(stack, BOOK, method="pixels")
    reasons = broken_assumptions([measure_optics(filtered, normalization, 256, FILTER_SIGMAS["pixels"])], BOOK)
    assert len(reasons) == (expected is not None)
    assert all(expected in reason for reason in reasons)


def test_books_that_correct_nothing_are_named():
    words = np.array([[1, 1, 0, 0], [1, 0, 1, 0], [0, 1, 1, 0]], np.uint8)
    book = Codebook(("a", "b", "c"), ("",) * 3, words, ("1", "2", "3", "4"))
    (reason,) = broken_assumptions([], book)
    assert "minimum distance is 2" in reason


def test_the_console_names_what_the_decoder_does_not_allow_for():
    figures = {
        "n_found": 9, "n_kept": 8, "n_blank": 0, "n_found_blank": 20, "blanks_in_book": True, "warnings": [],
        "misidentification_rate": 0.05, "broken_assumptions": ["the bits are shifted"],
    }  # fmt: skip
    assert "the bits are shifted; --method spots" in molecule_lines(figures)[1]


@pytest.mark.usefixtures("short_reports")
def test_a_run_names_them_on_the_console_and_in_the_report(tmp_path):
    wide = Imaging(psf_sigma=(2.3, 2.3))
    raw = simulate_experiment(tmp_path / "raw", fields=(1, 1), shape=(256, 256), seed=5, imaging=wide)
    out = tmp_path / "out"
    merfish.run(raw, out=out, config=RunConfig(method="pixels"))
    (reason,) = results.read_run(out)["figures"]["broken_assumptions"]
    assert "the spots are wide" in reason
    assert any(reason in line for line in run_summary(out)["lines"])
    assert reason in (out / results.REPORT).read_text()


def test_fields_without_spots_do_not_dilute_those_with_shifts():
    fields = [Optics(900, 1.3, 0.9), Optics(0, 1.35, 0.0), Optics(0, 1.35, 0.0)]
    (reason,) = broken_assumptions(fields, BOOK)
    assert "root mean square 0.9 px" in reason
