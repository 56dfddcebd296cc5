"""One field, from its files to a registered and filtered stack."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd

from merfish._jit import map_bits
from merfish._text import shown
from merfish.config import RunConfig
from merfish.errors import InputError
from merfish.imaging.calibration import Calibration, Survey
from merfish.imaging.experiment import Experiment
from merfish.imaging.frames import read_bits, read_fiducials, read_reference, read_stain, read_stain_beads
from merfish.imaging.illumination import Glow, KnownLight, Light, given_flat, measure_glow
from merfish.imaging.images import read_frames
from merfish.imaging.leaks import peak_light
from merfish.imaging.normalize import Normalization, find_spots
from merfish.imaging.organization import NO_ROUND
from merfish.imaging.preprocess import bandpass
from merfish.imaging.quality import camera_ceiling, measure_quality
from merfish.imaging.registration import align, measure_drift, measure_field_drift
from merfish.imaging.unmixing import subtract_leaks

# largest fraction of saturated pixels, median over bits; about the fraction that spots cover
MOST_SATURATED = 0.01


@dataclass(frozen=True, eq=False)
class RegisteredField:
    """A field ready to decode.

    bits: (bit, z, y, x) float32, filtered. drift: one row for each round, from `measure_field_drift`. shifts: (bit, 2)
    dy, dx in pixels, the drift of each bit. valid: (y, x) bool, where all rounds have an image. saturated: (bit,)
    int64, number of pixels at the upper end of the camera's range, in all planes. quality: one row for each bit, from
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
    bits = read_bits(experiment, fov)
    aligned = _align(experiment, fov, bits, config, calibration)
    if calibration is not None and calibration.leaks:
        subtract_leaks(aligned.filtered, calibration.leaks)
    quality = _quality(experiment, fov, bits, aligned.filtered, aligned.round_of_bit)
    shifts, saturated = aligned.shifts, aligned.saturated
    return RegisteredField(aligned.filtered, aligned.drift, shifts, aligned.valid, saturated, quality)


def survey_field(experiment: Experiment, fov: int, config: RunConfig) -> Survey:
    """Measure the quantities of one field that the calibration needs.

    Raises InputError if a round cannot be registered, or the bits are saturated.
    """
    bits = read_bits(experiment, fov)
    glows: dict[str, Glow] = {}
    if not experiment.registered:
        for color in dict.fromkeys(channel.color for channel in experiment.bits):
            images = [image for image, channel in zip(bits, experiment.bits, strict=True) if channel.color == color]
            glows[color] = measure_glow(np.concatenate(images))
    # hot pixels would look like spots in every bit
    hot = {color: Light(np.zeros((1, 1)), 0.0, glow.hot) for color, glow in glows.items()}
    only_hot = Calibration(Normalization.identity(len(bits)), {}, hot)
    aligned = _align(experiment, fov, bits, config, only_hot)
    spots = find_spots(aligned.filtered)
    return Survey(spots, peak_light(aligned.filtered, spots), aligned.shifts, glows)


class _Aligned(NamedTuple):
    """As in `RegisteredField`; filtered: its bits; round_of_bit: (bit,)."""

    filtered: np.ndarray
    drift: pd.DataFrame
    shifts: np.ndarray
    valid: np.ndarray
    saturated: np.ndarray
    round_of_bit: np.ndarray


