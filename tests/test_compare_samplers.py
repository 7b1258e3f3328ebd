import json
from dataclasses import replace
from html import escape
from pathlib import Path

import pytest

from symbreak.data.readers import images
from symbreak.laws import Gaussian
from symbreak.laws.saving import law_hash
from symbreak.networks.samplers import scheduler
from symbreak.noise import NoiseLevel
from symbreak.report.html import write_report
from symbreak.report.record import Record
from symbreak.report.tables import tables
from symbreak.report.verdict import headline, sentences
from symbreak.runtime.files import InputError
from symbreak.runtime.run import Run
from symbreak.start.fit import fit_start
from symbreak.start.loading import load_pipeline
from symbreak.studies.compare_samplers import Study, _chooser, _plan, run
from symbreak.studies.diagnose import Effort, diagnose
from tests.worlds import small_choice

TINY = Study(
    samplers=("ddim", "pndm", "dpm++2m-karras"),
    calls=(3,),
    samples=40,
    repeats=2,
    selection=20,
    sweep=(0.6, 1.0),
    micro_batch=20,
    reference_calls=4,
)


@pytest.fixture(scope="module", autouse=True)
def a_small_choice():
    """These tests are of the study."""
    with small_choice():
        yield


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    return run(TINY, run=Run(tmp_path_factory.mktemp("study")))


FEW = Effort(losses=6, points=400, queries=100)  # of diagnoses whose spectrum and page alone are looked at


def without_timings(record):
    return json.dumps({k: v for k, v in record.to_dict().items() if k != "timings"}, sort_keys=True)


def test_the_record_holds_the_whole_table(record):
    rows = record.content["rows"]
    assert [(r["sampler"], r["calls"]) for r in rows] == [("ddim", 3), ("pndm", 3), ("dpm++2m-karras", 3)]
    for row in rows:
        for column in ("standard", "spectral", "best", "noised", "auto"):
            cell = row[column]
            assert cell["calls"] == 3
            assert cell["distance"]["repeats"] == 2
            assert cell["distance"]["samples"] == 20
            assert cell["distance"]["reference"] == 899
        assert row["best"]["level"] == row["noised"]["level"]
        spacings = ("leading", "linspace", "trailing")
        grids = ("", "uniform, ") if row["sampler"] == "dpm++2m-karras" else ("",)
        assert sorted(row["spacings"]) == sorted(f"{grid}{spacing}" for grid in grids for spacing in spacings)
        assert row["standard"]["level"]["sigma"] > 3 > row["spectral"]["level"]["sigma"]
        # the chosen candidate is the best of those tried on the selection seeds
        best = min(row["sweep"], key=lambda s: s["pooled"])
        assert (best["factor"], best["level_grid"]) == (row["best"]["factor"], row["best"]["level_grid"])
        assert {s["level_grid"] for s in row["sweep"]} == ({"own", "uniform"} if len(grids) == 2 else {"own"})
        assert min(row["spacings"], key=row["spacings"].get) == row["standard"]["spacing"]
    assert rows[1]["steps"] == 2  # PNDM spends one call more than steps
    assert record.content["reference"]["calls"] == 4
    # three calls from white noise are hopeless, three from the fitted law are not
    assert rows[0]["spectral"]["distance"]["mean"] < rows[0]["standard"]["distance"]["mean"]


def test_the_table_has_its_cells_counts_and_the_difference_on_the_same_seeds(record):
    table = tables(record)[0]["starts"]
    cell = record.content["rows"][0]["standard"]["distance"]
    assert f"{cell['samples']} images x {cell['repeats']} repeats" in table.title
    assert "for comparison" in " ".join(table.notes).lower() or record.content["reference"] is None
    for row in record.content["rows"]:
        gap, gain = [row[k]["distance"]["mean"] for k in ("standard", "best")], row["gain"]
        assert gain["value"] == pytest.approx(gap[0] - gap[1])
        assert gain["low"] < gain["value"] < gain["high"]
        for key in ("best", "auto"):
            times = row["gains"][key]
            assert times["value"] == pytest.approx(gap[0] / row[key]["distance"]["mean"])
            assert 0 < times["low"] < times["value"] < times["high"]


