"""The whole flow in one readable file: data and network -> late starts measured against standard starts.

batches -> moments -> speciation level -> late starts -> images -> features -> distances -> `Record`.

For every sampler and number of network evaluations (NFE) five columns are measured at equal NFE on the same seeds:
the standard start on its best grid and spacing, the Gaussian late start at the spectral speciation level, the
Gaussian late start at the best level of a small sweep on the best grid (grid, spacing and level are chosen on other
seeds than those reported), training images noised to that level, the best any law could do there, and the start that
chooses itself (`fit_start`): law, level and grid, without sampling the network. All but the second may take the same
grids.

A guided network is sampled guided in every cell. Evaluations of both branches count: a start takes as many steps as the
row's NFE allow it. Laws, levels and grids are chosen for the network as it is, as `evaluate` does.

Of a latent network laws, levels and samples are latents; features, copies and pictures are of decoded samples.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch

from symbreak.data.held_out import HeldOut, held_out
from symbreak.data.images import Images, describe
from symbreak.data.samples import opened
from symbreak.data.shape import to_fit
from symbreak.laws import Gaussian
from symbreak.metrics import extractor, floor
from symbreak.metrics.frechet import difference, ratio
from symbreak.metrics.memorization import nearest_summary
from symbreak.metrics.reference import statistics
from symbreak.moments.one_pass import Moments
from symbreak.networks.denoiser import of_network
from symbreak.networks.families import NetworkDenoiser, denoises
from symbreak.networks.guidance import Guided
from symbreak.networks.samplers import scheduler
from symbreak.networks.types import Network, Pipeline, Scheduler
from symbreak.noise import NoiseLevel, generator, schedule
from symbreak.phases.speciation import speciation_time
from symbreak.report.record import Record
from symbreak.report.verdict import sentences
from symbreak.runtime.files import InputError
from symbreak.runtime.identity import identity_of, of_data, unrepeatable
from symbreak.runtime.plain import Values, plain, versions
from symbreak.runtime.run import Run, renamed
from symbreak.start.classes import Classes
from symbreak.start.cut_schedule import check_unclipped
from symbreak.start.fit import CHOOSERS, FEWEST, candidate_laws, late_start
from symbreak.start.grids import grids, standard_starts, steps_for
from symbreak.start.late_start import LateStart, law_in_words, standard_start
from symbreak.start.loading import classes_for, load_pipeline
from symbreak.start.sample import evaluations, most_steps
from symbreak.studies.diagnosis import spectral_times
from symbreak.studies.evaluate import REFERENCE_PARTS, default_extractor
from symbreak.studies.measure import SELECTION_SEED, Comparison, pipeline_of
from symbreak.studies.pictures import png_row, shown

__all__ = ["SAMPLERS", "Study", "run"]

SAMPLERS = ("ddpm", "ddim", "pndm", "dpm++2m", "dpm++2m-karras")
# Names and ways of reading: their content counts.
SPELLED = ("data", "model", "holdout", "features", "value_range", "skip_bad", "classes", "pad", "scale")
GRID = 10  # images of a sample grid
ENDS = ("value", "low", "high")
PHASES = ("schedule", "eigenvalues", "eigenvalues_low", "eigenvalues_high", "speciation", "ladder", "total_variance")


@dataclass(frozen=True)
class Study:
    """What to measure.

    Attributes:
        data: what `images` takes; the training images.
        model: what `load_pipeline` takes.
        holdout: images to measure against; by default the other half of ``data``.
        samplers, calls: rows of the table; calls are network evaluations (NFE), not steps.
        samples: images a cell, split into ``repeats``.
        selection: images for choosing spacing and level.
        sweep: start levels tried, as multiples of the speciation sigma; by default about those that `fit_start` tries.
        value_range, skip_bad, classes, pad, size, crop, mode, labels, split, layout, scale: how the data are opened,
            see `images` and `samples`.
        features: extractor name; ``None`` takes the bundled one for the digits, else pixels.
        micro_batch: fixed size of every network evaluation.
        reference_calls: NFE of a standard DDIM run that is measured for comparison; 0 leaves it out.
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
    sweep: tuple[float, ...] = (0.125, 0.25, 0.5, 1.0, 2.0, 3.5)
    features: str | None = None
    value_range: tuple[float, float] | None = None
    skip_bad: bool = False
    classes: tuple[str, ...] | None = None
    pad: int | None = None
    micro_batch: int = 200
    reference_calls: int = 100
    quick: bool = False
    size: int | None = None
    crop: int | str | None = None
    mode: str | None = None
    labels: str | None = None
    split: str | None = None
    layout: str | None = None
    scale: str | None = None

    def smoke(self) -> Study:
        """The same study, small enough for a minute."""
        return replace(
            self,
            samples=50,
            repeats=5,
            selection=50,
            sweep=(0.25, 0.5, 1.0, 2.0),
            micro_batch=50,
            reference_calls=0,
            quick=True,
        )


