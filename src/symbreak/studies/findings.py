"""What a run over a data set has found so far, as plain values for its record: rows, curves, pictures, seconds."""

from __future__ import annotations

import base64
import io
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from symbreak.critical import CriticalTime, Curve
from symbreak.data.images import Images, describe
from symbreak.moments.one_pass import Moments
from symbreak.noise import Schedule
from symbreak.phases.mechanism import Check
from symbreak.phases.speciation import ladder, speciation_time

__all__ = ["Findings", "Stages", "png_row", "spectral_times", "view"]

Stages = Callable[[str, int, int], None]


class Findings:
    """What has been found so far: rows, curves, checks, pictures, and the seconds of every stage."""

    def __init__(self, steps: Schedule, progress: Stages | None) -> None:
        self.steps, self.tell = steps, progress or (lambda stage, done, total: None)
        self.criteria: list[dict[str, Any]] = []
        self.curves: list[dict[str, Any]] = []
        self.lines: list[dict[str, Any]] = []
        self.checks: list[dict[str, Any]] = []
        self.pictures: list[dict[str, str]] = []
        self.notes: list[str] = []
        self.arcs: dict[str, Any] | None = None
        self.timings: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[Callable[[int, int], None]]:
        """Times a stage and gives its progress callback; the rows it adds get its seconds."""
        began, first = time.perf_counter(), len(self.criteria)
        self.tell(name, 0, 1)
        seen = [0, 1]

        def tell(done: int, total: int) -> None:
            seen[:] = [done, total]
            self.tell(name, done, total)

        yield tell
        self.tell(name, seen[1], seen[1])
        self.timings[name] = self.timings.get(name, 0.0) + time.perf_counter() - began
        for row in self.criteria[first:]:
            row["stage"] = name  # its seconds are among the timings

    def add(self, name: str, of: str, critical: CriticalTime) -> None:
        self.criteria.append({"name": name, "of": of, "stage": None, **view(critical, self.steps)})

    def draw(self, panel: str, label: str, of: str, curve: Curve, line: str = "-", color: str | None = None) -> None:
        self.curves.append({**curve.to_dict(), "panel": panel, "label": label, "of": of, "line": line, "color": color})

    def check(self, check: Check) -> None:
        self.checks.append(
            {**check.to_dict(), "value_text": f"{check.value:.3g}", "expected_text": f"{check.expected:.3g}"}
        )

    def show(self, title: str, caption: str, grid: torch.Tensor) -> None:
        self.pictures.append({"title": title, "caption": caption, "png": png_row(grid)})


def view(critical: CriticalTime, steps: Schedule) -> dict[str, Any]:
    """A critical time as plain values, with the model's step of each level."""
    found: dict[str, Any] = critical.to_dict()
    for key in ("level", "low", "high"):
        level = getattr(critical, key)
        if level is not None:
            try:
                found[key]["step"] = float(steps.time(level))
            except ValueError:
                found[key]["step"] = None  # outside the schedule
    return found


def spectral_times(data: Images, steps: Schedule, moments: Moments, modes: int = 10) -> dict[str, Any]:
    """Spectrum, ladder and the spectral times at both scales of the pixels, as plain values."""
    spectrum = moments.spectrum(min(256, moments.dim))
    return {
        "data": describe(data),
        "eigenvalues": spectrum.values.tolist(),
        "eigenvalues_low": spectrum.low.tolist(),
        "eigenvalues_high": spectrum.high.tolist(),
        "total_variance": float(torch.trace(moments.cov)),
        "speciation": {
            "[-1, 1]": view(speciation_time(moments), steps),
            "[0, 1]": view(speciation_time(moments, scale=0.5), steps),
        },
        "ladder": [view(c, steps) for c in ladder(moments, modes)],
    }


def png_row(grid: torch.Tensor) -> str:
    """A row of images [N, C, H, W] in [-1, 1] as one PNG, base64."""
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
