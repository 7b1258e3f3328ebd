"""Class-conditional networks in the commands: classes, guidance, its window, and what a sample then costs."""

import json

import diffusers
import numpy as np
import pytest
import torch
from diffusers import ClassifierFreeGuidance
from PIL import Image

import symbreak as sb
from symbreak.cli import options
from symbreak.networks.families import as_unet, denoiser
from symbreak.noise import generator, schedule
from symbreak.runtime.errors import InputError
from symbreak.start.classes import Classes
from symbreak.start.late_start import standard_start
from symbreak.start.recipe import Recipe
from symbreak.start.sample import decisive, evaluations, generate, write_images
from symbreak.start.train import train_network
from tests.test_class_information import LAWS, Conditional, classy
from tests.test_cli import symbreak


def network(classes=11):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return diffusers.UNet2DModel(
            sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 8), norm_num_groups=4,
            layers_per_block=1, down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
            num_class_embeds=classes,
        ).eval()  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random network of ten classes and a null class, which its config names."""
    path, unet = tmp_path_factory.mktemp("conditional") / "net", network()
    unet.register_to_config(null_label=10)
    diffusers.DDPMPipeline(unet, sb.scheduler("ddpm")).save_pretrained(path)
    return path


def cheap(*more):
    return ("--sampler", "ddim", "--steps", 4, "--seeds", "0-5", *more)


def pixels(path):
    return np.stack([np.asarray(Image.open(p)).astype(int) for p in sorted(path.glob("*.png"))])


def of_diffusers(unet, start, seeds, labels, null, scale, window=(0.0, np.inf)):
    """Samples with diffusers' own guidance: both branches in one batch, its guider inside the window."""
    guider, levels = ClassifierFreeGuidance(guidance_scale=scale), schedule(start.full)
    state = torch.stack([torch.randn(unet.config.in_channels, 8, 8, generator=generator_of(s)) for s in seeds])
    y, scheduler, cost = torch.tensor(labels), start.fresh(), 0
    with torch.inference_mode():
        for i, t in enumerate(start.scheduler.timesteps):
            inside = window[0] < levels.level(float(t)).sigma <= window[1]
            guider.set_state(step=i, num_inference_steps=start.calls, timestep=t)
            if inside:
                twice = unet(torch.cat([state, state]), t, torch.cat([torch.full_like(y, null), y])).sample
                without, with_condition = twice.chunk(2)
                out = guider.forward(with_condition, without).pred
            else:
                out = unet(state, t, y).sample
            cost += 1 + inside
            state = scheduler.step(out, t, state).prev_sample
    return state, cost


def generator_of(seed):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("window", [None, (1.0, 20.0)])
def test_the_sampling_loop_is_diffusers_own_guidance(window):
    unet, base = network(), sb.scheduler("ddim", clip_sample=False)
    start, labels = standard_start(base, 6), [0, 3, 7]
    wanted, cost = of_diffusers(unet, start, range(3), labels, 10, 2.5, window or (0.0, np.inf))
    guide = sb.guided(denoiser(unet, base), 10, 2.5, window)
    images = generate(guide, start, range(3), labels, clamp=False)
    # One batch of twice the size here and there, padded here; single precision, states of some tens.
    torch.testing.assert_close(images, wanted, rtol=1e-4, atol=1e-4)
    assert evaluations(guide, start) == cost == (12 if window is None else 9)
    assert evaluations(unet, start) == 6
    assert torch.equal(generate(as_unet(guide, base), start, range(3), labels, clamp=False), images)
    pipe = sb.LateStartPipeline(as_unet(guide, base), start.scheduler, start)
    pipe.set_progress_bar_config(disable=True)
    generators = [generator_of(s) for s in range(3)]
    out = pipe(3, generators, class_labels=labels, output_type="latent").images
    assert torch.equal(out, images)
    other = generate(sb.guided(denoiser(unet, base), 10, 4.0, window), start, range(3), labels, clamp=False)
    assert float((other - images).abs().max()) > 1e-2


def test_another_null_class_is_another_network_wherever_the_window_lies(tmp_path):
    """The window holds none of the levels at which a network's answers are compared, nor the sampler's first."""
    unet, base = network(), sb.scheduler("ddim", clip_sample=False)
    start, identities = standard_start(base, 6), []
    for null in (10, 9):
        guide = sb.guided(denoiser(unet, base), null, 3.0, (2.0, 8.0))
        images = generate(guide, start, range(3), [0, 3, 7], run=sb.Run(tmp_path))
        assert torch.equal(images, generate(guide, start, range(3), [0, 3, 7]))
        identities.append(decisive(guide, start, 64)["identity"])
    assert identities[0] != identities[1]


