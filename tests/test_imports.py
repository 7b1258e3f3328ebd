"""Imports point one way: floors are derived from the imports, nothing is listed by hand."""

import ast
import graphlib
import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import symbreak

ROOT = Path(symbreak.__file__).parent
MOST_FLOORS, MOST_ROOMS = 8, 20
MOST_LINES, MOST_PARAMETERS, MOST_ANY = 80, 10, 180  # of a function without its docstring; lines of the package
ELEVEN = {"late_start", "fit_start"}  # public arguments whose order users rely on, and `learn`
# Rooms that know a heavy library; all others go without it. The package itself only names things.
DIFFUSERS = {"networks", "start"}
NO_TORCH = {"report", "intervals"}


def sources():
    return [p for p in sorted(ROOT.rglob("*.py")) if p.parent != ROOT or p.stem not in ("__init__", "__main__")]


def module_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path):
    """Names of the modules that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module
            # `from symbreak.laws import gaussian` imports a module, too
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def graph(of):
    """Who imports whom, inside the package, seen from rooms or from files."""
    arrows = {of(module_of(path)): set() for path in sources()}
    for path in sources():
        here = of(module_of(path))
        for name in imported(path):
            assert name != "symbreak", f"{path} imports the package itself"
            if not name.startswith("symbreak."):
                continue
            there = of(name.removeprefix("symbreak."))
            if there in arrows and there != here:
                arrows[here].add(there)
    return arrows


def floors(arrows):
    """Floor of each node: one above the highest that it imports. A circle raises, with its nodes in the message."""
    found = {}
    for node in graphlib.TopologicalSorter(arrows).static_order():
        found[node] = 1 + max((found[n] for n in arrows[node]), default=0)
    return found


def room(module):
    return module.split(".")[0]


def test_rooms_stand_on_few_floors_and_imports_fall():
    found = floors(graph(room))
    assert max(found.values()) <= MOST_FLOORS, sorted(found.items(), key=lambda item: item[1])


def test_files_import_each_other_in_no_circle():
    floors(graph(lambda module: module))


def test_the_top_of_the_package_is_seen_at_a_glance():
    entries = [p.name for p in ROOT.iterdir() if p.name != "__pycache__"]
    assert len(entries) <= MOST_ROOMS, entries


def test_functions_fit_on_a_page():
    for path in sources():
        for f in ast.walk(ast.parse(path.read_text())):
            if not isinstance(f, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            docstring = f.body[0].end_lineno - f.body[0].lineno + 1 if ast.get_docstring(f) else 0
            assert f.end_lineno - f.lineno + 1 - docstring <= MOST_LINES, f"{path}: {f.name}"
            arguments = [*f.args.posonlyargs, *f.args.args, *f.args.kwonlyargs]
            most = MOST_PARAMETERS + (f.name in ELEVEN) + (arguments[:1] != [] and arguments[0].arg in ("self", "cls"))
            # options of the command line are parameters of its commands
            assert room(module_of(path)) == "cli" or len(arguments) <= most, f"{path}: {f.name}"


def test_types_are_known():
    lines = [line for path in sources() for line in path.read_text().splitlines() if re.search(r"\bAny\b", line)]
    assert len(lines) <= MOST_ANY, len(lines)


def test_heavy_libraries_stay_where_they_belong():
    for path in sources():
        place = room(module_of(path))
        for name in imported(path):
            top = name.split(".")[0]
            assert top != "diffusers" or place in DIFFUSERS, f"{path} imports {name}"
            assert top != "torch" or place not in NO_TORCH, f"{path} imports {name}"


def test_importing_is_quick_and_touches_nothing_heavy():
    # What the command line needs before a command is chosen, and what is plain arithmetic.
    light = "symbreak, symbreak.runtime.errors, symbreak.runtime.files, symbreak.runtime.plain, symbreak.critical"
    code = f"import sys, {light}; print(sorted({{'torch', 'diffusers', 'datasets'}} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_every_public_name_exists():
    for name in symbreak.__all__:
        assert getattr(symbreak, name) is not None
        assert not (ROOT / f"{name}.py").exists(), f"{name} is a function and a module"
        assert not (ROOT / name).is_dir(), f"{name} is a function and a package"


def test_no_package_offers_a_function_under_the_name_of_a_module():
    """Else `from symbreak.laws import x` would give one or the other, whichever was imported first."""
    for package in {path.parent for path in sources()} - {ROOT}:
        name = f"symbreak.{package.relative_to(ROOT).as_posix().replace('/', '.')}"
        offered = set(dir(importlib.import_module(name)))
        for module in (path.stem for path in package.glob("*.py")):
            thing = getattr(importlib.import_module(name), module) if module in offered else inspect
            assert inspect.ismodule(thing), f"{name}.{module} is a function and a module"


@pytest.mark.parametrize("group", symbreak.GROUPS)
def test_groups_are_the_public_names_by_kind(group):
    code = f"import sys, symbreak as sb; print(*dir(sb.{group})); print(sorted({{'torch'}} & set(sys.modules)))"
    names, heavy = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert heavy == "[]"
    homes = {n for n in symbreak.__all__ if getattr(symbreak, n).__module__.startswith(f"symbreak.{group}.")}
    assert homes <= set(names.split())
    for name in homes:
        assert getattr(getattr(symbreak, group), name) is getattr(symbreak, name)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        getattr(symbreak, group).nothing  # noqa: B018
