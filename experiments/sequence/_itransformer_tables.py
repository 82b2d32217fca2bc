"""Means over the horizons beside the paper's (Tables 1 and 2). A part of `itransformer`."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from experiments.harness import Metrics
from experiments.sequence._itransformer_stages import HORIZONS, PROMOTED, horizons_of, row_name


class PaperRow(NamedTuple):
    """Means over the four horizons in the paper's Table 1.

    Attributes:
      mse, mae: of iTransformer.
      dlinear, patchtst: their MSE.
    """

    mse: float
    mae: float
    dlinear: float
    patchtst: float


# Name -> the data sets whose mean it is, the paper's row.
MAIN = {
    "electricity": (("electricity",), PaperRow(0.178, 0.270, 0.212, 0.205)),
    "ETT (mean of 4)": (("ETTh1", "ETTh2", "ETTm1", "ETTm2"), PaperRow(0.383, 0.399, 0.442, 0.381)),
    "exchange": (("exchange",), PaperRow(0.360, 0.403, 0.354, 0.367)),
    "traffic": (("traffic",), PaperRow(0.428, 0.282, 0.625, 0.481)),
    "weather": (("weather",), PaperRow(0.258, 0.278, 0.265, 0.259)),
    "solar": (("solar",), PaperRow(0.233, 0.262, 0.330, 0.270)),
    "PEMS (mean of 4)": (("PEMS03", "PEMS04", "PEMS07", "PEMS08"), PaperRow(0.119, 0.218, 0.320, 0.217)),
}
# Data set -> attention -> the paper's MSE with tokens of time steps and inverted, means over the four horizons.
PROMOTION = {
    "electricity": {
        "full": (0.277, 0.178),
        "lsh": (0.338, 0.208),
        "probsparse": (0.311, 0.216),
        "flow": (0.267, 0.210),
        "flash": (0.285, 0.206),
    },
    "traffic": {
        "full": (0.665, 0.428),
        "lsh": (0.741, 0.647),
        "probsparse": (0.764, 0.662),
        "flow": (0.750, 0.524),
        "flash": (0.658, 0.492),
    },
    "weather": {
        "full": (0.657, 0.258),
        "lsh": (0.803, 0.248),
        "probsparse": (0.634, 0.271),
        "flow": (0.286, 0.266),
        "flash": (0.659, 0.262),
    },
}


def mean_over(metrics: Metrics, names: Sequence[str], measure: str) -> float | None:
    """Mean of a measure over stages and their seeds; None where one of them was not run."""
    keys = [f"{name}/{measure}" for name in names]
    if not all(key in metrics for key in keys):
        return None
    return float(np.mean([np.mean(np.asarray(metrics[key], float)) for key in keys]))


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def main_table(metrics: Metrics) -> str:
    """Table 1 in Markdown, ours and the paper's side by side; empty where no data set was run at all its horizons."""
    lines = []
    for label, (sets, paper) in MAIN.items():
        rows = [row_name(data, horizon) for data in sets for horizon in horizons_of(data)]
        ours = [mean_over(metrics, rows, measure) for measure in ("mse", "mae")]
        for model in ("dlinear", "patchtst", "rlinear"):
            ours.append(mean_over(metrics, [f"{row}_{model}" for row in rows], "mse"))
        if any(value is not None for value in ours):
            theirs = (*(f" ({value:.3f})" for value in paper), "")
            cells = (_cell(mine) + known for mine, known in zip(ours, theirs, strict=True))
            lines.append(f"| {label} | {' | '.join(cells)} |")
    if not lines:
        return ""
    head = "| means over 4 horizons, ours (paper) | iTransformer MSE | MAE | DLinear MSE | PatchTST MSE | RLinear MSE |"
    return "\n".join([head, "|---|---|---|---|---|---|", *lines])


def promotion_table(metrics: Metrics) -> str:
    """Table 2 in Markdown; empty where nothing was run at all horizons with both kinds of tokens."""
    lines = []
    for data in PROMOTED:
        names = [row_name(data, horizon) for horizon in HORIZONS]
        for attention in PROMOTION["electricity"]:
            kinds = ("vanilla", "inverted")
            ours = [mean_over(metrics, [f"{name}_{attention}_{kind}" for name in names], "mse") for kind in kinds]
            if None in ours:
                continue
            paper = PROMOTION.get(data, {}).get(attention)
            theirs = "" if paper is None else f"{paper[0]:.3f} -> {paper[1]:.3f}"
            lines.append(f"| {data} | {attention} | {_cell(ours[0])} -> {_cell(ours[1])} | {theirs} |")
    if not lines:
        return ""
    head = "| data | attention | MSE, time tokens -> inverted, mean over 4 horizons | paper |"
    return "\n".join([head, "|---|---|---|---|", *lines])
