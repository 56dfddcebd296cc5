"""Numba kernels of `merfish.imaging`."""

from __future__ import annotations

import numpy as np

from merfish._jit import fused_kernel, kernel

_BLOCK = 64  # pixels of a row that are searched for peaks only if one is above the threshold
ROWS = 32  # rows of a strip; filtered along x, it stays in the cache of a core while it is filtered along y


@kernel
def filter_strips(first, last, planes, starts, taps_y, taps_x, out):
    """Filter each plane of (plane, y, x) along x and y with its own weights into ``out`` float32.

    out[p, y, x] = sum over s, t of taps_y[p, s] taps_x[p, t] planes[p, y + starts[p, 0] + s, x + starts[p, 1] + t];
    beyond its edges a plane is mirrored about its outermost pixels. starts: (plane, 2) int64; taps: (plane, tap)
    float32, a multiple of 4 taps (see `filled_taps`). Only strips ``first`` to ``last`` - 1, of `ROWS` rows each and
    counted over all planes, are filtered.
    """
    _, height, width = planes.shape
    n_y, n_x = taps_y.shape[1], taps_x.shape[1]
    of_plane = (height + ROWS - 1) // ROWS
    padded = np.empty(width + n_x - 1, np.float32)
    rows = np.empty((ROWS + n_y - 1, width), np.float32)
    for strip in range(first, last):
        p = strip // of_plane
        top = strip % of_plane * ROWS
        bottom = min(top + ROWS, height)
        left = min(max(0, -starts[p, 1]), len(padded))
        right = min(max(left, width - starts[p, 1]), len(padded))
        for r in range(bottom - top + n_y - 1):
            source = planes[p, _mirror(top + r + starts[p, 0], height)]
            for c in range(left):
                padded[c] = source[_mirror(c + starts[p, 1], width)]
            for c in range(left, right):
                padded[c] = source[c + starts[p, 1]]
            for c in range(right, len(padded)):
                padded[c] = source[_mirror(c + starts[p, 1], width)]
            along_row(rows[r], padded, taps_x[p])
        for r in range(top, bottom):
            out[p, r] = 0.0
            across_rows(out[p, r], rows, r - top, taps_y[p])


@fused_kernel
def along_row(target, source, taps):
    """target[c] = sum over t of taps[t] * source[c + t]; four taps at a time, so that sums stay in registers."""
    for t in range(0, len(taps), 4):
        a, b, c, d = source[t:], source[t + 1 :], source[t + 2 :], source[t + 3 :]
        u, v, w, z = taps[t], taps[t + 1], taps[t + 2], taps[t + 3]
        if t == 0:
            target[:] = 0.0
        for i in range(len(target)):
            target[i] += (u * a[i] + v * b[i]) + (w * c[i] + z * d[i])


@fused_kernel
def across_rows(target, ring, first, taps):
    """target += sum over t of taps[t] * row (first + t), where row r is ring[r % len(ring)]."""
    size = len(ring)
    for t in range(0, len(taps), 4):
        r = first + t
        a, b, c, d = ring[r % size], ring[(r + 1) % size], ring[(r + 2) % size], ring[(r + 3) % size]
        u, v, w, z = taps[t], taps[t + 1], taps[t + 2], taps[t + 3]
        for i in range(len(target)):
            target[i] += (u * a[i] + v * b[i]) + (w * c[i] + z * d[i])


@kernel
def bandpass_rows(image, first, last, narrow, wide, out):
    """Band-pass rows ``first`` to ``last`` - 1 of an image (y, x), narrow minus wide Gaussian, into ``out`` (row, x).

    narrow, wide (tap,) float32: symmetric about the tap at their radius, then zeros up to a multiple of 4 taps. The
    image is mirrored at its edges. Each row is filtered along x once; as many filtered rows as the filter has taps are
    kept in the cache. For a whole image ``out`` may be the image: rows mirrored at its end, which are overwritten by
    then, are taken from the kept ones.
    """
    height, width = image.shape
    reach, inner = radius_of(wide), radius_of(narrow)
    padded = np.zeros(width + 2 * reach + len(wide), np.float32)
    near, far = np.zeros((len(wide), width), np.float32), np.zeros((len(wide), width), np.float32)
    minus = -wide
    for r in range(last - first + 2 * reach):
        index = _mirror(first + r - reach, height)
        same = index - first + reach  # value of r for which that row was filtered
        if 0 <= same < r < same + len(wide):
            far_row, near_row = far[r % len(wide)], near[r % len(wide)]
            far_kept, near_kept = far[same % len(wide)], near[same % len(wide)]
            for x in range(width):  # assignments of slices take seconds to compile
                far_row[x], near_row[x] = far_kept[x], near_kept[x]
        else:
            source = image[index]
            for x in range(width):
                padded[reach + x] = source[x]
            for x in range(reach):
                padded[x] = source[_mirror(x - reach, width)]
                padded[reach + width + x] = source[_mirror(width + x, width)]
            along_row(far[r % len(wide)], padded, minus)
            along_row(near[r % len(wide)], padded[reach - inner :], narrow)
        row = r - 2 * reach
        if row >= 0:
            out[row] = 0.0
            across_rows(out[row], far, row, wide)
            across_rows(out[row], near, row + reach - inner, narrow)


