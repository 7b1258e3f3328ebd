"""Class-conditional networks in audit, study and phases."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import symbreak as sb
from symbreak.networks.families import NetworkDenoiser, as_unet, denoiser
from symbreak.phases.class_entropy import class_entropy
from symbreak.report.tables import tables
from symbreak.runtime.errors import InputError
from symbreak.runtime.run import Run
from symbreak.start import choose
from symbreak.start.classes import Classes
from symbreak.studies.ask_network import _class_information
from symbreak.studies.compare_samplers import Study, run
from symbreak.studies.diagnosis import Diagnosis, some_images
from symbreak.studies.evaluate import evaluate_network
from symbreak.studies.measure import pipeline_of
from tests.test_class_information import Conditional
from tests.test_cli import symbreak
from tests.test_conditions import folder  # noqa: F401  a fixture
from tests.test_diagnose import TINY

SMALL = sb.Effort(**{**TINY.__dict__, "pairs": 16, "steps": 6, "branches": 4, "losses": 6, "points": 200})


@pytest.fixture(scope="module")
def digits():
    """The exact mixture of the digits' classes as a network with a null class, and the data."""
    data = sb.images("digits")
    network = as_unet(Conditional(sb.PrincipalMixture.fit(data, labels=True, leading=6)), sb.scheduler("ddpm"))
    return data, SimpleNamespace(unet=network, scheduler=sb.scheduler("ddpm"))


def test_audit_samples_the_classes_and_counts_both_evaluations(capsys, folder, tmp_path):  # noqa: F811
    common = (
        "audit",
        "--data",
        "digits",
        "--model",
        folder,
        "--sampler",
        "ddim",
        "--steps",
        4,
        "--count",
        12,
        "--json",
    )
    code, out, err = symbreak(capsys, *common, "--limit", 100)
    assert code == 0, err
    made = json.loads(out)["settings"]["made"]
    assert (made["calls"], made["classes"]["shares"]["0"], "guidance" in made) == (4, 10, False)
    more = ("--class", "1,2", "--guidance", 2, "--window", "1,20")
    code, out, err = symbreak(capsys, *common, *more)
    assert code == 0, err
    made = json.loads(out)["settings"]["made"]
    assert made["classes"] == {"in_turn": [1, 2]}
    assert (made["calls"], made["guidance"]) == (6, {"scale": 2.0, "window": [1.0, 20.0], "steps": 2})
    for wrong, line in ((("--class", "12"), "the class 12, but"), (("--guidance", "nan"), "a guidance scale of nan")):
        code, _, err = symbreak(capsys, *common, *wrong)
        assert (code, line in err) == (2, True)
    code, _, err = symbreak(capsys, "audit", "--data", "digits", "--guidance", 2)
    assert (code, "belong to a network" in err) == (2, True)


def test_a_study_samples_the_classes_of_the_data(digits):
    data, pipe = digits
    tiny = Study(samplers=("ddim",), calls=(3,), samples=40, repeats=2, selection=20, sweep=(1.0,), micro_batch=20,
                 reference_calls=0)  # fmt: skip
    record = run(tiny, pipe)
    row = record.content["rows"][0]
    # The exact network has the classes' own laws: from the data's own noised images on it stays with their classes.
    assert row["noised"]["distance"]["mean"] < row["standard"]["distance"]["mean"]
    other = sb.images(torch.rand(100, 1, 8, 8) * 2 - 1)
    with pytest.raises(InputError, match="has no labels; expected data with classes"):
        sb.audit(other, model=pipe, sampling=sb.Sampling(count=4, steps=2))
    plain = sb.load_pipeline("digits")
    with pytest.raises(InputError, match="has no classes, but some were named"):
        sb.audit(data, model=plain, sampling=sb.Sampling(count=4, steps=2, classes=Classes((1,))))


def test_a_guided_study_agrees_with_evaluate_and_counts_both_branches(digits, monkeypatch):
    data, pipe = digits
    for name, value in (("LEVELS", 3), ("LOSSES", 6), ("STATES", 16)):
        monkeypatch.setattr(choose, name, value)
    tiny = Study(samplers=("ddim",), calls=(4,), samples=40, repeats=2, selection=10, sweep=(1.0,), micro_batch=64,
                 reference_calls=7)  # fmt: skip
    guide, classes = sb.guided(denoiser(pipe.unet, pipe.scheduler), 10, 2.0, (1.0, 30.0)), Classes((1, 2))
    record = run(tiny, guide, classes=classes, identity={"guidance": {"null_label": 10}})
    content = record.content
    about = {"scale": 2.0, "window": [1.0, 30.0], "null_label": 10}
    assert content["sampling"] == {"classes": {"in_turn": [1, 2]}, "guidance": about}
    (row,) = content["rows"]
    for key in ("standard", "spectral", "best", "noised", "auto"):
        assert row[key]["steps"] < row[key]["calls"] <= 4 or row[key]["level"]["sigma"] < 1
    assert (content["reference"]["calls"], content["reference"]["steps"]) == (6, 4)  # two of them guided; 5 cost 8
    full = sb.scheduler("ddim", like=pipe.scheduler)
    start = sb.standard_start(full, row["standard"]["steps"], row["standard"]["spacing"])
    same = evaluate_network(guide, start, range(40), data, None, classes, repeats=2, cache=False)
    assert same["sampling"]["calls"] == row["standard"]["calls"]
    assert same["distance"]["pooled"] == pytest.approx(row["standard"]["distance"]["pooled"], rel=1e-4)
    (table,) = [t for k, t in tables(record)[0].items() if k == "starts"]
    assert any("Guidance of scale 2 at sigma 1 to 30; NFE count both" in note for note in table.notes)
    # fewer evaluations than one guided step
    with pytest.raises(InputError, match="cannot take a guided step with 1 network evaluations"):
        run(replace(tiny, calls=(1,)), sb.guided(denoiser(pipe.unet, pipe.scheduler), 10, 2.0), classes=classes)


