"""Codebooks other than 16 bits of distance 4: in-situ sequencing with one colour per round, distance 2, more bits."""

from __future__ import annotations

import json
from itertools import product

import numpy as np
import pytest

from command import call
from merfish import decode, mhd4_codebook, simulate_stack
from merfish.codebook import Codebook, check_codebook, write_codebook
from merfish.decoding.pixels import CodeLookup
from merfish.simulate import Imaging, score_calls

N_BLANKS = 12


def one_hot_codebook(last_checks: bool) -> Codebook:
    """Make 4 rounds x 4 colours, one colour per round; the last round is free or a checksum of the others."""
    words = [
        np.eye(4, dtype=np.uint8)[list(w)].ravel()
        for w in product(range(4), repeat=4)
        if not last_checks or sum(w) % 4 == 0
    ]
    chosen = np.random.default_rng(0).permutation(words)[:120]
    names = [f"g{k}" for k in range(len(chosen) - N_BLANKS)] + [f"Blank-{k}" for k in range(N_BLANKS)]
    return Codebook(tuple(names), ("",) * len(names), chosen, tuple(f"round{r}_{c}" for r in range(4) for c in "ACGT"))


def pairs_codebook() -> Codebook:
    """Make 14 bits, weight 4, distance 2: any four bits."""
    words = np.array([w for w in product((0, 1), repeat=14) if sum(w) == 4], np.uint8)
    chosen = np.random.default_rng(1).permutation(words)[:200]
    names = [f"g{k}" for k in range(len(chosen) - 40)] + [f"Blank-{k}" for k in range(40)]
    return Codebook(tuple(names), ("",) * len(names), chosen, tuple(f"bit{k}" for k in range(14)))


BOOKS = {
    "one-hot, distance 4": one_hot_codebook(last_checks=True),
    "one-hot, distance 2": one_hot_codebook(last_checks=False),
    "14 bits, distance 2": pairs_codebook(),
    "22 bits": mhd4_codebook([f"g{k}" for k in range(240)], n_bits=22),
}


def test_one_hot_words_show_one_colour_a_round():
    for name, distance in (("one-hot, distance 4", 4), ("one-hot, distance 2", 2)):
        found = check_codebook(BOOKS[name])
        assert (found.min_distance, found.weights) == (distance, {4: found.n_words})
        assert (BOOKS[name].words.reshape(-1, 4, 4).sum(axis=2) == 1).all()


@pytest.mark.parametrize(
    ("name", "method", "recall", "precision"),
    [
        ("one-hot, distance 4", "spots", 0.88, 0.93),
        ("one-hot, distance 4", "hamming", 0.75, 0.93),
        ("one-hot, distance 2", "spots", 0.78, 0.9),
        ("one-hot, distance 2", "hamming", 0.42, 0.93),
        ("14 bits, distance 2", "spots", 0.7, 0.9),
        ("14 bits, distance 2", "hamming", 0.48, 0.93),
        ("22 bits", "spots", 0.88, 0.93),
        ("22 bits", "hamming", 0.75, 0.93),
    ],
)
def test_other_codes_are_decoded(name, method, recall, precision):
    imaging = Imaging(lost=0.05, gained=0.01)
    stack, truth = simulate_stack(BOOKS[name], shape=(160, 160), density=0.006, seed=5, imaging=imaging)
    score = score_calls(decode(stack, BOOKS[name], method=method), truth, shape=(160, 160))
    assert score["recall"] > recall
    assert score["precision"] > precision


@pytest.mark.parametrize("name", ["one-hot, distance 2", "14 bits, distance 2"])
def test_hamming_of_distance_2_detects_every_error_and_corrects_none(name):
    book = BOOKS[name]
    lookup = CodeLookup(book)
    assert (lookup(book.codes)[0] == np.arange(book.n_words)).all()
    for bit in range(book.n_bits):
        assert (lookup(book.codes ^ np.uint64(1 << bit))[0] == -1).all()


def test_a_code_that_only_detects_says_so(monkeypatch, tmp_path, capsys):
    book = BOOKS["one-hot, distance 2"]
    write_codebook(book, tmp_path / "book.csv")
    np.save(tmp_path / "stack.npy", simulate_stack(book, shape=(96, 96), seed=1)[0])
    arguments = ["decode", tmp_path / "stack.npy", "--codebook", tmp_path / "book.csv", "--out", tmp_path / "out"]
    assert call(monkeypatch, *arguments) == 0
    assert "minimum distance 2: one error is detected but cannot be corrected" in capsys.readouterr().out
    figures = json.loads((tmp_path / "out" / "run.json").read_text())["figures"]
    assert any("minimum distance 2" in warning for warning in figures["warnings"])
