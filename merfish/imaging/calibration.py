"""What all fields of an experiment share: the microscope's colours, and background and scale of the bits."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from merfish.imaging.chromatic import ColorFit, fit_chromatic
from merfish.imaging.normalize import FieldSpots, Normalization, shared_normalization
from merfish.imaging.organization import Channel


@dataclass(frozen=True, eq=False)
class Calibration:
    """What is measured on some fields and applied to all.

    normalization: of the bits. chromatic: a fit for each colour by its name; the reference colour has none.
    """

    normalization: Normalization
    chromatic: dict[str, ColorFit]

    def maps_of_bits(self, bits: Sequence[Channel]) -> np.ndarray | None:
        """Chromatic maps (bit, 2, 3) for `align`; None if no colour needs one."""
        maps = [self.chromatic[bit.color].map if bit.color in self.chromatic else np.eye(2, 3) for bit in bits]
        return None if all(np.array_equal(at, np.eye(2, 3)) for at in maps) else np.stack(maps)

    def to_dict(self) -> dict[str, Any]:
        """For JSON, exactly."""
        fits = {color: {**asdict(fit), "map": fit.map.tolist()} for color, fit in self.chromatic.items()}
        return {"normalization": self.normalization.to_dict(), "chromatic": fits}

    def to_json(self) -> str:
        """As text, exactly."""
        return json.dumps(self.to_dict(), indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Calibration:
        """Read what `to_json` wrote."""
        values: dict[str, Any] = json.loads(text)
        fits = {color: ColorFit(**{**fit, "map": np.array(fit["map"])}) for color, fit in values["chromatic"].items()}
        return cls(Normalization.from_dict(values["normalization"]), fits)


def calibrate(fields: Sequence[FieldSpots], shifts: Sequence[np.ndarray], bits: Sequence[Channel]) -> Calibration:
    """Measure from the spots of some fields what all of them share.

    fields: spots of fields with their drift taken out; shifts: that drift, (bit, 2) dy, dx in pixel, of each.
    The reference is the colour of most bits, of several the one that comes first.
    """
    normalization = shared_normalization(fields, len(bits))
    names = [color for color, _ in Counter(bit.color for bit in bits).most_common()]
    if not fields or len(names) == 1:
        return Calibration(normalization, {})
    color_of_bit = np.array([names.index(bit.color) for bit in bits])
    fits = fit_chromatic(fields, shifts, color_of_bit, fields[0].shape)
    return Calibration(normalization, dict(zip(names[1:], fits[1:], strict=True)))
