"""One step of starfish in its own environment, started by decode.py; arrays and tables are passed as files.

python starfish_worker.py FOLDER STEP, where FOLDER/settings.json holds the parameters of the step:

- filter: raw.npy, uint16 (bit, y, x), filtered as in starfish's MERFISH notebook, to filtered.npy, float32.
- pixels, blobs: normalised.npy, float32 (bit, y, x), and words.npy, uint8 (word, bit), into calls.csv.

Each step writes record.json: seconds, and growth of the largest resident size in bytes.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
from starfish import Codebook, ImageStack
from starfish.image import Filter
from starfish.spots import DecodeSpots, DetectPixels, FindSpots
from starfish.types import Axes, Features, Levels, TraceBuildingStrategies

sys.path.append(str(Path(__file__).parents[1]))
from memory import forget_peak, peak_bytes

HIGH_PASS, ITERATIONS, LOW_PASS = 3, 15, 1  # of the notebook, the PSF alone is that of the images


def as_image(stack: np.ndarray) -> ImageStack:
    """Return a stack (bit, y, x) as rounds of two colours."""
    return ImageStack.from_numpy(stack.reshape(-1, 2, 1, *stack.shape[1:]))


def filtered(raw: np.ndarray, psf_sigma: float) -> np.ndarray:
    """Apply high pass, Richardson-Lucy deconvolution and low pass."""
    image = Filter.GaussianHighPass(sigma=HIGH_PASS).run(as_image(raw))
    deconvolve = Filter.DeconvolvePSF(
        num_iter=ITERATIONS, sigma=psf_sigma, level_method=Levels.SCALE_SATURATED_BY_CHUNK
    )
    image = Filter.GaussianLowPass(sigma=LOW_PASS).run(deconvolve.run(image))
    return image.xarray.values.reshape(raw.shape).astype(np.float32)


def decoded(stack: np.ndarray, words: np.ndarray, step: str, settings: dict) -> pd.DataFrame:
    """Return calls (barcode_id, x, y) of a normalised stack, by pixels or by blobs of the brightest bit."""
    codebook = Codebook.from_numpy(
        [str(row) for row in range(len(words))], len(words[0]) // 2, 2, words.reshape(len(words), -1, 2)
    )
    top = float(stack.max())  # starfish cuts images at 1
    image = as_image(np.clip(stack / top, 0, 1).astype(np.float32))
    distance, magnitude = settings["distance"], settings["magnitude"] / top
    if step == "pixels":
        decoder = DetectPixels.PixelSpotDecoder(
            codebook=codebook, metric="euclidean", norm_order=2, distance_threshold=distance,
            magnitude_threshold=magnitude, min_area=2, max_area=np.inf,
        )  # fmt: skip
        table, _ = decoder.run(image)
    else:
        finder = FindSpots.BlobDetector(
            min_sigma=1, max_sigma=2, num_sigma=4, threshold=settings["blob"] / top, is_volume=False
        )
        spots = finder.run(image, reference_image=image.reduce({Axes.ROUND, Axes.CH}, func="max"))
        decoder = DecodeSpots.MetricDistance(
            codebook=codebook, max_distance=distance, min_intensity=magnitude, norm_order=2, metric="euclidean",
            trace_building_strategy=TraceBuildingStrategies.EXACT_MATCH,
        )  # fmt: skip
        table = decoder.run(spots=spots)
    table = table[table[Features.PASSES_THRESHOLDS].values.astype(bool)]
    word = table[Features.TARGET].values.astype(int)
    return pd.DataFrame({"barcode_id": word, "x": table[Axes.X.value].values, "y": table[Axes.Y.value].values})


def main(folder: Path, step: str) -> None:
    """Run one step and measure its time."""
    settings = json.loads((folder / "settings.json").read_text())
    stack = np.load(folder / ("raw.npy" if step == "filter" else "normalised.npy"), allow_pickle=False)
    before, start = forget_peak(), time.perf_counter()
    if step == "filter":
        np.save(folder / "filtered.npy", filtered(stack, settings["psf_sigma"]))
    else:
        words = np.load(folder / "words.npy", allow_pickle=False)
        decoded(stack, words, step, settings).to_csv(folder / "calls.csv", index=False)
    record = {"seconds": time.perf_counter() - start, "bytes": peak_bytes() - before + stack.nbytes}
    (folder / "record.json").write_text(json.dumps(record))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
