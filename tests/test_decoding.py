from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import reference
from merfish import InputError, datasets, decode, mhd4_codebook, read_codebook, simulate_stack
from merfish.codebook import Codebook
from merfish.decoding import _kernels
from merfish.decoding.overlap import merge_planes
from merfish.decoding.pixels import CodeLookup, decode_hard, decode_soft, distance_threshold, on_bits
from merfish.imaging.normalize import Normalization
from merfish.simulate import score_calls
from merfish.transcripts import COLUMNS

SMALL = Codebook(
    ("A", "B", "Blank-1"),
    ("", "", ""),
    np.array([[1, 1, 1, 1, 0, 0, 0, 0], [1, 1, 0, 0, 1, 1, 0, 0], [0, 0, 0, 0, 1, 1, 1, 1]], np.uint8),
    tuple("abcdefgh"),
)
BOOK = mhd4_codebook([f"g{k}" for k in range(120)])


@given(arrays(np.float32, (8, 3, 5), elements=st.floats(0, 2, width=16) | st.just(0.0)))
def test_decode_rows_equals_the_reference(stack):
    pixels = decode_soft(stack, SMALL, Normalization.identity(8), max_distance=0.7, min_magnitude=0.5)
    for row, x in np.ndindex(3, 5):
        _, _, magnitude = reference.decode_pixel(stack[:, row, x], SMALL.words, 0.5, 0.7)
        _, distance, _ = reference.decode_pixel(stack[:, row, x], SMALL.words, 0, np.inf)
        got = pixels.word[row, x]
        assert pixels.magnitude[row, x] == pytest.approx(magnitude, rel=1e-5)
        if magnitude < 0.5 - 1e-5 or distance > 0.7 + 1e-5:
            assert got == -1
        elif magnitude > 0.5 + 1e-5 and distance < 0.7 - 1e-5:
            others = [
                reference.decode_pixel(stack[:, row, x], [w], 0, np.inf)[1] for w in np.delete(SMALL.words, got, axis=0)
            ]
            assert pixels.distance[row, x] == pytest.approx(distance, abs=1e-3)
            assert min(others) >= distance - 1e-3


@pytest.mark.parametrize("weights", [(4,), (1, 2, 3), (5, 6)])
def test_decode_rows_finds_the_nearest_word_whatever_the_weights(weights):
    rng = np.random.default_rng(1)
    words = np.zeros((60, 12), np.uint8)
    for k, word in enumerate(words):
        word[rng.permutation(12)[: weights[k % len(weights)]]] = 1
    words = np.unique(words, axis=0)
    book = Codebook(tuple(f"g{k}" for k in range(len(words))), ("",) * len(words), words, tuple("abcdefghijkl"))
    stack = (rng.gamma(0.5, 1, (12, 40, 40)) * rng.integers(0, 2, (12, 40, 40))).astype(np.float32)
    pixels = decode_soft(stack, book, Normalization.identity(12), max_distance=0.8, min_magnitude=0.3)
    unit = words / np.linalg.norm(words, axis=1, keepdims=True)
    magnitude = np.linalg.norm(stack, axis=0)
    cosine = np.tensordot(unit, stack, 1) / np.maximum(magnitude, 1e-9)
    distance = np.sqrt(np.maximum(2 - 2 * cosine.max(axis=0), 0))
    sure = (np.abs(distance - 0.8) > 1e-4) & (np.abs(magnitude - 0.3) > 1e-4)
    called = (distance < 0.8) & (magnitude > 0.3)
    assert (called == (pixels.word >= 0))[sure].all()
    assert called.mean() > 0.1
    chosen = np.take_along_axis(cosine, np.maximum(pixels.word, 0)[None], 0)[0]
    assert chosen[called & sure] == pytest.approx(cosine.max(axis=0)[called & sure], abs=1e-5)


