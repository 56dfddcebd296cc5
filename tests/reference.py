"""Slow, simple reference implementations of the packages' kernels."""

from __future__ import annotations

import itertools

import numpy as np

# --- decoding ---------------------------------------------------------------------------------------------------


def decode_pixel(vector, words, min_magnitude, max_distance):
    """Return (word, distance, magnitude) of one normalised pixel vector: Euclidean distance between unit vectors."""
    vector = np.maximum(np.asarray(vector, float), 0)
    magnitude = np.linalg.norm(vector)
    if magnitude == 0 or magnitude < min_magnitude:
        return -1, np.inf, magnitude
    distances = [np.linalg.norm(vector / magnitude - word / np.linalg.norm(word)) for word in words]
    nearest = int(np.argmin(distances))
    if distances[nearest] > max_distance:
        return -1, np.inf, magnitude
    return nearest, distances[nearest], magnitude


def nearest_word(observed, words):
    """Return (word, Hamming distance, ambiguous) of one observed word; ties go to the first word."""
    distances = [int((np.asarray(observed) != word).sum()) for word in words]
    best = min(distances)
    return distances.index(best), best, distances.count(best) > 1


def light_by_plane(x, y, on, peaks, radius, left, height):
    """Mean height of the bits ``on`` at (y rows, x) in the planes below, at and above; peaks: (x, y, height, bit)."""
    light = []
    for plane in (int(y) // height - 1, int(y) // height, int(y) // height + 1):
        rows = left[:, plane * height : (plane + 1) * height] if plane >= 0 else left[:, :0]
        if not rows.shape[1]:
            light.append(np.nan)
            continue
        row, values = y % height, []
        for bit in on:
            mine = [
                (np.hypot(px - x, py % height - row), h) for px, py, h, b in peaks if b == bit and py // height == plane
            ]
            near = min(mine, default=(np.inf, 0))
            y0, x0 = min(int(row), height - 2), min(int(x), left.shape[2] - 2)
            square = rows[bit, y0 : y0 + 2, x0 : x0 + 2]
            v, u = min(row, height - 1) - y0, x - x0
            values.append(near[1] if near[0] < radius else np.array([1 - v, v]) @ square @ np.array([1 - u, u]))
        light.append(np.mean(values))
    return light


def tails(peak, peaks, height, near, far, share):
    """Return which peaks (x, y, height, bit) are out-of-focus light of another one, at most two planes away."""
    x, y, top, bit = peaks[peak]
    found = []
    for px, py, h, b in peaks:
        away = abs(py // height - y // height)
        apart = np.hypot(px - x, py % height - y % height)
        most = 1 if apart < near else share**away if apart < far else 0
        found.append(bool(b == bit and 1 <= away <= 2 and h < most * top))
    return found


def clusters(x, y, bit, reach, cell, height):
    """Group peaks (x, y rows, bit) into sets: connected if near in one plane, or of one bit and above each other."""
    groups = [{i} for i in range(len(x))]
    for i, j in np.ndindex(len(x), len(x)):
        away = abs(y[i] // height - y[j] // height)
        apart = np.hypot(x[i] - x[j], y[i] % height - y[j] % height)
        if (away == 0 and apart < reach) or (1 <= away <= 2 and bit[i] == bit[j] and apart < cell):
            joined = groups[i] | groups[j]
            for k in joined:
                groups[k] = joined
    return {frozenset(group) for group in groups}


def components(word):
    """Return 8-connected components of equal word in one plane (y, x): a list of sets of (y, x), in scan order."""
    height, width = word.shape
    seen, found = set(), []
    for start in np.ndindex(height, width):
        if word[start] < 0 or start in seen:
            continue
        component, stack = set(), [start]
        while stack:
            y, x = stack.pop()
            if (y, x) in component:
                continue
            component.add((y, x))
            stack += [
                (v, u)
                for v in range(max(y - 1, 0), min(y + 2, height))
                for u in range(max(x - 1, 0), min(x + 2, width))
                if word[v, u] == word[start]
            ]
        seen |= component
        found.append(component)
    return found


# --- simulation and cells ---------------------------------------------------------------------------------------


def spot(shape, y, x, flux, sigma_y, sigma_x):
    """Return an image (y, x) of a Gaussian of total ``flux``, averaged over pixels by its integral along both axes."""
    from scipy.stats import norm

    shares = [norm.cdf(np.arange(n) + 0.5, at, sigma) - norm.cdf(np.arange(n) - 0.5, at, sigma)
              for n, at, sigma in zip(shape, (y, x), (sigma_y, sigma_x), strict=True)]  # fmt: skip
    return flux * np.outer(*shares)


def cell_of(x, y, polygons, cell_ids):
    """Return the smallest id of the polygons that contain or touch (x, y), -1 if there is none."""
    import shapely

    return min((i for i, polygon in zip(cell_ids, polygons, strict=True) if polygon.intersects(shapely.Point(x, y))),
               default=-1)  # fmt: skip


def filter_plane(plane, start, taps_y, taps_x):
    """Return the sum of taps times the mirrored plane (y, x), pixel by pixel."""
    height, width = plane.shape

    def mirrored(index, size):
        there_and_back = [*range(size), *range(size - 2, 0, -1)]
        return there_and_back[index % len(there_and_back)]

    out = np.zeros(plane.shape)
    for y in range(height):
        for x in range(width):
            for s, weight_y in enumerate(taps_y):
                for t, weight_x in enumerate(taps_x):
                    row, column = mirrored(y + start[0] + s, height), mirrored(x + start[1] + t, width)
                    out[y, x] += weight_y * weight_x * plane[row, column]
    return out


def remove_hot_pixels(image):
    """Replace pixels that exceed the lowest neighbour by 4 times the neighbours' range, the highest one excluded."""
    out = image.astype(float)
    for y, x in np.ndindex(image.shape):
        block = image[max(0, y - 1) : y + 2, max(0, x - 1) : x + 2].astype(float)
        here = (min(y, 1), min(x, 1))
        others = np.sort(np.delete(block.ravel(), here[0] * block.shape[1] + here[1]))[:-1]
        if image[y, x] - others.min() > 4 * np.ptp(others):
            out[y, x] = others.max()
    return out


def patch_step(fixed, moving, center, radius):
    """Return the step of one patch by numpy's least squares; see the kernel of the same name."""
    v, u = np.mgrid[-radius : radius + 1, -radius : radius + 1]
    y, x = (c + d[v**2 + u**2 <= radius**2] for c, d in zip(center, (v, u), strict=True))
    mean = (fixed.astype(float) + moving) / 2
    terms = [(mean[y + 1, x] - mean[y - 1, x]) / 2, (mean[y, x + 1] - mean[y, x - 1]) / 2, fixed[y, x], np.ones(len(y))]
    fit, *_ = np.linalg.lstsq(np.stack(terms, axis=1), moving[y, x], rcond=None)
    return -fit[:2] * (1 + fit[2]) / (2 * fit[2])


# --- spatialvae -------------------------------------------------------------------------------------------------


def nearest_neighbours(coordinates, samples, k):
    """Return a list of sets of distances: from each cell to its k nearest others in the same sample, sorted."""
    out = []
    for i, here in enumerate(coordinates):
        others = [
            np.linalg.norm(here - there) for j, there in enumerate(coordinates) if j != i and samples[j] == samples[i]
        ]
        out.append(sorted(others)[:k])
    return out


def smooth_part(laplacian, y, r, a, smooth, rough, noise):
    """Return the posterior mean of the smooth field, one direction at a time, with dense matrices."""
    one = np.eye(len(laplacian))
    field = smooth[:, None, None] * np.linalg.inv(one + r * laplacian)
    rest = rough[:, None, None] * np.linalg.inv(one + a * laplacian) + noise[:, None, None] * one
    return np.stack([field[d] @ np.linalg.solve(field[d] + rest[d], y[:, d]) for d in range(y.shape[1])], 1)


def field_log_likelihood(laplacian, y, r, a, smooth, rough, noise):
    """Return log N(y; 0, V) of one direction with dense matrices."""
    from scipy.stats import multivariate_normal

    one = np.eye(len(laplacian))
    inverse = np.linalg.inv(one + r * laplacian)
    covariance = smooth * inverse + rough * np.linalg.inv(one + a * laplacian) + noise * one
    return multivariate_normal(np.zeros(len(y)), covariance).logpdf(y)


def cell_bound(x, shares, zeros, theta, mean, variance, prior_mean, prior_variance):
    """Return (log likelihood, KL of z_cell) of one cell for a given draw, gene by gene and dimension by dimension."""
    from scipy.stats import nbinom

    depth = x.sum()
    log_likelihood = 0.0
    for count, share, zero, t in zip(x, shares, zeros, theta, strict=True):
        counted = nbinom.pmf(count, t, t / (t + depth * share / (1 - zero)))
        log_likelihood += np.log(zero * (count == 0) + (1 - zero) * counted)
    divergence = 0.0
    for m, v, pm, pv in zip(mean, variance, prior_mean, prior_variance, strict=True):
        divergence += 0.5 * (v / pv + (m - pm) ** 2 / pv - 1 + np.log(pv / v))
    return log_likelihood, divergence


def peaks(image, threshold):
    """Return inner pixels (y, x) of an image above a threshold that no neighbour exceeds, in scan order."""
    return [
        (y, x)
        for y in range(1, image.shape[0] - 1)
        for x in range(1, image.shape[1] - 1)
        if image[y, x] > threshold and image[y, x] == image[y - 1 : y + 2, x - 1 : x + 2].max()
    ]


def word_scores(seen, ratio, log_prior, words):
    """Return the log posterior odds of each word: its prior and the evidence of each of its on-bits."""
    return [
        log_prior[w] + sum(ratio[bit][seen[bit]] for bit in range(len(word)) if word[bit])
        for w, word in enumerate(words)
    ]


def refit_spot(image, x, y, height, shape):
    """Fit height, and height * step in x and y, of one spot by NumPy's least squares; returns x, y, height."""
    places, (xx, xy, yy) = np.arange(len(shape.profile)) / shape.bins, shape.metric
    rows, values = [], []
    for row in range(image.shape[0]):
        for column in range(image.shape[1]):
            away = np.array([column - x, row - y])
            metric = np.array([[xx, xy], [xy, yy]])
            square = away @ metric @ away
            if square > shape.core**2:
                continue
            p, fall = np.interp(square, places, shape.profile), np.interp(square, places, shape.fall)
            rows.append([p, *(fall * (metric @ away))])
            values.append(image[row, column] + height * p)
    for k in (1, 2):
        rows.append([np.sqrt(shape.stiffness) * (j == k) for j in range(3)])
        values.append(0.0)
    top, along_x, along_y = np.linalg.lstsq(np.array(rows), np.array(values), rcond=None)[0]
    return x + along_x / top, y + along_y / top, top


def word_tally(word, shown, probability, kept, codebook):
    """Return what `merfish.calls.error_model.tally_words` counts, call by call."""
    tally = {name: np.zeros(codebook.n_words) for name in ("found", "kept", "kept_exact", "right", "exact")}
    tally |= {name: np.zeros(codebook.n_bits) for name in ("lost", "gained")}
    for w, bits, p, keep in zip(word, shown, probability, kept, strict=True):
        seen = np.array([(int(bits) >> k) & 1 for k in range(codebook.n_bits)])
        wrong = np.flatnonzero(seen != codebook.words[w])
        tally["found"][w] += 1
        if keep:
            tally["kept"][w] += 1
            tally["kept_exact"][w] += len(wrong) == 0
            tally["right"][w] += p
        if len(wrong) == 0:
            tally["exact"][w] += p
        if len(wrong) == 1:
            tally["lost" if codebook.words[w][wrong[0]] else "gained"][wrong[0]] += p
    return tally


def pairs_of_fields(a, b, radius):
    """Return one-to-one pairs of equal word within ``radius``, the closest first."""
    near = sorted(
        (np.hypot(a.x[i] - b.x[j], a.y[i] - b.y[j]), i, j)
        for i in range(len(a.word))
        for j in range(len(b.word))
        if a.word[i] == b.word[j]
    )
    pairs = []
    for distance, i, j in near:
        if distance <= radius and all(i != k and j != m for k, m in pairs):
            pairs.append((i, j))
    return sorted(pairs)


def share_light(image, x, y, top, shape):
    """Update heights at fixed places once: each spot gets its least-squares share of the residual of the others."""
    places, (rows, columns) = np.arange(len(shape.profile)) / shape.bins, np.indices(image.shape)
    left, top, (xx, xy, yy) = image.astype(float), list(top), shape.metric
    for i in range(len(x)):
        dx, dy = columns - x[i], rows - y[i]
        square = xx * dx**2 + 2 * xy * dx * dy + yy * dy**2
        spot = np.interp(square, places, shape.profile)
        near = np.where(square <= shape.core**2, spot, 0)
        new = max(top[i] + (left * near).sum() / (near**2).sum(), 0)
        left += (top[i] - new) * spot
        top[i] = new
    return left, top


def tile_noise(planes, tile, every):
    """Return medians and median absolute deviations of tiles of (plane, y, x), by NumPy; both (plane, row, column)."""
    (n_planes, height, width), (tile_y, tile_x) = planes.shape, tile
    medians, deviations = np.empty((2, n_planes, height // tile_y, width // tile_x))
    for p, row, column in np.ndindex(medians.shape):
        here = planes[p, row * tile_y :, column * tile_x :][:tile_y:every, :tile_x:every]
        medians[p, row, column] = np.median(here)
        deviations[p, row, column] = np.median(np.abs(here - np.median(here)))
    return medians, deviations


def weigh_pairs(step, place, a, b, warp, share, width, chance):
    """Return what the kernel of the same name fills and returns, pair by pair."""
    from scipy.stats import norm

    n, terms = len(warp), place.shape[1]
    links, pull, total, scatter = np.zeros((n, n, terms, terms)), np.zeros((n, 2, terms)), 0.0, 0.0
    for k, (i, j) in enumerate(zip(a, b, strict=True)):
        off = step[k] - (warp[j] - warp[i]) @ place[k]
        near = share * norm.pdf(off, 0, width).prod()
        weight = near / (near + (1 - share) * chance)
        links[i, j] += weight * np.outer(place[k], place[k])
        pull[i] -= weight * np.outer(step[k], place[k])
        pull[j] += weight * np.outer(step[k], place[k])
        total += weight
        scatter += weight * (off**2).sum()
    return links, pull, total, scatter


def mixture_log_density(weight, mean, variance, z):
    """Of points z (cell, point, dim) in mixtures of Gaussians, (cell, part) and (cell, part, dim)."""
    out = np.empty(z.shape[:2])
    for i, j in np.ndindex(*out.shape):
        parts = np.exp(-0.5 * (z[i, j] - mean[i]) ** 2 / variance[i]) / np.sqrt(2 * np.pi * variance[i])
        out[i, j] = np.log((weight[i] * parts.prod(1)).sum())
    return out


def consensus(found):
    """The mean of clusterings (cell, domain) over all orders of their domains, of the orders that agree most."""
    best, first = (-np.inf, None), found[0]
    for orders in itertools.product(itertools.permutations(range(first.shape[1])), repeat=len(found) - 1):
        mean = np.mean([first, *(each[:, order] for each, order in zip(found[1:], orders, strict=True))], 0)
        best = max(best, ((mean**2).sum(), mean), key=lambda one: one[0])
    return best[1]


def refined_once(latent, neighbours, probability):
    """Probabilities of domains (cell, domain) from averages over the neighbours in the same domain, cell by cell."""
    n, k = probability.shape
    mean, size = np.zeros(latent.shape), np.zeros(n)
    for i in range(n):
        mean[i], size[i] = latent[i], 1
        for j in neighbours[i]:
            same = probability[i] @ probability[j]
            mean[i] += same * latent[j]
            size[i] += same
        mean[i] /= size[i]
    centre = [np.average(mean, 0, probability[:, d] * size) for d in range(k)]
    scatter = np.zeros((latent.shape[1],) * 2)
    for i in range(n):
        for d in range(k):
            scatter += probability[i, d] * size[i] * np.outer(mean[i] - centre[d], mean[i] - centre[d]) / n
    new = np.zeros((n, k))
    for i in range(n):
        for d in range(k):
            off = mean[i] - centre[d]
            new[i, d] = probability[:, d].mean() * np.exp(-0.5 * size[i] * off @ np.linalg.solve(scatter, off))
    return new / new.sum(1, keepdims=True)


def nearest_words(codebook) -> np.ndarray:
    """Return whether no other word is nearer to a gene's word than this one, (word, word) float64."""
    near = np.zeros((codebook.n_words, codebook.n_words))
    for gene in np.flatnonzero(~codebook.is_blank):
        distance = (codebook.words != codebook.words[gene]).sum(axis=1)
        distance[gene] = codebook.n_bits + 1
        near[distance == distance.min(), gene] = 1.0
    return near


def locate_group(values: np.ndarray, least: float) -> tuple[float, float]:
    """`merfish.imaging._leak_kernels.locate_group` in vector operations."""
    values = values[values < 0.6]
    inside = max(int(0.2 * len(values)), 10)
    if len(values) < 2 * inside:
        return np.nan, np.nan
    widths = values[inside - 1 :] - values[: len(values) - inside + 1]
    first = int(np.argmin(widths))
    centre, sigma = values[first + inside // 2], 2 * widths[first]
    for _ in range(6):
        weights = np.clip(1 - ((values - centre) / (4 * sigma)) ** 2, 0, None) ** 2
        centre = np.average(values, weights=weights)
        away = np.abs(values - centre)
        near = away[away < 3 * sigma]
        sigma = 1.4826 * np.median(near)
    below = (values < min(centre - 3 * sigma, centre / 2)).sum() if centre > 3 * sigma else 0
    known = len(near) >= least and below <= 0.25 * len(near) and centre + 2 * sigma <= 0.6
    return (centre, sigma / np.sqrt(len(near))) if known else (np.nan, np.nan)