def test_finished_samples_of_another_class_are_others_where_it_counts_below_the_first_step_only(tmp_path):
    class Late(torch.nn.Module):
        num_class_embeds = 3

        def forward(self, x, sigma, class_labels):
            below = (sigma < 1.0).double() * class_labels
            return (x / (1 + sigma.reshape(-1, 1) ** 2) + below.reshape(-1, 1)).to(x)

    start = standard_start(sb.scheduler("ddim", clip_sample=False), 6)
    for label in (1, 2):
        d = denoiser(Late(), shape=(2,), sigma_range=(0.01, 100.0), class_labels=torch.tensor([label]))
        cached, fresh = (generate(d, start, range(3), run=run) for run in (sb.Run(tmp_path), None))
        assert torch.equal(cached, fresh)


def test_both_branches_are_one_batch_where_they_are_one_network():
    class Counting(torch.nn.Module):
        num_class_embeds, sizes = 3, []

        def forward(self, x, sigma, class_labels):
            self.sizes.append(len(x))
            return 0.5 * x * class_labels.reshape(-1, 1)

    model = Counting()
    d = denoiser(model, shape=(2,), sigma_range=(0.01, 10.0))
    y, x = torch.tensor([0, 1, 1]), torch.ones(3, 2)
    guide = sb.guided(d, 2, 3.0, (0.5, 2.0)).bind(class_labels=y)
    out = guide(x, 1.0)
    torch.testing.assert_close(out[:, 0], 1.0 + 3 * (0.5 * y - 1.0))
    torch.testing.assert_close(guide(x, torch.tensor([1.0, 3.0, 1.0]))[:, 0], torch.tensor([-2.0, 0.5, -0.5]))
    guide(x, 3.0)
    assert model.sizes == [6, 6, 3]


def test_every_seed_has_its_class():
    turn = Classes((0, 3, 7))
    assert turn.of([5, 0, 4]).tolist() == [7, 0, 3]
    shares = Classes((0,) * 30 + (1,) * 60 + (4,) * 10, shares=True)
    for first in (0, 1000, 12345):
        counts = torch.bincount(shares.of(range(first, first + 200)), minlength=5).tolist()
        assert all(abs(a - b) <= 3 for a, b in zip(counts, (60, 120, 0, 0, 20)))
    assert shares.to_dict() == {"shares": {"0": 30, "1": 60, "4": 10}}
    with pytest.raises(InputError, match="has no labels"):
        Classes.of_data(sb.images(torch.rand(20, 1, 8, 8)))


def test_sample_with_classes_and_guidance(capsys, folder, tmp_path):
    common = ("sample", "--model", folder, "--class", "0,3,7")
    code, out, err = symbreak(capsys, *common, *cheap("--json", "--out", tmp_path / "plain"))
    assert code == 0, err
    plain = json.loads(out)
    assert (plain["calls"], plain["classes"], plain["made"]) == (4, {"in_turn": [0, 3, 7]}, 6)
    more = ("--guidance", 3, "--window", "1,20")
    code, out, err = symbreak(capsys, *common, *cheap("--json", *more, "--out", tmp_path / "guided"))
    assert code == 0, err
    guided = json.loads(out)
    about = guided["guidance"]
    assert (about["scale"], about["window"], about["steps"]) == (3.0, [1.0, 20.0], 2)
    assert json.loads((tmp_path / "guided" / "sample.json").read_text())["calls"] == guided["calls"]
    # The images are those of diffusers' own guidance, to the rounding to 8 bits.
    unet, base = sb.load_pipeline(folder).unet, sb.scheduler("ddim", like=sb.load_pipeline(folder).scheduler)
    wanted, cost = of_diffusers(unet, standard_start(base, 4), range(6), [0, 3, 7] * 2, 10, 3.0, (1.0, 20.0))
    assert cost == guided["calls"] == 6
    expected = ((wanted.clamp(-1, 1) + 1) * 127.5).round()[:, 0].numpy()
    assert np.abs(pixels(tmp_path / "guided") - expected).max() <= 1
    assert np.abs(pixels(tmp_path / "plain") - expected).max() > 1
    # Another scale does not go on in the folder; the same one does, and any part of the seeds is the same.
    code, _, err = symbreak(capsys, *common, *cheap("--guidance", 2, "--out", tmp_path / "guided"))
    assert (code, "guidance" in err) == (2, True)
    first = (tmp_path / "guided" / "00000002.png").read_bytes()
    (tmp_path / "guided" / "00000002.png").unlink()
    code, out, _ = symbreak(capsys, *common, *cheap("--json", *more, "--out", tmp_path / "guided"))
    assert json.loads(out)["made"] == 1
    assert (tmp_path / "guided" / "00000002.png").read_bytes() == first
    code, out, _ = symbreak(capsys, *common, *cheap(*more, "--out", tmp_path / "text"))
    assert "Guidance of scale 3 at sigma 1 to 20: 6 network evaluations a sample." in " ".join(out.split())
    code, out, _ = symbreak(capsys, *common, *cheap(*more[:3], "0.02,0.03", "--out", tmp_path / "none"))
    assert "4 network evaluations a sample. No step of the sampler lies there" in " ".join(out.split())


