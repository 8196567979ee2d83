"""What clipping did to each block of a run's updates, round by round, as heat maps."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.colors import LogNorm, Normalize
from matplotlib.ticker import MaxNLocator, PercentFormatter

from fedpriv.reporting.reader import Run
from fedpriv.reporting.svg import Marked, Plot, canvas

# No more cells than a reader can tell apart.
_COLUMNS, _ROWS = 120, 40
_LABEL_CHARACTERS, _LABEL_DOTS = 34, 4

#: Labels of the rows, and `[rows, columns]` values.
Cells = tuple[list[str], np.ndarray]


def block_figures(marked: Marked) -> list[Plot]:
    """Return the heat maps of one run, block by block; those with nothing to show are left out.

    A deployment writes nothing of users' norms, so it has the first alone.
    """
    last = marked.run.rows[-1]
    made = [noise_blocks(marked)] if any(last.get("noise_block_norms", {}).values()) else []
    if "simulation_only" not in last:
        return made
    if any(release.bound is not None for release in marked.run.releases):
        made.append(clipped_blocks(marked))
    return [*made, block_norms(marked)]


def noise_blocks(marked: Marked) -> Plot:
    """Draw how far each block of the averaged update stands out of its noise."""
    names = list(marked.run.rows[-1]["released_block_norms"])
    ratios = [
        [
            row["released_block_norms"][name] / (row["noise_block_norms"][name] or math.nan)
            for row in marked.run.rows
        ]
        for name in names
    ]
    return _heat_map(
        marked,
        _downsampled(names, np.array(ratios)),
        Normalize(1, 3),
        "noise-blocks",
        "Released norm against noise",
        "Block by block: the norm of the averaged update as released, divided by the norm that its "
        "noise alone has in expectation. At 1 a block is all noise; above 3 it is mostly signal. A "
        "function of what was released.",
    )


def clipped_blocks(marked: Marked) -> Plot:
    """Draw the share of users whose block was clipped, block by block and round by round."""
    return _heat_map(
        marked,
        _seen(marked.run, "block_clipped"),
        Normalize(0, 1),
        "clipped",
        "Share of updates that were clipped",
        "Block by block. All at 100%: the bound is far below the updates; all at 0%: the noise is "
        "scaled to a bound that nobody reaches. Not private: simulation only.",
    )


def block_norms(marked: Marked) -> Plot:
    """Draw the mean norm of users' updates, block by block and round by round."""
    cells = _seen(marked.run, "block_norms")
    return _heat_map(
        marked,
        cells,
        _three_decades(cells[1]),
        "norms",
        "Mean norm of updates before clipping",
        "Block by block, in parameter units, three powers of ten deep. Not private: simulation "
        "only.",
    )


def _heat_map(
    marked: Marked, cells: Cells, scale: Normalize, key: str, title: str, caption: str
) -> Plot:
    blocks, values = cells
    with canvas(height=1.5 + 0.145 * len(blocks)) as drawn:
        axes = drawn.axes
        image = axes.imshow(
            np.ma.masked_invalid(values),
            cmap="cividis",
            norm=scale,
            aspect="auto",
            interpolation="none",
            extent=(0.5, marked.run.finished_rounds + 0.5, len(blocks) - 0.5, -0.5),
        )
        axes.grid(visible=False)
        axes.set_yticks(range(len(blocks)), blocks, fontsize=7.5)
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel("round")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        bar = drawn.figure.colorbar(
            image,
            ax=axes,
            location="top",
            aspect=40,
            format=PercentFormatter(1) if key == "clipped" else None,
        )
        bar.outline.set_visible(False)
        assert bar.solids is not None
        bar.solids.set_rasterized(True)
        return drawn.plot(f"{key}{marked.mark}", title, caption)


def _seen(run: Run, field: str) -> Cells:
    """Return the labels and means of a value that was gathered from users."""
    names = list(run.rows[-1]["simulation_only"][field])
    table = [[_cell(row, field, name) for row in run.rows] for name in names]
    return _downsampled(names, np.array(table, dtype=float))


def _cell(row: Mapping[str, Any], field: str, name: str) -> float:
    value = row.get("simulation_only", {}).get(field, {}).get(name)
    return math.nan if value is None else float(value)


def _downsampled(names: list[str], table: np.ndarray) -> Cells:
    """Return labels and `[blocks, rounds]` means, of at most `_ROWS` by `_COLUMNS` cells.

    Where there are more blocks, neighbours share a row: `head.weight +2` is that block and the
    next two.
    """
    table = _pooled(table, _COLUMNS)
    if len(names) <= _ROWS:
        return [_shortened(name) for name in names], table
    groups = np.array_split(np.arange(len(names)), _ROWS)
    labels = [f"{_shortened(names[group[0]])} +{len(group) - 1}" for group in groups]
    return labels, _pooled(table.T, _ROWS).T


def _pooled(table: np.ndarray, columns: int) -> np.ndarray:
    """Return `table` with at most `columns` columns, each the mean of neighbouring ones.

    Nan, of rounds in which nobody was trained, counts for nothing.
    """
    if table.shape[1] <= columns:
        return table
    return np.stack([_mean(part) for part in np.array_split(table, columns, axis=1)], axis=1)


def _mean(part: np.ndarray) -> np.ndarray:
    known = (~np.isnan(part)).sum(axis=1)
    unknown = np.full(len(part), math.nan)
    return np.divide(np.nansum(part, axis=1), known, out=unknown, where=known > 0)


def _three_decades(values: np.ndarray) -> LogNorm:
    finite = values[np.isfinite(values) & (values > 0)]
    top = float(finite.max()) if finite.size else 1.0
    return LogNorm(top / 1000, top, clip=True)


def _shortened(block: str) -> str:
    """Return a block's name, without its first parts where it is too long for an axis."""
    while "." in block and (block.count(".") > _LABEL_DOTS or len(block) > _LABEL_CHARACTERS):
        block = "…" + block.removeprefix("…").partition(".")[2]
    return block
