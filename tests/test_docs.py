"""What README.md and docs/ name exists: functions, arguments, modules, commands, flags, files, tests and links.

The code of the pages is run in `test_site.py`.
"""

import ast
import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import pytest

import symbreak
from symbreak.cli.commands import app

ROOT = Path(__file__).parents[1]
CARD = ROOT / "src" / "symbreak" / "weights" / "digits" / "README.md"
PAGES = {page.name if page != CARD else "card": page for page in [ROOT / "README.md", CARD, *ROOT.glob("docs/*.md")]}
VARIABLES = {"start": "LateStart", "law": "Gaussian", "moments": "Moments"}  # what these names hold on the pages
MODULES = [m.name for m in pkgutil.walk_packages(symbreak.__path__, "symbreak.") if not m.name.endswith("__main__")]
FILE = re.compile(r"(?<![\w/.])((?:docs|tests|scripts|benchmarks|examples|recipes|src|symbreak)/[\w/.-]*\w)")
each_page = pytest.mark.parametrize("page", sorted(PAGES))


def text(page: str) -> str:
    return PAGES[page].read_text(encoding="utf-8")


def blocks(page: str, language: str = r"[a-z]*") -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text(page), re.DOTALL | re.MULTILINE)


def inline(page: str) -> list[str]:
    """What stands between single backticks, with line breaks within it taken out."""
    prose = re.sub(r"^```.*?^```", "", text(page), flags=re.DOTALL | re.MULTILINE)
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose)]


def calls(page: str) -> list[ast.Call]:
    """Every call in a Python block, or in inline code that is Python."""
    trees = []
    for code in [*blocks(page, "python"), *inline(page)]:
        try:
            trees.append(ast.parse(code.replace("=)", "=0)")))  # `Moments.fit(rank=)`
        except SyntaxError:
            continue
    return [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Call)]


def member(owner: object, name: str) -> object:
    """An attribute of a module or class; an annotated field, whose value an instance has, counts."""
    fields = inspect.isclass(owner) and any(name in getattr(base, "__annotations__", {}) for base in owner.__mro__)
    return None if fields and not hasattr(owner, name) else getattr(owner, name)


def resolved(path: str) -> object:
    """What a dotted name on a page means, or None where only an instance would know."""
    first, *rest = path.removeprefix("sb.").split(".")
    first = VARIABLES.get(first, first)
    assert first in symbreak.__all__ or not path.startswith("sb."), path
    owner: object = getattr(symbreak, first, None)
    for name in rest:
        if not inspect.isclass(owner):
            return None
        owner = member(owner, name)
    return owner


def in_a_module(path: str) -> bool:
    """Whether `room.function` or `symbreak.room.function` is a module or something in one."""
    head, _, name = path.rpartition(".")
    for module in MODULES:
        if f"symbreak.{path}" == module or path == module:
            return True
        if head and (module == head or module.endswith(f".{head}")) and hasattr(importlib.import_module(module), name):
            return True
    return False


@each_page
def test_python_compiles(page):
    for code in blocks(page, "python"):
        compile(code, PAGES[page].name, "exec")


@each_page
def test_names_are_public(page):
    for path in re.findall(r"(?<![\w.])sb(?:\.[A-Za-z_]\w*)+", text(page)):
        if path.split(".")[1] not in symbreak.GROUPS:
            resolved(path)


@each_page
def test_modules_and_their_functions_exist(page):
    code = "\n".join([*blocks(page), *inline(page)])
    for path in re.findall(r"(?<![\w./-])symbreak(?:\.[A-Za-z_]\w*)+", code):
        assert path.split(".")[1] in symbreak.__all__ or in_a_module(path), path


@each_page
def test_arguments_exist(page):
    checked = 0
    for call in calls(page):
        path = ast.unparse(call.func)
        function = resolved(path) if re.fullmatch(r"[A-Za-z_][\w.]*", path) else None
        if not callable(function):
            continue
        parameters = inspect.signature(function).parameters
        free = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        for keyword in call.keywords:
            assert free or keyword.arg in parameters, f"{path}({keyword.arg}=)"
        checked += 1
    assert checked or page not in ("README.md", "pipelines.md", "large.md")


def test_functions_of_the_tables_exist():
    for page in ("questions.md", "equations.md"):
        table = [row.split(" | ") for row in text(page).replace("\\|", "").splitlines() if row.startswith("| ")]
        assert len(table) > 20
        for row in table[1:]:
            for name in re.findall(r"`([A-Za-z_][\w.]*)", row[1]):
                assert resolved(name) is not None or in_a_module(name), name


def test_tests_of_the_equations_exist():
    file = ""
    for named, test in re.findall(r"`(test_\w+\.py)?::(test_\w+)`", text("equations.md")):
        file = named or file
        assert f"def {test}(" in (ROOT / "tests" / file).read_text(encoding="utf-8"), f"{file}::{test}"


@each_page
def test_commands_and_flags_exist(page):
    flags = {name: {n for a in app[name].assemble_argument_collection() for n in a.names} for name in COMMANDS}
    lines = [line for block in blocks(page) for line in block.replace("\\\n", " ").splitlines()] + inline(page)
    for line in lines:
        for command, rest in re.findall(r"(?<!import)(?:^|[\s(])symbreak ([a-z]+)((?: [^#;]*)?)", line):
            assert command in flags, line
            for name in re.findall(r"(?<![\w-])--[a-z][\w-]*", rest):
                assert name in flags[command] | {"--help", "--version"}, f"symbreak {command} {name}"
    everything = set().union(*flags.values()) | OTHER_FLAGS
    for code in inline(page):
        for name in re.findall(r"^--[a-z][\w-]*", code):
            assert name in everything, name


COMMANDS = ("study", "phases", "fit", "sample", "evaluate", "audit", "train", "world", "report")
OTHER_FLAGS = {"--nproc-per-node", "--cpu", "--extra-index-url", "--help"}  # of torchrun, accelerate and pip; of all


@each_page
def test_files_and_links_exist(page):
    for target in re.findall(r"\]\(([^)#]+)\)", text(page)):
        assert target.startswith("http") or (PAGES[page].parent / target).exists(), target
    for named in FILE.findall("\n".join([*blocks(page), *inline(page)])):
        assert (ROOT / named).exists() or (ROOT / "src" / named).exists(), named


def test_every_picture_has_its_command_and_its_page():
    """The table of CONTRIBUTING names the command of each; the site shows the gallery's below their scripts."""
    docs = ROOT / "docs"
    there = {str(path.relative_to(docs)) for path in docs.rglob("*.png")}
    listed = re.findall(r"`((?:figures|gallery)/[\w-]+\.png)`", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    assert sorted(listed) == sorted(there)
    shown = {Path(name).name for page in PAGES for name in re.findall(r"\]\(([^)]+\.png)\)", text(page))}
    assert {Path(name).name for name in there if name.startswith("figures/")} <= shown
    assert all((docs / name).with_suffix(".py").exists() for name in there if name.startswith("gallery/"))
