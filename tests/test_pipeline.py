"""Late starts where people sample: our pipeline, pipelines that take latents, EDM and k-diffusion functions."""

import json
import math
import re
from itertools import pairwise
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch

import symbreak as sb
from symbreak.data.readers import images
from symbreak.laws import Gaussian, PrincipalMixture
from symbreak.moments.one_pass import Moments
from symbreak.networks.denoiser import as_denoiser
from symbreak.networks.families import as_unet, denoiser
from symbreak.networks.latents import Latents, encode
from symbreak.networks.samplers import scheduler
from symbreak.noise import NoiseLevel, generator
from symbreak.runtime.files import InputError
from symbreak.start.fit import late_start
from symbreak.start.grids import late_sigmas
from symbreak.start.late_start import standard_start
from symbreak.start.loading import load_pipeline
from symbreak.start.pipeline import LateStartPipeline
from symbreak.start.sample import generate
from tests.test_class_information import Conditional
from tests.worlds import gaussian_law

BLOCKS = {
    "block_out_channels": (8, 16), "norm_num_groups": 4, "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}  # fmt: skip


def seeded(seeds):
    return [torch.Generator().manual_seed(s) for s in seeds]


@pytest.fixture(scope="module")
def digits():
    return load_pipeline("digits")


@pytest.fixture(scope="module")
def law():
    return Gaussian(Moments.fit(images("digits")))


@pytest.fixture(scope="module")
def classy():
    """A random network of four classes, whose output depends on the class."""
    torch.manual_seed(0)
    return diffusers.UNet2DModel(sample_size=8, in_channels=1, out_channels=1, num_class_embeds=4, **BLOCKS).eval()


class ClassLaw:
    """A law of four classes: N(y, 1 + sigma^2), and labels to choose one."""

    shape, classes = (1, 8, 8), torch.arange(4)

    def transport(self, noise, sigma, sigma_from=None, labels=None):
        return labels.to(noise).reshape(-1, 1, 1, 1) + math.hypot(1, sigma) * noise


def quiet(unet, start):
    pipe = LateStartPipeline(unet, start.scheduler, start)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("name", ["ddpm", "ddim", "dpm++2m-karras", "euler-a", "pndm"])
def test_image_i_is_generator_i(digits, law, name):
    start = late_start(scheduler(name, like=digits.scheduler), law, 3)
    pipe = quiet(digits.unet, start)
    ours = generate(digits.unet, start, [4, 9, 2, 7, 11], micro_batch=4) / 2 + 0.5
    assert torch.equal(pipe(5, seeded([4, 9, 2, 7, 11]), output_type="pt", micro_batch=4).images, ours)
    # alone or among others: bit for bit
    assert torch.equal(pipe(1, seeded([2]), output_type="pt", micro_batch=4).images, ours[2:3])
    assert torch.equal(pipe(2, seeded([11, 4]), output_type="pt", micro_batch=4).images, ours[[4, 0]])


def test_standard_start_gives_the_images_of_diffusers_ddim(digits):
    s = scheduler("ddim", like=digits.scheduler)
    theirs = diffusers.DDIMPipeline(unet=digits.unet, scheduler=s)
    theirs.set_progress_bar_config(disable=True)
    ours = quiet(digits.unet, standard_start(s, 5))
    for g in (lambda: seeded(range(4)), lambda: torch.Generator().manual_seed(3)):
        expected = theirs(4, g(), num_inference_steps=5, output_type="np").images
        # the same network calls on four rows, so what is left is the rounding of one float32 step
        np.testing.assert_allclose(ours(4, g(), output_type="np", micro_batch=4).images, expected, atol=2e-6, rtol=0)


def test_one_generator_is_one_stream_as_in_diffusers_ddpm(digits):
    """DDPM draws noise at every step: whatever the micro-batch, the stream is that of the whole batch."""
    s = scheduler("ddpm", like=digits.scheduler)
    theirs = diffusers.DDPMPipeline(unet=digits.unet, scheduler=s)
    theirs.set_progress_bar_config(disable=True)
    expected = theirs(5, torch.Generator().manual_seed(1), num_inference_steps=4, output_type="np").images
    ours = quiet(digits.unet, standard_start(s, 4))
    for micro in (5, 2, 64):
        out = ours(5, torch.Generator().manual_seed(1), output_type="np", micro_batch=micro).images
        # a network's rows move by 1e-6 with the batch it runs on; another stream would move them by 0.1
        np.testing.assert_allclose(out, expected, atol=1e-4, rtol=0)


def test_without_a_generator_the_global_one_is_left_alone(digits, law):
    pipe = quiet(digits.unet, late_start(scheduler("ddim", like=digits.scheduler), law, 1))
    before = torch.get_rng_state()
    a, b = (pipe(2, output_type="pt").images for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(a, b)


def test_kinds_of_output(digits, law):
    start = late_start(scheduler("ddim", like=digits.scheduler), law, 2)
    pipe = quiet(digits.unet, start)
    pt = pipe(3, seeded(range(3)), output_type="pt").images
    (array,) = pipe(3, seeded(range(3)), output_type="np", return_dict=False)
    assert np.array_equal(array, pt.permute(0, 2, 3, 1).numpy())
    pictures = pipe(3, seeded(range(3))).images
    assert (pictures[0].size, pictures[0].mode, len(pictures)) == ((8, 8), "L", 3)
    assert np.array_equal(np.asarray(pictures[1]), (array[1, :, :, 0] * 255).round().astype("uint8"))
    states = pipe(3, seeded(range(3)), output_type="latent").images
    assert torch.equal((states / 2 + 0.5).clamp(0, 1), pt)


def test_callback_sees_and_replaces_the_whole_batch(digits, law):
    start = late_start(scheduler("dpm++2m", like=digits.scheduler), law, 3)
    pipe = quiet(digits.unet, start)
    seen = []

    def look(pipeline, i, t, given):
        assert pipeline is pipe
        seen.append((i, int(t), given["latents"].clone()))
        return given

    plain = pipe(5, seeded(range(5)), output_type="latent", micro_batch=2).images
    looked = pipe(5, seeded(range(5)), output_type="latent", micro_batch=2, callback_on_step_end=look).images
    assert torch.equal(looked, plain)
    assert [(i, t) for i, t, _ in seen] == list(enumerate(start.scheduler.timesteps.tolist()))
    assert torch.equal(seen[-1][2], plain)

    def last_one_wins(pipeline, i, t, given):
        return {"latents": torch.full_like(given["latents"], 0.25)} if i == 2 else {}

    out = pipe(5, seeded(range(5)), output_type="latent", callback_on_step_end=last_one_wins).images
    assert torch.equal(out, torch.full((5, 1, 8, 8), 0.25))
    bare = []
    pipe(1, seeded([0]), callback_on_step_end=lambda *a: bare.append(a[3]), callback_on_step_end_tensor_inputs=[])
    assert bare == [{}, {}, {}]


def test_progress_bar_counts_network_calls(digits, law, capsys):
    start = late_start(scheduler("heun", like=digits.scheduler), law, 3)
    pipe = LateStartPipeline(digits.unet, start.scheduler, start)
    pipe.set_progress_bar_config(desc="late")
    pipe(1, seeded([0]))
    err = capsys.readouterr().err
    assert "late" in err
    assert f"{start.calls}/{start.calls}" in err
    pipe.set_progress_bar_config(disable=True)
    pipe(1, seeded([0]))
    assert capsys.readouterr().err == ""


def test_saved_and_restored_to_the_same_bits(digits, law, tmp_path):
    for name in ("dpm++2m", "euler"):
        start = late_start(scheduler(name, like=digits.scheduler), law, 3)
        pipe = quiet(digits.unet, start)
        folder = tmp_path / name
        pipe.save_pretrained(folder)
        kinds = {p.suffix for p in folder.rglob("*") if p.is_file()}
        assert kinds == {".json", ".safetensors"}
        back = LateStartPipeline.from_pretrained(folder)
        back.set_progress_bar_config(disable=True)
        a, b = (p(3, seeded(range(3)), output_type="latent").images for p in (pipe, back))
        assert torch.equal(a, b)
        assert back.start.explain() == start.explain()
        # network and scheduler are standard components
        assert diffusers.UNet2DModel.from_pretrained(folder / "unet").config.sample_size == 8
        cut = type(start.scheduler).from_pretrained(folder / "scheduler")
        cut.set_timesteps(3)
        assert torch.equal(cut.timesteps, start.scheduler.timesteps)
        assert json.loads((folder / "model_index.json").read_text())["_class_name"] == "LateStartPipeline"


def test_flow_matching_and_standard_starts_are_restored(tmp_path):
    """A flow cut is no part of the scheduler's config: the start's file carries it."""
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(sample_size=2, in_channels=1, out_channels=1, **BLOCKS).eval()
    s = scheduler("flow-euler")
    for i, start in enumerate((late_start(s, gaussian_law(), 3, at=NoiseLevel(2.0)), standard_start(s, 3))):
        quiet(unet, start).save_pretrained(tmp_path / str(i))
        back = LateStartPipeline.from_pretrained(tmp_path / str(i))
        back.set_progress_bar_config(disable=True)
        a, b = (p(2, seeded([5, 6]), output_type="latent").images for p in (quiet(unet, start), back))
        assert torch.equal(a, b)
        assert torch.equal(back.start.scheduler.sigmas, start.scheduler.sigmas)


def test_float64_pipelines(digits, law):
    start = late_start(scheduler("dpm++2m", like=digits.scheduler), law, 3)
    pipe = quiet(load_pipeline("digits").unet, start)
    single = pipe(3, seeded(range(3)), output_type="latent").images
    assert pipe.to("cpu", torch.float64) is pipe
    double = pipe(3, seeded(range(3)), output_type="latent").images
    assert (single.dtype, double.dtype) == (torch.float32, torch.float64)
    # the same seeds mean the same images; three float32 network calls lose about 1e-6 each
    torch.testing.assert_close(single.double(), double, atol=1e-4, rtol=0)
    assert torch.equal(pipe.to("cpu", torch.float32)(3, seeded(range(3)), output_type="latent").images, single)


def test_bfloat16_networks_see_their_dtype(digits, law):
    start = late_start(scheduler("dpm++2m", like=digits.scheduler), law, 3)
    pipe = quiet(load_pipeline("digits").unet, start)
    single = pipe(3, seeded(range(3)), output_type="latent").images
    half = pipe.to(torch.bfloat16)(3, seeded(range(3)), output_type="latent").images
    # states stay in float32; bfloat16 has three digits, and pixels run from -1 to 1
    assert half.dtype == torch.float32
    assert (half - single).abs().max() < 0.2


def test_labels_reach_the_start_and_the_network(classy):
    s = scheduler("ddim", clip_sample=False)
    start = late_start(s, ClassLaw(), 3, at=NoiseLevel(2.0), check=False)
    labels = [3, 0, 2, 1, 3, 0]
    whole = generate(classy, start, range(6), labels, micro_batch=4, clamp=False)
    # the same bits whatever the neighbours, classes with them
    assert torch.equal(generate(classy, start, [5, 1], [0, 0], micro_batch=4, clamp=False), whole[[5, 1]])
    # computed by hand: the start of the class, then the network with the class, on one micro-batch
    noise = torch.stack([torch.randn(1, 8, 8, generator=g) for g in seeded(range(4))])
    y = torch.tensor(labels[:4])
    level = start.level
    state = level.alpha * (y.reshape(-1, 1, 1, 1) + math.hypot(1, level.sigma) * noise)
    steps = start.fresh()
    with torch.no_grad():
        for t in steps.timesteps:
            state = steps.step(classy(state, t, class_labels=y).sample, t, state).prev_sample
    torch.testing.assert_close(whole[:4], state, atol=1e-5, rtol=1e-5)  # rounding of another order of products
    pipe = quiet(classy, start)
    out = pipe(6, seeded(range(6)), class_labels=torch.tensor(labels), output_type="latent", micro_batch=4).images
    assert torch.equal(out, whole)
    one = pipe(2, seeded([3, 4]), class_labels=1, output_type="latent", micro_batch=4).images
    assert torch.equal(one[0], whole[3])
    # a class changes the image, so the labels above were not ignored
    assert (one[1] - whole[4]).abs().max() > 0.1


@pytest.mark.parametrize(
    ("labels", "match"),
    [
        (None, "the network has 4 classes, but no labels came"),
        ([0, 4], "labels from 0 to 4; the network knows 0 to 3"),
        ([-1, 0], "labels from -1 to 0"),
        ([0, 1, 2], r"shape \(3,\) for 2 samples"),
        ([[0], [1]], r"shape \(2, 1\) for 2 samples"),
        ([0.0, 1.0], "expected whole numbers"),
    ],
)
def test_bad_labels(classy, labels, match):
    start = standard_start(scheduler("ddim"), 2)
    with pytest.raises(InputError, match=match):
        generate(classy, start, [0, 1], labels)
    with pytest.raises(InputError, match=match):
        quiet(classy, start)(2, class_labels=labels)


def test_bad_input(digits, law, tmp_path):
    start = late_start(scheduler("ddim", like=digits.scheduler), law, 2)
    pipe = quiet(digits.unet, start)
    for arguments, match in [
        ({"batch_size": 0}, "0 images"),
        ({"batch_size": 2, "generator": seeded([1])}, "1 generators for 2 images"),
        ({"class_labels": 3}, "without classes"),
        ({"output_type": "gif"}, "output_type 'gif'"),
        ({"micro_batch": 0}, "micro-batch of 0"),
        ({"callback_on_step_end": print, "callback_on_step_end_tensor_inputs": ["noise"]}, "'noise'"),
        ({"callback_on_step_end": lambda *a: {"latents": torch.zeros(2, 1, 8, 8)}}, "a step gave states"),
    ]:
        with pytest.raises(InputError, match=match) as caught:
            pipe(**arguments)
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="start of the kind NoneType"):
        LateStartPipeline(digits.unet, start.scheduler)
    with pytest.raises(InputError, match=r"not the start's .*make another start"):
        LateStartPipeline(digits.unet, digits.scheduler, start)
    pipe.scheduler = scheduler("euler", like=digits.scheduler)
    with pytest.raises(InputError, match="not the start's"):
        pipe(1)
    other = late_start(scheduler("ddim"), gaussian_law(), 2, at=NoiseLevel(2.0))
    with pytest.raises(InputError, match="Fit it on such data"):
        LateStartPipeline(digits.unet, other.scheduler, other)
    two = gaussian_law(eigenvalues=(2.0,) * 8, shape=(2, 2, 2))
    base = scheduler("ddim", clip_sample=False)
    start = late_start(base, two, 2, at=NoiseLevel(2.0))
    posing = quiet(as_unet(two, base), start)
    with pytest.raises(InputError, match="2 channels are no pictures"):
        posing(1)
    with pytest.raises(InputError, match="cannot be saved by diffusers"):
        posing.save_pretrained(tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_bad_folders(digits, law, tmp_path):
    start = late_start(scheduler("ddim", like=digits.scheduler), law, 2)
    pipe = quiet(digits.unet, start)
    with pytest.raises(InputError, match="pickles"):
        pipe.save_pretrained(tmp_path / "p", safe_serialization=False)
    pipe.save_pretrained(tmp_path / "p")
    with pytest.raises(InputError, match=r"LateStartPipeline\.from_pretrained"):
        load_pipeline(tmp_path / "p")
    digits.save_pretrained(tmp_path / "ddpm")
    with pytest.raises(InputError, match="holds a DDPMPipeline"):
        LateStartPipeline.from_pretrained(tmp_path / "ddpm")
    with pytest.raises(InputError, match="no model_index"):
        LateStartPipeline.from_pretrained(tmp_path)
    weights = tmp_path / "p" / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".away"))
    with pytest.raises(InputError, match="cannot be loaded"):
        LateStartPipeline.from_pretrained(tmp_path / "p")
    weights.with_suffix(".away").rename(weights)
    (tmp_path / "p" / "start.safetensors").unlink()
    with pytest.raises(InputError, match=r"start\.safetensors does not exist"):
        LateStartPipeline.from_pretrained(tmp_path / "p")
    (tmp_path / "p" / "model_index.json").write_text("[]")
    with pytest.raises(InputError, match="holds no settings"):
        LateStartPipeline.from_pretrained(tmp_path / "p")


