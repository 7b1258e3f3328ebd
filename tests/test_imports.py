"""Imports point one way: a module may import only from floors below its own."""

import ast
from pathlib import Path

import symbreak

ROOT = Path(symbreak.__file__).parent
FLOORS = [
    {"files", "noise"},
    {"parallel"},
    {"shards"},
    {"critical", "data", "record", "sketch", "figures"},
    {"moments", "blocks"},
    {"laws", "denoise"},
    {"phases", "adapters"},
    {"cut"},
    {"choose"},
    {"start"},
    {"sample", "train", "metrics"},
    {"pipeline", "findings"},
    {"diagnosis", "world"},
    {"study", "copying", "checks", "report"},
    {"tables", "asked"},
    {"cli"},
]
FLOOR = {name: i for i, names in enumerate(FLOORS) for name in names}
DRAWING = {"record", "report", "figures", "tables"}
DIFFUSERS = {"adapters", "cut", "pipeline", "train"}


def modules():
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        yield path, parts[0], ast.walk(ast.parse(path.read_text()))


def imported(node):
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and node.module:
        return [node.module]
    return []


def test_imports_fall():
    for path, place, nodes in modules():
        if place in ("__init__", "__main__"):
            continue
        assert place in FLOOR, f"{path} has no floor: add it to the list"
        for node in nodes:
            for name in imported(node):
                if not name.startswith("symbreak"):
                    continue
                target = (name.split(".") + [""])[1]
                inside = target == place and len(path.relative_to(ROOT).parts) > 1
                # the version is the one thing that comes from the package's own face
                if target == "" and place == "cli":
                    continue
                assert inside or FLOOR[target] < FLOOR[place], f"{path}: {place} imports {name}"


def test_heavy_libraries_stay_where_they_belong():
    for path, place, nodes in modules():
        for node in nodes:
            for name in imported(node):
                top = name.split(".")[0]
                assert top != "diffusers" or place in DIFFUSERS, f"{path} imports {name}"
                assert top != "torch" or place not in DRAWING, f"{path} imports {name}"


def test_importing_is_quick_and_touches_nothing_heavy():
    import subprocess
    import sys

    code = "import sys, symbreak; print(sorted({'torch', 'diffusers', 'datasets'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_every_public_name_exists():
    for name in symbreak.__all__:
        assert getattr(symbreak, name) is not None
        assert not (ROOT / f"{name}.py").exists(), f"{name} is a function and a module"