@kernel
def radius_of(taps):
    """Number of taps on each side of the middle one of symmetric taps, which are padded with 0 to a multiple of 4."""
    n = len(taps)
    while taps[n - 1] == 0.0:
        n -= 1
    return (n - 1) // 2


@kernel
def _mirror(index, size):
    """Pixel to which ``index`` refers if the image is mirrored about its outermost pixels."""
    if size == 1:
        return 0
    period = 2 * size - 2
    index = index % period
    return index if index < size else period - index


@kernel
def remove_hot_pixels(image, out):
    """Copy ``image`` (y, x) to float32 ``out``, with hot pixels replaced by their second highest neighbour.

    A pixel is hot if it exceeds its lowest neighbour by more than 4 times the difference of the second highest and the
    lowest one; even a spot of sigma 0.8 px does not fall off so steeply. The highest neighbour is ignored because hot
    pixels also occur in pairs. Hot pixels stay at the same position while the sample drifts.
    """
    height, width = image.shape
    rows = np.empty((3, width), np.float32)
    for y in range(height):
        if y == 0 or y == height - 1 or width < 3:
            for x in range(width):
                out[y, x] = _not_hot(image, y, x)
            continue
        for r in range(3):
            for x in range(width):
                rows[r, x] = image[y - 1 + r, x]
        for x in (0, width - 1):
            out[y, x] = _not_hot(image, y, x)
        _without_hot(rows[0], rows[1], rows[2], out[y])


@kernel
def _without_hot(above, row, below, out):
    """`remove_hot_pixels` for the inner pixels of a row (x,) float32; without branches, so that it is vectorised."""
    for x in range(1, len(row) - 1):
        ranks = (above[x - 1], above[x - 1], np.float32(-np.inf))
        ranks = _ranked(ranks, above[x])
        ranks = _ranked(ranks, above[x + 1])
        ranks = _ranked(ranks, row[x - 1])
        ranks = _ranked(ranks, row[x + 1])
        ranks = _ranked(ranks, below[x - 1])
        ranks = _ranked(ranks, below[x])
        low, _, second = _ranked(ranks, below[x + 1])
        out[x] = second if row[x] - low > 4 * (second - low) else row[x]


@kernel
def _not_hot(image, y, x):
    """`remove_hot_pixels` for a pixel at the edge."""
    value = np.float32(image[y, x])
    low, high, second = np.float32(np.inf), np.float32(-np.inf), np.float32(-np.inf)
    for v in range(max(0, y - 1), min(len(image), y + 2)):
        for u in range(max(0, x - 1), min(image.shape[1], x + 2)):
            if v != y or u != x:
                low, high, second = _ranked((low, high, second), np.float32(image[v, u]))
    second = max(second, low)  # the end of a line of pixels has a single neighbour
    return second if value - low > 4 * (second - low) else value


@kernel
def _ranked(ranks, other):
    """Lowest, highest and second highest of the values so far and ``other``."""
    low, high, second = ranks
    between = high if high < other else other
    return other if other < low else low, other if other > high else high, between if between > second else second


