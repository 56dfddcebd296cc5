"""Evidence of a bit: distributions of its observations if the bit is on or off in the word.

Both are learnt by expectation-maximisation. Observations are divided into those that favour an on-bit and those that
favour an off-bit. The distributions within the two groups are shared by all bits; the fraction of the first group is
estimated for each bit, shrunk towards the mean of all bits according to how similar the bits are.
"""

from __future__ import annotations

import numpy as np
from scipy.special import gammaln

from merfish.codebook import Codebook
from merfish.decoding import _spot_kernels as kernels
from merfish.decoding.pixels import on_bits

# initial histograms: error rates of Chen et al. 2015, and peaks located to 0.16 sigma of the PSF
START_LOST, START_GAINED, START_SIGMA, START_SPREAD, START_CROWD = 0.10, 0.04, 0.15, 0.3, 0.04
START_DEPTH = (0.8, 0.15, 0.05)  # fractions of a molecule's peaks by their apparent distance from it in depth
START_NOTHING, START_EVERYTHING = 0.3, 0.001  # fractions of the candidates
# shape of the gamma distribution of gene abundances, from nearly all molecules in one gene to equal abundances
ALIKE = np.geomspace(0.1, 100.0, 31)
START_WEIGHT = 20.0  # weight of the initial values, in calls
MOST_ALIKE = 1e4  # largest weight of the mean of all bits, in observations
FEWEST_ALIKE = 10.0  # and smallest


def start_classes(codebook: Codebook, live: np.ndarray) -> kernels.Classes:
    """Initial classes; live: (bit,) bool, False for dead bits, which give no evidence."""
    share = np.full(codebook.n_words + 2, (1 - START_NOTHING - START_EVERYTHING) / codebook.n_words)
    share[-2:] = START_NOTHING, START_EVERYTHING
    off, on = start_histograms()
    return _classes(codebook, live, np.tile(np.log(on / off), (codebook.n_bits, 1)), np.zeros(kernels.N_STEPS), share)


def learn_classes(
    codebook: Codebook, live: np.ndarray, share: np.ndarray, shows: np.ndarray, light: np.ndarray
) -> kernels.Classes:
    """Update the classes from a round of calls.

    share (class,), shows (2, bit, bin) and light (2, step): see `merfish.decoding._spot_kernels.Calls`.
    """
    n_words = codebook.n_words
    abundance = word_abundance(share[:n_words], codebook.is_blank)
    kinds = np.array([share[:n_words].sum(), *share[n_words:]]) + 1.0
    kinds /= kinds.sum()
    ratio = bit_log_ratio(np.where(live[:, None], shows, 0.0))
    light = light + START_WEIGHT / kernels.N_STEPS
    nothing, something = np.log(light / light.sum(axis=1, keepdims=True))
    return _classes(codebook, live, ratio, nothing - something, np.append(kinds[0] * abundance, kinds[1:]))


def _classes(
    codebook: Codebook, live: np.ndarray, ratio: np.ndarray, dim: np.ndarray, share: np.ndarray
) -> kernels.Classes:
    words = codebook.words
    on = np.concatenate([words, np.zeros((1, words.shape[1]), np.uint8), np.ones((1, words.shape[1]), np.uint8)])
    bits = np.zeros((len(on), words.shape[1]), np.uint8)
    known, weights = on_bits(codebook)
    bits[: len(words), : known.shape[1]] = known
    bits[-1] = np.arange(words.shape[1])
    weight = np.append(weights, (0, words.shape[1]))
    log_prior = np.log(share)
    if (words.min(axis=1) == 1).any():
        log_prior[-1] = -np.inf  # the codebook has a word with all bits on
    return kernels.Classes(ratio * live[:, None], dim, log_prior, bits, weight, on)


def word_abundance(share: np.ndarray, is_blank: np.ndarray) -> np.ndarray:
    """Relative abundance of each word (word,); blanks are given the abundances of genes, evenly spread.

    share: (word,) posterior summed over candidates. With abundances of their own, blanks would get almost no wrong
    calls. With those of genes, a wrong call is as likely for a blank as for a gene, however it depends on abundance:
    blanks are the same fraction of the wrong calls as of the words.
    """
    abundance = share + likeness(share[~is_blank] if not is_blank.all() else share)
    n_blanks = int(is_blank.sum())
    if 0 < n_blanks < len(is_blank):
        genes = np.sort(abundance[~is_blank])
        abundance[is_blank] = np.repeat(genes, n_blanks).reshape(n_blanks, -1).mean(axis=1)
    return abundance / abundance.sum()


