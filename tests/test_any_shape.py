"""Commands x kinds of data: each on an exact mixture of samples of any shape, with the right numbers.

Two narrow classes at c +- m of unequal weights, well outside [-1, 1]: what takes values for pixels goes wrong.
"""

import json
import math
import re
from dataclasses import dataclass, replace
from pathlib import Path

import diffusers
import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.datasets import load_breast_cancer, load_diabetes, load_wine

import symbreak as sb
from symbreak.cli.commands import main
from symbreak.laws import Mixture
from symbreak.noise import generator
from symbreak.phases.collapse import collapse_time
from symbreak.phases.speciation import cloning_time, speciation_time
from symbreak.report.tables import tables
from symbreak.runtime.errors import InputError
from symbreak.start.sample import write_images
from tests.worlds import small_choice

SHAPES = {"vector": (6,), "signal": (2, 8), "five channels": (5, 4, 4), "latent": (4, 4, 4), "volume": (1, 3, 4, 4)}
NORM, SPREAD, CENTRE, WEIGHTS = 8.0, 0.5, 3.0, (0.6, 0.4)
# five channels and latents go the same way here, [C, H, W] that are no pictures
each = pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=pytest.mark.slow) if k == "five channels" else k for k in SHAPES]
)
LONG = [k if k == "vector" else pytest.param(k, marks=pytest.mark.slow) for k in SHAPES]
QUICK = sb.Effort(
    pairs=80, steps=48, branches=7, turns=5, stability=2, losses=6, images=48, points=400, queries=200, frames=("ve",)
)


def levels(record, of):
    return {c["name"]: c["level"] and c["level"]["sigma"] for c in record.content["criteria"] if c["of"] == of}


@dataclass
class World:
    """The law, samples of it with their classes, and more of them."""

    law: Mixture
    data: sb.samples
    holdout: sb.samples
    axis: torch.Tensor  # of the classes, norm 1

    def classify(self, x):
        """The class of samples [B, *S]: the side of the centre that they lie on."""
        return ((x.double() - CENTRE).flatten(1) @ self.axis > 0).long()

    def network(self):
        """The law as a function of (x, sigma) that knows levels 0.01 to 100, as a trained network would."""
        return sb.denoiser(self.law.denoise, shape=self.law.shape, sigma_range=(0.01, 100.0))


def world(kind, n=240):
    shape = SHAPES[kind]
    d = math.prod(shape)
    axis = torch.randn(d, generator=generator(5, 1), dtype=torch.float64)
    axis /= axis.norm()
    means = CENTRE + NORM / 2 * torch.stack([-axis, axis]).reshape(2, *shape)
    law = Mixture.from_parameters(means, SPREAD**2, WEIGHTS)
    made = World(law, None, None, axis)
    both = [law.sample(n, generator=generator(5, i)) for i in (2, 3)]
    made.data, made.holdout = (sb.samples(x, labels=made.classify(x)) for x in both)
    return made


@each
def test_starts_are_chosen_for_a_denoiser_and_sampled_from(kind, tmp_path):
    w = world(kind)
    start = sb.fit_start(w.data, w.network(), sb.scheduler("dpm++2m"), steps=6, holdout=w.holdout)
    # One Gaussian cannot tell the classes apart, a mixture can: it is chosen, below the level of the classes.
    assert start.law is not None
    assert "Mixture" in repr(start.law)
    x = sb.generate(w.network(), start, range(400))
    assert x.shape == (400, *w.law.shape)
    y = w.classify(x)
    # shares of classes: 4 standard errors of 400 samples and of the 240 that the start learned from
    assert float(y.double().mean()) == pytest.approx(WEIGHTS[1], abs=4 * math.sqrt(0.24 * (1 / 400 + 1 / 240)))
    for k in (0, 1):
        some = x[y == k].double()
        along = (some - w.law.means[k].reshape(w.law.shape)).flatten(1)
        assert float(along.mean(0).norm()) < 5 * SPREAD * math.sqrt(along.shape[1] / len(some))
        assert float(along.var(0).mean().sqrt()) == pytest.approx(SPREAD, rel=0.1)
    # The same denoiser posing as a network gives the same bits.
    posing = sb.as_unet(w.network(), start.full)
    assert torch.equal(sb.generate(posing, start, range(8)), x[:8])
    assert write_images(w.law, start, [3, 5], tmp_path) == 2
    np.testing.assert_array_equal(np.load(tmp_path / "00000005.npy"), sb.generate(w.law, start, [5])[0])
    scaled = sb.samples(w.data.tensor(), scale=(1.0, 2.0))
    with pytest.raises(InputError, match=r"the network's samples are measured in the values as they are"):
        write_images(w.law, start, [3, 5, 6], tmp_path, data=scaled)
    assert write_images(w.law, start.of(scaled), [3, 5, 6], tmp_path) == 1
    made = 1 + 2 * sb.generate(w.law, start, [3, 5, 6]).double()
    if kind == "vector":
        table = pd.read_csv(tmp_path / "samples.csv")
        assert list(table) == [f"column {i}" for i in range(6)]
        np.testing.assert_allclose(table.to_numpy(), made, rtol=1e-6)
    else:
        np.testing.assert_allclose(np.load(tmp_path / "samples.npy"), made)
    (tmp_path / "00000003.npy").write_bytes(b"no array")
    with pytest.raises(InputError, match="no array that can be read"):
        write_images(w.law, start, [3], tmp_path)


