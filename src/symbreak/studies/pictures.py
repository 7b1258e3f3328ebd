"""Samples as a PNG: pictures in a row, signals as lines, middle slices of volumes, histograms and pairs of columns."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from symbreak.data.images import Units
from symbreak.report.figures import COLORS, figure_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["directions", "png_row", "shown"]

FEW = 12  # vectors that are drawn one by one
LEADING = 4  # columns of a pair plot
POINTS = 1000  # of a pair plot
NAMED = 16  # columns whose names have room on an axis


def directions(rows: np.ndarray | torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Directions [N, *S] as samples: each scaled so that its largest entry is 1 or -1, white or black."""
    x = torch.as_tensor(rows).float().reshape(-1, *shape)
    return x / x.abs().flatten(1).amax(1).clamp_min(1e-30).reshape(-1, *[1] * len(shape))


def shown(shape: Sequence[int], pictures: int) -> int:
    """How many samples of a shape a picture shows: more vectors than pictures."""
    return POINTS if len(shape) == 1 else pictures


def png_row(
    x: torch.Tensor, units: Units | None = None, others: torch.Tensor | None = None, most: int = 16, scaled: bool = True
) -> str:
    """Samples [N, *S] as one PNG, base64.

    Pictures in [-1, 1] stand in a row. Those of other channels or units are grey, channel below channel, from the
    smallest value to the largest; of volumes the middle slice is shown; signals are lines, a line a channel. A dozen
    vectors are lines over their columns, more of them are shown by histograms and pairs of the columns that vary most
    along the two leading modes.

    Args:
        units: of samples that are no pictures.
        others: samples to draw beside vectors, such as held-out ones.
        most: samples to show, of all but vectors.
        scaled: whether x is in ``units``; ``False`` for directions, whose numbers mean nothing.
    """
    if x.ndim == 2:
        return _vectors(x.cpu(), units, others, scaled)
    x = x[:most]
    if x.ndim == 3:
        return _signals(x.cpu(), units)
    if x.ndim > 4 or units is not None or x.shape[1] not in (1, 3):
        x = _grey(x)
    return _pictures(x)


def _pictures(grid: torch.Tensor) -> str:
    """A row of pictures [N, 1 or 3, H, W] in [-1, 1]."""
    from PIL import Image

    small = grid
    side = max(grid.shape[2:])
    if side > 64:
        scale = 64 / side
        small = torch.nn.functional.interpolate(grid, scale_factor=scale, mode="area")
    pixels = ((small.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    pixels = torch.nn.functional.pad(pixels, (1, 1, 1, 1), value=0)
    row = torch.cat(list(pixels), dim=2).permute(1, 2, 0).numpy()
    buffer = io.BytesIO()
    Image.fromarray(row[:, :, 0] if row.shape[2] == 1 else row).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def _grey(x: torch.Tensor) -> torch.Tensor:
    """Fields [N, C, ..., H, W] as grey pictures [N, 1, C H, W] in [-1, 1]; of further axes the middle."""
    while x.ndim > 4:
        x = x.select(2, x.shape[2] // 2)
    low, high = x.amin((0, 2, 3), keepdim=True), x.amax((0, 2, 3), keepdim=True)  # every channel has its own range
    x = 2 * (x - low) / (high - low).clamp_min(1e-30) - 1
    return x.float().reshape(len(x), 1, -1, x.shape[3])


def _signals(x: torch.Tensor, units: Units | None) -> str:
    """Signals [N, C, L] side by side, a line a channel."""
    width, length = min(14.0, 1.3 * len(x) + 0.7), x.shape[2]
    figure, (ax,) = figure_of(width, 1.4, fixed=True)
    figure.subplots_adjust(0.45 / width, 0.05, 1 - 0.01 / width, 0.97)
    for channel, color in enumerate((COLORS * x.shape[1])[: x.shape[1]]):
        for i, one in enumerate(x[:, channel].numpy()):
            name = "_" if i or units is None else units.columns[channel]
            ax.plot(np.arange(length) + 1.15 * length * i, one, color=color, linewidth=0.9, label=name)
    ax.set_xticks([])
    ax.tick_params(labelsize=6)
    if units is not None and 1 < x.shape[1] <= len(COLORS):
        _plain_legend(ax)
    return _png(figure)


def _vectors(x: torch.Tensor, units: Units | None, others: torch.Tensor | None, scaled: bool) -> str:
    names = [f"column {i}" for i in range(x.shape[1])] if units is None else list(units.columns)
    if others is None and len(x) < FEW:
        return _lines(x.numpy(), names)
    sets = [part[:POINTS].double().numpy() for part in (x, others) if part is not None]
    together = np.concatenate(sets)
    centred = together - together.mean(0)
    _, values, axes = np.linalg.svd(centred, full_matrices=False)
    weight = (values[:2, None] ** 2 * axes[:2] ** 2).sum(0)
    chosen = np.sort(np.argsort(-weight, kind="stable")[:LEADING])
    if scaled and units is not None and units.mean is not None and units.std is not None:
        sets = [part * units.std + units.mean for part in sets]
    return _pairs([part[:, chosen] for part in sets], [names[i] for i in chosen])


def _lines(rows: np.ndarray, names: list[str]) -> str:
    """A few vectors as lines over their columns."""
    width = min(10.0, 2.5 + 0.35 * len(names))
    figure, (ax,) = figure_of(width, 2.0, fixed=True)
    figure.subplots_adjust(0.5 / width, 0.36, 1 - 0.6 / width, 0.96)
    for i, (row, color) in enumerate(zip(rows, COLORS * len(rows), strict=False)):
        ax.plot(row, "o-", color=color, linewidth=0.9, markersize=2.5, label=f"{i + 1}")
    if len(names) <= NAMED:
        labels = [n[:18] for n in names]
        ax.set_xticks(range(len(names)), labels, rotation=40, ha="right", fontsize=6, parse_math=False)
    ax.tick_params(axis="y", labelsize=6)
    _plain_legend(ax, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return _png(figure)


def _pairs(sets: list[np.ndarray], names: list[str]) -> str:
    """Histograms of columns on the diagonal, pairs of them below it; the second set in another colour."""
    k = len(names)
    figure, _ = figure_of(1.7 * k + 0.6, 1.5 * k + 0.3, 0)
    for i in range(k):
        edges = np.histogram_bin_edges(np.concatenate([part[:, i] for part in sets]), 24)
        for j in range(i + 1):
            ax = figure.add_subplot(k, k, i * k + j + 1)
            for part, color in reversed(list(zip(sets, COLORS, strict=False))):
                if i == j:
                    share = np.histogram(part[:, i], edges)[0] / len(part)
                    ax.stairs(share, edges, color=color, linewidth=1.1)
                else:
                    ax.plot(part[:, j], part[:, i], ".", color=color, markersize=1.6, alpha=0.6, rasterized=True)
            ax.tick_params(labelsize=5)
            if i == k - 1:
                ax.set_xlabel(names[j][:24], fontsize=6, parse_math=False)
            if j == 0 and i > 0:
                ax.set_ylabel(names[i][:24], fontsize=6, parse_math=False)
    return _png(figure)


def _plain_legend(ax: Axes, **where: Any) -> None:
    for text in ax.legend(fontsize=6, frameon=False, **where).get_texts():
        text.set_parse_math(False)  # a name with dollars is no formula


def _png(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return base64.b64encode(buffer.getvalue()).decode()