def likeness(count: np.ndarray) -> float:
    """Maximum-likelihood shape of the gamma distribution of abundances, among `ALIKE`; count: (word,).

    Counts are then negative binomial. The shape is the pseudocount with which the abundance of a word is estimated
    best: with few molecules, a gene must not appear abundant by chance.
    """
    mean = max(float(count.mean()), 1e-9)
    shape = ALIKE[:, None]
    log = gammaln(count + shape) - gammaln(shape) - shape * np.log1p(mean / shape) - count * np.log1p(shape / mean)
    return float(ALIKE[np.argmax(log.sum(axis=1))])


def bit_log_ratio(shows: np.ndarray) -> np.ndarray:
    """Log of P(observation | bit on in the word) / P(observation | off), (bit, bin).

    shows (2, bit, bin): weighted observations of bits that are off, and on.
    """
    start = np.array(start_histograms())
    pooled = shows.sum(axis=1) + START_WEIGHT * start
    shape = pooled / pooled.sum(axis=1, keepdims=True)
    speaks = shape[1] > shape[0]  # observations that favour an on-bit
    log_probability = []
    for counts, common in zip(shows, shape, strict=True):
        for_it = counts[:, speaks].sum(axis=1)
        share = shrunk_shares(for_it, counts.sum(axis=1), float(common[speaks].sum()))
        within = np.where(speaks, common / common[speaks].sum(), common / common[~speaks].sum())
        log_probability.append(np.log(within * np.where(speaks, share[:, None], 1 - share[:, None])))
    off, on = log_probability
    return on - off


def shrunk_shares(hits: np.ndarray, total: np.ndarray, mean: float) -> np.ndarray:
    """Fraction of hits of each bit (bit,), shrunk towards ``mean`` by a beta-binomial model fitted by moments."""
    some = total > 0
    share = hits[some] / total[some]
    chance = mean * (1 - mean)
    spread = float(((share - mean) ** 2 * total[some]).sum() - chance * some.sum()) / max(float(total.sum()), 1.0)
    # the variance of a beta distribution is chance / (alike + 1)
    alike = np.clip(chance / max(spread, 1e-12) - 1, FEWEST_ALIKE, MOST_ALIKE)
    return np.clip((hits + alike * mean) / (total + alike), 1e-4, 1 - 1e-4)


def start_histograms() -> tuple[np.ndarray, np.ndarray]:
    """Initial distributions of the observations of off-bits and of on-bits, (bin,) each, from published error rates."""
    edges = np.linspace(0, 1, kernels.N_NEAR + 1)  # radius
    near = np.diff(-np.exp(-(edges**2) / (2 * START_SIGMA**2)))
    accidental = np.pi * np.diff(edges**2) * START_CROWD
    log_height = kernels.LOWEST_LOG_HEIGHT + kernels.LOG_HEIGHT_STEP * (np.arange(kernels.N_HEIGHT) + 0.5)
    own = np.exp(-(log_height**2) / (2 * START_SPREAD**2))
    own = 0.95 * own / own.sum() + 0.05 / kernels.N_HEIGHT
    any_height = np.full(kernels.N_HEIGHT, 1 / kernels.N_HEIGHT)
    dark = np.exp(-np.arange(kernels.N_EMPTY) / 1.5)
    dark /= dark.sum()
    hidden = 0.05 / kernels.N_EMPTY  # a peak merged with another one
    seen = 0.95 * np.outer(near, own)
    stray = np.outer(accidental, any_height)
    both = np.full(kernels.N_USED * kernels.N_EMPTY, hidden)  # a peak assigned to another molecule
    at_depth = np.array(START_DEPTH)[:, None, None]
    seen, stray = at_depth * seen, stray / kernels.N_DEPTH
    on = np.concatenate(
        [((1 - START_LOST) * seen + START_LOST * stray + 1e-4).ravel(), START_LOST * dark + hidden, both]
    )
    off = np.concatenate(
        [
            (START_GAINED * seen + stray + 1e-4).ravel(),
            0.9 * (1 - START_GAINED - accidental.sum()) * dark + hidden,
            both,
        ]
    )
    return off / off.sum(), on / on.sum()
