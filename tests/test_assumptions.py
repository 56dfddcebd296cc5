from __future__ import annotations

import numpy as np
import pytest

from merfish import mhd4_codebook, simulate_stack
from merfish.codebook import Codebook
from merfish.decoding.assumptions import broken_assumptions
from merfish.pipeline.record import molecule_lines
from merfish.simulate import Imaging
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
    reasons = broken_assumptions(filtered, BOOK, normalization, 256)
    assert len(reasons) == (expected is not None)
    assert all(expected in reason for reason in reasons)


def test_books_that_correct_nothing_are_named():
    words = np.array([[1, 1, 0, 0], [1, 0, 1, 0], [0, 1, 1, 0]], np.uint8)
    book = Codebook(("a", "b", "c"), ("",) * 3, words, ("1", "2", "3", "4"))
    stack, _ = simulate_stack(book, shape=(128, 128), density=0.01, seed=22)
    filtered, normalization = prepare(stack, book, method="pixels")
    (reason,) = broken_assumptions(filtered, book, normalization, 128)
    assert "minimum distance is 2" in reason


def test_the_console_names_what_the_decoder_does_not_allow_for():
    figures = {
        "n_found": 9, "n_kept": 8, "n_blank": 0, "n_found_blank": 20, "blanks_in_book": True, "warnings": [],
        "misidentification_rate": 0.05, "broken_assumptions": ["the bits are shifted"],
    }  # fmt: skip
    assert "the bits are shifted; --method spots" in molecule_lines(figures)[1]
