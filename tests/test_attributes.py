"""Attributes of pictures: when each is decided, and how many samples have it."""

import copy
import dataclasses
import io
import json
import math
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from PIL import Image

import symbreak as sb
from symbreak.cli.commands import main
from symbreak.data.labels import attributes
from symbreak.metrics.attributes import attribute_classifier
from symbreak.networks.families import as_unet
from symbreak.phases.cloning import clones
from symbreak.phases.speciation import cloning_time
from symbreak.report.figures import attributes_figure
from symbreak.report.tables import tables
from symbreak.report.verdict import sentences
from symbreak.runtime.errors import InputError
from symbreak.studies.attributes import _seen
from tests.test_class_information import Conditional

SIDE, SPREAD = 8, 0.06
GAPS = {"Large": 1.2, "Small": 0.5}  # lengths of +-m along two patterns
SHARE = 0.35  # of Small; Large has half


def pictures(n, seed=0, share=SHARE):
    """Pixels of two independent attributes on grey with noise, in [-1, 1], and the attributes [n]."""
    rng = np.random.default_rng(seed)
    patterns = np.linalg.qr(np.random.default_rng(7).normal(size=(SIDE * SIDE, 2)))[0]
    has = {"Large": rng.random(n) < 0.5, "Small": rng.random(n) < share}
    x = SPREAD * rng.normal(size=(n, SIDE * SIDE))
    for k, (name, length) in enumerate(GAPS.items()):
        x += np.where(has[name], 1, -1)[:, None] * length / 2 * patterns[:, k]
    return x.reshape(n, 1, SIDE, SIDE), has


def written(path, n=600, seed=0, zoom=1, **more):
    x, has = pictures(n, seed)
    cells = []
    for one in ((x[:, 0] + 1) * 127.5).round().clip(0, 255).astype(np.uint8):
        stream = io.BytesIO()
        Image.fromarray(one.repeat(zoom, 0).repeat(zoom, 1)).save(stream, "PNG")
        cells.append({"bytes": stream.getvalue(), "path": None})
    rng = np.random.default_rng(1)
    columns = {**has, "Chance": rng.random(n) < 0.3, "Always": np.ones(n, bool), "Rare": np.arange(n) < 5, **more}
    pq.write_table(pa.table({"image": cells, **columns, "id": np.arange(n)}), path)
    return path


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return written(tmp_path_factory.mktemp("faces") / "faces.parquet")


def test_levels_of_planted_attributes(source, tmp_path):
    """Two Gaussians at +-m of variance s2 along m, that of the other classes: images are told apart Phi(z) of the time.

    z^2 = |m|^2 / (s2 + sigma^2): halfway from 1/2 to 1 at z = .674, free entropy at z = 1.
    """
    record = sb.attribute_levels(sb.images(source), run=sb.Run(tmp_path))
    rows = {row["attribute"]: row for row in record.content["rows"]}
    assert set(rows) == {"Large", "Small", "Chance"}  # one class, five images and a number an image are none
    for name, length in GAPS.items():
        row, m = rows[name], length / 2
        exact = math.sqrt((m / 0.67449) ** 2 - SPREAD**2)
        # 600 images, of which 3 % more or fewer are told apart by chance near .75: 10 % of sigma
        assert row["level"]["sigma"] == pytest.approx(exact, rel=0.15)
        assert row["low"]["sigma"] < row["level"]["sigma"] < row["high"]["sigma"]
        # covariances of their own, of which sampling errors count as differences, raise the level
        assert row["free_entropy"]["level"]["sigma"] == pytest.approx(math.sqrt(m**2 - SPREAD**2), rel=0.15)
        assert row["resolved"]
        assert row["balanced_accuracy"]["value"] > 0.95
    assert [row["attribute"] for row in record.content["rows"][:2]] == ["Large", "Small"]
    assert not rows["Chance"]["resolved"]
    assert rows["Chance"]["balanced_accuracy"]["value"] == pytest.approx(0.5, abs=0.1)
    page = sb.write_report(record, tmp_path / "r.html").read_text()
    assert "1 of 3 attributes are not resolved" in page
    assert "Rare" in " ".join(record.content["notes"])
    assert sb.Record.load(tmp_path).content == record.content
    names = [label.get_text() for label in record.plot(Figure().subplots()).get_yticklabels()]
    assert names[::-1][:2] == ["Large", "Small"]


def test_missing_values_are_left_out_of_an_attribute_only(tmp_path):
    has = pictures(300)[1]["Large"]
    column = [None if i % 3 == 0 else bool(v) for i, v in enumerate(has)]
    source = written(tmp_path / "x.parquet", 300, Large=column, Small=np.where(np.arange(300) % 2, "yes", "no"))
    data = sb.images(source)
    found = attributes(data, ["Large", "Small"])
    assert (found["Large"].codes < 0).sum() == 100
    assert found["Small"].names == ("no", "yes")
    part = data.take(np.arange(1, 300, 2), "odd")
    with pytest.raises(
        InputError, match=r"all 150 images of .* are 'yes' in the attribute 'Small': one class is empty"
    ):
        attributes(part, ["Small"])
    (row,) = sb.attribute_levels(data, ["Large"]).content["rows"]
    assert sum(row["counts"]) == 200


