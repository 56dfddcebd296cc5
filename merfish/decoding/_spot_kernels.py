"""Kernels of the spot decoder; they take plain arrays and fill the ``out`` arrays."""

from __future__ import annotations

import heapq
from typing import NamedTuple

import numpy as np

from merfish._jit import kernel
from merfish.decoding._alignment_kernels import shift_at
from merfish.decoding._kernels import root_of


@kernel
def fill_grid(x, y, cell, n_across, start, order):
    """Sort points into square cells of side ``cell``; out: start (cells + 1,), order (point,) int64, see `group`."""
    place = np.empty(len(x), np.int64)
    for i in range(len(x)):
        place[i] = int(y[i] / cell) * n_across + int(x[i] / cell)
    group(place, start, order)


@kernel
def group(label, start, order):
    """Group items by label (item,) int64: those of label k are order[start[k]:start[k + 1]], in increasing order."""
    start[:] = 0
    for i in range(len(label)):
        start[label[i] + 1] += 1
    for k in range(1, len(start)):
        start[k] += start[k - 1]
    place = start[:-1].copy()
    for i in range(len(label)):
        order[place[label[i]]] = i
        place[label[i]] += 1


@kernel
def in_steps(image, step, out):
    """Quantise an image (row, x) in units of ``step`` into ``out`` int8; values out of range are clipped."""
    a_step = np.float32(1 / step)
    most = np.float32(127.0)
    for row in range(image.shape[0]):
        for x in range(image.shape[1]):
            value = np.rint(image[row, x] * a_step)
            value = most if value > most else value
            out[row, x] = np.int8(-most if value < -most else value)


@kernel
def sample(image, y, x, first_row, last_row):
    """Interpolate an image (row, x) linearly at y, x, which are clipped to its columns and to the given rows."""
    width = image.shape[1]
    y = min(max(y, first_row), last_row)
    x = min(max(x, 0.0), width - 1.0)
    row = min(int(y), last_row - 1)
    column = min(int(x), width - 2)
    v = y - row
    u = x - column
    upper = image[row, column] * (1 - u) + image[row, column + 1] * u
    lower = image[row + 1, column] * (1 - u) + image[row + 1, column + 1] * u
    return upper * (1 - v) + lower * v


SAME_SPOT = 0.83  # relative to the radius; peaks of one spot in adjacent planes are closer than this


class Scene(NamedTuple):
    """Peaks of all bits and the residual images; see `merfish.decoding.spots`.

    px, py (rows), pa, pb, pz (peak,): position, height, bit, and depth in planes, cell by cell of a grid: start,
    cell and n_across, see `fill_grid`. order (peak,) int64: their numbers in the fits, bit by bit.
    radius: pixel, at most ``cell``; the peaks of a molecule lie within it of its centre. light (bit, row, x) int8, the
    residual in units of ``step``. warp (bit, 2, 3): shift of each bit's image relative to the peaks, see `shift_at`.
    height: rows of a plane. cluster (peak,) int64: peaks of different clusters are never linked, see `find_clusters`.
    seeds (peak,) int64: the peaks, cluster by cluster; part (part + 1,) int64: the start of each part in ``seeds``.
    Parts consist of whole clusters and are processed in parallel. tail, tail_planes, depth_step: see
    `merfish.decoding.planes.Focus`.
    """

    px: np.ndarray
    py: np.ndarray
    pa: np.ndarray
    pb: np.ndarray
    pz: np.ndarray
    start: np.ndarray
    order: np.ndarray
    cell: float
    n_across: int
    radius: float
    light: np.ndarray
    step: float
    warp: np.ndarray
    height: int
    cluster: np.ndarray
    seeds: np.ndarray
    part: np.ndarray
    tail: float
    tail_planes: int
    depth_step: float


@kernel
def find_clusters(scene, reach):
    """Number the connected clusters of peaks, in grid order, in the scene's ``cluster``; return how many there are.

    Peaks closer than ``reach`` (pixel) in one plane are connected, and so are those that one spot may leave in several
    planes, see `take_tails`.
    """
    px, py, pb, height, cell, n_across = (scene.px, scene.py, scene.pb, scene.height, scene.cell, scene.n_across)
    n_rows, n_cells = scene.light.shape[1], len(scene.start) - 1
    parent = np.arange(len(px))
    for i in range(len(px)):
        plane = int(py[i]) // height
        for away in range(scene.tail_planes + 1):
            x, y = px[i], py[i] + away * height
            if y >= n_rows:
                break
            near = reach if away == 0 else cell
            left, right = (max(int((x - near) / cell), 0), min(int((x + near) / cell), n_across - 1))
            # within its plane, a peak in a row of cells above has been connected already
            for r in range(int(y / cell) if away == 0 else max(int((y - near) / cell), 0), int((y + near) / cell) + 1):
                if r * n_across >= n_cells:
                    break
                for j in range(scene.start[r * n_across + left], scene.start[r * n_across + right + 1]):
                    if (px[j] - x) ** 2 + (py[j] - y) ** 2 >= near * near or int(py[j]) // height != plane + away:
                        continue
                    if away == 0 or pb[j] == pb[i]:
                        parent[root_of(parent, j)] = root_of(parent, i)
    count = 0
    number = np.full(len(px), -1)
    for i in range(len(px)):
        root = root_of(parent, i)
        if number[root] < 0:
            number[root] = count
            count += 1
        scene.cluster[i] = number[root]
    return count