def _align(
    experiment: Experiment, fov: int, bits: np.ndarray, config: RunConfig, calibration: Calibration | None
) -> _Aligned:
    smoothing, background = config.filter_sigmas
    ceiling = camera_ceiling(bits)
    saturated = np.array(map_bits(lambda image: np.count_nonzero(image >= ceiling), bits))
    if experiment.registered:
        everywhere, still = np.ones(bits.shape[-2:], bool), np.zeros((len(bits), 2))
        filtered = bandpass(bits, smoothing=smoothing, background=background)
        return _Aligned(filtered, pd.DataFrame(), still, everywhere, saturated, np.full(len(bits), NO_ROUND))
    share = float(np.median(saturated)) / bits[0].size
    if share > MOST_SATURATED:
        raise InputError(f"field {fov}: {share:.1%} of the pixels of its bits are saturated; spots cannot be separated")
    maps = None
    if calibration is not None:
        bits, maps = calibration.even_light(bits, experiment.bits), calibration.maps_of_bits(experiment.bits)
    beads, round_of_bit = read_fiducials(experiment, fov)
    drift = measure_field_drift(beads, bits, round_of_bit)
    lost = drift.loc[~drift["ok"].astype(bool), "round"].tolist()
    if lost:
        raise InputError(f"field {fov}: rounds {', '.join(map(str, lost))} do not match round 0 at any drift")
    shifts = drift[["dy", "dx"]].to_numpy(float)[round_of_bit]
    aligned, valid = align(bits, shifts, maps)
    filtered = bandpass(aligned, smoothing=smoothing, background=background, out=aligned)
    return _Aligned(filtered, drift, shifts, valid, saturated, round_of_bit)


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
    """Names of the nuclear and the cytoplasmic stain in the experiment; None for a default that it does not have.

    Raises InputError if the configuration sets a stain that the experiment does not have.
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


def other_stains(experiment: Experiment, config: RunConfig) -> tuple[list[str], list[str]]:
    """Names of the stains of cells, and of the genes imaged one by one, as spelled in the experiment.

    Both are rows without a bit; those that the configuration does not name as stains are genes. In a folder of
    registered stacks they are the other images, and none is a gene. Raises InputError if the configuration sets a stain
    that the experiment does not have.
    """
    named = {name.lower() for name in (*config.stains, config.nuclei_stain, config.cytoplasm_stain)}
    known = [channel.name for channel in experiment.stains]
    missing = [name for name in config.stains if name.lower() not in {name.lower() for name in known}]
    if missing and "stains" in config.model_fields_set:
        raise InputError(
            f"stains: the experiment has no stain {shown(missing[0])}; it has {', '.join(known) or 'none'}"
        )
    stains = [name for name in known if name.lower() in named]
    return stains, [] if experiment.registered else [name for name in known if name not in stains]


def stain_shifts(
    experiment: Experiment, fov: int, names: Sequence[str]
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Measure the drift of stains relative to round 0, (2,) dy, dx in pixels, and why some are unknown, by name.

    The beads of round 0 are read once, and all drifts are measured together. A stain of unknown drift gets drift 0.
    Raises InputError for an unknown stain.
    """
    shifts: dict[str, np.ndarray] = {name: np.zeros(2) for name in names}
    beads = {name: read_stain_beads(experiment, fov, name) for name in names}
    if experiment.registered or not names:
        return shifts, {}
    reference = read_reference(experiment, fov)
    if reference is None:
        return shifts, dict.fromkeys(names, "the bits have no beads to align it with")
    faults = {name: "it has no beads" for name in names if beads[name] is None}
    seen = {name: own for name, own in beads.items() if own is not None}
    # stains of one round share its beads
    of = {name: next(other for other in seen if np.array_equal(seen[other], own)) for name, own in seen.items()}
    distinct = list(dict.fromkeys(of.values()))
    drift = measure_drift(np.stack([reference, *(seen[name] for name in distinct)])).iloc[1:].set_axis(distinct)
    for name, source in of.items():
        if drift.at[source, "ok"]:
            shifts[name] = drift.loc[source, ["dy", "dx"]].to_numpy(float)
        else:
            faults[name] = "its beads do not match those of round 0 at any drift"
    return shifts, faults


def aligned_stain(experiment: Experiment, fov: int, name: str, shift: np.ndarray) -> np.ndarray:
    """Read a stain (z, y, x) and correct the drift measured by `stain_shifts`."""
    planes = read_stain(experiment, fov, name)
    return align(planes[None], shift[None])[0][0] if shift.any() else planes


def aligned_gene(
    experiment: Experiment, fov: int, name: str, shift: np.ndarray, config: RunConfig, calibration: Calibration
) -> np.ndarray:
    """Read a gene imaged by itself, (z, y, x) float32, processed like the bits: illumination, alignment, filter."""
    channel = experiment.stain(name)
    smoothing, background = config.filter_sigmas
    planes = calibration.even_light(read_stain(experiment, fov, name)[None], [channel])
    aligned = align(planes, shift[None], calibration.maps_of_bits([channel]))[0][0]
    return bandpass(aligned, smoothing=smoothing, background=background, out=aligned)