def test_composition_of_attributes(source, tmp_path):
    data, holdout = sb.images(source), sb.images(written(tmp_path / "t.parquet", 300, seed=3))
    made, has = pictures(400, seed=5, share=0.8)
    content = sb.evaluate(torch.from_numpy(made).float(), data, holdout, classify="attributes:Large,Small", cache=False)
    large, small, joint = content["composition"]
    for table, name in ((large, "Large"), (small, "Small")):
        assert table["attribute"] == name
        assert table["balanced_accuracy"]["resolved"]
        read = table["rows"][1]["samples"]
        assert read["share"] == pytest.approx(has[name].mean(), abs=0.01)
        assert read["share_low"] < read["share"] < read["share_high"]
        p = np.array([read["share"], 1 - read["share"]])
        assert table["entropy"]["samples"]["plug_in"] == pytest.approx(-(p * np.log2(p)).sum(), abs=1e-9)
    assert small["rows"][1]["train"]["share"] == pytest.approx(SHARE, abs=0.06)
    assert joint["attribute"] == "Large and Small"
    assert joint["rows"][0]["class"] == "not Large, not Small"
    both = (has["Large"] & has["Small"]).mean()
    assert joint["rows"][-1]["samples"]["share"] == pytest.approx(both, abs=0.01)
    x, run = torch.from_numpy(made).float(), sb.Run(tmp_path / "e")
    every = sb.evaluate(x, data, holdout, classify="attributes", cache=False, run=run)
    marks = {t["attribute"]: t["balanced_accuracy"]["resolved"] for t in every["composition"]}
    assert marks == {"Large": True, "Small": True, "Chance": False}
    record = sb.Record.load(tmp_path / "e")
    table = tables(record)[0]["attributes"]
    assert [[str(c) for c in row][::6] for row in table.rows] == [["Large", "yes"], ["Small", "yes"], ["Chance", "no"]]
    page = sb.write_report(record, tmp_path / "r.html").read_text()
    assert "Attributes, as attributes in pixels reads them" in page


BAD = [
    (("phases", "--attributes", "Beard"), "has no attribute 'Beard'. It has: Large, Small, Chance"),
    (("phases", "--attributes", "Always"), "in the attribute 'Always': one class is empty"),
    (("phases", "--attributes", "Rare"), "'Rare' has 5 images in its rarest class; expected at least 20"),
    (("phases", "--attributes", "all", "--clusters", "3"), "--clusters came with --attributes, which have classes"),
    (("phases", "--attributes", "all", "--pairs", "30"), "--pairs came with --attributes, and is asked of a network"),
    (("phases", "--attributes", "all", "--prompt", "a cat"), "--prompt came with --attributes"),
    (("phases", "--attributes", "all", "--null-label", "3"), "--null-label came with --attributes"),
    (("phases", "--attributes", "all", "--quick"), "--quick came with --attributes"),
    (("phases", "--labels", "Beard"), "has no label column 'Beard'"),
    (("evaluate", "--samples", "digits", "--classify", "attributes:Beard"), "has no attribute 'Beard'"),
    (("evaluate", "--samples", "digits", "--classify", "attributes:Rare"), "expected at least 20"),
    (("evaluate", "--model", "digits", "--classify", "attributes:Always"), "one class is empty"),
]


@pytest.mark.parametrize(("command", "said"), BAD)
def test_bad_input_is_one_line(source, capsys, command, said):
    with pytest.raises(SystemExit) as left:
        main([command[0], "--data", str(source), *command[1:]])
    assert left.value.code == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1


def test_the_command_goes_on_and_draws(source, tmp_path, capsys):
    for _ in range(2):
        with pytest.raises(SystemExit) as left:
            main(["phases", "--data", str(source), "--attributes", "Large,Chance", "--out", str(tmp_path), "--json"])
        assert left.value.code == 0
        out = json.loads(capsys.readouterr().out)
        assert [row["attribute"] for row in out["content"]["rows"]] == ["Large", "Chance"]
    assert (tmp_path / "report.html").is_file()
    with pytest.raises(SystemExit) as left:
        main(["phases", "--data", "digits", "--attributes", "all"])
    assert left.value.code == 2
    assert "digits has no columns of attributes" in capsys.readouterr().err


def test_a_classifier_of_attributes_answers_the_same_on_any_batch(source):
    judge = attribute_classifier(sb.images(source), None, sb.extractor("pixels"))
    x = torch.from_numpy(pictures(50, seed=9)[0]).float()
    whole, part = judge(x), judge(x[:7])
    for name in ("Large", "Small", "Chance"):
        torch.testing.assert_close(whole[name][:7], part[name])


