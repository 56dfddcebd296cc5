"""Codebooks: the word of each gene, and the blanks."""

from __future__ import annotations

import csv
import io
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from merfish._files import whole_file
from merfish._text import has_control, listed, read_text, shown
from merfish.errors import InputError

MAX_BITS = 64
MAX_WORDS = 50_000  # all pairs of words are compared; the largest codebooks have about 10,000
_BIT_COLUMN = re.compile(r"bit[ _]?0*(\d+)", re.IGNORECASE)
_BLANK = re.compile(r"blank|notarget", re.IGNORECASE)


def too_many_bits(n_bits: int) -> str:
    """Message for words of more than `MAX_BITS` bits."""
    return (
        f"{n_bits} bits, but at most {MAX_BITS} can be decoded at once; if sets of genes use separate bits (channels "
        "of seqFISH+), decode each set with a codebook and a stack of its own bits"
    )


@dataclass(frozen=True, eq=False)
class Codebook:
    """Words of an experiment, one row for each gene or blank.

    names, ids: one string for each word; names of blanks contain "blank" or "notarget" (any case).
    words: (word, bit) uint8 of 0 and 1, read-only, at most 64 bits.
    bit_names: one string for each bit (readout or ``bit1``...).

    Raises InputError if the shapes do not match, for other values of words, and for names with control characters.
    """

    names: tuple[str, ...]
    ids: tuple[str, ...]
    words: np.ndarray
    bit_names: tuple[str, ...]

    def __post_init__(self) -> None:
        words = np.array(self.words, dtype=np.uint8)
        if words.ndim != 2 or not len(words):
            raise InputError(f"words: expected an array (word, bit), got shape {words.shape}")
        if words.shape[1] > MAX_BITS:
            raise InputError(f"words: {too_many_bits(words.shape[1])}")
        if words.max() > 1:
            raise InputError(f"words: expected 0 and 1 only, got {words.max()}")
        if not len(self.names) == len(self.ids) == len(words) or len(self.bit_names) != words.shape[1]:
            raise InputError(
                f"{len(self.names)} names, {len(self.ids)} ids and {len(self.bit_names)} bit names "
                f"do not match words of shape {words.shape}"
            )
        for name in (*self.names, *self.ids, *self.bit_names):
            if has_control(name):
                raise InputError(f"a name in the codebook has control characters: {shown(name)}")
        words.setflags(write=False)
        object.__setattr__(self, "words", words)

    @property
    def n_words(self) -> int:
        return self.words.shape[0]

    @property
    def n_bits(self) -> int:
        return self.words.shape[1]

    @property
    def is_blank(self) -> np.ndarray:
        """(word,) bool, whether a word is a blank."""
        return np.array([bool(_BLANK.search(name)) for name in self.names])

    @property
    def codes(self) -> np.ndarray:
        """(word,) uint64, each word as a number; the first bit is the least significant."""
        return self.words.astype(np.uint64) @ (np.uint64(1) << np.arange(self.n_bits, dtype=np.uint64))

    @property
    def weights(self) -> np.ndarray:
        """(word,) int64, number of bits that are on."""
        return self.words.sum(axis=1, dtype=np.int64)

    def permuted(self, order: Sequence[int] | np.ndarray) -> Codebook:
        """Return a control with the same names, in which bit k of each word is its former bit ``order[k]``."""
        order = np.asarray(order)
        return Codebook(self.names, self.ids, self.words[:, order], tuple(self.bit_names[k] for k in order))


@dataclass(frozen=True)
class CodebookReport:
    """Result of `check_codebook`. A codebook with ``problems`` is rejected; ``warnings`` are only reported."""

    n_words: int
    n_blanks: int
    n_bits: int
    weights: Mapping[int, int]
    min_distance: int
    corrects: int
    detects: int
    bit_usage: tuple[int, ...]
    problems: tuple[str, ...]
    warnings: tuple[str, ...]


