"""When does it decide? Every criterion on one sigma axis: data set (and network) -> `Record` of kind "phases".

    data alone     spectrum and ladder of modes, class mixture (free entropy, clones, class entropy, stability),
                   the labelled data set itself, loss curves of the laws
    with a network its clones and U-turns, stability, denoising losses and what follows from them, and the checks
                   of the mechanism

Every criterion keeps its own name, interval, source and seconds; nothing is averaged into one "critical time".
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from symbreak.critical import CriticalTime, Curve, crossing, passing
from symbreak.data.held_out import held_out
from symbreak.data.images import Images
from symbreak.laws import Empirical, Gaussian, PrincipalMixture
from symbreak.laws.class_posterior import class_of, posterior_average
from symbreak.laws.empirical import COPIES
from symbreak.laws.pairwise_weights import SharedPoints
from symbreak.metrics.features import Classifier, accuracy, extractor, train_classifier
from symbreak.moments.one_pass import Moments, mode_images
from symbreak.networks.denoiser import fingerprint
from symbreak.networks.families import denoiser
from symbreak.networks.loading import refuse_conditional, weights_hash
from symbreak.noise import NoiseLevel, generator, schedule
from symbreak.phases.bifurcation import bifurcation
from symbreak.phases.class_entropy import class_entropy, class_entropy_bound
from symbreak.phases.clones import clones
from symbreak.phases.collapse import collapse_time, samples_needed
from symbreak.phases.condensation import nearest_flips, nearest_of
from symbreak.phases.excess_entropy import excess_entropy
from symbreak.phases.kicks import opportunity
from symbreak.phases.losses import entropy_rate, loss_curve
from symbreak.phases.mechanism import Check, linear_share, linearity_check, reversion, reversion_check
from symbreak.phases.network_stability import arc_potential, network_stability
from symbreak.phases.non_gaussianity import divergence_bound
from symbreak.phases.speciation import cloning_probability, cloning_time, speciation_time
from symbreak.phases.u_turns import u_turns
from symbreak.report.record import Record
from symbreak.runtime.files import InputError, digest, output_folder
from symbreak.runtime.plain import plain, versions
from symbreak.runtime.rows import HELD
from symbreak.runtime.run import Blocks, Run
from symbreak.studies.findings import Findings, Stages, spectral_times

__all__ = ["Effort", "diagnose"]

DRAWS = 5000  # of a class mixture, where nothing is exact
CLUSTERS = 10  # classes of a network where neither labels nor a number were given


@dataclass(frozen=True)
class Effort:
    """How much a diagnosis spends.

    Attributes:
        pairs: pairs of clones, paths and kicks; real images of the U-turns, but at most ``images``.
        steps: sampler steps of a whole trajectory.
        branches: branch levels of the clones.
        turns: levels of the U-turns.
        stability: levels at which the network's Jacobian is looked at.
        losses: levels of the loss curves.
        images: images of the loss curves.
        points: training images of the empirical law.
        queries: noised images of the excess entropy; all images count as their neighbours.
        frames: frames in which the network's fixed points are followed.
    """

    pairs: int = 300
    steps: int = 40
    branches: int = 12
    turns: int = 8
    stability: int = 8
    losses: int = 20
    images: int = 256
    points: int = 4000
    queries: int = 1000
    frames: tuple[str, ...] = ("ve", "vp")

    def check(self) -> None:
        """Refuse numbers that give nothing."""
        low = {
            "pairs": 10,
            "steps": 4,
            "branches": 3,
            "turns": 2,
            "stability": 2,
            "losses": 4,
            "images": 20,
            "queries": 20,
        }
        for name, least in low.items():
            if getattr(self, name) < least:
                raise InputError(f"{name} is {getattr(self, name)}; expected at least {least}.")

    def quick(self) -> Effort:
        """Small enough for a minute on the digits."""
        return replace(
            self, pairs=100, steps=24, branches=8, turns=5, stability=4, losses=12, images=128, frames=("ve",)
        )


def diagnose(
    data: Images,
    model: Any = None,
    modes: int = 10,
    moments: Moments | None = None,
    *,
    holdout: Images | None = None,
    classify: Any = None,
    clusters: int | None = None,
    effort: Effort | None = None,
    seed: int = 0,
    memory: int | None = None,
    out: str | Path | None = None,
    progress: Stages | None = None,
) -> Record:
    """When does it decide? Every criterion, for a data set and, where one is given, a network.

    Args:
        data: images; their labels give the classes.
        model: a diffusers pipeline with ``.unet`` and ``.scheduler``; its own schedule gives the steps.
        modes: rungs of the ladder, and pictures of modes.
        moments: of the data, where they are already fitted.
        holdout: images for losses and U-turns that neither laws nor network have seen; by default the other half of
            the digits, else a fifth of ``data`` is kept back from the laws. A network may know those: it is said.
        classify: images [B, C, H, W] -> classes [B] or logits [B, K]; by default a small classifier is trained
            on the labels.
        clusters: classes are this many k-means clusters, of the data for the laws and of the network's own images;
            10 where a network comes without labels and classifier.
        effort: how much to spend; `Effort` counts.
        seed: of all noise.
        memory: bytes for the covariance, and for the images held at a time: of the collapse's those that do not fit are
            kept in a file without a name, in ``out`` or where temporary files are; trajectories of a network are
            watched as they fall onto a subset. By default 4 GiB and 1 GiB.
        out: folder for ``record.json``, and for finished blocks while it runs: the same call goes on after an
            interruption and finds the same numbers.
        progress: called with (stage, done, total).

    Returns:
        A `Record` of kind ``"phases"``; `write_report` draws it.

    Raises:
        InputError: for data, networks, labels and classifiers that do not fit each other.
    """
    effort = effort or Effort()
    effort.check()
    folder = None if out is None else output_folder(out)
    name = "ddpm-linear" if model is None else type(model.scheduler).__name__
    found = Findings(schedule("ddpm-linear" if model is None else model.scheduler), progress)
    network = None
    if model is not None:
        refuse_conditional(model, "the network")
        network = denoiser(model.unet, model.scheduler)
        if tuple(network.shape) != data.shape:
            raise InputError(
                f"the network makes images of {tuple(network.shape)}, but the data are {data.shape}. Resize the data "
                "(--pad) or choose another network."
            )
    if clusters is not None and not 2 <= clusters <= len(data) // 4:
        raise InputError(f"{clusters} clusters for {len(data):,} images; expected 2 to {len(data) // 4:,}.")
    if clusters is not None and classify is not None:
        raise InputError("clusters and a classifier came together; pass one of them.")
    parts = held_out(data, holdout)
    fit, held = parts.train, parts.test
    found.notes.append(f"Losses and U-turns: {parts.note}")
    if network is not None and min(len(held), effort.images) < 20:
        raise InputError(
            f"{min(len(held), effort.images)} images for the losses of a network; expected at least 20. Pass --holdout "
            "with more."
        )
    settings = {
        "data": data.name,
        "content": data.fingerprint(),
        "holdout": None if holdout is None else holdout.fingerprint(),
        "selection": list(data.history),
        "pad": data.pad,
        "value_range": [-data.scale - data.offset, data.scale - data.offset],
        "network": None if model is None else weights_hash(model.unet),
        "scheduler": None if model is None else {name: plain(dict(model.scheduler.config))},
        "classify": None if classify is None else _name(classify),
        "clusters": clusters,
        "modes": modes,
        "seed": seed,
        "memory": memory,
        **plain(asdict(effort)),
    }
    packages = versions(torch.get_num_threads())
    store = Blocks(folder, {**settings, "versions": packages, "probes": _probes(network, classify, held)})
    with found.stage("spectrum"):
        moments = Moments.fit(data, run=Run(memory=memory)) if moments is None else moments
        content = {"schedule": name, **spectral_times(data, found.steps, moments, modes)}
        found.add("spectral", "data", speciation_time(moments))
        found.add("signal-to-noise", "data", speciation_time(moments, "signal-to-noise"))
        found.show(
            "leading modes",
            "Eigenvectors of the data's covariance, largest variance first: what is decided first.",
            _pictures(mode_images(moments, modes), data.shape),
        )
    scale = math.sqrt(max(content["eigenvalues"][0], 1e-12))
    if not content["eigenvalues"][0] > 0:
        raise InputError(f"all {len(data):,} images of {data.name} are equal: nothing is decided. Choose other data.")
    if network is not None:
        judge = _judge(found, store, fit, held, classify, clusters, seed, memory, folder)
        clusters = judge.clusters
    elif clusters is None and not _classes(fit):
        found.notes.append(
            "No two classes of at least 2 images by the labels: no criterion of classes. Pass --clusters K for some."
        )
    own = moments if fit is data else Moments.fit(fit, run=Run(memory=memory))
    laws = _laws(found, fit, held, Gaussian(own), network is None, clusters, effort, scale, seed, memory)
    _collapse(found, store, data, laws, effort, scale, seed, memory, folder)
    if network is not None:
        _network(found, store, network, fit, held, moments, laws, judge, effort, scale, seed)
        _condensation(found, store, network, _fitting(found, data, memory), effort, scale, seed)
        content["network"] = {
            "parameters": sum(p.numel() for p in model.unet.parameters()),
            "prediction": network.prediction,
            "sigma_range": list(network.sigma_range),
        }
    content |= {
        "criteria": found.criteria,
        "curves": found.curves,
        "lines": found.lines,
        "checks": found.checks,
        "pictures": found.pictures,
        "notes": found.notes,
        "held_out": parts.to_dict(),
        "arc": found.arcs,
        "step_ticks": _ticks(found),
        "regimes": _regimes(found),
    }
    record = Record("phases", settings, content, packages, found.timings)
    if folder is not None:
        record.save(folder)
        store.close()
    return record


def _probes(network: Any, classify: Any, held: Images) -> list[str]:
    """Digests of what network and classifier answer to fixed images: names and weights do not tell all of them apart.

    A classifier that gives NaN or a wrong shape is found here, before any work.
    """
    out = [] if network is None else [fingerprint(network)]
    if classify is not None:
        some, _ = _some(held, 64, 0)
        with torch.inference_mode():
            codes = class_of(getattr(classify, "logits", classify), some)
        out.append(digest(codes))
    return out


def _name(classify: Any) -> str:
    """What a classifier is called, with its weights where it has some: other weights are another run."""
    name = str(getattr(classify, "name", getattr(classify, "__name__", "a callable")))
    return f"{name} {weights_hash(classify)}" if isinstance(classify, torch.nn.Module) else name


def _pictures(rows: np.ndarray | torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Directions [N, *S] as images: each scaled so that its largest entry is white or black."""
    x = torch.as_tensor(rows).float().reshape(-1, *shape)
    return x / x.abs().flatten(1).amax(1).clamp_min(1e-30).reshape(-1, 1, 1, 1)