def planted():
    """The exact law of the planted pictures, whose classes are those of Large."""
    patterns = torch.from_numpy(np.linalg.qr(np.random.default_rng(7).normal(size=(SIDE * SIDE, 2)))[0].T)
    signs = [(large, small) for large in (-1, 1) for small in (-1, 1)]
    halves = torch.tensor([GAPS["Large"] / 2, GAPS["Small"] / 2], dtype=torch.float64)
    means = torch.tensor(signs, dtype=torch.float64) * halves @ patterns
    weights = [0.5 * (SHARE if small > 0 else 1 - SHARE) for _, small in signs]
    law = sb.Mixture.from_parameters(means.reshape(4, 1, SIDE, SIDE), SPREAD**2, weights)
    law.classes = torch.tensor([0, 0, 1, 1])
    return law


@pytest.fixture(scope="module")
def answered(source, tmp_path_factory):
    """A record of a network that is the law of the pictures itself, with Large as its condition and none as class 2."""
    network, own = Conditional(planted()), sb.scheduler("ddpm")
    network.num_class_embeds, network.null_label = 3, 2
    pipe = SimpleNamespace(unet=as_unet(network, own), scheduler=own)
    effort = sb.Effort(pairs=200, steps=24, branches=8, turns=6, images=120)
    run = sb.Run(tmp_path_factory.mktemp("network"))
    return sb.attribute_levels(sb.images(source, labels="Large"), model=pipe, effort=effort, run=run)


def test_a_network_decides_attributes_where_its_law_does(answered, tmp_path):
    """One set of clones and of U-turns serves all: halfway is phi of two Gaussians at +-m, known from quadrature."""
    record, rows = answered, {row["attribute"]: row["network"] for row in answered.content["rows"]}
    for name, length in GAPS.items():
        prior = 0.5 if name == "Large" else SHARE
        pair = sb.Mixture.from_parameters([[-length / 2], [length / 2]], SPREAD**2, [1 - prior, prior])
        exact = cloning_time(pair, samples=100_000).sigma
        for what in ("clones", "u_turns"):
            found = rows[name][what]
            # the interval of 200 pairs; 24 steps read the crossing high by up to 13 %
            assert found["low"]["sigma"] < exact < 1.15 * found["high"]["sigma"], (name, what)
        assert rows[name]["classifier"]["resolved"]
        assert rows[name]["share"] == pytest.approx(prior, abs=0.1)
    known = rows["Large"]["information"]
    assert rows["Small"]["information"] is None
    assert known["limit"]["value"] == pytest.approx(math.log(2), rel=0.1)
    assert known["low"]["level"]["sigma"] < rows["Large"]["clones"]["level"]["sigma"] < known["high"]["level"]["sigma"]
    assert not rows["Chance"]["classifier"]["resolved"]
    page = sb.write_report(record, tmp_path / "r.html").read_text()
    assert "When does the network decide it?" in page
    assert "By its clones the network decides Large first" in page
    assert [row["title"] for row in record.content["along"]["rows"]][:3] == [
        "noised",
        "denoised by the network",
        "sampled again from here",
    ]
    assert len(record.plot(Figure().subplots()).lines) > 6
    figure = attributes_figure(record.content)
    figure.draw_without_rendering()
    boxes = [image.get_window_extent() for image in figure.findobj(AxesImage)]
    assert len(boxes) > 6
    assert [box.width / box.height for box in boxes] == pytest.approx([1.0] * len(boxes), rel=0.02)  # square pictures


def test_a_level_beyond_those_asked_about_is_told(answered, tmp_path):
    """Of a network that decides too early; one sentence and a cell, not a line an attribute."""
    pair = sb.Mixture.from_parameters([[-2.0], [2.0]], 0.25, [0.5, 0.5])
    sigma, steps = np.array([0.3, 0.5]), sb.schedule("ddpm-linear")
    crossing = clones(pair, sigma, lambda x: x[:, 0] > 0, pairs=100).crossing
    seen = _seen(crossing, sigma, steps)
    assert seen["beyond"] == {"side": "above", "sigma": 0.5}
    content = copy.deepcopy(answered.content)
    for row in content["rows"]:
        row["network"]["clones"] = seen
    resolved = sum(row["resolved"] and row["network"]["classifier"]["resolved"] for row in content["rows"])
    record = dataclasses.replace(answered, content=content)
    parts, notes = tables(record)
    assert [row[2].text for row in parts["network"].rows] == ["above 0.5"] * len(content["rows"])
    assert not any("levels asked about (" in note for note in [*parts["network"].notes, *notes])
    said = " ".join(sentences("attributes", content))
    assert f"Of {resolved} of {resolved} attributes the network's clones agree halfway at more than sigma 0.5" in said
    assert "last, at" not in said.split("network's clones")[1]


def test_pictures_along_the_axis_do_not_cover_each_other(answered):
    content = copy.deepcopy(answered.content)
    content["rows"][-1]["low"] = content["rows"][-1]["level"] | {"sigma": 1e-4}  # an axis of many decades
    figure = attributes_figure(content)
    figure.draw_without_rendering()
    boxes = [image.get_window_extent() for image in figure.findobj(AxesImage)]
    assert len(boxes) >= 6
    assert not any(a.x0 < b.x1 and b.x0 < a.x1 for i, a in enumerate(boxes) for b in boxes[:i] if abs(a.y0 - b.y0) < 1)