def test_late_start_auto_of_a_denoiser_on_its_own_schedule():
    w = world("vector")
    base = sb.scheduler("edm-dpm++2m", sigma_min=0.02)
    laws = sb.candidate_laws(w.data)
    start = sb.late_start(base, laws, 6, denoiser=w.network(), data=w.holdout)
    x = sb.generate(w.network(), start, range(200))
    assert float(w.classify(x).double().mean()) == pytest.approx(WEIGHTS[1], abs=0.15)
    with pytest.raises(InputError, match=r"sigma from 0\.002 .* is outside the network's 0\.01 to 100"):
        sb.generate(w.network(), sb.standard_start(sb.scheduler("edm-dpm++2m"), 6), [0])


def test_schedulers_that_cut_to_the_range_of_pixels_are_named():
    w = world("vector")
    for name in ("ddpm", "ddim"):
        said = r"cuts every predicted sample to \[-1, 1\] \(clip_sample=True\).*clip_sample=False"
        with pytest.raises(InputError, match=said):
            sb.fit_start(w.data, w.law, sb.scheduler(name))
        with pytest.raises(InputError, match=said):
            sb.generate(w.law, sb.standard_start(sb.scheduler(name), 5), [0])
    free = sb.scheduler("ddim", clip_sample=False, timestep_spacing="trailing")
    x = sb.generate(w.law, sb.standard_start(free, 40), range(200))
    assert float((x - CENTRE).flatten(1).norm(dim=1).mean()) == pytest.approx(NORM / 2, rel=0.1)


def test_fields_of_one_channel_are_not_cut_as_pictures_are(tmp_path):
    """Of the shape of a grey picture, with values from -4 to 10: the start knows that they are no pixels."""
    shape = (1, 3, 3)
    means = CENTRE + torch.stack([-torch.ones(shape), torch.ones(shape)]).double() * 3
    law = Mixture.from_parameters(means, SPREAD**2, WEIGHTS)
    data, holdout = (sb.samples(law.sample(200, generator=generator(3, i))) for i in (1, 2))
    start = sb.fit_start(data, law, sb.scheduler("dpm++2m"), 4, holdout)
    x = sb.generate(law, start, range(100))
    assert float(x.max()) > 5
    start.save(tmp_path / "start.safetensors")
    again = sb.LateStart.load(tmp_path / "start.safetensors")
    assert torch.equal(sb.generate(law, again, range(100)), x)
    write_images(law, again, [4], tmp_path / "made")
    assert np.load(tmp_path / "made" / "00000004.npy").max() == float(x[4].max())
    with pytest.raises(InputError, match="clip_sample"):
        sb.fit_start(data, law, sb.scheduler("ddim"), 4, holdout)
    content = sb.evaluate_network(
        law, sb.standard_start(sb.scheduler("dpm++2m"), 20), range(100), data, holdout, cache=False
    )
    assert content["two_sample"]["knn"]["p_value"] > 0.01  # not cut, though the start does not know


def test_networks_of_diffusers_for_signals_say_their_shape():
    unet = diffusers.UNet1DModel(
        sample_size=64, in_channels=2, out_channels=2, extra_in_channels=64, block_out_channels=(32, 32, 64),
    ).eval()  # fmt: skip
    start = sb.standard_start(sb.scheduler("dpm++2m"), 2)
    assert sb.denoiser(unet, sb.scheduler("ddpm")).shape == (2, 64)
    assert sb.generate(unet, start, [0, 1]).shape == (2, 2, 64)


