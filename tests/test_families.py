"""Every family of networks: denoised, sampled from a late start, diagnosed; and as an exact law behind its own face."""

import functools
import json
import re
from contextlib import suppress
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
import transformers
from PIL import Image

import symbreak as sb
from symbreak.cli.commands import main
from symbreak.networks.adapters import FAMILIES as TABLE
from symbreak.networks.denoiser import class_count, null_label
from symbreak.runtime.errors import InputError
from symbreak.start.sample import integrate
from tests import families as nets
from tests.families import FAMILIES, scheduler_of

EACH = pytest.mark.parametrize("name", FAMILIES)
QUICK = sb.Effort(
    pairs=10, steps=4, branches=3, turns=2, stability=2, losses=4, images=20, points=50, queries=20, frames=("ve",)
)


def denoiser_of(name, **more):
    make, scheduler, shape, condition = FAMILIES[name]
    more |= {} if shape is None else {"shape": shape}
    more |= {"sigma_range": (0.02, 80.0)} if name == "k-diffusion" else {}
    return sb.denoiser(make(), None if scheduler is None else scheduler_of(name), **more, **condition)


def drawn(shape, n=40):
    return sb.samples(torch.randn(n, *shape, generator=torch.Generator().manual_seed(1)))


@EACH
@torch.no_grad()
def test_denoise_and_sample_from_a_late_start(name):
    d = denoiser_of(name)
    x = torch.randn(3, *d.shape, generator=torch.Generator().manual_seed(2))
    out = d(x, 1.3)
    assert out.shape == x.shape
    assert bool(torch.isfinite(out).all())
    # Every sample at its own level, with one row of the condition for all of them: the same answers.
    each = d(x, torch.tensor([0.5, 1.3, 2.0]))
    torch.testing.assert_close(each[1], out[1], rtol=1e-4, atol=1e-5)  # float32, another batch
    law = sb.Gaussian.fit(drawn(d.shape))
    start = sb.late_start(scheduler_of(name), law, 3, at=sb.NoiseLevel(1.5), check=False)
    made = sb.generate(d, start, [0, 1], micro_batch=2)
    assert made.shape == (2, *d.shape)
    assert bool(torch.isfinite(made).all())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::symbreak.start.late_start.LateStartWarning")  # of 80 samples, and of noise
@EACH
def test_diagnose_and_choose_a_start(name):
    d = denoiser_of(name)
    data = drawn(d.shape, 100)
    assert sb.diagnose(data, d, clusters=2, effort=QUICK).content["network"]["parameters"] >= 0
    with suppress(InputError):  # a random network is told to be none: it is further from the data than their mean
        sb.fit_start(data, d, scheduler_of(name), steps=3, clusters=2)
    exact = posed_denoiser(name)[2]
    start = sb.fit_start(data, exact, scheduler_of(name), steps=3, clusters=2)
    assert sb.generate(exact, start, [0, 1], micro_batch=2).shape == (2, *d.shape)


@functools.cache
def gaussian(shape):
    return sb.Gaussian.fit(drawn(shape))


def posed_denoiser(name):
    """A family's network that answers what a Gaussian does."""
    _, scheduler, shape, condition = FAMILIES[name]
    law = gaussian(shape or denoiser_of(name).shape)
    more = {} if shape is None else {"shape": shape}
    more |= {"sigma_range": (0.02, 80.0)} if name == "k-diffusion" else {}
    net = nets.posed(name, law)
    return law, net, sb.denoiser(net, None if scheduler is None else scheduler_of(name), **more, **condition)


