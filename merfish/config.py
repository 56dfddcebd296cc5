"""Parameters of a run: defaults, limits, units and sources, and the YAML file that sets them."""

from __future__ import annotations

import json
import os
import textwrap
from collections import Counter
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from merfish._files import whole_file
from merfish._text import read_text, shown
from merfish.errors import InputError

MISIDENTIFICATION_RATE = 0.05  # expected fraction of wrong calls among those kept; as in Chen et al. 2015 and MERlin
# Decoders, each with the sigmas of the band-pass filter before it: smoothing, background; pixel, for a PSF of 1.35 px
FILTER_SIGMAS = {
    # neighbouring spots are resolved better in sharp images; a narrower background would help with crowded molecules,
    # but loses more than that in real images and in tissue with out-of-focus light
    "spots": (0.7, 2.0),
    # pixel vectors are less noisy in smooth images; the background is wider than a spot and narrower than cells
    "pixels": (1.0, 3.0),
    "hamming": (1.0, 3.0),
}
DEFAULT_METHOD = "spots"
# Limits of the filter's sigmas, pixel: a narrower Gaussian has no weight on neighbouring pixels, a wider one blurs
# spots and cells alike, and the difference of two of nearly the same width is rounding error.
LEAST_SIGMA, MOST_SMOOTHING, MOST_BACKGROUND = 0.2, 10.0, 100.0
LEAST_RATIO = 1.1
# names of stains in common use; case is ignored
OTHER_STAINS = ("DAPI", "Hoechst", "polyT", "WGA", "Cellbound1", "Cellbound2", "Cellbound3")
_MAX_BYTES = 1 << 16  # of a configuration file; `merfish config` writes about 3,000
_UNKNOWN = "extra_forbidden"  # type of pydantic's error for a parameter that does not exist


def _per_method(k: int) -> str:
    return ", ".join(f"{sigmas[k]:g} for {name}" for name, sigmas in FILTER_SIGMAS.items())


def parameter(
    default: Any, text: str, *, unit: str = "", source: str = "", must_exist: bool = False, **limits: Any
) -> Any:
    """A pydantic field with the description that `config_yaml` writes.

    source: of the default. must_exist: an error is raised if the experiment lacks a value that is set explicitly.
    """
    about: dict[str, Any] = {"unit": unit, "source": source, "must_exist": must_exist}
    return Field(default=default, description=text, json_schema_extra=about, **limits)


