"""Decode one registered stack from a file: ``merfish decode``."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from merfish import results
from merfish._files import file_record, write_json
from merfish.calls.error_model import bit_error_rates, tally_words, word_statistics
from merfish.calls.filtering import keep_at_rate, learn_odds, with_odds
from merfish.calls.fit import codebook_fits, count_fit, refuse_misfit
from merfish.codebook import read_codebook
from merfish.config import FILTER_SIGMAS
from merfish.decoding.assumptions import broken_assumptions, measure_optics
from merfish.decoding.methods import decode_filtered
from merfish.errors import InputError
from merfish.imaging.images import read_stack
from merfish.imaging.preprocess import Bandpassed, in_rows
from merfish.pipeline import folder
from merfish.pipeline.fields import spikes_of
from merfish.pipeline.manifest import versions
from merfish.pipeline.record import call_figures, leak_rows, spike_figures
from merfish.stack import prepare
from merfish.transcripts import write_transcripts


def decode_file(
    stack: Path, codebook: Path, out: Path, *, method: str, preprocess: bool, misidentification_rate: float
) -> dict[str, Any]:
    """Decode an image file; write transcripts before and after filtering, and ``run.json``; returns the record.

    Raises InputError if ``out`` holds a whole run, CodebookMisfit if the images do not fit the codebook.
    """
    if (out / results.FIELDS).exists():
        raise InputError(f"{out} holds a run of a whole experiment; choose another folder")
    started = time.perf_counter()
    book = read_codebook(codebook)
    filtered, normalization = prepare(read_stack(stack), book, method=method, preprocess=preprocess)
    unrated = decode_filtered(filtered, book, normalization, method=method)
    verdict = codebook_fits(count_fit(unrated), book)
    if misidentification_rate < 1:
        refuse_misfit(verdict)
    odds, share = learn_odds(unrated, book)
    found = with_odds(unrated, odds)
    keep = keep_at_rate(1 - found["probability"].to_numpy(float), misidentification_rate)
    word, shown, probability = (found[name].to_numpy() for name in ("barcode_id", "shown", "probability"))
    words = tally_words(word, shown, probability, keep, book)
    spikes = spikes_of(filtered, unrated, book, normalization, method, FILTER_SIGMAS[method])
    spike_kept = keeps_spikes(spikes, odds, float(probability[keep].min(initial=1.0)))
    figures = {**call_figures(words, book, share), **spike_figures(spike_kept)}
    if method != "spots":
        rows, height = in_rows(filtered)
        optics = measure_optics(rows, normalization, height, FILTER_SIGMAS[method])
        figures["broken_assumptions"] = broken_assumptions([optics], book)
    statistics = word_statistics(words, book, share, spikes["spike"].to_numpy(), spike_kept)
    record = {
        "versions": versions(),
        "parameters": {"method": method, "preprocess": preprocess, "misidentification_rate": misidentification_rate},
        "inputs": {path.name: {"path": str(path), **file_record(path)} for path in (stack, codebook) if path.is_file()},
        "codebook": {"names": book.names, "is_blank": book.is_blank.tolist()},
        "bit_error_rates": bit_error_rates(words, book).to_dict("list"),
        "words": statistics.to_dict("list"),
        "codebook_fit": asdict(verdict),
        "leaks": leak_rows(filtered.leaks, book.bit_names) if isinstance(filtered, Bandpassed) else [],
        "figures": figures,
        "seconds": {"total": time.perf_counter() - started},
    }
    with folder.owned(out):
        stage = folder.new_stage(out)
        write_transcripts(found, stage / results.ALL_TRANSCRIPTS)
        write_transcripts(found[keep].reset_index(drop=True), stage / results.TRANSCRIPTS)
        write_json(stage / results.RUN, record)
        folder.publish(out)
    return record


def keeps_spikes(spikes: pd.DataFrame, odds: np.ndarray, least: float) -> np.ndarray:
    """Return which of the added molecules (see `spike_in`) a call of at least probability ``least`` finds, bool."""
    kept = np.zeros(len(spikes), bool)
    hit = np.flatnonzero(spikes["x"].notna()) if "x" in spikes else np.empty(0, np.int64)
    if len(hit):
        kept[hit] = with_odds(spikes.iloc[hit], odds)["probability"] >= least
    return kept
