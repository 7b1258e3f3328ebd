"""What a network says of its decisions: clones, U-turns, losses, stability, mechanism, kicks, copies."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from symbreak.critical import CriticalTime, Curve, crossing, share_curve
from symbreak.intervals import mean_interval, proportion
from symbreak.laws import Empirical, Gaussian, PrincipalMixture
from symbreak.laws.class_posterior import class_of
from symbreak.laws.law import Law, is_law
from symbreak.metrics.feature_rows import Classifier, accuracy, extractor, train_classifier
from symbreak.moments.one_pass import Moments
from symbreak.networks.denoiser import Denoiser, as_denoiser, fixed_class
from symbreak.networks.guidance import Guided
from symbreak.networks.residual import LawResidual, law_answer, residual_of
from symbreak.noise import generator
from symbreak.phases.beyond_gaussian import THRESHOLD, added_to_law, divergence_bound, refitting_error
from symbreak.phases.branches import Classify
from symbreak.phases.class_entropy import class_entropy_bound
from symbreak.phases.class_information import condition_information, guidance_window
from symbreak.phases.cloning import Clones, clones
from symbreak.phases.condensation import nearest_flips, nearest_of
from symbreak.phases.kicks import Opportunity, opportunity
from symbreak.phases.losses import Losses, entropy_rate, loss_curve
from symbreak.phases.mechanism import Check, linear_share, linearity_check, reversion, reversion_check
from symbreak.phases.potentials import arc_potential
from symbreak.phases.reverse_paths import descend
from symbreak.phases.speciation import speciation_time
from symbreak.phases.stability import network_stability
from symbreak.phases.turns import u_turns
from symbreak.runtime.errors import InputError, note
from symbreak.runtime.identity import weights_hash
from symbreak.runtime.plain import Values
from symbreak.runtime.ranks import rank_of
from symbreak.runtime.run import Run
from symbreak.studies.ask_data import Laws, image_memory, law_memory, told_apart
from symbreak.studies.diagnosis import Diagnosis, some_images
from symbreak.studies.pictures import directions

__all__ = ["ClassReader", "along", "ask_network", "class_reader", "name_of"]

CLUSTERS = 10  # classes of a network where neither labels nor a number were given
SHOWN = 10  # images of what a network adds, at SHOWN_LEVELS levels
SHOWN_LEVELS = 4
ALONG, ALONG_LEVELS = 2, 10  # images that are noised to levels along the axis
RAREST = 3  # images of a class at least, by which its entropy is measured
EVALUATIONS, LONG = 2, 3.0  # network evaluations a pair, step and branch level, of all stages; minutes worth a note
SECOND = "#b3424a"  # colour of a network's second curve in a panel


@dataclass(frozen=True)
class ClassReader:
    """What says the class of an image.

    Attributes:
        classify: images -> classes or scores, ``None`` for clusters.
        features: images -> features from which classes are predicted, where the classes are those of the labels.
        clusters: number of clusters, ``None`` with a classifier.
    """

    classify: Classify | None = None
    features: Classify | None = None
    clusters: int | None = None


def name_of(classify: Classify) -> str:
    """What a classifier is called, with its weights where it has some: other weights are another run."""
    name = str(getattr(classify, "name", getattr(classify, "__name__", "a callable")))
    return f"{name} {weights_hash(classify)}" if isinstance(classify, torch.nn.Module) else name


def class_reader(d: Diagnosis, classify: Classify | None, clusters: int | None) -> ClassReader:
    """The user's classifier, the bundled one, one trained on the labels, or clusters."""
    if classify is not None:
        d.notes.append(f"Classes of images: {name_of(classify)}.")
        return ClassReader(getattr(classify, "logits", classify))
    if clusters is None and d.train.labels is not None and not told_apart(d.train):
        raise InputError(
            f"the labels of {d.train.name} tell no two classes of at least 2 images apart. Pass --clusters K to find "
            "classes, or --classify with a classifier."
        )
    if clusters is not None or d.train.labels is None:
        k = CLUSTERS if clusters is None else clusters
        d.notes.append(
            f"Classes are {k} k-means clusters: of the data for the laws, of its own images for the network."
        )
        return ClassReader(clusters=k)
    with d.stage("classifier") as run:
        judge = _trained(d, run)
    d.notes.append(
        f"Classes of images: a classifier of {', '.join(judge.classes[:12])}"
        + (f", right on {judge.accuracy:.1%} of the held-out images." if math.isfinite(judge.accuracy) else ".")
    )
    return ClassReader(judge.logits, judge.logits)


