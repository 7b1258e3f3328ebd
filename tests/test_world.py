"""Worlds: what a page shows is what the laws say, and its slider moves it (in headless Chromium)."""

import base64
import html.parser
import json
import math
import time
from io import BytesIO
from urllib.parse import unquote
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image

from symbreak.cli.commands import _own_law, _undrawn, main
from symbreak.data.readers import images
from symbreak.laws import Empirical, Mixture, Sphere
from symbreak.moments.one_pass import Moments
from symbreak.phases.bifurcations import bifurcation
from symbreak.report.html import write_report
from symbreak.report.record import Record
from symbreak.runtime.files import InputError
from symbreak.studies.point_network import train_point_network
from symbreak.studies.worlds import WORLDS, draw_world, explore_world
from tests.browser import browser  # noqa: F401

THETA_C = math.sqrt(math.sqrt(2) - 1)


@pytest.fixture(scope="module")
def two_deltas():
    return explore_world("two-deltas")


@pytest.fixture(scope="module")
def mixture():
    return explore_world("mixture")


def row(record, name, flow=None, frame=None):
    found = [r for r in record.content["critical"] if (r["name"], r["flow"], r["frame"]) == (name, flow, frame)]
    assert len(found) == 1
    return found[0]


def printed(record):
    """The size of what ``world --json`` prints."""
    return len(json.dumps(_undrawn(record)))


# --- content --------------------------------------------------------------------------------------


def test_two_deltas_against_closed_forms(two_deltas):
    c = two_deltas.content
    x = np.array(c["position"])
    for s, u in zip(c["sigma"], c["potential"]):
        a, std2 = 1 / math.hypot(1, s), s * s / (1 + s * s)
        # -x^2/4 - log p with p = 1/2 N(x; -a, std2) + 1/2 N(x; a, std2), up to a constant
        exact = -x * x / 4 + (x * x) / (2 * std2) - np.logaddexp(a * x / std2, -a * x / std2)
        # values are written with 7 digits
        np.testing.assert_allclose(u, exact - exact.min(), atol=2e-6 * max(u))
    assert row(two_deltas, "bifurcation", "sde", "vp")["alpha_vp"] == pytest.approx(THETA_C, abs=1e-10)
    assert row(two_deltas, "new wells", "sde", "vp")["alpha_vp"] == pytest.approx(THETA_C, abs=1e-8)
    assert row(two_deltas, "bifurcation", "sde", "vp")["ddpm_step"] == 292
    assert row(two_deltas, "bifurcation", "ode", "vp")["level"] is None
    assert "unstable at every level" in row(two_deltas, "bifurcation", "ode", "vp")["note"]
    for name, flow, frame in (
        ("bifurcation", "sde", "ve"),
        ("bifurcation", "ode", "ve"),
        ("signal-to-noise", None, None),
        ("free-entropy", None, None),
    ):
        assert row(two_deltas, name, flow, frame)["level"]["sigma"] == pytest.approx(1.0, abs=1e-9)


def test_pitchfork_of_two_deltas(two_deltas):
    """(1 + theta^2) x = 2 theta tanh(theta x / (1 - theta^2)) on both outer branches (arXiv:2305.19693)."""
    c = two_deltas.content
    theta = 1 / np.hypot(1, np.array(c["branch_sigma"]))
    central, *outer = c["branches"]
    assert len(outer) == 2
    assert central["central"]
    assert central["x"] == pytest.approx(np.zeros(len(theta)), abs=1e-9)
    assert central["stable"] == [bool(t < THETA_C) for t in theta]
    ends = []
    for branch in outer:
        x = np.array([math.nan if v is None else v for v in branch["x"]])
        here = np.isfinite(x)
        assert (here == (theta > THETA_C)).all()
        assert all(np.array(branch["stable"])[here])
        t = theta[here]
        miss = (1 + t**2) * x[here] - 2 * t * np.tanh(t * x[here] / (1 - t**2))
        # x is written with 7 digits, and the slope of the equation is at most 2 in theta < 1
        assert np.abs(miss).max() < 5e-7
        ends.append(np.sign(x[here][-1]))
    assert sorted(ends) == [-1, 1]


