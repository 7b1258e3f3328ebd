"""Networks of other libraries as they are, where these are installed: azula, torchcfm, k-diffusion."""

import diffusers
import pytest
import torch

import symbreak as sb
from tests.test_families import QUICK, drawn

pytestmark = pytest.mark.slow  # they bring many packages, which nothing else here needs


@pytest.fixture(scope="module")
def law():
    return sb.Gaussian.fit(sb.samples(torch.randn(40, 1, 8, 8, generator=torch.Generator().manual_seed(1))))


def states():
    return 2 * torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def check(d, law, *, tolerance):
    """Denoised at one level and at four, sampled from a late start."""
    for sigma in (0.3, 2.0, torch.tensor([0.3, 1.0, 2.0, 9.0])):
        torch.testing.assert_close(d(states(), sigma), law.denoise(states(), sigma), rtol=tolerance, atol=tolerance)
    full = sb.scheduler("edm-euler", sigma_min=0.02, sigma_max=20.0)
    start = sb.late_start(full, law, 3, at=sb.NoiseLevel(1.5), check=False)
    made, wanted = (sb.generate(v, start, [0, 1], clamp=False) for v in (d, law))
    torch.testing.assert_close(made, wanted, rtol=10 * tolerance, atol=10 * tolerance)


class Backbone(torch.nn.Module):
    """What azula's preconditioned denoisers ask, (x / sqrt(1 + sigma^2), log sigma), answered by a law."""

    def __init__(self, law):
        super().__init__()
        self.law, self.weight = law, torch.nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, y, log_sigma):
        sigma = log_sigma.exp()
        s = sigma.reshape(-1, 1, 1, 1)
        x = y * (1 + s * s).sqrt()
        return (self.law.denoise(x, sigma) - x / (1 + s * s)) * (1 + s * s).sqrt() / s


@pytest.mark.parametrize("name", ["VPSchedule", "CosineSchedule", "RectifiedSchedule", "VESchedule"])
def test_azula(law, name):
    denoise, noise = pytest.importorskip("azula.denoise"), pytest.importorskip("azula.noise")
    network = denoise.KarrasDenoiser(Backbone(law), getattr(noise, name)())
    d = sb.denoiser(network, shape=(1, 8, 8))
    assert d.family == "azula"
    check(d, law, tolerance=1e-4)  # their time is float32
    if name == "VPSchedule":
        assert sb.diagnose(drawn(d.shape, 100), d, clusters=2, effort=QUICK).content["criteria"]


class Epsilon(torch.nn.Module):
    """A discrete network of epsilon, (x / sqrt(1 + sigma^2), t), answered by a law."""

    def __init__(self, law, sigmas):
        super().__init__()
        self.law, self.log_sigmas = law, sigmas.log()

    def forward(self, y, t):
        low = t.floor().long().clamp(max=len(self.log_sigmas) - 2)
        sigma = torch.lerp(self.log_sigmas[low], self.log_sigmas[low + 1], (t - low).to(self.log_sigmas)).exp()
        s = sigma.reshape(-1, 1, 1, 1)
        x = y * (1 + s * s).sqrt()
        return (x - self.law.denoise(x, sigma)) / s


def test_k_diffusion(law):
    external = pytest.importorskip("k_diffusion").external
    bars = diffusers.DDPMScheduler().alphas_cumprod
    network = external.DiscreteEpsDDPMDenoiser(Epsilon(law, ((1 - bars) / bars).sqrt()), bars, quantize=False)
    d = sb.denoiser(network, shape=(1, 8, 8))
    assert d.family == "k-diffusion"
    assert d.sigma_range == pytest.approx((0.01, 157.4), rel=0.01)  # which it says
    check(d, law, tolerance=1e-3)  # its levels are float32
    with pytest.raises(sb.InputError, match="does not say its levels"):
        sb.denoiser(external.VDenoiser(torch.nn.Identity()), shape=(1, 8, 8))


@torch.no_grad()
def test_torchcfm():
    unet = pytest.importorskip("torchcfm.models.unet")
    torch.manual_seed(0)
    network = unet.UNetModel(dim=(1, 8, 8), num_channels=32, num_res_blocks=1, channel_mult=[1, 2]).eval()
    torch.nn.init.normal_(network.out[-1].weight, std=0.1)
    d = sb.denoiser(network)
    assert (d.shape, d.unet.family) == ((1, 8, 8), "time-first")
    x = states()
    for sigma in (0.3, 2.0):
        t = 1 / (1 + sigma)  # their time: x_t = (1 - t) noise + t data
        seen = (t * x).float()
        wanted = seen.double() + (1 - t) * network(torch.full((4,), t), seen).double()
        torch.testing.assert_close(d(x, sigma), wanted, rtol=1e-4, atol=1e-4)  # a float32 network
    start = sb.standard_start(sb.scheduler("flow-euler"), 3)
    assert bool(torch.isfinite(sb.generate(d, start, [0, 1], clamp=False)).all())
    assert sb.diagnose(drawn(d.shape, 100), d, clusters=2, effort=QUICK).content["criteria"]
