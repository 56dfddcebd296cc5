"""The decoders on data that differ from the simulator's defaults: python benchmarks/robustness.py.

Writes benchmarks/results/robustness.md and robustness.png. ``--quick`` is a smoke run of one seed. ``--peers FOLDER``
adds what ``benchmarks/peers/decode.py --worlds FOLDER`` has written there.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from decode import judge, ranked, recall_at_precision
from tables import RESULTS, as_markdown

from merfish import mhd4_codebook, plots, simulate_stack
from merfish.calls.filtering import keep_calls
from merfish.codebook import Codebook
from merfish.decoding.evidence import word_abundance
from merfish.simulate import Imaging, score_calls
from merfish.stack import decode_all

SEEDS = range(700, 704)  # not used during the development of the decoder
METHODS = ("spots", "pixels")
BOOK = mhd4_codebook([f"gene{k}" for k in range(130)])
PRECISION = 0.95
LEARNING = 12  # iterations of expectation-maximisation; twice as many change nothing
HOME = Imaging()


def without_blanks(book: Codebook) -> Codebook:
    """Return the genes of a codebook alone."""
    genes = np.flatnonzero(~book.is_blank)
    return Codebook(tuple(book.names[k] for k in genes), ("",) * len(genes), book.words[genes], book.bit_names)


def book_of(words: np.ndarray, n_words: int, n_blanks: int, seed: int) -> Codebook:
    """Return a codebook of random words, (word, bit), of which the last are blanks."""
    words = np.random.default_rng(seed).permutation(words)[:n_words]
    names = [f"gene{k}" if k < len(words) - n_blanks else f"Blank-{k}" for k in range(len(words))]
    bits = tuple(f"bit{k + 1}" for k in range(words.shape[1]))
    return Codebook(tuple(names), ("",) * len(names), words, bits)


# 4 rounds of 4 colours, one colour per round
ONE_HOT = np.array([np.eye(4, dtype=np.uint8)[list(letters)].ravel() for letters in product(range(4), repeat=4)])
# any four of 14 bits
FOUR_OF_14 = np.array([word for word in product((0, 1), repeat=14) if sum(word) == 4], np.uint8)


@dataclass(frozen=True, eq=False)
class World:
    """A codebook, and deviations from the simulator's defaults; ``draw`` samples some of them from the seed."""

    name: str
    book: Codebook = BOOK
    density: float = 0.01
    imaging: Imaging = HOME
    options: dict[str, Any] | None = None
    draw: Callable[[np.random.Generator], dict[str, Any]] | None = None
    shape: tuple[int, int] = (512, 512)

    def simulate(self, seed: int) -> tuple[np.ndarray, pd.DataFrame, Imaging, np.ndarray]:
        """Simulate stack, truth, imaging, abundance (word,)."""
        rng = np.random.default_rng([seed, 1])
        options = {**(self.options or {}), **(self.draw(rng) if self.draw else {})}
        imaging = options.pop("imaging", self.imaging)
        genes = np.flatnonzero(~self.book.is_blank)
        weights = options.pop("abundance", None)
        weights = rng.lognormal(0, 1, len(genes)) if weights is None else weights
        stack, truth = simulate_stack(
            self.book, shape=self.shape, density=self.density, seed=seed, imaging=imaging, abundance=weights, **options
        )
        share = np.zeros(self.book.n_words)
        share[genes] = weights / weights.sum()
        return stack, truth, imaging, share


def rates_by_bit(rng: np.random.Generator) -> dict[str, Any]:
    """Return error rates from 2 to 40 % (1->0, linear) and 0.5 to 15 % (0->1, geometric), in random order."""
    lost, gained = rng.permutation(np.linspace(0.02, 0.4, 16)), rng.permutation(np.geomspace(0.005, 0.15, 16))
    return {"imaging": Imaging(lost=tuple(lost), gained=tuple(gained))}


def abundant_gene(rng: np.random.Generator) -> dict[str, Any]:
    """Return abundances with 40 % of all molecules from one gene."""
    weights = rng.lognormal(0, 1, int((~BOOK.is_blank).sum()))
    weights[0] = 2 / 3 * weights[1:].sum()
    return {"abundance": weights}