def test_trajectories_end_where_they_are_said_to(two_deltas, mixture):
    for record, ends in ((two_deltas, [-1.0, 1.0]), (mixture, [2.0, -1.0, -1.0])):
        t = record.content["trajectories"]
        last = np.array(t["x"])[:, -1]
        alpha = 1 / math.hypot(1, record.content["sigma"][-1])
        wanted = alpha * np.array(ends)[t["end"]]
        # the last state still carries noise of size alpha sigma and the class's own spread: 5 deviations
        spread = alpha * math.sqrt(record.content["sigma"][-1] ** 2 + (0.1 if record is mixture else 0.0))
        assert np.abs(last - wanted).max() < 5 * spread
        assert set(t["end"]) == set(range(len(ends)))  # 60 trajectories miss one of 3 classes once in 1e10


def test_mixture_is_of_first_order(mixture):
    """The wells appear at more noise than the centre destabilises at."""
    wells, centre = row(mixture, "new wells", "sde", "vp"), row(mixture, "bifurcation", "sde", "vp")
    assert printed(mixture) < 20_000
    assert wells["level"]["sigma"] > 1.04 * centre["level"]["sigma"]
    # VE at the centre: the posterior there is uniform over classes, with covariance
    # v s^2 / (v + s^2) + (s^2 / (v + s^2))^2 M / 2 for means of norm^2 M = 4 in the plane: s^2 = M / 2 - v
    assert row(mixture, "bifurcation", "sde", "ve")["level"]["sigma"] == pytest.approx(math.sqrt(2 - 0.1), abs=1e-9)


def test_sphere():
    record = explore_world("sphere")
    assert row(record, "bifurcation", "sde", "vp")["alpha_vp"] == pytest.approx(0.8489753943, abs=1e-9)
    assert row(record, "bifurcation", "sde", "ve")["level"]["sigma"] == pytest.approx(math.sqrt(1 / 3), abs=1e-9)
    assert record.content["cloning"] is None
    assert printed(record) < 20_000


@pytest.mark.parametrize("own", [Sphere(5), Mixture.from_parameters([[-2.0, 0.0], [2.0, 0.0]], [0.1, 0.1])])
def test_a_world_of_ones_own(own, tmp_path):
    record = draw_world(own, tmp_path / "own.html")
    found = row(record, "bifurcation", "sde", "ve")["level"]["sigma"]
    assert found == pytest.approx(bifurcation(own, "sde", "ve").sigma, rel=1e-9)
    assert record.content["title"] == repr(own)
    assert printed(record) < 20_000


def test_a_world_of_points_away_from_the_origin():
    """Drawn through the mean: two points, moved, have the wells of two points."""
    content = explore_world(Empirical([[4.0], [6.0]])).content
    assert "2 equal points" in content["lead"]
    wells = [b["x"][-1] for b in content["branches"] if b["stable"][-1]]
    alpha = 1 / math.hypot(1, content["sigma"][-1])
    assert sorted(wells) == pytest.approx([-alpha, alpha], rel=1e-5)
    assert all(b["on_path"][-1] for b in content["branches"])


def test_laws_of_the_command(tmp_path):
    means, points = tmp_path / "means.csv", tmp_path / "points.npy"
    means.write_text("-2,0\n2,1\n")
    np.save(points, np.arange(1200.0).reshape(600, 2))
    assert _own_law("sphere", None, 50, None, None, None).dim == 50
    assert _own_law("sphere", None, None, None, None, None) == "sphere"
    law = _own_law("mixture", None, None, str(means), ".25,.75", ".1")
    assert law.means.tolist() == [[-2, 0], [2, 1]]
    assert law.weights.tolist() == [0.25, 0.75]
    assert float(law.moments.trace) == pytest.approx(0.2 + 0.25 * 0.75 * 17)
    assert len(_own_law("data", str(points), None, None, None, None)) == 500