def test_the_column_auto_is_the_start_that_fit_start_chooses():
    pipe, data = load_pipeline("digits"), images("digits")
    full = scheduler("ddim", like=pipe.scheduler)
    plan = _plan("ddim", full, 3, Gaussian.fit(data), NoiseLevel(1.3), ())
    assert {grid for grid, _ in plan.swept} == {"own"}
    auto, start = _chooser(Study(), pipe, data, classes=False)(plan), fit_start(data, pipe.unet, full, 3)
    assert auto.level == start.level
    assert law_hash(auto.law) == law_hash(start.law)


def test_the_verdict_claims_no_more_than_the_intervals(record):
    content = json.loads(json.dumps(record.to_dict()))["content"]
    row = headline(content)
    assert row["sampler"] == min(content["rows"], key=lambda r: min(r["spacings"].values()))["sampler"]
    assert content["verdict"] == sentences("study", content) == record.verdict
    for low, high, said in ((1.1, 4.0, "2 [1.1, 4] times nearer"), (0.9, 4.0, "not told"), (0.2, 0.8, "times farther")):
        row["gains"]["auto"] = {"value": 2.0 if high > 1 else 0.5, "low": low, "high": high}
        assert said in sentences("study", content)[0]
    row["gains"]["auto"] = None
    assert "without an interval" in sentences("study", content)[0]
    row["auto"] = None  # as in records of before
    assert "the late start at its best level" in sentences("study", content)[0]


def test_an_interrupted_study_ends_with_the_same_record(record, tmp_path):
    """And takes no cells of another study, though they lie in its folder under the same names."""
    other = Run(tmp_path).identified({"kind": "study", "samples": 7})
    other.value("choose/ddim/3/leading", lambda: 1e9)
    (theirs,) = tmp_path.glob("blocks-*")
    calls = 0

    def stop(stage, done, total):
        nonlocal calls
        calls += stage == "table"
        if calls == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(TINY, run=Run(tmp_path, progress=stop))
    assert not (tmp_path / "record.json").exists()
    (cells,) = (p for p in tmp_path.glob("blocks-*/cells.json") if p.parent != theirs)
    kept = json.loads(cells.read_text())["cells"]
    assert len(kept) > 5
    resumed = run(TINY, run=Run(tmp_path))
    assert without_timings(resumed) == without_timings(record)
    assert list(tmp_path.glob("blocks-*")) == [theirs]
    assert without_timings(Record.load(tmp_path)) == without_timings(record)


def test_the_report_is_whole_and_alone(record, tmp_path):
    html = write_report(record, tmp_path / "r.html").read_text()
    assert html.count("<svg") == 3  # two of the spectrum, and the sweep
    assert html.count("<img") == 1 + 5 * 3 + 3  # held-out images and five columns; the headline shows three again
    assert html.index(escape(record.verdict[0])) < html.index("<img") < html.index("<svg")
    for text in ("dpm++2m-karras", "speciation", "digits-classifier", "Seconds per stage", "torch"):
        assert text in html
    for outside in ("http://", "https://", 'src="/', "<script"):
        assert outside not in html.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
            "http://creativecommons.org", ""
        ).replace("https://matplotlib.org", "")
    again = write_report(record, tmp_path / "r2.html").read_text()
    assert again == html


def test_names_are_escaped_in_the_report(record, tmp_path):
    raw = json.loads(json.dumps(record.to_dict()))
    raw["content"]["data"]["name"] = "<script>alert(1)</script>"
    raw["content"]["rows"][0]["best"]["grid"] = '"><script>'
    bad = Record(raw["kind"], raw["settings"], raw["content"])
    with pytest.raises(InputError, match="damaged"):
        write_report(bad, tmp_path / "r.html")
    raw["content"]["rows"][0]["best"]["grid"] = ""
    html = write_report(bad, tmp_path / "r.html").read_text()
    assert "<script>" not in html
    assert "&lt;script&gt;" in html


def test_a_diagnosis_without_a_network(tmp_path):
    found = diagnose(replace(images("digits"), labels=None, classes=()), effort=FEW)
    critical = found.content["speciation"]["[-1, 1]"]
    assert critical["low"]["sigma"] < critical["level"]["sigma"] < critical["high"]["sigma"]
    assert critical["level"]["step"] == pytest.approx(315, abs=1)
    assert found.content["speciation"]["[0, 1]"]["level"] is None
    html = write_report(found, tmp_path / "p.html").read_text()
    assert "at most 1" in html
    assert html.count("<svg") == 4  # every criterion on one axis, all other curves, and two of the spectrum