def _classes(data: Images) -> bool:
    """Whether the labels tell at least two classes of two images apart."""
    if data.labels is None:
        return False
    counts = torch.bincount(data.labels)
    return int((counts > 0).sum()) > 1 and int(counts[counts > 0].min()) >= 2


def _ticks(found: Findings) -> list[dict[str, float]]:
    """Levels of round steps, for the second axis."""
    out = []
    for step in (10, 20, 50, 100, 150, 200, 250, 300, 350, 400, 450, 500, 550, 600, 700, 800, 900, 999):
        try:
            out.append({"sigma": found.steps.level(step).sigma, "step": float(step)})
        except ValueError:
            continue
    return out


@dataclass(frozen=True)
class _Judge:
    """What says the class of an image.

    Attributes:
        classify: images -> classes or scores, ``None`` for clusters.
        features: images -> features, from which classes are predicted.
        clusters: number of clusters, ``None`` with a classifier.
        labelled: whether the labels of the data are the classifier's classes.
    """

    classify: Any
    features: Any
    clusters: int | None
    labelled: bool


def _judge(
    found: Findings,
    store: Blocks,
    fit: Images,
    held: Images,
    classify: Any,
    clusters: int | None,
    seed: int,
    memory: int | None,
    folder: Path | None,
) -> _Judge:
    """The user's classifier, the bundled one, one trained on the labels, or clusters."""
    if classify is not None:
        scores = getattr(classify, "logits", classify)
        found.notes.append(f"Classes of images: {_name(classify)}.")
        return _Judge(scores, None, None, False)
    if clusters is None and fit.labels is not None and not _classes(fit):
        raise InputError(
            f"the labels of {fit.name} tell no two classes of at least 2 images apart. Pass --clusters K to find "
            "classes, or --classify with a classifier."
        )
    if clusters is not None or fit.labels is None:
        k = CLUSTERS if clusters is None else clusters
        found.notes.append(
            f"Classes are {k} k-means clusters: of the data for the laws, of its own images for the network."
        )
        return _Judge(None, None, k, False)
    with found.stage("classifier") as tell:
        judge = _trained(store, fit, held, tell, seed, _share(memory), folder)
    found.notes.append(
        f"Classes of images: a classifier of {', '.join(judge.classes[:12])}"
        + (f", right on {judge.accuracy:.1%} of the held-out images." if math.isfinite(judge.accuracy) else ".")
    )
    return _Judge(judge.logits, judge.logits, None, True)


