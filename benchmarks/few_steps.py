"""Few evaluations: grids and learned steps, each without and with the late start, at equal NFE.

    python benchmarks/few_steps.py                       # the digits
    python benchmarks/few_steps.py --samples 20          # a smoke run
    MODEL=FOLDER python benchmarks/few_steps.py          # MNIST with that network, needs SYMBREAK_DATA

The sampler is DPM++ 2M. Baselines are reimplemented here from their papers: Karras (arXiv:2206.00364), AFS
(2210.05475), GITS (2405.11326), DM-NonUniform (2402.17376), the entropic grid (2504.13612) and steps learned as in
S4S (2502.17423), by the library's own function. Before anything is measured each of them runs on an exact mixture as
the network. Choices (the spacing of the uniform grid, the grid under AFS and learned steps) are made on other seeds
than those reported. What is finished is kept in --out.
"""

import argparse
import itertools
import math
import os
import time
from functools import cache
from pathlib import Path

import numpy as np
import torch
from late_start import classifier, world
from scipy.optimize import minimize

import symbreak as sb
from symbreak.metrics import features
from symbreak.metrics.frechet import distance, floor
from symbreak.networks.denoiser import fingerprint
from symbreak.networks.families import as_unet
from symbreak.phases.losses import loss_curve
from symbreak.runtime.files import write_json
from symbreak.start.cut_schedule import visited
from symbreak.start.free_grid import entropic
from symbreak.start.grids import standard_starts
from symbreak.start.late_start import Grid, cut, on_grid
from symbreak.start.learn import learn_steps
from symbreak.start.sample import generate, integrate

CHOOSING = 1_000_000  # seeds from here on choose
LEARNING = 2_000_000  # and these are what GITS looks at
LEARNED = 64  # trajectories that steps are learned from
FINE = 40  # levels of the trajectories that GITS looks at


def ve_flow(denoise, x, levels):
    """Heun's steps of the flow along falling levels: the states at all of them."""
    states = [x]
    for a, b in itertools.pairwise(levels):
        d = (x - denoise(x, a)) / a
        guess = x + (b - a) * d
        x = x + (b - a) * (d + (guess - denoise(guess, b)) / b) / 2
        states.append(x)
    return states


def karras(top, low, steps):
    return tuple(sb.late_sigmas(top, steps, low).tolist()[:-1])


def gits(denoise, x, top, low, steps):
    """Levels by dynamic programming on trajectories: Euler's error between any two levels of a fine grid."""
    fine = karras(top, low, FINE)
    states = ve_flow(denoise, x, fine)
    cost = np.full((FINE, FINE), math.inf)
    for i in range(FINE - 1):
        d = (states[i] - denoise(states[i], fine[i])) / fine[i]
        for j in range(i + 1, FINE):
            gap = states[i] + (fine[j] - fine[i]) * d - states[j]
            cost[i, j] = float(gap.flatten(1).norm(dim=1).mean())
    best, after = cost[:, -1].copy(), []
    for _ in range(steps - 1):
        whole = cost + 1.15 * best[None, :]  # the paper's coefficient of later errors
        after.append(whole.argmin(1))
        best = whole.min(1)
    at, path = 0, [0]
    for choice in reversed(after):
        at = int(choice[at])
        path.append(at)
    return tuple(fine[i] for i in path)


def weights(levels, end):
    """What every answer weighs in the final state of DPM++ 2M's steps from levels down to an end [n]."""
    n, ends = len(levels), [*levels[1:], end]
    total = np.zeros(n)
    for i, (a, b) in enumerate(zip(levels, ends)):
        r = b / a
        step = np.zeros(n)
        step[i] = 1 - r
        if i and (i < n - 1 or end > 0):  # the last step down to 0 is of first order
            half = 0.5 * (1 - r) * math.log(a / b) / math.log(levels[i - 1] / a)
            step[i] += half
            step[i - 1] -= half
        total = r * total + step
    return total


def dm_nonuniform(top, low, steps):
    """Levels that minimise the bound sum_i sigma_i |w_i| on the error of the final state, no network in it."""

    def levels(theta):
        gaps = np.exp(theta)
        return top * np.exp(-np.concatenate([[0.0], np.cumsum(gaps)[:-1]]) * math.log(top / low) / gaps.sum())

    def bound(theta):
        s = levels(theta)
        return float(np.sum(s * np.abs(weights(s.tolist(), low))))

    best = minimize(bound, np.zeros(steps), method="Nelder-Mead", options={"maxfev": 400 * steps, "xatol": 1e-3})
    return tuple(levels(best.x).tolist())