@kernel
def patch_sums(fixed, moving, bounds, centers, radius, normal, target, total, count):
    """Sums over the pixels of each patch, for `merfish.imaging.registration.patch_steps`.

    Within ``radius`` of each centre (patch, 2) int64, the terms are the gradient of the mean of both images along y and
    x, ``fixed`` relative to the centre, and 1; the value is ``moving`` relative to ``fixed`` at the centre. Only pixels
    from bounds[0] to bounds[1] - 1 along y and from bounds[2] to bounds[3] - 1 along x are used.
    out, 0 on entry: normal (patch, 4, 4), target (patch, 4), total (patch,), sums of products of two terms, of a term
    and the value, and of squared values; count (patch,), pixels.
    """
    term = np.empty(4)
    for k in range(len(centers)):
        base = fixed[centers[k, 0], centers[k, 1]]
        for y in range(max(bounds[0], centers[k, 0] - radius), min(bounds[1], centers[k, 0] + radius + 1)):
            for x in range(max(bounds[2], centers[k, 1] - radius), min(bounds[3], centers[k, 1] + radius + 1)):
                if (y - centers[k, 0]) ** 2 + (x - centers[k, 1]) ** 2 > radius * radius:
                    continue
                term[0] = (fixed[y + 1, x] - fixed[y - 1, x] + moving[y + 1, x] - moving[y - 1, x]) / 4
                term[1] = (fixed[y, x + 1] - fixed[y, x - 1] + moving[y, x + 1] - moving[y, x - 1]) / 4
                term[2] = fixed[y, x] - base
                term[3] = 1.0
                value = moving[y, x] - base
                total[k] += value * value
                count[k] += 1
                for i in range(4):
                    target[k, i] += term[i] * value
                    for j in range(4):
                        normal[k, i, j] += term[i] * term[j]


@kernel
def warp_rows(first, last, coefficients, maps, out):
    """Resample planes (plane, y, x) of B-spline coefficients at maps[p] @ (y, x, 1) into ``out`` float32.

    maps: (plane, 2, 3) float64. Beyond its edges a plane is mirrored about its outermost pixels. Only the rows
    ``first`` to ``last`` - 1 are computed, counted over all planes.
    """
    _, height, width = coefficients.shape
    weight_y = np.empty(4, np.float32)
    weight_x = np.empty(4, np.float32)
    for task in range(first, last):
        p = task // height
        y = task % height
        plane = coefficients[p]
        at = maps[p]
        for x in range(width):
            v = at[0, 0] * y + at[0, 1] * x + at[0, 2]
            u = at[1, 0] * y + at[1, 1] * x + at[1, 2]
            row = int(np.floor(v))
            column = int(np.floor(u))
            _cubic_weights(np.float32(v - row), weight_y)
            _cubic_weights(np.float32(u - column), weight_x)
            inner = row >= 1 and column >= 1 and row < height - 2 and column < width - 2
            value = np.float32(0.0)
            for s in range(4):
                r = row - 1 + s
                if not inner:
                    r = _mirror(r, height)
                line = np.float32(0.0)
                for t in range(4):
                    c = column - 1 + t
                    if not inner:
                        c = _mirror(c, width)
                    line += weight_x[t] * plane[r, c]
                value += weight_y[s] * line
            out[p, y, x] = value


@kernel
def _cubic_weights(fraction, weights):
    """Weights of cubic B-splines at a position ``fraction`` (0 to 1) beyond the second of four pixels."""
    left = np.float32(1.0) - fraction
    weights[0] = left * left * left / np.float32(6.0)
    weights[3] = fraction * fraction * fraction / np.float32(6.0)
    weights[1] = np.float32(2.0 / 3.0) - fraction * fraction * (np.float32(2.0) - fraction) / np.float32(2.0)
    weights[2] = np.float32(2.0 / 3.0) - left * left * (np.float32(2.0) - left) / np.float32(2.0)


@kernel
def in_order(bits):
    """Map the bits of a float32 to an integer of the same order; its own inverse."""
    return bits ^ ((bits >> np.int32(31)) & np.int32(0x7FFFFFFF))


@kernel
def median_of(values):
    """Median of finite ``values`` (n,) float32, n >= 1.

    By bisection: the interval that contains the median is halved until half of the values lie below it. Counting,
    minima and maxima of integers are vectorised; sorting is not.
    """
    n = len(values)
    middle = (n + 1) // 2
    bits, keys = values.view(np.int32), np.empty(n, np.int32)
    ends = np.empty(2, np.float32)
    end_bits = ends.view(np.int32)
    least, most = np.int32(-(2**31)), np.int32(2**31 - 1)  # beyond the keys of finite values
    low, high = most, least
    for i in range(n):
        keys[i] = in_order(bits[i])
        low, high = min(low, keys[i]), max(high, keys[i])
    while low < high:
        end_bits[0], end_bits[1] = in_order(low), in_order(high)
        ends[0] += (ends[1] - ends[0]) / np.float32(2.0)
        limit = np.int32(min(in_order(end_bits[0]), high - 1))
        number, below, above = np.int32(0), least, most
        for i in range(n):
            number += np.int32(keys[i] <= limit)
            below = max(below, keys[i] if keys[i] <= limit else least)
            above = min(above, keys[i] if keys[i] > limit else most)
        if number == middle:
            low, high = below, above if n % 2 == 0 else below
            break
        if number > middle:
            high = below
        else:
            low = above
    end_bits[0], end_bits[1] = in_order(low), in_order(high)
    return (ends[0] + ends[1]) / np.float32(2.0)