@pytest.mark.parametrize("kind", LONG)
def test_phases_of_data(kind, tmp_path):
    w = world(kind)
    record = sb.diagnose(w.data, holdout=w.holdout, effort=QUICK)
    top = WEIGHTS[0] * WEIGHTS[1] * NORM**2 + SPREAD**2
    mixture, data = levels(record, "class mixture"), levels(record, "data")
    # 240 samples: a level is known to about 1 / sqrt(2 n) = 5 %, and from 200 queries another 5 %.
    assert mixture["free entropy"] == pytest.approx(speciation_time(w.law, "free-entropy").sigma, rel=0.15)
    assert mixture["cloning"] == pytest.approx(cloning_time(w.law).sigma, rel=0.15)
    assert data["cloning"] == pytest.approx(cloning_time(w.law).sigma, rel=0.15)
    assert data["spectral"] == pytest.approx(math.sqrt(top - 1), rel=0.05)
    assert data["collapse"] == pytest.approx(collapse_time(w.law, samples=240).sigma, rel=0.25)
    assert list(record.content["speciation"]) == ["the values as they are"]
    page = sb.write_report(record, tmp_path / "r.html").read_text()
    assert f"240 samples of {' x '.join(map(str, SHAPES[kind]))}" in page
    assert "pixels" not in page
    assert [p["title"] for p in record.content["pictures"]] == ["leading modes", "the samples"]


@pytest.mark.parametrize("kind", LONG)
def test_phases_of_a_denoiser(kind, tmp_path):
    w = world(kind)
    record = sb.diagnose(w.data, w.network(), holdout=w.holdout, effort=QUICK, run=sb.Run(tmp_path))
    assert record.content["network"] == {"parameters": 0, "prediction": "sample", "sigma_range": [0.01, 100.0]}
    at, exact = levels(record, "network"), cloning_time(w.law).sigma
    # 80 pairs at 7 levels that are a factor 1.8 apart; a classifier that was trained on the labels says the class.
    assert 1 / 1.5 < at["cloning"] / exact < 1.5
    assert 1 / 1.8 < at["U-turn, class"] / exact < 1.8  # 5 levels
    assert at["second well"] == pytest.approx(sb.bifurcation(w.law, "sde", "ve", criterion="wells").sigma, rel=0.1)
    assert any("right on 100.0% of the held-out" in note for note in record.content["notes"])
    titles = [p["title"] for p in record.content["pictures"]]
    assert {"leading modes", "samples", "ends of the arc"} <= set(titles)


def test_a_table_is_decided_in_the_units_of_its_columns(tmp_path):
    table = load_wine(as_frame=True).frame
    data = sb.samples(table, labels="target", scale="standard")
    record = sb.diagnose(data, effort=QUICK)
    at = levels(record, "data")
    # Equal columns: the classes are decided near the level of the two leading modes, 4.73 and 2.51.
    assert 1.6 < at["cloning"] < 2.2
    assert 0.5 < at["collapse"] < 1.0
    assert list(record.content["speciation"]) == ["standard deviations of each column"]
    units = tables(record)[0]["units"]
    assert [c.text for c in units.rows[-1]] == ["proline", "746.9", "314", *(
        f"{314.0216567 * record.content['regimes'][k]['sigma']:.4g}" for k in ("speciation", "collapse")
    )]  # fmt: skip
    page = sb.write_report(record, tmp_path / "r.html").read_text()
    assert "1 is one standard deviation of each column" in page
    assert "proline" in page
    raw = sb.samples(table, labels="target")
    assert sb.speciation_time(sb.Moments.fit(raw)).sigma == pytest.approx(315, abs=1)  # one column, proline
    assert "scale standard" in raw.notes[0]


