"""Prompts and latents: an exact law posing as a text network, and the commands that take --prompt and --vae."""

import json
import math

import diffusers
import numpy as np
import pytest
import torch

import symbreak as sb
from symbreak.networks.families import as_unet
from symbreak.noise import generator
from symbreak.phases.class_information import condition_information, guidance_window
from symbreak.runtime.errors import InputError
from symbreak.start import loading
from symbreak.start.loading import LatentPipeline, load_autoencoder
from tests import families as nets
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
    assert any("The prompt is decided" in note for note in content["notes"])
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
    "null": (("phases", "--model", "net", "--prompt", "a", "--null-label", 1), "--prompt came with --null-label"),
    "study": (("study", "--prompt", "a cat"), "--prompt and --vae are not for study"),
    "fit": (("fit", "--data", "digits", "--vae", "vae"), "belong to a start. Add --start"),
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
def test_an_adapter_that_answers_another_shape_or_nan_everywhere(what):
    line = "expected the same shape" if what == "shape" else "NaN"
    data, full = sb.images("digits").subset(100), sb.scheduler("ddim", clip_sample=False)
    d = sb.denoiser(Wrong(what), full, shape=(1, 8, 8))
    tries = {
        "generate": lambda: sb.generate(d, sb.standard_start(full, 2), [0]),
        "fit_start": lambda: sb.fit_start(data, d, full, 2),
        "diagnose": lambda: sb.diagnose(data, d),
        "information": lambda: condition_information(d, data, without=sb.Gaussian.fit(data)),
        "evaluate": lambda: sb.audit(data, model=d, sampling=sb.Sampling(count=4, steps=2)),
    }
    for name, attempt in tries.items():
        with pytest.raises(InputError, match=line) as error:
            attempt()
        assert "\n" not in str(error.value), name