@pytest.mark.slow
def test_the_command_study_is_guided(capsys, folder, tmp_path):  # noqa: F811
    tiny = ("study", "--model", folder, "--samplers", "ddim", "--calls", 4, "--quick", "--json", "--out", tmp_path)
    code, out, err = symbreak(capsys, *tiny, "--class", "1,2", "--guidance", 2, "--window", "1,20")
    assert code == 0, err
    assert json.loads(out)["content"]["sampling"]["guidance"]["scale"] == 2
    assert json.loads(out)["content"]["rows"][0]["standard"]["calls"] <= 4


def test_the_class_information_of_a_network_that_is_asked_with_its_null_class(digits):
    data, pipe = digits
    network = denoiser(pipe.unet, pipe.scheduler, class_labels=torch.tensor([10]))
    d = Diagnosis(data, data, data, SMALL, 0, Run(), network.schedule)
    x, y = some_images(data, 96, 0)
    _class_information(d, network, x, y)
    low, high = (row["level"]["sigma"] for row in reversed(d.criteria))
    half = class_entropy(pipe.unet.source.law, np.geomspace(0.3, 3, 8), 2000).time().sigma
    assert low < half < high
    (curve,), (line,) = d.curves, d.lines
    assert curve["panel"] == "entropy"
    assert curve["value"][-1] == pytest.approx(line["value"], rel=0.02)  # all is open at the top
    assert "Class information goes to" in d.notes[0]
    assert "null class, 10" in d.notes[0]
    for bound in (network.bind(class_labels=torch.tensor([3])), NetworkDenoiser(pipe.unet, pipe.scheduler)):
        other = Diagnosis(data, data, data, SMALL, 0, Run(), network.schedule)
        _class_information(
            other, bound, x, y
        )  # of one of the data's classes, or of a class that is open: nothing to say
        assert not other.criteria


@pytest.mark.slow
def test_phases_ask_with_the_null_class_and_for_the_class_information(digits):
    data, pipe = digits
    record = sb.diagnose(data, pipe, effort=SMALL)
    levels = {(c["name"], c["of"]): c["level"]["sigma"] for c in record.content["criteria"] if c["level"]}
    low, high = levels["class information, 90 %", "network"], levels["class information, 10 %", "network"]
    assert low < levels["class entropy", "class mixture"] < high
    assert any("Class information goes to" in line for line in record.content["notes"])


def test_phases_need_a_null_class(digits):
    data, pipe = digits
    net = as_unet(Conditional(pipe.unet.source.law, null=False), pipe.scheduler)
    with pytest.raises(InputError, match="does not say which of its classes is the null class"):
        sb.diagnose(data, SimpleNamespace(unet=net, scheduler=pipe.scheduler), effort=SMALL)


def test_a_denoiser_with_its_condition_keeps_it_as_a_pipeline(digits):
    data, pipe = digits
    d = denoiser(pipe.unet, pipe.scheduler)
    assert pipeline_of(d, data) is d
    x, y = data.tensor()[:3], torch.tensor([3, 3, 3])
    three = pipeline_of(d.bind(class_labels=torch.tensor([3])), data)
    again = NetworkDenoiser(three.unet, three.scheduler)
    torch.testing.assert_close(again(x, 1.0), d.bind(class_labels=y)(x, 1.0), rtol=1e-4, atol=1e-4)
    guide = pipeline_of(sb.guided(d, 10, 2.0), data)
    assert guide.unet.config.num_class_embeds == 11
    assert guide.scheduler is pipe.scheduler


def test_the_command_names_the_null_class(capsys, folder, tmp_path):  # noqa: F811
    code, _, err = symbreak(capsys, "phases", "--data", "digits", "--null-label", 10)
    assert (code, "--null-label, --guidance, --window, --prompt and --vae belong to a network" in err) == (2, True)
    code, _, err = symbreak(capsys, "phases", "--data", "digits", "--model", folder, "--null-label", 11)
    assert (code, "the null class 11; expected a label" in err) == (2, True)


def test_finished_parts_of_other_classes_are_others(digits, tmp_path):
    data, pipe = digits
    small = data.subset(60)
    counts = {}
    for classes in (Classes((1,)), Classes((2,))):
        record = sb.audit(
            small, model=pipe, sampling=sb.Sampling(count=6, steps=2, classes=classes), run=Run(tmp_path / "a")
        )
        counts[classes.pool] = record.settings["samples"]
    assert counts[1,] != counts[2,]


def test_studies_of_starts_need_a_class_or_none(digits):
    data, pipe = digits
    measure = sb.Measure(extract=sb.extractor("pixels"), samples=20, repeats=2)
    for study in (sb.compare_starts, sb.sensitivity):
        with pytest.raises(InputError, match="the pipeline has classes, which are not given here"):
            study(data, pipe, holdout=data, measure=measure)
