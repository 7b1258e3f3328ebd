"""The tables on natural images: written from pictures made here, whatever interrupts them."""

import importlib.util
import io
import json
import os
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

SCRIPT = Path(__file__).parents[1] / "scripts" / "reproduce.py"


def pooled(x):
    """A quick extractor: means of squares, [N, 48]."""
    return torch.nn.functional.adaptive_avg_pool2d(x, 4).flatten(1)


def write(folder):
    """Pictures of 32 x 32 of three classes, of which each has a colour."""
    rng = np.random.default_rng(0)
    colours = rng.uniform(50, 200, size=(10, 1, 1, 3))
    for half, n in (("train", 200), ("test", 200)):
        labels, cells = np.arange(n) % 3, []
        for one in (colours[labels] + 25 * rng.normal(size=(n, 32, 32, 3))).clip(0, 255).astype(np.uint8):
            stream = io.BytesIO()
            Image.fromarray(one).save(stream, "PNG")
            cells.append({"bytes": stream.getvalue(), "path": None})
        pq.write_table(pa.table({"image": cells, "label": labels}), folder / f"cifar10-{half}.parquet")
    return folder


@pytest.fixture
def script(tmp_path, monkeypatch):
    monkeypatch.setenv("SYMBREAK_DATA", str(write(tmp_path)))
    paths = [str(SCRIPT.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    monkeypatch.syspath_prepend(str(SCRIPT.parent))  # where a script finds those beside it
    spec = importlib.util.spec_from_file_location("reproduce", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "reproduce", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "LIMIT", 200)
    return module


def interrupted(function, after, counts):
    """A function that ends the run at one of its calls, once."""

    def call(*args, **kwargs):
        counts.append(1)
        if len(counts) == after:
            raise KeyboardInterrupt
        return function(*args, **kwargs)

    return call


@pytest.mark.parametrize(("steps", "calls"), [(3, 12), (5, 14), (10, 19)])
def test_the_papers_grids_spend_what_the_paper_says(script, steps, calls):
    full = script.sb.scheduler("ddim")
    runge_kutta, plain = (script.PAPER[k](full, steps, 600) for k in ("pndm", "ddim"))
    assert (len(runge_kutta), len(plain)) == (calls, steps)
    assert plain[0][0] == 600
    assert plain[-1][0] == 0
    assert max(t for t, _ in runge_kutta) <= 600


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # networks of two steps are nothing to trust
def test_a_tiny_table_is_the_same_after_interruptions(script, tmp_path, monkeypatch, capsys):
    command = ["cifar10", "--tiny", "--features", "tests.test_reproduce:pooled", "--out"]
    generate, measured = script.sb.generate, {}
    for name, stops in {"whole": (), "stopped": (3, 12)}.items():
        counts = []
        for after in stops:
            counts.clear()
            monkeypatch.setattr(script.sb, "generate", interrupted(generate, after, counts))
            with pytest.raises(KeyboardInterrupt):
                script.main([*command, str(tmp_path / name)])
        counts.clear()
        monkeypatch.setattr(script.sb, "generate", interrupted(generate, 0, counts))
        script.main([*command, str(tmp_path / name)])
        measured[name] = (tmp_path / name / "table.json").read_text(), len(counts)
    assert measured["whole"][0] == measured["stopped"][0]
    assert measured["stopped"][1] <= measured["whole"][1] - 13 + 2  # a part that was under way is made again
    whole = json.loads(measured["whole"][0])
    assert [(r["sampler"], r["calls"]) for r in whole["rows"]] == [("dpm++2m", 1), ("dpm++2m", 3)]
    for row in whole["rows"]:
        for column in ("standard", "grid", "afs", "gaussian", "residual"):
            assert row[column]["mean"] > 0, column
        assert row["grid"]["choice"] in ("leading", "trailing", "linspace")
    assert [r["steps"] for r in whole["paper"]] == [3]
    text = (tmp_path / "whole" / "table.md").read_text()
    assert "42.31" in text  # the published FID stands beside
    assert "no evidence" in text
    page = (tmp_path / "whole" / "table.html").read_text()
    assert page.count("<table>") == 3
    rows = sum("choice" in cell for cell in whole["rows"][-1].values() if isinstance(cell, dict))
    with Image.open(tmp_path / "whole" / "samples.png") as picture:
        assert picture.size == (3 * (16 * 21 - 1), 3 * (21 * rows - 1))  # lines between them, three times as large
    script.main([*command, str(tmp_path / "whole"), "--page"])
    assert (tmp_path / "whole" / "table.md").read_text() == text
    # a whole run writes its tables into the documentation, over those of before
    page = tmp_path / "docs" / "natural-images.md"
    page.parent.mkdir()
    page.write_text((SCRIPT.parents[1] / "docs" / page.name).read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.setattr(script, "ROOT", tmp_path)
    whole["about"]["tiny"] = False
    for _ in range(2):
        script.write_pages(whole, tmp_path / "whole")
        written = page.read_text(encoding="utf-8")
    mine = written.split("measured:cifar10:begin")[1].split("measured:cifar10:end")[0]
    assert mine.count("| dpm++2m | 3 |") == 6  # the distances, and what they hide of five starts
    assert written.count(":begin") == 3
    assert "Not run to its end yet" in written
