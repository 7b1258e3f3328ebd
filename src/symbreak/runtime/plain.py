"""Plain values for records: what JSON can hold, and package versions."""

from __future__ import annotations

import math
import platform
from importlib import metadata
from typing import Any

__all__ = ["Values", "plain", "versions"]

Values = dict[str, Any]  # plain values by name, as records and reports hold them


def plain(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become null and a string."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else ("inf" if value > 0 else "-inf")
    return value


def versions(threads: int) -> dict[str, str]:
    """Versions that a result may depend on, and the number of threads, which decides the last bits."""
    names = ("symbreak", "torch", "diffusers", "numpy", "scipy", "safetensors", "scikit-learn")
    return {
        "python": platform.python_version(),
        "threads": str(threads),
        **{name: metadata.version(name) for name in names},
    }
