"""Calibration shared by all fields of an experiment: illumination, chromatic maps, background and scale of the bits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from merfish.imaging.chromatic import ColorFit, fit_chromatic
from merfish.imaging.illumination import Glow, KnownLight, Light, correct_light, fit_light
from merfish.imaging.leaks import PeakLight, find_leaks
from merfish.imaging.normalize import FieldSpots, Normalization, shared_normalization
from merfish.imaging.organization import Channel
from merfish.imaging.unmixing import Leak


@dataclass(frozen=True, eq=False)
class Calibration:
    """Quantities that are measured on some fields and applied to all.

    normalization: of the bits. chromatic: chromatic fit of each colour, by name; the reference colour has none. light:
    illumination of each colour, by name. leaks: of light between bits.
    """

    normalization: Normalization
    chromatic: dict[str, ColorFit]
    light: dict[str, Light]
    leaks: tuple[Leak, ...] = ()

    def maps_of_bits(self, bits: Sequence[Channel]) -> np.ndarray | None:
        """Chromatic maps (bit, 2, 3) for `align`; None if no colour needs one."""
        maps = [self.chromatic[bit.color].map if bit.color in self.chromatic else np.eye(2, 3) for bit in bits]
        return None if all(np.array_equal(at, np.eye(2, 3)) for at in maps) else np.stack(maps)

    def even_light(self, stack: np.ndarray, bits: Sequence[Channel]) -> np.ndarray:
        """Correct raw images (bit, z, y, x) for hot pixels and illumination; unchanged if neither is known."""
        if all(light.even and not len(light.hot) for light in self.light.values()):
            return stack
        out = np.empty(stack.shape, np.float32)
        colors = np.array([channel.color for channel in bits])
        for color in np.unique(colors):
            chosen = np.flatnonzero(colors == color)
            planes = stack[chosen].reshape(-1, *stack.shape[-2:])
            if color in self.light:
                planes = correct_light(planes, self.light[color])
            out[chosen] = planes.reshape(len(chosen), *stack.shape[1:])
        return out

    def light_figures(self) -> dict[str, dict[str, float]]:
        """For each colour: relative illumination of the darkest pixel, dark level (counts), number of hot pixels."""
        return {
            color: {
                "least": float(light.share((64, 64) if light.flat is None else light.flat.shape).min()),
                "dark": light.dark,
                "hot": len(light.hot),
            }
            for color, light in self.light.items()
        }

    def to_dict(self) -> dict[str, Any]:
        """Convert to values that JSON stores exactly."""
        fits = {color: fit.to_dict() for color, fit in self.chromatic.items()}
        light = {color: light.to_dict() for color, light in self.light.items()}
        leaks = [list(leak) for leak in self.leaks]
        return {"normalization": self.normalization.to_dict(), "chromatic": fits, "light": light, "leaks": leaks}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], given: Mapping[str, KnownLight] | None = None) -> Calibration:
        """Restore from `to_dict`; flat fields given by the user are not part of it and must be passed again."""
        fits = {color: ColorFit.from_dict(fit) for color, fit in values["chromatic"].items()}
        light = {
            color: replace(Light.from_dict(found), flat=given[color].flat if given else None)
            for color, found in values["light"].items()
        }
        leaks = tuple(Leak(*leak) for leak in values["leaks"])
        return cls(Normalization.from_dict(values["normalization"]), fits, light, leaks)


@dataclass(frozen=True, eq=False)
class Survey:
    """Summary of one field; the calibration is computed from several of them.

    spots: corrected for drift only; peaks: the light of some of them in all bits; shifts: the drift, (bit, 2) dy, dx
    in pixels; glows: of each colour by name, empty if there are no raw images.
    """

    spots: FieldSpots
    peaks: PeakLight
    shifts: np.ndarray
    glows: dict[str, Glow]


def calibrate(
    fields: Sequence[Survey], bits: Sequence[Channel], given: Mapping[str, KnownLight] | None = None
) -> Calibration:
    """Compute the calibration of all fields from the surveys of some. given: known illumination of each colour.

    The reference of the chromatic maps is the colour with the most bits; of several, the first.
    """
    names = [color for color, _ in Counter(bit.color for bit in bits).most_common()]
    color_of_bit = np.array([names.index(bit.color) for bit in bits])
    shifts = [field.shifts for field in fields]
    light = {
        name: fit_light(
            [field.spots for field in fields],
            shifts,
            [field.glows[name] for field in fields],
            color_of_bit == k,
            given[name] if given else None,
        )
        for k, name in enumerate(names)
        if fields and all(name in field.glows for field in fields)
    }
    spots = [under_even_light(field, light, bits) for field in fields]
    fits = fit_chromatic(spots, shifts, color_of_bit, fields[0].spots.shape)[1:] if len(names) > 1 and fields else []
    chromatic = dict(zip(names[1:], fits, strict=False))
    normalization = shared_normalization(spots, len(bits))
    leaks = find_leaks([field.peaks for field in fields], normalization.scale)
    return Calibration(normalization, chromatic, light, leaks)


def under_even_light(field: Survey, light: Mapping[str, Light], bits: Sequence[Channel]) -> FieldSpots:
    """Divide the heights of a field's spots by the relative illumination at their positions on the camera."""
    spots = field.spots
    y, x = (np.stack([spots.y, spots.x]) + field.shifts[spots.bit].T).round().astype(int)
    y, x = np.clip(y, 0, spots.shape[0] - 1), np.clip(x, 0, spots.shape[1] - 1)
    height = spots.height.copy()
    for color, known in light.items():
        if not known.even:
            rows = np.array([bit.color == color for bit in bits])[spots.bit]
            height[rows] /= known.share(spots.shape)[y[rows], x[rows]]
    return replace(spots, height=height)