@pytest.mark.slow
@pytest.mark.parametrize("unit", [1e3, 1e-3])
def test_a_law_is_asked_at_the_levels_of_the_data(unit):
    """Levels go with the unit, from thousandths to thousands."""
    w = world("vector")
    law = Mixture.from_parameters(unit * w.law.means, (unit * SPREAD) ** 2, WEIGHTS)
    data, holdout = (sb.samples(unit * d.tensor().double(), labels=d.labels) for d in (w.data, w.holdout))
    small = replace(QUICK, pairs=20, steps=16, branches=3, turns=2, losses=4, images=20, points=60, queries=20)
    at = levels(sb.diagnose(data, law, holdout=holdout, effort=small), "network")
    assert at["second well"] / unit == pytest.approx(
        sb.bifurcation(w.law, "sde", "ve", criterion="wells").sigma, rel=0.01
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("load", "decided", "collapse"), [(load_breast_cancer, 2.77, 0.739), (load_diabetes, 0.699, 0.486)]
)
def test_tables_are_decided_and_collapse_where_the_page_says(load, decided, collapse):
    """By class; of diabetes, whose target is a number, by whether it lies above the median."""
    bunch = load()
    labels = bunch.target if len(np.unique(bunch.target)) < 10 else bunch.target > np.median(bunch.target)
    data = sb.samples(bunch.data, labels=labels, scale="standard")
    at = levels(sb.diagnose(data), "data")
    assert at["cloning"] == pytest.approx(decided, rel=0.01)
    assert at["collapse"] == pytest.approx(collapse, rel=0.01)
    # The same with every column in another unit, up to the last digits of single precision.
    unit = 10.0 ** np.random.default_rng(0).integers(-3, 4, bunch.data.shape[1])
    again = levels(sb.diagnose(sb.samples(bunch.data * unit, labels=labels, scale="standard")), "data")
    assert again["cloning"] == pytest.approx(at["cloning"], rel=0.02)
    assert again["spectral"] == pytest.approx(at["spectral"], rel=1e-4)


def test_models_of_another_kind_are_named():
    w = world("vector")
    with pytest.raises(InputError, match=r"model of the type str; expected a diffusers pipeline, sb\.denoiser"):
        sb.diagnose(w.data, "digits")
    with pytest.raises(InputError, match=r"makes samples of \(2, 8\), but the data are \(6,\)"):
        sb.diagnose(w.data, world("signal").law)
    other = sb.samples(w.data.tensor(), scale="standard")
    with pytest.raises(InputError, match=r"scaled in another way .* scale=data"):
        sb.diagnose(w.data, holdout=other)


@each
def test_evaluation_of_a_denoiser_against_data_of_its_own_law(kind, tmp_path):
    w = world(kind)
    start = sb.standard_start(sb.scheduler("dpm++2m", like=w.network()), 20)
    where = sb.Run(tmp_path)
    content = sb.evaluate_network(w.network(), start, range(240), w.data, w.holdout, cache=False, run=where)
    assert content["extractor"]["name"] == "values"
    d, floor, sliced = content["distance"], content["floor"], content["sliced_wasserstein"]
    # Samples of the law itself are about as far as training samples of it are, by 240 against 240: 1 / 240 of the
    # variance along the classes, 15.6, and of the squared distance of means each, and the spread of the rest.
    noise = (2 * 15.6 + 2 * math.prod(w.law.shape) * SPREAD**2) / 240 + 15.6 / 240
    assert d["pooled"] < floor["pooled"] + 3 * noise
    assert sliced["value"] == pytest.approx(sliced["floor"]["value"], abs=0.35)
    for name in ("logistic", "knn"):
        assert content["two_sample"][name]["p_value"] > 0.01
        assert content["two_sample"][name]["of"] == 240
    assert content["precision_recall"]["recall"] > 0.7
    assert content["neighbours"]["features"] == "values"
    assert content["neighbours"]["samples"]["memorized"] < 0.05
    # Another law: one of the two classes is missing.
    one = sb.evaluate(w.holdout.tensor()[w.holdout.labels == 0], w.data, w.holdout, cache=False)
    assert one["sliced_wasserstein"]["value"] > 1.5 * sliced["value"]
    assert one["distance"]["pooled"] > d["pooled"] + 3
    moved = sb.evaluate(w.holdout.tensor() + 2 * SPREAD, w.data, w.holdout, cache=False)
    for name in ("logistic", "knn"):
        assert moved["two_sample"][name]["share"] > 0.9
        assert moved["two_sample"][name]["p_value"] < 1e-9
    # every coordinate by the same: |c|^2 / d along a random direction
    assert moved["sliced_wasserstein"]["value"] == pytest.approx(2 * SPREAD, rel=0.02)
    record = sb.Record.load(tmp_path)
    page = sb.write_report(record, tmp_path / "r.html").read_text()
    assert "sliced Wasserstein distance" in page
    assert "told apart by nearest neighbours" in page
    assert "pixel" not in page.split("</style>")[1]
    assert len(content["pictures"]) == (1 if kind == "vector" else 2)