def _trained(d: Diagnosis, run: Run) -> Any:
    """The bundled classifier for the digits, else one trained on the labels; its weights are a finished part."""
    if d.train.name == "digits" and d.train.pad is None:
        return extractor("digits-classifier")
    epochs = max(2, min(60, 200_000 // len(d.train)))
    fresh: list[Classifier] = []

    def make() -> dict[str, np.ndarray]:
        fresh.append(train_classifier(d.train, epochs=epochs, seed=d.seed, run=image_memory(run)))
        return {k: v.numpy() for k, v in fresh[0].state_dict().items()}

    weights = run.part("classifier", make)
    model = fresh[0] if fresh else Classifier(d.train.shape, d.train.classes, d.train.units is not None)
    model.load_state_dict({k: torch.as_tensor(v) for k, v in weights.items()})
    model.eval().requires_grad_(False)
    if d.test.labels is not None:
        model.accuracy = accuracy(model, d.test)
    return model


def ask_network(
    d: Diagnosis, network: Denoiser, laws: Laws, moments: Moments, reader: ClassReader, without: Denoiser | None = None
) -> None:
    """Everything that needs the network; ``without`` is the same one without its condition, such as a prompt."""
    if isinstance(network, Guided):
        low, high = network.window
        d.notes.append(f"The network is guided: scale {network.scale:g} at sigma {low:.4g} to {high:.4g}.")
    _say_how_long(d, network)
    pairs = _clones(d, network, reader)
    classify = reader.classify or _nearest_cluster(pairs)
    images, labels = some_images(d.test, d.effort.images, d.seed)
    _u_turns(d, network, images, classify)
    levels = _losses(d, network, laws, images)
    _added(d, network, images)
    _class_entropy(d, network, reader, images, labels)
    if without is not None:
        _condition_information(d, network, without, torch.as_tensor(pairs.ends))
    if labels is not None:
        _class_information(d, network, images, labels)
    _stability(d, network, classify)
    _mechanism(d, network, laws, moments, images, levels)
    _opportunity(d, network, classify, pairs)
    _condensation(d, network)


def _say_how_long(d: Diagnosis, network: Denoiser) -> None:
    """A note before what takes longer than some minutes."""
    if rank_of()[0] > 0:
        return
    x, _ = some_images(d.test, 8, d.seed)
    sigma = float(np.clip(d.scale, *network.sigma_range))
    x = x + sigma * torch.randn(x.shape, generator=generator(d.seed, 37))
    with torch.inference_mode():
        network(x[:1], sigma)
        began = time.perf_counter()
        network(x, sigma)
    each = (time.perf_counter() - began) / len(x)
    evaluations, fewer = (EVALUATIONS * e.pairs * e.steps * e.branches for e in (d.effort, d.effort.quick()))
    minutes = evaluations * each / 60
    if minutes > LONG:
        note(
            f"the network takes {1000 * each:.2g} ms an evaluation here: some {evaluations:,} of them are about "
            f"{minutes:.0f} minutes, less what is finished."
            + f" --quick, Effort().quick(), asks for some {fewer:,}."
            * (fewer < evaluations)
        )


def _clones(d: Diagnosis, network: Denoiser, reader: ClassReader) -> Clones:
    with d.stage("clones") as run:
        sigma, e = d.levels(network, 0.07, 2.5, d.effort.branches), d.effort
        pairs = clones(
            network, sigma, reader.classify, e.pairs, steps=e.steps, clusters=reader.clusters, seeds=d.seed, run=run
        )
        d.add("cloning", "network", pairs.crossing)
        d.draw("clones", "clones, network", "network", pairs.curve, "o-")
        d.mark("clones", pairs.floor, "floor, sum of squared class shares")
        d.show("samples", "Final images of the clones' trunks.", torch.as_tensor(pairs.ends))
    return pairs


def _nearest_cluster(pairs: Clones) -> Callable[[torch.Tensor], torch.Tensor]:
    """The cluster of an image: the nearest mean of the clusters that the clones' trunks were sorted into."""
    ends, names = torch.as_tensor(pairs.ends).flatten(1).float(), torch.as_tensor(pairs.labels)
    centres = torch.stack([ends[names == k].mean(0) for k in names.unique()])
    return lambda x: torch.cdist(x.flatten(1).float(), centres).argmin(1)


def _u_turns(d: Diagnosis, network: Denoiser, images: torch.Tensor, classify: Classify) -> None:
    with d.stage("U-turns") as run:
        sigma, e = d.levels(network, 0.07, 2.5, d.effort.turns), d.effort
        turns = u_turns(network, images[: e.pairs], sigma, classify, steps=e.steps, seeds=d.seed, run=run)
        d.add("U-turn, class", "network", turns.crossing)
        d.draw("changed", "U-turns: class changed", "network", turns.classes, "s--")
        d.draw(
            "pixels",
            f"U-turns: {'pixels' if d.data.units is None else 'values'} changed",
            "network",
            turns.features,
            ":",
        )


def _losses(d: Diagnosis, network: Denoiser, laws: Laws, images: torch.Tensor) -> np.ndarray:
    """Denoising losses of network and laws, what follows from them, and their levels."""
    with d.stage("losses") as run:
        every: dict[str, Gaussian | PrincipalMixture] = {"Gaussian": laws.gaussian}
        every |= {} if laws.classes is None else {"class mixture": laws.classes}
        levels = d.levels(network, 0.05, 6.0, d.effort.losses)
        losses = loss_curve(network, images, levels, laws=every, seed=d.seed, run=run)
        d.draw("loss", "network", "network", losses.mmse)
        d.draw("rate", "entropy rate, rescaled", "network", entropy_rate(losses, rescaled=True))
        for law, fitted in every.items():
            d.draw("loss", law, law, losses.law(law))
            _beside(d, law, losses)
            bound = divergence_bound(losses, law)
            d.draw("information", f"network against {law}", law, bound)
            alone = refitting_error(fitted, len(d.train), losses.sigma, seed=d.seed)
            drawn = Curve(losses.sigma, alone.mean(0), alone.min(0), alone.max(0))
            d.draw("information", f"fitting the {law} alone", law, drawn, ":")
            name = "non-Gaussianity" if law == "Gaussian" else "distance from the mixture"
            d.add(name, "network", bound.time(fitting=alone))
            at, total = crossing(losses.sigma, drawn.value, THRESHOLD), bound.time().sigma
            if at is not None and total is not None:
                d.notes.append(
                    f"{name[0].upper()}{name[1:]}: without what fitting to {len(d.train):,} {d.data.noun} alone costs "
                    f"(0.1 nat at sigma {at:.4g}); with it 0.1 nat is passed at {total:.4g}."
                )
        empirical = loss_curve(laws.empirical, images, levels, seed=d.seed).mmse
        d.draw("loss", f"{len(laws.empirical):,} training {d.data.noun}", "data", empirical)
    return losses.sigma


def _beside(d: Diagnosis, law: str, losses: Losses) -> None:
    """Where a network is no better than a law, by their squared errors on the same noised images.

    It is no better from the lowest level on at and above which no paired difference speaks for it at 95 %; it is worse
    at those of these levels where the difference speaks against it at 95 % of all levels together (Bonferroni).
    """
    share = share_curve(losses.sigma, losses.network, losses.of(law), f"squared error over that of {law}")
    ratio = Curve(share.sigma, 1 - share.value, 1 - share.high, 1 - share.low, share.name)
    d.draw("against", f"network / {law}", law, ratio, "o-")
    gaps = losses.of(law) - losses.network
    better = np.array([mean_interval(gap)[1] > 0 for gap in gaps])
    first = 0 if not better.any() else int(np.flatnonzero(better)[-1]) + 1
    strict = 1 - 0.05 / len(gaps)
    worse = [i for i in range(first, len(gaps)) if mean_interval(gaps[i], strict)[2] < 0]
    most = max(worse, key=lambda i: float(ratio.value[i]), default=None)
    d.against[law] = {
        "from": None if first == len(gaps) else d.place(float(losses.sigma[first])),
        "lowest": first == 0,
        "levels": len(gaps),
        "worse": None
        if most is None
        else {
            "from": d.place(float(losses.sigma[worse[0]])),
            "to": d.place(float(losses.sigma[worse[-1]])),
            "levels": len(worse),
            "at": d.place(float(losses.sigma[most])),
            **{k: float(getattr(ratio, k)[most]) for k in ("value", "low", "high")},
        },
    }


def along(d: Diagnosis, source: Denoiser | Law) -> None:
    """Some held-out images noised to levels along the axis, denoised there, and sampled again from there."""
    if len(d.data.shape) < 3:
        return  # vectors and signals: a picture of every level would be a figure of its own
    denoiser, law = as_denoiser(source), "class mixture" if isinstance(source, PrincipalMixture) else "Gaussian"
    name = law if is_law(source) else "network"
    images, _ = some_images(d.test, ALONG, d.seed, even=True)
    images = images[:ALONG]
    levels = d.looked_at(ALONG_LEVELS, *denoiser.sigma_range)
    noise = torch.randn(images.shape, generator=generator(d.seed, 29))
    noised, means, again = [], [], []
    with d.stage("along the axis") as run, torch.inference_mode():
        end = max(1.05 * denoiser.sigma_range[0], 0.02 * float(levels[-1]))
        for i, sigma in enumerate(levels.tolist()):
            x = images + sigma * noise
            grid = [*np.geomspace(sigma, end, max(2, d.effort.steps // 2)).tolist(), 0.0]
            noised.append(x / math.sqrt(1 + sigma**2))
            means.append(denoiser(x, sigma).float())
            *_, (_, final) = descend(denoiser, x, grid, generator(d.seed, 30))
            again.append(final.float())
            run.tell(i + 1, len(levels))
    shown = {"noised": noised, f"denoised by the {name}": means, "sampled again from here": again}
    rows = [
        {**d.picture(title, "", torch.stack([state[i] for state in states])), "image": i}
        for i in range(len(images))
        for title, states in shown.items()
    ]
    d.along = {"sigma": levels.tolist(), "rows": rows, "of": name}


def _added(d: Diagnosis, network: Denoiser, images: torch.Tensor) -> None:
    """What the network, with the class that it is fixed to, adds to the law that it is the residual of."""
    residual = network if isinstance(network, LawResidual) else residual_of(getattr(network, "unet", None))
    if residual is None:
        return
    fixed = fixed_class(network)
    labels = None if fixed is None else torch.full((len(images),), fixed)
    with d.stage("what the network adds") as run:
        added = added_to_law(residual, images, d.effort.losses, labels, d.seed, run)
        clean, top, y = images[:SHOWN], added.nats.sigma[-1], None if labels is None else labels[:SHOWN]
        noise = torch.randn(clean.shape, generator=generator(d.seed, 23))
        pictures = []
        for sigma in np.geomspace(max(added.nats.sigma[0], top / 10), top, SHOWN_LEVELS)[::-1].tolist():
            x = clean + sigma * noise
            with torch.inference_mode():
                s = torch.full((len(x),), sigma)
                law, whole = law_answer(residual.law, x, s, y, residual.fade), residual(x, s, y)
            times = 1 / float((whole - law).abs().quantile(0.98).clamp_min(1e-30))
            rows = [
                d.picture("noised", "", x / math.sqrt(1 + sigma**2)),
                d.picture("the law's answer", "", law),
                d.picture(f"correction x {times:.3g}", "", times * (whole - law), scaled=False),
                d.picture("the sum", "", whole),
            ]
            pictures.append({"sigma": sigma, "rows": rows})
        shown = {"clean": d.picture(f"held-out {d.data.noun}", "", clean), "pictures": pictures}
        d.added = {**added.to_dict(), **shown, "top": float(top), "fade": residual.fade[0]}


def _scores(classify: Classify, classes: np.ndarray) -> Classify:
    """What a classifier says of images [B, F]: its scores, or which of some classes it names, as rows of one 1."""

    def features(x: torch.Tensor) -> torch.Tensor:
        said = torch.as_tensor(classify(x)).cpu()
        return said if said.ndim == 2 else (said.reshape(-1, 1) == torch.from_numpy(classes)).float()

    return features


def _class_entropy(
    d: Diagnosis, network: Denoiser, reader: ClassReader, images: torch.Tensor, labels: torch.Tensor | None
) -> None:
    """By the labels of the data, or by what a classifier that was passed says of them."""
    features, classify = reader.features, reader.classify
    if features is not None:
        classify = None
    if classify is None and (features is None or labels is None):
        return
    with d.stage("class entropy") as run:
        sigma = d.levels(network, 0.07, 2.5, d.effort.turns)
        some, known = some_images(d.train, 2 * d.effort.images, d.seed, even=True)
        if classify is not None:
            labels, known = (torch.from_numpy(class_of(classify, x)) for x in (images, some))
            classes, counts = np.unique(known.numpy(), return_counts=True)
            classes = classes[counts >= RAREST]
            features = _scores(classify, classes)
            of_them = (torch.isin(y, torch.from_numpy(classes)) for y in (labels, known))
            (images, labels), (some, known) = (
                (x[keep], y[keep]) for x, y, keep in zip((images, some), (labels, known), of_them)
            )
        options: Values = {"features": features, "seed": d.seed, "run": run}
        try:
            entropy = class_entropy_bound(network, sigma, images, torch.as_tensor(labels), some, known, **options)
            d.add("class entropy", "network", entropy.time())
            d.draw("entropy", "network, upper bound", "network", entropy, "o-")
        except InputError as error:  # a class that is too rare must not cost the other criteria
            d.add("class entropy", "network", CriticalTime(None, criterion="class entropy", reason=str(error)))


def _class_information(d: Diagnosis, network: Denoiser, images: torch.Tensor, labels: torch.Tensor) -> None:
    """Of a class-conditional network that is asked with its null class: when it decides the class, and its window."""
    null = fixed_class(network)
    if null is None or bool((labels == null).any()) or len(labels.unique()) < 2:
        return
    with d.stage("class information") as run:
        information = condition_information(network, images, labels, seed=d.seed, run=run)
        window = guidance_window(information, seed=d.seed)
        d.add("class information, 10 %", "network", window.high)
        d.add("class information, 90 %", "network", window.low)
        sigma, total = information.sigma, information.total
        rest = Curve(sigma, total - information.value, total - information.high, total - information.low)
        d.draw("entropy", "network, H[c] - class information", "network", rest)
        d.mark("entropy", total, "H[c]")
        limit, (low, high) = information.limit, window.levels
        d.notes.append(
            f"Class information goes to {limit['value']:.3g} [{limit['low']:.3g}, {limit['high']:.3g}] nats at low "
            f"noise, the classes have {total:.3g}. Guidance acts at sigma {low:.3g} to {high:.3g}. All else is of the "
            f"network with its null class, {null}."
        )
        d.notes.extend(information.notes)


def _condition_information(d: Diagnosis, network: Denoiser, without: Denoiser, samples: torch.Tensor) -> None:
    """When a prompt, or another single condition, decides: what the network's own samples, noised, tell of it."""
    name = "condition information"
    with d.stage(name) as run:
        try:
            information = condition_information(network, samples, without=without, seed=d.seed, run=run)
        except InputError as error:  # a prompt that changes nothing must not cost the other criteria
            d.add(name, "network", CriticalTime(None, criterion=name, reason=str(error)))
            return
        window = guidance_window(information, seed=d.seed)
        d.add(f"{name}, 10 %", "network", window.high)
        d.add(f"{name}, 90 %", "network", window.low)
        d.draw("condition", "network, D(p(x | condition) || p(x))", "network", information, "o-")
        limit, (low, high) = information.limit, window.levels
        d.mark("condition", limit["value"], "its limit")
        d.notes.append(
            f"The condition is decided, and guidance acts, at sigma {low:.3g} to {high:.3g}: there {len(samples)} "
            f"samples of the network pass 10 to 90 % of {limit['value']:.3g} [{limit['low']:.3g}, {limit['high']:.3g}] "
            "nats, by which the law with it, a prompt or a class, differs from the one without it."
        )
        d.notes.extend(information.notes)


def _stability(d: Diagnosis, network: Denoiser, classify: Classify) -> None:
    """The network's central fixed point and its potential between two trajectories, from high noise down."""
    sigma = d.levels(network, 0.15, 3.0, d.effort.stability)[::-1]
    for frame in d.effort.frames:
        with d.stage(f"stability, {frame.upper()}") as run:
            centre = network_stability(network, sigma, "sde", frame, seed=d.seed, run=run)
            d.add("centre loses stability", "network", centre.critical)
            d.add("second well", "network", centre.splitting)
            ratio = centre.eigenvalues[:, 0] / centre.threshold
            label = f"top eigenvalue of dD/dx over its threshold, {frame.upper()}"
            color = None if frame == "ve" else SECOND
            d.draw("stability", label, "network", Curve(sigma, ratio, ratio, ratio), "o-", color)
            if frame == "ve" and not np.isfinite(ratio).any():
                d.notes.append("No fixed point of the network was found on any of these levels.")
            elif frame == "ve":
                most = int(np.nanargmax(np.where(np.isfinite(ratio), ratio, -np.inf)))
                d.notes.append(
                    f"Jacobian of the network at the centre, VE: asymmetry {np.nanmin(centre.asymmetry):.1%} to "
                    f"{np.nanmax(centre.asymmetry):.1%}."
                )
                least_stable = directions(centre.directions[most, :1], network.shape)
                d.show(
                    "least stable direction",
                    f"Eigenvector of the network's Jacobian at the centre (sigma {sigma[most]:.3g}); then the centre.",
                    torch.cat([least_stable, torch.as_tensor(centre.states[most])[None].float()]),
                    scaled=False,
                )
    d.mark("stability", 1.0, "unstable above")
    with d.stage("arc") as run:
        arc = arc_potential(network, sigma, classify=classify, candidates=range(d.seed, d.seed + 16), run=run)
        d.add("two wells on an arc", "network", arc.critical)
        d.arc = {name: getattr(arc, name).tolist() for name in ("sigma", "angle", "value", "wells")}
        d.show("ends of the arc", "Final images of the two trajectories.", torch.as_tensor(arc.ends).float())


def _mechanism(
    d: Diagnosis, network: Denoiser, laws: Laws, moments: Moments, images: torch.Tensor, levels: np.ndarray
) -> None:
    """Do early fluctuations revert, and is the denoiser linear there?"""
    with d.stage("mechanism") as run:
        # Far above the spread of the data and their distance from the origin, where noise alone is a fair start.
        top = min(0.95 * network.sigma_range[1], max(8.0 * d.scale, 4.0 * float(moments.mean.norm())))
        paths = reversion(
            network,
            d.levels(network, 0.07, 6.0, d.effort.branches),
            paths=d.effort.pairs,
            steps=d.effort.steps,
            seeds=d.seed,
            moments=moments,
            sigma_start=top,
            run=run,
        )
        early, gaussian = levels[levels > 0.3 * d.scale], laws.gaussian
        linear = linear_share(network, images, early, gaussian=gaussian, seed=d.seed, run=run)
        d.draw("mechanism", "correlation with the start", "network", paths, "o-")
        if paths.exact is not None:
            d.draw("mechanism", "the same, exact dynamics", "data", paths.exact, "--")
        d.draw("linear", "share of the denoiser that is linear", "Gaussian", linear)
        # Small data have no spectral level in the VP frame; where the leading mode equals the noise they have.
        at = speciation_time(moments)
        at = at if at.sigma else speciation_time(moments, "signal-to-noise")
        d.check(reversion_check(paths, at))
        d.check(linearity_check(linear, at))


def _opportunity(d: Diagnosis, network: Denoiser, classify: Classify, pairs: Clones) -> None:
    """Where do kicks carry furthest?"""
    with d.stage("opportunity") as run:
        sigma, e = d.levels(network, 0.07, 2.5, d.effort.branches), d.effort
        window = opportunity(network, sigma, classify, samples=e.pairs, steps=e.steps, seeds=d.seed, run=run)
        d.draw("opportunity", "change of the final image per unit of kick", "network", window.change, "o-")
        d.add("window of opportunity, image", "network", window.peak)
        if window.classes is not None and window.class_peak is not None:
            d.draw("changed", "kicks: class changed", "network", window.classes, "^:", SECOND)
            d.add("window of opportunity, class", "network", window.class_peak)
        d.check(_window_check(pairs, window))


def _window_check(pairs: Clones, window: Opportunity) -> Check:
    """Whether kicks carry furthest where the classes are decided.

    Holds where the window's peak lies between the levels at which phi is 10 % and 90 % of the way from its floor
    to certainty.
    """
    name = "a window of opportunity at the decision"
    way = (pairs.curve.value - pairs.floor) / max(1e-12, 1.0 - pairs.floor)
    low, high = (crossing(pairs.curve.sigma, way, share) for share in (0.9, 0.1))
    peak = window.class_peak if window.class_peak is not None else window.peak
    if peak.sigma is None or low is None or high is None:
        why = peak.reason or "" if peak.sigma is None else NO_WAY
        return Check(name, None, math.nan, math.nan, f"Cannot be said: {why.rstrip('.')}.")
    sentence = (
        f"Kicks change most at sigma {peak.sigma:.3g}; the classes are decided between {high:.3g} and {low:.3g} "
        f"(phi 10 % and 90 % of the way to certainty)."
    )
    return Check(name, bool(low <= peak.sigma <= high), float(peak.sigma), float(high), sentence)


NO_WAY = "the clones' agreement does not run from 10 % to 90 % on these levels"


def watched(d: Diagnosis) -> Empirical:
    """The images that trajectories may fall onto: as many as fit, on every rank, for each asks them at every step."""
    room, data = image_memory(d.run).bytes(), d.data
    most = max(3, room // (4 * math.prod(data.shape)))
    if len(data) > most:
        d.notes.append(
            f"Trajectories are watched with {most:,} of the {len(data):,} {data.noun}, as many as fit into "
            f"{room / 2**30:.3g} GiB."
        )
        data = data.subset(most)
    return Empirical(data.tensor(), **law_memory(d.run))


def _condensation(d: Diagnosis, network: Denoiser) -> None:
    """Do the network's trajectories fall onto single training images?"""
    whole, pairs, steps, top = watched(d), max(20, d.effort.pairs // 3), d.effort.steps, network.sigma_range[1]
    with d.stage("condensation") as run:
        start = min(top, 30 * d.scale)
        flips = nearest_flips(network, whole, pairs, steps, sigma_start=start, seeds=d.seed, run=run)
        d.add("last change of the nearest image", "network", flips.last)
        near = np.flatnonzero(flips.settled.sigma < 4 * d.scale)  # above, nothing happens
        settled, shared = (
            Curve(c.sigma[near], c.value[near], c.low[near], c.high[near]) for c in (flips.settled, flips.participation)
        )
        d.draw("condensation", "nearest training image is the final one", "network", settled)
        value, below, above = (1 - v / math.log10(len(whole)) for v in (shared.value, shared.high, shared.low))
        scaled = Curve(shared.sigma, value, below, above)
        d.draw("participation", "1 - log participation / log n", "data", scaled, "--")
        close = float(np.mean(flips.ratio < 1 / 3))
        d.copies = proportion(int((flips.ratio < 1 / 3).sum()), len(flips.ratio))
        d.notes.append(
            f"{close:.1%} of {len(flips.ratio)} final images of the network lie less than a third as far from one "
            f"training image as from the next (median ratio {np.median(flips.ratio):.2f}); see `symbreak audit`."
        )
    with d.stage("clones, same image") as run:
        levels = d.levels(network, 0.03, 2.5, max(3, d.effort.branches // 2))
        same = clones(network, levels, nearest_of(whole.points), pairs, steps=steps, seeds=d.seed, run=run)
        d.draw("condensation", "clones end at one nearest image, phi_C", "network", same.curve, "s-", SECOND)