def test_points_of_many_dimensions_are_shown_in_their_leading_directions():
    generator = torch.Generator().manual_seed(0)
    few = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    few = (few - few.mean(0)) * torch.tensor([3.0, 2.0, 1.0])
    turn = torch.linalg.qr(torch.randn(40, 40, generator=generator, dtype=torch.float64))[0]
    plane, whole = Empirical(few), Empirical((few @ turn[:3] + 5).reshape(4, 1, 5, 8))
    a, b = explore_world(plane), explore_world(whole)
    assert a.content["notes"] == []
    assert max(printed(a), printed(b)) < 20_000
    assert "of 40 dimensions are shown in their 16 leading principal directions, with 100.0%" in b.content["notes"][0]
    # 13 directions without any variance change nothing but the draws of the collapse
    for one, other in zip(a.content["critical"], b.content["critical"], strict=True):
        assert one["name"] == other["name"]
        if one["level"] is not None and not one["name"].startswith("collapse"):
            assert one["level"]["sigma"] == pytest.approx(other["level"]["sigma"], rel=1e-4), one["name"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("mixture --means FILE --weights .25 --variance .1", "1 weights for 2 components"),
        ("mixture --means FILE --weights .2,.2 --variance .1", "sum to 0.4"),
        ("mixture --means FILE --weights a,b --variance .1", "--weights a,b"),
        ("mixture --means FILE --variance -1", "variance -1"),
        ("mixture --means FILE", "--variance is missing"),
        ("mixture --weights .5,.5", "--means FILE is missing"),
        ("mixture --means no.csv --variance 1", "no.csv does not exist"),
        ("sphere --dim", "Invalid value for --dim"),
        ("sphere --dim -3", "--dim -3; expected at least 2"),
        ("sphere --dim 1000", "1,000 dimensions"),
        ("two-deltas --dim 3", "belongs to symbreak world sphere"),
        ("data", "FILE of symbreak world data FILE is missing"),
        ("data no.csv", "no.csv does not exist"),
        ("data SAME", "no spread"),
    ],
)
def test_bad_worlds_of_ones_own(arguments, said, tmp_path, capsys):
    (tmp_path / "means.csv").write_text("-2,0\n2,1\n")
    (tmp_path / "same.csv").write_text("1,1\n1,1\n")
    line = arguments.replace("FILE", str(tmp_path / "means.csv")).replace("SAME", str(tmp_path / "same.csv"))
    with pytest.raises(SystemExit) as end:
        main(["world", *line.split(), "--out", str(tmp_path / "world.html")])
    assert end.value.code == 2
    (error,) = (v for v in capsys.readouterr().err.strip().splitlines() if v.startswith("symbreak: "))
    assert said in error.replace('"', "")  # some versions of cyclopts quote an option
    assert not (tmp_path / "world.html").exists()


def test_the_seed_is_of_trajectories_alone(two_deltas):
    other = explore_world("two-deltas", seed=1).content
    assert other["trajectories"]["x"] != two_deltas.content["trajectories"]["x"]
    assert {**other, "trajectories": 0} == {**two_deltas.content, "trajectories": 0}


def test_global_random_state_is_left_alone():
    before = torch.random.get_rng_state()
    train_point_network(torch.tensor([[-1.0], [1.0]]), steps=5, batch=8)
    assert torch.equal(before, torch.random.get_rng_state())


def test_bad_input(tmp_path):
    with pytest.raises(InputError, match="two-deltas, sphere, mixture, digits"):
        explore_world("torus")
    with pytest.raises(InputError, match="two-deltas"):
        explore_world("sphere", train=True)
    with pytest.raises(InputError, match="lacks"):
        write_report(Record("study", {}, {}), tmp_path / "a.html")
    with pytest.raises(InputError, match="lacks"):
        write_report(Record("world", {}, {"title": "x"}), tmp_path / "a.html")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_network_bifurcates_where_the_law_does():
    """Within 5 % in alpha, trained in under a minute: the first experiment of arXiv:2305.19693."""
    wall, processor = time.perf_counter(), time.process_time()
    record = explore_world("two-deltas", train=True)
    network, share = record.content["network"], (time.process_time() - processor) / (time.perf_counter() - wall)
    assert network["training"]["seconds"] * min(1.0, share) < 60  # of a core, also where others use the machine
    assert printed(record) < 20_000
    assert network["alpha_exact"] == pytest.approx(THETA_C, abs=1e-10)
    assert abs(network["alpha"] / THETA_C - 1) < 0.05
    wells = [b for b in network["branches"] if b["stable"][-1]]
    # two wells at the lowest level, at the data, to a few per cent
    assert sorted(b["x"][-1] for b in wells) == pytest.approx([-1, 1], abs=0.05)


