"""One field, from its files to a stack that deserves decoding."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from merfish.config import RunConfig
from merfish.errors import InputError
from merfish.imaging.calibration import Calibration
from merfish.imaging.experiment import Experiment
from merfish.imaging.images import read_bits, read_fiducials, read_stain
from merfish.imaging.preprocess import bandpass
from merfish.imaging.registration import align, measure_drift, measure_field_drift


@dataclass(frozen=True, eq=False)
class RegisteredField:
    """A field ready to decode.

    bits: (bit, z, y, x) float32, filtered. drift: a row a round, as `measure_field_drift` gives it. shifts: (bit, 2)
    dy, dx in pixel, that drift for each bit. valid: (y, x) bool, where all rounds have an image.
    """

    bits: np.ndarray
    drift: pd.DataFrame
    shifts: np.ndarray
    valid: np.ndarray


def register_field(
    experiment: Experiment, fov: int, config: RunConfig, calibration: Calibration | None = None
) -> RegisteredField:
    """Read a field, take out the drift of its rounds and what ``calibration`` knows of the microscope, filter.

    Raises InputError if a round cannot be registered.
    """
    smoothing, background = config.filter_sigmas
    bits = read_bits(experiment, fov)
    if experiment.registered:
        everywhere, still = np.ones(bits.shape[-2:], bool), np.zeros((len(bits), 2))
        filtered = bandpass(bits, smoothing=smoothing, background=background)
        return RegisteredField(filtered, pd.DataFrame(), still, everywhere)
    beads, round_of_bit = read_fiducials(experiment, fov)
    drift = measure_field_drift(beads, bits, round_of_bit)
    lost = drift.loc[~drift["ok"].astype(bool), "round"].tolist()
    if lost:
        raise InputError(f"field {fov}: rounds {', '.join(map(str, lost))} do not match round 0 at any drift")
    shifts = drift[["dy", "dx"]].to_numpy(float)[round_of_bit]
    aligned, valid = align(bits, shifts, None if calibration is None else calibration.maps_of_bits(experiment.bits))
    return RegisteredField(bandpass(aligned, smoothing=smoothing, background=background), drift, shifts, valid)


def register_stain(experiment: Experiment, fov: int, name: str) -> np.ndarray:
    """A stain (y, x), the brightest plane of each pixel, with the drift of its round taken out if its beads tell it."""
    planes, beads = read_stain(experiment, fov, name)
    image = planes.max(axis=0)
    if beads is None:
        return image
    references, _ = read_fiducials(experiment, fov)
    if not len(references):
        return image
    drift = measure_drift(np.stack([references[0], beads])).iloc[1]
    if not drift["ok"]:  # outlines bear a drift of some pixels, a field without cells helps nobody
        return image
    aligned, _ = align(image[None], drift[["dy", "dx"]].to_numpy(float)[None])
    return aligned[0]