@each
def test_audit_finds_planted_copies(kind, tmp_path):
    w = world(kind)
    x, y = w.data.tensor(), w.data.labels
    # 10 rows stand in the data twice, 5 a hair beside another; 24 of 120 samples copy a row to a thousandth.
    near = x[20:25] + 1e-3 * torch.randn(5, *w.law.shape, generator=generator(7))
    train = sb.samples(torch.cat([x, x[:10], near]), labels=torch.cat([y, y[:10], y[20:25]]))
    made = w.law.sample(120, generator=generator(8)).float()
    made[:24] = x[100:124] + 1e-3 * torch.randn(24, *w.law.shape, generator=generator(9))
    record = sb.audit(train, made, holdout=w.holdout, run=sb.Run(tmp_path))
    content = record.content
    twins = content["duplicates"]
    assert (twins["exact"]["groups"], twins["exact"]["images"], twins["different"]) == (10, 20, 245)
    assert twins["deduplicated"] == 240
    assert content["features"] == "values"
    assert content["memorized"]["samples"]["count"] == pytest.approx(24, abs=1 if kind != "vector" else 4)
    assert content["memorized"]["held_out"]["share"] < 0.03
    assert content["transformed"] == {"samples": None, "held_out": None}
    assert content["verdict"]["kind"] == "copies"
    assert "held-out samples" in content["verdict"]["sentence"]
    page = sb.write_report(record, tmp_path / "r.html").read_text()
    assert "pixel" not in page.split("</style>")[1]
    clean = sb.audit(w.data, model=w.network(), sampling=sb.Sampling(count=120, steps=20), holdout=w.holdout)
    assert clean.content["verdict"]["kind"] == "none"
    assert clean.content["samples"]["source"] == "a network"


@pytest.mark.parametrize("kind", LONG)
def test_studies_of_a_denoiser(kind, tmp_path):
    w = world(kind, 400)
    np.savez(tmp_path / "x.npz", x=w.data.tensor().numpy(), y=w.data.labels.numpy())
    np.savez(tmp_path / "t.npz", x=w.holdout.tensor().numpy(), y=w.holdout.labels.numpy())
    settings = sb.Study(
        str(tmp_path / "x.npz"), holdout=str(tmp_path / "t.npz"), samplers=("dpm++2m",), calls=(4,),
        samples=80, repeats=2, selection=30, sweep=(0.6,), reference_calls=0, scale="none",
    )  # fmt: skip
    with small_choice():
        record = sb.run(settings, w.network(), run=sb.Run(tmp_path / "study"))
    assert record.content["extractor"]["name"] == "values"
    for row in record.content["rows"]:
        # Data noised to the level and the best late start beat four steps from white noise, as they do for pictures.
        best, standard = (row[k]["distance"]["pooled"] for k in ("best", "standard"))
        assert best < standard
        assert row["noised"]["distance"]["pooled"] < (2 if kind == "vector" else standard)
    page = sb.write_report(record, tmp_path / "r.html").read_text()
    assert f"400 samples of {' x '.join(map(str, w.law.shape))}" in page


def test_starts_are_compared_on_vectors():
    w = world("vector")
    measure = sb.Measure(sb.extractor("values"), samples=100, repeats=2)
    record = sb.compare_starts(w.data, w.network(), calls=(3,), levels=(1.5,), holdout=w.holdout, measure=measure)
    far = {row["start"]: row["distance"]["pooled"] for row in record.content["rows"]}
    assert "low-frequency Gaussian" not in far
    # Of the mean and the covariance, which the distance sees, both laws know, and white noise does not.
    assert max(far["class mixture"], far["full Gaussian"]) < far["white noise"] / 3
    with pytest.raises(InputError, match="scaled in another way"):
        sb.compare_starts(w.data, w.law, holdout=sb.samples(w.data.tensor(), scale=(0, 2)), measure=measure)


TABLES = {"wine": load_wine, "breast cancer": load_breast_cancer, "diabetes": load_diabetes}


