from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from merfish import Codebook, InputError, check_codebook, mhd4_codebook, read_codebook, write_codebook
from merfish.codebook import parse_codebook

WORD_LINES = ["A,id1,1,1,1,1,0,0,0,0", "B,id2,1,1,0,0,1,1,0,0", "Blank-1,,0,0,1,1,1,1,0,0"]
HEADER = "name,id,bit1,bit2,bit3,bit4,bit5,bit6,bit7,bit8"


def write(tmp_path, text):
    path = tmp_path / "book.csv"
    path.write_text(text)
    return path


def test_mhd4_codebook_is_the_140_words_whose_bits_xor_to_zero():
    book = mhd4_codebook([f"gene{k}" for k in range(130)])
    expected = {bits for bits in combinations(range(16), 4) if bits[0] ^ bits[1] ^ bits[2] ^ bits[3] == 0}
    assert {tuple(np.flatnonzero(word)) for word in book.words} == expected
    assert len(expected) == 140
    report = check_codebook(book)
    assert (report.min_distance, report.corrects, report.detects, report.weights) == (4, 1, 2, {4: 140})
    pairs = [sum(word[i] and word[j] for word in book.words) for i, j in combinations(range(16), 2)]
    assert set(pairs) == {7}
    assert book.is_blank.sum() == 10


@given(n_bits=st.integers(4, 24), n_genes=st.integers(1, 60))
def test_mhd4_codebook_has_distance_4_for_any_length(n_bits, n_genes):
    n_words = sum(a ^ b ^ c ^ d == 0 for a, b, c, d in combinations(range(n_bits), 4))
    assume(n_genes <= n_words)
    book = mhd4_codebook([f"g{k}" for k in range(n_genes)], n_bits)
    assert check_codebook(book).min_distance >= 4
    assert book.names[:n_genes] == tuple(f"g{k}" for k in range(n_genes))


def test_mhd4_codebook_spreads_abundant_genes_over_the_bits():
    genes = [f"g{k}" for k in range(100)]
    expression = np.random.default_rng(0).lognormal(0, 1.5, 100)

    def spread(book):
        load = (book.words[:100] * expression[:, None]).sum(axis=0)
        return load.max() / load.min()

    assert spread(mhd4_codebook(genes, expression=expression)) < 1.2 < spread(mhd4_codebook(genes))


@pytest.mark.parametrize(
    ("genes", "expression", "message"),
    [
        (["A", "A"], None, "more than once: A"),
        ([], None, "got 0 genes"),
        ([f"g{k}" for k in range(141)], None, "140 words of distance 4, got 141 genes"),
        (["A", "B"], [1.0], "1 values for 2 genes"),
        (["A", "B"], {"A": 1.0}, "no value for B"),
        (["A"], [np.nan], "finite"),
        ("ACTB", None, "expected a list of names, got 'ACTB'"),
    ],
)
def test_mhd4_codebook__rejects(genes, expression, message):
    with pytest.raises(InputError, match=message):
        mhd4_codebook(genes, expression=expression)