# latents


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    return diffusers.AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(8, 16), norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, scaling_factor=0.3,
    ).eval()  # fmt: skip


@pytest.fixture(scope="module")
def pictures():
    """Smooth random images [300, 3, 16, 16] in [-1, 1]."""
    coarse = torch.randn(300, 3, 4, 4, generator=generator(1))
    return torch.nn.functional.interpolate(coarse, 16, mode="bilinear").tanh()


def test_latents_are_what_the_network_sees(vae, pictures):
    latents = encode(vae, pictures, batch=32)
    assert isinstance(latents, Latents)
    ours = torch.cat(list(latents))
    with torch.no_grad():
        raw = torch.cat([vae.encode(part).latent_dist.mean for part in pictures.split(50)])
    assert ours.dtype == torch.float32
    # another batch size moves float32 by its rounding
    torch.testing.assert_close(ours, 0.3 * raw, atol=1e-5, rtol=1e-5)
    # walked again, and whatever the batches it comes in: the same bits
    assert torch.equal(torch.cat(list(latents)), ours)
    assert torch.equal(torch.cat(list(encode(vae, list(pictures.split(7)), batch=32))), ours)
    assert torch.equal(torch.cat(list(encode(vae, pictures[17:20], batch=32))), ours[17:20])


def test_latents_are_undone_by_what_pipelines_do_before_decoding(vae, pictures):
    raw = torch.cat(list(encode(vae, pictures[:4]))) / 0.3
    config = {k: v for k, v in vae.config.items() if not k.startswith("_")}
    for changes, undo in [
        ({"shift_factor": 0.7}, lambda z: z / 0.3 + 0.7),  # Stable Diffusion 3, Flux
        (
            {"latents_mean": [0.1, 0.2, 0.3, 0.4], "latents_std": [1.0, 2.0, 3.0, 4.0]},  # Stable Diffusion XL
            lambda z: (
                z * torch.arange(1.0, 5.0).reshape(1, 4, 1, 1) / 0.3 + torch.arange(1, 5).reshape(1, 4, 1, 1) / 10
            ),
        ),
    ]:
        other = diffusers.AutoencoderKL.from_config({**config, **changes}).eval()
        other.load_state_dict(vae.state_dict())
        torch.testing.assert_close(undo(torch.cat(list(encode(other, pictures[:4])))), raw, atol=1e-5, rtol=1e-5)