def _trained(
    store: Blocks,
    fit: Images,
    held: Images,
    tell: Callable[[int, int], None],
    seed: int,
    memory: int,
    folder: Path | None,
) -> Any:
    """The bundled classifier for the digits, else one trained on the labels; its weights are kept."""
    if fit.name == "digits" and fit.pad is None:
        return extractor("digits-classifier")
    epochs = max(2, min(60, 200_000 // len(fit)))
    fresh: list[Classifier] = []

    def make() -> dict[str, np.ndarray]:
        run = Run(folder, max(2**20, memory), lambda _, done, total: tell(done, total))
        made = train_classifier(fit, epochs=epochs, seed=seed, run=run)
        fresh.append(made)
        return {k: v.numpy() for k, v in fresh[0].state_dict().items()}

    weights = store.keep("classifier", make)
    model = fresh[0] if fresh else Classifier(fit.shape, fit.classes)
    model.load_state_dict({k: torch.as_tensor(v) for k, v in weights.items()})
    model.eval().requires_grad_(False)
    if held.labels is not None:
        model.accuracy = accuracy(model, held)
    return model


@dataclass(frozen=True)
class _Laws:
    gaussian: Gaussian
    classes: PrincipalMixture | None
    empirical: Empirical


def _some(data: Images, count: int, seed: int, even: bool = False) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Up to ``count`` images and their labels, the same ones for the same seed; ``even``: as many of every class."""
    order = torch.randperm(len(data), generator=generator(seed, 31))
    if even and data.labels is not None:
        y = data.labels[order]
        place = torch.zeros(len(y), dtype=torch.int64)  # of an image among those of its class
        for label in y.unique():
            place[y == label] = torch.arange(int((y == label).sum()))
        order = order[torch.argsort(place, stable=True)]
    part = data.take(order[:count].numpy(), "some")
    return part.tensor(), part.labels


def _passes(curve: Curve, threshold: float, criterion: str, source: str) -> CriticalTime:
    """Where a curve and the ends of its interval pass a threshold."""
    at, *ends = passing(curve.sigma, np.stack([curve.value, curve.low, curve.high]), threshold).tolist()
    if not 0 < at < math.inf:
        ends_of = f"sigma {curve.sigma.min():.3g} and {curve.sigma.max():.3g}"
        reason = f"{curve.name} does not pass {threshold:.3g} between {ends_of}"
        return CriticalTime(None, criterion=criterion, source=source, reason=reason)
    known = all(0 < e < math.inf for e in ends)
    low, high = (NoiseLevel(e) for e in sorted(ends)) if known else (None, None)
    return CriticalTime(NoiseLevel(at), low, high, criterion=criterion, source=source)


def _laws(
    found: Findings,
    fit: Images,
    held: Images,
    gaussian: Gaussian,
    alone: bool,
    clusters: int | None,
    effort: Effort,
    scale: float,
    seed: int,
    memory: int | None,
) -> _Laws:
    """Everything that the data alone can say."""
    with found.stage("laws"):
        points, labels = _some(fit, effort.points, seed)
        empirical = Empirical(points, **_room(memory))
        classes = None
        if clusters is not None:
            classes = PrincipalMixture.fit(fit, components=clusters, gaussian=gaussian, seed=seed)
        elif _classes(fit):
            classes = PrincipalMixture.fit(fit, labels=True, gaussian=gaussian, seed=seed)
    sigma = scale * np.geomspace(0.05, 4.0, 24)
    if classes is not None:
        mixture = classes.inner
        with found.stage("free entropy"):
            found.add(
                "free entropy", "class mixture", speciation_time(mixture, "free-entropy", samples=DRAWS, seed=seed)
            )
        with found.stage("class mixture"):
            found.add("cloning", "class mixture", cloning_time(mixture, samples=DRAWS, seed=seed))
            phi = cloning_probability(mixture, sigma, samples=DRAWS, seed=seed)
            found.draw("clones", "clones, class mixture", "class mixture", phi)
            open_ = class_entropy(mixture, sigma, samples=DRAWS, seed=seed)
            found.add("class entropy", "class mixture", open_.time())
            found.draw("entropy", "class mixture", "class mixture", open_, "--")
        with found.stage("wells"):
            # Beyond the leading modes the class mixture is one Gaussian, which has no wells.
            found.add("centre loses stability", "class mixture", bifurcation(mixture, "sde", "ve"))
            found.add("second well", "class mixture", bifurcation(mixture, "sde", "ve", criterion="wells"))
        if labels is not None and clusters is None and len(labels.unique()) > 1:
            with found.stage("data set"):
                _labelled(found, empirical, labels, sigma, seed)
    if alone:
        with found.stage("losses"):
            images, _ = _some(held, effort.images, seed)
            losses = loss_curve(
                gaussian, images, sigma, laws={"class mixture": classes} if classes else None, seed=seed
            )
            found.draw("loss", "Gaussian", "Gaussian", losses.mmse)
            if classes is not None:
                found.draw("loss", "class mixture", "class mixture", losses.law("class mixture"))
            own = loss_curve(empirical, images, sigma, seed=seed).mmse
            found.draw("loss", f"{len(points):,} training images", "data", own)
    return _Laws(gaussian, classes, empirical)


def _labelled(found: Findings, empirical: Empirical, labels: Any, sigma: np.ndarray, seed: int) -> None:
    """Clones and class entropy of the labelled data set itself."""
    shares = torch.bincount(labels).double() / len(labels)
    total = float(-(shares * shares.clamp_min(1e-300).log()).sum())
    phi = cloning_probability(empirical, sigma, samples=1000, seed=seed, labels=labels)
    half = 0.5 * (1.0 + float((shares * shares).sum()))
    found.draw("clones", "clones, the data set itself", "data", phi)
    found.add("cloning", "data", _passes(phi, half, "cloning", "arXiv:2402.18491, phi halfway from sum_c pi_c^2 to 1"))
    rest = posterior_average(empirical, sigma, lambda p: -(p.exp() * p).sum(-1), 1000, seed, labels)
    open_ = Curve(sigma, *rest, name="class entropy")
    found.draw("entropy", "the data set itself", "data", open_, "--")
    found.add("class entropy", "data", _passes(open_, 0.5 * total, "class entropy at 0.5 H[c]", "derived"))


def _room(memory: int | None) -> dict[str, int]:
    """Working memory of an empirical law: with the copy that it may make, a third of what is allowed."""
    return {} if memory is None else {"memory": max(2**16, memory // (3 * COPIES))}


def _collapse(
    found: Findings,
    store: Blocks,
    data: Images,
    laws: _Laws,
    effort: Effort,
    scale: float,
    seed: int,
    memory: int | None,
    folder: Path | None,
) -> None:
    """Below which level would a perfect score only replay the data set? All its images count, a part on every rank."""
    with found.stage("images") as tell:
        holding = Run(folder, progress=lambda _, *n: tell(*n)).share(_share(memory) / 2**30)
        n, whole = len(data), SharedPoints(data.shards(holding), **_room(memory))
    sigma = scale * np.geomspace(0.05, 4.0, 24)
    mixture = None if laws.classes is None else laws.classes.inner
    own: dict[str, Any] = {"data": whole, "Gaussian": laws.gaussian}
    own |= {} if mixture is None else {"class mixture": mixture}
    with found.stage("collapse") as tell:
        for name, law in own.items():
            measured: dict[str, Any] = {"queries": effort.queries, "seed": seed, "draws": DRAWS}
            if law is whole:
                measured |= {"run": store.run(tell)}
            count = None if law is whole else n
            line = "o-" if law is whole else "-"
            found.add("collapse", name, collapse_time(law, samples=count, **measured))
            f = excess_entropy(law, sigma, samples=count, **measured)
            a = math.log(n) / law.dim  # the class mixture lives in the leading components
            scaled = Curve(sigma, f.value / a, f.low / a, f.high / a)
            found.draw("collapse", f"{n:,} images, f^e / a" if law is whole else name, name, scaled, line)
            found.draw(
                "samples", "from the images" if law is whole else name, name, samples_needed(law, sigma, **measured)
            )
    found.lines.append({"panel": "samples", "value": math.log10(n), "label": f"the {n:,} images there are"})


def _fitting(found: Findings, data: Images, memory: int | None) -> Empirical:
    """The images that trajectories may fall onto: as many as fit, on every rank, for each asks them at every step."""
    room = _share(memory)
    most = max(3, room // (4 * math.prod(data.shape)))
    if len(data) > most:
        found.notes.append(
            f"Trajectories are watched with {most:,} of the {len(data):,} images, as many as fit into "
            f"{room / 2**30:.3g} GiB."
        )
        data = data.subset(most)
    return Empirical(data.tensor(), **_room(memory))


def _share(memory: int | None) -> int:
    """Bytes of images that are held: with a copy of them and work, what is allowed."""
    return HELD if memory is None else memory // 3


def _condensation(
    found: Findings, store: Blocks, network: Any, whole: Empirical, effort: Effort, scale: float, seed: int
) -> None:
    """Do the network's trajectories fall onto single training images?"""
    low, high = network.sigma_range
    pairs = max(20, effort.pairs // 3)
    with found.stage("condensation") as tell:
        flips = nearest_flips(
            network, whole, pairs, effort.steps, sigma_start=min(high, 30 * scale), seeds=seed, run=store.run(tell)
        )
        found.add("last change of the nearest image", "network", flips.last)
        near = np.flatnonzero(flips.settled.sigma < 4 * scale)  # above, nothing happens
        settled, shared = (
            Curve(c.sigma[near], c.value[near], c.low[near], c.high[near]) for c in (flips.settled, flips.participation)
        )
        found.draw("condensation", "nearest training image is the final one", "network", settled)
        value, below, above = (1 - v / math.log10(len(whole)) for v in (shared.value, shared.high, shared.low))
        scaled = Curve(shared.sigma, value, below, above)
        found.draw("condensation", "1 - log participation / log n", "data", scaled, "--")
        close = float(np.mean(flips.ratio < 1 / 3))
        found.notes.append(
            f"{close:.1%} of {len(flips.ratio)} final images of the network lie less than a third as far from one "
            f"training image as from the next (median ratio {np.median(flips.ratio):.2f}); see `symbreak audit`."
        )
    levels = np.geomspace(max(1.05 * low, 0.03 * scale), min(0.95 * high, 2.5 * scale), max(3, effort.branches // 2))
    with found.stage("clones, same image") as tell:
        same = clones(
            network, levels, nearest_of(whole.points), pairs=pairs, steps=effort.steps, seeds=seed, run=store.run(tell)
        )
        found.draw("condensation", "clones end at one nearest image, phi_C", "network", same.curve, "s-", "#b3424a")


def _regimes(found: Findings) -> dict[str, Any]:
    """The two levels between which a sample is new: the measured speciation, and the collapse of the data set."""
    order = (("cloning", "network"), ("cloning", "data"), ("cloning", "class mixture"), ("spectral", "data"))
    out: dict[str, Any] = {"speciation": None, "collapse": None}
    for key, wanted in (("speciation", order), ("collapse", (("collapse", "data"),))):
        rows = [c for w in wanted for c in found.criteria if (c["name"], c["of"]) == w and c["level"] is not None]
        if rows:
            out[key] = {"sigma": rows[0]["level"]["sigma"], "criterion": rows[0]["name"], "of": rows[0]["of"]}
    return out


def _network(
    found: Findings,
    store: Blocks,
    network: Any,
    fit: Images,
    held: Images,
    moments: Moments,
    laws: _Laws,
    judge: _Judge,
    effort: Effort,
    scale: float,
    seed: int,
) -> None:
    """Everything that needs the network."""
    low, high = network.sigma_range

    def span(least: float, most: float, count: int) -> np.ndarray:
        """Levels even in log sigma, as multiples of the data's largest standard deviation, inside the range."""
        return np.geomspace(max(1.05 * low, least * scale), min(0.95 * high, most * scale), count)

    shared: dict[str, Any] = {"steps": effort.steps, "seeds": seed}
    with found.stage("clones") as tell:
        pairs = clones(
            network,
            span(0.07, 2.5, effort.branches),
            judge.classify,
            pairs=effort.pairs,
            clusters=judge.clusters,
            run=store.run(tell),
            **shared,
        )
        found.add("cloning", "network", pairs.crossing)
        found.draw("clones", "clones, network", "network", pairs.curve, "o-")
        found.lines.append({"panel": "clones", "value": pairs.floor, "label": "floor, sum of squared class shares"})
        found.show("samples", "Final images of the clones' trunks.", torch.as_tensor(pairs.ends[:16]))
    judged = judge.classify if judge.clusters is None else _nearest(pairs)
    images, labels = _some(held, effort.images, seed)
    with found.stage("U-turns") as tell:
        turns = u_turns(
            network, images[: effort.pairs], span(0.07, 2.5, effort.turns), judged, run=store.run(tell), **shared
        )
        found.add("U-turn, class", "network", turns.crossing)
        found.draw("clones", "U-turns: class changed", "network", turns.classes, "s--")
        found.draw("clones", "U-turns: pixels changed", "network", turns.features, ":")
    with found.stage("losses") as tell:
        own = {"Gaussian": laws.gaussian} | ({} if laws.classes is None else {"class mixture": laws.classes})
        levels = span(0.05, 6.0, effort.losses)
        losses = loss_curve(network, images, levels, laws=own, seed=seed, run=store.run(tell))
        found.draw("loss", "network", "network", losses.mmse)
        rate = entropy_rate(losses, rescaled=True)
        found.draw("rate", "entropy rate, rescaled", "network", rate)
        for law in own:
            found.draw("loss", law, law, losses.law(law))
            bound = divergence_bound(losses, law)
            found.draw("information", f"network against {law}", law, bound)
            found.add("non-Gaussianity" if law == "Gaussian" else "distance from the mixture", "network", bound.time())
        empirical = loss_curve(laws.empirical, images, levels, seed=seed).mmse
        found.draw("loss", f"{len(laws.empirical):,} training images", "data", empirical)
    if judge.labelled and labels is not None:
        with found.stage("class entropy") as tell:
            some, known = _some(fit, 2 * effort.images, seed, even=True)
            try:
                open_ = class_entropy_bound(
                    network,
                    span(0.07, 2.5, effort.turns),
                    images,
                    labels,
                    some,
                    known,
                    features=judge.features,
                    seed=seed,
                    run=store.run(tell),
                )
                found.add("class entropy", "network", open_.time())
                found.draw("entropy", "network, upper bound", "network", open_, "o-")
            except InputError as error:  # a class that is too rare must not cost the other criteria
                found.add("class entropy", "network", CriticalTime(None, criterion="class entropy", reason=str(error)))
    heights = span(0.15, 3.0, effort.stability)[::-1]
    _stability(found, store, network, judged, fit.shape, heights, effort.frames, seed)
    early = losses.sigma[losses.sigma > 0.3 * scale]
    with found.stage("mechanism") as tell:
        # Far above the spread of the data and their distance from the origin, where noise alone is a fair start.
        paths = reversion(
            network,
            span(0.07, 6.0, effort.branches),
            paths=effort.pairs,
            steps=effort.steps,
            seeds=seed,
            moments=moments,
            sigma_start=min(0.95 * high, max(8.0 * scale, 4.0 * float(moments.mean.norm()))),
            run=store.run(),
        )
        linear = linear_share(network, images, early, gaussian=laws.gaussian, seed=seed, run=store.run(tell))
        found.draw("mechanism", "correlation with the start", "network", paths, "o-")
        if paths.exact is not None:
            found.draw("mechanism", "the same, exact dynamics", "data", paths.exact, "--")
        found.draw("mechanism", "share of the denoiser that is linear", "Gaussian", linear)
        # Small data have no spectral level in the VP frame; where the leading mode equals the noise they have.
        at = speciation_time(moments)
        at = at if at.sigma else speciation_time(moments, "signal-to-noise")
        found.check(reversion_check(paths, at))
        found.check(linearity_check(linear, at))
    with found.stage("opportunity") as tell:
        window = opportunity(
            network, span(0.07, 2.5, effort.branches), judged, samples=effort.pairs, run=store.run(tell), **shared
        )
        found.draw("opportunity", "change of the final image per unit of kick", "network", window.change, "o-")
        found.add("window of opportunity, image", "network", window.peak)
        if window.classes is not None and window.class_peak is not None:
            found.draw("clones", "kicks: class changed", "network", window.classes, "^:")
            found.add("window of opportunity, class", "network", window.class_peak)
        found.check(_window_check(pairs, window))


def _stability(
    found: Findings,
    store: Blocks,
    network: Any,
    judged: Any,
    shape: tuple[int, ...],
    sigma: np.ndarray,
    frames: tuple[str, ...],
    seed: int,
) -> None:
    """The network's central fixed point and its potential between two trajectories, from high noise down."""
    for frame in frames:
        with found.stage(f"stability, {frame.upper()}") as tell:
            centre = network_stability(network, sigma, "sde", frame, seed=seed, progress=tell, keep=store.keep)
            found.add("centre loses stability", "network", centre.critical)
            found.add("second well", "network", centre.splitting)
            ratio = centre.eigenvalues[:, 0] / centre.threshold
            label = f"top eigenvalue of dD/dx over its threshold, {frame.upper()}"
            color = None if frame == "ve" else "#b3424a"
            found.draw("stability", label, "network", Curve(sigma, ratio, ratio, ratio), "o-", color)
            if frame == "ve" and not np.isfinite(ratio).any():
                found.notes.append("No fixed point of the network was found on any of these levels.")
            elif frame == "ve":
                most = int(np.nanargmax(np.where(np.isfinite(ratio), ratio, -np.inf)))
                found.notes.append(
                    f"Jacobian of the network at the centre, VE: asymmetry {np.nanmin(centre.asymmetry):.1%} to "
                    f"{np.nanmax(centre.asymmetry):.1%}."
                )
                found.show(
                    "least stable direction",
                    f"Eigenvector of the network's Jacobian at the centre (sigma {sigma[most]:.3g}); then the centre.",
                    torch.cat(
                        [
                            _pictures(centre.directions[most, :1], shape),
                            torch.as_tensor(centre.states[most])[None].float(),
                        ]
                    ),
                )
    found.lines.append({"panel": "stability", "value": 1.0, "label": "unstable above"})
    with found.stage("arc") as tell:
        arc = arc_potential(network, sigma, seeds=seed, classify=judged, progress=tell, keep=store.keep)
        found.add("two wells on an arc", "network", arc.critical)
        found.arcs = {
            "sigma": arc.sigma.tolist(),
            "angle": arc.angle.tolist(),
            "value": arc.value.tolist(),
            "wells": arc.wells.tolist(),
        }
        found.show("ends of the arc", "Final images of the two trajectories.", torch.as_tensor(arc.ends).float())


def _nearest(pairs: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """The cluster of an image: the nearest mean of the clusters that the clones' trunks were sorted into."""
    ends, names = torch.as_tensor(pairs.ends).flatten(1).float(), torch.as_tensor(pairs.labels)
    centres = torch.stack([ends[names == k].mean(0) for k in names.unique()])

    def classify(x: torch.Tensor) -> torch.Tensor:
        return torch.cdist(x.flatten(1).float(), centres).argmin(1)

    return classify


def _window_check(pairs: Any, window: Any) -> Check:
    """Whether kicks carry furthest where the classes are decided.

    Holds where the window's peak lies between the levels at which phi is 10 % and 90 % of the way from its floor
    to certainty.
    """
    name = "a window of opportunity at the decision"
    way = (pairs.curve.value - pairs.floor) / max(1e-12, 1.0 - pairs.floor)
    ends = [crossing(pairs.curve.sigma, way, share) for share in (0.9, 0.1)]
    peak = window.class_peak if window.class_peak is not None else window.peak
    if peak.sigma is None or None in ends:
        why = (
            peak.reason
            if peak.sigma is None
            else "the clones' agreement does not run from 10 % to 90 % on these levels"
        )
        return Check(name, None, math.nan, math.nan, f"Cannot be said: {(why or '').rstrip('.')}.")
    low, high = (float(e) for e in ends if e is not None)
    holds = low <= peak.sigma <= high
    sentence = (
        f"Kicks change most at sigma {peak.sigma:.3g}; the classes are decided between {high:.3g} and {low:.3g} "
        f"(phi 10 % and 90 % of the way to certainty)."
    )
    return Check(name, bool(holds), float(peak.sigma), float(high), sentence)
