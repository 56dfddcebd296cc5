"""One field, from its files to a registered and filtered stack."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from merfish._jit import map_bits
from merfish._text import shown
from merfish.config import RunConfig
from merfish.errors import InputError
from merfish.imaging.calibration import Calibration, Survey
from merfish.imaging.experiment import Experiment
from merfish.imaging.frames import read_bits, read_fiducials, read_reference, read_stain
from merfish.imaging.illumination import Glow, KnownLight, Light, given_flat, measure_glow
from merfish.imaging.images import read_frames
from merfish.imaging.normalize import Normalization, find_spots
from merfish.imaging.organization import NO_ROUND
from merfish.imaging.preprocess import bandpass
from merfish.imaging.quality import camera_ceiling, measure_quality
from merfish.imaging.registration import align, measure_drift, measure_field_drift

# share of a bit's pixels, median over bits; about as many pixels as the spots cover
MOST_SATURATED = 0.01


@dataclass(frozen=True, eq=False)
class RegisteredField:
    """A field ready to decode.

    bits: (bit, z, y, x) float32, filtered. drift: a row for each round, from `measure_field_drift`. shifts: (bit, 2)
    dy, dx in pixel, that drift for each bit. valid: (y, x) bool, where all rounds have an image. saturated: (bit,)
    int64, pixels at the upper end of the camera's range, in all planes. quality: a row for each bit, from
    `measure_quality`.
    """

    bits: np.ndarray
    drift: pd.DataFrame
    shifts: np.ndarray
    valid: np.ndarray
    saturated: np.ndarray
    quality: pd.DataFrame


def register_field(
    experiment: Experiment, fov: int, config: RunConfig, calibration: Calibration | None = None
) -> RegisteredField:
    """Read a field, correct the drift of its rounds, apply ``calibration``, and filter.

    Raises InputError if a round cannot be registered, or the bits are saturated.
    """
    return _register(experiment, fov, read_bits(experiment, fov), config, calibration)


def survey_field(experiment: Experiment, fov: int, config: RunConfig) -> Survey:
    """Measure on one field what the calibration needs. Raises InputError if a round cannot be registered."""
    bits = read_bits(experiment, fov)
    glows: dict[str, Glow] = {}
    if not experiment.registered:
        for color in dict.fromkeys(channel.color for channel in experiment.bits):
            images = [image for image, channel in zip(bits, experiment.bits, strict=True) if channel.color == color]
            glows[color] = measure_glow(np.concatenate(images))
    # hot pixels would look like spots in every bit
    hot = {color: Light(np.zeros((1, 1)), 0.0, glow.hot) for color, glow in glows.items()}
    only_hot = Calibration(Normalization.identity(len(bits)), {}, hot)
    field = _register(experiment, fov, bits, config, only_hot)
    return Survey(find_spots(field.bits), field.shifts, glows)


def _register(
    experiment: Experiment, fov: int, bits: np.ndarray, config: RunConfig, calibration: Calibration | None
) -> RegisteredField:
    smoothing, background = config.filter_sigmas
    ceiling = camera_ceiling(bits)
    saturated = np.array(map_bits(lambda image: np.count_nonzero(image >= ceiling), bits))
    if experiment.registered:
        everywhere, still = np.ones(bits.shape[-2:], bool), np.zeros((len(bits), 2))
        filtered = bandpass(bits, smoothing=smoothing, background=background)
        quality = _quality(experiment, fov, bits, filtered, np.full(len(bits), NO_ROUND))
        return RegisteredField(filtered, pd.DataFrame(), still, everywhere, saturated, quality)
    share = float(np.median(saturated)) / bits[0].size
    if share > MOST_SATURATED:
        raise InputError(f"field {fov}: {share:.1%} of the pixels of its bits are saturated, spots cannot be separated")
    raw, maps = bits, None
    if calibration is not None:
        bits, maps = calibration.even_light(bits, experiment.bits), calibration.maps_of_bits(experiment.bits)
    beads, round_of_bit = read_fiducials(experiment, fov)
    drift = measure_field_drift(beads, bits, round_of_bit)
    lost = drift.loc[~drift["ok"].astype(bool), "round"].tolist()
    if lost:
        raise InputError(f"field {fov}: rounds {', '.join(map(str, lost))} do not match round 0 at any drift")
    shifts = drift[["dy", "dx"]].to_numpy(float)[round_of_bit]
    aligned, valid = align(bits, shifts, maps)
    filtered = bandpass(aligned, smoothing=smoothing, background=background)
    quality = _quality(experiment, fov, raw, filtered, round_of_bit)
    return RegisteredField(filtered, drift, shifts, valid, saturated, quality)


def _quality(
    experiment: Experiment, fov: int, raw: np.ndarray, filtered: np.ndarray, round_of_bit: np.ndarray
) -> pd.DataFrame:
    names, colors = [bit.name for bit in experiment.bits], [bit.color for bit in experiment.bits]
    return measure_quality(fov, raw, filtered, names, round_of_bit.tolist(), colors)


def known_light(experiment: Experiment, config: RunConfig) -> dict[str, KnownLight]:
    """Illumination of each colour, as configured. Raises InputError for unknown colours or bad images."""
    colors = {channel.color for channel in experiment.bits}
    unknown = sorted(set(config.flat_fields) - colors)
    if unknown:
        raise InputError(f"flat_fields: no bit has the colour {unknown[0]!r}; they have {', '.join(sorted(colors))}")
    flats = {color: given_flat(read_frames(path, [0])[0], path) for color, path in config.flat_fields.items()}
    return {color: KnownLight(flats.get(color), config.dark_level) for color in colors}


def chosen_stains(experiment: Experiment, config: RunConfig) -> tuple[str | None, str | None]:
    """Find the stains of nuclei and cytoplasm in the experiment; None for a default that it does not have.

    Raises InputError if the configuration names another one, and the experiment does not have it.
    """
    known = {stain.name.lower(): stain.name for stain in experiment.stains}
    chosen = []
    for field in ("nuclei_stain", "cytoplasm_stain"):
        asked = getattr(config, field)
        found = known.get(asked.lower())
        if found is None and field in config.model_fields_set:
            raise InputError(
                f"{field}: the experiment has no stain {shown(asked)}; it has {', '.join(known.values()) or 'none'}"
            )
        chosen.append(found)
    return chosen[0], chosen[1]


def register_stains(
    experiment: Experiment, fov: int, names: Sequence[str]
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Read stains (y, x) by name, maximum over planes, aligned with round 0; and why others cannot be aligned.

    The beads of round 0 are read once, and all drifts are measured together. Raises InputError for an unknown stain.
    """
    images: dict[str, np.ndarray] = {}
    beads: dict[str, np.ndarray] = {}
    for name in names:
        planes, own = read_stain(experiment, fov, name)
        images[name] = planes.max(axis=0)
        if own is not None:
            beads[name] = own
    if experiment.registered or not names:
        return images, {}
    reference = read_reference(experiment, fov)
    if reference is None:
        return images, dict.fromkeys(names, "the bits have no beads to align it with")
    faults = {name: "it has no beads" for name in names if name not in beads}
    # stains of one round share its beads
    of = {name: next(other for other in beads if np.array_equal(beads[other], own)) for name, own in beads.items()}
    distinct = list(dict.fromkeys(of.values()))
    drift = measure_drift(np.stack([reference, *(beads[name] for name in distinct)])).iloc[1:].set_axis(distinct)
    for name in beads:
        row = drift.loc[of[name]]
        if row["ok"]:
            images[name] = align(images[name][None], np.array([[row["dy"], row["dx"]]], float))[0][0]
        else:
            faults[name] = "its beads do not match those of round 0 at any drift"
    return images, faults