def test_records_refuse_what_is_no_record(tmp_path):
    for text, match in (
        ("{}", "no symbreak record"),
        ('{"format": "symbreak.record", "version": 99}', "another version"),
        ('{"format": "symbreak.record", "version": 1, "kind": "study"}', "damaged"),
        ("nope", "not JSON"),
    ):
        (tmp_path / "record.json").write_text(text)
        with pytest.raises(InputError, match=match):
            Record.load(tmp_path)
    with pytest.raises(InputError, match="cannot be read"):
        Record.load(tmp_path / "absent.json")
    with pytest.raises(InputError, match="no report for records"):
        write_report(Record("other", {}, {}), tmp_path / "x.html")
    with pytest.raises(InputError, match="damaged"):
        write_report(Record("study", {}, {}), tmp_path / "x.html")
    assert not (tmp_path / "x.html").exists()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"samples": 3}, "at least 2 samples a repeat"),
        ({"samplers": ("magic",)}, "unknown sampler"),
        ({"model": "nope"}, "does not exist"),
        ({"calls": (3, 2), "samplers": ("ddim", "pndm")}, "too few"),
        ({"features": "magic"}, "unknown extractor"),
        ({"calls": (3, 5, 3)}, "3, 5, 3: a number of network evaluations comes twice"),
        ({"samplers": ("ddim", "ddim")}, "a sampler comes twice"),
    ],
)
def test_bad_studies(change, match, tmp_path):
    with pytest.raises(InputError, match=match):
        run(Study(**{**TINY.__dict__, **change}), run=Run(tmp_path / "out"))
    assert not (tmp_path / "out" / "record.json").exists()


def test_the_old_order_of_arguments_names_the_new_one():
    with pytest.raises(InputError, match=r"run\(study, run=sb.Run\('out'\)\)"):
        run(TINY, "out")
    with pytest.raises(InputError, match=r"run\(out=...\) is now run\(run=sb.Run\(folder\)\)"):
        run(TINY, out="out")


def test_a_network_of_another_shape(tmp_path):
    import numpy as np

    np.save(tmp_path / "x.npy", np.random.default_rng(0).integers(0, 255, (20, 16, 16), dtype=np.uint8))
    with pytest.raises(InputError, match=r"makes images of \(1, 8, 8\), but the data are \(1, 16, 16\)"):
        run(Study(**{**TINY.__dict__, "data": str(tmp_path / "x.npy")}))


def test_a_record_draws_the_same_after_it_was_saved(tmp_path):
    """An interval that touches Lambda = 1 has an infinite log-SNR, which JSON writes as a string."""
    import numpy as np

    x = np.random.default_rng(5).normal(size=(60, 1, 2, 2)) * np.sqrt([1.6, 0.5, 0.4, 0.3]).reshape(1, 1, 2, 2) / 4
    found = diagnose(images(x, value_range=(-1, 1)), effort=FEW)
    scaled = found.content["speciation"]["[-1, 1]"]
    scaled.update(
        level=scaled["level"] or {"sigma": 1.0, "ou_time": 0.3, "log_snr": 0.0, "alpha_bar": 0.5, "step": 3.0}
    )
    scaled["low"] = {"sigma": 0.0, "ou_time": 0.0, "log_snr": float("inf"), "alpha_bar": 1.0, "step": None}
    scaled["high"] = {"sigma": 2.0, "ou_time": 0.8, "log_snr": -1.4, "alpha_bar": 0.2, "step": 5.0}
    found.save(tmp_path)
    fresh = write_report(found, tmp_path / "a.html").read_text()
    assert write_report(Record.load(tmp_path), tmp_path / "b.html").read_text() == fresh
    assert "inf" in fresh


def test_records_are_json_without_nan(tmp_path):
    path = Record("phases", {"a": float("nan")}, {"b": [float("inf"), {"c": (1, 2)}]}).save(tmp_path)
    raw = json.loads(Path(path).read_text())
    assert raw["settings"]["a"] is None
    assert raw["content"]["b"] == ["inf", {"c": [1, 2]}]
