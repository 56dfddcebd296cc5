"""Data whose truth is known: molecules, optics and camera of one stack, and a whole tissue on disk."""

from merfish.simulate.optics import Imaging
from merfish.simulate.scoring import score_calls
from merfish.simulate.stack import simulate_stack

__all__ = ["Imaging", "score_calls", "simulate_stack"]