@kernel
def nearest_peak(scene, x, y, bit):
    """Peak of a bit nearest to x, y (rows), in the same plane and within `SAME_SPOT` times the radius, or -1."""
    start, n_across = scene.start, scene.n_across
    n_cells = len(start) - 1
    plane = int(y) // scene.height
    row, column = int(y / scene.cell), int(x / scene.cell)
    found, best = -1, (SAME_SPOT * scene.radius) ** 2
    for r in range(row - 1, row + 2):
        for c in range(column - 1, column + 2):
            if r < 0 or c < 0 or c >= n_across or r * n_across + c >= n_cells:
                continue
            for i in range(start[r * n_across + c], start[r * n_across + c + 1]):
                if scene.pb[i] != bit or int(scene.py[i]) // scene.height != plane:
                    continue
                d = (scene.px[i] - x) ** 2 + (scene.py[i] - y) ** 2
                if d < best:
                    found, best = i, d
    return found


class Classes(NamedTuple):
    """Classes of a candidate: the words of the codebook, then nothing, then an object that is bright in every bit.

    ratio (bit, bin): log likelihood ratio of an observation, bit on to bit off. log_prior (class,). bits (class, place)
    uint8, weight (class,) int64: indices and number of the on-bits; on (class, bit) uint8. dim (step,): log likelihood
    ratio of the candidate's brightness, nothing to something, see `step_of`.
    """

    ratio: np.ndarray
    dim: np.ndarray
    log_prior: np.ndarray
    bits: np.ndarray
    weight: np.ndarray
    on: np.ndarray


class Views(NamedTuple):
    """Observation around each peak while no peak is taken, see `observe`.

    members (peak, bit) int32; seen (peak, bit) uint8; centre (peak, 3): x, y and brightness.
    """

    members: np.ndarray
    seen: np.ndarray
    centre: np.ndarray


@kernel
def observe(seed, scene, taken, members, seen):
    """Find the nearest free peak of each bit around a seed peak, and bin the observation of each bit.

    scene: a `Scene`; taken (peak,) bool. out: members (bit,) int32, peak or -1; seen (bit,) uint8, bin of the
    observation, see `bin_of`. Peaks of other clusters are ignored. Returns x, y (rows) of the centre, and the
    brightness: the mean height of the members, excluding the lowest and the highest if there are four or more.
    """
    px, py, pa, pb, pz = scene.px, scene.py, scene.pa, scene.pb, scene.pz
    start, cell, n_across = scene.start, scene.cell, scene.n_across
    radius, height, cluster = scene.radius, scene.height, scene.cluster
    n_bits = len(members)
    n_cells = len(start) - 1
    cx, cy, cz = px[seed], py[seed], pz[seed]
    first_row = int(cy) // height * height
    end_row = first_row + height
    best = np.empty(n_bits)
    used = np.empty(n_bits)
    for _ in range(LOOKS):
        members[:] = -1
        best[:] = radius * radius
        used[:] = radius * radius
        row, column = int(cy / cell), int(cx / cell)
        left, right = max(column - 1, 0), min(column + 1, n_across - 1)
        for r in range(max(row - 1, 0), row + 2):
            if r * n_across >= n_cells:
                break
            for i in range(start[r * n_across + left], start[r * n_across + right + 1]):
                d = (px[i] - cx) ** 2 + (py[i] - cy) ** 2
                if d >= radius * radius or cluster[i] != cluster[seed] or py[i] < first_row or py[i] >= end_row:
                    continue
                if taken[i]:
                    used[pb[i]] = min(used[pb[i]], d)
                elif d < best[pb[i]]:
                    best[pb[i]] = d
                    members[pb[i]] = i
        sx = sy = sz = mass = 0.0
        for bit in range(n_bits):
            i = members[bit]
            if i >= 0:
                # a distant peak more likely belongs to another molecule
                w = min(pa[i], 2.0) * np.exp(-best[bit] / (PULL * radius * radius))
                sx += w * px[i]
                sy += w * py[i]
                sz += w * pz[i]
                mass += w
        if mass == 0.0:
            break
        cx, cy, cz = sx / mass, sy / mass, sz / mass
    total = 0.0
    number = 0
    low, high = np.inf, -np.inf
    for bit in range(n_bits):
        i = members[bit]
        if i >= 0:
            total += pa[i]
            number += 1
            low = min(low, pa[i])
            high = max(high, pa[i])
    bright = total / max(number, 1)
    if number >= 4:
        bright = (total - low - high) / (number - 2)
    for bit in range(n_bits):
        i = members[bit]
        if i >= 0:
            d = np.sqrt((px[i] - cx) ** 2 + (py[i] - cy) ** 2)
            seen[bit] = bin_of(d / radius, pa[i] / bright, abs(pz[i] - cz) / scene.depth_step)
        else:
            down, across = shift_at(scene.warp, bit, cy - first_row, cx)
            v = scene.step * sample(scene.light[bit], cy + down, cx + across, first_row, end_row - 1)
            shown = bin_of(-1.0, v / bright, 0.0)
            if used[bit] < radius * radius:
                shown += N_EMPTY * (1 + int(np.sqrt(used[bit]) / radius * N_USED))
            seen[bit] = shown
    return cx, cy, bright