class FirstAnswer(torch.nn.Module):
    """AFS: the first answer comes without the network: white noise's own prediction, or a law's."""

    def __init__(self, unet, first, other):
        super().__init__()
        self.unet, self.config, self.first, self.other = unet, unet.config, first, other

    def forward(self, sample, timestep, **more):
        if float(torch.as_tensor(timestep).reshape(-1)[0]) >= self.first:
            return self.other(sample, timestep)
        return self.unet(sample, timestep, **more)


def check():
    """Every baseline on an exact mixture as the network: its levels fall, its error is that of its order."""
    law = sb.Mixture.from_parameters(torch.tensor([[-2.0, 0, 0, 0], [2.0, 0, 0, 0]]).reshape(2, 1, 2, 2), [0.04, 0.04])
    g = torch.Generator().manual_seed(0)
    top, low, x = 20.0, 0.0101, 20.0 * torch.randn(64, 1, 2, 2, generator=g, dtype=torch.float64)
    truth = law.denoise(ve_flow(law.denoise, x, karras(top, low, 200))[-1], low)
    losses = loss_curve(law, law.sample(256, 0.0, g), np.geomspace(low, top, 24))
    grids = {
        "Karras": karras(top, low, 6),
        "GITS": gits(law.denoise, x, top, low, 6),
        "DM-NonUniform": dm_nonuniform(top, low, 6),
        "entropic": entropic(losses, top, 6),
    }
    base, error = sb.scheduler("dpm++2m"), {"uniform": tuple(np.linspace(top, 0, 7)[:-1].tolist())} | grids
    net, noise = as_unet(law, base), x.float() / top

    def off(start):
        return float((integrate(net, start, noise, micro_batch=64) - truth).square().mean())

    for name, levels in error.copy().items():
        assert all(a > b > 0 for a, b in itertools.pairwise(levels)), name
        start = on_grid(base, None, Grid("given", levels))
        error[name] = off(start)
    start = learn_steps(on_grid(base, None, Grid("given", grids["Karras"])), law, 64)
    error["learned"] = off(start)
    assert error["learned"] < error["Karras"] < error["uniform"], error
    assert max(error["GITS"], error["entropic"]) < error["uniform"], error
    start = on_grid(base, None, Grid("given", karras(20.0, 0.02, 6)))
    answered = FirstAnswer(net, float(start.scheduler.timesteps[0]), lambda x, t: (x,))
    ends = generate(answered, start, range(64), micro_batch=64, clamp=False)
    assert abs(float(ends[:, 0, 0, 0].abs().mean()) - 2) < 0.5  # both modes are reached with an answer less
    print("on an exact mixture, mean squared error:", {k: float(f"{v:.2g}") for k, v in error.items()}, flush=True)


