import math

import pytest
import torch

from symbreak.data.readers import images
from symbreak.laws import Gaussian, Mixture, PrincipalMixture
from symbreak.laws.cluster_mixture import _signs
from symbreak.laws.clusters import coordinates
from symbreak.metrics.memorization import nearest_summary
from symbreak.moments.one_pass import Moments
from symbreak.networks.samplers import scheduler
from symbreak.noise import NoiseLevel, generator
from symbreak.runtime.files import InputError
from symbreak.start.fit import late_start
from symbreak.start.loading import load_pipeline
from symbreak.start.sample import generate
from tests.worlds import gaussian_moments

SHAPE = (1, 2, 3)


def parts(k=3, p=2, seed=0):
    """A Gaussian of six modes, a mixture in its first two, and the same law written out as one full mixture."""
    outer = Gaussian(gaussian_moments((4.0, 3.0, 0.8, 0.4, 0.2, 0.1), SHAPE, seed))
    g = generator(seed, 9)
    means = 1.5 * torch.randn(k, p, generator=g, dtype=torch.float64)
    a = torch.randn(k, p, p, generator=g, dtype=torch.float64)
    cov = 0.3 * a @ a.mT + 0.2 * torch.eye(p, dtype=torch.float64)
    weights = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    inner = Mixture.from_parameters(means, cov, weights)
    q = outer.eigenvectors
    rest = (q[:, p:] * outer.eigenvalues[p:]) @ q[:, p:].T
    full_means = outer.moments.mean.reshape(-1) + means @ q[:, :p].T
    full_cov = q[:, :p] @ cov @ q[:, :p].T + rest
    whole = Mixture.from_parameters(full_means.reshape(k, *SHAPE), full_cov, weights)
    return PrincipalMixture(outer, inner), whole


def states(n=64, scale=2.5, seed=3):
    return scale * torch.randn(n, *SHAPE, generator=generator(seed), dtype=torch.float64)


