"""The loops of decoding: plain arrays in, ``out`` arrays filled.

Stacks come as (bit, row, x): planes of a field are laid one below the other, row = z * height + y.
"""

from __future__ import annotations

import numpy as np

from merfish._jit import kernel, parallel_kernel, prange

_BLOCK = 256  # pixels whose values of all bits stay in a core's nearest cache


@parallel_kernel
def decode_rows(
    stack, offset, gain, word_bits, word_weight, by_bit, by_pair, min_magnitude, min_cosine, word, distance, magnitude
):  # fmt: skip
    """Nearest word of each pixel vector by the angle between them.

    stack (bit, row, x); offset, gain (bit,) float32: value = (stack - offset) * gain, negative values count as 0.
    word_bits (word, weight) int64: the bits that are on, first word_weight[w] of each row. by_bit (bit, word) and
    by_pair (bit, bit, word) int32: the words with that bit, with both bits, and then -1.
    out: word (row, x) int32, -1 = none; distance (row, x) float32 between unit vectors; magnitude (row, x) float32,
    Euclidean norm of the pixel vector.

    Exact, but few words are looked at: pixels whose magnitude is too small never reach the search; nor do words
    without the brightest bit where all other bits together are too dark for the angle, nor those without the second.
    """
    n_bits, n_rows, width = stack.shape
    heaviest = word_bits.shape[1]
    blocks = (width + _BLOCK - 1) // _BLOCK
    scale = 1.0 / np.sqrt(word_weight.astype(np.float32))
    largest_scale = scale.max()
    everything = np.append(np.arange(len(word_weight)), -1).astype(np.int32)
    floor = min_magnitude * min_magnitude
    for row in prange(n_rows):
        values = np.empty((n_bits, _BLOCK), np.float32)
        squares = np.empty(_BLOCK, np.float32)
        top = np.empty(heaviest + 1, np.float32)
        pixel = np.empty(n_bits, np.float32)
        for block in range(blocks):
            left = block * _BLOCK
            n = min(_BLOCK, width - left)
            squares[:] = 0.0
            for bit in range(n_bits):
                line = stack[bit, row, left : left + n]
                scaled = values[bit]
                low = offset[bit]
                factor = gain[bit]
                for x in range(n):
                    value = max((np.float32(line[x]) - low) * factor, np.float32(0.0))
                    scaled[x] = value
                    squares[x] += value * value
            word[row, left : left + n] = -1
            distance[row, left : left + n] = np.float32(np.inf)
            for x in range(n):
                magnitude[row, left + x] = np.sqrt(squares[x])
            for x in range(n):
                if not squares[x] >= floor or squares[x] == 0.0:  # NaN stays undecoded
                    continue
                norm = magnitude[row, left + x]
                top[:] = 0.0
                first = second = 0
                for bit in range(n_bits):
                    value = values[bit, x]
                    pixel[bit] = value
                    if value <= top[heaviest]:
                        continue
                    k = heaviest
                    while k > 0 and top[k - 1] < value:
                        top[k] = top[k - 1]
                        k -= 1
                    top[k] = value
                    if k == 0:
                        second = first
                        first = bit
                    elif k == 1:
                        second = bit
                # a hair below, so that rounding keeps what stands at the threshold
                needed = min_cosine * norm / largest_scale * np.float32(0.9999)
                rest = np.float32(0.0)
                for k in range(2, heaviest + 1):
                    rest += top[k]
                if rest - top[heaviest] + top[0] + top[1] < needed:
                    continue
                if rest + top[1] >= needed:
                    candidates = everything
                elif rest + top[0] >= needed or heaviest < 2:
                    candidates = by_bit[first]
                else:
                    candidates = by_pair[first, second]
                best = np.float32(-1.0)
                nearest = -1
                for w in candidates:
                    if w < 0:
                        break
                    total = np.float32(0.0)
                    for k in range(word_weight[w]):
                        total += pixel[word_bits[w, k]]
                    total *= scale[w]
                    if total > best:
                        best = total
                        nearest = w
                cosine = min(best / norm, np.float32(1.0))
                if cosine >= min_cosine:
                    word[row, left + x] = nearest
                    distance[row, left + x] = np.sqrt(np.float32(2.0) - np.float32(2.0) * cosine)


@parallel_kernel
def look_up_rows(stack, level, words, distances, magnitudes, word, distance, magnitude):
    """Binarise each pixel and look its bits up: stack (bit, row, x) with level (bit,) of its dtype, at most 16 bits.

    words int32, distances and magnitudes float32 (2 ** bit,) by observed bits; out, all (row, x), of the same dtypes.
    """
    n_bits, n_rows, width = stack.shape
    for row in prange(n_rows):
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
def measure_components(label, word, distance, weight, height, out):
    """Sums over the pixels of each component.

    label, word, distance, weight (row, x). out (component, 7) float64, filled with word, plane, y, x (weighted
    centroid), area, mean and minimum distance.
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
    """Sum of an image (row, x) over the pixels of each component of ``label`` (row, x), out (component,) float64."""
    out[:] = 0.0
    for row in range(label.shape[0]):
        for x in range(label.shape[1]):
            if label[row, x] > 0:
                out[label[row, x] - 1] += image[row, x]
