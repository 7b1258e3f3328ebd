"""Two constants of `symbreak.start.choose`, measured on the digits.

Coherence: squared coherent sum of the difference of two denoisers over log sigma, over its incoherent sum.
Paths: squared error of a deterministic sampler's paths, over the squared distance of the moments of its end points.
"""

import numpy as np
import torch

import symbreak as sb
from symbreak.start.late_start import cut
from symbreak.start.sampler_cost import END, SamplerCost, _moments_gap


def coherence(network, law, gaussian, images, sigma):
    """The ratio at every level [U], for a law against a network."""
    eps = torch.randn(images.shape, generator=torch.Generator().manual_seed(11))
    mean = gaussian.moments.mean.to(images)
    gaps = []
    with torch.inference_mode():
        for u in map(float, sigma):
            gap = law.denoise(images + u * eps, u) - network(images + u * eps, u)
            gaps.append((gaussian.transport(mean + gap, 1e-3 * float(sigma[0]), sigma_from=u) - mean).flatten(1))
    step = float(np.log(sigma[1] / sigma[0]))
    e = torch.stack(gaps).double()
    return [
        float((e[j:].sum(0) * step).square().sum(1).mean() / (e[j:].square().sum(2).mean(1).sum() * step))
        for j in range(len(sigma))
    ]


def paths(sampler, calls, pipe, world, gaussian, level):
    """Squared error of paths and squared distance of moments, at a start level."""
    base = sb.scheduler(sampler, like=pipe.scheduler)
    start = cut(base, gaussian, calls, sb.NoiseLevel(level))
    cost = SamplerCost(world, gaussian, [start.level.sigma], 1e-3 / END, seed=5, states=400)
    ends = cost.final(start, cost.state(start.level.sigma))
    return float((ends - cost.truth).square().flatten(1).sum(1).mean()), _moments_gap(ends, cost.truth, gaussian)


def main():
    train, held_out = sb.images("digits"), sb.images("digits:held-out").tensor()[:256]
    pipe = sb.load_pipeline("digits")
    gaussian = sb.Gaussian.fit(train)
    clusters = sb.PrincipalMixture.fit(train, components=40, gaussian=gaussian)
    network = sb.denoiser(pipe.unet, pipe.scheduler)
    sigma = np.geomspace(0.2, 12, 20)
    for name, law in (("one Gaussian", gaussian), ("40 clusters", clusters)):
        ratio = coherence(network, law, gaussian, held_out, sigma)
        pairs = [f"{s:.2g}: {r:.2f}" for s, r in zip(sigma, ratio)][:17:2]
        print(f"coherence, {name}, from sigma up   " + "   ".join(pairs))
    for sampler in ("ddim", "dpm++2m", "dpm++2m-karras"):
        for calls in (3, 5):
            cells = []
            for level in (0.6, 1.2, 2.4):
                path, moments = paths(sampler, calls, pipe, clusters, gaussian, level)
                cells.append(f"{level}: {path:.3f} / {moments:.3f} = {path / max(moments, 1e-9):.1f}")
            print(f"paths over moments, {sampler}, {calls} calls   " + "   ".join(cells))


if __name__ == "__main__":
    main()
