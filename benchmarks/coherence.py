"""What `symbreak.start.choose` rests on, measured on the digits (docs/uncertainty.md has the answers).

Coherence: squared coherent sum of the difference of two denoisers over log sigma, over its incoherent sum.
Paths: squared error of a deterministic sampler's paths, over the squared distance of the moments of its end points.
Factor: what a sampler that draws noise would choose if the factor 2 of its cost were 1 or 4.
Above: the part of the law cost A above a level, which is left out where the network's range ends there.
States: how far the sampler cost B of 192 states scatters, in 64 and, with SYMBREAK_DATA, in 784 dimensions.
"""

import os
from pathlib import Path

import numpy as np
import torch

import symbreak as sb
from symbreak.start.choose import loss_gaps
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


def factors(laws, network, images, pipe):
    """What a sampler that draws noise chooses with the factor 1, 2 and 4, and what it costs at 2."""
    for sampler in ("ddpm", "sde-dpm++2m"):
        for calls in (3, 5, 10):
            base = sb.scheduler(sampler, like=pipe.scheduler)
            tried = sb.late_start(base, laws, calls, denoiser=network, data=images, check=False).choice.candidates
            cells = []
            for times in (0.5, 1.0, 2.0):
                one = min(tried, key=lambda c, times=times: c.law_cost + times * c.sampler_cost)
                cells.append(f"{2 * times:g}: law {one.law} at {one.level.sigma:.2f} costs {one.cost:.3f}")
            print(f"factor, {sampler}, {calls} NFE   " + "   ".join(cells))


def above(laws, network, images, gaussian):
    """The law cost that is left out above multiples of the top standard deviation, beside all of it at low levels."""
    top = float(gaussian.eigenvalues[0]) ** 0.5
    gaps = loss_gaps(network, laws, images, np.geomspace(0.15 * top, 20 * top, 24), gaussian)
    for name, gap in zip(("one Gaussian", "40 clusters"), gaps):
        parts = [f"{k:g} sd: {gap.at('cost', k * top):+.4f}" for k in (0.25, 0.5, 1, 2, 3, 5, 10)]
        print(f"law cost above a level, {name}   " + "   ".join(parts))


def states(law, gaussian, like, seeds=8):
    """The sampler cost of 192 states: its scatter over seeds, and that of a difference of two levels."""
    top = float(gaussian.eigenvalues[0]) ** 0.5
    for sampler in ("ddim", "dpm++2m", "ddpm"):
        base, out = sb.scheduler(sampler, like=like), []
        starts = [cut(base, gaussian, 3, sb.NoiseLevel(k * top)) for k in (0.3, 0.6)]
        for seed in range(seeds):
            cost = SamplerCost(law, gaussian, [s.level.sigma for s in starts], 0.1 * top, seed)
            out.append([cost.error(s, sampler == "ddpm") for s in starts])
        values = np.array(out)
        (low, high), scatter, gap = values.mean(0), values.std(0, ddof=1), np.diff(values)[:, 0]
        print(
            f"192 states, {gaussian.dim} dimensions, {sampler}   {low:.4f} +- {scatter[0]:.4f} at .3 sd   "
            f"{high:.4f} +- {scatter[1]:.4f} at .6 sd   difference {gap.mean():.4f} +- {gap.std(ddof=1):.4f}"
        )


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
    factors([gaussian, clusters], network, held_out, pipe)
    above([gaussian, clusters], network, held_out, gaussian)
    states(clusters, gaussian, pipe.scheduler)
    if "SYMBREAK_DATA" in os.environ:
        train = sb.images(str(Path(os.environ["SYMBREAK_DATA"]) / "mnist-train.parquet")).take(
            np.arange(5000), "5,000 images"
        )
        gaussian = sb.Gaussian.fit(train)
        states(sb.PrincipalMixture.fit(train, components=40, gaussian=gaussian), gaussian, sb.scheduler("ddpm"), 6)


if __name__ == "__main__":
    main()
