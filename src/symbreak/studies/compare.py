"""The whole flow in one readable function: data and network -> measured late start.

batches -> moments -> speciation level -> late starts -> images -> features -> distances -> `Record`.

For every sampler and number of network calls four columns are measured at equal calls on the same seeds:
the standard start with its best spacing, the Gaussian late start at the spectral speciation level, the
Gaussian late start at the best level of a small sweep (spacing and level are chosen on other seeds than
those reported), and training images noised to that level, the best any law could do there.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from symbreak.data.held_out import HeldOut, held_out
from symbreak.data.images import describe
from symbreak.data.readers import images
from symbreak.laws import Gaussian
from symbreak.metrics import distance, extractor, features, floor
from symbreak.metrics.memorization import nearest_summary
from symbreak.metrics.reference import statistics
from symbreak.moments.one_pass import Moments
from symbreak.networks.denoiser import fingerprint
from symbreak.networks.families import denoiser
from symbreak.networks.loading import load_pipeline, refuse_conditional, weights_hash
from symbreak.networks.samplers import scheduler
from symbreak.noise import NoiseLevel, generator, schedule
from symbreak.phases.speciation import speciation_time
from symbreak.report.record import Record
from symbreak.runtime.files import InputError, output_folder
from symbreak.runtime.plain import versions
from symbreak.runtime.run import Blocks, Run
from symbreak.start.fit import late_start
from symbreak.start.grids import standard_starts, steps_for
from symbreak.start.late_start import LateStart, standard_start
from symbreak.start.sample import generate
from symbreak.studies.evaluate import default_extractor
from symbreak.studies.findings import png_row, spectral_times

__all__ = ["Study", "run"]

SAMPLERS = ("ddpm", "ddim", "pndm", "dpm++2m", "dpm++2m-karras")
SELECTION_SEED = 1_000_000  # choices are made on seeds from here on, reports on seeds from 0 on
GRID = 10  # images of a sample grid
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Study:
    """What to measure.

    Attributes:
        data: what `images` takes; the training images.
        model: what `load_pipeline` takes.
        holdout: images to measure against; by default the other half of ``data``.
        samplers, calls: rows of the table; calls are network calls (NFE), not steps.
        samples: images a cell, split into ``repeats``.
        selection: images for choosing spacing and level.
        sweep: start levels tried, as multiples of the speciation sigma.
        value_range, skip_bad, classes, pad: how the data are opened, see `images`.
        features: extractor name; ``None`` takes the bundled one for the digits, else pixels.
        micro_batch: fixed size of every network call.
        reference_calls: calls of the standard DDIM run that stands for the network at its best; 0 leaves it out.
        quick: a smoke run, marked as no evidence.
    """

    data: str = "digits"
    model: str = "digits"
    holdout: str | None = None
    samplers: tuple[str, ...] = SAMPLERS
    calls: tuple[int, ...] = (3, 5, 10)
    samples: int = 1000
    repeats: int = 5
    selection: int = 300
    sweep: tuple[float, ...] = (0.35, 0.6, 1.0, 1.7, 3.0)
    features: str | None = None
    value_range: tuple[float, float] | None = None
    skip_bad: bool = False
    classes: tuple[str, ...] | None = None
    pad: int | None = None
    micro_batch: int = 200
    reference_calls: int = 100
    quick: bool = False

    def smoke(self) -> Study:
        """The same study, small enough for a minute."""
        return replace(
            self,
            samples=50,
            repeats=5,
            selection=50,
            sweep=(0.6, 1.0, 1.7),
            micro_batch=50,
            reference_calls=0,
            quick=True,
        )


def run(
    study: Study,
    out: str | Path | None = None,
    progress: Progress | None = None,
    pipeline: Any = None,
    memory: int = 2**30,
) -> Record:
    """Run a study.

    Args:
        study: what to measure.
        out: folder for ``record.json`` and, while it runs, for the finished cells: the same call goes
            on after an interruption and ends with the same record.
        progress: called with (stage, done, total).
        pipeline: the network that ``study.model`` names where it is loaded already, for another device or precision.
        memory: bytes to hold images in and to work in; more images go into files without a name, in ``out`` or where
            temporary files are. Results do not depend on it.

    Returns:
        The `Record`; it is also saved where ``out`` is given.

    Raises:
        InputError: for data, networks and settings that do not fit each other.
    """
    tell = progress or (lambda stage, done, total: None)
    folder = None if out is None else output_folder(out)
    began = time.perf_counter()
    timings: dict[str, float] = {}

    def lap(stage: str, since: float) -> None:
        timings[stage] = timings.get(stage, 0.0) + time.perf_counter() - since

    # Data and network, checked against each other before any work.
    if study.samples < 2 * study.repeats or study.repeats < 1:
        raise InputError(f"{study.samples} samples in {study.repeats} repeats; expected at least 2 samples a repeat.")
    parts = _data(study)
    train, test = parts.train, parts.test
    pipe = load_pipeline(study.model) if pipeline is None else pipeline
    refuse_conditional(pipe, study.model)
    network = denoiser(pipe.unet, pipe.scheduler)
    if tuple(network.shape) != train.shape:
        raise InputError(
            f"the network {study.model} makes images of {network.shape}, but the data are {train.shape}. Resize the "
            "data or choose another network."
        )
    base = {name: scheduler(name, like=pipe.scheduler) for name in study.samplers}
    mark = time.perf_counter()
    moments = Moments.fit(train)
    law = Gaussian(moments)
    spectral = speciation_time(moments)
    if spectral.level is None:
        raise InputError(f"{train.name} has no spectral speciation level: {spectral.reason} A study needs one.")
    phases = {"schedule": type(pipe.scheduler).__name__, **spectral_times(train, schedule(pipe.scheduler), moments)}
    lap("moments", mark)

    mark = time.perf_counter()
    extract = extractor(study.features or default_extractor(train), train, run=Run(folder, memory // 2))
    reference = statistics(extract, test, rows=0).whole
    real = statistics(extract, train, rows=max(study.samples, study.selection * study.repeats))
    per_repeat = study.samples // study.repeats
    ground, choosing_floor = (
        floor(real.rows, reference, size, study.repeats, extract.name, real.whole)
        for size in (per_repeat, study.selection)
    )
    lap("features", mark)

    settings = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(study).items()}
    weights, packages = weights_hash(pipe.unet), versions(torch.get_num_threads())
    whole = [settings, train.fingerprint(), test.fingerprint(), weights, fingerprint(network), packages]
    cells = Blocks(folder, {"study": whole})

    def measure(
        start: LateStart, seeds: range, repeats: int, noised: bool = False
    ) -> tuple[dict[str, Any], torch.Tensor]:
        clean = None
        if noised:
            picks = torch.randint(len(train_images), (len(seeds),), generator=generator(11, seeds[0]))
            clean = train_images.at(picks)
        x = generate(pipe.unet, start, seeds, micro_batch=study.micro_batch, clean=clean)
        return distance(features(extract, x), reference, repeats, extract.name).to_dict(), x

    def cell(key: str, start: LateStart, choice: dict[str, Any], noised: bool = False) -> dict[str, Any]:
        """A reported cell: all repeats, on the reporting seeds."""

        def make() -> dict[str, Any]:
            measured, x = measure(start, range(study.samples), study.repeats, noised)
            copies = nearest_summary(x, train_images, None, Run(folder, memory // 2))["samples"]
            return {
                **choice,
                **_start_dict(start),
                "distance": measured,
                "neighbours": copies,
                "grid": png_row(x[:GRID]),
            }

        result: dict[str, Any] = cells.value(key, make)
        return result

    def choose(key: str, start: LateStart) -> float:
        """A candidate's distance on the selection seeds."""
        seeds = range(SELECTION_SEED, SELECTION_SEED + study.selection)
        value: float = cells.value(key, lambda: measure(start, seeds, 1)[0]["pooled"])
        return value

    # Every start is built before the first image, so that what cannot be done is refused at once.
    plans = [
        _plan(sampler, full, calls, law, spectral.level, study.sweep)
        for sampler, full in base.items()
        for calls in study.calls
    ]
    reading = partial(tell, "images")
    train_images, held_images = (data.shards(memory // 4, folder, reading) for data in (train, test))
    rows: list[dict[str, Any]] = []
    tell("table", 0, len(plans))
    for plan in plans:
        name = f"{plan.sampler}/{plan.calls}"
        mark = time.perf_counter()
        standard: dict[str, float] = {}
        for spacing, start in plan.standard.items():
            twin = next((k for k in standard if _same_grid(plan.standard[k], start)), None)
            standard[spacing] = choose(f"choose/{name}/{spacing}", start) if twin is None else standard[twin]
        swept = {f: choose(f"choose/{name}/{f}", start) for f, start in plan.late.items()}
        spacing, factor = min(standard, key=standard.__getitem__), min(swept, key=swept.__getitem__)
        lap("choosing", mark)
        mark = time.perf_counter()
        row = {
            "sampler": plan.sampler,
            "calls": plan.calls,
            "steps": plan.late[1.0].steps,
            "standard": cell(f"{name}/standard", plan.standard[spacing], {"spacing": spacing}),
            # Cells are kept by factor: where the speciation level wins the sweep, the two are one.
            "spectral": cell(f"{name}/late/1.0", plan.late[1.0], {"factor": 1.0}),
            "best": cell(f"{name}/late/{factor}", plan.late[factor], {"factor": factor}),
            "noised": cell(f"{name}/noised", plan.late[factor], {"factor": factor}, noised=True),
            "sweep": [
                {"sigma": plan.late[f].level.sigma, "factor": f, "pooled": v, "samples": study.selection}
                for f, v in swept.items()
            ],
            "spacings": standard,
        }
        rows.append(row)
        lap("sampling", mark)
        tell("table", len(rows), len(plans))
    best_network = None
    if study.reference_calls:
        mark = time.perf_counter()
        tell("reference", 0, 1)
        start = standard_start(scheduler("ddim", like=pipe.scheduler), study.reference_calls, "trailing")
        best_network = cell("reference", start, {"sampler": "ddim"})
        tell("reference", 1, 1)
        lap("reference", mark)

    content = {
        "data": describe(train),
        "held_out": parts.to_dict(),
        "network": {
            "source": study.model,
            "weights": weights,
            "parameters": sum(p.numel() for p in pipe.unet.parameters()),
            "prediction": network.prediction,
            "scheduler": type(pipe.scheduler).__name__,
            "sigma_range": list(network.sigma_range),
        },
        "extractor": {"name": extract.name, "held_out_accuracy": getattr(extract, "accuracy", None)},
        "phases": {
            k: phases[k]
            for k in (
                "schedule",
                "eigenvalues",
                "eigenvalues_low",
                "eigenvalues_high",
                "speciation",
                "ladder",
                "total_variance",
            )
        },
        "floor": ground.to_dict(),
        "selection_floor": choosing_floor.to_dict(),
        "floor_neighbours": nearest_summary(held_images, train_images, None, Run(folder, memory // 2))["samples"],
        "reference": best_network,
        "rows": rows,
        "real_grid": png_row(held_images.at(torch.arange(min(GRID, len(test))))),
        "smoke": study.quick,
    }
    lap("all", began)
    record = Record("study", settings, content, packages, timings)
    if folder is not None:
        record.save(folder)
        cells.close()
    return record


def _data(study: Study) -> HeldOut:
    options: dict[str, Any] = {
        "value_range": study.value_range,
        "skip_bad": study.skip_bad,
        "classes": study.classes,
        "pad": study.pad,
    }
    holdout = None if study.holdout is None else images(study.holdout, **options)
    return held_out(images(study.data, **options), holdout, share=0.5)


@dataclass(frozen=True)
class _Plan:
    """All starts of one row of the table; each spends the row's network calls."""

    sampler: str
    calls: int
    standard: dict[str, LateStart]  # by spacing
    late: dict[float, LateStart]  # by level, as a multiple of the speciation sigma; 1.0 is always there


def _plan(sampler: str, full: Any, calls: int, law: Gaussian, level: NoiseLevel, sweep: tuple[float, ...]) -> _Plan:
    steps = steps_for(full, calls, sampler)
    standard = standard_starts(full, steps)
    # A sweep goes below the spectral level on purpose: no check.
    late = {f: late_start(full, law, steps, at=NoiseLevel(level.sigma * f), check=False) for f in sorted({1.0, *sweep})}
    spent = {s.calls for s in (*standard.values(), *late.values())}
    if spent != {calls}:
        raise InputError(f"{sampler} spends {sorted(spent)} network calls at different levels; expected {calls}.")
    return _Plan(sampler, calls, standard, late)


def _start_dict(start: LateStart) -> dict[str, Any]:
    return {"level": start.level.to_dict(), "calls": start.calls, "steps": start.steps}


def _same_grid(a: LateStart, b: LateStart) -> bool:
    def grid(s: LateStart) -> list[float]:
        sigmas = getattr(s.scheduler, "sigmas", None)
        own = [] if sigmas is None else np.asarray(sigmas, dtype=float).tolist()
        return [float(t) for t in s.scheduler.timesteps] + own + [float(s.scheduler.init_noise_sigma)]

    # Schedulers without sigmas step differently for equal timesteps, so only grids with sigmas are compared.
    return hasattr(a.scheduler, "sigmas") and grid(a) == grid(b)
