"""Kernels of the joint fit of peaks; they take plain arrays and fill the ``out`` arrays."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from merfish._jit import jitable, kernel
from merfish.decoding._spot_kernels import fill_grid, group
from merfish.imaging._kernels import median_of


class Metric(NamedTuple):
    """Metric in which spots, which may be elliptical, are round, see `squared_distance`; xx yy - xy^2 = 1."""

    xx: float
    xy: float
    yy: float


ROUND = Metric(1.0, 0.0, 1.0)


class Shape(NamedTuple):
    """Profile of a spot, and parameters of the fit of its position.

    metric: that of all distances. across, down: half the width and height of the ellipse of points at distance 1.
    profile (bin,): a spot of height 1 by squared distance from its centre, ``bins`` bins per square pixel. fall (bin,):
    negative slope of the profile divided by the distance, per square pixel. reach: pixel, radius of the profile; both
    tables are 0 from there to the corners of a rectangle around it. core: pixel, radius of the fit. stiffness:
    regularises a poorly determined position. most_step: pixel, largest change of a position in one step.
    """

    metric: Metric
    across: float
    down: float
    profile: np.ndarray
    fall: np.ndarray
    bins: float
    reach: float
    core: float
    stiffness: float
    most_step: float


class Spots(NamedTuple):
    """Spots of one bit: x, y (rows) and height ``top``, all (spot,) float64."""

    x: np.ndarray
    y: np.ndarray
    top: np.ndarray


@kernel
def at(profile, place):
    """Interpolate a table (bin,) linearly at an index ``place`` within it."""
    i = np.uint32(place)  # unsigned: not counted from the end
    return profile[i] + (place - i) * (profile[i + np.uint32(1)] - profile[i])


@jitable
def squared_distance(dx, dy, metric):
    """Squared distance, in a `Metric`, of a pixel from the centre of a spot; numbers or arrays."""
    return metric.xx * dx * dx + 2.0 * metric.xy * dx * dy + metric.yy * dy * dy


@kernel
def add_spot(image, first_row, last_row, x, y, height, shape):
    """Add a spot to an image (row, x) float32, within the rows of its plane."""
    profile, bins = shape.profile, shape.bins
    down, across = shape.reach * shape.down, shape.reach * shape.across
    for row in range(max(first_row, int(np.ceil(y - down))), min(last_row, int(y + down)) + 1):
        for column in range(max(0, int(np.ceil(x - across))), min(image.shape[1] - 1, int(x + across)) + 1):
            square = squared_distance(column - x, row - y, shape.metric)
            image[row, column] += np.float32(height * at(profile, square * bins))


@kernel
def refit_spot(image, first_row, last_row, x, y, height, shape):
    """Refit a spot by least squares within its core, to the residual of the other spots; return x, y and height.

    image (row, x): the residual of all spots. The position is updated by one linearised step.
    """
    profile, bins, core, metric = shape.profile, shape.bins, shape.core, shape.metric
    down, across = core * shape.down, core * shape.across
    pp = px = py = xx = xy = yy = vp = vx = vy = 0.0
    for row in range(max(first_row, int(np.ceil(y - down))), min(last_row, int(y + down)) + 1):
        for column in range(max(0, int(np.ceil(x - across))), min(image.shape[1] - 1, int(x + across)) + 1):
            dx, dy = column - x, row - y
            square = squared_distance(dx, dy, metric)
            if square > core * core:
                continue
            p = at(profile, square * bins)
            value = image[row, column] + height * p
            fall = at(shape.fall, square * bins)
            gx, gy = fall * (metric.xx * dx + metric.xy * dy), fall * (metric.xy * dx + metric.yy * dy)
            pp += p * p
            px += p * gx
            py += p * gy
            xx += gx * gx
            xy += gx * gy
            yy += gy * gy
            vp += value * p
            vx += value * gx
            vy += value * gy
    xx += shape.stiffness
    yy += shape.stiffness
    # Cramer's rule for height, height * step in x, height * step in y
    a, b, c = xx * yy - xy * xy, py * xy - px * yy, px * xy - py * xx
    e, f, g = pp * yy - py * py, px * py - pp * xy, pp * xx - px * px
    det = pp * a + px * b + py * c
    top = (vp * a + vx * b + vy * c) / det if det > 0.0 else 0.0
    if not top > 0.0:
        return x, y, 0.0
    most_step = shape.most_step
    step_x = (vp * b + vx * e + vy * f) / det / top
    step_y = (vp * c + vx * f + vy * g) / det / top
    new_x = min(max(x + min(max(step_x, -most_step), most_step), 0.0), image.shape[1] - 1.0)
    new_y = min(max(y + min(max(step_y, -most_step), most_step), np.float64(first_row)), np.float64(last_row))
    return new_x, new_y, top


@kernel
def fit_spots(image, plane_height, spots, fresh, shape, sweeps, settled):
    """Fit spots jointly: in each of ``sweeps`` sweeps, fit each spot in turn to the residual of the others.

    image (row, x) float32, the residual, and the `Spots` are updated; spots from index ``fresh`` on have not been
    subtracted from the image yet. A spot is left unchanged if its height and its position (pixel) would change by at
    most ``settled``.
    """
    x, y, top = spots
    for i in range(fresh, len(x)):
        first = int(y[i]) // plane_height * plane_height
        add_spot(image, first, first + plane_height - 1, x[i], y[i], -top[i], shape)
    for _ in range(sweeps):
        for i in range(len(x)):
            first = int(y[i]) // plane_height * plane_height
            last = first + plane_height - 1
            new_x, new_y, new_top = refit_spot(image, first, last, x[i], y[i], top[i], shape)
            if max(abs(new_x - x[i]), abs(new_y - y[i]), abs(new_top - top[i])) <= settled:
                continue
            add_spot(image, first, last, x[i], y[i], top[i], shape)
            add_spot(image, first, last, new_x, new_y, -new_top, shape)
            x[i], y[i], top[i] = new_x, new_y, new_top


@kernel
def draw_spot(image, plane_height, x, y, radius, shape, box, out):
    """Draw a spot of height 1, cut off at ``radius``, into ``out`` (row, column); return its sum of squares.

    box: (4,) int64 out, the region of the image: first row, end of rows, first column, end of columns.
    """
    profile, bins = shape.profile, shape.bins
    first_row = int(y) // plane_height * plane_height
    last_row, last_column = first_row + plane_height - 1, image.shape[1] - 1
    down, across = radius * shape.down, radius * shape.across
    box[0], box[1] = max(first_row, int(np.ceil(y - down))), min(last_row, int(y + down)) + 1
    box[2], box[3] = max(0, int(np.ceil(x - across))), min(last_column, int(x + across)) + 1
    total = 0.0
    for row in range(box[0], box[1]):
        for column in range(box[2], box[3]):
            square = squared_distance(column - x, row - y, shape.metric)
            p = at(profile, square * bins) if square <= radius * radius else 0.0
            out[row - box[0], column - box[2]] = p
            total += p * p
    return total


@kernel
def share_light(image, plane_height, spots, chosen, shape, sweeps, settled):
    """Fit the heights of the ``chosen`` spots at fixed positions, each in turn to the residual of the others.

    image and spots as in `fit_spots`; all spots have been subtracted from the image. A height that would change by at
    most ``settled`` is left unchanged; the sweeps end when no height changes.
    """
    x, y, top = spots
    core = shape.core
    reach = shape.reach
    # each spot and its core, drawn at height 1: the same in every sweep
    whole = np.empty((len(chosen), int(2 * reach * shape.down) + 2, int(2 * reach * shape.across) + 2))
    middle = np.empty((len(chosen), int(2 * core * shape.down) + 2, int(2 * core * shape.across) + 2))
    box, inner = np.empty((len(chosen), 4), np.int64), np.empty((len(chosen), 4), np.int64)
    square = np.empty(len(chosen))
    for k in range(len(chosen)):
        i = chosen[k]
        draw_spot(image, plane_height, x[i], y[i], reach, shape, box[k], whole[k])
        square[k] = draw_spot(image, plane_height, x[i], y[i], core, shape, inner[k], middle[k])
    for _ in range(sweeps):
        moved = False
        for k in range(len(chosen)):
            i = chosen[k]
            vp = 0.0
            for row in range(inner[k, 0], inner[k, 1]):
                line, weights = image[row, inner[k, 2] : inner[k, 3]], middle[k, row - inner[k, 0]]
                for column in range(len(line)):
                    vp += line[column] * weights[column]
            new = max(top[i] + vp / square[k], 0.0) if square[k] > 0.0 else 0.0
            change = top[i] - new
            if abs(change) <= settled:
                continue
            moved = True
            top[i] = new
            for row in range(box[k, 0], box[k, 1]):
                line, share = image[row, box[k, 2] : box[k, 3]], whole[k, row - box[k, 0]]
                for column in range(len(line)):
                    line[column] += np.float32(change * share[column])
        if not moved:
            break


@kernel
def add_spots(image, plane_height, spots, shape):
    """Add spots to an image (row, x), each within its plane."""
    x, y, top = spots
    for i in range(len(x)):
        first = int(y[i]) // plane_height * plane_height
        add_spot(image, first, first + plane_height - 1, x[i], y[i], top[i], shape)


@kernel
def find_near(x, y, px, py, radius, near):
    """Which places (px, py) (place,) have one of the points (x, y) (point,) closer than ``radius``; all at least 0.

    out: near (place,) bool.
    """
    width, height = 0.0, 0.0
    for i in range(len(x)):
        width, height = max(width, x[i]), max(height, y[i])
    cell = max(radius, np.sqrt(width * height / max(len(x), 1)))  # about a point in each
    n_across, n_down = int(width / cell) + 1, int(height / cell) + 1
    start, order = np.empty(n_across * n_down + 1, np.int64), np.empty(len(x), np.int64)
    fill_grid(x, y, cell, n_across, start, order)
    for k in range(len(px)):
        near[k] = False
        first, last = max(int((px[k] - radius) / cell), 0), min(int((px[k] + radius) / cell), n_across - 1)
        if first > last:
            continue
        for row in range(max(int((py[k] - radius) / cell), 0), min(int((py[k] + radius) / cell), n_down - 1) + 1):
            for i in order[start[row * n_across + first] : start[row * n_across + last + 1]]:
                near[k] |= (x[i] - px[k]) ** 2 + (y[i] - py[k]) ** 2 < radius * radius


@kernel
def spot_medians(image, spots, margin, metric, bins, out):
    """Medians over spots of their light, by direction and distance from their centres.

    image (row, x) float32; spots: `Spots`, at least ``margin`` pixels from the edges; metric: `Metric` of distances.
    out: (sector, bin) float64, relative to the tops of the spots; bin k is at distance k / ``bins`` pixels, sector j of
    n at the angle j pi / n from x, and opposite to it. NaN without a pixel.
    """
    n_sectors, n_bins = out.shape
    side = 2 * margin - 1
    values, place = np.empty(len(spots.x) * side * side, np.float32), np.empty(len(spots.x) * side * side, np.int64)
    n = 0
    for i in range(len(spots.x)):
        x, y = spots.x[i], spots.y[i]
        first_row, first_column = int(np.rint(y)) - margin + 1, int(np.rint(x)) - margin + 1
        for row in range(first_row, first_row + side):
            for column in range(first_column, first_column + side):
                dx, dy = column - x, row - y
                k = int(np.rint(np.sqrt(squared_distance(dx, dy, metric)) * bins))
                if k >= n_bins:
                    continue
                sector = int(np.rint(np.arctan2(dy, dx) * (n_sectors / np.pi))) % n_sectors if n_sectors > 1 else 0
                place[n] = sector * n_bins + k
                values[n] = image[row, column] / spots.top[i]
                n += 1
    start, order = np.empty(n_sectors * n_bins + 1, np.int64), np.empty(n, np.int64)
    group(place[:n], start, order)
    for k in range(n_sectors * n_bins):
        some = order[start[k] : start[k + 1]]
        out[k // n_bins, k % n_bins] = median_of(values[some]) if len(some) else np.nan
