"""Kernels of the pixel decoders; they take plain arrays and fill the ``out`` arrays.

Stacks are (bit, row, x): the planes of a field follow each other along the rows, row = z * height + y.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from merfish._jit import kernel

_BLOCK = 1024  # pixels; their values in all bits fit into the L1 cache
_GROUP = 64  # pixels searched at once
_LANES = 16  # float32 values in a vector register of current processors; results do not depend on it


class Model(NamedTuple):
    """Parameters of the search for the nearest word of a pixel.

    offset, gain: (bit,) float32; value = (stack - offset) * gain, negative values are set to 0.
    bits: (word, place) int64, indices of the on-bits, padded with the number of bits to a multiple of 4.
    scale: (word,) float32, 1 / sqrt(weight). min_magnitude, min_cosine: float32; a pixel below either gets no word.
    """

    offset: np.ndarray
    gain: np.ndarray
    bits: np.ndarray
    scale: np.ndarray
    min_magnitude: np.float32
    min_cosine: np.float32


@kernel
def decode_rows(first, last, stack, model, word, distance, magnitude):
    """Find the nearest word of each pixel vector in rows ``first`` to ``last`` - 1 by angle.

    stack: (bit, row, x); model: a `Model`. out: word (row, x) int32, -1 = none; distance (row, x) float32 between unit
    vectors; magnitude (row, x) float32, Euclidean norm of the pixel vector.
    """
    n_bits, _, width = stack.shape
    blocks = (width + _BLOCK - 1) // _BLOCK
    values = np.empty((n_bits, _BLOCK), np.float32)
    for row in range(first, last):
        for block in range(blocks):
            left = block * _BLOCK
            right = min(left + _BLOCK, width)
            for bit in range(n_bits):
                line, source = values[bit], stack[bit, row, left:right]
                for x in range(len(source)):
                    line[x] = source[x]
            decode_block(values, model, word[row, left:right], distance[row, left:right], magnitude[row, left:right])


@kernel
def decode_block(values, model, word, distance, magnitude):
    """Decode the first ``len(word)`` pixels of ``values`` (bit, x) float32, which is overwritten; see `decode_rows`.

    Pixels below the minimum magnitude are skipped; the others are searched in groups.
    """
    n_bits, n = len(model.gain), len(word)
    squares = np.zeros(n, np.float32)
    for bit in range(n_bits):
        line, low, factor = values[bit], model.offset[bit], model.gain[bit]
        for x in range(n):
            value = max((line[x] - low) * factor, np.float32(0.0))
            line[x] = value
            squares[x] += value * value
    place = np.empty(n + 1, np.int64)
    found = 0
    for x in range(n):
        word[x] = -1
        distance[x] = np.inf
        magnitude[x] = np.sqrt(squares[x])
        place[found] = x
        found += magnitude[x] >= model.min_magnitude and magnitude[x] > 0.0  # false for NaN
    pixels = np.zeros((n_bits + 1, _GROUP), np.float32)
    nearest, best = np.empty(_GROUP, np.int32), np.empty(_GROUP, np.float32)
    for i in range(0, found, _GROUP):
        lanes = min(_GROUP, found - i)
        for bit in range(n_bits):
            line, chosen = values[bit], pixels[bit]
            for lane in range(lanes):
                chosen[lane] = line[place[i + lane]]
        nearest_of_all(pixels, model.bits, model.scale, (lanes + _LANES - 1) // _LANES * _LANES, nearest, best)
        for lane in range(lanes):
            x = place[i + lane]
            cosine = min(best[lane] / magnitude[x], np.float32(1.0))
            if cosine >= model.min_cosine:
                word[x] = nearest[lane]
                distance[x] = np.sqrt(np.float32(2.0) - np.float32(2.0) * cosine)


@kernel
def nearest_of_all(pixels, bits, scale, n, nearest, best):
    """Find the word of largest cosine to each of the first ``n`` pixels (bit + 1, lane); ties go to the first word.

    The last row of ``pixels`` is 0; bits and scale are those of a `Model`. out: nearest (lane,) int32; best (lane,)
    float32, the cosine times the norm of the pixel. All words are compared, for many pixels at once and without a
    branch, which is much faster than comparing only the likely words of each pixel.
    """
    total = np.empty(n, np.float32)
    for lane in range(n):
        best[lane] = -1.0
        nearest[lane] = -1
    for w in range(len(bits)):
        for k in range(0, bits.shape[1], 4):
            a, b = pixels[bits[w, k]], pixels[bits[w, k + 1]]
            c, d = pixels[bits[w, k + 2]], pixels[bits[w, k + 3]]
            if k == 0:
                for lane in range(n):
                    total[lane] = a[lane] + b[lane] + c[lane] + d[lane]
            else:
                for lane in range(n):
                    total[lane] = total[lane] + a[lane] + b[lane] + c[lane] + d[lane]
        factor, number = scale[w], np.int32(w)
        for lane in range(n):
            value = total[lane] * factor
            nearer = value > best[lane]
            best[lane] = value if nearer else best[lane]
            nearest[lane] = number if nearer else nearest[lane]


@kernel
def look_up_rows(first, last, stack, level, words, distances, magnitudes, word, distance, magnitude):
    """Binarise each pixel of rows ``first`` to ``last`` - 1 and look up its bits in tables.

    stack (bit, row, x), at most 16 bits; level (bit,) of its dtype.
    words int32, distances and magnitudes float32: (2 ** bit,), indexed by the observed bits.
    out: word, distance, magnitude (row, x), of the dtypes of the tables.
    """
    n_bits, _, width = stack.shape
    for row in range(first, last):
        code = np.zeros(width, np.uint16)
        for bit in range(n_bits):
            line = stack[bit, row]
            threshold = level[bit]
            mask = np.uint16(1 << bit)
            for x in range(width):
                code[x] |= np.uint16(line[x] > threshold) * mask
        for x in range(width):
            word[row, x] = words[code[x]]
            distance[row, x] = distances[code[x]]
            magnitude[row, x] = magnitudes[code[x]]


@kernel
def binarise_rows(first, last, stack, threshold, code):
    """Set bit b of ``code`` (row, x) uint64 where ``stack`` (bit, row, x) exceeds ``threshold`` (bit,).

    Only rows ``first`` to ``last`` - 1 are set.
    """
    n_bits, _, width = stack.shape
    for row in range(first, last):
        for x in range(width):
            code[row, x] = np.uint64(0)
        for bit in range(n_bits):
            level = threshold[bit]
            mask = np.uint64(1) << np.uint64(bit)
            for x in range(width):
                if stack[bit, row, x] > level:
                    code[row, x] |= mask


@kernel
def popcount(value):
    """Number of set bits of a uint64."""
    count = 0
    while value != np.uint64(0):
        value &= value - np.uint64(1)
        count += 1
    return count


@kernel
def nearest_words(first, last, observed, codes, word, distance, ambiguous):
    """Find the nearest of ``codes`` (word,) to each of ``observed`` (n,), both uint64, by Hamming distance.

    Only ``first`` to ``last`` - 1 are searched. out: word (n,) int32, the first of the nearest; distance (n,) int16;
    ambiguous (n,) bool, true where another word has the same distance.
    """
    for i in range(first, last):
        best = 65
        nearest = -1
        tie = False
        for w in range(len(codes)):
            d = popcount(observed[i] ^ codes[w])
            if d < best:
                best = d
                nearest = w
                tie = False
            elif d == best:
                tie = True
        word[i] = nearest
        distance[i] = best
        ambiguous[i] = tie


@kernel
def root_of(parent, i):
    """Root of item ``i`` in a union-find forest, with path halving."""
    while parent[i] != i:
        parent[i] = parent[parent[i]]
        i = parent[i]
    return i


@kernel
def label_components(word, height, label):
    """Label the 8-connected components of equal word in each plane.

    word (row, x) int, negative = background; a plane has ``height`` rows.
    out: label (row, x) int32, 0 = background, then 1, 2, ... in scan order of the first pixels. Returns the number of
    components. Two passes with union-find; a union keeps the smaller label, which preserves the scan order.
    """
    n_rows, width = word.shape
    parent = np.zeros(1024, np.int32)
    used = 1
    for row in range(n_rows):
        first = row % height == 0
        for x in range(width):
            label[row, x] = 0
            w = word[row, x]
            if w < 0:
                continue
            mine = 0
            for dy, dx in ((0, -1), (-1, -1), (-1, 0), (-1, 1)):
                if (dy < 0 and first) or x + dx < 0 or x + dx >= width or word[row + dy, x + dx] != w:
                    continue
                other = root_of(parent, label[row + dy, x + dx])
                if mine == 0:
                    mine = other
                elif other < mine:
                    parent[mine] = other
                    mine = other
                elif mine < other:
                    parent[other] = mine
            if mine == 0:
                if used == len(parent):
                    grown = np.zeros(2 * used, np.int32)
                    for i in range(used):
                        grown[i] = parent[i]
                    parent = grown
                parent[used] = used
                mine = used
                used += 1
            label[row, x] = mine
    count = 0
    final = np.zeros(used, np.int32)
    for i in range(1, used):
        if parent[i] == i:
            count += 1
            final[i] = count
        else:
            final[i] = final[root_of(parent, i)]
    for row in range(n_rows):
        for x in range(width):
            if label[row, x]:
                label[row, x] = final[label[row, x]]
    return count


@kernel
def measure_components(label, word, distance, weight, height, out):
    """Measure each component.

    label, word, distance, weight: (row, x). out (component, 7) float64: word, plane, y and x of the weighted centroid
    (pixel), area (pixels), mean and minimum distance.
    """
    n_rows, width = label.shape
    mass = np.zeros(len(out))
    out[:] = 0.0
    out[:, 6] = np.inf
    for row in range(n_rows):
        for x in range(width):
            i = label[row, x] - 1
            if i < 0:
                continue
            m = np.float64(weight[row, x])
            mass[i] += m
            out[i, 0] = word[row, x]
            out[i, 1] = row // height
            out[i, 2] += m * (row % height)
            out[i, 3] += m * x
            out[i, 4] += 1.0
            out[i, 5] += distance[row, x]
            out[i, 6] = min(out[i, 6], np.float64(distance[row, x]))
    for i in range(len(out)):
        out[i, 2] /= mass[i]
        out[i, 3] /= mass[i]
        out[i, 5] /= out[i, 4]


@kernel
def sum_components(label, image, out):
    """Sum an image (row, x) over the pixels of each component of ``label`` (row, x); out (component,) float64."""
    out[:] = 0.0
    for row in range(label.shape[0]):
        for x in range(label.shape[1]):
            if label[row, x] > 0:
                out[label[row, x] - 1] += image[row, x]