@given(arrays(np.int32, (8, 9), elements=st.integers(-1, 2)), st.sampled_from([4, 8]))
def test_label_components_equals_the_reference(word, height):
    label = np.empty(word.shape, np.int32)
    count = _kernels.label_components(word, height, label)
    found = []
    for plane in range(8 // height):
        for component in reference.components(word[plane * height : (plane + 1) * height]):
            found.append({(y + plane * height, x) for y, x in component})
    assert [set(map(tuple, np.argwhere(label == k + 1))) for k in range(count)] == found


@given(st.data())
def test_measure_components_equals_the_reference(data):
    word = data.draw(arrays(np.int32, (4, 6), elements=st.integers(-1, 1)))
    weight = data.draw(arrays(np.float32, (4, 6), elements=st.floats(1, 4, width=16)))
    stack = data.draw(arrays(np.uint16, (8, 4, 6), elements=st.integers(0, 9)))
    label = np.empty(word.shape, np.int32)
    count = _kernels.label_components(word, 4, label)
    out, total = np.empty((count, 7)), np.empty(count)
    _kernels.measure_components(label, word, weight, weight, 4, out)
    _kernels.sum_components(label, stack[3], total)
    for row, component in enumerate(reference.components(word)):
        y, x = np.array(sorted(component)).T
        mass = weight[y, x].astype(float)
        assert out[row] == pytest.approx(
            [
                word[y[0], x[0]],
                0,
                (y * mass).sum() / mass.sum(),
                (x * mass).sum() / mass.sum(),
                len(y),
                mass.mean(),
                mass.min(),
            ]
        )
        assert total[row] == stack[3, y, x].sum()


@given(arrays(np.uint8, (5, 8), elements=st.integers(0, 1)))
def test_nearest_words_equals_the_reference(observed):
    codes = observed.astype(np.uint64) @ (np.uint64(1) << np.arange(8, dtype=np.uint64))
    word, distance, ambiguous = np.empty(5, np.int32), np.empty(5, np.int16), np.empty(5, np.bool_)
    _kernels.nearest_words(0, 5, codes, SMALL.codes, word, distance, ambiguous)
    for k in range(5):
        assert (word[k], distance[k], ambiguous[k]) == reference.nearest_word(observed[k], SMALL.words)


def test_binarise_rows_sets_one_bit_a_plane():
    stack = np.zeros((8, 2, 3), np.float32)
    stack[2, 1, 0], stack[5, 1, 0], stack[0, 0, 2] = 3, 1, 2
    codes = np.empty((2, 3), np.uint64)
    _kernels.binarise_rows(0, 2, stack, np.full(8, 1, np.float32), codes)
    assert codes.tolist() == [[0, 0, 1], [0b100, 0, 0]]


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.float32])
def test_hamming_is_the_same_for_every_dtype(dtype):
    rng = np.random.default_rng(2)
    stack = rng.integers(0, 200, (16, 7, 9)).astype(dtype)
    scale = Normalization(rng.uniform(40, 60, 16).astype(np.float32), rng.uniform(100, 200, 16).astype(np.float32))
    pixels = decode_hard(stack, BOOK, scale)
    level = scale.background + 0.5 * scale.scale
    for row, x in np.ndindex(7, 9):
        observed = (stack[:, row, x] > level).astype(np.uint8)
        word, distance, _ = reference.nearest_word(observed, BOOK.words)
        assert pixels.word[row, x] == (word if distance <= 1 else -1)
        assert pixels.magnitude[row, x] == pytest.approx(np.sqrt(observed.sum()))
        assert pixels.distance[row, x] == distance


def test_hamming_of_a_dead_bit_never_sees_it():
    scale = Normalization(np.zeros(16, np.float32), np.append(np.ones(15), 0).astype(np.float32))
    for dtype in (np.uint16, np.float32):
        pixels = decode_hard(np.full((16, 1, 1), 9, dtype), BOOK, scale)
        assert pixels.magnitude[0, 0] == pytest.approx(np.sqrt(15))