@EACH
@torch.no_grad()
def test_an_exact_law_behind_the_face_of_a_family(name):
    law, _, d = posed_denoiser(name)
    x = 2 * torch.randn(4, *d.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for sigma in (0.3, 2.0, 15.0, torch.tensor([0.3, 1.0, 2.0, 9.0])):
        # Networks with weights see float32 states; errors of epsilon are multiplied by sigma.
        torch.testing.assert_close(d(x, sigma), law.denoise(x, sigma), rtol=1e-4, atol=1e-4)


PIPELINES = ["Stable Diffusion", "SDXL", "PixArt", "SD3", "Sana", "Flux", "Qwen-Image", "LTX", "Wan"]


def moments(out):
    """Mean and covariance of an affine map of white noise, from its values at 0 and at the unit vectors."""
    flat = out.double().flatten(1)
    linear = flat[1:] - flat[0]
    return flat[0], linear.T @ linear


@pytest.mark.parametrize("name", PIPELINES)
@torch.no_grad()
def test_moments_through_the_whole_pipeline(name):
    law, net, _ = posed_denoiser(name)
    full = scheduler_of(name)
    start = sb.late_start(full, law, 4, at=sb.NoiseLevel(1.5), check=False)
    noise = torch.cat([torch.zeros(1, *law.shape), torch.eye(int(np.prod(law.shape))).reshape(-1, *law.shape)])
    noise = noise[:: 1 if len(noise) < 300 else 4]  # of videos a part of the directions
    pipe = nets.text_pipelines(name, net, start.fresh())
    out = pipe(**nets.prompts(name, len(noise)) | start.arguments(pipe, noise))
    latents = out[0] if isinstance(out, tuple) else out.images if hasattr(out, "images") else out.frames
    exact = integrate(sb.as_unet(law, full), start, noise.double(), micro_batch=len(noise))
    latents = latents if latents.shape == exact.shape else unpacked(name, latents)
    # the pipeline works in float32, the law in float64
    for ours, theirs in zip(moments(latents), moments(exact)):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=2e-3)


def unpacked(name, x):
    if name == "LTX":
        return x.reshape(len(x), 2, nets.SIDE, nets.SIDE, -1).permute(0, 4, 1, 2, 3)
    return diffusers.FluxPipeline._unpack_latents(x, 8 * nets.SIDE, 8 * nets.SIDE, 8)


# what a pipeline tells its network


@pytest.mark.parametrize("name", PIPELINES)
@torch.no_grad()
def test_a_denoiser_of_a_whole_pipeline(name):
    _, net, d = posed_denoiser(name)
    pipe = nets.text_pipelines(name, net, scheduler_of(name))
    call = {k: v for k, v in nets.prompts(name, 1).items() if k not in ("output_type", "guidance_scale")}
    call |= {"height": 64, "width": 64} if name in ("Flux", "Qwen-Image") else {}
    call |= {"height": 256, "width": 256} if name == "Sana" else {}  # a latent is 32 pixels wide
    if name in ("LTX", "Wan"):
        sizes = {"LTX": (256, 256, 9), "Wan": (64, 64, 5)}[name]
        call |= dict(zip(("height", "width", "num_frames"), sizes))
    state, shifted = torch.get_rng_state(), pipe.scheduler.timesteps.clone()
    ours = sb.denoiser(pipe, **call)
    assert ours.shape == d.shape
    missing = set(FAMILIES[name][3]) - set(ours.condition)
    assert not missing - {"encoder_attention_mask"} or name == "Sana"
    x = torch.randn(2, *d.shape, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(ours(x, 1.3), d(x, 1.3), rtol=1e-5, atol=1e-5)
    # nothing of the pipeline, and nobody's random numbers, moved on
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(pipe.scheduler.timesteps, shifted)


def test_a_dynamic_shift_is_the_one_of_the_pipelines_size():
    full = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15)
    law, net, _ = posed_denoiser("Flux")
    pipe = nets.text_pipelines("Flux", net, full)
    call = {k: v for k, v in nets.prompts("Flux", 1).items() if k != "output_type"} | {"height": 64, "width": 64}
    d = sb.denoiser(pipe, **call)
    mu = diffusers.pipelines.flux.pipeline_flux.calculate_shift(16)
    assert d.scheduler.config.shift == pytest.approx(np.exp(mu))
    with pytest.raises(InputError, match="dynamic shifting"):
        sb.late_start(full, law, 3, at=sb.NoiseLevel(1.5), check=False)
    with pytest.raises(InputError, match="shifts its levels with the size"):
        sb.scheduler("flow-dpm++2m", like=full)
    # The levels of the pipeline are those of the fixed shift.
    full.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25], mu=mu)
    fixed = diffusers.FlowMatchEulerDiscreteScheduler.from_config(d.scheduler.config)
    fixed.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
    torch.testing.assert_close(fixed.sigmas, full.sigmas)
    start = sb.late_start(d.scheduler, law, 3, at=sb.NoiseLevel(1.5), check=False)
    pipe.scheduler = start.fresh()
    noise = torch.randn(2, *law.shape, generator=torch.Generator().manual_seed(3))
    out = pipe(**nets.prompts("Flux", 2) | start.arguments(pipe, noise)).images
    exact = integrate(sb.as_unet(law, d.scheduler), start, noise.double(), micro_batch=2)
    torch.testing.assert_close(unpacked("Flux", out).double(), exact, rtol=1e-3, atol=2e-3)


