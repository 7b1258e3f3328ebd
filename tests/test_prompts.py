"""Prompts and latents: an exact law posing as a text network, and the commands that take --prompt and --vae."""

import json
import math

import diffusers
import numpy as np
import pytest
import torch
import transformers

import symbreak as sb
from symbreak.cli.options import Conditions
from symbreak.metrics import distance, features
from symbreak.networks.families import as_unet
from symbreak.noise import generator
from symbreak.phases.class_information import condition_information, guidance_window
from symbreak.runtime.errors import InputError
from symbreak.start import loading
from symbreak.start.loading import LatentPipeline, load_autoencoder
from symbreak.studies.compare_samplers import run as run_study
from tests import families as nets
from tests.test_conditions import generator_of
from tests.test_families import command, text_folder, words  # noqa: F401  text_folder is a fixture

SHAPE = (4, 8, 8)
SHARE = 0.3  # of the prompt among everything


def two_prompts():
    """Latents of which three in ten are what the prompt says, as a mixture of two components."""
    means = torch.zeros(2, *SHAPE, dtype=torch.float64)
    means[0, 0], means[1, 1] = 0.5, -0.3
    return sb.Mixture.from_parameters(means, [0.2, 0.3], [SHARE, 1 - SHARE])


def text_pipeline(law, prompt="a cat"):
    """Stable Diffusion whose network is a law's first component where it is told a prompt, and the law where none."""
    full = diffusers.DDIMScheduler(clip_sample=False)
    pipe = diffusers.StableDiffusionPipeline(
        vae=nets.vae(), unet=nets.conditional_unet(), scheduler=full, **words(), safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    said, nothing = (pipe.encode_prompt(t, "cpu", 1, False)[0] for t in (prompt, ""))
    assert not torch.equal(said, nothing)
    component, everything = (as_unet(v, full) for v in (law.given(0), law))

    def forward(sample, timestep, encoder_hidden_states, return_dict=True, **_):
        t = torch.as_tensor(timestep).reshape(-1).expand(len(sample))
        told = torch.isclose(encoder_hidden_states, said).flatten(1).all(1)
        assert bool((told | torch.isclose(encoder_hidden_states, nothing).flatten(1).all(1)).all())
        out = torch.empty_like(sample)
        for rows, net in ((told, component), (~told, everything)):
            if bool(rows.any()):
                out[rows] = net(sample[rows], t[rows], return_dict=False)[0]
        return (out,)

    pipe.unet.forward = forward
    return pipe


@pytest.fixture(scope="module")
def exact():
    law = two_prompts()
    law.classes = torch.tensor([0, 1])
    return law, text_pipeline(law)


def test_a_prompt_decides_where_the_two_laws_say(exact):
    law, pipe = exact
    told = LatentPipeline.of(pipe, "a cat")
    prompted, without = told.prompted
    x = law.given(0).sample(2000, generator=generator(1)).float()
    levels = np.geomspace(0.05, 20, 8)
    by_law = condition_information(law.given(0), x, without=law, sigma=levels)
    by_network = condition_information(prompted, x, without=without, sigma=levels)
    np.testing.assert_allclose(by_network.value, by_law.value, atol=1e-3)  # the network sees float32 states
    assert by_network.limit["value"] == pytest.approx(-math.log(SHARE), rel=0.02)
    low, high = guidance_window(by_network).levels
    for level, left in ((low, 0.9), (high, 0.1)):
        y = law.given(0).sample(20_000, generator=generator(2))
        y += level * torch.randn(y.shape, generator=generator(3), dtype=y.dtype)
        ratio = float((law.given(0).log_prob(y, level) - law.log_prob(y, level)).mean())
        assert ratio == pytest.approx(-left * math.log(SHARE), abs=-0.02 * math.log(SHARE))
    picture = told.decode(x[:2])
    assert picture.shape == (2, 3, 16, 16)
    assert torch.equal(picture, sb.decode(pipe.vae, x[:2]))


def mean_sign(x):
    """Two classes of pictures."""
    assert x.shape[1:] == (3, 16, 16)
    return (x.mean((1, 2, 3)) > x.mean()).long()


@pytest.fixture
def exactly(exact, monkeypatch):
    """The exact pipeline under every model's name."""
    monkeypatch.setattr(loading, "load_pipeline", lambda *_, **__: exact[1])
    return exact


def test_the_window_of_a_prompt_by_its_own_samples(exactly, tmp_path, capsys):
    law, pipe = exactly
    common = ["sample", "--model", "exact", "--prompt", "a cat", "--guidance", 2, "--sampler", "ddim", "--steps", 4]
    common += ["--seeds", "0-1", "--json"]
    assert command(*common, "--window", "auto", "--out", tmp_path / "a") == 0
    said, err = capsys.readouterr()
    made = json.loads(said)
    limit = made["guidance"]["information"]["limit"]
    assert limit["low"] < -math.log(SHARE) < limit["high"]  # 64 samples: within 8 % or so
    low, high = made["guidance"]["window"]
    x = law.given(0).sample(2000, generator=generator(4))
    wanted = guidance_window(condition_information(law.given(0), x, without=law)).levels
    assert (low, high) == pytest.approx(wanted, rel=0.15)
    assert "the prompt is decided between sigma" in " ".join(err.split())
    steps = sum(low < s <= high for s in (schedule_levels(pipe, 4)))
    assert made["calls"] == 4 + steps > 4
    assert made["prompt"] == "a cat"
    assert len(made["autoencoder"]) >= 16


def schedule_levels(pipe, steps):
    start = sb.standard_start(sb.scheduler("ddim", like=pipe.scheduler), steps)
    levels = sb.schedule(start.full)
    return [levels.level(float(t)).sigma for t in start.scheduler.timesteps]


@pytest.mark.slow
def test_phases_of_a_prompt_without_data(exactly, tmp_path, capsys):
    sizes = ["--pairs", 24, "--steps", 6, "--branches", 3, "--quick", "--clusters", 2]
    judge = ["--classify", "tests.test_prompts:mean_sign"]
    model = ["phases", "--model", "exact", "--prompt", "a cat"]
    assert command(*model, *sizes[:-2], *judge, "--out", tmp_path / "r") == 0
    content = json.loads((tmp_path / "r" / "record.json").read_text())["content"]
    levels = {row["name"]: row["level"] for row in content["criteria"] if row["of"] == "network"}
    assert {"cloning", "U-turn, class", "class entropy"} <= set(levels)
    low, high = (levels[f"condition information, {share} %"]["sigma"] for share in (90, 10))
    assert low < high
    assert any("The condition is decided" in note for note in content["notes"])
    assert any("Guide between" in line for line in content["verdict"])
    assert "100 of the network's own samples" in " ".join(capsys.readouterr().err.split())
    assert [c["panel"] for c in content["curves"]].count("condition") == 1
    assert (tmp_path / "r" / "record.json").stat().st_size > 0


# the commands, of a random text network


def test_evaluate_and_audit_measure_decoded_samples(text_folder, tmp_path, capsys):  # noqa: F811
    data = text_folder.parent / "data.npz"
    model = ["--model", text_folder, "--prompt", "a cat", "--guidance", 2, "--window", "1,20", "--sampler", "ddim"]
    model += ["--steps", 3, "--seeds", "0-19", "--data", data, "--json", "--features", "pixels"]
    assert command("evaluate", *model, "--repeats", 2, "--no-cache", "--out", tmp_path / "e") == 0
    content = json.loads(capsys.readouterr().out)
    assert content["samples"]["count"] == 20
    assert content["extractor"]["features"] == 3 * 16 * 16
    sampling = content["sampling"]
    assert (sampling["prompt"], sampling["guidance"]["scale"], sampling["calls"] > 3) == ("a cat", 2, True)
    assert command("audit", *model) == 0
    made = json.loads(capsys.readouterr().out)["settings"]["made"]
    assert (made["prompt"], made["guidance"]["window"], made["calls"]) == ("a cat", [1, 20], sampling["calls"])
    # the pictures are those that sample writes
    common = model[: model.index("--data")]
    assert command("sample", *common, "--out", tmp_path / "s") == 0
    capsys.readouterr()
    assert command("evaluate", "--samples", tmp_path / "s", *model[model.index("--data") :], "--no-cache",
                   "--repeats", 2) == 0  # fmt: skip
    again = json.loads(capsys.readouterr().out)
    # of pictures of 8 bits
    assert again["distance"]["pooled"] == pytest.approx(content["distance"]["pooled"], rel=0.01)


@pytest.fixture(scope="module")
def latent_folder(tmp_path_factory):
    """An exact Gaussian of latents cannot be saved: a small random network of latents alone, and an autoencoder."""
    folder = tmp_path_factory.mktemp("latents")
    unet = nets.seeded(lambda: diffusers.UNet2DModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
    ))  # fmt: skip
    with torch.no_grad():  # a network that says nothing: epsilon 0
        unet.conv_out.weight.zero_()
        unet.conv_out.bias.zero_()
    diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler(clip_sample=False)).save_pretrained(folder / "net")
    nets.vae().save_pretrained(folder / "vae")
    rows = np.random.default_rng(0).integers(0, 255, (120, 16, 16, 3), dtype=np.uint8)
    np.savez(folder / "data.npz", images=rows)
    return folder


