"""Objects print in a line or two and draw themselves."""

import inspect
import re
import sys
import warnings

import matplotlib as mpl
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

import symbreak as sb
from symbreak.metrics.frechet import Distance
from symbreak.runtime.shown import Shown, brief
from symbreak.studies.worlds import explore_world

mpl.use("Agg")
SIGMA = np.geomspace(3, 0.2, 9)


@pytest.fixture(scope="module")
def objects():
    """Everything that a public function or class gives, each made in the cheapest way."""
    data = sb.images("digits")
    pipe, moments, few = sb.load_pipeline("digits"), sb.Moments.fit(data), data.subset(100)
    gaussian, x = sb.Gaussian(moments), few.tensor()
    points = sb.Mixture.from_parameters([[-1.0], [1.0]], 0.01)
    scheduler = sb.scheduler("dpm++2m", like=pipe.scheduler)
    ddpm = sb.denoiser(pipe.unet, pipe.scheduler)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", sb.LateStartWarning)
        auto = sb.late_start(scheduler, [gaussian, sb.Gaussian(moments)], 3, denoiser=gaussian, data=x)
        late = sb.late_start(scheduler, gaussian, 3, at=1.5, check=False)
    classed = sb.Mixture.from_parameters([[-1.0], [1.0]], 0.01)
    classed.classes = torch.tensor([0, 1])
    decided = sb.condition_information(
        classed, *classed.sample_labelled(100, generator=torch.Generator().manual_seed(0))
    )
    needed = sb.speciation_time(points, "free-entropy", samples=2000)
    clones = sb.clones(points, SIGMA[::3], pairs=16, steps=4)
    scaling = sb.collapse_scaling(sb.Empirical(x), "samples", (50, 100), queries=20)
    two = [sb.Mixture.from_parameters([[m]], 0.01) for m in (-1.0, 1.0)]
    return {
        "images": data,
        "samples": sb.samples(np.arange(20.0).reshape(10, 2), scale="standard"),
        "Moments": moments,
        "LowRankMoments": sb.Moments.fit(data, rank=5),
        "spectrum": moments.spectrum(5),
        "population": moments.population(5),
        "laws": [gaussian, points, sb.Empirical(x), sb.Sphere(3), sb.PrincipalMixture.fit(data, components=3), *two],
        "NoiseLevel": sb.NoiseLevel(1.0),
        "Schedule": sb.schedule(pipe.scheduler),
        "scheduler": scheduler,
        "pipeline": pipe,
        "denoiser": ddpm,
        "guided": sb.guided(ddpm, ddpm, 2.0),
        "LawResidual": sb.LawResidual(gaussian, torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(40)))),
        "arc_potential": sb.arc_potential(points, SIGMA[::3]),
        "network_stability": sb.network_stability(points, SIGMA[::3]),
        "opportunity": sb.opportunity(points, SIGMA[::3]),
        "added_to_law": sb.added_to_law(sb.LawResidual(gaussian, lambda x, sigma: 0 * x, top=1.0), x),
        "score": sb.score(points, torch.zeros(3, 1), 1.0),
        "as_unet": sb.as_unet(gaussian, scheduler),
        "speciation_time": sb.speciation_time(moments),
        "free-entropy": needed,
        "bifurcation": sb.bifurcation(points),
        "nowhere": sb.bifurcation(points, "ode", "vp"),
        "collapse_time": sb.collapse_time(gaussian, 1000),
        "Curve": sb.samples_needed(gaussian, SIGMA),
        "one level": sb.samples_needed(gaussian, 1.0),
        "excess_entropy": sb.excess_entropy(gaussian, SIGMA, 1000),
        "information": sb.mutual_information(sb.Empirical(x), SIGMA[:2], queries=20),
        "class information": decided,
        "window": sb.guidance_window(decided, resamples=50),
        "scaling": scaling,
        "cloning": sb.cloning_probability(points, SIGMA, samples=100),
        "clones": clones,
        "agreement": sb.clone_agreement(points, SIGMA[::3], pairs=16, steps=4),
        "u_turns": sb.u_turns(points, points.sample(20, 0.0, torch.Generator().manual_seed(0)), SIGMA[::3], steps=4),
        "flips": sb.nearest_flips(sb.Empirical(x), sb.Empirical(x), 8, 6),
        "fixed_points": sb.fixed_points(points, SIGMA, starts=points.means),
        "potential": sb.potential(points, torch.linspace(-1, 1, 9)[:, None], 1.0),
        "loss_curve": sb.loss_curve(gaussian, x, SIGMA[::3], {"same": gaussian}),
        "entropy_rate": sb.entropy_rate(sb.loss_curve(gaussian, x, SIGMA[::3])),
        "non_gaussianity": sb.non_gaussianity(gaussian, gaussian, x, SIGMA[::3]),
        "gaussianity": sb.gaussianity(gaussian, SIGMA[::4], modes=2, directions=4, samples=50, simulations=(20, 20)),
        "LateStart": [auto, late, sb.standard_start(scheduler, 3)],
        "choice": auto.choice,
        "candidate": auto.choice.chosen,
        "late_sigmas": sb.late_sigmas(late, 5, 0.01),
        "candidate_laws": sb.candidate_laws(few, 3),
        "Record": explore_world("two-deltas"),
        "settings": [sb.Effort(), sb.Study(), sb.Sampling(), sb.Recipe(), sb.Paths(), sb.Run(), sb.Subset()],
        "extractor": sb.extractor("pixels"),
        "Measure": sb.Measure(sb.extractor("pixels")),
        "Distance": Distance((1.0,) * 99, 1.0, 0.5, 1.5, 1.0, 100, 3, "pixels"),
    }


