"""Which law is the right start? Many starts at the same levels, sampler and number of network evaluations.

From white noise to the noised data themselves, on the same seeds. Distances are Fréchet distances in named features to
held-out images; their intervals are jackknives over the repeats and parts of the reference.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from symbreak.data.images import Images
from symbreak.laws import Gaussian, PrincipalMixture
from symbreak.laws.law import Transports
from symbreak.laws.simple import Ball, PowerMap, WhiteNoise, diagonal, isotropic
from symbreak.metrics import features
from symbreak.moments.one_pass import Moments
from symbreak.networks.denoiser import Denoiser, Denoises
from symbreak.networks.samplers import scheduler
from symbreak.networks.types import Pipeline
from symbreak.noise import NoiseLevel, generator
from symbreak.report.record import Record
from symbreak.runtime.plain import Values
from symbreak.runtime.run import Run, renamed
from symbreak.start.fit import late_start
from symbreak.start.grids import standard_starts, steps_for
from symbreak.studies.measure import NEAREST, Measure, compared, pipeline_of, recorded

__all__ = ["NOISED", "candidate_starts", "compare_starts"]

NOISED = "the data, noised"


def candidate_starts(
    data: Images, clusters: int | None = None, size: int | None = None, modes: int = 16, seed: int = 0
) -> Values:
    """Starts to compare, from the one that knows nothing to mixtures, by name.

    Args:
        data: images to fit on.
        clusters: of the cluster mixture; by default one for 20 images, at most 60.
        size: cosines a side of the low-frequency Gaussian, which pictures have; by default half of a side, at most 8.
        modes: whose skewness and kurtosis the learned map matches.
        seed: of the clustering.
    """
    moments = Moments.fit(data)
    gaussian = Gaussian(moments)
    k = min(60, max(2, len(data) // 20)) if clusters is None else int(clusters)
    starts: Values = {
        "white noise": WhiteNoise(data.shape),
        "ball": Ball(isotropic(moments)),
        "diagonal Gaussian": diagonal(moments),
        **_low_frequency(data, size),
        "full Gaussian": gaussian,
        "ellipsoid": Ball(gaussian),
        "learned map": PowerMap.fit(data, gaussian, modes),
    }
    if data.labels is not None and len(data.labels.unique()) > 1:
        starts["class mixture"] = PrincipalMixture.fit(data, labels=True, gaussian=gaussian, seed=seed)
    starts["cluster mixture"] = PrincipalMixture.fit(data, components=k, gaussian=gaussian, seed=seed)
    return starts


def _low_frequency(data: Images, size: int | None) -> Values:
    """The Gaussian of the low frequencies of pictures; none of other samples."""
    if len(data.shape) != 3:
        return {}
    side = min(8, data.shape[1] // 2) if size is None else int(size)
    return {"low-frequency Gaussian": Gaussian.low_frequency(data, size=side)}


@renamed(**{k: f"measure=sb.Measure({k}=...)" for k in ("extract", "samples", "repeats", "micro_batch")})
def compare_starts(
    data: Images,
    pipeline: Pipeline | Denoises | Denoiser,
    sampler: str = "dpm++2m",
    calls: Sequence[int] = (3, 5, 10),
    levels: Sequence[float] | None = None,
    *,
    holdout: Images,
    measure: Measure,
    starts: Mapping[str, Transports] | None = None,
    run: Run | None = None,
) -> Record:
    """Many starts at the same levels, with the same sampler, calls and seeds.

    Args:
        data, pipeline, holdout, measure, run: as for `sensitivity`.
        sampler: name of `scheduler`; calls: network evaluations an image.
        levels: start levels sigma; by default .35, 1 and 3 times the data's largest standard deviation.
        starts: by name, anything with ``.transport``; by default `candidate_starts`. Training images noised to the
            level are always added: the most that any law could give there, and with copies of them for free.

    Returns:
        A `Record` of kind ``"starts"``: a row a start, level and number of calls, with distance, precision, recall,
        class entropy in bits (where the extractor classifies) and nearest training images, each with its interval; the
        standard starts; and the same of real images: training images, but held-out ones for the nearest.

    Raises:
        InputError: as `sensitivity`.
    """
    pipeline = pipeline_of(pipeline, data)
    comparison, settings = compared(data, holdout, pipeline, measure, run or Run())
    run, quality = comparison.run.named("cells"), comparison.quality
    laws = {**(candidate_starts(data) if starts is None else starts)}
    scale = math.sqrt(float(Moments.fit(data).eigh[0][0]))
    sigmas = np.unique(scale * np.array([0.35, 1.0, 3.0]) if levels is None else np.array(levels, dtype=float))
    full = scheduler(sampler, like=pipeline.scheduler)
    plans = [(n, steps_for(full, n, sampler)) for n in calls]
    total, done, rows, standard = len(plans) * (1 + len(sigmas) * (1 + len(laws))), 0, [], []
    for n, steps in plans:
        spaced = standard_starts(full, steps)
        spacing, _ = comparison.choose(spaced)
        standard.append({"calls": n, "spacing": spacing, **comparison.cell(spaced[spacing], quality)})
        run.tell(done := done + 1, total)
        for sigma in map(float, sigmas):
            for name, law in {**laws, NOISED: WhiteNoise(data.shape)}.items():
                start = late_start(full, law, steps, at=NoiseLevel(sigma), check=False)
                cell = comparison.cell(start, quality, noised=name == NOISED)
                rows.append({"start": name, "calls": n, "asked": sigma, **cell})
                run.tell(done := done + 1, total)
    # Training images stand for samples, held-out images for what is near without having been copied.
    order, others = (torch.randperm(len(y), generator=generator(63, i)) for i, y in enumerate((data, holdout)))
    x = comparison.train.at(order[: len(comparison.seeds)])
    unseen = holdout.take(others[:NEAREST].numpy(), "some").tensor()
    real = quality(x, features(measure.extract, x), unseen)
    settings |= {"sampler": sampler, "calls": list(calls), "levels": sigmas.tolist(), "starts": list(laws)}
    content = {"rows": rows, "standard": standard, "about": {k: repr(v) for k, v in laws.items()}}
    return recorded("starts", comparison, data, holdout, settings, {**content, "real": {**real, "images": len(x)}})