def test_a_start_on_latents_and_samples_that_are_decoded(latent_folder, tmp_path, capsys):
    model = ["--model", latent_folder / "net", "--vae", latent_folder / "vae"]
    start = tmp_path / "start.safetensors"
    given = ["fit", "--data", latent_folder / "data.npz", "--start", *model, "--sampler", "ddim", "--steps", 3]
    assert command(*given, "--out", start) == 0
    capsys.readouterr()
    vae = load_autoencoder(latent_folder / "vae")
    data = LatentPipeline.of(sb.load_pipeline(latent_folder / "net"), None, vae).encode(
        sb.images(latent_folder / "data.npz")
    )
    assert (data.shape, len(data), data.name) == (SHAPE, 120, str(latent_folder / "data.npz"))
    late = sb.LateStart.load(start)
    assert tuple(late.law.shape) == SHAPE
    made = ["sample", *model, "--start", start, "--seeds", "0-1", "--json"]
    assert command(*made, "--out", tmp_path / "s") == 0
    assert json.loads(capsys.readouterr().out)["autoencoder"]
    pixels = sb.images(tmp_path / "s").tensor()
    z = sb.generate(sb.load_pipeline(latent_folder / "net").unet, late, range(2), clamp=False)
    torch.testing.assert_close(pixels, sb.decode(vae, z), rtol=0, atol=1.01 / 127.5)