class Bench:
    """What all cells share."""

    def __init__(self, name, model, args):
        self.train, self.chooser, reference, self.pipe = world(name, model)
        self.args, self.base = args, sb.scheduler("dpm++2m", like=self.pipe.scheduler)
        self.network = sb.denoiser(self.pipe.unet, self.pipe.scheduler)
        self.extract = classifier(name, self.train, args.out)
        self.reference = sb.Moments.fit([features(self.extract, [reference])])
        about = {"data": name, "network": fingerprint(self.network), "sizes": [args.samples, args.repeats], "v": 1}
        self.run = sb.Run(args.out).identified(about)
        self.low = sb.schedule(self.base).sigma_range[0] * 1.0001
        self.top = sb.schedule(self.base).sigma_range[1] * 0.9999
        clusters = 40 if name == "digits" else 60
        self.gaussian = sb.Gaussian.fit(self.train)
        self.laws = [self.gaussian] + [
            sb.PrincipalMixture.fit(self.train, gaussian=self.gaussian, **how)
            for how in ({"labels": True}, {"components": clusters})
        ]
        self.seeds = range(args.samples * args.repeats)
        self.far = self.images("own 100 steps", lambda s: self.plain(sb.standard_start(self.base, 100, "trailing"), s))

    def denoise(self, x, s):
        with torch.inference_mode():
            return self.network(x.float(), min(max(float(s), self.low), self.top)).clone()

    def noise(self, seeds):
        shape = tuple(self.network.shape)
        return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in seeds])

    def plain(self, start, seeds, unet=None):
        return generate(unet or self.pipe.unet, start, seeds, micro_batch=100)

    def images(self, key, make):
        file = self.args.out / f"{key.replace(' ', '-')}-{len(self.seeds)}.pt"
        if not file.exists():
            torch.save(make(self.seeds), file)
        return torch.load(file)

    def score(self, make):
        """Distance on the choosing seeds."""
        x = make(range(CHOOSING, CHOOSING + self.args.samples))
        return distance(features(self.extract, x), self.reference, 1, self.extract.name).pooled

    def best(self, makes):
        return min(makes, key=lambda name: self.score(makes[name]))

    def choose(self, steps, **how):
        began = time.perf_counter()
        start = sb.late_start(self.base, self.laws, steps, denoiser=self.network, data=self.chooser, check=False, **how)
        return start, time.perf_counter() - began

    def on(self, law, levels):
        return on_grid(self.base, law, Grid("given", tuple(levels)))

    def grids(self, steps, law, top):
        """Levels of all steps by method, from a level down."""
        begin = self.on(law, karras(top, self.low, steps))
        states = begin.ve(self.noise(range(LEARNING, LEARNING + 64))).float()
        return {
            "Karras": karras(top, self.low, steps),
            "GITS": gits(self.denoise, states, top, self.low, steps),
            "DM-NonUniform": dm_nonuniform(top, self.low, steps),
            "entropic": entropic(self.losses, top, steps),
        }

    def samplers(self, law, grids):
        starts = {name: self.on(law, levels) for name, levels in grids.items()}
        return {name: (lambda seeds, s=start: self.plain(s, seeds)) for name, start in starts.items()}

    def methods(self, steps, law, level):
        """Sampler by method, each from seeds to images, from white noise (law None) or from the late start."""
        late, top = law is not None, self.top if law is None else level
        grids = self.grids(steps, law, top)
        makes = self.samplers(law, grids)
        if late:
            spaced = {"own": cut(self.base, law, steps, sb.NoiseLevel(level))}
        else:
            spaced = standard_starts(self.base, steps)
        own = {k: (lambda seeds, s=s: self.plain(s, seeds)) for k, s in spaced.items()}
        makes["uniform"] = own[self.best(own) if len(own) > 1 else next(iter(own))]
        # One level more, the first answered without the network.
        other = as_unet(law, self.base) if late else None
        more = {}
        for name, levels in (
            ("Karras", karras(top, self.low, steps + 1)),
            ("uniform", visited(self.spaced(steps + 1, law, level).scheduler, sb.schedule(self.base))),
            ("entropic", entropic(self.losses, top, steps + 1)),
        ):
            start = self.on(law, levels)
            answer = (lambda x, t: (x,)) if other is None else (lambda x, t: other(x, t, return_dict=False))
            net = FirstAnswer(self.pipe.unet, float(start.scheduler.timesteps[0]), answer)
            more[name] = lambda seeds, start=start, net=net: self.plain(start, seeds, net)
        makes["AFS"] = more[self.best(more)]
        return makes, grids

    def learned(self, steps, law, level, free):
        """Learned steps: on the grid that is the best with the sampler's own steps, as S4S, and on the free one."""
        grids = self.grids(steps, law, self.top if law is None else level)
        under = self.best(self.samplers(law, grids))
        for name, start in (("S4S-like", self.on(law, grids[under])), ("free, learned", free)):
            began = time.perf_counter()
            yield name, learn_steps(start, self.network, LEARNED), time.perf_counter() - began

    def spaced(self, steps, law, level):
        if law is not None:
            return cut(self.base, law, steps, sb.NoiseLevel(level))
        return sb.standard_start(self.base, steps, "trailing")

    def cell(self, make, **more):
        x = make(self.seeds)
        d = distance(features(self.extract, x), self.reference, self.args.repeats, self.extract.name).to_dict()
        off = (x - self.far).flatten(1).square().sum(1)
        parts = off.reshape(self.args.repeats, -1).mean(1).sqrt()
        return {"distance": d, "own": float(off.mean().sqrt()), "own_spread": float(parts.std()), **more}

    def of_start(self, start, **more):
        levels = visited(start.scheduler, sb.schedule(self.base))
        return self.cell(lambda seeds: self.plain(start, seeds), levels=levels, **more)

    def rows(self, steps):
        """All cells of a number of evaluations."""
        high = min(self.top, 1000 * math.sqrt(float(self.gaussian.eigenvalues[0])))
        sigma = np.geomspace(self.low * 1.001, high * 0.999, 24)
        self.losses = loss_curve(self.network, self.chooser[:256], sigma)
        three, seconds = self.choose(steps)
        cells = []
        for late in (False, True):
            if late and three.law is None:
                continue
            law, level = (three.law, three.level.sigma) if late else (None, None)
            free = cache(lambda late=late: self.choose(steps, grid="free", **({} if late else {"at": "standard"})))

            def plain(law=law, level=level, late=late, free=free):
                makes, grids = self.methods(steps, law, level)
                out = [
                    self.cell(make, method=name, late=late, steps=steps, levels=list(grids.get(name, ())))
                    for name, make in makes.items()
                ]
                starts = {"free": free()} | ({"auto, three grids": (three, seconds)} if late else {})
                for name, (start, spent) in starts.items():
                    best = start.choice.chosen
                    costs = {"seconds": spent, "sampler_cost": best.sampler_cost, "cost": best.cost}
                    out.append(self.of_start(start, method=name, late=late, steps=steps, **costs))
                return out

            def taught(law=law, level=level, late=late, free=free):
                out = []
                for name, start, spent in self.learned(steps, law, level, free()[0]):
                    about = (start.learned.to_dict() if start.learned else {}) | {"seconds": spent}
                    out.append(self.of_start(start, method=name, late=late, steps=steps, **about))
                return out

            for key, made in ((f"{steps}/{late}", plain), (f"{steps}/{late}/learned", taught)):
                new = self.run.value(key, made)
                cells += new
                for c in new:
                    d = c["distance"]
                    print(steps, late, c["method"], f"{d['mean']:.3g} [{d['low']:.3g}, {d['high']:.3g}]", flush=True)
        return cells


