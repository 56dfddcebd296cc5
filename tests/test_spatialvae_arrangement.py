from __future__ import annotations

import itertools

import numpy as np
import scipy.sparse as sp

from spatialvae import arrangement


def lattice(rows, columns):
    """4-connected grid."""
    at = np.arange(rows * columns).reshape(rows, columns)
    pairs = [(at[:-1], at[1:]), (at[:, :-1], at[:, 1:])]
    i, j = (np.concatenate([pair[end].ravel() for pair in pairs]) for end in (0, 1))
    upper = sp.coo_array((np.ones(len(i)), (i, j)), shape=(at.size, at.size))
    return sp.csr_array(upper + upper.T)


def test_sampled__frequencies_of_all_arrangements():
    rng = np.random.default_rng(0)
    features, couplings, near = rng.normal(size=(5, 2)), np.array([1.0, -0.6]), lattice(1, 5)
    orders = np.array(list(itertools.permutations(range(5))))
    score = np.array([sum(features[a] * couplings @ features[b] for a, b in itertools.pairwise(o)) for o in orders])
    truth = np.exp(score - np.log(np.exp(score).sum()))
    code = {tuple(order): i for i, order in enumerate(orders)}
    seen, order, draws = np.zeros(len(orders)), orders[0], 40_000
    for _ in range(draws):
        order = arrangement.sampled(order, features, couplings, near, 3, rng)
        seen[code[tuple(order)]] += 1
    # twice the mean absolute deviation of independent draws, which those of a chain exceed
    assert abs(seen / draws - truth).sum() < 2 * np.sqrt(2 / np.pi * truth / draws).sum()
    assert truth.max() > 4 * np.median(truth)


def test_fitted__couplings_of_sampled_arrangements():
    near, truth, errors = lattice(30, 30), np.array([0.4, 0.15, 0.0]), []
    for seed in range(4):
        rng = np.random.default_rng(seed)
        features = rng.normal(size=(900, 3))
        features = (features - features.mean(0)) / features.std(0)
        order = arrangement.sampled(rng.permutation(900), features, truth, near, 200, rng)
        errors.append(arrangement.fitted(features[order], near, rng) - truth)
    assert np.abs(np.mean(errors, 0)).max() < 0.03
    assert np.std(errors, 0).max() < 0.06


def test_arranged__takes_each_cell_as_often_and_neighbours_are_as_similar():
    rng = np.random.default_rng(1)
    near, other = lattice(30, 30), lattice(20, 60)
    features = np.column_stack([np.repeat(np.arange(30), 30) + rng.normal(0, 5, 900), rng.normal(size=900)])
    order = arrangement.arranged(features, near, other, rng)
    assert np.bincount(order, minlength=900).min() == 1
    assert np.bincount(order).max() == 2
    for u in ((features - features.mean(0)) / features.std(0)).T:
        alike = [
            arrangement.products(o, u[:, None], w)[0] / w.nnz * 2 for o, w in ((np.arange(900), near), (order, other))
        ]
        assert abs(alike[0] - alike[1]) < 0.12
    assert alike[0] < 0.1