def test_moments_of_latents_are_a_start_without_a_network(latent_folder, tmp_path, capsys):
    vae, data = load_autoencoder(latent_folder / "vae"), latent_folder / "data.npz"
    moments = tmp_path / "moments.safetensors"
    assert command("fit", "--data", data, "--vae", latent_folder / "vae", "--out", moments, "--json") == 0
    assert json.loads(capsys.readouterr().out)["shape"] == list(SHAPE)
    wanted = sb.Moments.fit(sb.encode(vae, sb.images(data)))
    np.testing.assert_allclose(sb.Moments.load(moments).cov, wanted.cov, rtol=1e-6, atol=1e-9)
    model = ["--model", latent_folder / "net", "--vae", latent_folder / "vae", "--sampler", "ddim", "--steps", 2]
    made = ["sample", *model, "--start", moments, "--at", "sigma=2", "--seeds", "0-1"]
    assert command(*made, "--out", tmp_path / "s") == 0
    assert sb.images(tmp_path / "s").shape == (3, 16, 16)


def varied():
    """An autoencoder whose latents vary by more than 1, as a level of the VP process asks."""
    out = nets.vae()
    out.register_to_config(scaling_factor=30.0)
    return out


def others(folder):
    """Pictures that are measured against."""
    rows = np.random.default_rng(1).integers(0, 255, (40, 16, 16, 3), dtype=np.uint8)
    np.savez(folder / "unseen.npz", images=rows)
    return folder / "unseen.npz"