def test_sampled_latents_have_the_spread_the_autoencoder_says(vae, pictures):
    mean, drawn = (torch.cat(list(encode(vae, pictures, batch=50, sample=s))) for s in (False, True))
    with torch.no_grad():
        std = 0.3 * torch.cat([vae.encode(part).latent_dist.std for part in pictures.split(50)])
    z = ((drawn - mean) / std).flatten()
    # 76,800 unit normals: five standard errors of mean and variance
    assert abs(float(z.mean())) < 5 / len(z) ** 0.5
    assert abs(float(z.var()) - 1) < 5 * (2 / len(z)) ** 0.5
    assert torch.equal(torch.cat(list(encode(vae, pictures, batch=50, sample=True))), drawn)


def test_bad_images_for_the_autoencoder(vae, pictures):
    for data, match in [
        (pictures[:, :1], "channels"),
        (pictures * 200, r"takes \[-1, 1\]"),
        (pictures * torch.nan, r"takes \[-1, 1\]"),
    ]:
        with pytest.raises(InputError, match=match):
            list(encode(vae, data))
    with pytest.raises(InputError, match="walked once"):
        encode(vae, iter([pictures]))
    with pytest.raises(InputError, match="batch of 0"):
        encode(vae, pictures, batch=0)


def stable_diffusion(vae):
    """A tiny text-to-image pipeline with random weights and a made-up vocabulary; nothing is fetched."""
    transformers = pytest.importorskip("transformers", reason="Stable Diffusion pipelines need transformers")
    torch.manual_seed(1)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16), norm_num_groups=4,
        layers_per_block=1, cross_attention_dim=16, attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    ).eval()  # fmt: skip
    text = transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=8, bos_token_id=0, eos_token_id=1,
        )
    ).eval()  # fmt: skip
    parts = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False, "tokenizer": None}
    pipe = diffusers.StableDiffusionPipeline(
        vae=vae,
        text_encoder=text,
        unet=unet,
        scheduler=diffusers.DDIMScheduler(clip_sample=False, steps_offset=1),
        **parts,
    )
    pipe.set_progress_bar_config(disable=True)
    with torch.no_grad():
        prompts = text(torch.tensor([[0, 5, 7, 1], [0, 9, 3, 1]])).last_hidden_state
        nothing = text(torch.tensor([[0, 1, 1, 1]] * 2)).last_hidden_state
    return pipe, {"prompt_embeds": prompts, "negative_prompt_embeds": nothing}