@renamed()
def run(
    study: Study,
    pipeline: Pipeline | Guided | None = None,
    run: Run | None = None,
    classes: Classes | None = None,
    identity: Values | None = None,
) -> Record:
    """Run a study.

    Args:
        study: what to measure.
        pipeline: the network that ``study.model`` names where it is loaded already, for another device or precision;
            or `guided`; a latent one has ``encode`` and ``decode``, see `LatentPipeline`.
        run: its folder gets ``record.json`` and, while it runs, the finished cells: the same call goes on after an
            interruption and ends with the same record. Images beyond its memory go into files without a name.
        classes: of a class-conditional network, which class every seed has; by default the data's.
        identity: what the record says of guidance and classes beside scale and window, as plain values.

    Returns:
        The `Record`; it is also saved where the run has a folder.

    Raises:
        InputError: for data, networks and settings that do not fit each other.
    """
    if isinstance(pipeline, str | Path):
        raise InputError(f"run(study, {str(pipeline)!r}) is now run(study, run=sb.Run({str(pipeline)!r})).")
    run = (run or Run()).taken()
    with run.timed("all"):
        everything, parts, seen, pipe, plans, phases = _prepared(study, pipeline, classes, run)
        classes = classes_for(pipe, study.model, parts.train, classes)
        sampling = _sampling(pipe.unet, classes, identity) | getattr(pipe, "about", {})
        train, test = parts.train, parts.test
        network = NetworkDenoiser(pipe.unet, pipe.scheduler)
        with run.timed("features"):
            extract = extractor(study.features or default_extractor(train), train, run=run.share(1 / 2))
            reference = statistics(extract, test, groups=max(1, min(REFERENCE_PARTS, len(test) // 2)), rows=0).whole
            real = statistics(extract, train, rows=max(study.samples, study.selection * study.repeats))
            floors = {
                name: floor(real.rows, reference, size, study.repeats, extract.name, real.whole).to_dict()
                for name, size in (("floor", study.samples // study.repeats), ("selection_floor", study.selection))
            }
        settings = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(study).items()}
        of, packages = of_network(network, pipe.scheduler), versions(torch.get_num_threads())
        decides = {
            "data": of_data(train),
            "holdout": of_data(test),
            "network": of,
            "features": {"name": extract.name, **(extract.decides(train.shape) or unrepeatable(extract.name))},
            **{k: v for k, v in settings.items() if k not in SPELLED},
            **sampling,
        }
        run = run.identified(identity_of("study", **decides))
        x, real_images = (d.shards(run.share(1 / 4).named("images")) for d in (train, test))
        reported, choosing = range(study.samples), range(SELECTION_SEED, SELECTION_SEED + study.selection)
        z = x if seen is train else seen.shards(run.share(1 / 4).named("latents"))
        comparison = Comparison(
            pipe.unet, extract, reference, z, reported, choosing, study.repeats, study.micro_batch, run, stream=11
        )
        comparison.units, comparison.decode = train.units, getattr(pipe, "decode", None)
        comparison.classes, comparison.labels = classes, None if classes is None else train.labels
        comparison.searched = None if train is everything is seen else everything
        with run.timed("laws") as part:
            part.tell(0, 1)
            chooser = _chooser(study, pipe, seen, classes is not None)
            part.tell(1, 1)
        rows = _table(study, plans, comparison, chooser)
        best = _many_evaluations(study, pipe, comparison) if study.reference_calls else None
        content = {
            "data": {**describe(train), "source": study.data},
            "held_out": parts.to_dict(),
            "network": {
                "source": study.model,
                "weights": of["weights"],
                "parameters": sum(p.numel() for p in pipe.unet.parameters()),
                "prediction": network.prediction,
                "scheduler": type(pipe.scheduler).__name__,
                "sigma_range": list(network.sigma_range),
            },
            "extractor": {"name": extract.name, "held_out_accuracy": extract.to_dict()["held_out_accuracy"]},
            "phases": {k: phases[k] for k in PHASES},
            **floors,
            "floor_neighbours": nearest_summary(real_images, x, None, run.share(1 / 2))["samples"],
            "reference": best,
            "rows": rows,
            "real_grid": png_row(
                real_images.at(torch.randperm(len(test), generator=generator(27, 0))[: shown(train.shape, GRID)]),
                train.units,
            ),
            "smoke": study.quick,
            **({"sampling": sampling} if sampling else {}),
        }
    content["verdict"] = sentences("study", content)
    record = Record("study", settings, content, packages, run.timings)
    if run.folder is not None:
        record.save(run.folder)
        run.close()
    return record


def _many_evaluations(study: Study, pipe: Pipeline, comparison: Comparison) -> Values:
    """What the network gives with ``reference_calls`` evaluations of DDIM from the standard start."""
    with comparison.run.timed("reference") as part:
        part.tell(0, 1)
        full = scheduler("ddim", like=pipe.scheduler)
        start = most_steps(lambda n: standard_start(full, n, "trailing"), pipe.unet, study.reference_calls, "ddim")
        cell = _cell(comparison, start, {"sampler": "ddim"})
        part.tell(1, 1)
    return cell


def _sampling(unet: Network, classes: Classes | None, identity: Values | None) -> Values:
    """What the record says of classes that were named, and of guidance; nothing where there is neither."""
    guidance = getattr(unet, "guidance", None)
    named = {} if classes is None or classes.shares else {"classes": classes.to_dict()}
    if guidance is None:
        return named
    return {**named, "guidance": dict(plain({**(identity or {}).get("guidance", {}), **guidance}))}


def _prepared(
    study: Study, pipeline: Pipeline | Guided | None, classes: Classes | None, run: Run
) -> tuple[Images, HeldOut, Images, Pipeline, list[_Plan], Values]:
    """All data, their halves, the first as the network sees it, the network, every start and the spectral times.

    What cannot be done raises an error before the first image.
    """
    for what, values in (("sampler", study.samplers), ("number of network evaluations", study.calls)):
        if len(set(values)) < len(values):  # rows would be counted twice
            raise InputError(f"{', '.join(map(str, values))}: a {what} comes twice; expected each once.")
    if study.samples < 2 * study.repeats or study.repeats < 1:
        raise InputError(f"{study.samples} samples in {study.repeats} repeats; expected at least 2 samples a repeat.")
    names = ("value_range", "skip_bad", "classes", "pad", "size", "crop", "mode", "labels", "layout")
    options: Values = {name: getattr(study, name) for name in names}
    everything = opened(study.data, study.scale, **options, split=study.split)
    like = study.scale if everything.units is None else everything
    holdout = None if study.holdout is None else opened(study.holdout, like, **options)
    parts = held_out(everything, holdout, share=0.5)
    train = parts.train
    pipe = load_pipeline(study.model) if pipeline is None else pipeline_of(pipeline, train)
    classes_for(pipe, study.model, train, classes)
    shape, train = NetworkDenoiser(pipe.unet, pipe.scheduler).shape, getattr(pipe, "encode", lambda d: d)(train)
    if tuple(shape) != train.shape:
        raise InputError(
            f"the network {study.model} makes {train.noun} of {shape}, but the data are {train.shape}. "
            f"{to_fit(train.shape, tuple(shape))}, or choose another network."
        )
    base = {name: scheduler(name, like=pipe.scheduler) for name in study.samplers}
    for full in base.values() if train.units is not None else ():
        check_unclipped(full, f"the samples of {train.name}")
    with run.timed("moments"):
        moments = Moments.fit(train)
        law, spectral = Gaussian(moments), speciation_time(moments)
        if spectral.level is None:
            raise InputError(f"{train.name} has no spectral speciation level: {spectral.reason} A study needs one.")
        phases = {"schedule": type(pipe.scheduler).__name__, **spectral_times(train, schedule(pipe.scheduler), moments)}
    plans = [
        _plan(sampler, full, calls, law, spectral.level, study.sweep, pipe.unet)
        for sampler, full in base.items()
        for calls in study.calls
    ]
    return everything, parts, train, pipe, plans, phases


Chooser = Callable[["_Plan"], LateStart]


def _chooser(study: Study, pipe: Pipeline, train: Images, classes: bool) -> Chooser:
    """What gives the start that chooses itself, as `fit_start` does; the laws are fitted once for all rows."""
    parts = held_out(train, None, min(0.2, CHOOSERS / len(train)), fewest=FEWEST, bundled=False)
    guide = _guided(pipe.unet)
    laws = candidate_laws(parts.train)
    network = denoises(pipe.unet, pipe.scheduler) if guide is None else guide.conditional
    some = parts.test.subset(min(len(parts.test), max(FEWEST, study.selection)))

    def choose(plan: _Plan) -> LateStart:
        labels = some.labels if classes else None
        start = late_start(plan.full, laws, plan.steps, denoiser=network, data=some, labels=labels, check=False)
        if guide is not None:  # law, level and grid stand; steps are left out for the second branch
            start = most_steps(partial(_again, start), guide, plan.calls, plan.sampler)
        return replace(start, pictures=train.units is None)

    return choose


def _guided(unet: Network) -> Guided | None:
    """The guided denoiser that poses as a network, where it is one."""
    source = getattr(unet, "source", None)
    return source if isinstance(source, Guided) else None


def _again(start: LateStart, steps: int) -> LateStart:
    """A start with another number of steps."""
    if steps == start.steps:
        return start
    if start.law is None:
        return standard_start(start.full, steps)
    return late_start(start.full, start.law, steps, at=start.level, check=False)


def _auto(chooser: Chooser, plan: _Plan, comparison: Comparison) -> Values:
    """The column of the start that chooses itself; where none can be chosen, the ``reason`` alone."""
    with comparison.run.timed("auto"):
        try:
            start = chooser(plan)
        except InputError as error:
            return {"reason": str(error)}
    calls = evaluations(comparison.unet, start)
    if calls > plan.calls or (calls < plan.calls and _guided(comparison.unet) is None):
        return {"reason": f"it costs {calls} network evaluations instead of {plan.calls}."}
    about = {"law": None if start.law is None else repr(start.law), "law_in_words": law_in_words(start.law)}
    with comparison.run.timed("sampling"):
        return {**_cell(comparison, start, about), "notes": list(start.notes)}


def _table(study: Study, plans: list[_Plan], comparison: Comparison, chooser: Chooser) -> list[Values]:
    """The rows: spacing and level chosen, then five columns measured."""
    run, rows = comparison.run, []
    table = run.named("table")
    table.tell(0, len(plans))
    for plan in plans:
        with run.timed("choosing"):
            spacing, spacings = comparison.choose(plan.standard)
            (grid, factor), swept = comparison.choose(plan.swept)
        best, picked = plan.swept[grid, factor], {"factor": factor, "level_grid": grid}
        with run.timed("sampling"):
            columns = {
                "standard": _cell(comparison, plan.standard[spacing], {"spacing": spacing}),
                "spectral": _cell(comparison, plan.late[1.0], {"factor": 1.0}),
                "best": _cell(comparison, best, picked),
                "noised": _cell(comparison, best, picked, noised=True),
            }
        sweep = [
            {
                "sigma": plan.swept[g, f].level.sigma,
                "factor": f,
                "level_grid": g,
                "pooled": v,
                "samples": study.selection,
            }
            for (g, f), v in swept.items()
        ]
        steps = plan.late[1.0].steps
        gain = difference(columns["standard"]["distance"], columns["best"]["distance"])
        auto = _auto(chooser, plan, comparison)
        more = {"sweep": sweep, "spacings": spacings, "gain": plain(dict(zip(ENDS, gain)))}
        if "reason" in auto:
            more |= {"auto": None, "no_auto": auto["reason"]}
        else:
            columns["auto"] = auto
        more["gains"] = {
            key: None if times is None else plain(dict(zip(ENDS, times)))
            for key in ("best", "auto")
            if key in columns
            for times in [ratio(columns["standard"]["distance"], columns[key]["distance"])]
        }
        rows.append({"sampler": plan.sampler, "calls": plan.calls, "steps": steps, **columns, **more})
        table.tell(len(rows), len(plans))
    return rows


def _cell(comparison: Comparison, start: LateStart, choice: Values, noised: bool = False) -> Values:
    """A column of the table: what was chosen, the start, its distance, copies and pictures."""

    def more(x: torch.Tensor, _: torch.Tensor) -> Values:
        near = nearest_summary(x, comparison.known, None, comparison.run.share(1 / 2))["samples"]
        return {"neighbours": near, "grid": png_row(x[: shown(x.shape[1:], GRID)], comparison.units)}

    about = {"level": start.level.to_dict(), "steps": start.steps}
    return {**choice, **about, **comparison.cell(start, more, noised=noised)}


@dataclass(frozen=True)
class _Plan:
    """All starts of one row of the table; each spends the row's network evaluations, a guided one as many as it can."""

    sampler: str
    full: Scheduler
    calls: int
    steps: int
    standard: dict[str, LateStart]  # by spacing of the sampler's own grid, or by another grid
    swept: dict[tuple[str, float], LateStart]  # by grid, and by level as a multiple of the speciation sigma

    @property
    def late(self) -> dict[float, LateStart]:
        """The late starts on the sampler's own grid; 1.0 is always there."""
        return {factor: start for (grid, factor), start in self.swept.items() if grid == "own"}


def _plan(
    sampler: str,
    full: Scheduler,
    calls: int,
    law: Gaussian,
    level: NoiseLevel,
    sweep: tuple[float, ...],
    unet: Network | None = None,
) -> _Plan:
    steps = steps_for(full, calls, sampler)
    standard, swept = standard_starts(full, steps), {}
    try:
        offered = grids(full)
    except InputError:  # a learned variance, with which the start that chooses itself can try no grid either
        offered = {"own": full}
    for grid, scheduled in offered.items():
        # A sweep goes below the spectral level on purpose: no check.
        for factor in sorted({1.0, *sweep}):
            with suppress(*(() if grid == "own" else (InputError,))):  # another grid may have too few steps
                at = NoiseLevel(level.sigma * factor)
                swept[grid, factor] = late_start(scheduled, law, steps, at=at, check=False)
        if grid != "own":
            others = standard_starts(scheduled, steps, skip=True)
            standard |= {f"{grid}, {spacing}": start for spacing, start in others.items() if start.calls == calls}
    swept = {(grid, factor): start for (grid, factor), start in swept.items() if grid == "own" or start.calls == calls}
    if _guided(unet) is not None:
        standard = {k: most_steps(partial(_again, s), unet, calls, sampler) for k, s in standard.items()}
        swept = {k: most_steps(partial(_again, start), unet, calls, sampler) for k, start in swept.items()}
        return _Plan(sampler, full, calls, steps, standard, swept)
    spent = {s.calls for s in (*standard.values(), *swept.values())}
    if spent != {calls}:
        raise InputError(f"{sampler} spends {sorted(spent)} network evaluations at different levels; expected {calls}.")
    return _Plan(sampler, full, calls, steps, standard, swept)
