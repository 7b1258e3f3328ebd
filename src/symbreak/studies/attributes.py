"""When is each attribute decided? The levels of all attributes of a data set, on one axis.

For an attribute such as Smiling the images with and without it are two Gaussians in the leading principal components.

    halfway        where noised images that the laws were not fitted to are told apart by half of what they are without
                   noise: their balanced accuracy is halfway from chance
    free entropy   E[L] = Std[L] for the fitted laws themselves, L their log odds: of two Gaussians of one covariance
                   where 84 % are told apart. It counts their sampling errors as differences, so that rare attributes
                   stand out too early

Intervals leave out a tenth of the images at a time. What is hardly told apart at any level is marked: its levels say
little.

Source: halfway is derived; arXiv:2602.04404 (free entropy); attributes of faces: arXiv:2305.19693.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch

from symbreak.critical import CriticalTime, passing
from symbreak.data.images import Images, describe
from symbreak.data.labels import Classes, attributes
from symbreak.intervals import jackknife
from symbreak.laws import Gaussian, PrincipalMixture
from symbreak.laws.clusters import coordinates
from symbreak.metrics.attributes import FEWEST, RESOLVED, enough
from symbreak.noise import NoiseLevel, Schedule, generator, schedule
from symbreak.phases.speciation import speciation_time
from symbreak.report.record import Record
from symbreak.report.verdict import sentences
from symbreak.runtime.identity import identity_of, of_data
from symbreak.runtime.plain import Values, versions
from symbreak.runtime.run import Arrays, Run
from symbreak.start.fit import gaussian_law
from symbreak.studies.diagnosis import view

__all__ = ["attribute_levels"]

MODES = 64  # leading components
GROUPS = 10
LEVELS, RANGE, CLEAN = 32, (0.003, 3.0), 3  # in units of a whole sample's standard deviation; without noise
DRAWS = 5000  # of attributes with more than two classes


def attribute_levels(
    data: Images, names: Sequence[str] | None = None, *, seed: int = 0, run: Run | None = None
) -> Record:
    """The levels at which each attribute of a data set is decided, with intervals.

    Args:
        data: images of a source with columns of attributes, see `symbreak.data.labels.attributes`.
        names: the attributes; ``None`` takes all that tell two classes apart.
        seed: of the groups of the jackknife and of the shrinkage's folds.
        run: the folder for ``record.json``, and for finished attributes meanwhile; memory of the moments.

    Returns:
        A `Record` of kind ``"attributes"``; its content has ``rows``, one an attribute, highest level first: ``level``
        with interval (halfway), ``free_entropy`` with its own, share, balanced accuracy, and whether it is resolved.

    Raises:
        InputError: for an attribute that is not there (the names are listed), or with fewer than 20 images in a class.

    >>> import symbreak as sb
    >>> attribute_levels(sb.images("digits"))
    Traceback (most recent call last):
    symbreak.runtime.errors.InputError: digits has no columns of attributes. Expected a parquet file with some, ...
    """
    run, wanted = (run or Run()).taken(), attributes(data, names)
    names_ = [name for name, classes in wanted.items() if enough(name, classes, names is not None)]
    packages, settings = versions(torch.get_num_threads()), {"attributes": names and list(names), "seed": seed}
    run = run.identified(identity_of("attributes", data=of_data(data), names=list(wanted), seed=seed))
    with run.timed("spectrum") as part:
        gaussian = gaussian_law(data)
        part.tell(1, 1)
        p = max(1, min(MODES, gaussian.eigenvectors.shape[1], len(data) // GROUPS))
        a = coordinates(data, gaussian.moments.mean, gaussian.eigenvectors[:, :p])
    with run.timed("attributes") as part:
        measured = part.parts("attribute", names_, lambda name: _measured(a, wanted[name], seed), a, seed)
    steps = schedule("ddpm-linear")
    rows = [_row(name, wanted[name], one, steps) for name, one in zip(names_, measured, strict=True)]
    rows.sort(key=lambda row: -(row["level"] or {"sigma": 0.0})["sigma"])
    notes = [
        f"{len(wanted) - len(names_)} attributes with fewer than {FEWEST} images in a class are left out: "
        f"{', '.join(n for n in wanted if n not in names_)}."
    ] * (len(names_) < len(wanted))
    content = {
        "data": describe(data),
        "schedule": "ddpm-linear",
        "modes": p,
        "spectral": view(speciation_time(gaussian), steps),
        "rows": rows,
        "resolved": RESOLVED,
        "notes": notes,
    }
    content["verdict"] = sentences("attributes", content)
    record = Record("attributes", settings, content, packages, run.timings)
    if run.folder is not None:
        record.save(run.folder)
        run.close()
    return record


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
    low, high = jackknife(float(clean[0]), clean[1:])
    made = partial(CriticalTime, criterion="free-entropy", source="arXiv:2602.04404, E[L] = Std[L]")
    return {
        "attribute": name,
        "classes": [classes.names[c] for c in present],
        "counts": counts.tolist(),
        "share": float(counts[-1] / counts.sum()),
        **view(_halfway(sigma, accuracy, 1 / len(present)), steps),
        "free_entropy": view(_jackknifed(np.exp(free), made), steps),
        "accuracies": {"sigma": sigma.tolist(), "value": accuracy[0].tolist()},
        "balanced_accuracy": {"value": float(clean[0]), "low": max(0.0, low), "high": min(1.0, high)},
        "resolved": bool(clean[0] >= RESOLVED),
    }
