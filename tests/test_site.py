"""The site: every Python block of every page runs, the gallery draws its pictures, and the pages work in a browser."""

import functools
import http.server
import re
import threading
import warnings
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
import torch

import symbreak as sb
from tests.browser import browser  # noqa: F401
from tests.test_attributes import written
from tests.worlds import small_choice

mpl.use("Agg")
ROOT = Path(__file__).parents[1]
# They need Stable Diffusion's classes, networks of the reader, or files.
RUN_ELSEWHERE = {"pipelines.md": "test_pipeline.py", "my-own-data.md": "test_any_shape.py"}
RUN_ELSEWHERE["my-own-network.md"] = "test_families.py"
LONG = {"training-below-the-law.md", "few-evaluations.md"}  # four networks are trained; grids and steps of a network
# What a page takes for granted: data and networks of the reader.
GIVEN = {
    "large.md": lambda: {"sb": sb, "batches": list(torch.randn(3, 50, 1, 16, 16))},
    "faces.md": lambda: {
        "file": written(Path("celeba10k-train.parquet"), zoom=9)
    },  # which the page reads, too few to say much
}


def blocks(page):
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


PAGES = [p for p in sorted(ROOT.glob("docs/*.md")) if blocks(p)]


@pytest.mark.parametrize(
    "page", [pytest.param(p, marks=pytest.mark.slow) if p.name in LONG else p for p in PAGES], ids=lambda p: p.name
)
def test_the_code_of_a_page_runs(page, tmp_path, monkeypatch):
    if page.name in RUN_ELSEWHERE:
        assert page.name in (ROOT / "tests" / RUN_ELSEWHERE[page.name]).read_text(encoding="utf-8")
        return
    monkeypatch.chdir(tmp_path)
    names = GIVEN.get(page.name, dict)()
    with small_choice(), warnings.catch_warnings():
        warnings.simplefilter("ignore", sb.LateStartWarning)  # what it warns of is not the page's subject
        for code in blocks(page):
            exec(compile(code, page.name, "exec"), names)


@pytest.mark.slow
@pytest.mark.parametrize("script", sorted((ROOT / "docs" / "gallery").glob("*.py")), ids=lambda p: p.stem)
def test_the_gallery_draws_its_pictures(script):
    import matplotlib.pyplot as plt
    from PIL import Image

    code = script.read_text(encoding="utf-8")
    assert len([line for line in code.splitlines() if line and not line.startswith("#")]) < 60
    plt.close("all")
    exec(compile(code, script.name, "exec"), {})
    figure = plt.gcf()
    figure.dpi = 100
    figure.canvas.draw()
    drawn = np.asarray(figure.canvas.buffer_rgba())[..., :3].astype(float)
    stored = np.asarray(Image.open(script.with_suffix(".png")).convert("RGB")).astype(float)
    assert drawn.shape == stored.shape
    # another machine's last bits and another matplotlib's fonts move a line by a fraction of a pixel
    assert np.abs(drawn - stored).mean() < 3
    plt.close("all")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The address of the built site on localhost."""
    build = pytest.importorskip("mkdocs.commands.build", reason="the docs extra is not installed")
    config = pytest.importorskip("mkdocs.config")
    folder = tmp_path_factory.mktemp("site")
    build.build(config.load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder)))  # strict: a warning is an error
    handler = functools.partial(Quiet, directory=str(folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield folder, f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.mark.slow
def test_the_site_asks_nobody_else(site):
    folder, _ = site
    pages = list(folder.rglob("*.html"))
    assert len(pages) > 25
    for page in pages:
        text = page.read_text(encoding="utf-8")
        assert not re.findall(r"(?:src|srcset)=\"?(?:https?:)?//", text), page
        assert not re.findall(r"<link[^>]*rel=\"?stylesheet[^>]*https?://", text), page
        assert not re.search(r"\$[a-zA-Z\\][^$<]*\$", re.sub(r"<(code|pre).*?</\1>", "", text, flags=re.DOTALL)), page
    reference = "".join(p.read_text(encoding="utf-8") for p in folder.glob("reference/*.html"))
    assert all(f'id="symbreak.{name}"' in reference or f"id=symbreak.{name}" in reference for name in sb.__all__)


@pytest.mark.slow
def test_the_site_in_a_browser(site, browser):  # noqa: F811
    folder, address = site
    browser.open(f"{address}/index.html")
    for width in (1200, 480):
        browser.resize(width, 900)
        for page in sorted(str(p.relative_to(folder)) for p in folder.rglob("*.html")):
            browser.open(f"{address}/{page}")
            assert browser.overflow() <= 0, (page, width)
    browser.resize(1200, 900)
    browser.open(f"{address}/index.html")
    browser.run(
        """const q = document.querySelector(".md-search__input"); q.focus();
        document.getElementById("__search").checked = true; q.value = "speciation";
        q.dispatchEvent(new Event("keyup", {bubbles: true})); q.dispatchEvent(new Event("input", {bubbles: true}));"""
    )
    assert browser.until("return document.querySelectorAll('.md-search-result__item').length") > 0
    assert browser.errors() == []
