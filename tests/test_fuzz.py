"""A few hundred of the mutated inputs of benchmarks/fuzz.py are accepted or rejected by InputError."""

from __future__ import annotations

import pytest

from benchmarks import fuzz


def test_whole_inputs_are_accepted():
    fuzz.check_whole()


@pytest.mark.filterwarnings("ignore")  # warnings of libraries about damaged files
@pytest.mark.parametrize("kind", fuzz.KINDS)
def test_mutated_inputs_are_accepted_or_rejected(kind, monkeypatch):
    monkeypatch.setattr(fuzz.signal, "alarm", lambda seconds: None)
    outcomes = {seed: fuzz.try_one(kind, seed)[0] for seed in range(40)}
    assert {seed: what for seed, what in outcomes.items() if what not in ("accepted", "rejected")} == {}
    assert set(outcomes.values()) == {"accepted", "rejected"}