@pytest.mark.slow
def test_digits():
    record = explore_world("digits")
    c = record.content
    assert printed(record) < 20_000
    # ten classes: the well that the centre becomes, and the others' born in folds
    wells = [b for b in c["branches"] if any(b["stable"])]
    assert wells[0]["central"]
    assert len(wells) >= 8
    assert len({b["class"] for b in wells}) == len(wells)
    first = row(record, "new wells", "sde", "ve")
    assert first["level"]["sigma"] == pytest.approx(max(b["fold"] for b in wells[1:]), rel=1e-12)
    # a Gaussian of top eigenvalue v: the VP criterion fires at alpha-bar = 1 / (v - 1), the VE one never
    v = Moments.fit(images("digits")).spectrum(1).values[0]
    fired = row(record, "bifurcation, one Gaussian", "sde", "vp")
    assert fired["level"]["alpha_bar"] == pytest.approx(1 / (v - 1), rel=1e-6)
    # spectral times correct v for how much a sample's largest eigenvalue is too large: by 2 % of 1,797 digits
    top = row(record, "signal-to-noise")["level"]["sigma"] ** 2
    assert 0.96 * v < top < v
    assert row(record, "bifurcation, one Gaussian", "sde", "ve")["level"] is None
    assert row(record, "spectral", None, "vp")["level"]["sigma"] == pytest.approx(math.sqrt(top - 1), rel=1e-9)


# --- page -----------------------------------------------------------------------------------------


