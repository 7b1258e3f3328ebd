"""A network that learns only what a law does not know."""

import dataclasses
import json
import math
import warnings
from functools import partial
from types import SimpleNamespace

import diffusers
import numpy as np
import pandas as pd
import pytest
import torch

import symbreak as sb
from symbreak.data.held_out import held_out
from symbreak.networks.families import as_unet, denoiser
from symbreak.networks.residual import LawResidual, Mlp, law_error
from symbreak.noise import NoiseLevel
from symbreak.phases.fixed_point_search import System
from symbreak.phases.stability import network_stability
from symbreak.runtime.files import InputError
from symbreak.start.late_start import LateStartWarning
from symbreak.start.loading import _loaded, load_pipeline
from symbreak.start.objectives import noising
from symbreak.start.pipeline import LateStartPipeline
from symbreak.start.recipe import Recipe
from symbreak.start.train import _Training, train_network
from symbreak.start.training_law import _copies, training_law
from tests.test_cli import symbreak
from tests.worlds import small_choice

SMALL = Recipe(channels=(8, 16), steps=24, batch=64, warmup=5, dropout=0.0, lr=3e-3, clusters=10, folds=2)


@pytest.fixture(scope="module")
def digits():
    return sb.images("digits")


@pytest.fixture(scope="module")
def few(digits):
    """Enough where a training is to be whole, but its network need not be good."""
    return digits.subset(320)


@pytest.fixture(scope="module", autouse=True)
def a_small_choice():
    """These tests are of the network and its law, not of the choice of a start."""
    with small_choice():
        yield


@pytest.fixture(scope="module")
def folder(digits, tmp_path_factory):
    out = tmp_path_factory.mktemp("residual") / "net"
    train_network(digits, out, dataclasses.replace(SMALL, steps=60), law="auto")
    return out


def isotropic(variance, shape=(1, 4, 4), n=4000):
    """A Gaussian whose covariance is exactly a multiple of the identity, and whose mean is 0."""
    d = int(np.prod(shape))
    x = torch.linalg.qr(torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))[0]
    x = torch.cat([x, -x])
    return sb.Gaussian.fit((x * (variance * (len(x) - 1) / 2) ** 0.5).reshape(-1, *shape))