def codebooks_16_bit():
    books = {name: read_codebook(path) for name, path in datasets.codebooks().items()}
    books["mhd4"] = mhd4_codebook([f"g{k}" for k in range(100)])
    return {name: book for name, book in books.items() if book.n_bits == 16}


@pytest.mark.parametrize("name", sorted(codebooks_16_bit()))
def test_hamming_corrects_every_single_error_and_refuses_every_double_error(name):
    book = codebooks_16_bit()[name]
    lookup = CodeLookup(book)
    rows = np.arange(book.n_words)
    word, distance = lookup(book.codes)
    assert (word == rows).all()
    assert not distance.any()
    for bit in range(16):
        word, distance = lookup(book.codes ^ np.uint64(1 << bit))
        assert (word == rows).all()
        assert (distance == 1).all()
    for a, b in combinations(range(16), 2):
        word, _ = lookup(book.codes ^ np.uint64(1 << a | 1 << b))
        assert (word == -1).all()


def test_hamming_of_a_long_code_corrects_single_errors():
    book = mhd4_codebook([f"g{k}" for k in range(50)], n_bits=22)
    lookup = CodeLookup(book)
    assert lookup.table is None
    for bit in range(22):
        word, _ = lookup((book.codes ^ np.uint64(1 << bit))[None])
        assert (word[0] == np.arange(book.n_words)).all()


@pytest.mark.parametrize("name", sorted(codebooks_16_bit()))
def test_pixels_pass_every_clean_single_error(name):
    book = codebooks_16_bit()[name]
    vectors = [book.words.astype(np.float32)]
    for bit in range(16):
        flipped = book.words.astype(np.float32)
        flipped[:, bit] = 1 - flipped[:, bit]
        vectors.append(flipped)
    stack = np.stack(vectors).transpose(2, 0, 1)
    pixels = decode_soft(np.ascontiguousarray(stack), book, Normalization.identity(16))
    assert (pixels.word == np.arange(book.n_words)).all()
    assert pixels.distance.max() == pytest.approx(np.sqrt(2 - np.sqrt(3)), abs=1e-3)


def test_distance_threshold_lies_between_one_and_two_lost_bits():
    for weight in range(2, 9):
        one = np.sqrt(2 - 2 * np.sqrt((weight - 1) / weight))
        two = np.sqrt(2 - 2 * np.sqrt((weight - 2) / weight))
        assert one < distance_threshold(weight) < two


def test_on_bits_pads_words_of_less_weight():
    book = Codebook(("A", "B"), ("", ""), np.array([[0, 1, 0], [1, 0, 1]]), ("a", "b", "c"))
    bits, weight = on_bits(book)
    assert weight.tolist() == [1, 2]
    assert bits[0, :1].tolist() == [1]
    assert bits[1].tolist() == [0, 2]


KEYS = ["barcode_id", "x", "y", "area", "hamming_distance"]


@pytest.fixture(scope="module")
def field():
    return simulate_stack(BOOK, shape=(160, 192), density=0.005, seed=3)


@pytest.mark.parametrize("method", ["pixels", "hamming"])
def test_decode_finds_the_molecules(field, method):
    stack, truth = field
    score = score_calls(decode(stack, BOOK, method=method), truth, shape=stack.shape[-2:])
    assert score["recall"] > 0.64
    assert score["precision"] > 0.93
    assert score["median_error"] < 0.25


@pytest.mark.parametrize("method", ["pixels", "hamming"])
def test_decode_does_not_care_about_the_order_of_bits(field, method):
    stack, _ = field
    order = np.random.default_rng(0).permutation(16)
    expected = decode(stack, BOOK, method=method)
    got = decode(stack[order], BOOK.permuted(order), method=method)
    assert got[["barcode_id", "area", "hamming_distance"]].equals(expected[["barcode_id", "area", "hamming_distance"]])
    assert np.abs(got[["x", "y"]] - expected[["x", "y"]]).to_numpy().max() < 1e-3