@pytest.mark.parametrize(
    "name", ["wine", *(pytest.param(k, marks=pytest.mark.slow) for k in ("breast cancer", "diabetes"))]
)
def test_planted_rows_of_tables_are_found_in_the_units_of_their_columns(name, tmp_path):
    bunch = TABLES[name](as_frame=True)
    table = bunch.frame.drop(columns="target")
    order = np.random.default_rng(0).permutation(len(table))
    train, rest = table.iloc[order[: len(table) // 2]], table.iloc[order[len(table) // 2 :]]
    train = pd.concat([train, train.iloc[:7]])
    train.to_csv(tmp_path / "train.csv", index=False)
    data = sb.samples(tmp_path / "train.csv", scale="standard")
    # A generator that repeats training rows in every fourth sample, up to the third digit; in the table's own units.
    rng = np.random.default_rng(1)
    law = Mixture.from_parameters(data.tensor().double(), 0.5**2)
    made = data.unscaled(law.sample(100, generator=generator(3))).numpy()
    made[:25] = train.iloc[10:35].to_numpy() + 1e-3 * table.std().to_numpy() * rng.normal(size=(25, table.shape[1]))
    pd.DataFrame(made, columns=table.columns).to_csv(tmp_path / "made.csv", index=False)
    made, held = (sb.samples(source, scale=data) for source in (tmp_path / "made.csv", rest))
    found = sb.audit(data, made, holdout=held).content
    assert found["duplicates"]["exact"]["groups"] == 7
    assert 25 <= found["memorized"]["samples"]["count"] <= 30  # beside a row far from all others nothing else is near
    assert found["memorized"]["held_out"]["count"] <= 2
    assert found["verdict"]["kind"] == "copies"
    if name != "diabetes":  # whose columns come in one unit
        raw = sb.samples(tmp_path / "train.csv")
        assert "scale='standard'" in raw.notes[-1]
    # The same numbers as a tensor in the columns' own units are no samples of these data, nor are samples scaled twice.
    with pytest.raises(InputError, match=r"the columns' own units.*Pass sb\.samples\(samples, scale=data\)"):
        sb.audit(data, torch.tensor(rest.to_numpy()))
    with pytest.raises(InputError, match="scaled once more"):
        sb.audit(data, sb.samples(held.tensor(), scale=data))


@pytest.mark.parametrize("kind", [k if k == "signal" else pytest.param(k, marks=pytest.mark.slow) for k in SHAPES])
def test_every_command_takes_every_kind(kind, tmp_path, capsys):
    """From an archive to a trained network and all that is asked of it, on the command line; values are scaled."""
    w = world(kind, 240)
    for name, data in (("train", w.data), ("test", w.holdout)):
        np.savez(tmp_path / f"{name}.npz", x=data.tensor().numpy(), y=data.labels.numpy())
    source = ["--data", tmp_path / "train.npz", "--scale", "standard"]
    held_out = ["--holdout", tmp_path / "test.npz"]
    recipe = {"channels": [8, 16], "steps": 40, "batch": 64, "warmup": 4, "folds": 2, "clusters": 2, "lr": 2e-3}
    (tmp_path / "r.json").write_text(json.dumps(recipe))

    def run(*args):
        with pytest.raises(SystemExit) as left:
            main([str(a) for a in (*args, "--json")])
        out = capsys.readouterr()
        assert left.value.code == 0, out.err
        return json.loads(out.out)

    net = ["--model", tmp_path / "net"]
    scaled = sb.samples(w.data.tensor(), scale="standard")
    top = sb.Moments.fit(scaled).spectrum(1).values[0]
    fitted = run("fit", *source, "--out", tmp_path / "m.safetensors")
    assert fitted["eigenvalues"][0] == pytest.approx(top, rel=1e-5)
    if kind == "vector":
        assert fitted["units"]["columns"][0] == "column 0"
    run("train", *source, "--residual", "--recipe", tmp_path / "r.json", "--out", tmp_path / "net")
    run("fit", *source, *net, "--start", "--sampler", "dpm++2m", "--steps", 4, "--out", tmp_path / "s.safetensors")
    for i, start in enumerate(([], ["--start", tmp_path / "s.safetensors"])):
        run("sample", *net, *start, "--seeds", "0-199", "--out", tmp_path / f"x{i}")
        made = tmp_path / f"x{i}"
        x = sb.samples(made).tensor().reshape(-1, *w.law.shape)  # in the units of the data
        # 200 samples of a mixture of two clusters: 4 standard errors, with those of the 216 images it was fitted to
        assert float(w.classify(x).double().mean()) == pytest.approx(WEIGHTS[1], abs=4 * math.sqrt(0.24 / 100))
        # along the classes they lie at +-NORM / 2 around the centre, up to what 40 steps leave to learn
        along = (x.double() - CENTRE).flatten(1) @ w.axis
        assert float(along.abs().mean()) == pytest.approx(NORM / 2, rel=0.15)
    content = run("evaluate", *source, *held_out, "--samples", tmp_path / "x0", "--no-cache")
    sliced = content["sliced_wasserstein"]
    assert sliced["value"] < sliced["floor"]["value"] + 0.25  # in standard deviations
    run("evaluate", *source, *held_out, *net, "--seeds", "0-99", "--no-cache")
    audited = run("audit", *source, *held_out, *net, "--count", 60, "--steps", 8)
    assert audited["content"]["verdict"]["kind"] in ("none", "leans")
    few = ("--quick", "--pairs", 20, "--steps", 16, "--branches", 3)
    record = run("phases", *source, *held_out, *net, *few)
    at = {(c["name"], c["of"]): c["level"] for c in record["content"]["criteria"]}
    assert at["spectral", "data"]["sigma"] == pytest.approx(math.sqrt(top - 1), rel=0.05)
    assert ("second well", "network") in at
    study = run("study", *source, *held_out, *net, "--samplers", "dpm++2m", "--calls", "3", "--samples", 60,
                "--repeats", 2, "--quick", "--out", tmp_path / "study")  # fmt: skip
    row = study["content"]["rows"][0]
    assert row["best"]["distance"]["pooled"] < row["standard"]["distance"]["pooled"]


@pytest.mark.slow
def test_a_table_on_the_command_line_from_training_to_audit(tmp_path, capsys):
    frame = load_breast_cancer(as_frame=True).frame.sample(frac=1, random_state=0)
    frame.iloc[:400].to_csv(tmp_path / "train.csv", index=False)
    frame.iloc[400:].to_csv(tmp_path / "test.csv", index=False)
    data = ["--data", tmp_path / "train.csv", "--labels", "target", "--scale", "standard"]
    held_out = ["--holdout", tmp_path / "test.csv"]

    def run(*args):
        with pytest.raises(SystemExit) as left:
            main([str(a) for a in args])
        out = capsys.readouterr()
        assert left.value.code == 0, out.err
        return out.out

    net = tmp_path / "net"
    run("train", *data, "--residual", "--steps", 300, "--out", net)
    run("sample", "--model", net, "--seeds", "0-168", *data, "--out", tmp_path / "made")
    made = pd.read_csv(tmp_path / "made" / "samples.csv")
    assert list(made) == [c for c in frame if c != "target"]
    evaluated = run(
        "evaluate", "--samples", tmp_path / "made" / "samples.csv", *data, *held_out, "--no-cache", "--json"
    )
    content = json.loads(evaluated)
    assert content["two_sample"]["knn"]["p_value"] > 1e-3
    assert content["sliced_wasserstein"]["value"] < 1.5 * content["sliced_wasserstein"]["floor"]["value"]
    audited = json.loads(run("audit", *data, *held_out, "--model", net, "--steps", 10, "--count", 100, "--json"))
    assert audited["content"]["verdict"]["kind"] in ("none", "leans")
    assert "standard deviations of each column" in run("phases", *data, *held_out, "--quick")


@pytest.mark.slow
def test_the_page_about_own_data_runs(tmp_path, monkeypatch, capsys):
    """Every Python block of docs/my-own-data.md, one after the other."""
    page = (Path(__file__).parents[1] / "docs" / "my-own-data.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SYMBREAK_CACHE", str(tmp_path))
    names: dict = {}
    for code in re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE):
        exec(compile(code, "my-own-data.md", "exec"), names)
    assert "(13,) ('0', '1', '2')" in capsys.readouterr().out
    assert (tmp_path / "build" / "wine.html").is_file()
    sliced = names["content"]["sliced_wasserstein"]
    assert sliced["value"] < 1.5 * sliced["floor"]["value"]
    at = levels(names["record"], "data")  # as the page says
    assert at["cloning"] == pytest.approx(1.89, abs=0.01)
    assert at["collapse"] == pytest.approx(0.71, abs=0.01)
    said = tables(names["record"])[0]["units"].rows[-1]
    assert [round(float(cell.text)) for cell in said[-2:]] == [594, 222]
