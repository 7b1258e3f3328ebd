"""Every family of networks: denoised, sampled from a late start, diagnosed; and as an exact law behind its own face."""

import functools

import diffusers
import numpy as np
import pytest
import torch

import symbreak as sb
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
@EACH
def test_diagnose_and_choose_a_start(name):
    d = denoiser_of(name)
    data = drawn(d.shape, 100)
    assert sb.diagnose(data, d, clusters=2, effort=QUICK).content["network"]["parameters"] >= 0
    start = sb.fit_start(data, d, scheduler_of(name), steps=3, clusters=2)
    assert sb.generate(d, start, [0, 1], micro_batch=2).shape == (2, *d.shape)


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