@pytest.mark.parametrize("method", ["pixels", "hamming"])
def test_decode_does_not_care_about_the_scale_of_the_stack(field, method):
    stack, _ = field
    expected = decode(stack.astype(np.float32), BOOK, method=method)
    got = decode(stack.astype(np.float32) * 4, BOOK, method=method)  # a power of two: no rounding
    assert got[KEYS].equals(expected[KEYS])


def test_decode_of_planes_sees_a_molecule_in_two_planes_once(field):
    stack, _ = field
    planes = np.stack([stack, stack, np.full_like(stack, 200)], axis=1)
    single = decode(stack, BOOK, misidentification_rate=1.0)
    calls = decode(planes, BOOK, misidentification_rate=1.0)
    assert len(calls) == pytest.approx(len(single), rel=0.1)
    assert calls["z"].median() == pytest.approx(0.5, abs=0.1)


def test_decode__returns_the_full_schema_for_an_empty_field():
    calls = decode(np.full((16, 32, 32), 100, np.uint16), BOOK)
    assert len(calls) == 0
    assert calls.dtypes.astype(str).to_dict() == COLUMNS


@pytest.mark.parametrize(
    ("stack", "message"),
    [
        (np.zeros((15, 8, 8), np.uint16), "15 bits, but the codebook has 16"),
        (np.zeros((16, 8), np.uint16), r"expected \(bit, y, x\)"),
        (np.zeros((16, 8, 8), complex), "complex128"),
        (np.zeros((16, 0, 8), np.uint16), "empty"),
        (np.full((16, 8, 8), np.nan), r"bit 1 \(bit1\).*NaN"),
    ],
)
def test_decode__rejects(stack, message):
    with pytest.raises(InputError, match=message):
        decode(stack, BOOK)


def test_decode__rejects_an_unknown_method(field):
    with pytest.raises(InputError, match="'magic': expected one of"):
        decode(field[0], BOOK, method="magic")


def test_merge_planes_joins_neighbouring_planes_only():
    word = np.array([1, 1, 1, 2, 1])
    x = np.array([5.0, 5.4, 5.2, 5.0, 50.0])
    keep, z = merge_planes(word, x, np.zeros(5), np.array([0, 1, 3, 0, 1]), np.array([1.0, 3.0, 1.0, 1.0, 1.0]))
    assert keep.tolist() == [1, 2, 3, 4]
    assert z.tolist() == [0.75, 3, 0, 1]


@pytest.mark.parametrize("method", ["pixels", "hamming"])
def test_patches_of_a_book_without_blanks_have_odds_that_hold(method):
    genes = np.flatnonzero(~BOOK.is_blank)
    book = Codebook(tuple(BOOK.names[k] for k in genes), ("",) * len(genes), BOOK.words[genes], BOOK.bit_names)
    stack, truth = simulate_stack(book, shape=(384, 384), density=0.01, seed=31)
    calls = decode(stack, book, method=method)
    wrong = 1 - score_calls(calls, truth, shape=(384, 384))["precision"]
    assert 0.03 < wrong < 0.07
    assert wrong == pytest.approx(1 - calls["probability"].mean(), abs=0.02)


def test_a_book_of_more_bits_than_can_be_decoded_is_told_what_to_do():
    with pytest.raises(InputError, match=r"80 bits, but at most 64 .* a codebook and a stack of its own bits"):
        Codebook(("a",), ("",), np.ones((1, 80), np.uint8), tuple(f"bit{k}" for k in range(80)))


def test_decode__says_what_it_expects():
    book = mhd4_codebook(["a"])
    for stack, codebook, rate, message in (
        ("stack.tif", book, 0.05, "expected an array and a Codebook, got str and Codebook"),
        (np.zeros((16, 8, 8)), "codebook.csv", 0.05, "got ndarray and str"),
        ([[0.0]], book, 0.05, r"the stack has shape \(1, 1\)"),
        (np.zeros((16, 8, 8)), book, 5, "expected a share from 0 to 1, got 5"),
    ):
        with pytest.raises(InputError, match=message):
            decode(stack, codebook, misidentification_rate=rate)