class RunConfig(BaseModel):
    """Parameters of `merfish.run`; a YAML file sets any of them."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    method: str = parameter(
        DEFAULT_METHOD,
        f"Decoder: {', '.join(FILTER_SIGMAS)}. spots fits spots and combines the evidence of all bits, pixels assigns "
        "the nearest word to each pixel, hamming binarises the bits of each pixel and corrects one error.",
        source="spots finds most molecules at equal precision in the simulated stacks of benchmarks/results/decode.md",
    )
    misidentification_rate: float = parameter(
        MISIDENTIFICATION_RATE,
        "Expected share of wrong molecules among those that are kept; 1 keeps every molecule found.",
        unit="share of molecules",
        source="as in Chen et al. 2015 and MERlin",
        gt=0,
        le=1,
    )
    smoothing: float | None = parameter(
        None,
        "Sigma of the Gaussian that smooths the images before decoding. "
        f"null: the default of the method, {_per_method(0)}.",
        unit="px",
        source="chosen on simulated and bundled real images for a PSF of 1.35 px",
        ge=LEAST_SIGMA,
        le=MOST_SMOOTHING,
    )
    background: float | None = parameter(
        None,
        "Sigma of the Gaussian that estimates the background, which is subtracted before decoding. null: the default "
        f"of the method, {_per_method(1)}.",
        unit="px",
        source="chosen on simulated and bundled real images: wider than a spot, narrower than cells",
        ge=LEAST_SIGMA,
        le=MOST_BACKGROUND,
    )
    nuclei_stain: str = parameter(
        "DAPI",
        "channelName of the nuclear stain in the data organization. If the experiment lacks the default stain, cells "
        "are not segmented; if it lacks a stain that is set here, the run stops with an error.",
        source="MERlin's WatershedSegment",
        must_exist=True,
    )
    cytoplasm_stain: str = parameter(
        "polyT",
        "channelName of the stain that fills the cells. If the experiment lacks the default stain, cells are grown "
        "from their nuclei; if it lacks a stain that is set here, the run stops with an error.",
        source="MERlin's WatershedSegment",
        must_exist=True,
    )
    stains: list[str] = parameter(
        list(OTHER_STAINS),
        "channelNames of all stains; case is ignored. Other rows of the data organization without a bit number are "
        "genes imaged one by one. If the list is set here, all of them must exist.",
        source="names in common use, and those of MERSCOPE",
        must_exist=True,
    )
    segmenter: str | None = parameter(
        None,
        "package.module:function that replaces merfish's segmentation: nuclei (y, x), cytoplasm (y, x) or None, "
        "micrometre per pixel -> labels (y, x). null: the segmentation of merfish.",
        pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$",
    )
    stacked_cells: bool = parameter(
        False,
        "Segment cells in 3-D, for tissue in which they lie above each other: each cell has an outline in every plane "
        "and the molecules of its planes. With a single plane or a segmenter, each cell has one outline.",
    )
    flat_fields: dict[str, str] = parameter(
        {},
        "Flat-field images by colour of the data organization, e.g. {'650': flat_650.tif}. The illumination of "
        "colours that are not listed is estimated from the images.",
    )
    dark_level: float | None = parameter(
        None,
        "Counts that the camera reports without light. null: estimated from the images.",
        unit="camera counts",
        ge=0,
        le=65535,
    )
    normalization_fields: int = parameter(
        6,
        "Number of fields from which illumination, chromatic shifts, background and brightness of the bits are "
        "estimated.",
        unit="fields",
        source="each takes about as long as registering one field, 2.6 s at 2048 x 2048 px on 2 cores",
        ge=1,
        le=10_000,
    )

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
                f"the defaults of {self.method} are smoothing {FILTER_SIGMAS[self.method][0]:g} and background "
                f"{FILTER_SIGMAS[self.method][1]:g}"
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


def read_config(path: str | os.PathLike[str] | None, **given: Any) -> RunConfig:
    """Read a YAML file; parameters that it does not name keep their defaults. given: values that override the file.

    Raises InputError naming the file and the parameter.
    """
    if path is None:
        return RunConfig(**given)
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
            f"{path}: this is a MERlin parameter file (it has analysis_tasks); merfish runs other steps and cannot use "
            f"it. Expected a YAML file with lines 'name: value', as 'merfish config' writes it. Known: {known}"
        )
    if "microns_per_pixel" in values:
        raise InputError(
            f"{path}: this is a microscope file (it has microns_per_pixel); give it as --microscope, not as --config"
        )
    others = [key for key in values if not isinstance(key, str)]
    if others:
        raise InputError(f"{path}: {shown(others[0])}: expected the name of a parameter. Known: {known}")
    try:
        return RunConfig(**{**values, **given})
    except ValidationError as error:
        faults = error.errors()[:5]
        hint = f". Known: {known}" if any(fault["type"] == _UNKNOWN for fault in faults) else ""
        raise InputError(f"{path}: {'; '.join(map(_fault, faults))}{hint}") from error


def config_yaml() -> str:
    """All parameters with their defaults as YAML, each described by a comment; `read_config` accepts it."""
    parts = ["# Parameters of 'merfish run EXPERIMENT --out DIR --config THIS_FILE', with their defaults.\n"]
    for name, field in RunConfig.model_fields.items():
        about = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
        text = [field.description or ""]
        text += [f"Unit: {about['unit']}."] if about.get("unit") else []
        limits = [f"{sign} {limit:g}" for sign, limit in _limits(field.metadata)]
        text += [f"Range: {' and '.join(limits)}."] if limits else []
        text += [f"Source: {about['source']}."] if about.get("source") else []
        comment = textwrap.fill(" ".join(text), 100, initial_indent="# ", subsequent_indent="# ")
        value = field.get_default(call_default_factory=True)
        in_line = None if isinstance(value, list) else False  # a list stays on one line, which can be commented out
        default = yaml.safe_dump({name: value}, default_flow_style=in_line, width=1000)
        parts.append(f"{comment}\n{'# ' if about.get('must_exist') else ''}{default}")
    return "\n".join(parts)


def write_config(path: str | os.PathLike[str]) -> None:
    """Write `config_yaml` to a file. Raises InputError if it exists, because it may have been edited."""
    if Path(path).exists():
        raise InputError(f"{path} exists; choose another name")
    with whole_file(path) as part:
        part.write_text(config_yaml(), encoding="utf-8")


def _limits(metadata: list[Any]) -> list[tuple[str, float]]:
    signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
    return [(sign, getattr(m, name)) for m in metadata for name, sign in signs.items() if hasattr(m, name)]


def _fault(fault: Any) -> str:
    # an error of several parameters together has no location, and its message names them
    name = ".".join(map(str, fault["loc"]))
    if fault["type"] == _UNKNOWN:
        return f"{name}: no such parameter"
    return f"{name}: {fault['msg']}, got {shown(fault['input'])}" if name else str(fault["msg"])


def _parse(text: str) -> Any:
    """Parse YAML, or JSON: YAML refuses the tabs that JSON allows."""
    if text.lstrip().startswith("{"):
        try:
            return json.loads(text)
        except json.JSONDecodeError:
            pass
    return yaml.load(text, Loader=_PlainLoader)


class _PlainLoader(yaml.SafeLoader):
    """YAML without repeated keys and without aliases, with which a few lines can expand to any amount of memory."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.MarkedYAMLError(None, None, f"aliases (*{event.anchor}) are not allowed", event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        doubled = next((key for key, count in Counter(keys).items() if count > 1), None)
        if doubled is not None:
            raise yaml.MarkedYAMLError(None, None, f"{doubled!r} appears twice", node.start_mark)
        return super().construct_mapping(node, deep)