def test_a_start_that_a_pipeline_puts_back_raises():
    law, net, _ = posed_denoiser("Flux")
    start = sb.late_start(scheduler_of("Flux"), law, 3, at=sb.NoiseLevel(1.5), check=False)
    pipe = nets.text_pipelines("Flux", net, start.fresh())
    noise = torch.randn(1, *law.shape)
    latents = start.arguments(pipe, noise)["latents"]
    pipe.scheduler = start.fresh()
    with pytest.raises(InputError, match=r"put FlowMatchEulerDiscreteScheduler back to the time 1000"):
        pipe(**nets.prompts("Flux", 1), latents=latents, num_inference_steps=3, height=64, width=64)
    pipe.scheduler = scheduler_of("Flux")
    with pytest.raises(InputError, match=r"Set pipe\.scheduler = start\.fresh\(\) first"):
        start.arguments(pipe, noise)
    dit = diffusers.DiTPipeline(nets.dit(), nets.vae(), start.fresh())
    with pytest.raises(InputError, match="DiTPipeline takes no latents"):
        start.arguments(dit, noise)
    assert torch.equal(start.fresh().timesteps, start.scheduler.timesteps)


@torch.no_grad()
def test_a_dit_samples_its_classes_from_a_late_start(tmp_path):
    law, net, d = posed_denoiser("DiT")
    assert (class_count(sb.denoiser(net, scheduler_of("DiT"))), null_label(d)) == (11, 10)
    start = sb.late_start(scheduler_of("DiT"), law, 3, at=sb.NoiseLevel(1.5), check=False)
    made = sb.generate(net, start, range(3), labels=[0, 4, 9], clamp=False)
    exact = sb.generate(law, start, range(3), clamp=False)
    torch.testing.assert_close(made, exact, rtol=1e-3, atol=1e-3)
    guide = sb.guided(sb.denoiser(nets.dit(), scheduler_of("DiT")), 10, 2.0)
    assert sb.generate(guide, start, range(2), labels=[1, 2]).shape == (2, *law.shape)
    with pytest.raises(InputError, match="knows 0 to 10"):
        sb.generate(net, start, [0], labels=[11])
    diffusers.DiTPipeline(nets.dit(), nets.vae(), diffusers.DDIMScheduler()).save_pretrained(tmp_path / "dit")
    pipe = sb.load_pipeline(tmp_path / "dit")
    assert class_count(pipe.unet) == 11
    alone = sb.load_pipeline(tmp_path / "dit" / "transformer")
    x = torch.randn(2, *law.shape)
    ask = [sb.denoiser(p.unet, p.scheduler, class_labels=torch.tensor([3]))(x, 1.0) for p in (pipe, alone)]
    assert torch.equal(*ask)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::symbreak.start.late_start.LateStartWarning")
def test_a_start_fitted_on_the_latents_of_a_pipeline():
    vae = nets.vae()
    pictures = torch.rand(100, 3, 16, 16, generator=torch.Generator().manual_seed(4)) * 2 - 1
    latents = sb.encode(vae, pictures)
    data = latents.images()
    assert (data.shape, len(data)) == ((4, 8, 8), 100)
    net = nets.posed("Stable Diffusion", sb.Gaussian.fit(data))
    pipe = nets.text_pipelines("Stable Diffusion", net, scheduler_of("Stable Diffusion"))
    call = {"prompt_embeds": nets.text(), "height": 64, "width": 64}
    start = sb.fit_start(latents, pipe, steps=3, clusters=2, **call)
    made = sb.generate(sb.denoiser(pipe, **call), start, range(4))
    pictures = sb.decode(vae, made)
    assert pictures.shape == (4, 3, 16, 16)
    assert float(pictures.abs().max()) <= 1
    # decoding undoes the scale of encoding: the autoencoder sees what it made itself
    z = torch.cat(list(latents))[:3]
    torch.testing.assert_close(sb.decode(vae, z), vae.decode(z / 0.3).sample.clamp(-1, 1), rtol=1e-5, atol=1e-5)
    with pytest.raises(InputError, match="latents of 3 channels for an autoencoder of 4"):
        sb.decode(vae, torch.zeros(1, 3, 8, 8))
    with pytest.raises(InputError, match="encoder_hidden_states, promt"):
        sb.fit_start(latents, pipe, promt="a cat", prompt_embeds=nets.text())


