"""When is each attribute decided? The free-entropy level of every attribute of a data set, on one axis.

For an attribute such as Smiling the images with and without it are two Gaussians in the leading principal components,
as `phases` has them for labels; its level is where a noised image with it stands out (E[L] = Std[L]). The interval
leaves out a tenth of the images at a time; the same tenths say how well the two laws tell new images apart, and what is
hardly told apart is marked: its level says little.

Source: arXiv:2602.04404 (free entropy); attributes of faces: arXiv:2305.19693.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from symbreak.critical import CriticalTime
from symbreak.data.images import Images, describe
from symbreak.data.labels import Classes, attributes
from symbreak.intervals import jackknife, mean_interval
from symbreak.laws import Gaussian, PrincipalMixture
from symbreak.laws.clusters import coordinates
from symbreak.metrics.attributes import RESOLVED
from symbreak.noise import NoiseLevel, Schedule, generator, schedule
from symbreak.phases.speciation import speciation_time
from symbreak.report.record import Record
from symbreak.report.verdict import sentences
from symbreak.runtime.errors import InputError
from symbreak.runtime.identity import identity_of, of_data
from symbreak.runtime.plain import Values, versions
from symbreak.runtime.run import Arrays, Run
from symbreak.start.fit import gaussian_law
from symbreak.studies.diagnosis import view

__all__ = ["attribute_levels"]

MODES = 64  # leading components, of those with a variance above 1 % of the largest
GROUPS = 10
FEWEST = 2 * GROUPS  # images of each class
DRAWS = 5000  # of attributes with more than two classes


def attribute_levels(
    data: Images, names: Sequence[str] | None = None, *, seed: int = 0, run: Run | None = None
) -> Record:
    """The level at which each attribute of a data set is decided, with intervals.

    Args:
        data: images of a source with columns of attributes, see `symbreak.data.labels.attributes`.
        names: the attributes; ``None`` takes all that tell two classes apart.
        seed: of the groups of the jackknife and of the shrinkage's folds.
        run: the folder for ``record.json``, and for finished attributes meanwhile; memory of the moments.

    Returns:
        A `Record` of kind ``"attributes"``; its content has ``rows``, one an attribute, highest level first: level with
        interval, share, the level of either class, balanced accuracy, and whether it is resolved.

    Raises:
        InputError: for an attribute that is not there (the names are listed), or with fewer than 20 images in a class.

    >>> import symbreak as sb
    >>> attribute_levels(sb.images("digits"))
    Traceback (most recent call last):
    symbreak.runtime.errors.InputError: digits has no columns of attributes. Expected a parquet file with some, ...
    """
    run, wanted = (run or Run()).taken(), attributes(data, names)
    rare = {name: _fewest(c) for name, c in wanted.items()}
    if names is not None and min(rare.values()) < FEWEST:
        name = min(rare, key=rare.__getitem__)
        raise InputError(
            f"the attribute {name!r} has {rare[name]} images in its rarest class; expected at least {FEWEST}."
        )
    packages, settings = versions(torch.get_num_threads()), {"attributes": names and list(names), "seed": seed}
    run = run.identified(identity_of("attributes", data=of_data(data), names=list(wanted), seed=seed))
    with run.timed("spectrum") as part:
        gaussian = gaussian_law(data)
        part.tell(1, 1)
        variances = gaussian.eigenvalues
        p = min(MODES, int((variances > 0.01 * float(variances[0])).sum()))
        a = coordinates(data, gaussian.moments.mean, gaussian.eigenvectors[:, :p])
    names_ = [name for name in wanted if rare[name] >= FEWEST]
    with run.timed("attributes") as part:
        measured = part.parts("attribute", names_, lambda name: _measured(a, wanted[name], seed), a, seed)
    steps = schedule("ddpm-linear")
    rows = [_row(name, wanted[name], one, steps) for name, one in zip(names_, measured, strict=True)]
    rows.sort(key=lambda row: -(row["level"] or {"sigma": 0.0})["sigma"])
    notes = [
        f"{len(rare) - len(names_)} attributes with fewer than {FEWEST} images in a class are left out: "
        f"{', '.join(n for n in rare if n not in names_)}."
    ] * (len(names_) < len(rare))
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


def _fewest(classes: Classes) -> int:
    """Images of the rarest class that occurs."""
    return int(np.unique(classes.codes[classes.codes >= 0], return_counts=True)[1].min())


def _measured(a: torch.Tensor, classes: Classes, seed: int) -> Arrays:
    """log sigma of all images and without each group, of every class and of the first; right ones by group and class.

    Args:
        a: coordinates of the images [N, p].
        classes: of the images.
    """
    known = classes.codes >= 0
    x, (present, y) = a[torch.from_numpy(known)], np.unique(classes.codes[known], return_inverse=True)
    gaussian = Gaussian.fit([x])
    whole = PrincipalMixture.fit(x, y, leading=x.shape[1], gaussian=gaussian, seed=seed)
    group = torch.randperm(len(x), generator=generator(seed, 71)).numpy() % GROUPS
    levels, right = [_levels(whole, seed)], np.zeros((GROUPS, len(present), 2), np.int64)
    for g in range(GROUPS):
        rest = group != g
        law = PrincipalMixture.fit(
            x[torch.from_numpy(rest)], y[rest], leading=x.shape[1], prior=whole.prior, gaussian=gaussian, seed=seed
        )
        levels.append(_levels(law, seed))
        new = coordinates([x[torch.from_numpy(~rest)]], gaussian.moments.mean, gaussian.eigenvectors)
        # every class counts alike, however rare
        odds = law.inner.component_log_prob(new, 1e-3 * math.sqrt(float(gaussian.eigenvalues[0])))
        said = odds.argmax(1).numpy()
        for c in range(len(present)):
            of = y[~rest] == c
            right[g, c] = int((said[of] == c).sum()), int(of.sum())
    return {"log_sigma": np.array(levels), "right": right, "present": present}


def _levels(law: PrincipalMixture, seed: int) -> list[float]:
    """log sigma of the first class and of every class; -inf where it does not stand out."""
    time = speciation_time(law.inner, "free-entropy", samples=DRAWS, seed=seed)
    each = (time, *getattr(time, "classes", ()))
    return [-math.inf if c.sigma is None else math.log(c.sigma) for c in each]


def _time(log_sigma: np.ndarray) -> CriticalTime:
    """A level with its jackknife interval, from log sigma of all images and without each group [1 + GROUPS]."""
    source, value = "arXiv:2602.04404, E[L] = Std[L]", float(log_sigma[0])
    if not math.isfinite(value):
        reason = "E[L] stays below Std[L] at every level"
        return CriticalTime(None, criterion="free-entropy", source=source, reason=reason)
    if not np.isfinite(log_sigma).all():
        reason = "without some of the images there is no level"
        return CriticalTime(NoiseLevel(math.exp(value)), criterion="free-entropy", source=source, reason=reason)
    low, high = (NoiseLevel(math.exp(end)) for end in jackknife(value, log_sigma[1:]))
    return CriticalTime(NoiseLevel(math.exp(value)), low, high, "free-entropy", source=source, interval="jackknife")


def _row(name: str, classes: Classes, measured: Arrays, steps: Schedule) -> Values:
    """What a record says of an attribute."""
    log_sigma, right, present = (measured[k] for k in ("log_sigma", "right", "present"))
    counts = [int((classes.codes == c).sum()) for c in present]
    each = right[..., 0].sum(0) / np.maximum(right[..., 1].sum(0), 1)
    by_group = np.nanmean(np.where(right[..., 1] > 0, right[..., 0] / np.maximum(right[..., 1], 1), np.nan), axis=1)
    _, low, high = mean_interval(by_group)
    accuracy = float(each.mean())
    return {
        "attribute": name,
        "classes": [classes.names[c] for c in present],
        "counts": counts,
        "share": counts[-1] / sum(counts),
        **view(_time(log_sigma[:, 0]), steps),
        "of_classes": [view(_time(log_sigma[:, 1 + i]), steps) for i in range(len(present))],
        "balanced_accuracy": {"value": accuracy, "low": max(0.0, low), "high": min(1.0, high)},
        "resolved": accuracy >= RESOLVED,
    }
