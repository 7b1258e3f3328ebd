"""A whole diagnosis: of data alone, of an exact mixture posing as a network, interrupted, and of bad input."""

import json
import math
import re
import time
from dataclasses import replace
from html import unescape
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from symbreak.data.readers import images
from symbreak.laws import Gaussian, Mixture
from symbreak.networks.families import SigmaDenoiser, as_unet
from symbreak.networks.residual import LawResidual
from symbreak.networks.samplers import scheduler
from symbreak.phases.collapse import collapse_time
from symbreak.phases.speciation import cloning_time, speciation_time
from symbreak.report.html import write_report
from symbreak.report.record import Record
from symbreak.report.tables import tables
from symbreak.runtime.files import InputError
from symbreak.runtime.run import Run
from symbreak.start.loading import load_pipeline
from symbreak.studies import ask_network
from symbreak.studies.diagnose import Effort, diagnose
from tests.browser import overflow

TINY = Effort(pairs=64, steps=16, branches=8, turns=3, stability=3, losses=14, images=48, points=500, queries=300)
ONE_FRAME = replace(TINY, frames=("ve",))


def rows(record, of=None):
    return {c["name"]: c for c in record.content["criteria"] if of is None or c["of"] == of}


def two_classes(tmp_path, n=400, seed=0, weights=(0.5, 0.5)):
    """Images 1 x 2 x 2 of two narrow Gaussians at +-m, their law, and the law posing as a pipeline's network."""
    rng = np.random.default_rng(seed)
    m = np.array([[0.3, -0.3], [0.25, 0.05]])
    y = (rng.random(n) >= weights[0]).astype(np.int64)
    x = np.where(y == 0, -1.0, 1.0)[:, None, None] * m + 0.075 * rng.normal(size=(n, 2, 2))
    path = tmp_path / "two.npz"
    np.savez(path, images=x[:, None].astype(np.float32), labels=y)
    means = torch.as_tensor(m).reshape(1, 1, 2, 2)
    law = Mixture.from_parameters(torch.cat([-means, means]), 0.075**2, weights)
    base = scheduler("ddpm")
    pipe = SimpleNamespace(unet=as_unet(law, base), scheduler=base)
    return images(str(path), value_range=(-1, 1)), law, pipe


def nearest_sign(x):
    m = torch.tensor([0.3, -0.3, 0.25, 0.05])
    return (x.flatten(1).float() @ m > 0).long()


@pytest.fixture(scope="module")
def uneven(tmp_path_factory):
    """Data of two classes of 70 and 30 %, their law posing as a network, and the diagnosis of both in one go."""
    data, law, pipe = two_classes(tmp_path_factory.mktemp("uneven"), weights=(0.7, 0.3))
    return data, law, pipe, diagnose(data, pipe, classify=nearest_sign, effort=TINY)


def test_data_alone_with_and_without_labels(tmp_path):
    data, law, _ = two_classes(tmp_path)
    found = diagnose(data, effort=ONE_FRAME)
    own = rows(found, "class mixture")
    # One draw of 320 images: moments are known to 3 / sqrt(320), levels to half of that; 15 % is 2 to 3 errors.
    assert own["free entropy"]["level"]["sigma"] == pytest.approx(speciation_time(law, "free-entropy").sigma, rel=0.15)
    assert own["cloning"]["level"]["sigma"] == pytest.approx(cloning_time(law).sigma, rel=0.15)
    assert rows(found, "data")["cloning"]["level"]["sigma"] == pytest.approx(cloning_time(law).sigma, rel=0.15)
    assert "network" not in {c["of"] for c in found.content["criteria"]}
    # 320 points on two spots of width 0.075: the collapse of the spots, far below the decision between them.
    bound = rows(found, "data")["collapse"]["level"]
    assert bound["sigma"] == pytest.approx(collapse_time(law, samples=320).sigma, rel=0.3)
    regimes = found.content["regimes"]
    assert regimes["collapse"]["sigma"] == bound["sigma"] < 0.3 * regimes["speciation"]["sigma"]
    needed = next(c for c in found.content["curves"] if c["panel"] == "samples" and c["of"] == "class mixture")
    at = np.interp(math.log(bound["sigma"]), np.log(needed["sigma"]), needed["value"])
    assert at == pytest.approx(math.log10(320), abs=0.5)
    assert all(found.timings[c["stage"]] >= 0 for c in found.content["criteria"])
    html = write_report(found, tmp_path / "r.html").read_text()
    assert "Every criterion on one axis" in html
    assert html.count("<svg") == 4
    assert unescape(html).index(found.verdict[0]) < html.index("<svg")
    assert len(found.content["along"]["rows"]) == 6
    assert overflow(tmp_path / "r.html", 480) <= 0
    raw = json.loads(json.dumps(found.to_dict()))["content"]
    raw["along"]["rows"][0]["png"] = "AAAA"  # no picture: the figure says so, the page stands
    broken = write_report(Record("phases", found.settings, raw), tmp_path / "b.html").read_text()
    assert (broken.count("could not be drawn"), broken.count("<svg")) == (1, 3)
    bare = np.load(tmp_path / "two.npz")["images"]
    plain = diagnose(images(bare, value_range=(-1, 1)), effort=ONE_FRAME)
    assert {c["name"] for c in plain.content["criteria"]} == {"spectral", "signal-to-noise", "collapse"}
    sorted_ = diagnose(images(bare, value_range=(-1, 1)), clusters=2, effort=ONE_FRAME)
    assert rows(sorted_, "class mixture")["cloning"]["level"]["sigma"] == pytest.approx(
        cloning_time(law).sigma, rel=0.15
    )


