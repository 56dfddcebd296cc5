"""One registered stack in a file: what ``merfish decode`` does."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from merfish import results
from merfish._files import file_record, write_json
from merfish.calls.error_model import bit_error_rates, tally_words
from merfish.calls.filtering import keep_at_rate, rate_calls
from merfish.calls.fit import codebook_fits, count_fit, refuse_misfit
from merfish.codebook import read_codebook
from merfish.errors import InputError
from merfish.imaging.images import read_stack
from merfish.pipeline import folder
from merfish.pipeline.manifest import versions
from merfish.pipeline.record import call_figures
from merfish.stack import find_all
from merfish.transcripts import write_transcripts


def decode_file(
    stack: Path, codebook: Path, out: Path, *, method: str, preprocess: bool, misidentification_rate: float
) -> dict[str, Any]:
    """Decode an image file; write transcripts before and after filtering, and ``run.json``. Returns its figures.

    Raises InputError if ``out`` holds a whole run, CodebookMisfit if the images do not fit the codebook.
    """
    if (out / results.FIELDS).exists():
        raise InputError(f"{out} holds a run of a whole experiment; choose another folder")
    started = time.perf_counter()
    book = read_codebook(codebook)
    unrated = find_all(read_stack(stack), book, method=method, preprocess=preprocess)
    verdict = codebook_fits(count_fit(unrated), book)
    if misidentification_rate < 1:
        refuse_misfit(verdict)
    found = rate_calls(unrated, book)
    keep = keep_at_rate(1 - found["probability"].to_numpy(float), misidentification_rate)
    word, shown, probability = (found[name].to_numpy() for name in ("barcode_id", "shown", "probability"))
    words = tally_words(word, shown, probability, keep, book)
    record = {
        "versions": versions(),
        "parameters": {"method": method, "preprocess": preprocess, "misidentification_rate": misidentification_rate},
        "inputs": {path.name: {"path": str(path), **file_record(path)} for path in (stack, codebook) if path.is_file()},
        "bit_error_rates": bit_error_rates(words, book).to_dict("list"),
        "codebook_fit": asdict(verdict),
        "figures": call_figures(words, book),
        "seconds": {"total": time.perf_counter() - started},
    }
    with folder.owned(out):
        stage = folder.new_stage(out)
        write_transcripts(found, stage / results.ALL_TRANSCRIPTS)
        write_transcripts(found[keep].reset_index(drop=True), stage / results.TRANSCRIPTS)
        write_json(stage / results.RUN, record)
        folder.publish(out)
    return call_figures(words, book)
