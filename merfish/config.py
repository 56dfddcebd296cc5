"""What a run may be told, with every default in one place."""

from __future__ import annotations

import os
from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from merfish.errors import InputError

MISIDENTIFICATION_RATE = 0.05  # share of kept calls that may be wrong; Chen et al. 2015 and MERlin aim at the same
# Decoders, each with the sigmas of the band-pass filter before it: smoothing, background; pixel, for a PSF of 1.35 px
FILTER_SIGMAS = {
    # spots gain from sharp images, in which neighbours stay apart; in crowds from a narrower background still, which
    # costs real images and tissue with light out of focus more than it gains
    "spots": (0.7, 2.0),
    # pixels gain from smooth ones; the background is wider than any spot and narrower than cells' glow
    "pixels": (1.0, 3.0),
    "hamming": (1.0, 3.0),
}
DEFAULT_METHOD = "spots"


class RunConfig(BaseModel):
    """Parameters of `merfish.run`; a YAML file names any of them."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: str = DEFAULT_METHOD
    # share of kept calls that may be wrong
    misidentification_rate: float = Field(default=MISIDENTIFICATION_RATE, gt=0, le=1)
    # pixel, sigmas of the band-pass filter; what the method wants when not given
    smoothing: float | None = Field(default=None, ge=0)
    background: float | None = Field(default=None, gt=0)
    # names of the stains, as channelName in the data organization; cells are not segmented without the first
    nuclei_stain: str = "DAPI"
    cytoplasm_stain: str = "polyT"
    # image files of the light on each pixel, by colour as in the data organization; measured where not given
    flat_fields: dict[str, str] = Field(default_factory=dict)
    # camera counts without light; measured where not given
    dark_level: float | None = Field(default=None, ge=0)
    # fields from which the light, chromatic shifts, background and scale of the bits are estimated
    normalization_fields: int = Field(default=6, ge=1)

    @field_validator("method")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in FILTER_SIGMAS:
            raise ValueError(f"expected one of {', '.join(FILTER_SIGMAS)}")
        return name

    @property
    def filter_sigmas(self) -> tuple[float, float]:
        """Smoothing and background sigma, pixel."""
        smoothing, background = FILTER_SIGMAS[self.method]
        return (
            smoothing if self.smoothing is None else self.smoothing,
            background if self.background is None else self.background,
        )


def read_config(path: str | os.PathLike[str] | None) -> RunConfig:
    """The defaults, changed as a YAML file says. Raises InputError naming the file and the field."""
    if path is None:
        return RunConfig()
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{path}: cannot read the configuration: {error}") from error
    if not isinstance(values, dict):
        raise InputError(f"{path}: expected 'name: value' lines, got {type(values).__name__}")
    try:
        return RunConfig(**values)
    except ValidationError as error:
        faults = "; ".join(
            f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}, got {fault['input']!r}" for fault in error.errors()
        )
        raise InputError(f"{path}: {faults}. Known: {', '.join(RunConfig.model_fields)}") from error
