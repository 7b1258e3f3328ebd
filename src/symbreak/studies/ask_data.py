"""What a data set alone says of its decisions: spectrum, class mixture, labels, losses of its laws, collapse."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from symbreak.critical import CriticalTime, Curve, passing
from symbreak.data.images import Images
from symbreak.laws import Empirical, Gaussian, PrincipalMixture
from symbreak.laws.class_posterior import posterior_average
from symbreak.laws.empirical import COPIES
from symbreak.laws.law import Law
from symbreak.laws.pairwise_weights import SharedPoints
from symbreak.moments.one_pass import Moments, mode_images
from symbreak.noise import NoiseLevel
from symbreak.phases.bifurcations import bifurcation
from symbreak.phases.class_entropy import class_entropy
from symbreak.phases.collapse import collapse_time, samples_needed
from symbreak.phases.information import excess_entropy
from symbreak.phases.losses import loss_curve
from symbreak.phases.speciation import cloning_probability, cloning_time, speciation_time
from symbreak.runtime.errors import InputError
from symbreak.runtime.plain import Values
from symbreak.runtime.run import MEMORY, Run
from symbreak.studies.diagnosis import Diagnosis, some_images, spectral_times
from symbreak.studies.pictures import directions

__all__ = ["Laws", "class_laws", "collapse", "image_memory", "law_losses", "law_memory", "laws_of", "spectrum"]
__all__ += ["told_apart"]

SHOWN = 500  # samples in a picture of the data
DRAWS = 5000  # of a class mixture, where nothing is exact


def image_memory(run: Run) -> Run:
    """The run with the memory of the images that are held: with a copy of them and work, what is allowed."""
    return run.share(1 / 3, 3 * MEMORY)


def law_memory(run: Run) -> dict[str, int]:
    """Working memory of an empirical law: with the copy that it may make, a third of what is allowed."""
    return {} if run.memory is None else {"memory": max(2**16, run.memory // (3 * COPIES))}


def told_apart(data: Images) -> bool:
    """Whether the labels tell at least two classes of two images apart."""
    if data.labels is None:
        return False
    counts = torch.bincount(data.labels)
    return int((counts > 0).sum()) > 1 and int(counts[counts > 0].min()) >= 2


def spectrum(d: Diagnosis, moments: Moments | None, modes: int) -> tuple[Moments, Values]:
    """Moments of the data, and spectrum, ladder and spectral times for the record; sets the scale of the levels."""
    with d.stage("spectrum") as run:
        moments = Moments.fit(d.data, run=run) if moments is None else moments
        content = spectral_times(d.data, d.steps, moments, modes)
        d.add("spectral", "data", speciation_time(moments))
        d.add("signal-to-noise", "data", speciation_time(moments, "signal-to-noise"))
        d.show(
            "leading modes",
            "Eigenvectors of the data's covariance, largest variance first: what is decided first.",
            directions(mode_images(moments, modes), d.data.shape),
            scaled=False,
        )
        if d.data.units is not None:
            known, _ = some_images(d.data, SHOWN, d.seed)
            d.show(f"the {d.data.noun}", "Some of the data, in the units that they came in.", known)
    top = content["eigenvalues"][0]
    if not top > 0:
        raise InputError(
            f"all {len(d.data):,} {d.data.noun} of {d.data.name} are equal: nothing is decided. Choose other data."
        )
    d.scale = math.sqrt(max(top, 1e-12))
    return moments, content


@dataclass(frozen=True)
class Laws:
    """What is fitted to the training images.

    Attributes:
        gaussian: their moments.
        classes: one Gaussian a class or cluster, where there are any.
        empirical: some of the images themselves.
        labels: of these, where they tell classes apart; ``None`` with clusters.
    """

    gaussian: Gaussian
    classes: PrincipalMixture | None
    empirical: Empirical
    labels: torch.Tensor | None


def laws_of(d: Diagnosis, moments: Moments, clusters: int | None) -> Laws:
    """Fit the laws; the classes are the labels', or this many clusters."""
    fitted = moments if d.train is d.data else Moments.fit(d.train, run=d.run)
    gaussian, classes = Gaussian(fitted), None
    with d.stage("laws"):
        points, labels = some_images(d.train, d.effort.points, d.seed)
        empirical = Empirical(points, **law_memory(d.run))
        if clusters is not None:
            classes = PrincipalMixture.fit(d.train, components=clusters, gaussian=gaussian, seed=d.seed)
        elif told_apart(d.train):
            classes = PrincipalMixture.fit(d.train, labels=True, gaussian=gaussian, seed=d.seed)
    if labels is not None and (classes is None or clusters is not None or len(labels.unique()) < 2):
        labels = None
    return Laws(gaussian, classes, empirical, labels)


def _levels(d: Diagnosis) -> np.ndarray:
    """Levels of what the laws say."""
    return d.scale * np.geomspace(0.05, 4.0, 24)