@pytest.mark.parametrize("name", ["ddim", "pndm", "dpm++2m-karras", "euler", "heun"])
def test_a_stable_diffusion_pipeline_starts_late(vae, pictures, name):
    pipe, prompts = stable_diffusion(vae)
    law = Gaussian.fit(encode(pipe.vae, pictures))
    start = late_start(scheduler(name, like=pipe.scheduler), law, steps=4, at=NoiseLevel(2.0), check=False)
    pipe.scheduler = start.fresh()
    noise = torch.randn(2, 4, 8, 8, generator=generator(7))
    seen, times = [], []

    def look(module, args, kwargs):
        seen.append(args[0].clone())
        times.append(float(args[1]))

    hook = pipe.unet.register_forward_pre_hook(look, with_kwargs=True)
    out = pipe(**prompts, latents=start.latents(noise), num_inference_steps=start.steps, output_type="latent").images
    hook.remove()
    # what the network saw first is the start's state, twice for guidance, as the scheduler scales it
    first = start.fresh()
    expected = first.scale_model_input(start(noise), first.timesteps[0])
    torch.testing.assert_close(seen[0], torch.cat([expected] * 2), rtol=1e-6, atol=1e-6)  # / and * init_noise_sigma
    if first.init_noise_sigma == 1:
        assert torch.equal(seen[0], torch.cat([expected] * 2))
    assert len(seen) == start.calls
    assert times == [float(t) for t in start.scheduler.timesteps]
    # and the rest is the sampler of the cut schedule: by hand, with guidance 7.5
    text = torch.cat([prompts["negative_prompt_embeds"], prompts["prompt_embeds"]])
    state, steps = start(noise), start.fresh()
    with torch.no_grad():
        for t in steps.timesteps:
            both = steps.scale_model_input(torch.cat([state] * 2), t)
            without, given = pipe.unet(both, t, encoder_hidden_states=text, return_dict=False)[0].chunk(2)
            state = steps.step(without + 7.5 * (given - without), t, state, return_dict=False)[0]
    torch.testing.assert_close(out, state, rtol=1e-4, atol=1e-4)  # the order of float32 operations, amplified 7.5 x
    # the start has the latents' variance and the noise's, not white noise's
    assert start(noise).shape == out.shape