def test_edm_is_the_case_of_an_isotropic_gaussian():
    """D = c_skip x + c_out F(c_in x, sigma), with EDM's own coefficients (arXiv:2206.00364, table 1)."""
    v = 0.25
    law = isotropic(v)
    sigmas = torch.tensor([0.02, 0.3, 1.0, 5.0], dtype=torch.float64)
    error = torch.stack([e := torch.logspace(-3, 2, 200, dtype=torch.float64), v * e**2 / (v + e**2)])
    d = LawResidual(law, lambda x, s: torch.sin(3 * x) + s.reshape(-1, 1, 1, 1), error=error)
    x = torch.randn(4, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    s = sigmas.reshape(-1, 1, 1, 1)
    c_in, c_skip, c_out = (s**2 + v).rsqrt(), v / (s**2 + v), s * v**0.5 * (s**2 + v).rsqrt()
    edm = c_skip * x + c_out * (torch.sin(3 * c_in * x) + s)
    # c_out is interpolated among 200 levels
    torch.testing.assert_close(d(x, sigmas), edm, rtol=1e-4, atol=1e-4)


def test_a_perfect_correction_gives_the_exact_denoiser():
    """Two Gaussians posing as the truth, one Gaussian as the law: F that knows the difference makes D exact."""
    g = torch.Generator().manual_seed(0)
    points = (
        torch.randn(400, 3, generator=g) * 0.3 + torch.tensor([[1.0, 0, 0]]) * (torch.arange(400) % 2 * 2 - 1)[:, None]
    )
    truth = sb.Mixture.fit(points, components=2)
    law = sb.Gaussian.fit(points)
    d = LawResidual(law, lambda x, s: x, top=2.0)

    def perfect(x, s):
        raw = x / (s[:, None] ** 2 + d.size).rsqrt()
        return (truth.denoise(raw, s) - law.denoise(raw, s)) / d.scale(s)[:, None]

    d.network = perfect
    x = torch.randn(50, 3, dtype=torch.float64, generator=g)
    for sigma in (0.2, 1.0, 2.0):
        torch.testing.assert_close(d(x, sigma), truth.denoise(x, sigma))
    torch.testing.assert_close(d(x, 2.5), law.denoise(x, 2.5))  # above the top the law answers alone
    mixed = d(x, torch.linspace(0.5, 3.5, 50, dtype=torch.float64))
    torch.testing.assert_close(
        mixed[:25], truth.denoise(x[:25], torch.linspace(0.5, 3.5, 50, dtype=torch.float64)[:25])
    )


def test_a_residual_has_a_derivative(folder):
    """By forward mode, as `phases` takes it, against a difference of two answers of the float32 network."""
    pipe = load_pipeline(folder)
    d = denoiser(pipe.unet, pipe.scheduler)
    g = torch.Generator().manual_seed(0)
    x, v = torch.randn(2, 8, 1, 8, 8, dtype=torch.float64, generator=g)
    found = network_stability(d, [1.0, 0.3], "sde", "ve")
    assert np.isfinite(found.eigenvalues).all()
    system = System(d, "sde", "ve", None)
    jv = system.products(x[0].numpy().reshape(-1), v.numpy().reshape(8, -1), np.log(0.3))
    with torch.no_grad():
        apart = [d(x[:1] + h * v, 0.3) for h in (-0.01, 0.01)]
    expected = ((apart[1] - apart[0]) / 0.02).reshape(8, -1).numpy() / system.kappa(np.log(0.3))
    np.testing.assert_allclose(jv, expected, atol=0.01 * np.abs(expected).max())


def test_the_target_has_unit_variance_at_every_level(digits):
    law, unseen = sb.Gaussian.fit(digits), sb.images("digits:held-out").tensor()
    d = LawResidual(law, lambda x, s: 0 * x, error=law_error(law, unseen, 1.5), top=1.5)
    noise = torch.randn(unseen.shape, generator=torch.Generator().manual_seed(5))
    for sigma in (0.01, 0.1, 0.5, 1.4):
        target = (unseen - law.denoise(unseen + sigma * noise, sigma)) / d.scale(torch.tensor([sigma]))
        assert abs(float(target.square().mean()) - 1) < 0.03


def test_an_interrupted_training_ends_with_the_same_bits(few, tmp_path):
    whole = train_network(few, tmp_path / "a", SMALL, law="auto")

    def stop(stage, done, total):
        if (stage, done) == ("steps", 10):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_network(few, tmp_path / "b", SMALL, law="auto", run=sb.Run(progress=stop))
    again = train_network(few, tmp_path / "b", SMALL, law="auto")
    assert again["loss"] == whole["loss"]
    assert again["looks"] == whole["looks"]
    assert again["start"] == whole["start"]
    with pytest.raises(InputError, match="Pass the folder above, with its law"):
        load_pipeline(tmp_path / "a" / "unet")
    for name in ("unet/diffusion_pytorch_model.safetensors", "start.safetensors", "residual.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert train_network(few, tmp_path / "a", SMALL, law="auto") == whole  # finished: nothing is trained again
    with pytest.raises(InputError, match="other settings: law"):
        train_network(few, tmp_path / "a", SMALL)


def test_the_network_adds_to_the_law(digits, folder):
    made = json.loads((folder / "training.json").read_text())
    unseen = sb.images("digits:held-out").tensor()
    pipe = load_pipeline(folder)
    noise = torch.randn(unseen.shape, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        network = (denoiser(pipe.unet, pipe.scheduler)(unseen + 0.2 * noise, 0.2) - unseen).square().flatten(1).sum(1)
    law = (pipe.start.law.denoise(unseen + 0.2 * noise, 0.2) - unseen).square().flatten(1).sum(1)
    gap = (law - network).double()
    assert gap.mean() > 4 * gap.std() / len(gap) ** 0.5
    rows = made["looks"]["rows"]
    assert rows[-1]["step"] == 60
    assert len(rows) == 8
    middle = [i for i, s in enumerate(made["looks"]["sigma"]) if 0.1 < s < 0.5]
    assert all(rows[-1]["loss"][i] < made["looks"]["law"][i] for i in middle)
    assert (folder / "training.png").stat().st_size > 10_000
    assert len(list((folder / "previews").glob("*.png"))) == 8


def test_one_folder_serves_all_ways_of_sampling(folder):
    late, plain = LateStartPipeline.from_pretrained(folder), load_pipeline(folder)
    generators = [torch.Generator().manual_seed(i) for i in range(3)]
    late.set_progress_bar_config(disable=True)
    images = late(batch_size=3, generator=generators, output_type="latent").images
    same = sb.generate(plain.unet, plain.start, range(3), clamp=False)
    assert torch.equal(images, same)
    x = 2.0 * torch.randn(5, 1, 8, 8)
    with torch.no_grad():
        d = denoiser(plain.unet, plain.scheduler)
        torch.testing.assert_close(d(x, 5.0), plain.start.law.denoise(x, 5.0), rtol=1e-4, atol=1e-4)
    with pytest.raises(Exception, match="LateStartPipeline"):  # of diffusers: it cannot sample the network alone
        diffusers.DiffusionPipeline.from_pretrained(str(folder), local_files_only=True)


def test_classes_and_the_null_class(few, tmp_path, capsys):
    recipe = dataclasses.replace(SMALL, conditional=True, steps=16)
    train_network(few, tmp_path / "a", recipe, law="auto")
    pipe = load_pipeline(tmp_path / "a")
    assert pipe.unet.config.num_class_embeds == 11
    law = pipe.start.law
    x = 6.0 * torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for label, expected in ((3, law.given(3)), (10, law)):  # above the top: the class's own law, or that of all
            d = denoiser(pipe.unet, pipe.scheduler, class_labels=torch.full((4,), label))
            torch.testing.assert_close(d(x, 6.0), expected.denoise(x, 6.0), rtol=1e-3, atol=1e-3)
    images = sb.generate(pipe.unet, pipe.start, range(4), labels=3)
    assert bool(torch.isfinite(images).all())
    d = denoiser(pipe.unet, pipe.scheduler)
    guide, y = sb.guided(d, pipe.unet.config.null_label, 2.0), torch.tensor([0, 1, 2, 3])
    with torch.inference_mode():
        with_class, without = (d.bind(class_labels=c)(x, 0.5) for c in (y, torch.full((4,), 10)))
        torch.testing.assert_close(guide.bind(class_labels=y)(x, 0.5), 2 * with_class - without, rtol=1e-4, atol=1e-4)
    assert not torch.equal(sb.generate(guide, pipe.start, range(4), labels=3), images)
    command = ("sample", "--model", tmp_path / "a", "--class", "3", "--seeds", "0-3", "--json")
    code, out, err = symbreak(capsys, *command, "--out", tmp_path / "x")  # from its own start, in the class's own law
    assert (code, "null_label" in err) == (0, False), err  # as diffusers would say of a setting that is not its own
    assert json.loads(out)["calls"] == pipe.start.calls
    code, out, err = symbreak(capsys, *command, "--guidance", 2, "--out", tmp_path / "y")
    assert json.loads(out)["calls"] == 2 * pipe.start.calls
    fit = ("fit", "--start", "--data", "digits", "--model", tmp_path / "a", "--steps", 3, "--clusters", 20)
    code, out, err = symbreak(capsys, *fit, "--out", tmp_path / "s.safetensors")
    assert code == 0, err
    with pytest.raises(InputError, match="has no labels"):
        train_network(sb.images(torch.rand(300, 1, 8, 8)), tmp_path / "b", recipe, law="auto")


def test_vectors_and_signals(tmp_path):
    g = torch.Generator().manual_seed(0)
    for name, shape in (("vectors", (5,)), ("signals", (2, 6))):
        d = int(np.prod(shape))
        centres = torch.tensor([[-2.0], [2.0]]) * torch.ones(2, d)
        points = (centres[torch.arange(600) % 2] + 0.5 * torch.randn(600, d, generator=g)).reshape(600, *shape)
        recipe = Recipe(channels=(16,), steps=80, batch=128, warmup=5, lr=3e-3, folds=2, clusters=2)
        result = train_network(sb.samples(points), tmp_path / name, recipe, law="auto")
        assert result["parameters"] > 1000
        pipe = load_pipeline(tmp_path / name)
        x = sb.generate(pipe.unet, pipe.start, range(256), clamp=False)
        assert x.shape == (256, *shape)
        means = x.flatten(1).mean(1)
        assert abs(float(means.abs().mean()) - 2) < 0.2
        assert 0.3 < float((means > 0).double().mean()) < 0.7
        with pytest.raises(InputError, match="trained with a law"):
            train_network(sb.samples(points), tmp_path / "none", recipe)


def test_going_on_from_a_finished_network(digits, folder, tmp_path):
    result = train_network(
        digits, tmp_path / "a", dataclasses.replace(SMALL, steps=2, lr=1e-5), law="auto", init=folder
    )
    before = json.loads((folder / "training.json").read_text())
    first = result["looks"]["rows"][0]["loss"]
    assert np.allclose(first, before["looks"]["rows"][-1]["loss"], rtol=0.02)
    with pytest.raises(InputError, match="of another architecture"):
        train_network(digits, tmp_path / "b", dataclasses.replace(SMALL, channels=(8, 24)), law="auto", init=folder)


def test_an_audit_looks_at_the_samples_that_the_network_makes(digits, folder, capsys):
    """From its own start, as `sample` does; it was from white noise, 50 evaluations, samples that nobody makes."""
    pipe = sb.load_pipeline(folder)
    own = pipe.start
    said = sb.audit(digits.subset(200), model=pipe, sampling=sb.Sampling(count=20)).content["samples"]["start"]
    assert said.endswith(f"at sigma {own.level.sigma:.3g}, {own.calls} network evaluations a sample")
    assert not said.startswith("white noise")
    settings = ("--data", "digits", "--limit", 200, "--model", folder, "--count", "20", "--json")
    # with other steps from the nearest level that the scheduler has for them
    for more, calls in (((), own.calls), (("--steps", "4"), 4)):
        code, out, err = symbreak(capsys, "audit", *settings, *more)
        assert code == 0, err
        begins = json.loads(out)["content"]["samples"]["start"]
        assert begins.startswith(said.split(" at sigma")[0])
        assert begins.endswith(f"{calls} network evaluations a sample")
    other = sb.Sampling(count=20, sampler="ddim", steps=3).begin(pipe)
    assert type(other.full).__name__ == "DDIMScheduler"
    assert other.law is own.law
    assert other.calls == 3
    assert abs(math.log(other.level.sigma / own.level.sigma)) < 0.5  # the nearest that the grid has
    # a start that is passed keeps its sampler
    assert type(sb.Sampling(count=20, start=other, steps=2).begin(pipe).full).__name__ == "DDIMScheduler"


def test_a_network_goes_on_as_what_it_is(digits, folder, tmp_path, capsys, monkeypatch):
    with pytest.raises(InputError, match=r"digits is a plain network, and would go on as the residual"):
        train_network(digits, tmp_path / "b", law="auto", init="digits")
    with pytest.raises(InputError, match=r"net is the residual of a law, and would go on as a plain network"):
        train_network(digits, tmp_path / "b", init=folder)
    loaded = []
    monkeypatch.setattr(
        "symbreak.start.loading._loaded", lambda source, *rest: loaded.append(source) or _loaded(source, *rest)
    )
    settings = ("--recipe", tmp_path / "r.json", "--init", folder, "--residual", "--out", tmp_path / "c", "--json")
    (tmp_path / "r.json").write_text(json.dumps({**SMALL.settings(), "steps": 1}))
    code, _, err = symbreak(capsys, "train", "--data", "digits", *settings)
    assert code == 0, err
    assert loaded == [str(folder)]


def test_a_network_of_scaled_data_remembers_its_units(tmp_path, capsys):
    """Samples come out in the columns' own units, by every way but `generate`, which says the network's."""
    g = torch.Generator().manual_seed(0)
    rows = torch.randn(300, 2, generator=g) * torch.tensor([2.0, 300.0]) + torch.tensor([50.0, -4000.0])
    pd.DataFrame(rows.numpy(), columns=["height", "depth"]).to_csv(tmp_path / "t.csv", index=False)
    data = sb.samples(tmp_path / "t.csv", scale="standard")
    recipe = Recipe(channels=(8,), steps=2, batch=32, warmup=1, folds=2, clusters=2)
    net = tmp_path / "net"
    train_network(data, net, recipe, law="auto")
    late, plain = LateStartPipeline.from_pretrained(net), load_pipeline(net)
    assert plain.start.units.same(data.units)
    assert plain.start.units.columns == ("height", "depth")
    late.set_progress_bar_config(disable=True)
    raw = sb.generate(plain.unet, plain.start, range(4))
    seeds = [torch.Generator().manual_seed(i) for i in range(4)]
    images = late(batch_size=4, generator=seeds, output_type="np").images
    np.testing.assert_allclose(images, data.unscaled(raw), rtol=1e-12)
    for i, more in enumerate(
        ((), ("--steps", 3), ("--start", "none"), ("--data", tmp_path / "t.csv", "--scale", "standard"))
    ):
        command = ("sample", "--model", net, "--seeds", "0-199", "--out", tmp_path / f"s{i}", "--json", *more)
        code, _, err = symbreak(capsys, *command)
        assert code == 0, err
        table = pd.read_csv(tmp_path / f"s{i}" / "samples.csv")
        assert list(table) == ["height", "depth"]
        # 200 samples of a barely trained network: its law knows mean and spread
        np.testing.assert_allclose(table.mean(), rows.mean(0), atol=60)
        assert 0.7 < table["depth"].std() / 300 < 1.4
    code, _, err = symbreak(capsys, "sample", "--model", net, "--data", tmp_path / "t.csv", "--out", tmp_path / "x")
    assert code == 2
    assert "measured in standard deviations of each column (height " in err
    for command in (("evaluate", "--seeds", "0-19"), ("audit", "--count", "20"), ("phases",)):
        code, _, err = symbreak(capsys, *command, "--model", net, "--data", tmp_path / "t.csv")
        assert code == 2, command
        assert "the network's samples are measured in" in err
    # a start that is fitted on its data and saved knows them, too
    base = sb.scheduler("dpm++2m", like=plain.scheduler)
    start = sb.fit_start(data, plain.unet, base, 3, check=False)
    start.save(tmp_path / "start.safetensors")
    assert sb.LateStart.load(tmp_path / "start.safetensors").units.same(data.units)


@pytest.mark.parametrize("shape", [(5,), (2, 6), (1, 3, 4, 4), (5, 4, 4)])
def test_pipelines_give_samples_that_are_no_pictures_as_they_are(shape, tmp_path):
    g = torch.Generator().manual_seed(0)
    data = sb.samples(torch.randn(60, *shape, generator=g) * 3 + 10, scale="standard")
    law = sb.Gaussian.fit(data)
    base = sb.scheduler("dpm++2m")
    start = sb.late_start(base, law, 4, at=NoiseLevel(1.0), check=False).of(data)
    pipe = LateStartPipeline(as_unet(law, base), start.scheduler, start)
    pipe.set_progress_bar_config(disable=True)
    raw, array, tensor = (
        pipe(40, torch.Generator().manual_seed(1), output_type=o).images for o in ("latent", "np", "pt")
    )
    assert array.shape == tensor.shape == (40, *shape)
    assert isinstance(array, np.ndarray)
    np.testing.assert_allclose(array, data.unscaled(raw))
    np.testing.assert_allclose(tensor, array)
    assert abs(array.mean() - 10) < 1
    assert 2 < array.std() < 4
    with pytest.raises(InputError, match=r"are no pictures\. Pass output_type='latent', 'pt' or 'np'"):
        pipe(2)
    standard = sb.standard_start(base, 4)  # which knows no units: the network's own
    plain = LateStartPipeline(as_unet(law, base), standard.scheduler, standard)
    plain.set_progress_bar_config(disable=True)
    a, b = (plain(3, torch.Generator().manual_seed(1), output_type=o).images for o in ("latent", "np"))
    np.testing.assert_allclose(a, b)


def test_minutes_become_steps_once(few, tmp_path):
    recipe = dataclasses.replace(SMALL, minutes=0.02)

    def stop(stage, done, total):
        if stage == "steps":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_network(few, tmp_path / "a", recipe, law="auto", run=sb.Run(progress=stop))
    tensors, _ = sb.runtime.files.read_tensors(tmp_path / "a" / "checkpoint.safetensors")
    result = train_network(few, tmp_path / "a", recipe, law="auto")
    assert result["recipe"]["steps"] == int(tensors["seconds"][1]) == result["looks"]["rows"][-1]["step"]


def test_minutes_count_looks_and_the_choice_of_a_start(few, tmp_path, capsys):
    looks = SimpleNamespace(seconds=[5.0], known=object())
    training = SimpleNamespace(recipe=Recipe(minutes=10.0), looks=looks, losses=[0.0] * 100, steps=1000, spent=300.0)
    training._left = partial(_Training._left, training)
    # 300 s are left, less 9 looks for the last one and the choice of a start, less what looks may still take
    assert training._left() == 300 - 45 - (60 - 5)
    _Training.paced(training, 205.0, 100)  # 2 s a step
    assert training.steps == 100 + 100
    _Training.paced(training, 15.0, 100)  # never more than were planned
    assert training.steps == 200
    assert _Training.affordable(training)
    looks.seconds = [5.0] * 12
    assert not _Training.affordable(training)
    made = train_network(few, tmp_path / "a", dataclasses.replace(SMALL, minutes=1e-3), law="auto")
    assert made["recipe"]["steps"] == 16
    assert "s of 0.001 minutes are spent before the first step: 16 steps are made." in capsys.readouterr().err


def test_a_law_that_was_fitted_elsewhere(few, tmp_path):
    law = sb.Gaussian.fit(few)
    result = train_network(few, tmp_path / "a", dataclasses.replace(SMALL, steps=2), law=law)
    assert result["law"] == repr(law)
    assert result["folds"] == 1
    with pytest.raises(InputError, match=r"a law of shape \(1, 4, 4\) for data of \(1, 8, 8\)"):
        train_network(few, tmp_path / "b", SMALL, law=isotropic(0.25))
    with pytest.raises(InputError, match="another range"):
        train_network(few, tmp_path / "b", SMALL, law=sb.Gaussian.fit(100 * few.tensor()))
    with pytest.raises(InputError, match="law='best'"):
        train_network(few, tmp_path / "b", SMALL, law="best")
    with pytest.raises(InputError, match="below sigma 500"):
        train_network(few, tmp_path / "b", dataclasses.replace(SMALL, top=500.0), law=law)
    with pytest.raises(InputError, match=r"expected at least 160"):
        train_network(few.subset(60), tmp_path / "b", SMALL, law="auto")
    assert not list((tmp_path / "b").glob("*"))


def test_a_law_that_copies_is_told(digits, tmp_path):
    some = digits.tensor()[:300]
    spikes = sb.Mixture.from_parameters(some.flatten(1).double(), torch.full((300,), 1e-4, dtype=torch.float64))
    spikes.shape = (1, 8, 8)
    data, recipe = digits.take(np.arange(300), "300"), dataclasses.replace(SMALL, steps=2)
    with pytest.warns(LateStartWarning, match="draws of the law are copies of training images"):
        train_network(data, tmp_path / "a", recipe, law=spikes)


def test_a_top_below_the_collapse_level_is_told(digits, tmp_path):
    law, few = sb.Gaussian.fit(digits), digits.subset(300)
    level = sb.collapse_time(sb.Empirical(held_out(few, None, 0.1, fewest=16, bundled=False).train.tensor())).sigma
    with pytest.warns(LateStartWarning, match=rf"alone above sigma 0\.2, and below {level:.3g} the training images"):
        train_network(few, tmp_path / "a", dataclasses.replace(SMALL, top=0.2, steps=2), law=law)


def test_a_backbone_of_another_output_shape(digits):
    law = sb.Gaussian.fit(digits)
    d = LawResidual(law, lambda x, s: x[..., 1:])
    with pytest.raises(InputError, match=r"gave \(2, 1, 8, 7\) for states of \(2, 1, 8, 8\)"):
        d(torch.zeros(2, 1, 8, 8), 0.5)
    with pytest.raises(InputError, match="below sigma 0"):
        LawResidual(law, Mlp((1, 8, 8)), top=0.0)
    with pytest.raises(InputError, match="two rows"):
        LawResidual(law, Mlp((1, 8, 8)), error=torch.tensor([[1.0, 2.0], [0.0, 1.0]]))


def test_a_residual_is_saved_only_with_a_start_from_its_own_law(digits, tmp_path):
    law = sb.Gaussian.fit(digits)
    unet = as_unet(LawResidual(law, Mlp((1, 8, 8)), top=1.0), noising())
    other = sb.late_start(noising(), isotropic(0.3, (1, 8, 8)), 5, at=NoiseLevel(1.0), check=False)
    with pytest.raises(InputError, match="residual of another law than the start's"):
        LateStartPipeline(unet, other.scheduler, other).save_pretrained(tmp_path / "a")
    start = sb.late_start(noising(), law, 5, at=NoiseLevel(1.0), check=False)
    LateStartPipeline(unet, start.scheduler, start).save_pretrained(tmp_path / "b")
    assert type(LateStartPipeline.from_pretrained(tmp_path / "b").unet.source.network).__name__ == "Mlp"
    text = json.loads((tmp_path / "b" / "residual.json").read_text())
    for change in ({"version": "2"}, {"error": [[1.0]]}, {"top": -1}, {"error": "x"}):
        (tmp_path / "b" / "residual.json").write_text(json.dumps({**text, **change}))
        with pytest.raises(InputError):
            load_pipeline(tmp_path / "b")


def test_the_command_line(capsys, tmp_path):
    recipe = {"channels": [8, 16], "steps": 20, "warmup": 2, "folds": 2, "clusters": 10}
    (tmp_path / "r.json").write_text(json.dumps(recipe))
    net = tmp_path / "net"
    argv = ("train", "--data", "digits", "--limit", 320, "--recipe", tmp_path / "r.json", "--residual", "--out", net)
    code, out, _ = symbreak(capsys, *argv)
    assert code == 0
    assert "Squared error of an image that the start adds" in out
    code, out, _ = symbreak(capsys, "sample", "--model", net, "--seeds", "0-3", "--out", tmp_path / "s", "--json")
    assert code == 0
    assert json.loads(out)["steps"] == 5
    settings = ("--steps", "3", "--seeds", "0-3", "--out", tmp_path / "s3", "--json")
    code, out, _ = symbreak(capsys, "sample", "--model", net, *settings)
    assert code == 0
    assert json.loads(out)["calls"] == 3
    code, out, err = symbreak(capsys, "train", "--data", "digits", "--minutes", "1", "--steps", "3", "--out", net)
    assert code == 2
    assert "--steps and --minutes" in err


def test_classes_with_gaps_are_trained_and_shown(tmp_path):
    """The grids show the classes that there are, not 0, 1, 2, ..."""
    x = torch.rand(160, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    data = sb.images(x, labels=[3] * 80 + [70] * 80)
    made = train_network(data, tmp_path / "net", dataclasses.replace(SMALL, steps=2, conditional=True), law="auto")
    assert len(list((tmp_path / "net" / "previews").glob("*.png"))) == len(made["looks"]["rows"])
    pipe = load_pipeline(tmp_path / "net")
    assert sb.generate(pipe.unet, pipe.start, [0, 1], torch.tensor([3, 70])).shape == (2, 1, 8, 8)


def test_copies_are_told_from_chance_and_from_doubles():
    g = torch.Generator().manual_seed(0)
    numbers = torch.randn(2000, 1, generator=g)
    share = _copies(sb.Gaussian.fit(numbers).sample(256, generator=g), numbers)
    assert share["low"] < 1 / 3 < share["high"]  # in one dimension every third is that near, by chance
    pairs = torch.randn(10, 20, generator=g).repeat_interleave(50, 0)
    draws = sb.Empirical(pairs).sample(256, generator=g)
    assert _copies(draws, pairs)["low"] > 0.9
    assert _copies(draws, pairs[:50])["count"] == 256  # of one image


def test_chance_is_no_copying(tmp_path):
    numbers = sb.samples(torch.randn(200, 1, generator=torch.Generator().manual_seed(0)))
    grey = torch.randint(0, 256, (300, 1, 1, 1), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    pixels = sb.images(grey, layout="NCHW")
    with warnings.catch_warnings():
        warnings.simplefilter("error", LateStartWarning)
        training_law(numbers, SMALL, "auto")
        # along a line every third lies that near to one of them, by chance
        copies = training_law(pixels, SMALL, "auto").copies
    assert copies["share"] > 1 / 3