def read_codebook(path: str | os.PathLike[str]) -> Codebook:
    """Read a codebook in any of the common formats, and reject one that cannot be decoded.

    Formats: ``name,id,bit1,...,bitN``; three header lines ``version``, ``codebook_name``, ``bit_names`` and then
    ``name,id,barcode``, with or without spaces in the word; merfishtools' tab-separated ``feat codeword expressed``.

    Raises InputError for other formats, for duplicate names or words, and for a word without on-bits.
    """
    codebook = parse_codebook(path)
    problems = check_codebook(codebook).problems
    if problems:
        raise InputError(f"{path}: {listed(problems)}")
    return codebook


def parse_codebook(path: str | os.PathLike[str]) -> Codebook:
    """Read a codebook as `read_codebook` does, but keep duplicates, so that `check_codebook` can list them."""
    text = read_text(path, "codebook")
    bit_names: list[str] = []
    header: list[str] | None = None
    rows: list[tuple[int, list[str]]] = []
    delimiter = "\t" if "\t" in text.partition("\n")[0] else ","
    reader = csv.reader(io.StringIO(text), delimiter=delimiter, skipinitialspace=True)
    try:
        lines = [(reader.line_num, raw) for raw in reader]
    except csv.Error as error:
        raise InputError(f"{path}: line {reader.line_num}: {error}") from error
    if len(lines) > MAX_WORDS + 10:
        raise InputError(f"{path}: {len(lines)} lines, expected at most {MAX_WORDS} words")
    for line, raw in lines:
        fields = [field.strip() for field in raw]
        while fields and not fields[-1]:
            fields.pop()
        if not fields:
            continue
        if header is not None:
            rows.append((line, fields))
        elif fields[0].lower() == "bit_names":
            bit_names = fields[1:]
        elif fields[0].lower() not in ("version", "codebook_name"):
            header = [field.lower() for field in fields]
    if header is None or not rows:
        raise InputError(f"{path}: no words found; expected a header such as name,id,bit1,... and a row for each word")
    return _assemble(path, header, rows, bit_names)


def _assemble(
    path: str | os.PathLike[str], header: list[str], rows: list[tuple[int, list[str]]], bit_names: list[str]
) -> Codebook:
    bit_columns = sorted((int(m[1]), i) for i, field in enumerate(header) if (m := _BIT_COLUMN.fullmatch(field)))
    if bit_columns and [number for number, _ in bit_columns] != list(range(1, len(bit_columns) + 1)):
        raise InputError(f"{path}: bit columns are numbered {[n for n, _ in bit_columns]}, expected 1, 2, ...")
    word_column = next((header.index(key) for key in ("barcode", "codeword") if key in header), None)
    name_column = next((header.index(key) for key in ("name", "feat", "gene") if key in header), 0)
    id_column = header.index("id") if "id" in header else None
    if not bit_columns and (word_column is None or word_column == name_column):
        raise InputError(
            f"{path}: header {','.join(header)!r} has neither bit1,... columns nor a barcode column; "
            "expected name,id,bit1,... or name,id,barcode"
        )
    names: list[str] = []
    ids: list[str] = []
    words: list[str] = []
    for line, fields in rows:
        fields = fields + [""] * (len(header) - len(fields))
        if bit_columns:
            word = "".join(fields[i] for _, i in bit_columns)
            complete = all(len(fields[i]) == 1 for _, i in bit_columns)
        else:
            word = re.sub(r"\s", "", fields[word_column or 0])
            complete = True
        if not word or not complete or set(word) - {"0", "1"}:
            raise InputError(
                f"{path}: line {line} ({fields[name_column]!r}): expected 0 or 1 for each bit, got {word!r}"
            )
        if words and len(word) != len(words[0]):
            raise InputError(f"{path}: line {line} has {len(word)} bits, the first word has {len(words[0])}")
        if not fields[name_column]:
            raise InputError(f"{path}: line {line}: the word has no name")
        names.append(fields[name_column])
        ids.append(fields[id_column] if id_column is not None else "")
        words.append(word)
    n_bits = len(words[0])
    if n_bits > MAX_BITS:
        raise InputError(f"{path}: {too_many_bits(n_bits)}")
    if bit_names and len(bit_names) != n_bits:
        raise InputError(f"{path}: bit_names lists {len(bit_names)} bits, the words have {n_bits}")
    array = np.array([[int(bit) for bit in word] for word in words], dtype=np.uint8)
    return Codebook(tuple(names), tuple(ids), array, tuple(bit_names or _default_bit_names(n_bits)))