@kernel
def tile_noise(planes, tile_y, tile_x, every, medians, deviations):
    """Median and median absolute deviation of tiles of (plane, y, x) images, from every ``every``-th row and column.

    out: medians, deviations (plane, row, column) float32.
    """
    values = np.empty(((tile_y + every - 1) // every) * ((tile_x + every - 1) // every), np.float32)
    for p in range(medians.shape[0]):
        for row in range(medians.shape[1]):
            for column in range(medians.shape[2]):
                n = 0
                for y in range(row * tile_y, (row + 1) * tile_y, every):
                    for x in range(column * tile_x, (column + 1) * tile_x, every):
                        values[n] = planes[p, y, x]
                        n += 1
                middle = median_of(values)
                for i in range(n):
                    values[i] = abs(values[i] - middle)
                medians[p, row, column] = middle
                deviations[p, row, column] = median_of(values)


@kernel
def between_tiles(values, height, tile_y, tile_x, x, y, out):
    """Interpolate values of tiles (plane, row, column) linearly between the centres of the tiles of each plane.

    height: rows of a plane; tile_y, tile_x: pixel; x, y (rows) (place,). out: (place,) float32; beyond the outermost
    centres the values continue unchanged.
    """
    _, n_down, n_across = values.shape
    for i in range(len(x)):
        plane = int(y[i]) // height
        v = min(max((y[i] - plane * height + 0.5) / tile_y - 0.5, 0.0), n_down - 1.0)
        u = min(max((x[i] + 0.5) / tile_x - 0.5, 0.0), n_across - 1.0)
        row, column = int(v), int(u)
        below, right = min(row + 1, n_down - 1), min(column + 1, n_across - 1)
        v, u = v - row, u - column
        upper = values[plane, row, column] * (1 - u) + values[plane, row, right] * u
        lower = values[plane, below, column] * (1 - u) + values[plane, below, right] * u
        out[i] = upper * (1 - v) + lower * v


@kernel
def find_peaks(image, height, threshold, x, y, value):
    """Sub-pixel local maxima above a threshold in an image (row, x) of stacked planes of ``height`` rows each.

    out: x, y (rows), value (capacity,) float64. The maximum is that of the least-squares paraboloid over 3 x 3 pixels,
    at most 1 px away along each axis. Returns the number of maxima, including those beyond the capacity.
    """
    n_rows, width = image.shape
    found = 0
    low = np.float32(threshold)  # no float32 above the threshold is below it
    for row in range(n_rows):
        inside = row % height
        if inside == 0 or inside == height - 1:
            continue
        line = image[row]
        for first in range(1, width - 1, _BLOCK):
            last = min(first + _BLOCK, width - 1)
            above = 0
            for column in range(first, last):  # vectorised; most blocks have no pixel above
                above += np.int32(line[column] >= low)
            if above == 0:
                continue
            for column in range(first, last):
                centre = image[row, column]
                if not centre > threshold:
                    continue
                # most pixels of a spot are not its top, and two neighbours tell
                if image[row, column - 1] >= centre or image[row, column + 1] > centre:
                    continue
                top = True
                gx = gy = hxx = hyy = hxy = mean = 0.0
                for dy in range(-1, 2):
                    for dx in range(-1, 2):
                        v = image[row + dy, column + dx]
                        if v > centre or (v == centre and (dy < 0 or (dy == 0 and dx < 0))):
                            top = False
                        mean += v / 9.0
                        gx += dx * v / 6.0
                        gy += dy * v / 6.0
                        hxx += (3 * dx * dx - 2) * v / 3.0
                        hyy += (3 * dy * dy - 2) * v / 3.0
                        hxy += dx * dy * v / 4.0
                if not top:
                    continue
                found += 1
                if found > len(x):
                    continue
                ox = oy = 0.0
                det = hxx * hyy - hxy * hxy
                if det > 0 and hxx < 0:
                    ox = min(max((hxy * gy - hyy * gx) / det, -1.0), 1.0)
                    oy = min(max((hxy * gx - hxx * gy) / det, -1.0), 1.0)
                x[found - 1] = column + ox
                y[found - 1] = row + oy
                value[found - 1] = max(centre, mean + (gx * ox + gy * oy) / 2 - (hxx + hyy) / 3)
    return found