# what is refused, and names itself


class Weird(torch.nn.Module):
    """Answers half the picture."""

    def forward(self, x, t):
        return x[..., :4]


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: sb.denoiser(nets.lumina(), scheduler_of("SD3")), "Lumina2Transformer2DModel is called in a way"),
        (lambda: sb.denoiser(nets.flux(), scheduler_of("Flux")), r"FluxTransformer2DModel does not say the shape"),
        (lambda: sb.denoiser(nets.video_unet(), scheduler_of("DiT")), r"Pass shape=\(C, F, H, W\)"),
        (lambda: sb.denoiser(nets.unet()), "needs its scheduler"),
        (lambda: sb.denoiser(3, scheduler_of("DiT")), "int is no network"),
        (lambda: sb.denoiser(nets.unet(), scheduler_of("DiT"), family="magic"), "the family 'magic'; expected one of"),
        (
            lambda: sb.denoiser(Weird(), scheduler_of("DiT"), shape=(1, 8, 8))(torch.zeros(2, 1, 8, 8), 1.0),
            "same shape",
        ),
        (lambda: sb.denoiser(nets.sd3(), scheduler_of("SD3"))(torch.zeros(2, 4, 8, 8), 1.0), "with no condition"),
        (
            lambda: sb.denoiser(nets.dit(), scheduler_of("DiT"), class_labels=torch.tensor([30]))(
                torch.zeros(2, 4, 8, 8), 1.0
            ),
            "cannot take states",
        ),
        (
            lambda: sb.denoiser(nets.unet(), scheduler_of("DiT"), encoder_hidden_states=nets.text())(
                torch.zeros(2, 1, 8, 8), 1.0
            ),
            "encoder_hidden_states",
        ),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_one_line_of_what_cannot_be(make, match):
    with pytest.raises(InputError, match=match) as error:
        make()
    assert "\n" not in str(error.value)