def test_text_networks_are_sent_to_their_own_pipeline(vae):
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1, cross_attention_dim=16,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, mid_block_type=None,
    )  # fmt: skip
    start = standard_start(scheduler("ddim"), 2)
    with pytest.raises(InputError, match=r"start\.latents"):
        LateStartPipeline(unet, start.scheduler, start)


# samplers of one's own


def euler(model, x, sigmas, **extra):
    """k-diffusion's sample_euler: dx/dsigma = (x - D) / sigma."""
    ones = x.new_ones([len(x)])
    for a, b in pairwise(sigmas):
        x = x + (b - a) * (x - model(x, a * ones, **extra)) / a
    return x


def heun(model, x, sigmas, **extra):
    """k-diffusion's sample_heun."""
    ones = x.new_ones([len(x)])
    for a, b in pairwise(sigmas):
        slope = (x - model(x, a * ones, **extra)) / a
        guess = x + (b - a) * slope
        if b > 0:
            slope = (slope + (guess - model(guess, b * ones, **extra)) / b) / 2
        x = x + (b - a) * slope
    return x


BASIS = torch.cat([torch.zeros(1, 4), torch.eye(4)]).double().reshape(-1, 1, 2, 2)


def pushed(map_):
    """Mean and covariance of an affine map of white noise, exactly."""
    out = map_(BASIS).flatten(1)
    linear = (out[1:] - out[0]).T
    return out[0], linear @ linear.T


