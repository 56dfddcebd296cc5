from __future__ import annotations

import os
from importlib.util import find_spec

import pytest
from hypothesis import HealthCheck, settings

# These tests need other environments, which .ci/exchange, .ci/scvi and .ci/napari create.
collect_ignore = [] if find_spec("squidpy") else ["exchange_roundtrip.py", "analysis_roundtrip.py"]
collect_ignore += [] if find_spec("scvi") else ["scvi_roundtrip.py"]
collect_ignore += [] if find_spec("napari_spatialdata") else ["napari_roundtrip.py"]

os.environ["MPLBACKEND"] = "Agg"
if "PYTEST_XDIST_WORKER" in os.environ:  # each process has one core; threads of torch that wait for others are slow
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if find_spec("torch"):
        import numba
        import torch

        numba.get_num_threads()  # launches Numba's threads, which sets the number of torch's
        torch.set_num_threads(1)
# the first example includes seconds of compilation
settings.register_profile(
    "default", deadline=None, max_examples=50, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
settings.load_profile("default")


@pytest.fixture(scope="session")
def raw(tmp_path_factory):
    """A raw experiment of four fields."""
    from merfish.simulate import simulate_experiment

    return simulate_experiment(tmp_path_factory.mktemp("raw") / "tissue", fields=(2, 2), shape=(256, 256), seed=2)


@pytest.fixture(scope="session")
def done(raw, tmp_path_factory):
    """The folder of a run of that experiment."""
    import merfish

    out = tmp_path_factory.mktemp("run") / "out"
    merfish.run(raw, out=out)
    return out


@pytest.fixture
def short_reports(request, monkeypatch):
    """Leave the figures out of reports, which take two fifths of the time of a run of small fields.

    Modules whose tests do not concern figures use it. Verdicts and warnings remain. A test of unusual data, for which
    figures must be drawn as well, is marked ``draws``.
    """
    from merfish.report import sections

    if request.node.get_closest_marker("draws"):
        return
    monkeypatch.setattr(sections, "sections_of", lambda run, others: [sections.headline(run, others)])