def test_a_mixture_posing_as_a_network(uneven, tmp_path):
    _, law, _, found = uneven
    network = rows(found, "network")
    exact = cloning_time(law).sigma
    low, high = (network["cloning"][k]["sigma"] for k in ("low", "high"))
    # 64 pairs: the interval is wide; a third beyond it would be more than three standard errors.
    assert low / 1.3 < exact < high * 1.3
    # Unequal weights: the centre turns into a well, and a second one appears where the law's own does.
    wells = [c for c in found.content["criteria"] if c["name"] == "second well" and c["frame"] == "ve"]
    own, theirs = (next(c for c in wells if c["of"] == of)["level"]["sigma"] for of in ("class mixture", "network"))
    assert own == pytest.approx(theirs, rel=0.1)
    phi = next(c for c in found.content["curves"] if c["label"] == "clones, network")
    assert phi["value"][0] == 1.0
    same = next(c for c in found.content["curves"] if c["label"].endswith("phi_C"))
    assert same["value"][np.argmax(same["sigma"])] < 0.1  # at high noise clones end anywhere
    assert same["value"][np.argmin(same["sigma"])] > 0.3  # at a quarter of the spots' width, often where they were
    checks = {c["name"]: c for c in found.content["checks"]}
    assert checks["early fluctuations revert"]["holds"] is True
    assert "a window of opportunity at the decision" in checks
    write_report(found, tmp_path / "r.html")


def test_what_a_network_adds_to_its_law(tmp_path, monkeypatch):
    """Two narrow Gaussians as the truth, one as the law, and a network that knows all of the difference."""
    data, truth, pipe = two_classes(tmp_path)
    law = Gaussian.fit(data)
    d = LawResidual(law, torch.nn.Identity(), top=0.8)

    class Perfect(torch.nn.Module):
        def forward(self, x, sigma):
            column = sigma.reshape(-1, 1, 1, 1)
            raw = x * (column**2 + d.size).sqrt()
            return (truth.denoise(raw, sigma) - law.denoise(raw, sigma)) / d.scale(sigma).reshape(column.shape)

    class WithNull(Perfect):
        def forward(self, x, sigma, class_labels):
            assert class_labels.tolist() == [2] * len(x)
            return super().forward(x, sigma)

    d.network = Perfect()
    pipe.unet = as_unet(d, pipe.scheduler)
    alone = lambda d, network, *_: ask_network._added(d, network, d.test.tensor()[: d.effort.images])  # noqa: E731
    monkeypatch.setattr("symbreak.studies.diagnose.ask_network", alone)
    monkeypatch.setattr("symbreak.studies.diagnose.class_laws", lambda d, laws: None)  # of which nothing is asked here
    found = diagnose(data, pipe, classify=nearest_sign, effort=ONE_FRAME)
    added = found.content["added"]
    assert added["images"] == 48
    assert added["top"] == 0.8
    assert added["nats"]["sigma"][-1] == 0.8
    # truth and law at the lowest level, 0.01, and at the top, by Monte Carlo of log densities
    x = [truth.sample(20_000, s, torch.Generator().manual_seed(0)) for s in (0.01, 0.8)]
    low, top = (float((truth.log_prob(y, s) - law.log_prob(y, s)).mean()) for y, s in zip(x, (0.01, 0.8)))
    value, first, last = added["net"]
    assert value == pytest.approx(low - top, abs=4 * (last - first) / 3.92)
    assert last - first < value  # 48 images: a wide interval
    assert all(share <= 1 for share in added["share"]["value"])
    assert [len(level["rows"]) for level in added["pictures"]] == [4] * 4
    parts, said = tables(found)
    assert said[0] == added["sentence"]
    assert len(parts["added"].rows) >= 7
    path = write_report(found, tmp_path / "r.html")
    html = unescape(path.read_text())
    assert html.count(added["sentence"]) == 1
    assert html.index("What did the network add") < html.index(added["sentence"]) < html.index("<h2>Look")
    assert html.count("<h3>sigma") == 4
    assert overflow(path, 480) <= 0
    d.num_class_embeds, d.null_label, d.network = 3, 2, WithNull()  # a network with classes is asked with its null one
    pipe.unet = as_unet(d, pipe.scheduler)
    again = diagnose(data, pipe, classify=nearest_sign, effort=ONE_FRAME).content["added"]
    assert again["net"] == pytest.approx(added["net"])
    del found.content["added"]  # a record of before
    assert "What did the network add" not in write_report(found, tmp_path / "before.html").read_text()