WORLDS = (
    World("nothing"),
    World("cells glow", density=0.02, options={"glow": 300.0}),
    World("bits shifted, sigma 0.4 px", options={"bit_shift": 0.4}),
    World("bits shifted, sigma 0.8 px", options={"bit_shift": 0.8}),
    World("bits stretched, sigma 0.8 px at the border", options={"bit_stretch": 0.8}),
    World("60 hot pixels in every bit", options={"hot_pixels": 60}),
    World("error rates differ between bits", draw=rates_by_bit),
    World("errors 20 % / 6 %", imaging=Imaging(lost=0.2, gained=0.06)),
    World("PSF sigma 1.8 px", imaging=Imaging(psf_sigma=(1.8, 1.8))),
    World("PSF sigma 2.2 px", imaging=Imaging(psf_sigma=(2.2, 2.2))),
    World("PSF 1.34 times as high as wide", imaging=Imaging(psf_ratio=1.34)),
    World("signal 8 times weaker", imaging=Imaging(peak=50.0)),
    World("bleed-through 10 %", options={"bleed_through": 0.1}),
    World("carry-over 10 %", options={"carry_over": 0.1}),
    World("bleed-through 20 %", options={"bleed_through": 0.2}),
    World("codebook of distance 2", book=book_of(FOUR_OF_14, 400, 50, 1)),
    World("one-hot book, distance 1", book=book_of(ONE_HOT, 120, 12, 0)),
    World("no blanks in the book", book=without_blanks(BOOK)),
    World("7 planes", imaging=replace(Imaging(), focal_range=0.9), options={"n_planes": 7}, shape=(256, 256)),
    World(
        "5 planes, 0.3 µm apart",
        imaging=replace(Imaging(), plane_step=0.3),
        density=0.003,
        options={"n_planes": 5},
        shape=(256, 256),
    ),
    World("0.03 a pixel, one gene 40 %", density=0.03, draw=abundant_gene, shape=(384, 384)),
)


def best_possible(
    world: World, truth: pd.DataFrame, imaging: Imaging, share: np.ndarray, *, learn: bool = False
) -> pd.DataFrame:
    """Return judged calls of the optimal decoder, which knows positions, bits, rates and abundances (Bayes' rule).

    learn: whether it must learn the abundances from these molecules, with blanks as abundant as genes.
    """
    book = world.book
    seen = (truth["shown"].to_numpy(np.uint64)[:, None] >> np.arange(book.n_bits, dtype=np.uint64)) & np.uint64(1)
    on = book.words.astype(float)
    lost, gained = (np.broadcast_to(np.asarray(rate), book.n_bits) for rate in (imaging.lost, imaging.gained))
    if_on, if_off = (np.where(seen, a, b) for a, b in ((1 - lost, lost), (gained, 1 - gained)))
    evidence = np.log(if_on / if_off) @ on.T
    likelihood = np.exp(evidence - evidence.max(axis=1, keepdims=True))
    share = np.full(book.n_words, 1 / book.n_words) if learn else share
    posterior = shares_of_words(likelihood, share)
    for _ in range(LEARNING if learn else 0):
        posterior = shares_of_words(likelihood, word_abundance(posterior.sum(axis=0), book.is_blank))
    right = posterior.argmax(axis=1) == truth["barcode_id"].to_numpy()
    return pd.DataFrame({"probability": posterior.max(axis=1), "right": right, "inner": True, "finds": right})


def shares_of_words(likelihood: np.ndarray, share: np.ndarray) -> np.ndarray:
    """Return the posterior (molecule, word) from the likelihoods and the abundances (word,)."""
    joint = likelihood * share
    return np.asarray(joint / joint.sum(axis=1, keepdims=True))


def measure(world: World, seed: int, methods: tuple[str, ...] = METHODS) -> list[dict[str, Any]]:
    """Return a row for each method: scores of the kept calls, and of the best possible threshold."""
    stack, truth, imaging, share = world.simulate(seed)
    ideal, learnt = (
        recall_at_precision(best_possible(world, truth, imaging, share, learn=learn), len(truth), PRECISION)
        for learn in (False, True)
    )
    rows = []
    for method in methods:
        found = decode_all(stack, world.book, method=method)
        kept = keep_calls(found)
        score = score_calls(kept, truth, shape=world.shape)
        wrong, recall = 1 - score["precision"], score["recall"]
        judged = judge(found, truth, world.shape)
        rows.append(
            {
                "world": world.name,
                "seed": seed,
                "method": method,
                "recall": recall,
                "wrong": wrong,
                "stated": 1 - kept["probability"].mean(),
                "F1": harmonic_mean(recall, 1 - wrong),
                "best_F1": float(harmonic_mean(*ranked(judged, score["n_truth"])).max(initial=0.0)),
                "at": recall_at_precision(judged, score["n_truth"], PRECISION),
                "best": ideal,
                "learnt": learnt,
            }
        )
        if "one gene" in world.name:
            rows[-1]["dim"] = dim_third(kept, truth)
    return rows


def harmonic_mean(recall: Any, precision: Any) -> Any:
    """Return F1 of recall and precision, numbers or arrays."""
    return 2 * recall * precision / np.maximum(recall + precision, 1e-9)


