"""Hooks of the site that `make docs` builds: formulas as MathML, pictures, links, scripts of the gallery as pages."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

CODE = re.compile(r"(^```.*?^```|`[^`\n]+`)", re.DOTALL | re.MULTILINE)
NAMED = re.compile(r"\[([\w-]+\.md)\](?=\(\1)")  # a link that shows a file's name, as one reads it in a clone
PICTURE = re.compile(r"^!\[([^\]]*)\]\(([^)]+)\)$", re.MULTILINE)
MATH = re.compile(r"\$\$(.+?)\$\$|\$(?!\s)([^$\n]+(?:\n[^$\n]+)*?)(?<!\s)\$", re.DOTALL)
ROOT = Path(__file__).parents[1]
GALLERY = ROOT / "docs" / "gallery"
REFERENCE = {  # pages of the reference: title and rooms of the package
    "data": ("Data and moments", ("data", "moments", "noise", "runtime")),
    "laws": ("Laws", ("laws",)),
    "networks": ("Networks", ("networks",)),
    "phases": ("Phases", ("phases", "critical")),
    "starts": ("Starts", ("start",)),
    "studies": ("Metrics and studies", ("metrics", "studies", "report")),
}


def on_files(files: Any, config: Any) -> Any:
    """A page for each script of the gallery, and the public names room by room."""
    from mkdocs.structure.files import File

    for name, page in reference_pages().items():
        files.append(File.generated(config, f"reference/{name}.md", content=page))

    for path in sorted(GALLERY.glob("*.py")):
        page = gallery_page(path.name, path.read_text(encoding="utf-8"))
        files.append(File.generated(config, f"gallery/{path.stem}.md", content=page))
    return files


def reference_pages() -> dict[str, str]:
    """All public names with their docstrings, a page a group of rooms."""
    tree = ast.walk(ast.parse((ROOT / "src" / "symbreak" / "__init__.py").read_text(encoding="utf-8")))
    inside = [n for n in tree if isinstance(n, ast.ImportFrom) and str(n.module).startswith("symbreak.")]
    homes = {a.name: str(n.module).split(".")[1] for n in inside for a in n.names if a.name != "lazily"}
    pages = {}
    for page, (title, rooms) in REFERENCE.items():
        names = sorted((n for n, room in homes.items() if room in rooms), key=str.lower)
        pages[page] = "\n\n".join([f"# {title}", *(f"::: symbreak.{name}" for name in names), ""])
    return pages


def gallery_page(name: str, text: str) -> str:
    """A script in cells (``# %%``, prose after ``# %% [markdown]``) as a page, its picture below."""
    parts = []
    for cell in re.split(r"^# %%", text, flags=re.MULTILINE)[1:]:
        head, _, body = cell.partition("\n")
        if "[markdown]" in head:
            parts.append(re.sub(r"^# ?", "", body, flags=re.MULTILINE).strip())
        else:
            parts.append(f"```python\n{body.strip()}\n```")
    title, rest = parts[0], parts[1:]
    picture = f"![{title.lstrip('# ')}]({Path(name).stem}.png)"
    return "\n\n".join([title, *rest, picture, f"The script is `docs/gallery/{name}`.", ""])


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Formulas between dollars as MathML, which browsers draw without a script; pictures that open; links by title."""
    markdown = NAMED.sub(lambda link: f"[{_title(link[1])}]", PICTURE.sub(r"[![\1](\2)](\2)", markdown))
    pieces = CODE.split(markdown)
    return "".join(piece if i % 2 else MATH.sub(_mathml, piece) for i, piece in enumerate(pieces))


def _title(page: str) -> str:
    """The heading of a page of docs/."""
    return (ROOT / "docs" / page).read_text(encoding="utf-8").partition("\n")[0].lstrip("# ")


def _mathml(match: re.Match[str]) -> str:
    from latex2mathml.converter import convert

    block, inline = match.groups()
    if block is not None:
        return "\n\n<div class='math'>" + convert(" ".join(block.split()), display="block") + "</div>\n\n"
    return f"<span>{convert(' '.join(inline.split()))}</span>"  # <math> at the head of a line would end a paragraph