def test_an_interrupted_diagnosis_goes_on_and_finds_the_same(uneven, tmp_path):
    data, _, pipe, whole = uneven

    class Stop(Exception):
        pass

    def stop_in(stage):
        def tell(name, done, total):
            if name == stage and done > 0:
                raise Stop

        return tell

    out = tmp_path / "out"
    for stage in ("clones, same image",):  # one of the last: everything before comes from the store
        with pytest.raises(Stop):
            diagnose(data, pipe, classify=nearest_sign, effort=TINY, run=Run(out, progress=stop_in(stage)))
        assert list(out.glob("blocks-*/*.safetensors"))
        assert not (out / "record.json").exists()
    again = diagnose(data, pipe, classify=nearest_sign, effort=TINY, run=Run(out))

    assert again.content == whole.content
    assert again.settings == whole.settings
    assert (out / "record.json").exists()
    assert not list(out.glob("blocks-*"))


def test_clusters_of_a_network_without_labels(tmp_path):
    _, law, pipe = two_classes(tmp_path)
    bare = images(np.load(tmp_path / "two.npz")["images"], value_range=(-1, 1))
    found = diagnose(bare, pipe, clusters=2, effort=ONE_FRAME)
    low, high = (rows(found, "network")["cloning"][k]["sigma"] for k in ("low", "high"))
    assert low / 1.3 < cloning_time(law).sigma < high * 1.3


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"classify": lambda x: torch.full((len(x), 2), torch.nan)}, "NaN"),
        ({"classify": lambda x: torch.zeros(3)}, "3"),
        ({"effort": Effort(pairs=3)}, "pairs is 3"),
        ({"effort": Effort(branches=1)}, "branches is 1"),
    ],
)
def test_bad_settings(tmp_path, options, match):
    data, _, pipe = two_classes(tmp_path)
    with pytest.raises(InputError, match=match):
        diagnose(data, pipe, **{"effort": TINY, **options})


def test_bad_data(tmp_path):
    data, _, pipe = two_classes(tmp_path)
    with pytest.raises(InputError, match=r"the network makes images of \(1, 8, 8\), but the data are \(1, 2, 2\)"):
        diagnose(data, load_pipeline("digits"))
    with pytest.raises(InputError, match="tell no two classes"):
        diagnose(data.only(data.classes[:1]), pipe, effort=TINY)
    with pytest.raises(InputError, match=r"the held-out images \(1, 8, 8\)"):
        diagnose(data, holdout=images("digits"))
    with pytest.raises(InputError, match=r"diagnose\(memory=...\) is now diagnose\(run="):
        diagnose(data, memory=2**30)
    same = images(np.zeros((30, 1, 2, 2), np.float32), value_range=(-1, 1))
    with pytest.raises(InputError, match="are equal"):
        diagnose(same)


@pytest.mark.slow
def test_classes_that_differ_in_covariance_only(tmp_path):
    """The spectrum knows nothing of them (its top eigenvalue is below 1); free entropy and clones find them."""
    rng = np.random.default_rng(4)
    y = np.arange(1600) % 2
    x = np.sqrt(np.where(y == 0, 0.01, 0.04))[:, None, None, None] * rng.normal(size=(1600, 1, 8, 8))
    np.savez(tmp_path / "c.npz", images=x.astype(np.float32), labels=y)
    data = images(str(tmp_path / "c.npz"), value_range=(-1, 1))
    found = diagnose(data, effort=TINY)
    assert found.content["speciation"]["[-1, 1]"]["level"] is None
    exact = Mixture.from_parameters(
        torch.zeros(2, 64), torch.stack([0.01 * torch.eye(64), 0.04 * torch.eye(64)]).double()
    )
    own = rows(found, "class mixture")
    # 640 images a class fix a variance to 0.7 %; the mixture's shrinkage and its noisy directions cost more.
    assert own["free entropy"]["level"]["sigma"] == pytest.approx(speciation_time(exact, "free-entropy").sigma, rel=0.1)
    assert own["cloning"]["level"]["sigma"] == pytest.approx(cloning_time(exact).sigma, rel=0.1)


def test_a_network_that_takes_long_is_told_before_it_is_asked(capsys):
    d = SimpleNamespace(test=images("digits"), effort=Effort(), scale=1.0, seed=0)  # a level above what they know
    quick, slow = (
        SigmaDenoiser(model, (1, 8, 8), (0.02, 0.9), {}, "k-diffusion")
        for model in (lambda x, sigma: x, lambda x, sigma: time.sleep(0.02 * len(x)) or x)
    )
    ask_network._say_how_long(d, quick)
    assert capsys.readouterr().err == ""
    ask_network._say_how_long(d, slow)
    said = capsys.readouterr().err
    assert re.search(r"ms an evaluation here: some 288,000 of them are about (9\d|\d{3,}) minutes", said)
    assert "asks for some 38,400" in said
    d.test, d.effort = (
        d.test.take(np.array([0]), "one"),
        d.effort.quick(),
    )  # of one image, and nothing quicker to advise
    ask_network._say_how_long(d, slow)
    said = capsys.readouterr().err
    assert "some 38,400 of them" in said
    assert "--quick" not in said