@pytest.mark.parametrize(("sampler", "steps", "tolerance"), [(euler, 2000, 5e-3), (heun, 100, 1e-3)])
def test_k_diffusion_samplers_give_mean_and_covariance_back(sampler, steps, tolerance):
    law = gaussian_law()
    start = late_start(scheduler("edm-euler"), law, 5, at=NoiseLevel(3.0), check=False)
    sigmas = late_sigmas(start, steps, sigma_min=0.005)

    def model(x, sigma):
        """An exact network in k-diffusion's form."""
        assert sigma.shape == (len(x),)
        return law.denoise(x, sigma)

    mean, cov = pushed(lambda z: sampler(model, start.ve(z), sigmas))
    # Euler is of first order and Heun of second; the last jump from sigma_min leaves 1e-4
    torch.testing.assert_close(mean, law.moments.mean.reshape(-1), atol=tolerance, rtol=0)
    torch.testing.assert_close(cov, law.moments.cov, atol=4 * tolerance, rtol=0)


def test_the_ve_state_is_the_state_over_alpha():
    law, z = gaussian_law(), BASIS
    for name in ("ddim", "euler", "flow-euler", "edm-euler"):
        start = late_start(scheduler(name), law, 5, at=NoiseLevel(3.0), check=False)
        torch.testing.assert_close(start.ve(z) * start.level.alpha, start(z), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(start.ve(z), law.transport(z, start.level.sigma), rtol=0, atol=0)
    start = standard_start(scheduler("ddim"), 5)
    # a VP state of unit variance is a VE state of variance 1 + sigma^2
    torch.testing.assert_close(start.ve(z), z * math.hypot(1, start.level.sigma))
    with pytest.raises(InputError, match="pure noise"):
        standard_start(scheduler("flow-euler"), 5).ve(z)


def test_karras_grid_from_the_level_down():
    start = late_start(scheduler("dpm++2m"), gaussian_law(), 5, at=NoiseLevel(2.0))
    grid = late_sigmas(start, 10, 0.02)
    assert grid[0] == start.level.sigma
    assert (grid[-1], grid[-2]) == (0, pytest.approx(0.02, rel=1e-12))
    # equal steps in sigma^(1 / 7)
    torch.testing.assert_close(
        (grid[:-1] ** (1 / 7)).diff(n=2), torch.zeros(8, dtype=torch.float64), atol=1e-12, rtol=0
    )
    assert torch.equal(late_sigmas(start.level, 10, 0.02), late_sigmas(start.level.sigma, 10, 0.02))
    torch.testing.assert_close(late_sigmas(2.0, 5, 0.4, rho=1.0), torch.tensor([2.0, 1.6, 1.2, 0.8, 0.4, 0.0]).double())
    assert late_sigmas(2.0, 1, 0.1).tolist() == [2.0, 0.0]
    for arguments, match in [
        ((math.inf, 5, 0.1), "finite level"), ((2.0, 5, 0.0), "0 < sigma_min"), ((2.0, 5, 3.0), "0 < sigma_min"),
        ((2.0, 0, 0.1), "at least 1"), ((2.0, 5, 0.1, -1.0), "rho > 0"),
    ]:  # fmt: skip
        with pytest.raises(InputError, match=match):
            late_sigmas(*arguments)


class Wrong:
    """A denoiser of a small range that counts its calls and is wrong in a known way."""

    shape, sigma_range = (1, 2, 2), (0.01, 2.0)

    def __init__(self, law):
        self.law, self.levels = law, []

    def __call__(self, x, sigma):
        s = torch.as_tensor(sigma, dtype=torch.float64).reshape(-1)
        assert float(s.max()) <= 2.0
        self.levels += s.tolist()
        return self.law.denoise(x, sigma) + 1


def test_hybrid_is_the_law_above_and_the_network_below():
    law = gaussian_law()
    start = late_start(scheduler("edm-euler"), law, 5, at=NoiseLevel(2.0), check=False)
    network = Wrong(law)
    d = start.denoiser(network)
    assert (d.shape, d.sigma_range) == ((1, 2, 2), (0.01, math.inf))
    x = BASIS
    assert torch.equal(d(x, 2.1), law.denoise(x, 2.1))
    assert network.levels == []
    assert torch.equal(d(x, 1.9), law.denoise(x, 1.9) + 1)
    assert torch.equal(d(x, 2.0), law.denoise(x, 2.0) + 1)  # the first step of the sampler is the network's
    sigma = torch.tensor([3.0, 1.0, 80.0, 2.0, 0.5])
    below = torch.tensor([0.0, 1.0, 0.0, 1.0, 1.0]).double().reshape(-1, 1, 1, 1)
    torch.testing.assert_close(d(x, sigma), law.denoise(x, sigma) + below, rtol=1e-14, atol=1e-14)
    # a float32 grid that begins a hair above the level still begins with the network, inside its range
    assert torch.equal(d(x, 2.0 * (1 + 1e-7)), law.denoise(x, 2.0) + 1)
    assert as_denoiser(d) is d
    assert standard_start(scheduler("edm-euler"), 5).denoiser(network) is network
    with pytest.raises(InputError, match="Fit it on"):
        late_start(scheduler("ddim"), gaussian_law(shape=(4, 1, 1)), 2, at=NoiseLevel(2.0)).denoiser(network)


def test_ones_own_sampler_from_any_level_costs_the_network_only_below():
    law = gaussian_law()
    start = late_start(scheduler("edm-euler"), law, 5, at=NoiseLevel(2.0), check=False)
    network = Wrong(law)
    hybrid = start.denoiser(network)
    sigmas = torch.cat([late_sigmas(500.0, 400, 2.0)[:-1], late_sigmas(2.0, 10, 0.02)[1:]])
    top = 500.0 * BASIS[1:]  # the last intervals belong to the network: stop at the level itself
    at_level = heun(hybrid, top, sigmas[:399])
    # 399 Heun steps of a smooth flow, against its closed form
    expected = law.transport(top, float(sigmas[398]), sigma_from=500.0)
    torch.testing.assert_close(at_level, expected, rtol=1e-3, atol=1e-3)
    assert network.levels == []
    heun(hybrid, at_level, sigmas[399:])
    assert len(network.levels) == 4 * 19  # Heun: two calls a step but for the last of ten, four states each


class EDMNetwork(torch.nn.Module):
    """EDM's face of a network: preconditioned, sigma of any shape, float32 inside, class labels."""

    img_channels, img_resolution, sigma_min, sigma_max = 1, 2, 0, float("inf")

    def __init__(self, law):
        super().__init__()
        self.law = law
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x, sigma, class_labels=None, force_fp32=False, **_):
        x, sigma = x.to(torch.float32), sigma.to(torch.float32).reshape(-1, 1, 1, 1)
        shift = 0 if class_labels is None else class_labels.reshape(-1, 1, 1, 1)
        return self.law.denoise(x, sigma.reshape(-1)) + shift


