"""Tables as the benchmarks write them."""

from __future__ import annotations

import pandas as pd


def as_markdown(table: pd.DataFrame) -> str:
    """A table in Markdown, numbers rounded, nothing for NaN."""
    text = table.map(lambda value: f"{value:.3g}" if isinstance(value, float) else str(value)).replace("nan", "")
    lines = [list(text.columns), ["---"] * len(text.columns), *text.to_numpy().tolist()]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