class Page(html.parser.HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.links, self.data, self.policy, self._in = [], "", "", False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.links += [values[k] for k in ("src", "href", "action") if k in values]
        if values.get("http-equiv") == "Content-Security-Policy":
            self.policy = values["content"]
        self._in = values.get("type") == "application/json"

    def handle_data(self, data):
        self.data += data if self._in else ""


def test_page_is_self_contained(two_deltas, tmp_path):
    text = write_report(two_deltas, tmp_path / "world.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.links == []
    assert page.policy.startswith("default-src 'none'")
    assert "http" not in text.replace("http://www.w3.org/2000/svg", "").replace("http-equiv", "")
    assert len(text) < 1_000_000
    shown = json.loads(page.data)
    assert shown["potential"] == two_deltas.content["potential"]
    assert len(shown["rows"]) == text.count("<tr>") - 1 == len(two_deltas.content["critical"])


def test_page_escapes(two_deltas, tmp_path):
    bad = "</script><script>alert(1)</script>"
    record = Record("world", two_deltas.settings, {**two_deltas.content, "title": bad, "axis": bad})
    text = write_report(record, tmp_path / "world.html").read_text(encoding="utf-8")
    assert bad not in text
    assert text.count("</script>") == 2


def test_command_line(two_deltas, tmp_path, capsys):
    out = tmp_path / "deep" / "world.html"
    with pytest.raises(SystemExit) as end:
        main(["world", "two-deltas", "--out", str(out), "--json"])
    assert end.value.code == 0
    told = json.loads(capsys.readouterr().out)
    assert told["kind"] == "world"
    whole = json.loads(json.dumps(two_deltas.content))
    assert all(whole[k] == v for k, v in told["content"].items())
    assert told["content"]["critical"]
    assert printed(two_deltas) < 20_000
    assert told["out"] == str(out)
    assert out.is_file()
    for arguments in (["world", "torus"], ["world", "sphere", "--train"], ["world", "sphere", "--out", str(tmp_path)]):
        with pytest.raises(SystemExit) as end:
            main(arguments)
        assert end.value.code == 2
        told = capsys.readouterr()
        assert told.out == ""
        assert len(told.err.strip().splitlines()) == 1
    with pytest.raises(SystemExit):
        main(["world", "torus"])
    error = capsys.readouterr().err
    assert all(name in error for name in WORLDS)


# --- browser --------------------------------------------------------------------------------------


def keys(browser, text):  # noqa: F811
    element = browser.ask("POST", "/element", {"using": "css selector", "value": "#sigma"})
    browser.ask("POST", f"/element/{next(iter(element.values()))}/value", {"text": text})
    return browser.run("return {...document.getElementById('well').dataset}")


END, HOME, LEFT = "\ue010", "\ue011", "\ue012"


def test_slider_splits_the_potential(browser, two_deltas, tmp_path):  # noqa: F811
    path = write_report(two_deltas, tmp_path / "world.html")
    browser.open(path.as_uri())
    sigma = two_deltas.content["sigma"]
    high = keys(browser, HOME)
    assert float(high["sigma"]) == pytest.approx(sigma[0], rel=1e-9)
    assert high["minima"] == "1"
    assert float(high["at"]) == 0
    low = keys(browser, END)
    assert float(low["sigma"]) == pytest.approx(sigma[-1], rel=1e-9)
    assert low["minima"] == "2"
    # wells at the data, to the step of the drawn path
    step = two_deltas.content["position"][1] - two_deltas.content["position"][0]
    assert [float(v) for v in low["at"].split()] == pytest.approx([-1, 1], abs=step)
    assert float(keys(browser, LEFT)["sigma"]) == pytest.approx(sigma[-2], rel=1e-9)
    critical = bifurcation(Empirical([[-1.0], [1.0]])).sigma
    seen = browser.run(
        """const out = [], slider = document.getElementById("sigma"), well = document.getElementById("well");
        for (let k = 0; k <= +slider.max; k++) {
          slider.value = k; slider.dispatchEvent(new Event("input"));
          out.push([+well.dataset.sigma, +well.dataset.minima, well.querySelectorAll("circle").length,
                    slider.getAttribute("aria-valuetext")]);
        }
        return out;"""
    )
    assert [s for s, *_ in seen] == pytest.approx(sigma, rel=1e-9)
    # at every level: one well above the critical one, two wells and the centre below
    for s, minima, dots, text in seen:
        assert (minima, dots) == ((1, 1) if s > critical else (2, 3)), s
        assert f"sigma {s:.3f}" in text
    errors = [e for e in browser.ask("POST", "/se/log", {"type": "browser"}) if e["level"] == "SEVERE"]
    assert errors == []


def test_link_and_click_set_the_level(browser, mixture, tmp_path):  # noqa: F811
    path = write_report(mixture, tmp_path / "world.html")
    sigma = np.array(mixture.content["sigma"])
    browser.open(path.as_uri() + "#sigma=1.83")
    at = float(browser.run("return document.getElementById('well').dataset.sigma"))
    assert at == pytest.approx(sigma[np.abs(np.log(sigma / 1.83)).argmin()], rel=1e-9)
    # between the fold and the centre's own crossing there are two wells on the axis: centre and class 0
    fold, centre = (row(mixture, n, "sde", "vp")["level"]["sigma"] for n in ("new wells", "bifurcation"))
    assert centre < at < fold
    assert browser.run("return document.getElementById('well').dataset.minima") == "2"
    browser.run(
        """const f = document.getElementById("fork"), r = f.getBoundingClientRect();
        const clientX = r.left + r.width * 507 / 520, clientY = r.top + 20;
        f.dispatchEvent(new MouseEvent("click", {clientX, clientY}));"""
    )
    assert float(browser.run("return document.getElementById('well').dataset.sigma")) == pytest.approx(sigma[-1])


def test_panels_are_saved_and_fit_a_telephone(browser, mixture, tmp_path):  # noqa: F811
    path = write_report(mixture, tmp_path / "world.html")
    browser.open(path.as_uri())
    panels = ("well", "map", "fork", "paths", "times")
    sigma = mixture.content["sigma"]
    lines = {r["level"]["sigma"] for r in mixture.content["critical"] if r["level"]}
    for name in panels:
        drawn = browser.run(
            f"return [...document.querySelectorAll('#{name} [data-critical]')].map(n => +n.dataset.critical)"
        )
        assert set(drawn) <= lines
        for s in lines:  # within half a per cent one line stands for several
            assert not sigma[-1] <= s <= sigma[0] or any(abs(v / s - 1) < 0.005 for v in drawn)
    browser.run(
        """window.saved = {};
        HTMLAnchorElement.prototype.click = function () { window.saved[this.download] = this.href; };
        for (const button of document.querySelectorAll("[data-save]")) button.click();"""
    )
    saved = browser.until("return Object.keys(window.saved).length === 10 && window.saved", 30)
    assert set(saved) == {f"world-mixture-{name}.{kind}" for name in panels for kind in ("svg", "png")}
    for name in panels:
        drawing = ElementTree.fromstring(unquote(saved[f"world-mixture-{name}.svg"].partition(",")[2]))
        assert any("new wells" in (node.text or "") for node in drawing.iter("{http://www.w3.org/2000/svg}text"))
        picture = Image.open(BytesIO(base64.b64decode(saved[f"world-mixture-{name}.png"].partition(",")[2])))
        assert picture.width == 2 * float(drawing.get("width"))
        if name == "map":  # painted, not blank
            assert len(picture.convert("RGB").crop((110, 40, 900, 500)).getcolors(2**20)) > 100
    browser.resize(480, 900)
    assert browser.overflow() <= 0
    wide = "return [...document.querySelectorAll('.scroll')].some(e => e.scrollWidth > e.clientWidth)"
    assert not browser.run(wide)
    assert browser.run("return document.getElementById('times').viewBox.baseVal.width") == 520
    assert browser.errors() == []
