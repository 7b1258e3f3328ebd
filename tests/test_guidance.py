"""Guidance against closed forms, and against diffusers' own formula on a network with classes."""

import math

import diffusers
import pytest
import torch

import symbreak as sb
from symbreak.networks.families import as_unet, denoiser
from symbreak.noise import generator
from symbreak.phases.fixed_point_search import _Differentiable
from symbreak.runtime.errors import InputError
from symbreak.start.late_start import standard_start
from tests.families import GuidedDiffusion
from tests.worlds import gaussian_law

MIXTURE = sb.Mixture.from_parameters([[-2.0, 0.0], [2.0, 0.5], [0.0, 3.0]], [0.3, 0.3, 0.3], weights=[0.5, 0.3, 0.2])
COMPONENT = sb.Mixture.from_parameters([[2.0, 0.5]], [0.3])
STATES = 3 * torch.randn(20, 2, generator=generator(0), dtype=torch.float64)


@pytest.mark.parametrize("scale", [0.0, 1.0, 2.5, -1.0])
@pytest.mark.parametrize("sigma", [0.2, 1.0, 5.0])
def test_two_gaussians_guided_are_a_third(scale, sigma):
    """p_u^(1 - w) p_c^w of Gaussians has the precision (1 - w) P_u + w P_c, and so has its score."""
    mu, nu, a, b = torch.tensor([1.0, -1.0]).double(), torch.tensor([-2.0, 0.5]).double(), 0.5, 2.0
    c, u = (sb.Mixture.from_parameters(m[None], [v]) for m, v in ((mu, a), (nu, b)))
    p_c, p_u = 1 / (a + sigma**2), 1 / (b + sigma**2)
    wanted = -scale * p_c * (STATES - mu) - (1 - scale) * p_u * (STATES - nu)
    torch.testing.assert_close(sb.score(sb.guided(c, u, scale), STATES, sigma), wanted)


@pytest.mark.parametrize("scale", [0.5, 3.0])
def test_a_mixture_and_one_of_its_components(scale):
    x = STATES.clone().requires_grad_()
    tilted = (1 - scale) * MIXTURE.log_prob(x, 0.8) + scale * COMPONENT.log_prob(x, 0.8)
    (gradient,) = torch.autograd.grad(tilted.sum(), x)
    torch.testing.assert_close(sb.score(sb.guided(COMPONENT, MIXTURE, scale), STATES, 0.8), gradient)


def test_scale_one_and_levels_outside_the_window_evaluate_the_conditional_one_only():
    class Counting:
        shape, sigma_range, count = (2,), (0.01, 50.0), 0

        def __call__(self, x, sigma):
            self.count += 1
            return MIXTURE.denoise(x, sigma)

    network = Counting()
    one = sb.guided(COMPONENT, network, 1.0)
    assert torch.equal(one(STATES, 1.0), COMPONENT.denoise(STATES, 1.0))
    assert (one.evaluations(1.0), one.sigma_range) == (1, (0.01, 50.0))
    d = sb.guided(COMPONENT, network, 3.0, window=(0.5, 2.0))
    for sigma, cost in ((0.3, 1), (0.5, 1), (0.6, 2), (2.0, 2), (2.1, 1)):  # (low, high]
        network.count = 0
        out = d(STATES, sigma)
        assert d.evaluations(sigma) == 1 + network.count == cost
        assert torch.equal(out, COMPONENT.denoise(STATES, sigma)) == (cost == 1)


def test_every_sample_at_its_own_level():
    d = sb.guided(COMPONENT, MIXTURE, 3.0, window=(0.5, 2.0))
    levels = torch.linspace(0.1, 4.0, len(STATES), dtype=torch.float64)
    each = torch.cat([d(x[None], float(s)) for x, s in zip(STATES, levels)])
    torch.testing.assert_close(d(STATES, levels), each)


@pytest.fixture(scope="module")
def classy():
    """A small network of two classes and an empty one, with random weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return diffusers.UNet2DModel(
            sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 8), norm_num_groups=4,
            layers_per_block=1, down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
            num_class_embeds=3,
        ).eval()  # fmt: skip


def test_a_guided_network_has_a_derivative():
    guide = sb.guided(sb.denoiser(GuidedDiffusion(), sb.scheduler("ddpm"), class_labels=torch.tensor([1])), 9, 2.0)
    x, v = (torch.randn(2, *guide.shape, generator=generator(s)) for s in (1, 2))
    with _Differentiable():  # as phases take it: torch 2.6 knows no tolist in a derivative
        slope = torch.func.jvp(lambda z: guide(z, 1.5), (x,), (v,))[1]
    with torch.no_grad():  # an affine network
        torch.testing.assert_close(slope, guide(x + v, 1.5) - guide(x, 1.5), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_diffusers_own_guidance(classy, prediction):
    """Their pipelines guide what the network predicts, which is affine in the denoised state: the same images."""
    scale, y = 2.5, torch.tensor([0, 1, 1])
    s = diffusers.DDIMScheduler(prediction_type=prediction, clip_sample=False)
    c, u = denoiser(classy, s), denoiser(classy, s, class_labels=torch.tensor([2, 2, 2]))
    start = standard_start(s, 4)
    noise = torch.randn(3, 1, 8, 8, generator=generator(1))
    net, theirs, ours = as_unet(sb.guided(c, u, scale).bind(class_labels=y), s), noise, noise
    with torch.inference_mode():
        for t in start.scheduler.timesteps:
            twice = classy(torch.cat([theirs, theirs]), t, torch.cat([torch.full((3,), 2), y])).sample
            without, with_condition = twice.chunk(2)
            out = without + scale * (with_condition - without)
            theirs = start.fresh().step(out, t, theirs).prev_sample
            ours = start.fresh().step(net(ours, t).sample, t, ours).prev_sample
    # Float32 networks, run on another batch size; random weights let states grow to some tens.
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert float((theirs - noise).abs().max()) > 0.1


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"window": (2.0, 0.5)}, "window from sigma 2 to 0.5; expected 0 <= low < high"),
        ({"window": (-1.0, 0.5)}, "0 <= low"),
        ({"window": (math.nan, 0.5)}, "0 <= low"),
        ({"scale": math.inf}, "scale of inf"),
        ({"scale": math.nan}, "scale of nan"),
        ({"unconditional": gaussian_law()}, "expected one shape"),
        ({"unconditional": "3"}, "neither a law"),
        ({"unconditional": 3}, "the null class 3 came for a law"),
        ({"scale": None}, r"got no scale; .* Call sb.guided\(sb.denoiser\(unet, scheduler, class_labels="),
        ({"conditional": torch.nn.Identity()}, r"got Identity, which is no denoiser; .* a scale. Call sb.guided"),
    ],
)
def test_bad_input(change, match):
    with pytest.raises(InputError, match=match):
        sb.guided(**{"conditional": COMPONENT, "unconditional": MIXTURE, "scale": 2.0, **change})


def test_ranges_that_do_not_meet():
    ends = ((0.01, 1.0), (2.0, 50.0))
    c, u = (denoiser(lambda x, sigma: x, shape=(2,), sigma_range=r) for r in ends)
    with pytest.raises(InputError, match="no level that both denoisers know"):
        sb.guided(c, u, 2.0)