@pytest.mark.parametrize("sigma", [0.05, 0.7, 3.0])
def test_it_is_the_mixture_that_it_stands_for(sigma):
    law, whole = parts()
    x = states()
    torch.testing.assert_close(law.denoise(x, sigma), whole.denoise(x, sigma), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(law.score(x, sigma), whole.score(x, sigma), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(law.log_prob(x, sigma), whole.log_prob(x, sigma), rtol=1e-9, atol=1e-9)
    each = torch.linspace(0.1, 2.0, len(x), dtype=torch.float64)
    torch.testing.assert_close(law.denoise(x, each), whole.denoise(x, each), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("sigma_from", [None, 20.0])
def test_its_flow_is_the_flow_of_that_mixture(sigma_from):
    law, whole = parts()
    z = states(scale=1.0 if sigma_from is None else 20.0)
    exact = whole.transport(z, 0.5, sigma_from, steps=300)
    # The error of a Runge-Kutta step of fourth order: 16 times less with twice the steps.
    errors = [float((law.transport(z, 0.5, sigma_from, steps=n) - exact).square().sum(1).mean()) for n in (4, 8, 64)]
    assert errors[0] < 1e-3
    assert errors[1] < errors[0] / 30  # squared errors fall by 2^8; half of that in logarithm is asked
    assert errors[2] < 1e-10


def test_one_component_is_the_gaussian():
    outer = Gaussian(gaussian_moments((4.0, 3.0, 0.8, 0.4, 0.2, 0.1), SHAPE))
    inner = Mixture.from_parameters(torch.zeros(1, 3), torch.diag(outer.eigenvalues[:3])[None])
    law, z = PrincipalMixture(outer, inner), states()
    torch.testing.assert_close(law.transport(z, 0.3), outer.transport(z, 0.3), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(law.log_prob(z, 0.3), outer.log_prob(z, 0.3), rtol=1e-12, atol=1e-12)


def test_draws_and_carried_noise_have_the_law_s_moments():
    law, whole = parts()
    n, sigma = 40_000, 0.6
    mean = whole.moments.mean.reshape(-1)
    cov = whole.moments.cov + sigma**2 * torch.eye(6, dtype=torch.float64)
    noise = torch.randn(n, *SHAPE, generator=generator(4), dtype=torch.float64)
    for x in (law.sample(n, sigma, generator(5)), law.transport(noise, sigma, steps=12)):
        flat = x.reshape(n, -1)
        # Five standard errors of a mean and of a covariance (kurtosis of these mixtures is below 4).
        assert float((flat.mean(0) - mean).abs().max()) < 5 * math.sqrt(float(cov.diagonal().max()) / n)
        assert float((torch.cov(flat.T) - cov).abs().max()) < 5 * float(cov.diagonal().max()) * math.sqrt(3 / n)


def labelled(counts=(400, 300, 200), seed=0):
    g = generator(seed, 11)
    means = 4.0 * torch.randn(len(counts), *SHAPE, generator=g)
    x = torch.cat([means[i] + torch.randn(n, *SHAPE, generator=g) for i, n in enumerate(counts)])
    y = torch.cat([torch.full((n,), 10 * i) for i, n in enumerate(counts)])
    return x, y, means


def test_labels_lead_to_their_class():
    x, y, means = labelled()
    law = PrincipalMixture.fit(x, labels=y)
    assert law.classes.tolist() == [0, 10, 20]
    assert law.inner.weights.tolist() == pytest.approx([4 / 9, 3 / 9, 2 / 9])
    noise = torch.randn(300, *SHAPE, generator=generator(1))
    wanted = torch.tensor([0, 10, 20]).repeat(100)
    found = law.transport(noise, 0.3, labels=wanted)
    nearest = torch.cdist(found.flatten(1), means.flatten(1)).argmin(1) * 10
    assert torch.equal(nearest, wanted)
    # Each follows the flow of its own class: the flow of a Gaussian, in closed form.
    own = law.inner.given(10)
    p = law.leading
    z = noise[1::3].double()
    q = law.gaussian.eigenvectors
    root = (own.vectors[0] * (own.eigenvalues[0] + 0.09).sqrt()) @ own.vectors[0].T
    exact = own.means[0] + (z.reshape(100, -1) @ q[:, :p]) @ root
    got = (law.transport(z, 0.3, steps=32, labels=wanted[1::3]) - law.gaussian.moments.mean).reshape(100, -1) @ q[:, :p]
    torch.testing.assert_close(got, exact, rtol=1e-4, atol=1e-4)


def test_a_sample_does_not_depend_on_its_neighbours():
    x, y, _ = labelled()
    law = PrincipalMixture.fit(x, labels=y, components=6)
    noise = torch.randn(64, *SHAPE, generator=generator(1))
    wanted = torch.tensor([0, 10, 20, 20]).repeat(16)
    whole = law.transport(noise, 0.4, labels=wanted)
    other_noise, other = noise.clone(), wanted.clone()
    other_noise[1:], other[1:] = noise[1:].flip(0), 10
    assert torch.equal(law.transport(other_noise, 0.4, labels=other)[0], whole[0])
    mixture = Mixture.fit(x, labels=y)
    a = mixture.transport(noise, 0.4, labels=wanted)
    assert torch.equal(mixture.transport(other_noise, 0.4, labels=other)[0], a[0])


def test_clusters_are_shared_out_among_classes():
    x, y, _ = labelled()
    law = PrincipalMixture.fit(x, labels=y, components=9)
    assert torch.bincount(law.classes // 10).tolist() == [4, 3, 2]
    assert PrincipalMixture.fit(x, components=5).classes is None
    assert PrincipalMixture.fit(x, components=5).inner.components == 5


def test_shrinkage_is_the_formula():
    x, y, _ = labelled((5, 40))
    law = PrincipalMixture.fit(x, labels=y, leading=2, prior=10.0)
    a = (x.reshape(45, -1).double() - law.gaussian.moments.mean.reshape(-1)) @ law.gaussian.eigenvectors[:, :2]
    scatter = [torch.cov(a[y == c].T) * (n - 1) for c, n in ((0, 5), (10, 40))]
    pooled = (scatter[0] + scatter[1]) / 43
    for k, n in ((0, 5), (1, 40)):
        q, values = law.inner.vectors[k], law.inner.eigenvalues[k]
        torch.testing.assert_close((q * values) @ q.T, (scatter[k] + 10 * pooled) / (n - 1 + 10))


def test_cross_validation_weighs_the_samples():
    g = generator(8)
    scale = torch.tensor([3.0, 0.3]).repeat_interleave(3).reshape(SHAPE)
    means = torch.stack([torch.full(SHAPE, -8.0), torch.full(SHAPE, 8.0)])

    def data(n, scales):
        x = torch.cat([means[i] + s * torch.randn(n, *SHAPE, generator=g) for i, s in enumerate(scales)])
        return x, torch.arange(2).repeat_interleave(n)

    # Many samples of classes of different shape: their own covariances; few of one shape: the pooled one.
    x, y = data(2000, (scale, scale.flip(1)))
    assert PrincipalMixture.fit(x, labels=y, leading=6, sigma=0.3).prior <= 3
    x, y = data(8, (scale, scale))
    assert PrincipalMixture.fit(x, labels=y, leading=6, sigma=0.3).prior >= 30


def test_draws_do_not_copy_the_training_digits():
    train, held_out = images("digits").tensor(), images("digits:held-out").tensor()
    law = PrincipalMixture.fit(train, components=40)
    near = nearest_summary(law.sample(500, 0.0, generator(2)).float(), train, held_out)
    assert near["samples"]["memorized"] <= 0.004
    assert near["samples"]["median_nearest"] > 0.9 * near["held_out"]["median_nearest"]


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({}, "at least one of them"),
        ({"labels": [0, 1]}, "2 labels for 900 samples"),
        ({"components": 1000}, "1000 components for 900 samples"),
        ({"labels": True}, "no labels"),
        ({"components": 3, "leading": 7}, "7 principal components"),
    ],
)
def test_bad_fits(settings, match):
    x, _, _ = labelled()
    with pytest.raises(InputError, match=match):
        PrincipalMixture.fit(x, **settings)


def test_bad_labels_at_the_start():
    x, y, _ = labelled()
    law = PrincipalMixture.fit(x, labels=y)
    noise = torch.zeros(2, *SHAPE)
    for labels, match in (([3, 0], "label 3 is no class"), ([0], "1 labels for 2 samples")):
        with pytest.raises(InputError, match=match):
            law.transport(noise, 1.0, labels=labels)
    with pytest.raises(InputError, match="without classes"):
        PrincipalMixture.fit(x, components=3).transport(noise, 1.0, labels=[0, 0])
    with pytest.raises(InputError, match="principal components"):
        PrincipalMixture(law.gaussian, Mixture.from_parameters(torch.zeros(1, 7), [1.0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_bits_do_not_depend_on_the_place_in_the_batch(dtype):
    """41 modes and 10 or 37 components: no size that fills a vector register by itself."""
    data = images("digits")
    for law in (
        PrincipalMixture.fit(data, labels=True, leading=41),
        PrincipalMixture.fit(data, components=37, leading=41),
    ):
        noise = torch.randn(64, 1, 8, 8, generator=generator(1), dtype=torch.float64).to(dtype)
        whole = law.transport(noise, 0.8)
        for shift in (1, 3, 17):
            assert torch.equal(law.transport(noise.roll(shift, 0), 0.8).roll(-shift, 0), whole)


def test_generated_images_are_their_seeds():
    pipe = load_pipeline("digits")
    law = PrincipalMixture.fit(images("digits"), labels=True)
    start = late_start(scheduler("dpm++2m", like=pipe.scheduler), law, 2, at=NoiseLevel(0.8), check=False)
    whole = generate(pipe.unet, start, range(20), micro_batch=16)
    for seed in (0, 1, 7, 13, 19):
        assert torch.equal(generate(pipe.unet, start, [seed], micro_batch=16)[0], whole[seed])


def test_the_posterior_covariance_is_that_of_the_mixture():
    law, whole = parts()
    x, v = states(), states(seed=6)
    for sigma in (0.3, 2.0):
        exact = whole.posterior_covariance(x, v, sigma)
        torch.testing.assert_close(law.posterior_covariance(x, v, sigma), exact, rtol=1e-9, atol=1e-9)


def test_what_sampling_cached_serves_gradients():
    law, _ = parts()
    x = states()
    with torch.inference_mode():
        law.transport(x, 0.5)
        law.denoise(x, 0.5)
    x.requires_grad_(True)
    law.transport(x, 0.5).sum().backward()
    assert float(x.grad.abs().max()) > 0
    law.denoise(x, 0.5).sum().backward()


def test_over_a_sketch_it_keeps_the_certificate():
    data = images("digits")
    outer = Gaussian(Moments.fit(data), rank=12)
    law = PrincipalMixture.fit(data, components=5, leading=8, gaussian=outer)
    assert law.certificate(1.0) == outer.certificate(1.0)
    assert law.certificate(1.0).nats > 0


def test_the_shrinkage_does_not_depend_on_signs_of_eigenvectors():
    """Signs hang on last bits of the covariance; near a tie the noise of the cross-validation would follow them."""
    data = images("digits").subset(300)
    law, turned = Gaussian.fit(data), Gaussian.fit(data)
    signs = torch.randint(0, 2, (64,), generator=generator(3)).double() * 2 - 1
    turned.eigenvectors = turned.eigenvectors * signs
    a, b = (coordinates(data, g.moments.mean, g.eigenvectors[:, :20]) for g in (law, turned))
    assert not torch.equal(a, b)
    torch.testing.assert_close(a * _signs(law, 20), b * _signs(turned, 20))
    priors = {PrincipalMixture.fit(data, labels=True, gaussian=g, leading=20).prior for g in (law, turned)}
    assert len(priors) == 1