def colours(x):
    """Three features of pictures."""
    return x.mean((2, 3))


def test_a_study_of_latents_measures_decoded_samples(latent_folder, tmp_path):
    vae = varied()
    pipe = LatentPipeline.of(sb.load_pipeline(latent_folder / "net"), None, vae)
    data, unseen = str(latent_folder / "data.npz"), others(tmp_path)
    small = sb.Study(data, "net", str(unseen), ("ddim",), (3,), samples=8, repeats=2, selection=20, sweep=(1.0,),
                     features="tests.test_prompts:colours", micro_batch=20, reference_calls=0)  # fmt: skip
    content = run_study(small, pipe, sb.Run(tmp_path / "r")).content
    assert content["data"]["shape"] == [3, 16, 16]
    assert content["sampling"]["autoencoder"] == pipe.about["autoencoder"]
    row = content["rows"][0]
    start = sb.standard_start(sb.scheduler("ddim", like=pipe.scheduler), 3, row["standard"]["spacing"])
    made = sb.decode(vae, sb.generate(pipe.unet, start, range(8), micro_batch=20, clamp=False))
    made, real = (features(colours, x) for x in (made, sb.images(unseen)))
    far = distance(made, sb.Moments.fit(real), 2, "colours")
    assert row["standard"]["distance"]["pooled"] == pytest.approx(far.pooled, rel=1e-6)
    # laws, their level and the images that are noised to it are of latents
    level = sb.speciation_time(sb.Gaussian.fit(pipe.encode(sb.images(data)))).sigma
    assert row["spectral"]["sigma"] == pytest.approx(level, rel=0.03)  # a whole step of the schedule
    assert row["noised"]["distance"]["pooled"] > 0


@pytest.mark.slow
def test_a_study_of_a_prompt(text_folder, tmp_path, capsys):  # noqa: F811
    data = text_folder.parent / "data.npz"
    model = ["--model", text_folder, "--prompt", "a cat", "--guidance", 2, "--window", "1,20"]
    varied().save_pretrained(tmp_path / "vae")
    some = ["--vae", tmp_path / "vae", "--data", data, "--holdout", others(tmp_path), "--samplers", "ddim"]
    some += ["--calls", 4, "--quick", "--features", "tests.test_prompts:colours", "--out", tmp_path / "r", "--json"]
    assert command("study", *model, *some) == 0
    content = json.loads(capsys.readouterr().out)["content"]
    assert content["sampling"]["prompt"] == "a cat"
    assert content["sampling"]["guidance"]["window"] == [1, 20]
    assert all(content["rows"][0][column]["calls"] <= 4 for column in ("standard", "best", "spectral"))


# what phases asks


