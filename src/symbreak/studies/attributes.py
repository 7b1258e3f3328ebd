"""When is each attribute decided? The levels of all attributes of a data set, on one axis.

For an attribute such as Smiling the images with and without it are two Gaussians in the leading principal components.

    halfway        where noised images that the laws were not fitted to are told apart by half of what they are without
                   noise: their balanced accuracy is halfway from chance
    free entropy   E[L] = Std[L] for the fitted laws themselves, L their log odds: of two Gaussians of one covariance
                   where 84 % are told apart. It counts their sampling errors as differences, so that rare attributes
                   stand out too early

Intervals leave out a tenth of the images at a time. What is hardly told apart at any level is marked: its levels say
little.

With a network also its own levels, as classifiers of the attributes read its images: one set of trajectories, and one
set of features, serves all attributes.

    clones         clone and trunk end with the same value halfway from chance to always
    U-turns        an image that is noised and denoised changes its value half as often as an image of its own
    information    of a conditional network, for the attribute that is its condition: I(c; x_sigma) at 10 and 90 %

Source: halfway is derived; arXiv:2602.04404 (free entropy); arXiv:2402.18491 (clones); arXiv:2402.16991 (U-turns);
attributes of faces: arXiv:2305.19693.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial

import numpy as np
import torch

from symbreak.critical import CriticalTime, passing
from symbreak.data.held_out import HeldOut, held_out
from symbreak.data.images import Images, describe
from symbreak.data.labels import Classes, attributes
from symbreak.intervals import balanced_share, jackknife
from symbreak.laws import Gaussian, PrincipalMixture
from symbreak.laws.clusters import coordinates
from symbreak.metrics.attributes import FEWEST, RESOLVED, attribute_classifier, enough
from symbreak.metrics.extractors import Extractor
from symbreak.metrics.feature_rows import extractor
from symbreak.networks.denoiser import Denoiser, Denoises, fixed_class, of_network
from symbreak.networks.types import Pipeline
from symbreak.noise import NoiseLevel, Schedule, generator, schedule
from symbreak.phases.branches import side_of
from symbreak.phases.class_information import condition_information, guidance_window
from symbreak.phases.cloning import clones_by_attribute
from symbreak.phases.speciation import speciation_time
from symbreak.phases.turns import u_turns_by_attribute
from symbreak.report.record import Record
from symbreak.report.verdict import sentences
from symbreak.runtime.identity import identity_of, of_data, unrepeatable
from symbreak.runtime.plain import Values, plain, versions
from symbreak.runtime.run import Arrays, Run
from symbreak.start.fit import gaussian_law
from symbreak.studies.ask_network import along
from symbreak.studies.diagnose import about_network, network_for
from symbreak.studies.diagnosis import Diagnosis, Effort, some_images, view

__all__ = ["attribute_levels"]

MODES = 64  # leading components
GROUPS = 10
LEVELS, RANGE, CLEAN = 32, (0.003, 3.0), 3  # in units of a whole sample's standard deviation; without noise
DRAWS = 5000  # of attributes with more than two classes


def attribute_levels(
    data: Images,
    names: Sequence[str] | None = None,
    *,
    model: Pipeline | Denoises | Denoiser | None = None,
    holdout: Images | None = None,
    extract: Extractor | None = None,
    effort: Effort | None = None,
    seed: int = 0,
    run: Run | None = None,
) -> Record:
    """The levels at which each attribute of a data set is decided, and by a network, with intervals.

    Args:
        data: images of a source with columns of attributes, see `symbreak.data.labels.attributes`.
        names: the attributes; ``None`` takes all that tell two classes apart.
        model: a network as `diagnose` takes it, for its clones and U-turns; a class-conditional one, with ``data`` that
            have its classes as labels, also for what its states know of them.
        holdout: images for the U-turns; by default a fifth of ``data`` is kept back from the classifiers for them.
        extract: features that the classifiers of the network's images see; by default pixels.
        effort: pairs, steps, branch levels, turns and images of the clones and U-turns.
        seed: of the groups of the jackknife, of the shrinkage's folds and of all noise.
        run: the folder for ``record.json``, and for finished attributes meanwhile; memory of the moments.

    Returns:
        A `Record` of kind ``"attributes"``; its content has ``rows``, one an attribute, highest level first: ``level``
        with interval (halfway), ``free_entropy`` with its own, share, balanced accuracy, and whether it is resolved;
        with a network ``network``: levels of its ``clones`` and ``u_turns``, the ``classifier``'s balanced accuracy and
        the share among its samples.

    Raises:
        InputError: for an attribute that is not there (the names are listed), or with fewer than 20 images in a class;
            for a network and data that do not fit each other.

    >>> import symbreak as sb
    >>> attribute_levels(sb.images("digits"))
    Traceback (most recent call last):
    symbreak.runtime.errors.InputError: digits has no columns of attributes. Expected a parquet file with some, ...
    """
    run, wanted = (run or Run()).taken(), attributes(data, names)
    names_ = [name for name, classes in wanted.items() if enough(name, classes, names is not None)]
    packages, settings = versions(torch.get_num_threads()), {"attributes": names and list(names), "seed": seed}
    asked = None if model is None else _Asked(data, model, holdout, extract or extractor("pixels"), effort or Effort())
    settings |= {} if asked is None else asked.settings()
    decides = {} if asked is None else asked.decides(holdout)
    run = run.identified(identity_of("attributes", data=of_data(data), names=list(wanted), seed=seed, **decides))
    with run.timed("spectrum") as part:
        gaussian = gaussian_law(data)
        part.tell(1, 1)
        p = max(1, min(MODES, gaussian.eigenvectors.shape[1], len(data) // GROUPS))
        a = coordinates(data, gaussian.moments.mean, gaussian.eigenvectors[:, :p])
    with run.timed("attributes") as part:
        measured = part.parts("attribute", names_, lambda name: _measured(a, wanted[name], seed), a, seed)
    scheduler = getattr(model, "scheduler", None)
    steps = schedule("ddpm-linear" if scheduler is None else scheduler)
    rows = [_row(name, wanted[name], one, steps) for name, one in zip(names_, measured, strict=True)]
    rows.sort(key=lambda row: -(row["level"] or {"sigma": 0.0})["sigma"])
    notes = [
        f"{len(wanted) - len(names_)} attributes with fewer than {FEWEST} images in a class are left out: "
        f"{', '.join(n for n in wanted if n not in names_)}."
    ] * (len(names_) < len(wanted))
    content = {
        "data": describe(data),
        "schedule": "ddpm-linear" if scheduler is None else type(scheduler).__name__,
        "modes": p,
        "spectral": view(speciation_time(gaussian), steps),
        "rows": rows,
        "resolved": RESOLVED,
        "notes": notes,
    }
    if asked is not None:
        d = Diagnosis(data, asked.parts.train, asked.parts.test, asked.effort, seed, run, steps)
        d.scale = math.sqrt(float(gaussian.eigenvalues[0]))
        content |= asked.answers(d, names, rows)
    content["verdict"] = sentences("attributes", content)
    record = Record("attributes", settings, content, packages, run.timings)
    if run.folder is not None:
        record.save(run.folder)
        run.close()
    return record


@dataclass(frozen=True)
class _Asked:
    """A network that is asked for its levels of the attributes."""

    data: Images
    model: Pipeline | Denoises | Denoiser
    holdout: Images | None
    extract: Extractor
    effort: Effort

    @cached_property
    def network(self) -> Denoiser:
        return network_for(self.model, self.data)

    @cached_property
    def parts(self) -> HeldOut:
        return held_out(self.data, self.holdout)

    def settings(self) -> Values:
        """What a record says of them."""
        holdout = None if self.holdout is None else self.holdout.fingerprint()
        return {"holdout": holdout, "classifiers": self.extract.name, **plain(asdict(self.effort))}

    def decides(self, holdout: Images | None) -> Values:
        """What decides their answers."""
        self.effort.check()
        seen = self.extract.decides(self.data.shape) or unrepeatable(self.extract.name)
        network = of_network(self.network, getattr(self.model, "scheduler", None))
        return {"network": network, "holdout": of_data(holdout), "features": seen, "effort": asdict(self.effort)}

    def answers(self, d: Diagnosis, names: Sequence[str] | None, rows: list[Values]) -> Values:
        """The levels of the network's clones and U-turns, put into the rows, and what else a record says of it."""
        network, effort = self.network, self.effort
        with d.stage("classifiers") as run:
            judge = attribute_classifier(d.train, names, self.extract, d.seed, run)

        def classify(x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {name: said for name, said in judge(x).items() if name != judge.joint}

        options: Values = {"steps": effort.steps, "seeds": d.seed}
        with d.stage("clones") as run:
            branches = d.levels(network, 0.07, 2.5, effort.branches)
            pairs = clones_by_attribute(network, branches, classify, effort.pairs, **options, run=run)
        images, labels = some_images(d.test, effort.images, d.seed)
        with d.stage("U-turns") as run:
            sigma = d.levels(network, 0.07, 2.5, effort.turns)
            turns = u_turns_by_attribute(network, images[: effort.pairs], sigma, classify, **options, run=run)
        for row in rows:
            name = row["attribute"]
            if name not in pairs:
                row["network"] = None
                continue
            shares = dict(zip(pairs[name].classes.tolist(), pairs[name].priors.tolist(), strict=True))
            row["network"] = {
                "clones": _seen(pairs[name].crossing, branches, d.steps),
                "u_turns": _seen(turns[name].crossing, sigma, d.steps),
                "classifier": judge.accuracies[name],
                "share": shares.get(len(judge.classes[name]) - 1, 0.0),
                "information": None,
            }
            d.add(name, "network", pairs[name].crossing)
        left = [row["attribute"] for row in rows if row["network"] is None]
        if left:
            d.notes.append(f"Too few images of a class to train a classifier: {', '.join(left)}.")
        self._information(d, rows, images, labels)
        along(d, network)
        d.notes.append(
            f"Network: {effort.pairs} pairs of clones and {len(images[: effort.pairs])} U-turns, read by {judge.name}, "
            f"trained on {d.train.name}. {self.parts.note}"
        )
        return {"network": about_network(network), "along": d.along, "network_notes": d.notes}

    def _information(self, d: Diagnosis, rows: list[Values], images: torch.Tensor, labels: torch.Tensor | None) -> None:
        """When a conditional network decides its condition, where that is one of the attributes."""
        null = fixed_class(self.network)
        if null is None or labels is None or bool((labels == null).any()) or len(labels.unique()) < 2:
            return
        name = _condition(d.test)
        row = next((row for row in rows if row["attribute"] == name and row["network"] is not None), None)
        if row is None:
            d.notes.append("The network's condition is none of the attributes: no class information.")
            return
        with d.stage("class information") as run:
            information = condition_information(self.network, images, labels, seed=d.seed, run=run)
            window = guidance_window(information, seed=d.seed)
        ends = {"high": view(window.high, d.steps), "low": view(window.low, d.steps)}
        row["network"]["information"] = {**ends, "limit": information.limit, "total": information.total}
        d.notes.extend(information.notes)


def _seen(time: CriticalTime, sigma: np.ndarray, steps: Schedule) -> Values:
    """A level as plain values; of one that is outside the levels asked about also on which side, and of which."""
    side = side_of(time)
    edge = float(sigma.max() if side == "above" else sigma.min())
    return {**view(time, steps), **({} if side is None else {"beyond": {"side": side, "sigma": edge}})}


def _condition(images: Images) -> str | None:
    """The attribute whose classes are those of the labels, whatever their numbers."""
    labels = [] if images.labels is None else images.labels.tolist()
    for name, classes in attributes(images).items():
        codes = classes.codes.tolist()
        if len(set(zip(codes, labels))) == len(set(codes)) == len(set(labels)):
            return name
    return None


def _measured(a: torch.Tensor, classes: Classes, seed: int) -> Arrays:
    """How well images that the laws were not fitted to are told apart, by level, and the laws' own free-entropy levels.

    Args:
        a: coordinates of the images [N, p].
        classes: of the images.

    Returns:
        ``sigma`` [L]; ``right`` [GROUPS, K, L], how many of each group and class are told right at each level, ``of``
        [GROUPS, K]; ``present`` [K]; ``free`` [1 + GROUPS], log sigma of the laws of all images and without each group.
    """
    known = classes.codes >= 0
    x, (present, y) = a[torch.from_numpy(known)], np.unique(classes.codes[known], return_inverse=True)
    gaussian, k = Gaussian.fit([x]), len(present)
    variances, p = gaussian.eigenvalues, x.shape[1]
    sigma = math.sqrt(float(variances.sum())) * np.geomspace(*RANGE, LEVELS)
    fit = partial(PrincipalMixture.fit, leading=p, gaussian=gaussian, seed=seed)
    whole = fit(x, y, sigma=math.sqrt(float(variances[p // 2])))
    group = torch.randperm(len(x), generator=generator(seed, 71)).numpy() % GROUPS
    noise = torch.randn(x.shape, generator=generator(seed, 74), dtype=torch.float64)
    right, of = np.zeros((GROUPS, k, LEVELS), np.int64), np.zeros((GROUPS, k), np.int64)
    free = [_free_entropy(whole, seed)]
    for g in range(GROUPS):
        out = np.flatnonzero(group == g)
        law = fit(x[torch.from_numpy(group != g)], y[group != g], prior=whole.prior)
        free.append(_free_entropy(law, seed))
        of[g] = np.bincount(y[out], minlength=k)
        new = coordinates([x[torch.from_numpy(out)]], gaussian.moments.mean, gaussian.eigenvectors)
        for i, s in enumerate(sigma.tolist()):
            # every class counts alike, however rare
            said = law.inner.component_log_prob(new + s * noise[torch.from_numpy(out)], s).argmax(1).numpy()
            right[g, :, i] = np.bincount(y[out][said == y[out]], minlength=k)
    return {"sigma": sigma, "right": right, "of": of, "present": present, "free": np.array(free)}


def _free_entropy(law: PrincipalMixture, seed: int) -> float:
    """log sigma where E[L] = Std[L]; -inf where that is nowhere."""
    sigma = speciation_time(law.inner, "free-entropy", samples=DRAWS, seed=seed).sigma
    return -math.inf if sigma is None else math.log(sigma)


def _halfway(sigma: np.ndarray, accuracy: np.ndarray, floor: float) -> CriticalTime:
    """Where balanced accuracies [1 + GROUPS, L] are halfway from chance to what they are without noise."""
    clean = accuracy[:, :CLEAN].mean(1)
    made = partial(CriticalTime, criterion="told apart halfway", source="derived")
    if clean[0] <= floor:
        return made(None, reason="the images are not told apart at any level")
    return _jackknifed(passing(sigma, accuracy, (floor + clean) / 2), made)


def _jackknifed(passed: np.ndarray, made: Callable[..., CriticalTime]) -> CriticalTime:
    """A level with its interval, from those of all images and without each group [1 + GROUPS]."""
    at = float(passed[0])
    if not 0 < at < math.inf:
        return made(None, reason="it is passed at no level")
    if not (np.isfinite(passed).all() and (passed > 0).all()):
        return made(NoiseLevel(at), reason="without some of the images it is passed at no level")
    low, high = (NoiseLevel(math.exp(end)) for end in jackknife(math.log(at), np.log(passed[1:])))
    return made(NoiseLevel(at), low, high, interval="jackknife")


def _row(name: str, classes: Classes, measured: Arrays, steps: Schedule) -> Values:
    """What a record says of an attribute."""
    sigma, right, of, present, free = (measured[k] for k in ("sigma", "right", "of", "present", "free"))
    counts = of.sum(0)
    # of all images, and without each group
    rights, ofs = (np.concatenate([v.sum(0)[None], v.sum(0) - v]) for v in (right, of))
    accuracy = (rights / np.maximum(ofs, 1)[..., None]).mean(1)
    clean = accuracy[:, :CLEAN].mean(1)
    exact = balanced_share(right[:, :, :CLEAN].mean(2).sum(0), np.maximum(counts, 1))  # without errors no group differs
    low, high = jackknife(float(clean[0]), clean[1:])
    low, high = min(max(0.0, low), exact["low"]), max(min(1.0, high), exact["high"])
    made = partial(CriticalTime, criterion="free-entropy", source="arXiv:2602.04404, E[L] = Std[L]")
    return {
        "attribute": name,
        "classes": [classes.names[c] for c in present],
        "counts": counts.tolist(),
        "share": float(counts[-1] / counts.sum()),
        **view(_halfway(sigma, accuracy, 1 / len(present)), steps),
        "free_entropy": view(_jackknifed(np.exp(free), made), steps),
        "accuracies": {"sigma": sigma.tolist(), "value": accuracy[0].tolist()},
        "balanced_accuracy": {"value": float(clean[0]), "low": low, "high": high},
        "resolved": bool(clean[0] >= RESOLVED),
    }
