"""How objects look where one types: a line or two, and in a notebook a picture."""

from __future__ import annotations

import base64
import dataclasses
import html
import io
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Shown", "axes", "brief", "sigma_axis"]

LONGEST = 500  # characters of an object
PART = 90  # and of one of its parts


def shortened(text: str, most: int) -> str:
    """A text of at most so many characters, its end left out where it is longer."""
    return text if len(text) <= most else f"{text[: most - 4]} ..."


def brief(value: object) -> str:
    """A value in a few words: numbers with four digits, arrays by their shape and range, long lists by their length.

    >>> brief(0.123456), brief([0.5] * 100), brief((1, None))
    ('0.1235', '100 entries', '(1, None)')
    """
    if isinstance(value, float):
        return f"{value:.4g}"
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        return _array(value)
    if isinstance(value, dict):
        return (
            f"{len(value)} entries"
            if len(value) > 3
            else f"{{{', '.join(f'{k!r}: {brief(v)}' for k, v in value.items())}}}"
        )
    if isinstance(value, tuple | list):
        inside = ", ".join(map(brief, value)) if len(value) < 4 else ""
        short = 0 < len(inside) <= PART or not value
        return f"({inside})" if short else f"{len(value)} entries"
    text = repr(value)
    return shortened(text, PART) if isinstance(value, str | bytes) or len(text) <= PART else type(value).__name__


def _array(value: object) -> str:
    """An array or a tensor by its type, shape and range."""
    import numpy as np

    flat = np.asarray(value.detach().cpu() if hasattr(value, "detach") else value)
    if flat.ndim == 0:
        return brief(flat.item())
    finite = flat[np.isfinite(flat)] if flat.dtype.kind in "fiub" else flat[:0]
    span = f" {brief(finite.min().item())} .. {brief(finite.max().item())}" if finite.size else ""
    return f"{flat.dtype}[{' x '.join(map(str, flat.shape))}]{span}"


class Shown:
    """What prints in a line or two, and in a notebook shows the picture of its ``plot`` below."""

    plot: Callable[..., object] | None = None

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        # A dataclass writes all of its fields into a repr of its own, unless its class has one already.
        cls.__repr__ = cls.__repr__  # type: ignore[method-assign]

    def __repr__(self) -> str:  # of dataclasses
        names = (f.name for f in dataclasses.fields(self) if f.repr)  # type: ignore[arg-type]
        parts = (f"{name}={brief(getattr(self, name))}" for name in names)
        return shortened(f"{type(self).__name__}({', '.join(parts)})", LONGEST)

    def _repr_html_(self) -> str:
        head = f"<pre>{html.escape(repr(self))}</pre>"
        if self.plot is None:
            return head
        try:
            return head + _picture(self.plot)
        except Exception as error:  # the object is there, and says so, whatever befalls its picture
            return f"{head}<p>No picture: {html.escape(shortened(' '.join(str(error).split()), PART))}</p>"


def _picture(plot: Callable[..., object]) -> str:
    from matplotlib.figure import Figure

    figure, buffer = Figure(figsize=(6.0, 3.0), layout="constrained"), io.BytesIO()
    plot(figure.subplots())
    figure.savefig(buffer, format="png", dpi=110)
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def axes(ax: Axes | None, width: float = 6.0, height: float = 3.2) -> Axes:
    """The axes to draw in: those that came, or those of a new figure of pyplot, which notebooks show."""
    if ax is None:
        import matplotlib.pyplot as plt

        ax = plt.subplots(figsize=(width, height), layout="constrained")[1]
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def sigma_axis(ax: Axes) -> None:
    """A logarithmic axis of noise levels on which noise falls to the right, as in generation."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    ax.set_xscale("log")
    ax.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))  # 0.5 instead of a power of ten
    if not ax.xaxis_inverted():
        ax.invert_xaxis()
    ax.set_xlabel("sigma (noise falls to the right)")
