"""The command line: each command is a thin face of one function.

Exit codes: 0 done; 2 the input is wrong (one line on stderr); 1 the machine failed; 130 / 143 interrupted.
With ``--json`` stdout holds one JSON object and nothing else; progress always goes to stderr.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors import SafetensorError

from symbreak.cli.options import (
    data_set,
    decisive,
    device_of,
    err,
    fitted,
    given,
    limits,
    loaded,
    memory_size,
    planned,
    refuse_without_network,
    start_dict,
)
from symbreak.report.record import Record
from symbreak.report.tables import out_console, show
from symbreak.runtime.files import InputError
from symbreak.runtime.ranks import joined, lost, rank_of

app = typer.Typer(
    name="symbreak",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Find the moments at which a diffusion model decides, and start sampling there.",
    epilog="Start with: symbreak phases --data digits",
)

DATA = "digits, a folder of images (sub-folders are classes), a .parquet, .npz or .npy file, or a hub id"
Data = Annotated[str, typer.Option("--data", metavar="D", help=DATA)]
Json = Annotated[bool, typer.Option("--json", help="print one JSON object on stdout and nothing else")]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="leave unusable images out and count them")]
Range = Annotated[
    str | None, typer.Option("--range", metavar="LOW,HIGH", help="value range of float arrays, e.g. 0,255")
]
Classes = Annotated[str | None, typer.Option("--classes", metavar="A,B", help="keep only these classes")]
Holdout = Annotated[
    str | None,
    typer.Option("--holdout", metavar="T", help="images to choose a start with (default: a part of D is kept back)"),
]
Clusters = Annotated[int | None, typer.Option("--clusters", metavar="K", help="clusters of a start's mixture law")]
START = "a file of `symbreak fit` (moments, law or start), auto: fitted to --data and chosen, none: white noise"
MICRO = 64
Pad = Annotated[int | None, typer.Option("--pad", metavar="N", help="pad images with black to N x N pixels")]
Device = Annotated[
    str, typer.Option("--device", help="where the network runs: auto (a GPU if there is one), cpu, cuda, cuda:1, ...")
]
Precision = Annotated[str, typer.Option("--precision", help="of the network's calls: fp32, bf16 or fp16 (autocast)")]
Compile = Annotated[bool, typer.Option("--compile", help="put the network through torch.compile")]
Memory = Annotated[str | None, typer.Option("--memory", metavar="SIZE", help="working memory, such as 4GB")]
Weights = Annotated[
    str | None, typer.Option("--weights", metavar="FILE|DIR", help="of inception (file) or dinov2 (folder)")
]
WeightsHash = Annotated[
    str | None, typer.Option("--weights-sha256", metavar="HASH", help="of other Inception weights than FID's")
]
Limit = Annotated[
    int | None, typer.Option("--limit", metavar="N", help="keep only N of the images, spread evenly over the classes")
]


@contextmanager
def _bars() -> Iterator[Callable[[str, int, int], None]]:
    """A progress callback (stage, done, total) that draws bars on stderr."""
    columns = (
        TextColumn("{task.description:>12}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    progress = Progress(*columns, console=err, disable=rank_of()[0] > 0)
    tasks: dict[str, Any] = {}

    def tell(stage: str, done: int, total: int) -> None:
        if not tasks:
            progress.start()  # not before there is something to show: a refused input prints one line only
        if stage not in tasks:
            tasks[stage] = progress.add_task(stage, total=total)
        progress.update(tasks[stage], completed=done, total=total)

    try:
        yield tell
    finally:
        if tasks:
            progress.stop()


def _emit(as_json: bool, value: dict[str, Any], draw: Callable[[], None]) -> None:
    if rank_of()[0]:
        return  # one process speaks for all
    if as_json:
        from symbreak.runtime.plain import plain

        sys.stdout.write(json.dumps(plain(value), sort_keys=True) + "\n")
    else:
        draw()


def _report(folder: Path) -> Path:
    """Draw the record in a folder; of several processes the one that wrote it does."""
    from symbreak.report.html import write_report
    from symbreak.report.record import Record

    path = folder / "report.html"
    return path if rank_of()[0] else write_report(Record.load(folder), path)


@app.command(epilog="Example: symbreak study --data digits --model digits --out build/demo")
def study(
    data: Data = "digits",
    model: Annotated[
        str, typer.Option("--model", metavar="M", help="digits, a diffusers folder or a hub id")
    ] = "digits",
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="folder for record.json and report.html")] = Path(
        "build/study"
    ),
    holdout: Annotated[
        str | None, typer.Option("--holdout", metavar="T", help="images to measure against (default: half of D)")
    ] = None,
    samples: Annotated[int, typer.Option("--samples", help="images a cell, over all repeats")] = 1000,
    repeats: Annotated[int, typer.Option("--repeats", help="repeats for the interval")] = 5,
    samplers: Annotated[str | None, typer.Option("--samplers", metavar="A,B", help="rows of the table")] = None,
    calls: Annotated[str, typer.Option("--calls", metavar="N,N", help="network calls (NFE) of the rows")] = "3,5,10",
    features: Annotated[
        str | None,
        typer.Option("--features", help="digits-classifier, classifier, pixels, FILE.safetensors, module:callable"),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="a smoke run of a minute: no evidence")] = False,
    value_range: Range = None,
    skip_bad: SkipBad = False,
    classes: Classes = None,
    pad: Pad = None,
    memory: Memory = None,
    device: Device = "auto",
    precision: Precision = "fp32",
    compiled: Compile = False,
    as_json: Json = False,
) -> None:
    """Measure the late start against the standard start, at equal network calls, and write a report."""
    from symbreak.runtime.run import Run
    from symbreak.studies.compare_samplers import SAMPLERS, Study
    from symbreak.studies.compare_samplers import run as measure

    placed = (device, precision, compiled)
    run = Run(out, memory_size(memory))
    try:
        numbers = tuple(int(n) for n in calls.split(","))
    except ValueError:
        raise InputError(f"--calls {calls}; expected numbers such as 3,5,10.") from None
    names = SAMPLERS if samplers is None else tuple(samplers.split(","))
    settings = Study(
        data,
        model,
        holdout,
        names,
        numbers,
        samples,
        repeats,
        features=features,
        value_range=limits(value_range),
        skip_bad=skip_bad,
        classes=None if classes is None else tuple(classes.split(",")),
        pad=pad,
    )
    if quick:
        settings = settings.smoke()
    with _bars() as run.progress:
        record = measure(settings, loaded(model, placed), run)
    path = _report(out)
    _emit(as_json, {**record.to_dict(), "report": str(path)}, lambda: show(record, path))


@app.command(
    epilog="Examples: symbreak phases --data digits; symbreak phases --data digits --model digits --out build/phases"
)
def phases(
    data: Data,
    model: Annotated[
        str | None,
        typer.Option("--model", metavar="M", help="digits, a diffusers folder or a hub id; with it the network"),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="also write record.json and report.html; resumable")
    ] = None,
    holdout: Annotated[
        str | None, typer.Option("--holdout", metavar="T", help="images for losses and U-turns (default: a part of D)")
    ] = None,
    classify: Annotated[
        str | None,
        typer.Option(
            "--classify",
            help="digits-classifier, classifier (trained on the labels), FILE.safetensors, module:callable",
        ),
    ] = None,
    clusters: Annotated[
        int | None,
        typer.Option("--clusters", metavar="K", help="classes are K clusters of the images (no labels needed)"),
    ] = None,
    pairs: Annotated[int | None, typer.Option("--pairs", help="pairs of clones (default 300)")] = None,
    steps: Annotated[int | None, typer.Option("--steps", help="sampler steps of a trajectory (default 40)")] = None,
    branches: Annotated[int | None, typer.Option("--branches", help="branch levels of the clones (default 12)")] = None,
    seed: Annotated[int, typer.Option("--seed", help="of all noise")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="about a minute on the digits: wider intervals")] = False,
    value_range: Range = None,
    skip_bad: SkipBad = False,
    classes: Classes = None,
    pad: Pad = None,
    limit: Limit = None,
    memory: Memory = None,
    device: Device = "auto",
    precision: Precision = "fp32",
    compiled: Compile = False,
    as_json: Json = False,
) -> None:
    """When does it decide? Every criterion on one sigma axis, of a data set and, with --model, of a network."""
    from symbreak.metrics import extractor
    from symbreak.runtime.files import output_folder
    from symbreak.studies.diagnose import Effort, diagnose

    placed = (device, precision, compiled)
    refuse_without_network(model, placed)
    if out is not None:
        output_folder(out)
    found = data_set(data, value_range, skip_bad, classes, pad, limit)
    kept = None if holdout is None else data_set(holdout, value_range, skip_bad, classes, pad)
    pipe = None if model is None else loaded(model, placed)
    if classify == "pixels":
        raise InputError(
            "--classify pixels gives no classes; expected a classifier, FILE.safetensors or module:callable."
        )
    given = None if classify is None or classify == "classifier" else extractor(classify)
    given = getattr(given, "function", given)  # a callable may give classes, which are no features
    effort = Effort().quick() if quick else Effort()
    asked: dict[str, Any] = {"pairs": pairs, "steps": steps, "branches": branches}
    with _bars() as tell:
        record = diagnose(
            found,
            pipe,
            holdout=kept,
            classify=given,
            clusters=clusters,
            effort=replace(effort, **{k: v for k, v in asked.items() if v is not None}),
            seed=seed,
            memory=memory_size(memory),
            out=out,
            progress=tell,
        )
    if out is not None:
        _report(out)
    _emit(as_json, record.to_dict(), lambda: show(record, out and out / "report.html"))


@app.command(
    epilog="Examples: symbreak fit --data digits --out build/digits.safetensors; "
    "symbreak fit --data digits --start --model digits --sampler dpm++2m --steps 3 --out build/start.safetensors"
)
def fit(
    data: Data,
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="safetensors file to write")],
    rank: Annotated[
        int | None, typer.Option("--rank", metavar="R", help="leading modes only, by a streaming sketch: large images")
    ] = None,
    start: Annotated[
        bool, typer.Option("--start", help="fit laws and choose a start for a network: law, level and grid")
    ] = False,
    model: Annotated[
        str | None, typer.Option("--model", metavar="M", help="with --start: digits, a diffusers folder or a hub id")
    ] = None,
    sampler: Annotated[str | None, typer.Option("--sampler", help="with --start: ddpm, ddim, dpm++2m, ...")] = None,
    steps: Annotated[int | None, typer.Option("--steps", help="with --start: num_inference_steps")] = None,
    holdout: Holdout = None,
    clusters: Clusters = None,
    value_range: Range = None,
    skip_bad: SkipBad = False,
    classes: Classes = None,
    pad: Pad = None,
    memory: Memory = None,
    device: Device = "auto",
    precision: Precision = "fp32",
    compiled: Compile = False,
    as_json: Json = False,
) -> None:
    """Mean and covariance of a data set in one pass; with --start, a start for a network, ready to sample with."""
    from symbreak.laws import Gaussian
    from symbreak.moments.one_pass import Moments
    from symbreak.phases.speciation import speciation_time
    from symbreak.runtime.files import output_folder

    placed = (device, precision, compiled)
    if out.is_dir():
        raise InputError(f"{out} is a folder; expected a file name such as {out / 'moments.safetensors'}.")
    if not start and (model, sampler, steps, holdout, clusters) != (None,) * 5:
        raise InputError("--model, --sampler, --steps, --holdout and --clusters belong to a start. Add --start.")
    if start and rank is not None:
        raise InputError("--rank came with --start, which decides on the rank itself. Leave one of them out.")
    if start and memory is not None:
        raise InputError("--memory came with --start; it is for moments. Leave one of them out.")
    refuse_without_network(model, placed)
    output_folder(out.parent)
    if start:
        options = (value_range, skip_bad, classes, pad)
        pipe = loaded(given(model, "--model"), placed)
        begin, _ = fitted(data, holdout, clusters, options, pipe, sampler, steps)
        begin.save(out)
        value = {"out": str(out), **start_dict(begin)}
        _emit(as_json, value, lambda: _say_start(begin, f"start: {out}"))
        return
    found = data_set(data, value_range, skip_bad, classes, pad)
    with err.status("one pass over the data" if rank is None else "two passes over the data"):
        moments = Moments.fit(found, rank=rank, memory=memory_size(memory))
    moments.save(out)
    spectrum = moments.spectrum(min(5, moments.dim))
    critical = speciation_time(moments)
    value = {
        "out": str(out),
        "count": moments.count,
        "shape": list(moments.shape),
        "skipped": list(found.skipped),
        "eigenvalues": spectrum.values.tolist(),
        "speciation": critical.to_dict(),
    }
    left = None if rank is None or critical.sigma is None else Gaussian(moments).certificate(critical.sigma)
    if left is not None:
        value["certificate_nats"] = left.nats

    def draw() -> None:
        out_console.print(
            f"{moments.count:,} images of {' x '.join(map(str, moments.shape))}; leading eigenvalues "
            + ", ".join(f"{v:.4g}" for v in spectrum.values)
        )
        level = critical.sigma
        out_console.print(
            "no spectral speciation level" if level is None else f"spectral speciation at sigma {level:.4g}"
        )
        if left is not None:
            out_console.print(left.sentence(), markup=False)
        sys.stdout.write(f"moments: {out}\n")

    _emit(as_json, value, draw)


def _say_start(begin: Any, line: str) -> None:
    out_console.print(begin.explain(), markup=False, highlight=False)
    sys.stdout.write(line + "\n")


@app.command(
    epilog="Example: symbreak sample --model digits --start build/digits.safetensors --steps 5 "
    "--seeds 0-99 --out build/images"
)
def sample(
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="folder for one PNG a seed")],
    model: Annotated[
        str, typer.Option("--model", metavar="M", help="digits, a diffusers folder or a hub id")
    ] = "digits",
    start: Annotated[str, typer.Option("--start", metavar="FILE|auto|none", help=START)] = "none",
    at: Annotated[
        str | None,
        typer.Option(
            "--at", metavar="LEVEL", help="of moments or a law: speciation (default), a step such as 400, sigma=1.5"
        ),
    ] = None,
    sampler: Annotated[
        str | None, typer.Option("--sampler", help="ddpm, ddim, pndm, dpm++2m, dpm++2m-karras (default), ...")
    ] = None,
    steps: Annotated[int | None, typer.Option("--steps", help="num_inference_steps (default: 5)")] = None,
    data: Annotated[str | None, typer.Option("--data", metavar="D", help=f"with --start auto: {DATA}")] = None,
    holdout: Holdout = None,
    clusters: Clusters = None,
    seeds: Annotated[str, typer.Option("--seeds", metavar="A-B", help="one image a seed")] = "0-15",
    value_range: Range = None,
    skip_bad: SkipBad = False,
    classes: Classes = None,
    pad: Pad = None,
    micro_batch: Annotated[int, typer.Option("--micro-batch", help="fixed size of every network call")] = MICRO,
    device: Device = "auto",
    precision: Precision = "fp32",
    compiled: Compile = False,
    as_json: Json = False,
) -> None:
    """Sample images, one a seed, from white noise or from a late start."""
    from symbreak.runtime.files import output_folder
    from symbreak.runtime.run import Run
    from symbreak.start.sample import check, parse_seeds, write_images

    placed = (device, precision, compiled)
    output_folder(out)
    wanted = parse_seeds(seeds)
    options = (value_range, skip_bad, classes, pad)
    fitting = None if start != "auto" else (given(data, "--data"), holdout, clusters, options)
    if fitting is None and (data, holdout, clusters, *options) != (None, None, None, None, False, None, None):
        raise InputError("--data and its options, --holdout and --clusters belong to --start auto. Add it.")
    begin, unet = planned(model, start, at, sampler, steps, placed, fitting)
    check(unet, begin, wanted, micro_batch)
    settings = decisive(model, start, unet, begin, placed, micro_batch)
    with _bars() as tell:
        made = write_images(unet, begin, wanted, out, settings, micro_batch=micro_batch, run=Run(progress=tell))
    value = {**settings, "out": str(out), "seeds": seeds, "images": len(wanted), "made": made}

    def draw() -> None:
        out_console.print(begin.explain(), markup=False)
        sys.stdout.write(f"{made} of {len(wanted)} images made: {out}\n")

    _emit(as_json, value, draw)


@app.command(
    epilog="Examples: symbreak evaluate --samples build/images --data digits; symbreak evaluate --samples build/images "
    "--data train --holdout test --features inception --weights inception.pth --out build/evaluation"
)
def evaluate(
    data: Data,
    samples: Annotated[str | None, typer.Option("--samples", metavar="DIR|FILE", help="generated images")] = None,
    model: Annotated[str | None, typer.Option("--model", metavar="M", help="sample this network instead")] = None,
    holdout: Annotated[
        str | None, typer.Option("--holdout", metavar="T", help="images to measure against (default: half of D)")
    ] = None,
    features: Annotated[
        str | None,
        typer.Option(
            "--features",
            help="digits-classifier, classifier, pixels, inception (FID), dinov2, FILE.safetensors, module:callable",
        ),
    ] = None,
    weights: Weights = None,
    weights_sha256: WeightsHash = None,
    classify: Annotated[
        str | None,
        typer.Option(
            "--classify",
            help="for the composition table: digits-classifier, classifier (trained on the labels), FILE.safetensors, "
            "module:callable",
        ),
    ] = None,
    reference: Annotated[
        Path | None,
        typer.Option("--reference", metavar="FILE", help="statistics of the held-out images: read, or written if new"),
    ] = None,
    repeats: Annotated[int, typer.Option("--repeats", help="parts of the samples, for the interval")] = 5,
    rows: Annotated[int, typer.Option("--rows", help="features held of each set, for all but the Fréchet distance")] = (
        10_000
    ),
    seed: Annotated[int, typer.Option("--seed", help="of parts and subsets")] = 0,
    cache: Annotated[
        bool, typer.Option("--cache/--no-cache", help="keep statistics of real images in ~/.cache/symbreak")
    ] = True,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="also write record.json and report.html")
    ] = None,
    start: Annotated[
        str, typer.Option("--start", metavar="FILE|none", help="with --model: see `symbreak sample`")
    ] = "none",
    at: Annotated[str | None, typer.Option("--at", metavar="LEVEL", help="with --model: see `symbreak sample`")] = None,
    sampler: Annotated[str | None, typer.Option("--sampler", help="with --model")] = None,
    steps: Annotated[int | None, typer.Option("--steps", help="with --model (default: 10)")] = None,
    seeds: Annotated[str, typer.Option("--seeds", metavar="A-B", help="with --model")] = "0-999",
    value_range: Range = None,
    samples_range: Annotated[
        str | None, typer.Option("--samples-range", metavar="LOW,HIGH", help="--range of the samples")
    ] = None,
    skip_bad: SkipBad = False,
    classes: Classes = None,
    pad: Pad = None,
    memory: Memory = None,
    device: Device = "auto",
    precision: Precision = "fp32",
    compiled: Compile = False,
    as_json: Json = False,
) -> None:
    """How far samples are from held-out images, what they leave out, and whether they copy training images."""
    placed = (device, precision, compiled)
    refuse_without_network(model, placed)
    from symbreak.metrics.features import NamedExtractor
    from symbreak.runtime.run import Run
    from symbreak.start.sample import parse_seeds
    from symbreak.studies.evaluate import Subset, evaluate_network
    from symbreak.studies.evaluate import evaluate as measure

    if (samples is None) == (model is None):
        raise InputError("evaluate needs either --samples or --model.")
    run, where = Run(out, memory_size(memory)), device_of(device)
    options = (value_range, skip_bad, classes, pad)
    train = data_set(data, *options)
    held_out = None if holdout is None else data_set(holdout, *options)
    measuring: dict[str, Any] = {
        "features": NamedExtractor(features, weights, weights_sha256, where),
        "classify": None if classify is None else NamedExtractor(classify, device=where),
        "reference": reference,
        "repeats": repeats,
        "subset": Subset(rows, seed),
        "cache": cache,
        "run": run,
    }
    with _bars() as run.progress:
        if model is not None:
            begin, unet = planned(model, start, at, sampler, steps, placed, default_steps=10)
            made = decisive(model, start, unet, begin, placed, MICRO)
            result = evaluate_network(
                unet, begin, parse_seeds(seeds), train, held_out, micro_batch=MICRO, identity=made, **measuring
            )
        else:
            x = data_set(given(samples, "--samples"), samples_range, skip_bad)
            result = measure(x, train, held_out, **measuring)
    if out is not None:
        _report(out)
    _emit(as_json, result, lambda: show(Record("evaluation", {}, result), out and out / "report.html"))


@app.command(
    epilog="Examples: symbreak audit --data digits --model digits --out build/audit; "
    "symbreak audit --data train/ --samples made/ --holdout test/"
)
def audit(
    data: Data,
    samples: Annotated[str | None, typer.Option("--samples", metavar="DIR|FILE", help="generated images")] = None,
    model: Annotated[str | None, typer.Option("--model", metavar="M", help="sample this network instead")] = None,
    holdout: Annotated[
        str | None,
        typer.Option("--holdout", metavar="T", help="images it has not seen (default: other half of the digits)"),
    ] = None,
    features: Annotated[
        str,
        typer.Option(
            "--features",
            help="pixels, digits-classifier, classifier, inception, dinov2, FILE.safetensors, module:callable",
        ),
    ] = "pixels",
    weights: Weights = None,
    weights_sha256: WeightsHash = None,
    threshold: Annotated[float, typer.Option("--threshold", help="memorized where d1/d2 is below it")] = 1 / 3,
    near: Annotated[
        float | None,
        typer.Option("--near", help="near duplicates: fraction of the median eighth-neighbour distance (default 0.1)"),
    ] = None,
    count: Annotated[int | None, typer.Option("--count", metavar="N", help="with --model (default: 1000)")] = None,
    steps: Annotated[int | None, typer.Option("--steps", help="with --model (default: 50)")] = None,
    sampler: Annotated[str | None, typer.Option("--sampler", help="with --model (default: dpm++2m)")] = None,
    seeds: Annotated[
        str | None, typer.Option("--seeds", metavar="A-B", help="with --model, instead of --count")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="of the thinned references and the permutations")] = 0,
    memory: Memory = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="also write record.json and report.html; resumable")
    ] = None,
    samples_range: Annotated[
        str | None, typer.Option("--samples-range", metavar="LOW,HIGH", help="--range of the samples")
    ] = None,
    value_range: Range = None,
    skip_bad: SkipBad = False,
    classes: Classes = None,
    pad: Pad = None,
    limit: Limit = None,
    device: Device = "auto",
    precision: Precision = "fp32",
    compiled: Compile = False,
    as_json: Json = False,
) -> None:
    """Does it copy? Duplicates in the data, memorized samples, training against held-out images."""
    from symbreak.metrics.features import NamedExtractor
    from symbreak.runtime.run import Run
    from symbreak.start.sample import parse_seeds
    from symbreak.studies.audit import Sampling
    from symbreak.studies.audit import audit as measure

    placed = (device, precision, compiled)
    refuse_without_network(model, placed)
    given = {"count": count, "steps": steps, "sampler": sampler, "seeds": seeds}
    asked: dict[str, Any] = {k: v for k, v in given.items() if v is not None}
    if samples is not None and model is not None:
        raise InputError("--samples and --model came together; pass one of them.")
    if asked and model is None:
        raise InputError(f"--{next(iter(asked))} belongs to the samples of a network. Add --model.")
    if count is not None and seeds is not None:
        raise InputError("--count and --seeds came together; pass one of them.")
    if seeds is not None:
        asked["seeds"] = parse_seeds(seeds)
    run = Run(out, memory_size(memory))
    train = data_set(data, value_range, skip_bad, classes, pad, limit)
    kept = None if holdout is None else data_set(holdout, value_range, skip_bad, classes, pad)
    made = None if samples is None else data_set(samples, samples_range, skip_bad)
    pipe = None if model is None else loaded(model, placed)
    with _bars() as run.progress:
        record = measure(
            train,
            made,
            model=pipe,
            sampling=Sampling(**asked),
            holdout=kept,
            features=NamedExtractor(features, weights, weights_sha256, device_of(device)),
            threshold=threshold,
            seed=seed,
            run=run,
            **({} if near is None else {"near": near}),
        )
    if out is not None:
        _report(out)
    _emit(as_json, record.to_dict(), lambda: show(record, out and out / "report.html"))


@app.command(epilog="Example: symbreak train --data digits --recipe recipes/digits.json --out build/digits")
def train(
    data: Data,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="folder for the diffusers pipeline")],
    recipe: Annotated[Path | None, typer.Option("--recipe", metavar="FILE", help="JSON settings; see recipes/")] = None,
    steps: Annotated[int | None, typer.Option("--steps", help="optimizer steps, instead of the recipe's")] = None,
    value_range: Range = None,
    skip_bad: SkipBad = False,
    classes: Classes = None,
    pad: Pad = None,
    limit: Limit = None,
    memory: Memory = None,
    device: Device = "auto",
    precision: Precision = "fp32",
    compiled: Compile = False,
    as_json: Json = False,
) -> None:
    """Train a small diffusers UNet2DModel; goes on from its checkpoint when called again."""
    from dataclasses import replace

    from symbreak.networks.train import Recipe, train_network
    from symbreak.runtime.files import output_folder
    from symbreak.runtime.rows import HELD

    output_folder(out)
    settings = Recipe() if recipe is None else Recipe.load(recipe)
    if steps is not None:
        settings = replace(settings, steps=steps)
    found = data_set(data, value_range, skip_bad, classes, pad, limit)
    with _bars() as tell:
        result = train_network(
            found,
            out,
            settings,
            device=device_of(device),
            precision=precision,
            compiled=compiled,
            memory=memory_size(memory) or HELD,
            reading=partial(tell, "images"),
            progress=lambda s, n, v: tell("steps", s, n),
        )

    def draw() -> None:
        out_console.print(
            f"{result['parameters']:,} parameters, final loss {result['loss'][-1]:.4f}, {result['seconds']:.0f} s"
        )
        sys.stdout.write(f"pipeline: {out}\n")

    _emit(as_json, {**result, "out": str(out)}, draw)


@app.command(epilog="Example: symbreak world two-deltas --train")
def world(
    name: Annotated[str, typer.Argument(metavar="NAME", help="two-deltas, sphere, mixture or digits")],
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="HTML file (default: build/world-NAME.html)")
    ] = None,
    train: Annotated[
        bool, typer.Option("--train", help="two-deltas: train a small network and lay it over the exact law")
    ] = False,
    seed: Annotated[int, typer.Option("--seed", help="of the trajectories and of the network")] = 0,
    as_json: Json = False,
) -> None:
    """Draw a world where everything is known: potential, fixed points, trajectories, critical times."""
    from symbreak.runtime.files import output_folder
    from symbreak.studies.worlds import check_world, draw_world

    check_world(name, train, seed)
    target = Path(f"build/world-{name}.html") if out is None else out
    if target.is_dir():
        raise InputError(f"{target} is a folder; expected a file name such as {target / 'world.html'}.")
    output_folder(target.parent)
    with err.status(name) as status:
        record = draw_world(name, target, train, seed, lambda text: status.update(f"{name}: {text}"))

    _emit(as_json, {**record.to_dict(), "out": str(target)}, lambda: show(record, target))


@app.command(epilog="Example: symbreak report build/demo/record.json --out build/demo/report.html")
def report(
    record: Annotated[Path, typer.Argument(metavar="RECORD", help="record.json or its folder")],
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="HTML file (default: beside the record)")
    ] = None,
    as_json: Json = False,
) -> None:
    """Draw the report of a record again."""
    from symbreak.report.html import write_report

    found = Record.load(record)
    folder = record if record.is_dir() else record.parent
    target = out or folder / "report.html"
    if target.is_dir():
        raise InputError(f"{target} is a folder; expected a file name such as {target / 'report.html'}.")
    write_report(found, target)
    _emit(as_json, {"report": str(target)}, lambda: print(f"report: {target}"))  # noqa: T201


def _version(value: bool) -> None:
    if value:
        from importlib.metadata import version

        sys.stdout.write(f"symbreak {version('symbreak')}\n")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version")
    ] = False,
) -> None:
    pass


def _fail(code: int, line: str) -> NoReturn:
    sys.stderr.write(" ".join(line.split()) + "\n")
    sys.stderr.flush()
    raise SystemExit(code)


def main(argv: list[str] | None = None) -> None:
    """Run a command and leave with its exit code."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # waiting threads sleep instead of spinning

    def terminate(*_: object) -> None:
        raise SystemExit(143)

    signal.signal(signal.SIGTERM, terminate)
    try:
        arguments = sys.argv[1:] if argv is None else argv
        with joined() as (rank, _):
            err.quiet = out_console.quiet = rank > 0  # one process speaks for all
            code = app(args=arguments or ["--help"], standalone_mode=False)
    except InputError as error:
        _fail(2, f"symbreak: {error}")
    except SystemExit as left:
        code = left.code
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except (OSError, MemoryError, SafetensorError) as error:  # the last is how diffusers meets a full disk
        _fail(1, f"symbreak: the machine failed: {error or type(error).__name__}")
    except Exception as error:
        if lost(error):
            _fail(1, f"symbreak: the machine failed: another process of this run ended ({str(error)[:160]}).")
        # Usage errors carry their own exit code and know how to print themselves.
        if not hasattr(error, "exit_code"):
            raise
        _fail(int(error.exit_code), f"symbreak: {getattr(error, 'message', error)} See symbreak --help.")
    if code in (130, 143):  # typer turns Ctrl-C into a code of its own
        _fail(code, "symbreak: interrupted; the same command goes on from what is finished.")
    raise SystemExit(code if isinstance(code, int) else 0)
