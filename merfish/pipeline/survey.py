"""Survey sampled fields, and reduce the surveys to the calibration that all fields share.

The sample does not depend on which fields are requested. Fields are surveyed in an order that spreads over the
experiment, until enough of them show molecules.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from merfish import results
from merfish.config import RunConfig
from merfish.errors import InputError
from merfish.imaging.calibration import Calibration, Survey, calibrate
from merfish.imaging.experiment import Experiment
from merfish.imaging.field import known_light, survey_field
from merfish.pipeline.cluster import Failure, RunMap
from merfish.pipeline.folder import CALIBRATION, digest, read_checked, write_checked
from merfish.pipeline.manifest import Manifest
from merfish.pipeline.progress import Display

# clear spots in the median bit; with 20 heights, their median, the scale of the bit, is known to 10 %
FEWEST_SPOTS = 20
# fields that are decoded a second time with added molecules: about a thousand in each of 1024 x 1024 px at 0.01
# molecules/px, which determine the detection efficiency to 0.01
SPIKED_FIELDS = 3
GOLDEN = (np.sqrt(5) - 1) / 2


@dataclass(frozen=True, eq=False)
class Calibrated:
    """The calibration, its digest, and why each surveyed field was not used, "" if it was used."""

    calibration: Calibration
    digest: str
    surveyed: dict[int, str]

    @property
    def spiked(self) -> frozenset[int]:
        """The fields in which the detection efficiency is measured, see `merfish.simulate.spikes`."""
        return frozenset([fov for fov, reason in self.surveyed.items() if not reason][:SPIKED_FIELDS])

    @property
    def notice(self) -> str:
        """A warning if no field shows molecules, else empty."""
        dull = {fov: reason for fov, reason in self.surveyed.items() if reason}
        used = len(self.surveyed) - len(dull)
        if used:
            return ""
        told = "; ".join(f"field {fov}: {reason}" for fov, reason in list(dull.items())[:5])
        return f"no field shows molecules, so background and scale of the bits are unknown ({told})"


@dataclass(frozen=True, eq=False)
class SurveyWork:
    """Surveys one field."""

    experiment: Experiment
    config: RunConfig

    def __call__(self, fov: int) -> Survey:
        return survey_field(self.experiment, fov, self.config)


def spread_order(fovs: tuple[int, ...]) -> list[int]:
    """Return the fields in an order whose first few, however many, are spread over all (golden-ratio sequence).

    >>> spread_order((0, 1, 2, 3, 4, 5))
    [3, 0, 4, 2, 5, 1]
    """
    n = len(fovs)
    places = ((np.arange(4 * n + 8) * GOLDEN + 0.5) % 1 * n).astype(int)
    return [fovs[k] for k in dict.fromkeys([*places.tolist(), *range(n)])]


def shared_calibration(
    experiment: Experiment, config: RunConfig, manifest: Manifest, out: Path, run_map: RunMap, display: Display
) -> Calibrated:
    """Measure the calibration on some fields, or read it if it was measured from the same images.

    Raises InputError if no field can be surveyed.
    """
    path = out / results.FIELDS / CALIBRATION
    given = known_light(experiment, config)
    known = read_checked(path)
    if known is not None and _is_current(known["surveyed"], manifest):
        calibration = Calibration.from_dict(known["calibration"], given)
        return Calibrated(calibration, digest(known["calibration"]), _reasons(known["surveyed"]))
    if known is not None:
        display.say("calibration: recomputed, because its images or parameters have changed")
    surveys: dict[int, Survey] = {}
    reasons: dict[int, str] = {}
    with display.step("calibrate"):
        wanted = min(config.normalization_fields, len(experiment.fovs))
        for fov, outcome in _surveyed(experiment, config, wanted, run_map, display):
            reasons[fov] = outcome.reason if isinstance(outcome, Failure) else _shows_too_little(outcome, experiment)
            if isinstance(outcome, Survey):
                surveys[fov] = outcome
    if not surveys:
        told = "; ".join(f"field {fov}: {reason}" for fov, reason in list(reasons.items())[:5])
        raise InputError(f"{experiment.folder}: no field can be used for calibration. {told}")
    useful = {fov: survey for fov, survey in surveys.items() if not reasons[fov]} or surveys
    calibration = calibrate([useful[fov] for fov in sorted(useful)], experiment.bits, given)
    content = {
        "surveyed": [[fov, manifest.of_survey(fov), reason] for fov, reason in reasons.items()],
        "calibration": calibration.to_dict(),
    }
    write_checked(path, content)
    return Calibrated(calibration, digest(content["calibration"]), reasons)


def _surveyed(
    experiment: Experiment, config: RunConfig, wanted: int, run_map: RunMap, display: Display
) -> Iterator[tuple[int, Any]]:
    """Survey fields in order, in batches, until ``wanted`` of them show molecules."""
    order = spread_order(experiment.fovs)
    while wanted and order:
        batch, order = order[:wanted], order[wanted:]
        outcomes = dict(display.track(run_map(SurveyWork(experiment, config), batch), len(batch), "calibrate"))
        for fov in batch:
            yield fov, outcomes[fov]
            if isinstance(outcomes[fov], Survey) and not _shows_too_little(outcomes[fov], experiment):
                wanted -= 1


def _shows_too_little(survey: Survey, experiment: Experiment) -> str:
    spots = np.bincount(survey.spots.bit, minlength=len(experiment.bits))
    median = float(np.median(spots))
    return "" if median >= FEWEST_SPOTS else f"{median:.0f} spots in the median bit"


def _is_current(surveyed: list[Any], manifest: Manifest) -> bool:
    """Return whether a calibration was made from the current images of the fields that would be surveyed now."""
    order = spread_order(manifest.experiment.fovs)[: len(surveyed)]
    return [fov for fov, *_ in surveyed] == order and all(
        manifest.of_survey(fov) == parts for fov, parts, _ in surveyed
    )


def _reasons(surveyed: list[Any]) -> dict[int, str]:
    return {int(fov): reason for fov, _, reason in surveyed}


def read_calibration(out: Path, given: Mapping[str, Any] | None = None) -> Calibration:
    """Read the calibration of a run. Raises InputError if it is missing or damaged."""
    known = read_checked(out / results.FIELDS / CALIBRATION)
    if known is None:
        raise InputError(f"{out / results.FIELDS / CALIBRATION}: missing or damaged; run again into the same folder")
    return Calibration.from_dict(known["calibration"], given)