def class_laws(d: Diagnosis, laws: Laws) -> None:
    """When classes are decided: by the class mixture, and by the labelled data set itself."""
    if laws.classes is None:
        return
    mixture, sigma, name = laws.classes.inner, _levels(d), "class mixture"
    with d.stage("free entropy"):
        d.add("free entropy", name, speciation_time(mixture, "free-entropy", samples=DRAWS, seed=d.seed))
    with d.stage(name):
        d.add("cloning", name, cloning_time(mixture, samples=DRAWS, seed=d.seed))
        phi = cloning_probability(mixture, sigma, samples=DRAWS, seed=d.seed)
        d.draw("clones", "clones, class mixture", name, phi)
        entropy = class_entropy(mixture, sigma, samples=DRAWS, seed=d.seed)
        d.add("class entropy", name, entropy.time())
        d.draw("entropy", name, name, entropy, "--")
    with d.stage("wells"):
        # Beyond the leading modes the class mixture is one Gaussian, which has no wells. Far below the levels of the
        # other answers a search takes most of its time, and nothing is decided there.
        low = float(sigma.min())
        d.add("centre loses stability", name, bifurcation(mixture, "sde", "ve", low=low))
        d.add("second well", name, bifurcation(mixture, "sde", "ve", criterion="wells", low=low))
    if laws.labels is None:
        return
    labels = laws.labels
    with d.stage("data set"):
        shares = torch.bincount(labels).double() / len(labels)
        total = float(-(shares * shares.clamp_min(1e-300).log()).sum())
        phi = cloning_probability(laws.empirical, sigma, samples=1000, seed=d.seed, labels=labels)
        half = 0.5 * (1.0 + float((shares * shares).sum()))
        d.draw("clones", "clones, the data set itself", "data", phi)
        source = "arXiv:2402.18491, phi halfway from sum_c pi_c^2 to 1"
        d.add("cloning", "data", _passes(phi, half, "cloning", source))
        rest = posterior_average(laws.empirical, sigma, lambda p: -(p.exp() * p).sum(-1), 1000, d.seed, labels)
        entropy_left = Curve(sigma, *rest, name="class entropy")
        d.draw("entropy", "the data set itself", "data", entropy_left, "--")
        d.add("class entropy", "data", _passes(entropy_left, 0.5 * total, "class entropy at 0.5 H[c]", "derived"))


def _passes(curve: Curve, threshold: float, criterion: str, source: str) -> CriticalTime:
    """Where a curve and the ends of its interval pass a threshold."""
    at, *ends = passing(curve.sigma, np.stack([curve.value, curve.low, curve.high]), threshold).tolist()
    if not 0 < at < math.inf:
        ends_of = f"sigma {curve.sigma.min():.3g} and {curve.sigma.max():.3g}"
        reason = f"{curve.name} does not pass {threshold:.3g} between {ends_of}"
        return CriticalTime(None, criterion=criterion, source=source, reason=reason)
    known = all(0 < e < math.inf for e in ends)
    low, high = (NoiseLevel(e) for e in sorted(ends)) if known else (None, None)
    # The data set is taken for the law: what another sample of it would say is not in the interval.
    return CriticalTime(NoiseLevel(at), low, high, criterion=criterion, source=source, interval="draws only")


def law_losses(d: Diagnosis, laws: Laws) -> None:
    """Denoising losses of the laws on held-out images."""
    sigma, seed = _levels(d), d.seed
    with d.stage("losses"):
        images, _ = some_images(d.test, d.effort.images, seed)
        others = {} if laws.classes is None else {"class mixture": laws.classes}
        losses = loss_curve(laws.gaussian, images, sigma, laws=others, seed=seed)
        d.draw("loss", "Gaussian", "Gaussian", losses.mmse)
        for name in others:
            d.draw("loss", name, name, losses.law(name))
        curve = loss_curve(laws.empirical, images, sigma, seed=seed).mmse
        d.draw("loss", f"{len(laws.empirical):,} training {d.data.noun}", "data", curve)


def collapse(d: Diagnosis, laws: Laws) -> None:
    """Below which level would a perfect score only replay the data set? All its images count, a part on every rank."""
    with d.stage("images") as run:
        n, whole = len(d.data), SharedPoints(d.data.shards(image_memory(run)), **law_memory(run))
    sigma = _levels(d)
    every: dict[str, SharedPoints | Law] = {"data": whole, "Gaussian": laws.gaussian}
    every |= {} if laws.classes is None else {"class mixture": laws.classes.inner}
    with d.stage("collapse") as run:
        for name, law in every.items():
            measured: Values = {"queries": d.effort.queries, "seed": d.seed, "draws": DRAWS}
            if law is whole:
                measured["run"] = run
            count, line = (None, "o-") if law is whole else (n, "-")
            d.add("collapse", name, collapse_time(law, samples=count, **measured))
            needed = samples_needed(law, sigma, **measured)
            if law is whole:
                f = excess_entropy(law, sigma, **measured)
                a = math.log(n) / law.dim
                scaled = Curve(sigma, f.value / a, f.low / a, f.high / a)
            else:  # f / a is what the samples needed lack to n, in logarithms
                three = needed.value, needed.high, needed.low
                value, low, high = (np.maximum(0.0, 1.0 - v / math.log10(n)) for v in three)
                scaled = Curve(sigma, value, low, high)
            d.draw("collapse", f"{n:,} {d.data.noun}, f^e / a" if law is whole else name, name, scaled, line)
            d.draw("samples", f"from the {d.data.noun}" if law is whole else name, name, needed)
    d.mark("samples", math.log10(n), f"the {n:,} {d.data.noun} there are")