def test_flow_matching_of_data_at_one_with_the_time_last():
    law = gaussian((1, 8, 8))
    unet = sb.as_unet(law, sb.scheduler("flow-euler"))
    d = sb.denoiser(lambda x, t: -unet(x, 1000 * (1 - t), return_dict=False)[0], family="time-last", shape=(1, 8, 8))
    x = torch.randn(3, 1, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(d(x, 0.7), law.denoise(x, 0.7), rtol=1e-6, atol=1e-6)
    assert set(TABLE) >= {"unet", "transformer", "packed", "plain", "time-first", "edm", "k-diffusion", "azula"}


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::symbreak.start.late_start.LateStartWarning")
def test_the_page_runs(monkeypatch):
    page = Path(__file__).parents[1] / "docs" / "my-own-network.md"
    codes = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    assert len(codes) == 5
    law = sb.Gaussian.fit(sb.images("digits"))
    unet = sb.as_unet(law, sb.scheduler("ddpm"))
    vae = nets.vae()
    pictures = torch.rand(100, 3, 16, 16, generator=torch.Generator().manual_seed(4)) * 2 - 1
    net = nets.posed("Stable Diffusion", sb.Gaussian.fit(sb.encode(vae, pictures).images()))
    pipe = nets.text_pipelines("Stable Diffusion", net, scheduler_of("Stable Diffusion"))
    pipe.vae = vae
    names = {
        "sb": sb, "pipe": pipe, "pictures": pictures, "words": nets.text(), "data": sb.images("digits"),
        "cat": law, "nothing": sb.Mixture.from_parameters(torch.zeros(1, 1, 8, 8), [1.0]),
        "cats": law.sample(50, generator=torch.Generator().manual_seed(5)),
        "net": lambda x, t: unet(x, t, return_dict=False)[0],
        "prompts": {"prompt_embeds": nets.text(), "height": 64, "width": 64},
        "odd_network": lambda d: {"noise": unet(d["image"], d["step"], return_dict=False)[0]},
        "score_network": lambda x, sigma: law.score(x, sigma),
    }  # fmt: skip
    for code in codes:
        exec(code, names)
        d, x = names["d"], torch.randn(2, *names["d"].shape, dtype=torch.float64)
        if d.shape == law.shape:
            torch.testing.assert_close(d(x, 0.9), law.denoise(x, 0.9), rtol=1e-5, atol=1e-5)
    assert names["pictures"].shape == (4, 3, 16, 16)
    assert names["samples"].shape == (4, 1, 8, 8)


# the command line


def words():
    """A tiny text encoder and tokenizer of four words."""
    vocab = {w: i for i, w in enumerate(["<|startoftext|>", "<|endoftext|>", "a</w>", "c", "a", "t</w>", "cat</w>"])}
    tokenizer = transformers.CLIPTokenizer(vocab=vocab, merges=[], model_max_length=8)
    settings = transformers.CLIPTextConfig(
        vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=8, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    return {"tokenizer": tokenizer, "text_encoder": transformers.CLIPTextModel(settings).eval()}


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text") / "p"
    full = diffusers.DDIMScheduler(clip_sample=False)
    diffusers.StableDiffusionPipeline(
        vae=nets.vae(), unet=nets.conditional_unet(), scheduler=full, **words(), safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip
    rows = np.random.default_rng(0).integers(0, 255, (100, 16, 16, 3), dtype=np.uint8)
    np.savez(folder.parent / "data.npz", images=rows, labels=np.arange(100) % 2)
    return folder


def bright(x):
    """Two classes of pictures."""
    assert x.shape[1:] == (3, 16, 16)
    return (x.mean((1, 2, 3)) > 0).long()


def command(*arguments):
    with pytest.raises(SystemExit) as left:
        main([str(a) for a in arguments])
    return left.value.code


def test_sample_a_prompt(text_folder, tmp_path, capsys):
    common = ["sample", "--model", text_folder, "--sampler", "ddim", "--steps", 2, "--seeds", "0-1"]
    assert command(*common, "--prompt", "a cat", "--guidance", 2, "--out", tmp_path / "o") == 0
    with Image.open(tmp_path / "o" / "00000001.png") as picture:
        assert picture.size == (16, 16)
    assert json.loads((tmp_path / "o" / "sample.json").read_text())["prompt"] == "a cat"
    capsys.readouterr()
    for more, line in [
        (("--prompt", "cat", "--class", "3"), "which are of classes"),
        ((), "works on latents"),
        (("--prompt", "cat", "--out", tmp_path / "o"), "holds images made with other settings"),
    ]:
        out = () if "--out" in more else ("--out", tmp_path / "q")
        assert command(*common, *more, *out) == 2
        assert line in capsys.readouterr().err
    assert command("sample", "--prompt", "a cat", "--out", tmp_path / "q") == 2
    assert "takes no prompt: its network has no text" in capsys.readouterr().err


@pytest.mark.slow
def test_phases_of_a_prompt(text_folder, tmp_path, capsys):
    data = text_folder.parent / "data.npz"
    sizes = ["--pairs", 10, "--steps", 4, "--branches", 3, "--quick"]
    model = ["--model", text_folder, "--prompt", "a cat", "--classify", "tests.test_families:bright"]
    assert command("phases", "--data", data, *model, *sizes, "--out", tmp_path / "r") == 0
    record = json.loads((tmp_path / "r" / "record.json").read_text())
    assert any("bright of decoded images" in note for note in record["content"]["notes"])
    assert {"cloning", "U-turn, class"} <= {row["name"] for row in record["content"]["criteria"]}


def test_the_bundled_conditional_network_is_what_its_card_says():
    pipe = sb.load_pipeline("digits-conditional")
    assert (class_count(pipe.unet), null_label(pipe.unet)) == (11, 10)
    folder = Path(sb.__file__).parent / "weights" / "digits-conditional"
    assert sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) < 4e6
    assert "1,000 steps" in (folder / "README.md").read_text(encoding="utf-8")
    x = sb.generate(pipe.unet, pipe.start, range(20), labels=torch.arange(20) % 10)
    judged = sb.extractor("digits-classifier").logits(x).argmax(1)
    # the classifier is right on 97 % of real ones: of twenty, two may go wrong
    assert int((judged == torch.arange(20) % 10).sum()) >= 18