def dim_third(kept: pd.DataFrame, truth: pd.DataFrame) -> float:
    """Return the recall of the dim third of the abundant gene."""
    from merfish.simulate import match_calls

    gene = truth["barcode_id"].mode().iloc[0]
    dim = (truth["barcode_id"] == gene) & (
        truth["brightness"] < truth.loc[truth["barcode_id"] == gene, "brightness"].quantile(1 / 3)
    )
    found = np.zeros(len(truth), bool)
    found[match_calls(kept, truth)[1]] = True
    return float(found[dim.to_numpy()].mean())


def peer_file(folder: Path, world: World) -> Path:
    """Return the scores of starfish on the first stack of a world."""
    return folder / f"{re.sub(r'[^a-z0-9]+', '_', world.name.lower())}.csv"


def beside_peers(rows: pd.DataFrame, folder: Path) -> pd.DataFrame:
    """Return a row for each world and method: highest F1 of starfish on the first seed, and the difference of ours."""
    first = rows[rows["seed"] == SEEDS[0]].set_index(["world", "method"])["F1"]
    theirs = {world.name: peer_file(folder, world) for world in WORLDS}
    best = {name: pd.read_csv(path)["f1"].max() for name, path in theirs.items() if path.exists()}
    starfish = first.index.get_level_values("world").map(best).to_numpy(float)
    return pd.DataFrame({"starfish": starfish, "ahead": first - starfish}, index=first.index)


def draw(table: pd.DataFrame, path: Path) -> None:
    """Plot for each world the molecules found at 5 % wrong calls, and the true share of wrong calls at a stated 5 %."""
    figure, (found, wrong) = plots.new_figure(12, 5.5, 2)
    places = np.arange(table["world"].nunique())[::-1]
    for method, colour in zip(METHODS, plots.CATEGORIES, strict=False):
        rows = table[table["method"] == method]
        found.plot(rows["at"], places, "o", color=colour, label=method)
        wrong.plot(100 * rows["wrong"], places, "o", color=colour, label=method)
    best = table[table["method"] == METHODS[0]]
    found.plot(best["best"], places, "k*", markersize=10, label="best possible")
    found.set_yticks(places, best["world"])
    wrong.set_yticks(places, [])
    wrong.axvline(5, color=plots.MUTED, linewidth=1)
    found.set(xlabel="recall at a precision of 0.95", xlim=(0, 1))
    wrong.set(xlabel="wrong calls [%] if 5 % are stated", xlim=(0, None))
    found.legend(fontsize=8, frameon=False, loc="lower left")
    for place in places:
        for ax in (found, wrong):
            ax.axhline(place, color=plots.MUTED, linewidth=0.3)
    figure.savefig(path, metadata={"Software": None})


def main(quick: bool, peers: Path | None) -> None:
    """Run all measurements, and write the table and the picture."""
    seeds = SEEDS[:1] if quick else SEEDS
    rows = pd.DataFrame([row for world in WORLDS for seed in seeds for row in measure(world, seed)])
    groups = rows.drop(columns="seed").groupby(["world", "method"], sort=False)
    table, note = groups.mean().join(groups["wrong"].sem().rename("wrong_se")), ""
    if peers is not None:
        table = table.join(beside_peers(rows, peers))
        note = (
            "\n`starfish`: largest F1 of starfish's pixel decoder over two filters and three thresholds, chosen\n"
            f"with the truth, on the stack of seed {SEEDS[0]} (see [decode_peers](decode_peers.md)); `ahead`: F1 of\n"
            "the row on the same stack minus this value.\n"
        )
    table = table.reset_index()
    options = (" --quick" if quick else "") + (" --peers FOLDER" if note else "")
    text = f"""Made by `python benchmarks/robustness.py{options}`.

Each row differs from the defaults of the simulator in one respect; {len(seeds)} seeds, 0.01 molecules per pixel and the
MHD4 codebook of 16 bits unless stated otherwise, decoders with their defaults. `recall`, `wrong`: of the calls kept at
5 %; `stated`: the share of wrong calls that the decoder states; `F1`: of recall and precision; `best_F1`: the largest,
with the threshold chosen with the truth; `at`: recall at a precision of {PRECISION}, calls in order of probability;
`best`: the same for a decoder that knows positions, bits, rates and abundances; `learnt`: for one that learns the
abundances from the molecules of the stack, with blanks as abundant as genes; `dim`: recall of the dimmest third of the
abundant gene; `wrong_se`: standard error of `wrong` over seeds.
{note}
{as_markdown(table.round(3))}
"""
    (RESULTS / "robustness.md").write_text(text)
    draw(table, RESULTS / "robustness.png")
    print(text)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--peers", type=Path, help="folder with scores of starfish")
    options = parser.parse_args()
    main(options.quick, options.peers)
