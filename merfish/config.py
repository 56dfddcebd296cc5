"""What a run may be told, with every default in one place."""

from __future__ import annotations

import json
import os
from collections import Counter
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from merfish._text import read_text, shown
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
# Sigmas, pixel, with which the filter works: a narrower Gaussian has no weight on neighbouring pixels, a wider one than
# a spot or a cell tells nothing from anything; of two of nearly the same width the difference is rounding.
LEAST_SIGMA, MOST_SMOOTHING, MOST_BACKGROUND = 0.2, 10.0, 100.0
LEAST_RATIO = 1.1
# what labs call stains, whatever the case
OTHER_STAINS = ("DAPI", "Hoechst", "polyT", "WGA", "Cellbound1", "Cellbound2", "Cellbound3")
_MAX_BYTES = 1 << 16  # of a configuration file; every parameter given is some 500


class RunConfig(BaseModel):
    """Parameters of `merfish.run`; a YAML file names any of them."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    method: str = DEFAULT_METHOD
    # share of kept calls that may be wrong
    misidentification_rate: float = Field(default=MISIDENTIFICATION_RATE, gt=0, le=1)
    # pixel, sigmas of the band-pass filter; what the method wants when not given
    smoothing: float | None = Field(default=None, ge=LEAST_SIGMA, le=MOST_SMOOTHING)
    background: float | None = Field(default=None, ge=LEAST_SIGMA, le=MOST_BACKGROUND)
    # names of the stains, as channelName in the data organization; cells are not segmented without the first
    nuclei_stain: str = "DAPI"
    cytoplasm_stain: str = "polyT"
    # names of further stains; other rows of the data organization without a bit number are genes imaged one by one
    stains: list[str] = Field(default_factory=lambda: list(OTHER_STAINS))
    # package.module:function that outlines cells instead of ours: nuclei (y, x), cytoplasm (y, x) or None, micrometre
    # a pixel -> labels (y, x)
    segmenter: str | None = Field(default=None, pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")
    # image files of the light on each pixel, by colour as in the data organization; measured where not given
    flat_fields: dict[str, str] = Field(default_factory=dict)
    # camera counts without light; measured where not given
    dark_level: float | None = Field(default=None, ge=0, le=65535)
    # fields from which the light, chromatic shifts, background and scale of the bits are estimated
    normalization_fields: int = Field(default=6, ge=1, le=10_000)

    @field_validator("method")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in FILTER_SIGMAS:
            raise ValueError(f"expected one of {', '.join(FILTER_SIGMAS)}")
        return name

    @model_validator(mode="after")
    def _filter_works(self) -> RunConfig:
        smoothing, background = self.filter_sigmas
        if background < LEAST_RATIO * smoothing:
            raise ValueError(
                f"background: {background:g} px must be at least {LEAST_RATIO:g} times smoothing, {smoothing:g} px; "
                f"{self.method} takes smoothing {FILTER_SIGMAS[self.method][0]:g} and background "
                f"{FILTER_SIGMAS[self.method][1]:g} where they are not given"
            )
        return self

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
    text = read_text(path, "configuration", _MAX_BYTES)
    try:
        values = _parse(text)
    except (yaml.YAMLError, ValueError, RecursionError, OverflowError) as error:
        raise InputError(f"{path}: cannot read the configuration: {error or type(error).__name__}") from error
    if values is None:
        values = {}
    known = ", ".join(RunConfig.model_fields)
    if not isinstance(values, dict):
        raise InputError(f"{path}: expected 'name: value' lines, got {type(values).__name__}. Known: {known}")
    if "analysis_tasks" in values:
        raise InputError(
            f"{path}: is a parameter file of MERlin (it has analysis_tasks), which does other steps than merfish; "
            f"expected a YAML file with lines 'name: value'. Known: {known}"
        )
    others = [key for key in values if not isinstance(key, str)]
    if others:
        raise InputError(f"{path}: {shown(others[0])}: expected the name of a parameter. Known: {known}")
    try:
        return RunConfig(**values)
    except ValidationError as error:
        faults = "; ".join(_fault(fault) for fault in error.errors()[:5])
        raise InputError(f"{path}: {faults}. Known: {known}") from error


def _fault(fault: Any) -> str:
    # a fault of several parameters together has no place, and names them itself
    place = ".".join(map(str, fault["loc"]))
    return f"{place}: {fault['msg']}, got {shown(fault['input'])}" if place else str(fault["msg"])


def _parse(text: str) -> Any:
    """YAML, or JSON, which YAML is nearly but not quite."""
    if text.lstrip().startswith("{"):
        try:
            return json.loads(text)
        except json.JSONDecodeError:
            pass
    return yaml.load(text, Loader=_PlainLoader)


class _PlainLoader(yaml.SafeLoader):
    """YAML without aliases, of which a few lines can stand for any amount of memory, and without repeated keys."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.MarkedYAMLError(None, None, f"aliases (*{event.anchor}) are not allowed", event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        doubled = next((key for key, count in Counter(keys).items() if count > 1), None)
        if doubled is not None:
            raise yaml.MarkedYAMLError(None, None, f"{doubled!r} stands twice", node.start_mark)
        return super().construct_mapping(node, deep)