LOOKS = 3  # iterations of the centre of a candidate
PULL = 0.1  # relative to the radius squared; twice the variance of a peak's weight as a Gaussian of its distance
NEGLIGIBLE = -36.0  # log odds below the rounding error of 1

# numbers of bins: of depth, distance and height of a peak; without a peak, of brightness and of distance of a taken one
N_DEPTH, N_NEAR, N_HEIGHT, N_EMPTY, N_USED = 3, 6, 8, 10, 3
N_PEAK = N_DEPTH * N_NEAR * N_HEIGHT
N_BINS = N_PEAK + N_EMPTY * (1 + N_USED)
LOWEST_LOG_HEIGHT, LOG_HEIGHT_STEP = -1.6, 0.4
LOWEST_EMPTY, EMPTY_STEP = -0.1, 0.12
# a position at least half as bright as the molecule counts as on, although its peak is hidden by a neighbour
HIDDEN = int((0.5 - LOWEST_EMPTY) / EMPTY_STEP)


@kernel
def bin_of(near, height, depth):
    """Bin of an observation: a peak at distance ``near``, relative to the radius, or no peak (near < 0).

    height: relative to the candidate's brightness. depth: planes, distance of the peak from the candidate, at least 0.
    """
    if near >= 0:
        a = int(np.floor((np.log(max(height, 1e-6)) - LOWEST_LOG_HEIGHT) / LOG_HEIGHT_STEP))
        place = min(int(depth), N_DEPTH - 1) * N_NEAR + min(int(near * N_NEAR), N_NEAR - 1)
        return place * N_HEIGHT + min(max(a, 0), N_HEIGHT - 1)
    return N_PEAK + min(max(int((height - LOWEST_EMPTY) / EMPTY_STEP), 0), N_EMPTY - 1)


N_STEPS = 8  # bins of a candidate's brightness, from e^-1.6 to e^1.6 of a molecule's; the outer two are open


@kernel
def step_of(bright):
    """Bin of a candidate's brightness."""
    step = int(np.floor((np.log(max(bright, 1e-6)) - LOWEST_LOG_HEIGHT) / LOG_HEIGHT_STEP))
    return min(max(step, 0), N_STEPS - 1)


@kernel
def best_class(seen, bright, classes, score):
    """Write the unnormalised log posterior of each class into ``score`` (class,); return the best class."""
    ratio, bits, weight = classes.ratio, classes.bits, classes.weight
    best, top, nothing = 0, -np.inf, len(weight) - 2
    says = np.empty(len(seen))
    for bit in range(len(seen)):
        says[bit] = ratio[bit, seen[bit]]
    for w in range(len(weight)):
        total = classes.log_prior[w]
        if w == nothing:
            total += classes.dim[step_of(bright)]
        for k in range(weight[w]):
            total += says[bits[w, k]]
        score[w] = total
        if total > top:
            best, top = w, total
    return best


@kernel
def alike(views, i, j):
    """Whether two peaks look the same to `best_class`."""
    for bit in range(views.seen.shape[1]):
        if views.seen[i, bit] != views.seen[j, bit]:
            return False
    return step_of(views.centre[i, 2]) == step_of(views.centre[j, 2])