def test_starts_of_the_classes_own_laws_and_the_window_by_data(capsys, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(options, "CONDITIONED", 64)
    start = tmp_path / "start.safetensors"
    law = sb.PrincipalMixture.fit(sb.images("digits"), labels=True)
    sb.late_start(sb.scheduler("ddim"), law, 3, at=sb.NoiseLevel(3.0), check=False).save(start)
    common = ("sample", "--model", folder, "--start", start, "--seeds", "0-9", "--json", "--data", "digits")
    code, out, err = symbreak(capsys, *common, "--class", "data", "--out", tmp_path / "x")
    assert code == 0, err
    assert json.loads(out)["classes"]["shares"].keys() == {str(i) for i in range(10)}
    unet, late = sb.load_pipeline(folder).unet, sb.LateStart.load(start)
    y = Classes.of_data(sb.images("digits")).of(range(10))
    wanted = ((generate(unet, late, range(10), y) + 1) * 127.5).round()[:, 0].numpy()
    np.testing.assert_array_equal(pixels(tmp_path / "x"), wanted)
    noise = torch.randn(10, 1, 8, 8, generator=generator(0))
    assert not torch.equal(late(noise, y), late(noise))
    more = ("--class", "1", "--guidance", 2, "--window", "auto", "--out", tmp_path / "y")
    code, out, err = symbreak(capsys, *common, *more)
    assert code == 0, err
    about = json.loads(out)["guidance"]
    assert set(about) == {"scale", "window", "null_label", "information", "predicted", "steps"}
    low, high = about["window"]  # of a random network, whose answers differ by error: an end may lie above all levels
    assert high is None or 0 <= low < high
    assert "its two answers differ by error" in " ".join(err.split())
    assert about["information"]["images"] == 64
    assert "the class is decided between sigma" in err
    code, _, err = symbreak(capsys, *common[:-2], "--class", "10", "--out", tmp_path / "z")
    assert (code, "label 10 is no class of this mixture" in err) == (2, True)


def test_fit_and_evaluate(capsys, folder, tmp_path):
    trained = ("--model", folder, "--sampler", "ddim", "--steps", 3)
    code, _, err = symbreak(capsys, "fit", "--data", "digits", "--start", *trained, "--out", tmp_path / "s.safetensors")
    # A random network denoises nothing: that is what is said, not that it has classes.
    assert (code, "not trained" in err) == (2, True)
    quick = ("--data", "digits", "--seeds", "0-19", "--repeats", 2, "--no-cache", "--features", "pixels", "--json")
    code, out, err = symbreak(
        capsys, "evaluate", *trained, *quick, "--guidance", 2, "--window", "1,20", "--out", tmp_path / "e"
    )
    assert code == 0, err
    for content in (json.loads(out), json.loads((tmp_path / "e" / "record.json").read_text())["content"]):
        assert content["sampling"]["guidance"]["scale"] == 2
        assert content["sampling"]["calls"] == 5
        assert set(content["sampling"]["classes"]["shares"]) == {str(i) for i in range(10)}
    assert "Guidance of scale 2 at sigma 1 to 20: 5 network evaluations a sample." in " ".join(err.split())
    assert not list((tmp_path / "e").glob("blocks-*"))


def test_training_says_which_class_is_none(tmp_path):
    recipe = Recipe(channels=(8, 8), layers=1, steps=2, batch=16, conditional=True)
    train_network(sb.images("digits"), tmp_path / "net", recipe)
    again = sb.load_pipeline(tmp_path / "net")
    assert (again.unet.config.num_class_embeds, again.unet.config.null_label) == (11, 10)


def test_an_exact_conditional_network_makes_its_classes(tmp_path):
    """Starts of the classes' laws, an exact network, guidance of scale 1 and 3: samples lie where their class does."""
    law = classy(sb.Mixture.from_parameters(torch.tensor([-1.0, 1.0]).reshape(2, 1, 1, 1), 0.04))
    base = sb.scheduler("ddim", clip_sample=False)
    exact = denoiser(as_unet(Conditional(law), base), base)
    start, y = sb.late_start(base, law, 20, at=sb.NoiseLevel(3.0), check=False), torch.arange(2).repeat(100)
    for scale, spread in ((1.0, 0.2), (3.0, 0.0)):
        x = generate(sb.guided(exact, 2, scale), start, range(200), y, clamp=False).flatten()
        for label, mean in ((0, -1.0), (1, 1.0)):
            mine = x[y == label]
            # Guidance pushes away from the other class: further out, and closer together.
            assert float(mine.mean()) == pytest.approx(mean, abs=0.1) if scale == 1 else abs(float(mine.mean())) > 1.02
            assert float(mine.std()) == pytest.approx(spread, abs=0.05) if scale == 1 else float(mine.std()) < 0.25
    made = write_images(exact, standard_start(base, 2), [0, 1], tmp_path, labels=1)
    assert made == 2
    assert LAWS


BAD = {
    "no class": ((), "the network has 11 classes. Say which to sample: --class 0,3,7"),
    "outside": (("--class", "0,11"), "the class 11, but the network knows 0 to 10"),
    "negative": (("--class", "-1"), "the class -1, but the network knows 0 to 10"),
    "words": (("--class", "cat"), "--class cat; expected numbers such as 0,3,7, or data"),
    "data": (("--class", "data"), "--data is missing"),
    "null": (("--class", "1", "--guidance", "2", "--null-label", "11"), "the null class 11; expected a label"),
    "itself": (("--class", "1,0", "--guidance", "2", "--null-label", "0"), "some labels are 0, the null class"),
    "its own null": (("--class", "10", "--guidance", "2"), "some labels are 10, the null class"),
    "scale": (("--class", "1", "--guidance", "nan"), "a guidance scale of nan"),
    "no scale": (("--class", "1", "--window", "1,2"), "--window 1,2 came without a scale of guidance"),
    "upside down": (("--class", "1", "--guidance", "2", "--window", "5,2"), "from sigma 5 to 2; expected 0 <= low"),
    "NaN": (("--class", "1", "--guidance", "2", "--window", "nan,2"), "0 <= low < high"),
    "outside its range": (("--class", "1", "--guidance", "2", "--window", "200,300"), "the network knows 0.01 to 15"),
    "no window": (("--class", "1", "--guidance", "2", "--window", "wide"), "--window wide; expected LOW,HIGH"),
    "no data": (("--class", "1", "--guidance", "2", "--window", "auto"), "--data is missing"),
    "clusters": (("--class", "1", "--clusters", "5"), "belong to --start auto"),
}


@pytest.mark.parametrize(("arguments", "line"), BAD.values(), ids=BAD)
def test_bad_input(capsys, folder, tmp_path, arguments, line):
    code, out, err = symbreak(capsys, "sample", "--model", folder, *cheap("--out", tmp_path / "x"), *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert line in err
    assert not list(tmp_path.glob("x/*.png"))


def test_networks_without_classes_or_without_a_null_class(capsys, tmp_path):
    for more in (("--class", "1"), ("--guidance", "2"), ("--null-label", "0")):
        code, _, err = symbreak(capsys, "sample", *cheap("--out", tmp_path / "x"), *more)
        assert (code, "this one has no classes" in err) == (2, True)
    path = tmp_path / "blind"
    diffusers.DDPMPipeline(network(), sb.scheduler("ddpm")).save_pretrained(path)
    common = ("sample", "--model", path, "--class", "1", "--guidance", 2)
    code, _, err = symbreak(capsys, *common, *cheap("--out", tmp_path / "x"))
    assert (code, "Pass its label, such as null=10 (--null-label 10)" in err) == (2, True)
    code, out, err = symbreak(capsys, *common, *cheap("--json", "--null-label", "10", "--out", tmp_path / "x"))
    assert code == 0, err
    assert json.loads(out)["guidance"]["null_label"] == 10
    code, _, err = symbreak(capsys, "evaluate", "--samples", tmp_path / "x", "--data", "digits", "--class", "1")
    assert (code, "belong to a network" in err) == (2, True)