def _default_bit_names(n_bits: int) -> list[str]:
    return [f"bit{k}" for k in range(1, n_bits + 1)]


def write_codebook(codebook: Codebook, path: str | os.PathLike[str]) -> None:
    """Write ``name,id,bit1,...,bitN`` as CSV, atomically."""
    with whole_file(path) as part, open(part, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["name", "id", *_default_bit_names(codebook.n_bits)])
        for name, identifier, word in zip(codebook.names, codebook.ids, codebook.words, strict=True):
            writer.writerow([name, identifier, *word])


def check_codebook(codebook: Codebook) -> CodebookReport:
    """Count words, weights, distances and bit usage, and list problems.

    A minimum Hamming distance d corrects (d - 1) // 2 errors and detects d // 2 while correcting that many.
    """
    codes = codebook.codes
    problems = [
        f"name {name!r} appears {len(rows)} times: words {', '.join(str(row + 1) for row in rows)}"
        for name, rows in _repeated(codebook.names)
    ]
    problems += [
        f"word {''.join(map(str, codebook.words[rows[0]]))} is given to {', '.join(codebook.names[r] for r in rows)}"
        for _, rows in _repeated(codes.tolist())
    ]
    problems += [f"word {codebook.names[row]!r} has no bit on" for row in np.flatnonzero(codes == 0)]
    distance = min_distance(codes)
    weights = dict(sorted(Counter(codebook.weights.tolist()).items()))
    usage = codebook.words.sum(axis=0, dtype=np.int64)
    warnings = []
    if distance == 2:
        warnings.append("minimum distance 2: one error is detected but cannot be corrected")
    elif distance == 1:
        warnings.append("minimum distance 1: an error turns one word into another without being detected")
    if len(weights) > 1:
        warnings.append("words differ in weight: words with more 1s lose more molecules to 1->0 errors")
    if not codebook.is_blank.any():
        warnings.append("no blanks: the misidentification rate cannot be estimated")
    warnings += [f"no word uses bit {k + 1} ({codebook.bit_names[k]})" for k in np.flatnonzero(usage == 0)]
    return CodebookReport(
        n_words=codebook.n_words,
        n_blanks=int(codebook.is_blank.sum()),
        n_bits=codebook.n_bits,
        weights=weights,
        min_distance=distance,
        corrects=max((distance - 1) // 2, 0),
        detects=distance // 2,
        bit_usage=tuple(usage.tolist()),
        problems=tuple(problems),
        warnings=tuple(warnings),
    )


def _repeated(values: Sequence[Any]) -> list[tuple[Any, list[int]]]:
    """Find values that appear more than once, each with its rows."""
    rows: dict[Any, list[int]] = defaultdict(list)
    for row, value in enumerate(values):
        rows[value].append(row)
    return [(value, places) for value, places in rows.items() if len(places) > 1]


def min_distance(codes: np.ndarray) -> int:
    """Smallest Hamming distance between any two words (word,) uint64; the number of bits if there is only one."""
    if len(codes) < 2:
        return MAX_BITS
    return int(min(np.bitwise_count(codes[i + 1 :] ^ codes[i]).min() for i in range(len(codes) - 1)))


def mhd4_codebook(
    genes: Iterable[str], n_bits: int = 16, *, expression: Mapping[str, float] | Sequence[float] | None = None
) -> Codebook:
    """Build a code of weight 4 and minimum distance 4 for a list of genes; the remaining words are blanks.

    The words are the 4-subsets of bits {0..n_bits-1} whose numbers XOR to zero: two such words that share three
    bits share the fourth. For 16 bits they are the 140 words of weight 4 of the extended Hamming code [16, 11, 4],
    which is optimal, A(16,4,4) = 140. Genes are assigned from the most to the least abundant, each to the word whose
    bits have the smallest total abundance so far, so that abundant genes are spread over the imaging rounds.

    expression: abundance of each gene, by name or in the order of ``genes``; equal by default.

    >>> book = mhd4_codebook(["ACTB", "GAPDH"])
    >>> book.n_words, int(book.is_blank.sum()), set(book.weights.tolist())
    (140, 138, {4})

    Raises InputError for duplicate genes, more genes than words, fewer than 4 or more than 64 bits, or abundances that
    are missing, negative or not finite.
    """
    if isinstance(genes, str):
        raise InputError(f"genes: expected a list of names, got {genes!r}")
    genes = [str(gene) for gene in genes]
    if n_bits not in range(4, MAX_BITS + 1):
        raise InputError(f"n_bits must be a whole number from 4 to {MAX_BITS}, got {n_bits!r}")
    subsets = [bits for bits in combinations(range(n_bits), 4) if bits[0] ^ bits[1] ^ bits[2] ^ bits[3] == 0]
    repeated = [gene for gene, count in Counter(genes).items() if count > 1]
    if repeated:
        raise InputError(f"genes are listed more than once: {', '.join(repeated)}")
    if not genes or len(genes) > len(subsets):
        raise InputError(f"{n_bits} bits give {len(subsets)} words of distance 4, got {len(genes)} genes")
    abundance = _abundances(genes, expression)
    load = np.zeros(n_bits)
    free = np.array(subsets)
    chosen: dict[int, np.ndarray] = {}
    for gene in np.argsort(-abundance, kind="stable"):
        pick = int(np.argmin(load[free].sum(axis=1)))
        chosen[int(gene)] = free[pick]
        load[free[pick]] += abundance[gene]
        free = np.delete(free, pick, axis=0)
    rows = [chosen[gene] for gene in range(len(genes))] + list(free)
    words = np.zeros((len(rows), n_bits), dtype=np.uint8)
    words[np.arange(len(rows))[:, None], rows] = 1
    names = (*genes, *(f"Blank-{k}" for k in range(1, len(free) + 1)))
    return Codebook(names, ("",) * len(rows), words, tuple(_default_bit_names(n_bits)))


def _abundances(genes: Sequence[str], expression: Mapping[str, float] | Sequence[float] | None) -> np.ndarray:
    if expression is None:
        return np.ones(len(genes))
    if isinstance(expression, Mapping):
        missing = [gene for gene in genes if gene not in expression]
        if missing:
            raise InputError(f"expression has no value for {', '.join(missing[:5])} ({len(missing)} genes)")
        expression = [expression[gene] for gene in genes]
    values = np.asarray(expression, dtype=float)
    if values.shape != (len(genes),):
        raise InputError(f"expression has {values.size} values for {len(genes)} genes")
    if not (np.isfinite(values).all() and (values >= 0).all()):
        raise InputError("expression must be finite and not negative")
    return values


def read_gene_list(path: str | os.PathLike[str]) -> tuple[list[str], list[float] | None]:
    """Read genes, one per line, optionally with expression after a comma or tab; a header is skipped.

    Returns names and expression (None if no line has one). Raises InputError naming the line.
    """
    lines = read_text(path, "gene list").splitlines()
    names: list[str] = []
    values: list[float] = []
    for number, line in enumerate(lines, start=1):
        name, *rest = (field.strip() for field in re.split("[,\t]", line))
        if not name or (number == 1 and name.lower() in ("gene", "name")):
            continue
        names.append(name)
        if rest and rest[0]:
            try:
                values.append(float(rest[0]))
            except ValueError:
                raise InputError(f"{path}: line {number}: expected a number after {name!r}, got {rest[0]!r}") from None
    if values and len(values) != len(names):
        raise InputError(f"{path}: {len(values)} of {len(names)} genes have an expression; give all or none")
    return names, values or None