class Calls(NamedTuple):
    """Calls of one round, each at the index of the peak from which it started.

    called (peak,) bool: whether there is a call. table (peak, 5): x, y, brightness, score, log odds against all other
    classes. evidence (peak, 2) uint64: word, and its bits that are wrong. owner (peak,) int64: call that took the peak,
    or -1. Sums over the candidates of each part of the scene: share (part, class), posterior of each class; shows
    (part, 2, bit, bin), observations, weighted by the posterior that there is something and the bit is off, and on;
    light (part, 2, step), brightnesses, weighted by the posterior of nothing, and of something.
    """

    called: np.ndarray
    table: np.ndarray
    evidence: np.ndarray
    owner: np.ndarray
    share: np.ndarray
    shows: np.ndarray
    light: np.ndarray


@kernel
def called_before(cx, cy, word, seed, scene, calls):
    """Whether a call of the same word and cluster lies within the radius; these peaks then belong to that molecule."""
    owner, table, evidence = calls.owner, calls.table, calls.evidence
    start, cell, n_across = scene.start, scene.cell, scene.n_across
    n_cells = len(start) - 1
    row, column = int(cy / cell), int(cx / cell)
    left, right = max(column - 1, 0), min(column + 1, n_across - 1)
    for r in range(max(row - 1, 0), row + 2):
        if r * n_across >= n_cells:
            break
        for i in range(start[r * n_across + left], start[r * n_across + right + 1]):
            if scene.cluster[i] != scene.cluster[seed] or owner[i] < 0 or evidence[owner[i], 0] != word:
                continue
            if (table[owner[i], 0] - cx) ** 2 + (table[owner[i], 1] - cy) ** 2 < scene.radius * scene.radius:
                return True
    return False


@kernel
def observe_part(scene, part, free, views):
    """Observe the peaks of one part of a scene, into ``views``; free (peak,) bool, all False: no peak is taken."""
    for seed in scene.seeds[scene.part[part] : scene.part[part + 1]]:
        x, y, bright = observe(seed, scene, free, views.members[seed], views.seen[seed])
        views.centre[seed, 0], views.centre[seed, 1], views.centre[seed, 2] = (x, y, bright)


@kernel
def changed(seed, scene, taken):
    """Whether any peak that `observe` may reach from ``seed`` is taken."""
    px, py, cell, n_across, start = (scene.px, scene.py, scene.cell, scene.n_across, scene.start)
    n_cells = len(start) - 1
    x, y, reach = px[seed], py[seed], 2 * scene.radius
    left, right = (max(int((x - reach) / cell), 0), min(int((x + reach) / cell), n_across - 1))
    for r in range(max(int((y - reach) / cell), 0), int((y + reach) / cell) + 1):
        if r * n_across >= n_cells:
            break
        for i in range(start[r * n_across + left], start[r * n_across + right + 1]):
            if taken[i] and (px[i] - x) ** 2 + (py[i] - y) ** 2 < reach * reach:
                return True
    return False


@kernel
def take_tails(peak, scene, taken):
    """Take the weaker peaks that the same spot leaves, out of focus, in the planes below and above.

    These are all weaker peaks at its position and, within the side of a cell, those weaker by a factor of ``tail`` for
    each plane of distance.
    """
    x, y, bit, height = scene.px[peak], scene.py[peak], scene.pb[peak], scene.height
    n_rows, cell, n_across = scene.light.shape[1], scene.cell, scene.n_across
    column = int(x / cell)
    for away in range(-scene.tail_planes, scene.tail_planes + 1):
        row = y + away * height
        if away == 0 or row < 0 or row >= n_rows:
            continue
        plane = int(row) // height
        for r in range(max(int(row / cell) - 1, 0), int(row / cell) + 2):
            for c in range(max(column - 1, 0), min(column + 2, n_across)):
                if r * n_across + c >= len(scene.start) - 1:
                    continue
                for i in range(scene.start[r * n_across + c], scene.start[r * n_across + c + 1]):
                    if scene.pb[i] != bit or int(scene.py[i]) // height != plane:
                        continue
                    apart = (scene.px[i] - x) ** 2 + (scene.py[i] - row) ** 2
                    share = 1.0 if apart < (SAME_SPOT * scene.radius) ** 2 else scene.tail ** abs(away)
                    if apart < cell * cell and scene.pa[i] < share * scene.pa[peak]:
                        taken[i] = True


