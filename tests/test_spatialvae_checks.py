from __future__ import annotations

import numpy as np
import pytest

from spatialvae import InputError, checks
from spatialvae.graph import knn_graph


def tissue(seed=0, smooth=1.0, n=300, genes=8):
    rng = np.random.default_rng(seed)
    where = np.stack(np.meshgrid(np.arange(20), np.arange(15)), -1).reshape(-1, 2) * 1.0
    program = smooth * np.sin(where[:, 0] / 4) + np.sqrt(1.5 - smooth**2) * rng.normal(size=n)
    counts = rng.poisson(np.exp(np.arange(genes) % 4 + 0.4 * program[:, None] * np.linspace(-1, 1, genes)))
    return counts, where


def test_statistics__are_those_worked_out_by_hand():
    counts = np.array([[0, 2], [1, 0], [3, 4]])
    chain = knn_graph(np.array([[0.0, 0], [1, 0], [3, 0]]), 1).adjacency()  # 0 - 1, 1 - 0, 2 - 1
    found = checks.statistics(counts, chain)
    np.testing.assert_allclose(found.zeros, [1 / 3, 1 / 3])
    np.testing.assert_allclose(found.variance, [14 / 9, 8 / 3])
    logs = np.log1p(counts)
    np.testing.assert_allclose(found.genes, np.corrcoef(logs.T)[0, 1], atol=1e-12)
    np.testing.assert_allclose(found.neighbours[0], np.corrcoef(logs[:, 0], logs[[1, 0, 1], 0])[0, 1], atol=1e-12)


def test_checks__agree_on_the_same_distribution_and_see_lost_neighbourhoods():
    real, where = tissue()
    near = knn_graph(where, 6).adjacency()
    same, shuffled = tissue(1)[0], np.random.default_rng(0).permutation(tissue(1)[0])
    table = checks.compared(checks.statistics(real, near), checks.statistics(same, near))
    assert (table["correlation"] > 0.7).all()
    assert table.loc[["mean", "variance", "zeros", "genes"], "slope"].to_numpy() == pytest.approx(1, abs=0.3)
    lost = checks.compared(checks.statistics(real, near), checks.statistics(shuffled, near))
    assert abs(lost.loc["neighbours", "slope"]) < 0.3 < table.loc["neighbours", "slope"]
    figure = checks.check_plot(checks.statistics(real, near), checks.statistics(same, near))
    assert len(figure.axes) == 5
    assert len(checks.check_plot(checks.statistics(real), checks.statistics(same)).axes) == 4


def test_classifier__cannot_tell_equals_and_finds_what_differs():
    real, where = tissue()
    same, shuffled = tissue(1)[0], np.random.default_rng(0).permutation(tissue(1)[0])
    assert checks.told_apart(real, same, where) < 0.6
    assert checks.told_apart(real, shuffled) < 0.6 < checks.told_apart(real, shuffled, where)
    assert checks.told_apart(real, np.random.default_rng(0).permuted(same, axis=0)) > 0.6
    with pytest.raises(InputError, match="cannot be compared"):
        checks.told_apart(real, same[:5])