def test_a_network_of_one_class_or_prompt_guided(exact, text_folder):  # noqa: F811
    pipe, x = sb.load_pipeline("digits-conditional"), 3 * torch.randn(2, 1, 8, 8, generator=generator(3))
    d = sb.denoiser(pipe.unet, pipe.scheduler)
    y = torch.tensor([3])
    for conditions, scale, window in (
        (Conditions(of_class="3"), 1.0, None),
        (Conditions(of_class="3", guidance=2.0, window="1,5"), 2.0, (1.0, 5.0)),
    ):
        asked = conditions.alone(pipe, sb.images("digits"), None, sb.Run())
        wanted = sb.guided(d.bind(class_labels=y), 10, scale, window)
        assert asked.guidance == wanted.guidance
        for sigma in (2.0, 8.0):
            torch.testing.assert_close(asked(x, sigma), wanted(x, sigma), rtol=0, atol=0)
    assert Conditions().alone(pipe, None, None, sb.Run()) is pipe
    told = LatentPipeline.of(exact[1], "a cat")
    asked = Conditions(prompt="a cat", guidance=3.0).alone(told, None, None, sb.Run())
    z = torch.randn(2, *SHAPE, generator=generator(3))
    with_prompt, without = (v(z, 1.5) for v in told.prompted)
    torch.testing.assert_close(asked(z, 1.5), without + 3 * (with_prompt - without), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_phases_of_a_class_that_is_guided(tmp_path, capsys):
    sizes = ["--pairs", 24, "--steps", 6, "--branches", 3, "--quick", "--clusters", 3]
    asked = ["phases", "--data", "digits", "--model", "digits-conditional", "--class", 3, *sizes, "--json"]
    assert command(*asked) == 0
    content = json.loads(capsys.readouterr().out)["content"]
    assert content["data"]["count"] < 100  # a tenth of the training half
    assert any("The condition is decided" in note for note in content["notes"])
    assert command(*asked, "--guidance", 2, "--window", "1,5") == 0
    guided = json.loads(capsys.readouterr().out)["content"]
    assert not any("The condition is decided" in note for note in guided["notes"])
    assert guided["network"]["guidance"] == {"scale": 2, "window": [1, 5]}
    assert "The network is guided: scale 2 at sigma 1 to 5." in guided["notes"]
    levels = ({row["name"] for row in c["criteria"] if row["of"] == "network"} for c in (content, guided))
    with_information, alone = levels
    assert with_information - alone == {f"condition information, {share} %" for share in (10, 90)}


@pytest.mark.parametrize("zeros", [True, False])
@torch.no_grad()
def test_sdxls_own_guidance_leads_away_from_what_its_config_says(zeros):
    both = words()
    settings = both["text_encoder"].config
    settings.projection_dim = 16
    full, encoder = diffusers.DDIMScheduler(clip_sample=False), nets.seeded(
        lambda: transformers.CLIPTextModelWithProjection(settings)
    )  # fmt: skip
    pipe = diffusers.StableDiffusionXLPipeline(
        vae=None, text_encoder=None, tokenizer=None, text_encoder_2=encoder, tokenizer_2=both["tokenizer"],
        unet=nets.sdxl_unet(), scheduler=full, force_zeros_for_empty_prompt=zeros,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    told = LatentPipeline.of(pipe, "a cat")
    assert bool((told.prompted[1].condition["encoder_hidden_states"] == 0).all()) == zeros
    noise = torch.stack([torch.randn(SHAPE, generator=generator_of(seed)) for seed in range(2)])
    theirs = pipe("a cat", num_images_per_prompt=2, guidance_scale=3.0, latents=noise, num_inference_steps=3,
                  output_type="latent", height=64, width=64).images  # fmt: skip
    ours = sb.generate(sb.guided(*told.prompted, 3.0), sb.standard_start(full, 3), range(2), clamp=False)
    # both branches in one batch there, two here: single precision, errors of epsilon times 3 times sigma
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    away = sb.generate(
        sb.guided(told.prompted[0], sb.denoiser(pipe, prompt=""), 3.0), sb.standard_start(full, 3), range(2),
        clamp=False,
    )  # fmt: skip
    assert torch.allclose(away, theirs, rtol=1e-3, atol=1e-3) != zeros


PHASES = ("phases", "--data", "digits", "--model")
BAD = {
    "no network": (("sample", "--vae", "net", "--model", "digits"), "net holds no autoencoder"),
    "no autoencoder": (("sample", "--model", "net", "--vae", "net"), "net holds no autoencoder"),
    "a network": (("sample", "--model", "net", "--vae", "net/unet"), "holds a UNet2DModel, which is no autoencoder"),
    "other channels": (("sample", "--model", "digits", "--vae", "vae"), "latents of 4 channels, the network takes 1"),
    "no text": (("phases", "--model", "net", "--prompt", "a cat"), "takes no prompt: its network has no text"),
    "evaluate": (("evaluate", "--data", "digits", "--model", "digits", "--prompt", "x"), "takes no prompt"),
    "audit": (("audit", "--data", "digits", "--model", "digits", "--prompt", "x"), "takes no prompt"),
    "no data": (("phases", "--model", "net"), "--data is missing"),
    "no model": (("phases", "--prompt", "a cat"), "--prompt and --vae belong to a network"),
    "null": (("phases", "--model", "net", "--prompt", "a", "--null-label", 1), "--prompt came with --class or --null"),
    "study": (("study", "--prompt", "a cat"), "takes no prompt: its network has no text"),
    "study, pictures": (("study", "--model", "net", "--vae", "vae"), "(16, 1, 8, 8) for an autoencoder of 3 channels"),
    "fit": (("fit", "--data", "digits", "--vae", "vae"), "for an autoencoder of 3 channels; expected [B, 3, H, W]"),
    "fit, no autoencoder": (("fit", "--data", "digits", "--vae", "net"), "net holds no autoencoder"),
    "two classes": (
        ("phases", "--data", "digits", "--model", "digits-conditional", "--class", "1,2"),
        "one class at a",
    ),
    "to no class": (("phases", "--data", "digits", "--model", "digits-conditional", "--guidance", 2), "one class at a"),
    "no classes": (("phases", "--data", "digits", "--model", "digits", "--class", 2), "this one has no classes"),
    "empty": (("sample", "--model", "net", "--prompt", "", "--guidance", 2), "--prompt came with nothing behind it"),
    "upside down": (("sample", "--model", "text", "--prompt", "a", "--guidance", 2, "--window", "5,2"), "5 to 2; exp"),
    "outside": (("sample", "--model", "text", "--prompt", "a", "--guidance", 2, "--window", "800,900"), "knows 0.0"),
    "pictures": (("evaluate", "--data", "digits", "--model", "net", "--vae", "vae", "--seeds", "0-9"), "(3, 16, 16)"),
}


@pytest.mark.parametrize(("arguments", "line"), BAD.values(), ids=BAD)
def test_bad_input_is_one_line(arguments, line, latent_folder, text_folder, tmp_path, capsys):  # noqa: F811
    places = {"net": latent_folder / "net", "vae": latent_folder / "vae", "text": text_folder}
    places["net/unet"] = latent_folder / "net" / "unet"
    out = ["--out", tmp_path / "x"] if arguments[0] in ("sample", "study", "fit") else []
    assert command(*(places.get(a, a) for a in arguments), *out) == 2
    err = capsys.readouterr().err
    assert line in err.splitlines()[-1]
    assert err.count("symbreak: ") == 1


class Wrong(torch.nn.Module):
    """Answers NaN, or another shape."""

    def __init__(self, what):
        super().__init__()
        self.what = what

    def forward(self, x, t):
        return x[:, :, :4] if self.what == "shape" else x * math.nan


@pytest.mark.parametrize("what", ["shape", "NaN"])
@pytest.mark.filterwarnings("ignore::symbreak.start.late_start.LateStartWarning")
def test_an_adapter_that_answers_another_shape_or_nan_everywhere(what, monkeypatch):
    # what the data alone say comes first, and is not the question
    monkeypatch.setattr("symbreak.studies.diagnose.class_laws", lambda d, laws: None)
    monkeypatch.setattr("symbreak.studies.diagnose.collapse", lambda d, laws: None)
    line = "expected the same shape" if what == "shape" else "NaN"
    data, full = sb.images("digits").subset(100), sb.scheduler("ddim", clip_sample=False)
    d = sb.denoiser(Wrong(what), full, shape=(1, 8, 8))
    least = sb.Effort(10, 4, branches=3, turns=2, stability=2, losses=4, images=20, points=50, queries=20)
    tries = {
        "generate": lambda: sb.generate(d, sb.standard_start(full, 2), [0]),
        "fit_start": lambda: sb.fit_start(data, d, full, 2),
        "diagnose": lambda: sb.diagnose(data, d, effort=least),
        "information": lambda: condition_information(d, data, without=sb.Gaussian.fit(data)),
        "evaluate": lambda: sb.audit(data, model=d, sampling=sb.Sampling(count=4, steps=2)),
    }
    for name, attempt in tries.items():
        with pytest.raises(InputError, match=line) as error:
            attempt()
        assert "\n" not in str(error.value), name