def table(cells):
    """The table of the page."""
    lines = [
        "| NFE | method | standard start | to own 100 steps | late start | to own 100 steps |",
        "|---|---|---|---|---|---|",
    ]

    def said(c):
        if c is None:
            return "- | -"
        d = c["distance"]
        return f"{d['mean']:.2f} [{d['low']:.2f}, {d['high']:.2f}] ({d['pooled']:.2f}) | {c['own']:.2f}"

    for steps in sorted({c["steps"] for c in cells}):
        names = list(dict.fromkeys(c["method"] for c in cells))
        for name in names:
            both = [
                next((c for c in cells if (c["steps"], c["method"], c["late"]) == (steps, name, late)), None)
                for late in (False, True)
            ]
            if any(both):
                lines.append(f"| {steps} | {name} | {said(both[0])} | {said(both[1])} |")
    return lines


def verdicts(cells):
    """Aims against what was measured."""
    out, goals = [], {3: 0.7, 5: 0.85, 10: 1.0}
    for steps in sorted({c["steps"] for c in cells}):
        same = [c for c in cells if c["steps"] == steps]
        plain = [c for c in same if not c["late"] and not c["method"].startswith("free")]
        named = {(c["method"], c["late"]): c for c in same}
        ours, three = named.get(("free", True)), named.get(("auto, three grids", True))
        if ours is None or three is None:
            continue
        best = min(plain, key=lambda c: c["distance"]["mean"])
        for value in ("mean", "pooled"):
            ratio = ours["distance"][value] / min(c["distance"][value] for c in plain)
            met = "met" if ratio <= goals.get(steps, 1.0) else "missed"
            against = ours["distance"][value] / three["distance"][value]
            out.append(
                f"- {steps} NFE, {value}: auto with a free grid {ours['distance'][value]:.2f}, the best baseline "
                f"without a late start {min(c['distance'][value] for c in plain):.2f} (by the means {best['method']}): "
                f"{ratio:.2f} (aim {goals.get(steps, 1.0)}: {met}); against the best of three grids {against:.2f}."
            )
        out.append(f"- {steps} NFE: choosing took {three['seconds']:.0f} s, with a free grid {ours['seconds']:.0f} s.")
    return out


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=200, help="images a repeat")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--calls", default="3,5,10")
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    model = os.environ.get("MODEL")
    name = "mnist" if model else "digits"
    args.out = args.out or Path("build/few_steps") / f"{name}-{args.samples}"
    args.out.mkdir(parents=True, exist_ok=True)
    check()
    bench, cells = Bench(name, model, args), []
    for steps in map(int, args.calls.split(",")):
        cells += bench.rows(steps)
        write_json(args.out / "few_steps.json", {"cells": cells})
    same = floor(features(bench.extract, bench.train), bench.reference, args.samples, args.repeats, bench.extract.name)
    print("\n".join([*table(cells), "", *verdicts(cells)]))
    print(f"training images at the same counts: {same.to_dict()['mean']:.2f}")
    write_json(args.out / "few_steps.json", {"cells": cells, "floor": same.to_dict()})


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    main()
