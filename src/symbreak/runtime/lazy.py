"""Names of a package that are loaded on first use, so that importing it is quick and completing it shows them."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Callable
from pathlib import Path

__all__ = ["lazily"]


def lazily(package: str, file: str, beside: tuple[str, ...] = ()) -> tuple[Callable[[str], object], list[str]]:
    """``__getattr__`` of a package and its public names: those that it imports for type checkers only.

    Args:
        package, file: ``__name__`` and ``__file__`` of the package.
        beside: packages within it that are loaded on first use, too.

    >>> get, names = lazily("symbreak.phases", importlib.import_module("symbreak.phases").__file__)
    >>> "clones" in names and get("clones").__module__
    'symbreak.phases.cloning'
    """
    nodes = ast.walk(ast.parse(Path(file).read_text(encoding="utf-8")))
    inside = (n for n in nodes if isinstance(n, ast.ImportFrom) and str(n.module).startswith("symbreak."))
    homes = {a.name: str(n.module) for n in inside if n.module != __name__ for a in n.names}

    def get(name: str) -> object:
        if name in beside:
            return importlib.import_module(f"{package}.{name}")
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(homes[name]), name)

    return get, sorted(homes)
