"""The loops of decoding: plain arrays in, ``out`` arrays filled.

Stacks come as (bit, row, x): planes of a field are laid one below the other, row = z * height + y.
"""

from __future__ import annotations

import numpy as np

from merfish._jit import kernel, parallel_kernel, prange


@parallel_kernel
def decode_rows(stack, offset, gain, word_bits, word_weight, min_magnitude, min_cosine, word, distance, magnitude):
    """Nearest word of each pixel vector by the angle between them.

    stack (bit, row, x); offset, gain (bit,) float32: value = (stack - offset) * gain, negative values count as 0.
    word_bits (word, weight) int64: the bits that are on, first word_weight[w] of each row.
    out: word (row, x) int16 or int32, -1 = none; distance (row, x) float32 between unit vectors;
    magnitude (row, x) float32, Euclidean norm of the pixel vector.

    Each row is scaled into a buffer that stays in cache, and the many pixels whose magnitude is too small
    never reach the search.
    """
    n_bits, n_rows, width = stack.shape
    n_words = word_bits.shape[0]
    scale = 1.0 / np.sqrt(word_weight.astype(np.float32))
    for row in prange(n_rows):
        values = np.empty((n_bits, width), np.float32)
        squares = np.zeros(width, np.float32)
        for bit in range(n_bits):
            low = offset[bit]
            factor = gain[bit]
            for x in range(width):
                value = max((np.float32(stack[bit, row, x]) - low) * factor, np.float32(0.0))
                values[bit, x] = value
                squares[x] += value * value
        floor = min_magnitude * min_magnitude
        for x in range(width):
            word[row, x] = -1
            distance[row, x] = np.float32(np.inf)
            norm = np.sqrt(squares[x])
            magnitude[row, x] = norm
            if not squares[x] >= floor or squares[x] == 0.0:  # NaN stays undecoded
                continue
            best = np.float32(-1.0)
            nearest = -1
            for w in range(n_words):
                total = np.float32(0.0)
                for k in range(word_weight[w]):
                    total += values[word_bits[w, k], x]
                total *= scale[w]
                if total > best:
                    best = total
                    nearest = w
            cosine = min(best / norm, np.float32(1.0))
            if cosine >= min_cosine:
                word[row, x] = nearest
                distance[row, x] = np.sqrt(np.float32(2.0) - np.float32(2.0) * cosine)


@parallel_kernel
def binarise_rows(stack, threshold, code):
    """Set bit b of ``code`` (row, x) uint64 where ``stack`` (bit, row, x) exceeds ``threshold`` (bit,)."""
    n_bits, n_rows, width = stack.shape
    for row in prange(n_rows):
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
    """Number of bits that are on in a uint64."""
    count = 0
    while value != np.uint64(0):
        value &= value - np.uint64(1)
        count += 1
    return count


@parallel_kernel
def nearest_words(observed, codes, word, distance, ambiguous):
    """Nearest of ``codes`` (word,) to each of ``observed`` (n,), both uint64, by Hamming distance.

    out: word (n,) int32, the first of the nearest; distance (n,) int16; ambiguous (n,) bool, true where another
    word is as near.
    """
    for i in prange(len(observed)):
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
def _root(parent, label):
    while parent[label] != label:
        parent[label] = parent[parent[label]]
        label = parent[label]
    return label


@kernel
def label_components(word, height, label):
    """8-connected components of equal word, plane by plane.

    word (row, x) int, negative = background; rows of one plane are ``height`` long.
    out: label (row, x) int32, 0 = background, then 1... in the order of first pixels. Returns the number of
    components. Two passes with union-find; the smaller label wins, so that the order is that of the scan.
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
                other = _root(parent, label[row + dy, x + dx])
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
                    grown[:used] = parent
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
            final[i] = final[_root(parent, i)]
    for row in range(n_rows):
        for x in range(width):
            if label[row, x]:
                label[row, x] = final[label[row, x]]
    return count


@kernel
def measure_components(label, word, distance, weight, stack, offset, gain, height, out, spectrum):
    """Sums over the pixels of each component.

    label, word, distance, weight (row, x); stack (bit, row, x) with offset, gain (bit,) as in `decode_rows`.
    out (component, 7) float64, filled with word, plane, y, x (weighted centroid), area, mean and minimum distance;
    spectrum (component, bit) float32, filled with the mean value of each bit.
    """
    n_bits, n_rows, width = stack.shape
    mass = np.zeros(len(out))
    out[:] = 0.0
    out[:, 6] = np.inf
    spectrum[:] = 0.0
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
            for bit in range(n_bits):
                spectrum[i, bit] += (np.float32(stack[bit, row, x]) - offset[bit]) * gain[bit]
    for i in range(len(out)):
        out[i, 2] /= mass[i]
        out[i, 3] /= mass[i]
        out[i, 5] /= out[i, 4]
        for bit in range(n_bits):
            spectrum[i, bit] /= np.float32(out[i, 4])