def test_edm_and_k_diffusion_networks_are_denoisers():
    law = gaussian_law()
    d = denoiser(EDMNetwork(law))
    assert (d.shape, d.sigma_range) == ((1, 2, 2), (0.0, math.inf))
    each = torch.tensor([0.3, 1.0, 2.0, 5.0, 70.0])
    with torch.no_grad():
        for sigma in (0.7, each):
            out = d(BASIS, sigma)
            assert out.dtype == torch.float64  # that of the states; the network works in its own
            torch.testing.assert_close(out, law.denoise(BASIS, sigma), rtol=1e-5, atol=1e-5)
        y = torch.arange(5.0)
        torch.testing.assert_close(d.bind(class_labels=y)(BASIS, each) - d(BASIS, each), y.reshape(-1, 1, 1, 1).double()
                                   .expand(5, 1, 2, 2), rtol=1e-5, atol=1e-5)  # fmt: skip
    k = denoiser(lambda x, sigma: law.denoise(x, sigma), shape=(1, 2, 2), sigma_range=(0.03, 14.6))
    assert torch.equal(k(BASIS, 2.0), law.denoise(BASIS, torch.full((5,), 2.0)))
    for sigma in (0.02, 14.7, torch.tensor([1.0, 1.0, 1.0, 1.0, 20.0])):
        with pytest.raises(ValueError, match=r"outside the network's 0\.03 to 14\.6"):
            k(BASIS, sigma)
    # the start sits on either
    start = late_start(scheduler("edm-euler"), law, 5, at=NoiseLevel(2.0), check=False)
    assert torch.equal(start.denoiser(k)(BASIS, 100.0), law.denoise(BASIS, 100.0))


