import math
import warnings
from functools import partial
from itertools import pairwise

import diffusers
import pytest
import torch

from symbreak.critical import CriticalTime
from symbreak.laws import Gaussian
from symbreak.moments.one_pass import Moments
from symbreak.networks.denoiser import score
from symbreak.networks.families import as_unet, denoiser
from symbreak.networks.guidance import guided
from symbreak.networks.samplers import scheduler
from symbreak.noise import NoiseLevel
from symbreak.phases.speciation import ladder, speciation_time
from symbreak.runtime.files import InputError
from symbreak.start.fit import late_start
from symbreak.start.late_start import LateStartWarning, standard_start
from tests.worlds import gaussian_law


def test_the_start_has_exactly_the_marginal_law():
    law = gaussian_law()
    start = late_start(scheduler("dpm++2m"), law, 5, at=NoiseLevel(2.0))
    basis = torch.cat([torch.zeros(1, 4), torch.eye(4)]).double().reshape(-1, 1, 2, 2)
    out = start(basis).flatten(1)
    linear = (out[1:] - out[0]).T
    a, s = start.level.alpha, start.level.sigma
    torch.testing.assert_close(linear @ linear.T, a**2 * (law.moments.cov + s**2 * torch.eye(4)))
    torch.testing.assert_close(out[0], a * law.moments.mean.reshape(-1))


def test_finite_transport_is_the_probability_flow():
    law = gaussian_law()
    x = torch.randn(3, 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 5
    state, sigma, target, n = x.clone(), 5.0, 0.5, 4000
    grid = torch.linspace(math.log(sigma), math.log(target), n + 1, dtype=torch.float64).exp()
    for a, b in pairwise(grid):  # Heun on dx/dsigma = (x - D) / sigma
        slope = (state - law.denoise(state, float(a))) / a
        guess = state + (b - a) * slope
        state = state + (b - a) * 0.5 * (slope + (guess - law.denoise(guess, float(b))) / b)
    torch.testing.assert_close(law.transport(x, target, sigma_from=sigma), state, rtol=1e-5, atol=1e-5)
    there = law.transport(law.transport(x, target, sigma_from=sigma), sigma, sigma_from=target)
    torch.testing.assert_close(there, x)


def test_pure_noise_is_the_limit_of_the_finite_form():
    law = gaussian_law()
    z = torch.randn(3, 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    far = law.transport(1e6 * z, 1.0, sigma_from=1e6)
    torch.testing.assert_close(far, law.transport(z, 1.0), rtol=1e-5, atol=1e-5)


def test_ways_to_say_the_level():
    law = gaussian_law()
    s = scheduler("dpm++2m")
    spectral = speciation_time(law)
    assert spectral.sigma == pytest.approx(math.sqrt(3), rel=1e-12)
    by_name = late_start(s, law, 5)
    by_time = late_start(s, law, 5, at=spectral)
    by_level = late_start(s, law, 5, at=spectral.level)
    assert by_name.level == by_time.level == by_level.level
    assert late_start(s, law, 5, at=400).level.sigma == pytest.approx(
        float(((1 - s.alphas_cumprod[400]) / s.alphas_cumprod[400]) ** 0.5), rel=1e-5
    )
    assert by_name.level.sigma >= spectral.sigma * (1 - 1e-6)


def test_below_the_spectral_level_is_a_warning_that_names_it():
    law = gaussian_law()
    with pytest.warns(LateStartWarning, match=r"1\.73"):
        start = late_start(scheduler("dpm++2m"), law, 5, at=NoiseLevel(1.0))
    assert "1.73" in start.explain()
    with warnings.catch_warnings():
        warnings.simplefilter("error", LateStartWarning)
        late_start(scheduler("dpm++2m"), law, 5, at=NoiseLevel(1.0), check=False)


def test_the_asked_scheduler_is_not_changed():
    s = scheduler("ddim")
    before = dict(s.config)
    late_start(s, gaussian_law(), 5, at=500)
    standard_start(s, 5, "trailing")
    assert dict(s.config) == before
    assert s.num_inference_steps is None


@pytest.mark.parametrize("name", ["euler", "dpm++2m", "edm-euler", "flow-euler"])
def test_latents_are_what_pipelines_multiply(name):
    start = late_start(scheduler(name), gaussian_law(), 5, at=NoiseLevel(3.0))
    z = torch.randn(2, 1, 2, 2, generator=torch.Generator().manual_seed(1))
    scale = float(getattr(start.scheduler, "init_noise_sigma", 1.0))
    torch.testing.assert_close(start.latents(z) * scale, start(z))


def test_standard_start_is_what_pipelines_do():
    start = standard_start(scheduler("euler"), 5, "linspace")
    z = torch.randn(2, 1, 2, 2, generator=torch.Generator().manual_seed(1))
    theirs = scheduler("euler", timestep_spacing="linspace")
    theirs.set_timesteps(5)
    torch.testing.assert_close(start(z), z * theirs.init_noise_sigma)
    assert start.law is None
    assert "white noise" in start.explain()


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"at": NoiseLevel(1e4)}, "outside the schedule"),
        ({"at": 1000}, "outside the schedule"),
        ({"at": "soon"}, "expected 'speciation'"),
        ({"at": [3]}, "expected 'speciation'"),
        ({"at": CriticalTime(None, criterion="x", reason="Nothing there.")}, "Nothing there"),
        ({"at": 3, "steps": 9}, "fit below step"),
        ({"steps": 0}, "at least 1"),
        ({"at": NoiseLevel(3.0), "law": object()}, "no law"),
    ],
)
def test_bad_input(kwargs, match):
    arguments = {"law": gaussian_law(), "steps": 5, "at": 400, "check": False, **kwargs}
    with pytest.raises(InputError, match=match):
        late_start(scheduler("dpm++2m"), **arguments)


