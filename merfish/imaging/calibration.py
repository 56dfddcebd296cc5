"""What all fields of an experiment share: the microscope's light and colours, background and scale of the bits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from merfish.imaging.chromatic import ColorFit, fit_chromatic
from merfish.imaging.illumination import Glow, KnownLight, Light, correct_light, fit_light
from merfish.imaging.normalize import FieldSpots, Normalization, shared_normalization
from merfish.imaging.organization import Channel


@dataclass(frozen=True, eq=False)
class Calibration:
    """What is measured on some fields and applied to all.

    normalization: of the bits. chromatic: a fit for each colour by its name; the reference colour has none. light: of
    each colour.
    """

    normalization: Normalization
    chromatic: dict[str, ColorFit]
    light: dict[str, Light]

    def maps_of_bits(self, bits: Sequence[Channel]) -> np.ndarray | None:
        """Chromatic maps (bit, 2, 3) for `align`; None if no colour needs one."""
        maps = [self.chromatic[bit.color].map if bit.color in self.chromatic else np.eye(2, 3) for bit in bits]
        return None if all(np.array_equal(at, np.eye(2, 3)) for at in maps) else np.stack(maps)

    def even_light(self, stack: np.ndarray, bits: Sequence[Channel]) -> np.ndarray:
        """Raw images (bit, z, y, x) without hot pixels, under even light; the same array if nothing is to be done."""
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
        """Of each colour: share of the full light on the darkest pixel, dark level (counts), number of hot pixels."""
        return {
            color: {
                "least": float(light.share((64, 64) if light.flat is None else light.flat.shape).min()),
                "dark": light.dark,
                "hot": len(light.hot),
            }
            for color, light in self.light.items()
        }

    def to_dict(self) -> dict[str, Any]:
        """For JSON, exactly."""
        fits = {color: fit.to_dict() for color, fit in self.chromatic.items()}
        light = {color: light.to_dict() for color, light in self.light.items()}
        return {"normalization": self.normalization.to_dict(), "chromatic": fits, "light": light}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], given: Mapping[str, KnownLight] | None = None) -> Calibration:
        """What `to_dict` gave; flat fields that were given are not in it and are given again."""
        fits = {color: ColorFit.from_dict(fit) for color, fit in values["chromatic"].items()}
        light = {
            color: replace(Light.from_dict(found), flat=given[color].flat if given else None)
            for color, found in values["light"].items()
        }
        return cls(Normalization.from_dict(values["normalization"]), fits, light)


@dataclass(frozen=True, eq=False)
class Survey:
    """Summary of a field from which, with others, the calibration is made.

    spots: where drift is taken out and nothing else; shifts: that drift, (bit, 2) dy, dx in pixel; glows: of each
    colour by its name, empty where raw images are not known.
    """

    spots: FieldSpots
    shifts: np.ndarray
    glows: dict[str, Glow]


def calibrate(
    fields: Sequence[Survey], bits: Sequence[Channel], given: Mapping[str, KnownLight] | None = None
) -> Calibration:
    """Measure from some fields what all of them share. given: what is known of the light of each colour.

    The reference of the chromatic maps is the colour of most bits, of several the one that comes first.
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
    return Calibration(shared_normalization(spots, len(bits)), chromatic, light)


def under_even_light(field: Survey, light: Mapping[str, Light], bits: Sequence[Channel]) -> FieldSpots:
    """The spots of a field, as high as they would be under full light everywhere."""
    spots = field.spots
    y, x = (np.stack([spots.y, spots.x]) + field.shifts[spots.bit].T).round().astype(int)
    y, x = np.clip(y, 0, spots.shape[0] - 1), np.clip(x, 0, spots.shape[1] - 1)
    height = spots.height.copy()
    for color, known in light.items():
        if not known.even:
            rows = np.array([bit.color == color for bit in bits])[spots.bit]
            height[rows] /= known.share(spots.shape)[y[rows], x[rows]]
    return replace(spots, height=height)