@kernel
def ranked(scene, part, views, classes, score):
    """Peaks of one part of a scene around which something is likeliest, as a heap of the highest score first.

    Its items are the negative score, the number of the peak in the fits, which decides between equal scores, and the
    peak; the last one is inf, -1, -1. ``score`` (class,) is overwritten.
    """
    seeds = scene.seeds[scene.part[part] : scene.part[part + 1]]
    nothing = len(score) - 2
    heap = [(np.inf, -1, -1)]
    best = nothing
    for k in range(len(seeds)):
        if k == 0 or not alike(views, seeds[k], seeds[k - 1]):  # the peaks of a molecule often are
            best = best_class(views.seen[seeds[k]], views.centre[seeds[k], 2], classes, score)
        if best != nothing:
            heapq.heappush(heap, (-score[best], scene.order[seeds[k]], seeds[k]))
    return heap


@kernel
def call_part(scene, part, views, classes, explained, taken, out):
    """Call the molecules of one part of a scene, the most certain first, each from peaks that no other has taken.

    scene, views, classes: see `Scene`, `Views` and `Classes`. Peaks around which nothing is likelier than any word are
    not called. A call takes the peaks of its word's on-bits, and other peaks within ``explained`` pixels, which are its
    errors. An object that is bright in every bit takes its peaks but is not a call. taken (peak,) bool, all False on
    entry; out: `Calls`, nothing called and all sums 0 on entry. Parts may be processed at the same time.
    """
    px, py, pa = scene.px, scene.py, scene.pa
    share, shows, light = out.share[part], out.shows[part], out.light[part]
    n_bits, n_classes = len(scene.light), len(classes.weight)
    nothing = n_classes - 2
    members = np.empty(n_bits, np.int32)
    seen = np.empty(n_bits, np.uint8)
    score, odds = np.empty(n_classes), np.empty(n_classes)
    is_on = np.empty(n_bits)
    heap = ranked(scene, part, views, classes, score)
    while True:
        negative, _, seed = heapq.heappop(heap)
        if negative == np.inf:
            break
        if taken[seed]:
            continue
        if changed(seed, scene, taken):
            cx, cy, bright = observe(seed, scene, taken, members, seen)
        else:
            for bit in range(n_bits):
                members[bit], seen[bit] = views.members[seed, bit], views.seen[seed, bit]
            cx, cy, bright = (views.centre[seed, 0], views.centre[seed, 1], views.centre[seed, 2])
        best = best_class(seen, bright, classes, score)
        if score[best] < -negative - 1e-9:
            heapq.heappush(heap, (-score[best], scene.order[seed], seed))  # others have taken some of its peaks
            continue
        if called_before(cx, cy, best, seed, scene, out):
            taken[seed] = True
            continue
        others = 0.0
        for w in range(n_classes):
            odds[w] = np.exp(score[w] - score[best]) if score[w] - score[best] > NEGLIGIBLE else 0.0
            if w != best:
                others += odds[w]
        is_on[:] = 0.0
        something = 1.0
        for w in range(n_classes):
            if odds[w] == 0.0:
                continue
            posterior = odds[w] / (1.0 + others)
            share[w] += posterior
            if w == nothing:
                something -= posterior
            for k in range(classes.weight[w]):
                is_on[classes.bits[w, k]] += posterior
        light[0, step_of(bright)] += 1.0 - something
        light[1, step_of(bright)] += something
        for bit in range(n_bits):
            shows[0, bit, seen[bit]] += something - is_on[bit]
            shows[1, bit, seen[bit]] += is_on[bit]
        if best == nothing:
            continue
        is_word = best < nothing
        errors = np.uint64(0)
        sx = sy = mass = 0.0
        for bit in range(n_bits):
            i = members[bit]
            on = classes.on[best, bit] != 0
            if i >= 0:
                near = (px[i] - cx) ** 2 + (py[i] - cy) ** 2 <= explained * explained
                if on or near:
                    taken[i] = True
                    take_tails(i, scene, taken)
                    if is_word:
                        out.owner[i] = seed
                if on:
                    sx += pa[i] * px[i]
                    sy += pa[i] * py[i]
                    mass += pa[i]
                elif near:
                    errors |= np.uint64(1) << np.uint64(bit)
            elif on and (seen[bit] - N_PEAK) % N_EMPTY < HIDDEN:
                errors |= np.uint64(1) << np.uint64(bit)
        taken[seed] = True
        if not is_word:
            continue
        if mass > 0:
            cx, cy = sx / mass, sy / mass
        out.called[seed] = True
        out.table[seed, 0], out.table[seed, 1], out.table[seed, 2] = cx, cy, bright
        out.table[seed, 3], out.table[seed, 4] = (score[best], -np.log(max(others, 1e-30)))
        out.evidence[seed, 0], out.evidence[seed, 1] = best, errors