@pytest.mark.parametrize(
    "text",
    [
        "\n".join([HEADER, *WORD_LINES]),
        "version,1\ncodebook_name,X\nbit_names,a,b,c,d,e,f,g,h\nname,id,barcode\n"
        "A,id1,1  1 1 1 0 0 0 0\nB,id2,11001100\nBlank-1,,00111100,,\n",
        "feat\tcodeword\texpressed\nA\t11110000\t1\nB\t11001100\t1\nBlank-1\t00111100\t0\n",
        "codeword,bit01,bit02,bit03,bit04,bit05,bit06,bit07,bit08\n"
        "A,1,1,1,1,0,0,0,0\nB,1,1,0,0,1,1,0,0\nBlank-1,0,0,1,1,1,1,0,0\n",
        "\ufeff" + "\r\n".join([HEADER.replace("bit1,", "Bit1,"), *WORD_LINES, "", ""]),
    ],
    ids=["columns", "spaced words", "merfishtools", "codeword", "byte-order mark and CRLF"],
)
def test_read_codebook_understands(tmp_path, text):
    book = read_codebook(write(tmp_path, text))
    assert book.names == ("A", "B", "Blank-1")
    assert book.words.tolist() == [
        [1, 1, 1, 1, 0, 0, 0, 0],
        [1, 1, 0, 0, 1, 1, 0, 0],
        [0, 0, 1, 1, 1, 1, 0, 0],
    ]
    assert book.is_blank.tolist() == [False, False, True]
    assert book.codes.tolist() == [0b1111, 0b110011, 0b111100]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([HEADER, WORD_LINES[0], "C,,1,1,1,1,0,0,0,2"], r"line 3 \('C'\): expected 0 or 1.*11110002"),
        ([HEADER, WORD_LINES[0], "C,,1,1,1,1,0,0,0"], "line 3"),
        ([HEADER, WORD_LINES[0], "A,,0,0,0,0,1,1,1,1"], "name 'A' appears 2 times: words 1, 2"),
        ([HEADER, WORD_LINES[0], "C,,1,1,1,1,0,0,0,0"], "word 11110000 is given to A, C"),
        ([HEADER, WORD_LINES[0], "C,,0,0,0,0,0,0,0,0"], "'C' has no bit on"),
        ([HEADER, WORD_LINES[0], ",,0,0,0,0,1,1,1,1"], "line 3: the word has no name"),
        ([HEADER.replace("bit3", "bit9"), WORD_LINES[0]], "bit columns are numbered"),
        (["gene,value", "A,1"], "neither bit1,... columns nor a barcode column"),
        (["name,id,barcode", "A,,1100", "B,,11"], "line 3 has 2 bits"),
        ([], "no words found"),
        ([HEADER, WORD_LINES[0].replace("A,", "A\x00,")], r"line 2: found the control character '\\x00'"),
        ([HEADER, WORD_LINES[0].replace("A,", "\x1b[31mA,")], r"line 2: found the control character '\\x1b'"),
        ([HEADER, WORD_LINES[0].replace("A,", '"A\nB",')], r"control characters: 'A\\nB'"),
        ([HEADER, WORD_LINES[0].replace("A,", "A" * 200_000 + ",")], "line 2: field larger than"),
        ([HEADER, *[WORD_LINES[0]] * 60_000], "60001 lines, expected at most 50000 words"),
        ([HEADER, *[WORD_LINES[0]] * 9_000], "name 'A' appears 9000 times"),
    ],
)
def test_read_codebook__rejects(tmp_path, lines, message):
    with pytest.raises(InputError, match=message):
        read_codebook(write(tmp_path, "\n".join(lines)))


def test_mhd4_codebook__takes_names_from_any_iterable():
    assert mhd4_codebook(np.array(["A", "B"])).names[:2] == mhd4_codebook(iter("AB")).names[:2] == ("A", "B")


@pytest.mark.parametrize(("path", "message"), [("none.csv", "No such file"), ([], "path of the codebook, got list")])
def test_read_codebook__rejects_what_is_no_file(path, message):
    with pytest.raises(InputError, match=message):
        read_codebook(path)


def test_write_codebook_round_trips(tmp_path):
    book = mhd4_codebook(["A", "B,with comma"])
    write_codebook(book, tmp_path / "sub" / "book.csv")
    again = read_codebook(tmp_path / "sub" / "book.csv")
    assert again.names == book.names
    assert (again.words == book.words).all()


def test_check_codebook_reports_without_refusing(tmp_path):
    book = parse_codebook(write(tmp_path, "\n".join([HEADER, *WORD_LINES, "A,,1,1,0,0,0,0,0,0"])))
    report = check_codebook(book)
    assert report.problems == ("name 'A' appears 2 times: words 1, 4",)
    assert (report.n_words, report.n_blanks, report.min_distance, report.corrects) == (4, 1, 2, 0)
    assert any("cannot be corrected" in warning for warning in report.warnings)
    assert any("bit 8" in warning for warning in report.warnings)


def test_codebook__refuses_names_that_no_file_can_hold():
    with pytest.raises(InputError, match=r"control characters: 'g\\x00'"):
        mhd4_codebook(["g\0"])


def test_codebook_is_frozen():
    book = Codebook(("A",), ("",), np.array([[1, 0, 1]]), ("b1", "b2", "b3"))
    with pytest.raises(ValueError, match="read-only"):
        book.words[0, 0] = 0