def test_no_speciation_no_start():
    law = gaussian_law(eigenvalues=(0.9, 0.5, 0.4, 0.1))
    critical = speciation_time(law)
    assert critical.level is None
    assert "0.9" in critical.reason
    with pytest.raises(InputError, match="no spectral time"):
        late_start(scheduler("ddim"), law, 5)


def test_spectral_times_and_scale():
    law = gaussian_law(eigenvalues=(16.0, 4.0, 0.5, 0.25))
    full, half = speciation_time(law), speciation_time(law, scale=0.5)
    assert full.level.ou_time == pytest.approx(0.5 * math.log(16))
    assert full.level.ou_time - half.level.ou_time == pytest.approx(math.log(2))
    rungs = ladder(law.moments, 4)
    assert [r.level is None for r in rungs] == [False, False, True, True]
    with pytest.raises(InputError, match="unknown speciation criterion"):
        speciation_time(law, "magic")


def test_law_refuses_what_does_not_fit():
    law = gaussian_law()
    with pytest.raises(InputError, match="this law needs"):
        law.denoise(torch.zeros(2, 4), 1.0)
    with pytest.raises(InputError, match="> 0"):
        law.denoise(torch.zeros(2, 1, 2, 2), 0.0)


def test_gaussian_identities():
    law = gaussian_law()
    x = torch.randn(6, 1, 2, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64).requires_grad_()
    for sigma in (0.05, 1.0, 30.0):
        (gradient,) = torch.autograd.grad(law.log_prob(x, sigma).sum(), x)
        torch.testing.assert_close(law.score(x, sigma), gradient)
        torch.testing.assert_close(law.denoise(x, sigma), x + sigma**2 * law.score(x, sigma))
    m = Moments.fit([law.sample(200_000, 0.7, torch.Generator().manual_seed(3))])
    wanted = law.moments.cov + 0.49 * torch.eye(4)
    assert float((m.cov - wanted).abs().max()) < 0.02 * float(wanted.max())  # four standard errors of 0.45 %
    assert isinstance(Gaussian.fit([law.sample(10, 0.0, torch.Generator().manual_seed(3))]), Gaussian)


def test_diffusers_classes_named_in_messages_exist():
    from symbreak.start.cut_schedule import SUPPORTED

    assert all(hasattr(diffusers, name) for name in SUPPORTED)


def test_a_start_prints_in_two_lines():
    start = late_start(scheduler("dpm++2m"), gaussian_law(), 3, at=NoiseLevel(3.0), check=False)
    assert len(repr(start).splitlines()) == 2
    assert repr(start).startswith("LateStart(DPMSolverMultistepScheduler, 3 steps, from sigma 3")


def test_a_level_stands_wherever_a_sigma_does():
    law, level = gaussian_law(), NoiseLevel(2.0)
    x = torch.randn(3, *law.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    base = scheduler("ddim")
    network = denoiser(as_unet(law, base), base)
    for ask in (law.denoise, law.score, law.transport, network, guided(network, law, 2.0), partial(score, law)):
        assert torch.equal(ask(x, level), ask(x, 2.0))
    assert float(level) == 2.0