def each(objects):
    for name, value in objects.items():
        for one in value if isinstance(value, list) else [value]:
            yield name, one


def test_denoisers_say_what_they_denoise(objects):
    net = "NetworkDenoiser(UNet2DModel, predicts epsilon, shape=(1, 8, 8), sigma 0.01 .. 157.4)"
    assert repr(objects["denoiser"]) == net
    assert (
        repr(objects["denoiser"].bind(class_labels=torch.tensor([3])))[:-1]
        == f"{net[:-1]}, class_labels=int64[1] 3 .. 3"
    )
    assert repr(objects["guided"]).startswith(f"Guided({net}, scale=2, window=(0.0, inf), shape=(1, 8, 8), ")
    assert repr(objects["as_unet"]).startswith("as_unet(LawDenoiser(Gaussian(shape=(1, 8, 8), ")
    own = sb.denoiser(lambda x, sigma: x, shape=(2,), sigma_range=(0.02, 80.0))
    assert repr(own) == "SigmaDenoiser(<lambda>, k-diffusion, shape=(2,), sigma 0.02 .. 80)"


FOREIGN = ("scheduler", "pipeline", "late_sigmas")  # of diffusers and torch


def test_everything_prints_in_a_few_words(objects):
    long = {name: len(repr(one)) for name, one in each(objects) if name not in FOREIGN and len(repr(one)) >= 600}
    assert not long
    seen = {type(one).__name__ for _, one in each(objects)}
    # Errors and warnings print their message; of the rest the tests of their room make one.
    elsewhere = {"InputError", "LateStartWarning", "Denoiser", "LateStartPipeline"}
    classes = {name for name in sb.__all__ if inspect.isclass(getattr(sb, name))}
    assert classes - seen - elsewhere == set()
    # What no function above gives: records, numbers and tensors, files, and what stands there under another name.
    records = {"attribute_levels", "audit", "compare_starts", "diagnose", "draw_world", "evaluate", "run"}
    records |= {"sensitivity", "train_network"}
    plain = {"encode", "decode", "generate", "evaluate_network", "first_rejection", "nearest_of", "truncation_bound"}
    files = {"load_law", "save_law", "write_report", "frechet_distance"}
    functions = {n for n in sb.__all__ if inspect.isfunction(getattr(sb, n))}
    made = set(re.findall(r"sb\.(\w+)\(", inspect.getsource(sys.modules[__name__])))
    assert functions - made == records | plain | files


