"""Simulated data with known truth: one stack, or a whole tissue as a raw experiment on disk."""

from merfish.simulate.disturbances import Disturbances
from merfish.simulate.experiment import simulate_experiment
from merfish.simulate.optics import Imaging
from merfish.simulate.scoring import match_calls, score_calls
from merfish.simulate.stack import simulate_stack

__all__ = ["Disturbances", "Imaging", "match_calls", "score_calls", "simulate_experiment", "simulate_stack"]
