"""Parameters of a run: rejected values, and their messages."""

from __future__ import annotations

import time

import numpy as np
import pytest

from merfish.config import FILTER_SIGMAS, LEAST_RATIO, LEAST_SIGMA, RunConfig, read_config
from merfish.errors import InputError
from merfish.imaging.preprocess import bandpass

BOMB = "a: &a [x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1: 2", "1: expected the name of a parameter"),
        ("? [a]\n: 2", "cannot read the configuration"),
        ("null: 2", "None: expected the name"),
        ("dark_level: .inf", "dark_level: .*finite"),
        ("dark_level: .nan", "dark_level: .*finite"),
        ("dark_level: 1e300", "dark_level: .*less than or equal to 65535"),
        ("normalization_fields: 0x" + "f" * 20_000, "normalization_fields: "),
        ("normalization_fields: " + "9" * 5000, "cannot read the configuration"),
        ("normalization_fields: 1000000000000", "normalization_fields: .*10000"),
        ("smoothing: 0", "smoothing: .*greater than or equal to 0.2, got 0"),
        ("smoothing: -1", "smoothing: "),
        ("smoothing: 1e9", "smoothing: .*less than or equal to 10"),
        ("background: 1e9", "background: .*less than or equal to 100"),
        ("smoothing: 2\nbackground: 2", "background: 2 px must be at least 1.1 times smoothing, 2 px"),
        ("smoothing: 3", "background: 2 px must be .* the defaults of spots are smoothing 0.7 and background 2"),
        ("background: .5", "background: 0.5 px must be"),
        ("method: spots\nmethod: pixels", "'method' appears twice"),
        (BOMB, r"aliases \(\*a\) are not allowed"),
        ("a: &a [*a]", "aliases"),
        ("[" * 30_000, "cannot read the configuration"),
        ("x" * 100_000, "100000 bytes, the configuration has at most 65536"),
        ("method: \x1b[31m", "control character"),
        ("segmenter: cellpose.models", "segmenter: .*pattern"),
        ("segmenter: os:system('x')", "segmenter: .*pattern"),
        ("stains: WGA", "stains: .*list"),
        ("method: 2001-99-99", "cannot read the configuration"),
        ('{"analysis_tasks": [{"task": "Decode",\t"module": "merlin.analysis.decode"}]}', "MERlin parameter file"),
        ('{"microns_per_pixel": 0.1}', "microscope file .* --microscope"),
    ],
)
def test_read_config__refuses(text, message, tmp_path):
    (tmp_path / "run.yaml").write_text(text)
    started = time.process_time()
    with pytest.raises(InputError, match=message) as caught:
        read_config(tmp_path / "run.yaml")
    assert time.process_time() - started < 5
    assert len(str(caught.value)) < 2000


def test_read_config__of_nothing_is_the_defaults(tmp_path):
    (tmp_path / "run.yaml").write_text("# nothing\n")
    assert read_config(tmp_path / "run.yaml") == RunConfig() == read_config(None)
    (tmp_path / "run.json").write_text('{"method": "pixels",\n\t"smoothing": 0.5}')
    assert read_config(tmp_path / "run.json").filter_sigmas == (0.5, FILTER_SIGMAS["pixels"][1])


@pytest.mark.parametrize("smoothing", [LEAST_SIGMA, 1.0, 10.0])
def test_filter__works_at_the_limits_of_what_may_be_asked(smoothing):
    """A spot as wide as the filter's remains the highest peak, at its position, with a height far above rounding."""
    background = smoothing * LEAST_RATIO if smoothing > LEAST_SIGMA else 100.0
    y, x = np.mgrid[-60:61, -60:61]
    spot = 1000 * np.exp(-(y**2 + x**2) / (2 * max(smoothing, 1.0) ** 2)) + 100
    filtered = bandpass(spot[None].astype(np.uint16), smoothing=smoothing, background=background)[0]
    assert np.unravel_index(filtered.argmax(), filtered.shape) == (60, 60)
    assert filtered.max() > 20