def test_a_result_of_a_thousand_levels_prints_as_one_of_ten():
    sigma = np.geomspace(10, 0.1, 1000)
    curve = sb.samples_needed(sb.Gaussian(sb.Moments(10, np.zeros(2), np.eye(2))), sigma)
    assert repr(curve).startswith("Curve(sigma=float64[1000] 0.1 .. 10, value=float64[1000]")
    record = sb.Record("study", {"data": "x" * 10_000, **{f"k{i}": i for i in range(500)}}, {"rows": [1] * 10_000})
    assert len(repr(record)) < 600
    assert re.fullmatch(
        r"CriticalTime\(spectral, sigma 1.336 \[1.199, 1.477\], jackknife\)",
        repr(sb.speciation_time(sb.Moments.fit(sb.images("digits")))),
    )


@pytest.mark.parametrize(
    "name",
    ["Curve", "one level", "speciation_time", "nowhere", "Moments", "LowRankMoments", "LateStart", "Record", "images"]
    + ["samples", "choice", "information", "cloning"],
)
def test_it_draws_itself(objects, name):
    for one in (o for n, o in each(objects) if n == name):
        ax = Figure().subplots()
        assert one.plot(ax) is ax
        assert ax.lines or ax.images or ax.texts
        assert "data:image/png" in one._repr_html_()
    assert one.plot().figure.number  # pyplot's, which a notebook shows


def test_pictures_of_any_shape_draw():
    for shape in ((20, 3), (20, 2, 9), (20, 5, 4, 4), (3, 3, 4, 4), (20, 1, 4, 4, 4)):
        data = sb.samples(np.random.default_rng(0).normal(size=shape), scale="standard")
        ax = data.plot(Figure().subplots())
        assert ax.lines or ax.images


def test_a_picture_that_fails_does_not_take_the_object_along():
    record = sb.Record("phases", {}, {"criteria": "nonsense"})
    shown = record._repr_html_()
    assert shown.startswith("<pre>Record(phases")
    assert "No picture: " in shown
    assert "<img" not in shown
    bad = sb.Record("<script>", {}, {})._repr_html_()
    assert "<script>" not in bad
    with pytest.raises(sb.InputError, match="no picture for records of kind 'x'"):
        sb.Record("x", {}, {}).plot()


def test_a_class_with_a_repr_keeps_it():
    class Base(Shown):
        def __repr__(self):
            return "mine"

    class Below(Base):
        pass

    assert repr(Below()) == "mine"
    assert brief({"a": 1, "b": [0.25] * 9}) == "{'a': 1, 'b': 9 entries}"
    assert brief(np.array([1, 2])) == "int64[2] 1 .. 2"
    assert brief(np.array(["a"])) == "<U1[1]"
    assert brief(torch.tensor(2.0)) == "2"
    assert len(brief("x" * 1000)) <= 90


def test_bars_of_long_work(capsys, monkeypatch):
    points = sb.Mixture.from_parameters([[-1.0], [1.0]], 0.01)
    x = points.sample(20, 0.0, torch.Generator().manual_seed(0))
    sb.loss_curve(points, x, [1.0, 2.0], run=sb.Run())
    assert capsys.readouterr().err == ""
    sb.loss_curve(points, x, [1.0, 2.0], run=sb.Run(progress=True))
    assert re.search(r"loss: 100%.* 2/2", capsys.readouterr().err)
    # a notebook says nothing and has them, too
    monkeypatch.setitem(sys.modules, "ipykernel", sys)
    sb.loss_curve(points, x, [1.0, 2.0])
    assert "2/2" in capsys.readouterr().err
    sb.loss_curve(points, x, [1.0, 2.0], run=sb.Run(progress=False))
    assert capsys.readouterr().err == ""


def test_fit_start_says_how_far_it_is():
    pipe, data, seen = sb.load_pipeline("digits"), sb.images("digits"), []
    scheduler = sb.scheduler("ddim", like=pipe.scheduler)
    sb.fit_start(data, sb.Gaussian.fit(data), scheduler, 2, check=False, run=sb.Run(progress=lambda *a: seen.append(a)))
    assert list(dict.fromkeys(stage for stage, *_ in seen)) == ["loss", "starts"]
    assert seen[-1][1] == seen[-1][2]