def test_bad_functions():
    def model(x, sigma):
        return x

    for arguments, match in [
        ({}, "does not say its shape"),
        ({"shape": (1, 2, 2)}, "does not say its levels"),
        ({"shape": (1, 2, 2), "sigma_range": (2.0, 1.0)}, "0 <= low < high"),
        ({"scheduler": scheduler("ddim"), "sigma_range": (0.1, 1.0)}, "Leave it out"),
    ]:
        with pytest.raises(InputError, match=match):
            denoiser(model, **arguments)
    known = {"shape": (1, 2, 2), "sigma_range": (0.1, 10.0)}
    with pytest.raises(InputError, match="Resize"):
        denoiser(model, **known)(torch.zeros(1, 1, 3, 3), 1.0)
    law = gaussian_law()
    with pytest.raises(InputError, match="needs its scheduler"):
        denoiser(as_unet(law, scheduler("ddim")), **known)(torch.zeros(1, 1, 2, 2), 1.0)


# the documentation


def snippets(latent):
    """The page's examples, those for latent pipelines or the others."""
    text = (Path(__file__).parents[1] / "docs" / "pipelines.md").read_text(encoding="utf-8")
    found = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(found) == 7
    return [compile(code, "pipelines.md", "exec") for code in found if ("pipe.vae" in code) == latent]


@torch.no_grad()
def test_every_snippet_of_the_page_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    law = gaussian_law()
    names = {
        "net": EDMNetwork(law),
        "classy": as_unet(Conditional(PrincipalMixture.fit(images("digits"), labels=True)), scheduler("ddpm")),
        "model": law.denoise,
        "seen": law,
        "sample_heun": heun,
        "your_sampler": lambda d, x: heun(d, x, late_sigmas(80.0, 20, 0.02)),
    }
    for code in snippets(latent=False):
        exec(code, names)
    assert len(names["images"]) == len(names["again"]) == 16
    assert names["samples"].shape == (8, 1, 2, 2)
    assert names["threes"].shape == (8, 1, 8, 8)
    assert torch.equal(names["law"].moments.mean, Moments.fit(images("digits")).mean)


@torch.no_grad()
def test_the_snippet_for_latent_pipelines_runs(vae, pictures):
    pipe, prompts = stable_diffusion(vae)
    names = {"pipe": pipe, "prompts": prompts, "pictures": pictures}
    exec("import torch\nimport symbreak as sb", names)
    for code in snippets(latent=True):
        exec(code, names)
    assert [image.size for image in names["images"]] == [(16, 16)] * 2


def test_a_grid_that_ends_a_little_below_what_a_network_knows():
    """Schedules of DDPM end at sigma 0.01, networks of k-diffusion know 0.02 or 0.03; far below one says so."""
    data = torch.randn(400, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    law, sampler = sb.Gaussian.fit(data), sb.scheduler("dpm++2m-karras")
    start = sb.late_start(sampler, law, 5, at=sb.NoiseLevel(2.0), check=False)
    assert float(start.scheduler.sigmas[-2]) < 0.011
    expected = sb.generate(law, start, range(4), clamp=False)
    near = denoiser(lambda x, sigma: law.denoise(x, sigma), shape=(1, 4, 4), sigma_range=(0.02, 80.0))
    torch.testing.assert_close(sb.generate(near, start, range(4), clamp=False), expected, atol=2e-3, rtol=0)
    far = denoiser(lambda x, sigma: law.denoise(x, sigma), shape=(1, 4, 4), sigma_range=(0.2, 80.0))
    with pytest.raises(InputError, match=r"outside the network's 0.2 to 80"):
        sb.generate(far, start, range(4))
